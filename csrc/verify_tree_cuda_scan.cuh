// One pass over (a slice of) a row: argmax, sum of exponentials and the Gumbel draw.
//
// Per token, in the code for sm_90: decode, maximum, exponential and sum 9 instructions. A draw costs 23
// more, most of them Philox; logarithms only for the few tokens that pass a test: with w = exp((x - max) /
// T), known from the sum, x / T + g can reach a threshold only if 1 - u <= w * exp(max / T - threshold),
// because g <= -log(1 - u). Four tokens whose largest w fails for the smallest 1 - u = 2^-24 need no Philox
// either: a warp skips it where the row is peaked. For 256 rows of 32,000 tokens an H200 (132 * 4
// instructions per cycle at 1.75 GHz) issues greedy rows in 2.5 us, less than the 3.8 us that bf16 takes to
// read; sampled rows that are flat in 9 us: those are bound by arithmetic.
#pragma once

#include "verify_tree_cuda_group.cuh"

namespace specfuse {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr float kLeastNoise = -2.86f;  // above gumbel(u = 0) = -log(log(2^25)) = -2.8525 in absolute value

// What a pass found; slices merge into rows.
struct alignas(16) Partial {
  uint64_t top;      // largest token_key, 0 where there is none
  uint64_t best;     // token_key of the largest x / T + gumbel, 0 where nothing was drawn
  float sum;         // of exp((x - value_of(top)) / T); NaN if a logit is
  float second;      // an upper bound of every other score that comes near the best one
  float best_logit;  // x of the token in `best`
  float unused;
};
static_assert(sizeof(Partial) == 32, "exchanged as two 16-byte words");

__device__ __forceinline__ Partial empty_partial() {
  return {0, 0, 0.0f, -INFINITY, 0.0f, 0.0f};
}

// What a pass looks for.
struct Pass {
  float inverse_temperature;  // of the sum and of the draw
  uint64_t cut;               // tokens below are left out
  bool draw;
  int64_t seed, position;
};

__device__ __forceinline__ float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

__device__ __forceinline__ float finite(float x) {
  return fminf(fmaxf(x, -FLT_MAX), FLT_MAX);
}

// Scores in float32 are off by less than half of this, noise and product together.
__device__ __forceinline__ float margin(float score) {
  return (fabsf(score) + 32.0f) * 0x1p-19f;
}

__device__ __forceinline__ Partial merge(const Partial& a, const Partial& b, float scale2) {
  Partial all;
  all.top = a.top > b.top ? a.top : b.top;
  const float max = finite(value_of(all.top));
  // A part without tokens has the key 0, which is a NaN as a value.
  const float sum_a = a.top ? a.sum * fast_exp2((finite(value_of(a.top)) - max) * scale2) : a.sum;
  const float sum_b = b.top ? b.sum * fast_exp2((finite(value_of(b.top)) - max) * scale2) : b.sum;
  all.sum = sum_a + sum_b;
  const bool first = a.best >= b.best;
  const uint64_t loser = first ? b.best : a.best;
  all.best = first ? a.best : b.best;
  all.best_logit = first ? a.best_logit : b.best_logit;
  all.second = fmaxf(fmaxf(a.second, b.second), loser ? value_of(loser) : -INFINITY);
  all.unused = 0.0f;
  return all;
}

__device__ __forceinline__ float scale2_of(float inverse_temperature) {
  return fminf(inverse_temperature * kLog2e, FLT_MAX);
}

// Merges over groups of `lanes` neighbouring lanes; all of them get the result.
__device__ __forceinline__ Partial merge_lanes(Partial mine, float scale2, int lanes) {
  for (int by = 1; by < lanes; by *= 2) {
    Partial other;
    other.top = __shfl_xor_sync(kAllLanes, mine.top, by);
    other.best = __shfl_xor_sync(kAllLanes, mine.best, by);
    other.sum = __shfl_xor_sync(kAllLanes, mine.sum, by);
    other.second = __shfl_xor_sync(kAllLanes, mine.second, by);
    other.best_logit = __shfl_xor_sync(kAllLanes, mine.best_logit, by);
    mine = threadIdx.x & by ? merge(other, mine, scale2) : merge(mine, other, scale2);
  }
  return mine;
}

__device__ __forceinline__ uint32_t maximum_of_warp(float value) {
  return __reduce_max_sync(kAllLanes, ordered(value));
}

// The running state of one thread; `max` and `floor` are those of its warp.
struct Scan {
  float scale, scale2;    // 1 / T, log2(e) / T
  float max = -FLT_MAX;   // of the warp, finite
  float sum = 0.0f;       // relative to `max`
  float top = -INFINITY;  // of this thread
  uint32_t top_token = 0;
  float best = -INFINITY, second = -INFINITY, best_logit = 0.0f;
  uint32_t best_token = 0;
  float floor = -INFINITY;  // scores below cannot come near the row's best
  float reach = 0.0f;       // exp(max / T - floor): w * reach bounds 1 - u from above

