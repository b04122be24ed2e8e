// Functions over one row for kernels of one block per row; all kThreads threads call them and get the result.
#pragma once

#include "verify_tree_cuda_select.cuh"

namespace specfuse {
namespace {

// The argmax as a key, kNanKey where there is a NaN.
template <LogitsDtype kDtype>
__device__ uint64_t top_token(const Row<kDtype>& row) {
  unsigned long long best = 0;
  for (int64_t v = threadIdx.x; v < row.V; v += kThreads) {
    const unsigned long long key = token_key(row[v], v);
    best = best > key ? best : key;
  }
  return block_reduce(best, Max());
}

// Sum of exp((x - max) / temperature) over tokens whose key is at least `cut`.
template <LogitsDtype kDtype>
__device__ double mass(const Row<kDtype>& row, float max, float inverse_temperature, uint64_t cut) {
  float sum = 0.0f;
  for (int64_t v = threadIdx.x; v < row.V; v += kThreads) {
    const float x = row[v];
    if (token_key(x, v) >= cut) sum += expf((x - max) * inverse_temperature);
  }
  return block_reduce(static_cast<double>(sum), Sum());
}

// The cut of all three filters; `top` is the row's top_token, finite.
template <LogitsDtype kDtype>
__device__ uint64_t filtered_cut(const Row<kDtype>& row, const Rule& rule, uint64_t top) {
  Group alone = single_block();
  return filtered_cut(alone, row, Slice{0, row.V}, rule, top);
}

}  // namespace
}  // namespace specfuse
