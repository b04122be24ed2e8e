// What is left of p at one node, by all blocks of a group: the sums that a rejection needs, and the draw.
//
// Every function is called by all threads of the group and gives all of them the same result. Weights are
// recomputed from the logits in every pass, by the same instructions, so that a token has the same weight in
// all of them. Sums add four neighbouring tokens in float32 and those sums in double: they agree to about
// 1e-16 however many blocks share them.
#pragma once

#include "verify_tree_cuda_select.cuh"
#include "verify_tree_rejection.h"

namespace specfuse {
namespace {

constexpr int kTokensPerThread = 8;

// Tokens in shared memory, as bits by the lowest digits of the id: exact up to 131,072 tokens, beyond that a
// hit is looked up in a list.
constexpr uint32_t kSetBits = 1 << 17;

struct TokenSet {
  uint32_t words[kSetBits / 32];

  __device__ __forceinline__ void clear() {
    for (uint32_t i = threadIdx.x; i < kSetBits / 32; i += kThreads) words[i] = 0;
  }
  __device__ __forceinline__ void insert(int64_t token) {
    const uint32_t bit = static_cast<uint32_t>(token) % kSetBits;
    atomicOr(&words[bit / 32], 1u << bit % 32);
  }
  // Those of the eight tokens from `first` on, a multiple of eight, in the lowest bits.
  __device__ __forceinline__ uint32_t eight(int64_t first) const {
    const uint32_t bit = static_cast<uint32_t>(first) % kSetBits;
    return words[bit / 32] >> bit % 32 & 0xFFu;
  }
};

// The same in all blocks of a group.
struct SharedState {
  TokenSet set;  // sparse: all tokens that q knows; dense: those removed from it
  int32_t removed[kMaxTreeNodes];
  int removed_count;
};

// One row of q; the dtype is uniform over the launch, so the branches are.
struct DraftRow {
  const void* data;  // null where there is nothing to read
  int64_t stride, W;
  LogitsDtype dtype;
  const int64_t* ids;  // null where dense

  __device__ __forceinline__ float operator[](int64_t j) const {
    switch (dtype) {
      case LogitsDtype::kFloat32:
        return Row<LogitsDtype::kFloat32>{data, stride, W}[j];
      case LogitsDtype::kFloat16:
        return Row<LogitsDtype::kFloat16>{data, stride, W}[j];
      default:
        return Row<LogitsDtype::kBFloat16>{data, stride, W}[j];
    }
  }
};

// Eight tokens from `first` on, a multiple of eight; -inf beyond the row's end.
template <LogitsDtype kDtype>
__device__ __forceinline__ void load_eight(const Row<kDtype>& row, int64_t first, float* x) {
  constexpr int kChunk = Row<kDtype>::kChunkTokens;
#pragma unroll
  for (int at = 0; at < kTokensPerThread; at += kChunk) {
    const Chunk chunk = row.load(first + at);
#pragma unroll
    for (int t = 0; t < kChunk; ++t) x[at + t] = Row<kDtype>::value(chunk, t);
  }
}

__device__ __forceinline__ void load_eight(const DraftRow& row, int64_t first, float* q) {
  switch (row.dtype) {
    case LogitsDtype::kFloat32:
      return load_eight(Row<LogitsDtype::kFloat32>{row.data, row.stride, row.W}, first, q);
    case LogitsDtype::kFloat16:
      return load_eight(Row<LogitsDtype::kFloat16>{row.data, row.stride, row.W}, first, q);
    default:
      return load_eight(Row<LogitsDtype::kBFloat16>{row.data, row.stride, row.W}, first, q);
  }
}

// p as weights: exp((x - max) / T) inside the cut, else 0.
template <LogitsDtype kDtype>
struct Target {
  Row<kDtype> row;
  Slice slice;
  float max, scale2;  // log2(e) / T
  uint64_t cut;

