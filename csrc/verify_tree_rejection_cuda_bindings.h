// Adds verify_tree_rejection to a Python module: blocks per tree, scratch memory and the stream come last.
#pragma once

#include "bindings_arguments.h"

namespace specfuse {
namespace bindings {

inline void verify_tree_rejection_on_cuda(
    uintptr_t logits, int dtype, const std::array<int64_t, 3>& shape, const std::array<int64_t, 3>& strides,
    const std::array<uintptr_t, 9>& inputs, const std::array<uintptr_t, 4>& outputs, uintptr_t draft_probs,
    int draft_dtype, int64_t W, const std::array<int64_t, 3>& draft_strides, uintptr_t draft_ids, bool sparse,
    bool with_replacement, int64_t cluster, uintptr_t scratch, uintptr_t stream) {
  auto tree = verify_tree_params(logits, dtype, shape, strides, inputs, outputs);
  tree.cluster = cluster;
  tree.scratch = pointer<void>(scratch);
  const auto params = verify_tree_rejection_params(tree, draft_probs, draft_dtype, W, draft_strides,
                                                   draft_ids, sparse, with_replacement);
  raise_on("verify_tree_rejection", verify_tree_rejection_cuda(params, pointer<void>(stream)));
}

inline void bind_verify_tree_rejection_cuda(pybind11::module_& module) {
  module.def("verify_tree_rejection", &verify_tree_rejection_on_cuda);
  module.def("verify_tree_rejection_scratch_bytes", &verify_tree_rejection_cuda_scratch_bytes);
}

}  // namespace bindings
}  // namespace specfuse
