// Python module specfuse._C_cuda: each op adds itself and launches on the stream whose address comes last.
// Shapes, dtypes, strides and devices are checked by the callers in specfuse/ops; values on the device are
// not read on the host.
#include "compact_kv_cuda_bindings.h"
#include "verify_tree_cuda_bindings.h"
#include "verify_tree_rejection_cuda_bindings.h"

PYBIND11_MODULE(_C_cuda, module) {
  specfuse::bindings::bind_verify_tree_cuda(module);
  specfuse::bindings::bind_verify_tree_rejection_cuda(module);
  specfuse::bindings::bind_compact_kv_cuda(module);
}