  __device__ __forceinline__ float weight(float x, int64_t token) const {
    return cut == kKeepAll || token_key(x, token) >= cut ? fast_exp2((x - max) * scale2) : 0.0f;
  }
  __device__ __forceinline__ float operator[](int64_t token) const { return weight(row[token], token); }
};

// S of verify_tree_rejection.h as value * up, up a power of two: what is left of q without replacement may be
// as small as 1e-45, and S then exceeds a float.
struct Taken {
  float value, up;
};

__device__ __forceinline__ Taken taken_of(double s) {
  if (s < 0x1p64) return {static_cast<float>(s), 1.0f};
  return {static_cast<float>(s * 0x1p-100), 0x1p100f};
}

// One rounding, so that it is monotonic in s: what a coin rejects has nothing left afterwards.
__device__ __forceinline__ float left_of(float p, const Taken& s, float q) {
  return fmaxf(fmaf(-s.value, q * s.up, p), 0.0f);
}

struct Sums {
  double left, drawable;  // R and Q of verify_tree_rejection.h; Q is NaN where q is no distribution
};

__device__ __forceinline__ Sums of_block(const Sums& mine) {
  return {block_reduce(mine.left, Sum()), block_reduce(mine.drawable, Sum())};
}

__device__ __forceinline__ Sums of_group(Group& group, const Sums& mine) {
  Sums all = of_block(mine);
  if (group.size == 1) return all;
  struct Slot {
    Sums sums;
    double unused[2];
  };
  const uint4* slots = group.publish(Slot{all, {0.0, 0.0}});
  all = {0.0, 0.0};
  for (unsigned r = 0; r < group.size; ++r) {
    const uint4 word = __ldcg(slots + 2 * r);
    Sums other;
    memcpy(&other, &word, sizeof other);
    all.left += other.left;
    all.drawable += other.drawable;
  }
  return all;
}

// What of q belongs into Q: NaN for what no distribution holds.
__device__ __forceinline__ float drawable_of(float q) {
  return q >= 0.0f && q <= FLT_MAX ? q : NAN;
}

template <LogitsDtype kDtype>
struct Residual {
  Group& group;
  SharedState& shared;
  const Target<kDtype>& p;
  DraftRow q;
  bool with_replacement;

  __device__ __forceinline__ bool in_vocabulary(int64_t token) const { return token >= 0 && token < p.row.V; }

  __device__ bool is_removed(int64_t token) const {
    for (int i = 0; i < shared.removed_count; ++i) {
      if (shared.removed[i] == token) return true;
    }
    return false;
  }

  // The entry of a sparse q that speaks of `token`, or -1. Every warp looks for itself.
  __device__ int64_t entry_of(int64_t token) const {
    for (int64_t first = 0; first < q.W; first += 32) {
      const int64_t j = first + threadIdx.x % 32;
      const unsigned found = __ballot_sync(kAllLanes, j < q.W && q.ids[j] == token);
      if (found) return first + __ffs(static_cast<int>(found)) - 1;
    }
    return -1;
  }

  __device__ bool is_known(int64_t token) const {
    for (int64_t j = 0; j < q.W; ++j) {
      if (q.ids[j] == token) return true;
    }
    return false;
  }

  // Which of the eight tokens from `first` on the set of `shared` holds.
  __device__ __forceinline__ uint32_t members(int64_t first) const {
    uint32_t found = q.data ? shared.set.eight(first) : 0;
    if (p.row.V <= kSetBits) return found;
    for (uint32_t left = found; left; left &= left - 1) {
      const int t = __ffs(static_cast<int>(left)) - 1;
      if (!(q.ids ? is_known(first + t) : is_removed(first + t))) found &= ~(1u << t);
    }
    return found;
  }

  // Before anything else is called at a node whose q is read.
  __device__ void begin() {
    shared.set.clear();
    if (threadIdx.x == 0) shared.removed_count = 0;
    __syncthreads();
    for (int64_t j = threadIdx.x; q.ids && j < q.W; j += kThreads) {
      if (in_vocabulary(q.ids[j])) shared.set.insert(q.ids[j]);
    }
    __syncthreads();
  }

  __device__ void remove(int64_t token) {
    if (with_replacement) return;
    __syncthreads();  // others may still look for an earlier token
    if (threadIdx.x == 0) {
      shared.removed[shared.removed_count++] = static_cast<int32_t>(token);
      if (!q.ids) shared.set.insert(token);
    }
    __syncthreads();
  }

  // What the drafter could still draw of `token`.
  __device__ float drawable(int64_t token) const {
    if (!q.data || !in_vocabulary(token) || is_removed(token)) return 0.0f;
    if (!q.ids) return q[token];
    const int64_t j = entry_of(token);
    return j < 0 ? 0.0f : q[j];
  }

