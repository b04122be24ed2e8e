// How both Python modules turn addresses, shapes and strides into the parameter structs of the ops.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "compact_kv.h"
#include "verify_tree.h"
#include "verify_tree_rejection.h"

namespace specfuse {
namespace bindings {

template <typename T>
inline T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline void raise_on(const char* op, const char* error) {
  if (error) throw std::runtime_error(std::string(op) + " could not be launched: " + error);
}

// shape = (B, N, V); strides of the logits in elements; inputs and outputs in the order of the op's schema.
inline VerifyTreeParams verify_tree_params(uintptr_t logits, int dtype, const std::array<int64_t, 3>& shape,
                                           const std::array<int64_t, 3>& strides,
                                           const std::array<uintptr_t, 9>& inputs,
                                           const std::array<uintptr_t, 4>& outputs) {
  return {pointer<const void>(logits),
          strides[0],
          strides[1],
          strides[2],
          static_cast<LogitsDtype>(dtype),
          shape[0],
          shape[1],
          shape[2],
          pointer<const int64_t>(inputs[0]),
          pointer<const int32_t>(inputs[1]),
          pointer<const int32_t>(inputs[2]),
          pointer<const float>(inputs[3]),
          pointer<const int32_t>(inputs[4]),
          pointer<const float>(inputs[5]),
          pointer<const float>(inputs[6]),
          pointer<const int64_t>(inputs[7]),
          pointer<const int64_t>(inputs[8]),
          pointer<int32_t>(outputs[0]),
          pointer<int32_t>(outputs[1]),
          pointer<int64_t>(outputs[2]),
          pointer<float>(outputs[3])};
}

// The drafter's side: draft_probs [B, N, W] with its strides, and the ids where it is sparse.
inline VerifyTreeRejectionParams verify_tree_rejection_params(const VerifyTreeParams& tree, uintptr_t probs,
                                                              int dtype, int64_t W,
                                                              const std::array<int64_t, 3>& strides,
                                                              uintptr_t ids, bool sparse,
                                                              bool with_replacement) {
  return {tree,
          pointer<const void>(probs),
          strides[0],
          strides[1],
          strides[2],
          static_cast<LogitsDtype>(dtype),
          W,
          sparse,
          pointer<const int64_t>(ids),
          with_replacement};
}

// The bytes of a KvTensor for each cache tensor: address, stride_b, stride_g, stride_s, G, Smax, row_bytes.
inline std::vector<KvTensor> kv_tensors(const std::string& table) {
  static_assert(sizeof(KvTensor) == 7 * 8, "as struct.pack writes it");
  std::vector<KvTensor> tensors(table.size() / sizeof(KvTensor));
  std::memcpy(static_cast<void*>(tensors.data()), table.data(), tensors.size() * sizeof(KvTensor));
  return tensors;
}

inline CompactKvParams compact_kv_params(int64_t B, int64_t K, uintptr_t path, uintptr_t length,
                                         uintptr_t start) {
  return {B, K, pointer<const int32_t>(path), pointer<const int32_t>(length), pointer<const int64_t>(start)};
}

}  // namespace bindings
}  // namespace specfuse
