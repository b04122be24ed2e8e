// Adds verify_tree to a Python module: the last argument is the address of the stream.
#pragma once

#include "bindings_arguments.h"

namespace specfuse {
namespace bindings {

inline void verify_tree_on_cuda(uintptr_t logits, int dtype, const std::array<int64_t, 3>& shape,
                                const std::array<int64_t, 3>& strides, const std::array<uintptr_t, 9>& inputs,
                                const std::array<uintptr_t, 4>& outputs, uintptr_t stream) {
  const auto params = verify_tree_params(logits, dtype, shape, strides, inputs, outputs);
  raise_on("verify_tree", verify_tree_cuda(params, pointer<void>(stream)));
}

inline void bind_verify_tree_cuda(pybind11::module_& module) {
  module.def("verify_tree", &verify_tree_on_cuda);
}

}  // namespace bindings
}  // namespace specfuse
