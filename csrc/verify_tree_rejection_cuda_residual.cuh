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
constexpr int64_t kSetBits = 1 << 17;

struct TokenSet {
  uint32_t words[kSetBits / 32];

  __device__ __forceinline__ void clear() {
    for (int i = threadIdx.x; i < kSetBits / 32; i += kThreads) words[i] = 0;
  }
  __device__ __forceinline__ void insert(int64_t token) {
    atomicOr(&words[token % kSetBits / 32], 1u << token % 32);
  }
  __device__ __forceinline__ bool may_hold(int64_t token) const {
    return words[token % kSetBits / 32] >> (token % 32) & 1u;
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

// One rounding, so that it is monotonic in s: what a coin rejects has nothing left afterwards.
__device__ __forceinline__ float left_of(float p, float s, float q) {
  return fmaxf(fmaf(-s, q, p), 0.0f);
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

  __device__ bool is_known(int64_t token) const {
    for (int64_t j = 0; j < q.W; ++j) {
      if (q.ids[j] == token) return true;
    }
    return false;
  }

  // Whether the set of `shared` holds the token.
  __device__ __forceinline__ bool in_set(int64_t token) const {
    if (!q.data || !shared.set.may_hold(token)) return false;
    return p.row.V <= kSetBits || (q.ids ? is_known(token) : is_removed(token));
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
    for (int64_t j = 0; j < q.W; ++j) {
      if (q.ids[j] == token) return q[j];
    }
    return 0.0f;
  }

  // Over the slice; tokens that a sparse q knows are left out.
  __device__ __noinline__ Sums over_tokens(float s) const {
    Sums sums{0.0, 0.0};
    for (int64_t first = p.slice.begin + threadIdx.x * kTokensPerThread; first < p.slice.end;
         first += kThreads * kTokensPerThread) {
      float x[kTokensPerThread], draft[kTokensPerThread] = {};
      load_eight(p.row, first, x);
      if (q.data && !q.ids) load_eight(q, first, draft);
#pragma unroll
      for (int t = 0; t < kTokensPerThread; t += 4) {
        float left[4], rest[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t token = first + t + j;
          const bool beyond = token >= p.row.V, member = !beyond && in_set(token);
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
  __device__ __noinline__ Sums over_entries(float s) const {
    Sums sums{0.0, 0.0};
    for (int64_t j = threadIdx.x; j < q.W; j += kThreads) {
      if (!in_vocabulary(q.ids[j])) continue;
      sums.left += left_of(p[q.ids[j]], s, q[j]);
      sums.drawable += is_removed(q.ids[j]) ? 0.0f : drawable_of(q[j]);
    }
    return of_block(sums);
  }

  // The token of the largest left / -log(u), which is the Gumbel-argmax; ties go to the lowest id.
  __device__ __noinline__ int64_t draw(float s, int64_t seed, int64_t position) const {
    unsigned long long best = 0;
    float reach = 0.0f;  // of the thread's best score, 2^-24: what is smaller has no chance
    for (int64_t first = p.slice.begin + threadIdx.x * kTokensPerThread; first < p.slice.end;
         first += kThreads * kTokensPerThread) {
      float x[kTokensPerThread], draft[kTokensPerThread] = {};
      load_eight(p.row, first, x);
      if (q.data && !q.ids) load_eight(q, first, draft);
#pragma unroll
      for (int t = 0; t < kTokensPerThread; t += 4) {
        float left[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t token = first + t + j;
          const bool out = token >= p.row.V || (q.ids && in_set(token));
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