  __device__ __forceinline__ void raise_floor(float score) {
    const float lowered = score - margin(score);
    if (lowered > floor) floor = lowered;
    // 1.001: the approximate exponentials must not decide.
    reach = 1.001f * fast_exp2(fminf((max * scale - floor) * kLog2e, 100.0f));
  }

  __device__ __forceinline__ void consider(float x, uint32_t word, uint32_t token) {
    const float score = fmaf(x, scale, gumbel_float(word));
    if (score > best) {
      second = best;
      best = score;
      best_logit = x;
      best_token = token;
    } else {
      second = fmaxf(second, score);
    }
  }

  // Noise of four tokens from `first` on, whose weights are w; x = -inf has w = 0.
  __device__ __forceinline__ void draw_four(const float* x, const float* w, uint32_t first,
                                            const Pass& pass) {
    const float largest = fmaxf(fmaxf(w[0], w[1]), fmaxf(w[2], w[3]));
    if (!(largest * reach >= 0x1p-24f)) return;
    uint32_t words[4] = {first / 4, static_cast<uint32_t>(pass.position),
                         static_cast<uint32_t>(pass.position >> 32), 0u};
    philox4x32(words, static_cast<uint32_t>(pass.seed), static_cast<uint32_t>(pass.seed >> 32));
    unsigned passing = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // 2 - f is 1 - u without u's last bit: at most 2^-24 above.
      const float rest = 2.0f - float_from_bits(words[j] >> 9 | 0x3F800000u) - 0x1p-24f;
      passing |= (rest <= w[j] * reach ? 1u : 0u) << j;
    }
    while (passing) {
      const int j = __ffs(static_cast<int>(passing)) - 1;
      passing &= passing - 1;
      const float logit = j < 2 ? (j == 0 ? x[0] : x[1]) : (j == 2 ? x[2] : x[3]);
      const uint32_t word = j < 2 ? (j == 0 ? words[0] : words[1]) : (j == 2 ? words[2] : words[3]);
      if (logit > -INFINITY) consider(logit, word, first + j);
    }
  }
};

// What one thread looks at in an iteration, as it lies in memory: two loads, in flight while those of the
// iteration before are worked on. 1,024 threads per multiprocessor then keep 32 KB in flight; the bandwidth
// of an H200 over a latency of 0.7 us asks for 23.
template <LogitsDtype kDtype>
struct Tokens {
  static constexpr int kChunk = Row<kDtype>::kChunkTokens;
  static constexpr int kLoads = 2, kCount = kLoads * kChunk, kStep = kThreads * kCount;
  Chunk chunks[kLoads];

  __device__ __forceinline__ static int64_t token_at(int64_t base, int t) {
    return base + (t / kChunk * kThreads + threadIdx.x) * kChunk + t % kChunk;
  }
  __device__ __forceinline__ float operator[](int t) const {
    return Row<kDtype>::value(chunks[t / kChunk], t % kChunk);
  }

  __device__ __forceinline__ void load(const Row<kDtype>& row, const Slice& slice, int64_t base) {
    constexpr uint32_t kInf = Row<kDtype>::kMinusInfinityBits;
    constexpr uint32_t kWord = kChunk == 4 ? kInf : kInf << 16 | kInf;
    if (row.direct() && slice.end % kChunk == 0) {  // whole chunks: all loads are in flight together
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        const int64_t first = token_at(base, l * kChunk);
        chunks[l] = Chunk{{kWord, kWord, kWord, kWord}};
        if (first < slice.end) chunks[l] = row.load_direct(first);
      }
    } else {
#pragma unroll 1
      for (int l = 0; l < kLoads; ++l) {
        const int64_t first = token_at(base, l * kChunk);
        const Chunk chunk = first < slice.end ? row.load(first) : Chunk{{kWord, kWord, kWord, kWord}};
#pragma unroll
        for (int at = 0; at < kLoads; ++at) chunks[at] = at == l ? chunk : chunks[at];
      }
    }
  }
};

