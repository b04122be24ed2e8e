// Block-level functions over one row of logits: argmax, mass, the cut of top-k, top-p and min-p, and the
// draw.
//
// A cut is the smallest key that is kept; keys order tokens by (value descending, id ascending). Every
// function is called by all kThreads threads of a block and gives all of them the same result.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>

#include "verify_tree.h"

namespace specfuse {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
static_assert(kThreads % 32 == 0, "reductions work on whole warps");

constexpr uint64_t kNanKey = ~uint64_t{0};
constexpr uint32_t kMinusInfinity = 0x007FFFFFu;  // ordered(-inf)
constexpr uint64_t kKeepAll = uint64_t{kMinusInfinity + 1} << 32;

// Maps floats to integers in the same order; both zeros become one.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = bits_from_float(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered(uint32_t key) {
  return float_from_bits(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

// Sorts as (value descending, id ascending) when keys are taken from the largest down; above all others for
// NaN.
__device__ __forceinline__ uint64_t token_key(float value, int64_t token) {
  if (value != value) return kNanKey;
  return uint64_t{ordered(value)} << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(token));
}

__device__ __forceinline__ int64_t token_of(uint64_t key) {
  return 0xFFFFFFFFu - static_cast<uint32_t>(key);
}

template <LogitsDtype kDtype>
struct Row {
  const void* data;
  int64_t stride, V;

  __device__ __forceinline__ float operator[](int64_t token) const {
    if (kDtype == LogitsDtype::kFloat32) return static_cast<const float*>(data)[token * stride];
    const uint16_t bits = static_cast<const uint16_t*>(data)[token * stride];
    return kDtype == LogitsDtype::kFloat16 ? float_from_half(bits) : float_from_bfloat16(bits);
  }
};

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// Combines one value per thread; every thread gets the same result, in the same order of operations.
template <typename T, typename Combine>
__device__ T block_reduce(T value, Combine combine) {
  __shared__ T warps[kWarps];
  for (int lanes = 16; lanes > 0; lanes /= 2)
    value = combine(value, __shfl_xor_sync(0xFFFFFFFFu, value, lanes));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  T result = warps[0];
  for (int w = 1; w < kWarps; ++w) result = combine(result, warps[w]);
  __syncthreads();  // before the next call writes
  return result;
}

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

// Number of tokens whose key lies in [low, high].
template <LogitsDtype kDtype>
__device__ int count(const Row<kDtype>& row, uint64_t low, uint64_t high) {
  int found = 0;
  for (int64_t v = threadIdx.x; v < row.V; v += kThreads) {
    const uint64_t key = token_key(row[v], v);
    found += key >= low && key <= high;
  }
  return block_reduce(found, Sum());
}

__device__ __forceinline__ uint64_t larger(uint64_t a, uint64_t b) {
  return a > b ? a : b;
}

// Keeps the k largest and their ties: the largest value that k tokens reach, by bisection.
template <LogitsDtype kDtype>
__device__ uint64_t top_k_cut(const Row<kDtype>& row, int k, uint64_t top) {
  uint32_t low = kMinusInfinity, high = static_cast<uint32_t>(top >> 32);
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2 + 1;
    if (count(row, uint64_t{middle} << 32, kNanKey) >= k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return larger(uint64_t{low} << 32, kKeepAll);
}

// Keeps a token if the mass strictly before it is below top_p of the mass inside `cut`: bisection for the
// lowest value of which a token is kept, then for the last id among its ties.
template <LogitsDtype kDtype>
__device__ uint64_t top_p_cut(const Row<kDtype>& row, float top_p, float max, float inverse_temperature,
                              uint64_t top, uint64_t cut) {
  const double target = top_p * mass(row, max, inverse_temperature, cut);
  uint32_t low = static_cast<uint32_t>(cut >> 32), high = static_cast<uint32_t>(top >> 32);
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (mass(row, max, inverse_temperature, uint64_t{middle + 1} << 32) < target) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const uint64_t ties = uint64_t{low} << 32;
  const double before = mass(row, max, inverse_temperature, uint64_t{low + 1} << 32);
  const double weight = expf((from_ordered(low) - max) * inverse_temperature);
  const double wanted = ceil((target - before) / weight);
  if (!(wanted < count(row, ties, ties | 0xFFFFFFFFu))) return larger(ties, cut);
  const int kept = wanted > 1.0 ? static_cast<int>(wanted) : 1;
  uint32_t first = 0, last = static_cast<uint32_t>(row.V - 1);
  while (first < last) {
    const uint32_t middle = first + (last - first) / 2;
    if (count(row, ties | (0xFFFFFFFFu - middle), ties | 0xFFFFFFFFu) >= kept) {
      last = middle;
    } else {
      first = middle + 1;
    }
  }
  return larger(ties | (0xFFFFFFFFu - last), cut);
}

// Keeps tokens of at least min_p times the largest probability.
__device__ __forceinline__ uint64_t min_p_cut(float min_p, float max, float temperature, uint64_t cut) {
  const double threshold = max + log(static_cast<double>(min_p)) * temperature;
  float lowest = static_cast<float>(threshold);
  if (lowest < threshold) lowest = nextafterf(lowest, INFINITY);
  return larger(uint64_t{ordered(lowest)} << 32, cut);
}

// How one row is sampled: temperature above 0, the rest as in VerifyTreeParams.
struct Rule {
  float temperature;
  int top_k;
  float top_p, min_p;

  __device__ __forceinline__ float inverse_temperature() const { return fminf(1.0f / temperature, FLT_MAX); }
};

// The cut of all three filters, applied in the order of the fields; `top` is the row's top_token.
template <LogitsDtype kDtype>
__device__ uint64_t filtered_cut(const Row<kDtype>& row, const Rule& rule, uint64_t top) {
  const float max = from_ordered(static_cast<uint32_t>(top >> 32));
  uint64_t cut = kKeepAll;
  if (rule.top_k > 0 && rule.top_k < row.V) cut = top_k_cut(row, rule.top_k, top);
  if (rule.top_p < 1.0f) cut = top_p_cut(row, rule.top_p, max, rule.inverse_temperature(), top, cut);
  if (rule.min_p > 0.0f) cut = min_p_cut(rule.min_p, max, rule.temperature, cut);
  return cut < top ? cut : top;  // values out of range keep one token
}

__device__ __forceinline__ float gumbel_float(uint32_t word) {
  const float u = static_cast<float>(word >> 8) * 0x1p-24f;
  return -logf(-logf(u > 0x1p-25f ? u : 0x1p-25f));
}

// Gumbel-argmax over the tokens inside the cut.
template <LogitsDtype kDtype>
__device__ int64_t draw(const Row<kDtype>& row, float max, float inverse_temperature, uint64_t cut,
                        int64_t seed, int64_t position) {
  unsigned long long best = 0;
  for (int64_t block = threadIdx.x; block * 4 < row.V; block += kThreads) {
    uint32_t words[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(position),
                         static_cast<uint32_t>(position >> 32), 0u};
    philox4x32(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    for (int j = 0; j < 4; ++j) {
      const int64_t v = block * 4 + j;
      if (v >= row.V) break;
      const float x = row[v];
      if (token_key(x, v) < cut) continue;
      const unsigned long long key = token_key((x - max) * inverse_temperature + gumbel_float(words[j]), v);
      best = best > key ? best : key;
    }
  }
  return token_of(block_reduce(best, Max()));
}

}  // namespace
}  // namespace specfuse