  // Over the slice; tokens that a sparse q knows are left out.
  __device__ __noinline__ Sums over_tokens(Taken s) const {
    Sums sums{0.0, 0.0};
    for (int64_t first = p.slice.begin + threadIdx.x * kTokensPerThread; first < p.slice.end;
         first += kThreads * kTokensPerThread) {
      float x[kTokensPerThread], draft[kTokensPerThread] = {};
      load_eight(p.row, first, x);
      if (q.data && !q.ids) load_eight(q, first, draft);
      const uint32_t members_of_set = members(first);
#pragma unroll
      for (int t = 0; t < kTokensPerThread; t += 4) {
        float left[4], rest[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t token = first + t + j;
          const bool beyond = token >= p.row.V, member = members_of_set >> (t + j) & 1u;
          left[j] = beyond || (q.ids && member) ? 0.0f : left_of(p.weight(x[t + j], token), s, draft[t + j]);
          rest[j] = beyond || q.ids || member ? 0.0f : drawable_of(draft[t + j]);
        }
        sums.left += (left[0] + left[1]) + (left[2] + left[3]);
        sums.drawable += (rest[0] + rest[1]) + (rest[2] + rest[3]);
      }
    }
    return of_group(group, sums);
  }

  // Over the entries of a sparse q, by every block for itself.
  __device__ __noinline__ Sums over_entries(Taken s) const {
    Sums sums{0.0, 0.0};
    for (int64_t j = threadIdx.x; j < q.W; j += kThreads) {
      if (!in_vocabulary(q.ids[j])) continue;
      sums.left += left_of(p[q.ids[j]], s, q[j]);
      sums.drawable += is_removed(q.ids[j]) ? 0.0f : drawable_of(q[j]);
    }
    return of_block(sums);
  }

  // The token of the largest left / -log(u), which is the Gumbel-argmax; ties go to the lowest id.
  __device__ __noinline__ int64_t draw(Taken s, int64_t seed, int64_t position) const {
    unsigned long long best = 0;
    float reach = 0.0f;  // of the thread's best score, 2^-24: what is smaller has no chance
    for (int64_t first = p.slice.begin + threadIdx.x * kTokensPerThread; first < p.slice.end;
         first += kThreads * kTokensPerThread) {
      float x[kTokensPerThread], draft[kTokensPerThread] = {};
      load_eight(p.row, first, x);
      if (q.data && !q.ids) load_eight(q, first, draft);
      const uint32_t members_of_set = members(first);
#pragma unroll
      for (int t = 0; t < kTokensPerThread; t += 4) {
        float left[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t token = first + t + j;
          const bool out = token >= p.row.V || (q.ids && members_of_set >> (t + j) & 1u);
          left[j] = out ? 0.0f : left_of(p.weight(x[t + j], token), s, draft[t + j]);
        }
        if (!(fmaxf(fmaxf(left[0], left[1]), fmaxf(left[2], left[3])) > reach)) continue;
        uint32_t words[4];
        noise_block(seed, position, (first + t) / 4, NoiseStream::kResidual, words);
#pragma unroll
        for (int j = 0; j < 4; ++j) consider(left[j], words[j], first + t + j, best, reach);
      }
    }
    for (int64_t j = threadIdx.x; q.ids && group.rank == 0 && j < q.W; j += kThreads) {
      if (!in_vocabulary(q.ids[j])) continue;
      const uint32_t word = noise_word(seed, position, q.ids[j], NoiseStream::kResidual);
      consider(left_of(p[q.ids[j]], s, q[j]), word, q.ids[j], best, reach);
    }
    const uint64_t found = group.max(best);
    return found ? token_of(found) : -1;
  }

  __device__ __forceinline__ static void consider(float left, uint32_t word, int64_t token,
                                                  unsigned long long& best, float& reach) {
    if (!(left > reach)) return;
    const float u = static_cast<float>(word >> 8) * 0x1p-24f;
    const float score = left / -logf(u > 0x1p-25f ? u : 0x1p-25f);
    const unsigned long long key = token_key(score, token);
    if (key <= best) return;
    best = key;
    reach = score * 0x1p-24f;
  }
};

}  // namespace
}  // namespace specfuse
