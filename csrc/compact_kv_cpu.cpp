// CPU implementation of compact_kv. Bytes moved: 2 * row_bytes * G per slot that is not in place already,
// which is also the floor; rows whose path is a prefix of the tree's own order cost nothing.
#include <cstring>

#include "compact_kv.h"

namespace specfuse {
namespace {

CompactKvError check(const CompactKvParams& p, const KvTensor* tensors, int64_t num_tensors) {
  for (int64_t b = 0; b < p.B; ++b) {
    const int32_t n = p.length[b];
    if (n < 0 || n > p.K) return {"length must lie between 0 and the number of path slots", b, n};
    if (n <= 1) continue;
    const int32_t* path = p.path + b * p.K;
    for (int32_t i = 1; i < n; ++i) {
      if (path[i] <= path[i - 1] || path[i] < i)
        return {"path must increase strictly from node 0 along each row", b, path[i]};
    }
    for (int64_t t = 0; t < num_tensors; ++t) {
      if (p.start[b] < 0 || p.start[b] >= tensors[t].Smax - path[n - 1]) {
        return {"start plus the last path node must lie inside every kv tensor", b, p.start[b]};
      }
    }
  }
  return {};
}

void compact_row(const KvTensor& kv, int64_t b, const int32_t* path, int32_t n, int64_t start) {
  for (int64_t g = 0; g < kv.G; ++g) {
    char* slots = kv.data + b * kv.stride_b + g * kv.stride_g + start * kv.stride_s;
    // Ascending order: path[i] >= i, so a slot is read before anything is written over it.
    for (int32_t i = 1; i < n; ++i) {
      if (path[i] != i) std::memcpy(slots + i * kv.stride_s, slots + path[i] * kv.stride_s, kv.row_bytes);
    }
  }
}

}  // namespace

CompactKvError compact_kv_cpu(const CompactKvParams& p, const KvTensor* tensors, int64_t num_tensors) {
  if (const CompactKvError error = check(p, tensors, num_tensors); error.message) return error;
  for (int64_t b = 0; b < p.B; ++b) {
    const int32_t* path = p.path + b * p.K;
    const int32_t n = p.length[b];
    // A strictly increasing path whose last entry is in place is in place everywhere.
    if (n <= 1 || path[n - 1] == n - 1) continue;
    for (int64_t t = 0; t < num_tensors; ++t) compact_row(tensors[t], b, path, n, p.start[b]);
  }
  return {};
}

}  // namespace specfuse
