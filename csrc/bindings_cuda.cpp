// Python module specfuse._C_cuda: launches on the stream whose address comes last. Shapes, dtypes, strides
// and devices are checked by the callers in specfuse/ops; values on the device are not read on the host.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings_arguments.h"

using namespace specfuse::bindings;

namespace {

void raise_on(const char* op, const char* error) {
  if (error) throw std::runtime_error(std::string(op) + " could not be launched: " + error);
}

void verify_tree(uintptr_t logits, int dtype, const std::array<int64_t, 3>& shape,
                 const std::array<int64_t, 3>& strides, const std::array<uintptr_t, 9>& inputs,
                 const std::array<uintptr_t, 4>& outputs, uintptr_t stream) {
  const auto params = verify_tree_params(logits, dtype, shape, strides, inputs, outputs);
  raise_on("verify_tree", specfuse::verify_tree_cuda(params, pointer<void>(stream)));
}

void compact_kv(const std::vector<KvTuple>& tensors, int64_t B, int64_t K, uintptr_t path, uintptr_t length,
                uintptr_t start, uintptr_t stream) {
  const auto table = kv_tensors(tensors);
  raise_on("compact_kv",
           specfuse::compact_kv_cuda(compact_kv_params(B, K, path, length, start), table.data(),
                                     static_cast<int64_t>(table.size()), pointer<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
  module.def("verify_tree", &verify_tree);
  module.def("compact_kv", &compact_kv);
}