// What a warp found; every lane gets it.
__device__ __forceinline__ Partial of_warp(const Scan& scan, bool draw) {
  Partial all = empty_partial();
  unsigned long long top = scan.top > -INFINITY ? token_key(scan.top, scan.top_token) : 0;
  all.sum = scan.sum;
  for (int by = 1; by < 32; by *= 2) {
    const unsigned long long other = __shfl_xor_sync(kAllLanes, top, by);
    top = top > other ? top : other;
    all.sum += __shfl_xor_sync(kAllLanes, all.sum, by);
  }
  all.top = top;
  if (!draw) return all;
  Partial mine = empty_partial();
  if (scan.best > -INFINITY) mine.best = token_key(scan.best, scan.best_token);
  mine.second = scan.second;
  mine.best_logit = scan.best_logit;
  mine = merge_lanes(mine, 0.0f, 32);
  all.best = mine.best;
  all.second = mine.second;
  all.best_logit = mine.best_logit;
  return all;
}

// One iteration: maximum, sum and draw.
template <LogitsDtype kDtype>
__device__ __forceinline__ void scan_tokens(Scan& scan, float* x, int64_t base, const Pass& pass) {
  constexpr int kTokens = Tokens<kDtype>::kCount;
  const auto token_at = [&](int t) { return static_cast<uint32_t>(Tokens<kDtype>::token_at(base, t)); };
  if (pass.cut != kKeepAll) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) x[t] = token_key(x[t], token_at(t)) >= pass.cut ? x[t] : -INFINITY;
  }
  float largest = -INFINITY;  // fmaxf passes over NaN, which the sum keeps
#pragma unroll
  for (int t = 0; t < kTokens; ++t) largest = fmaxf(largest, x[t]);
  if (largest > scan.top) {
    scan.top = largest;
#pragma unroll
    for (int t = kTokens - 1; t >= 0; --t) scan.top_token = x[t] == largest ? token_at(t) : scan.top_token;
  }
  const float max = finite(from_ordered(maximum_of_warp(largest)));
  if (max > scan.max) {
    scan.sum *= fast_exp2((scan.max - max) * scan.scale2);
    scan.max = max;
  }
  if (pass.draw) scan.raise_floor(scan.max * scan.scale + kLeastNoise);
#pragma unroll
  for (int t = 0; t < kTokens; t += 4) {
    float w[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) w[j] = fast_exp2((x[t + j] - scan.max) * scan.scale2);
    scan.sum += (w[0] + w[1]) + (w[2] + w[3]);
    if (pass.draw) scan.draw_four(x + t, w, token_at(t), pass);
  }
  if (pass.draw) scan.raise_floor(from_ordered(maximum_of_warp(scan.best)));
}

// All threads of the block get what the block found in its slice. `next` holds the slice's first tokens: the
// caller starts the loads, and each iteration starts those of the one after.
template <LogitsDtype kDtype>
__device__ Partial scan_slice(const Row<kDtype>& row, const Slice& slice, const Pass& pass,
                              Tokens<kDtype> next) {
  Scan scan;
  scan.scale = pass.inverse_temperature;
  scan.scale2 = scale2_of(pass.inverse_temperature);
  constexpr int kTokens = Tokens<kDtype>::kCount, kStep = Tokens<kDtype>::kStep;
  for (int64_t base = slice.begin; base < slice.end; base += kStep) {
    float x[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) x[t] = next[t];
    if (base + kStep < slice.end) next.load(row, slice, base + kStep);
    scan_tokens<kDtype>(scan, x, base, pass);
  }
  __shared__ Partial warps[kWarps];
  const Partial warp = of_warp(scan, pass.draw);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = warp;
  __syncthreads();
  const Partial mine = warps[threadIdx.x % kWarps];
  __syncthreads();  // before the next call writes
  return merge_lanes(mine, scan.scale2, kWarps);
}
static_assert(kWarps <= 32, "one lane per warp");

}  // namespace
}  // namespace specfuse
