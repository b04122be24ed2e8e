// Adds verify_tree to a Python module: how rows are split, scratch memory, and the stream come last.
#pragma once

#include "bindings_arguments.h"

namespace specfuse {
namespace bindings {

inline void verify_tree_on_cuda(uintptr_t logits, int dtype, const std::array<int64_t, 3>& shape,
                                const std::array<int64_t, 3>& strides, const std::array<uintptr_t, 9>& inputs,
                                const std::array<uintptr_t, 4>& outputs, int64_t splits, int64_t cluster,
                                uintptr_t scratch, uintptr_t stream) {
  auto params = verify_tree_params(logits, dtype, shape, strides, inputs, outputs);
  params.splits = splits;
  params.cluster = cluster;
  params.scratch = pointer<void>(scratch);
  raise_on("verify_tree", verify_tree_cuda(params, pointer<void>(stream)));
}

inline int64_t verify_tree_scratch_bytes(int64_t B, int64_t N, int64_t splits, int64_t cluster) {
  VerifyTreeParams params = {};
  params.B = B;
  params.N = N;
  params.splits = splits;
  params.cluster = cluster;
  return verify_tree_cuda_scratch_bytes(params);
}

inline void bind_verify_tree_cuda(pybind11::module_& module) {
  module.def("verify_tree", &verify_tree_on_cuda);
  module.def("verify_tree_scratch_bytes", &verify_tree_scratch_bytes);
}

}  // namespace bindings
}  // namespace specfuse
