// One row of logits on the device: keys that order tokens, 16-byte loads whatever the row's alignment, and
// reductions over a block.
//
// A key orders tokens by (value descending, id ascending): the largest key is the argmax with ties to the
// lowest id. A cut is the smallest key that is kept.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <type_traits>

#include "verify_tree.h"

namespace specfuse {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
static_assert(kThreads % 32 == 0, "reductions work on whole warps");
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

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

// Above all others for NaN.
__device__ __forceinline__ uint64_t token_key(float value, int64_t token) {
  if (value != value) return kNanKey;
  return uint64_t{ordered(value)} << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(token));
}

__device__ __forceinline__ int64_t token_of(uint64_t key) {
  return 0xFFFFFFFFu - static_cast<uint32_t>(key);
}

__device__ __forceinline__ float value_of(uint64_t key) {
  return from_ordered(static_cast<uint32_t>(key >> 32));
}

template <LogitsDtype kDtype>
__device__ __forceinline__ float decode(uint32_t bits) {
  if (kDtype == LogitsDtype::kFloat32) return float_from_bits(bits);
  const auto half = static_cast<uint16_t>(bits);
  if (kDtype == LogitsDtype::kBFloat16) return float_from_bfloat16(half);
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  return float_from_half(half);
#endif
}

// 16 bytes of a row: kChunkTokens tokens, -inf beyond the row's end.
struct Chunk {
  uint32_t words[4];
};

template <LogitsDtype kDtype>
struct Row {
  const void* data;
  int64_t stride, V;

  using Bits = typename std::conditional<kDtype == LogitsDtype::kFloat32, uint32_t, uint16_t>::type;
  static constexpr int kChunkTokens = 16 / sizeof(Bits);
  static constexpr uint32_t kMinusInfinityBits = kDtype == LogitsDtype::kFloat32   ? 0xFF800000u
                                                 : kDtype == LogitsDtype::kFloat16 ? 0xFC00u
                                                                                   : 0xFF80u;

  __device__ __forceinline__ Bits bits(int64_t token) const {
    return static_cast<const Bits*>(data)[token * stride];
  }
  __device__ __forceinline__ float operator[](int64_t token) const { return decode<kDtype>(bits(token)); }

  __device__ __forceinline__ unsigned misaligned() const {
    return static_cast<unsigned>(reinterpret_cast<uintptr_t>(data)) % 16;
  }
  // Chunks that lie whole in the row are single 16-byte loads.
  __device__ __forceinline__ bool direct() const { return stride == 1 && misaligned() == 0; }

  // `first` is a multiple of kChunkTokens, or the row is not direct.
  __device__ __forceinline__ Chunk load_direct(int64_t first) const {
    const uint4 v = *reinterpret_cast<const uint4*>(static_cast<const Bits*>(data) + first);
    return {{v.x, v.y, v.z, v.w}};
  }

  // Any alignment: two aligned loads shifted together, never beyond the row; elsewhere token by token.
  __device__ Chunk load(int64_t first) const {
    if (stride == 1 && first + kChunkTokens <= V && misaligned() == 0) return load_direct(first);
    if (stride == 1 && first >= kChunkTokens && first + 2 * kChunkTokens <= V) return load_shifted(first);
    Chunk chunk;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (sizeof(Bits) == 4) {
        chunk.words[w] = bits_or_minus_infinity(first + w);
      } else {
        chunk.words[w] = bits_or_minus_infinity(first + 2 * w) | bits_or_minus_infinity(first + 2 * w + 1)
                                                                     << 16;
      }
    }
    return chunk;
  }

  __device__ __forceinline__ uint32_t bits_or_minus_infinity(int64_t token) const {
    return token < V ? bits(token) : kMinusInfinityBits;
  }

  __device__ __forceinline__ Chunk load_shifted(int64_t first) const {
    const unsigned offset = misaligned();
    const char* start =
        reinterpret_cast<const char*>(static_cast<const Bits*>(data) + first) - static_cast<int>(offset);
    const uint4 a = *reinterpret_cast<const uint4*>(start), b = *reinterpret_cast<const uint4*>(start + 16);
    uint32_t words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int by = 1; by <= 2; by *= 2) {
#pragma unroll
      for (int w = 0; w < 8; ++w) words[w] = offset / 4 & by && w + by < 8 ? words[w + by] : words[w];
    }
    Chunk chunk;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      chunk.words[w] = offset % 4 ? words[w] >> 16 | words[w + 1] << 16 : words[w];
    }
    return chunk;
  }

  __device__ __forceinline__ static float value(const Chunk& chunk, int token) {
    if (sizeof(Bits) == 4) return decode<kDtype>(chunk.words[token]);
    if (kDtype == LogitsDtype::kBFloat16)
      return float_from_bits(token % 2 ? chunk.words[token / 2] & 0xFFFF0000u : chunk.words[token / 2] << 16);
    return decode<kDtype>(chunk.words[token / 2] >> (token % 2 * 16) & 0xFFFFu);
  }
};

// The part of a row that one block looks at; both ends are multiples of 16 tokens, or the row's end.
struct Slice {
  int64_t begin, end;
};

// V is below 2^31: 64-bit division is a subroutine of a hundred instructions.
__device__ __forceinline__ Slice slice_of(int64_t V, unsigned rank, unsigned ranks) {
  const int64_t tokens = ((static_cast<unsigned>(V) + ranks - 1) / ranks + 15) / 16 * 16;
  const int64_t begin = tokens * rank;
  return {begin < V ? begin : V, begin + tokens < V ? begin + tokens : V};
}

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
    value = combine(value, __shfl_xor_sync(kAllLanes, value, lanes));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  T result = warps[0];
  for (int w = 1; w < kWarps; ++w) result = combine(result, warps[w]);
  __syncthreads();  // before the next call writes
  return result;
}

__device__ __forceinline__ float gumbel_float(uint32_t word) {
  const float u = static_cast<float>(word >> 8) * 0x1p-24f;
  return -logf(-logf(u > 0x1p-25f ? u : 0x1p-25f));
}

// How one row is sampled: temperature above 0, the rest as in VerifyTreeParams.
struct Rule {
  float temperature;
  int top_k;
  float top_p, min_p;

  __device__ __forceinline__ float inverse_temperature() const { return fminf(1.0f / temperature, FLT_MAX); }
  __device__ __forceinline__ bool filters(int64_t V) const {
    return (top_k > 0 && top_k < V) || top_p < 1.0f || min_p > 0.0f;
  }
};

}  // namespace
}  // namespace specfuse
