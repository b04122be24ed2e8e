// Adds compact_kv to a Python module: the last argument is the address of the stream.
#pragma once

#include "bindings_arguments.h"

namespace specfuse {
namespace bindings {

inline void compact_kv_on_cuda(const pybind11::bytes& tensors, int64_t B, int64_t K, uintptr_t path,
                               uintptr_t length, uintptr_t start, uintptr_t stream) {
  const auto table = kv_tensors(tensors);
  const char* error = compact_kv_cuda(compact_kv_params(B, K, path, length, start), table.data(),
                                      static_cast<int64_t>(table.size()), pointer<void>(stream));
  raise_on("compact_kv", error);
}

inline void bind_compact_kv_cuda(pybind11::module_& module) {
  module.def("compact_kv", &compact_kv_on_cuda);
}

}  // namespace bindings
}  // namespace specfuse
