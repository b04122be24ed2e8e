// Top-k, top-p and min-p as a cut, and the draw inside it, by all blocks of a group together.
//
// Radix select over the 64-bit keys, most significant digit first: 11 + 11 + 10 bits of value, then the id
// among ties. A level is one pass over the slice (from L1 after the first: a slice is V / ranks tokens) that
// adds weights to 2,048 bins; top-k and top-p differ in the weight only. Weights are integers (1, or
// exp((x - max) / T) * 2^44), so that sums do not depend on the order of the adds, nor on the number of
// blocks. Half precision has no value bits below the first 22: two levels.
#pragma once

#include "verify_tree_cuda_scan.cuh"

namespace specfuse {
namespace {

// Bins of one block. The 64-bit sum is kept in halves, for which shared memory has native adds.
struct Histogram {
  uint32_t low[kBins], high[kBins];
};

__device__ __forceinline__ Histogram& histogram() {
  __shared__ Histogram shared;
  return shared;
}

__device__ __forceinline__ void add_weight(Histogram& bins, uint32_t bin, uint64_t weight) {
  const uint32_t low = static_cast<uint32_t>(weight);
  const uint32_t before = atomicAdd(&bins.low[bin], low);
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + (before + low < before ? 1u : 0u);
  if (high) atomicAdd(&bins.high[bin], high);
}

// What the tokens of a selection weigh: one each, or their mass in units of 1 / one.
struct Weights {
  float max, inverse_temperature, one;  // one = 0: tokens are counted

  __device__ __forceinline__ uint64_t operator()(float x) const {
    return one > 0.0f ? static_cast<uint64_t>(expf((x - max) * inverse_temperature) * one) : 1;
  }
};

// 2^44, less where V tokens of weight one would not stay below 2^62.
__device__ __forceinline__ float unit_of_mass(int64_t V) {
  const int bits = 32 - __clz(static_cast<int>(V));
  return float_from_bits(static_cast<uint32_t>(127 + (bits < 18 ? 44 : 62 - bits)) << 23);
}

// A level's last bin from the top of which anything is kept.
struct Crossing {
  int bin;
  unsigned long long before, weight, total;
};

// Four bins per thread, from the highest down; a bin is reached where the weight before it is below `target`,
// or below `share` of the total where that is above 0.
__device__ __forceinline__ Crossing cross(const unsigned long long* mine, double target, double share) {
  __shared__ unsigned long long warps[kWarps];
  __shared__ Crossing found;
  const unsigned long long sum = mine[0] + mine[1] + mine[2] + mine[3];
  unsigned long long inclusive = sum;
  for (unsigned by = 1; by < 32; by *= 2) {
    const unsigned long long other = __shfl_up_sync(kAllLanes, inclusive, by);
    if (threadIdx.x % 32 >= by) inclusive += other;
  }
  if (threadIdx.x % 32 == 31) warps[threadIdx.x / 32] = inclusive;
  __syncthreads();
  unsigned long long before = inclusive - sum, total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < static_cast<int>(threadIdx.x / 32)) before += warps[w];
    total += warps[w];
  }
  if (share > 0.0) target = share * static_cast<double>(total);
  int last = -1;
  Crossing crossing{0, 0, 0, total};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (mine[j] > 0 && static_cast<double>(before) < target) {
      last = static_cast<int>(threadIdx.x) * 4 + j;
      crossing = {kBins - 1 - last, before, mine[j], total};
    }
    before += mine[j];
  }
  const int deepest = block_reduce(last, Max());
  if (last == deepest && last >= 0) found = crossing;
  __syncthreads();
  return found;
}
static_assert(kBins == 4 * kThreads, "four bins per thread");

// The group's bins of this level: thread t gets the four from kBins - 1 - 4 t down.
__device__ __forceinline__ void collect(Group& group, const Histogram& bins, unsigned long long* mine) {
  __syncthreads();
  const int first = kBins - 1 - 4 * static_cast<int>(threadIdx.x);
#pragma unroll
  for (int j = 0; j < 4; ++j) mine[j] = uint64_t{bins.high[first - j]} << 32 | bins.low[first - j];
  if (group.size == 1) return;
  unsigned long long* all = group.scratch->bins[group.bins_turn % 3];
  unsigned long long* next = group.scratch->bins[(group.bins_turn + 1) % 3];
  ++group.bins_turn;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (mine[j]) atomicAdd(&all[first - j], mine[j]);
  }
  // Last read two levels ago, before the barrier of the last one.
  for (unsigned i = group.rank * kThreads + threadIdx.x; i < kBins; i += group.size * kThreads)
    __stcg(&next[i], 0ull);
  group.sync();
#pragma unroll
  for (int j = 0; j < 4; ++j) mine[j] = __ldcg(&all[first - j]);
}

template <LogitsDtype kDtype>
__device__ Crossing select_level(Group& group, const Row<kDtype>& row, const Slice& slice, uint64_t cut,
                                 const Weights& weights, uint64_t prefix, int shift, int width, double target,
                                 double share) {
  Histogram& bins = histogram();
  for (int i = threadIdx.x; i < kBins; i += kThreads) bins.low[i] = bins.high[i] = 0;
  __syncthreads();
  for (int64_t base = slice.begin; base < slice.end; base += Tokens<kDtype>::kStep) {
    Tokens<kDtype> x;
    x.load(row, slice, base);
#pragma unroll
    for (int t = 0; t < Tokens<kDtype>::kCount; ++t) {
      const uint64_t key = token_key(x[t], Tokens<kDtype>::token_at(base, t));
      // A shift by 64 is undefined: the prefix of the first level is 0.
      const bool inside = key >= cut && (shift + width == 64 || key >> (shift + width) == prefix);
      const uint64_t weight = inside ? weights(x[t]) : 0;
      if (weight) add_weight(bins, static_cast<uint32_t>(key >> shift) & ((1u << width) - 1), weight);
    }
  }
  unsigned long long mine[4];
  collect(group, bins, mine);
  return cross(mine, target, share);
}

// A selection: the smallest key that is reached with less than `target` before it, counted from the largest
// down, or with less than `share` of the total where that is above 0.
struct Selection {
  Weights weights;
  double target, share;
  bool whole_ties;  // keeps all of its ties too
};

template <LogitsDtype kDtype>
__device__ __noinline__ uint64_t select_cut(Group& group, const Row<kDtype>& row, const Slice& slice,
                                            uint64_t cut, const Selection& wanted) {
  double target = wanted.target, share = wanted.share;
  uint64_t prefix = 0;
  int shift = 53;
#pragma unroll 1
  while (true) {
    const int width = shift == 32 || shift == 0 ? 10 : 11;
    const Crossing at =
        select_level(group, row, slice, cut, wanted.weights, prefix, shift, width, target, share);
    prefix = prefix << width | static_cast<uint64_t>(at.bin);
    if (share > 0.0) target = share * static_cast<double>(at.total);
    share = 0.0;
    target -= static_cast<double>(at.before);
    if (shift == 0) return prefix;
    if (shift == 42 && kDtype != LogitsDtype::kFloat32) {
      prefix = prefix << 10 | (prefix >> 21 ? 0 : 0x3FF);  // negative values are stored inverted
      shift = 32;
    }
    if (shift == 32) {
      const uint64_t each = wanted.weights(from_ordered(static_cast<uint32_t>(prefix)));
      if (wanted.whole_ties || static_cast<double>(at.weight - each) < target) return prefix << 32;
      if (row.V <= int64_t{1} << 21) {
        prefix = prefix << 11 | 0x7FF;  // ids are stored inverted
        shift = 21;
      }
    }
    shift -= shift == 42 || shift == 10 ? 10 : 11;
  }
}

__device__ __forceinline__ uint64_t larger(uint64_t a, uint64_t b) {
  return a > b ? a : b;
}

// The lowest value of at least min_p times the largest probability.
__device__ __forceinline__ uint64_t min_p_cut(float min_p, float max, float temperature) {
  const double threshold = max + log(static_cast<double>(min_p)) * temperature;
  float lowest = static_cast<float>(threshold);
  if (lowest < threshold) lowest = nextafterf(lowest, INFINITY);
  return uint64_t{ordered(lowest)} << 32;
}

// The cut of all three filters in their order; `top` is the largest key of the row, finite.
template <LogitsDtype kDtype>
__device__ uint64_t filtered_cut(Group& group, const Row<kDtype>& row, const Slice& slice, const Rule& rule,
                                 uint64_t top) {
  const float max = value_of(top);
  uint64_t cut = kKeepAll;
#pragma unroll 1
  for (int filter = 0; filter < 2; ++filter) {
    const bool top_k = filter == 0;
    if (!(top_k ? rule.top_k > 0 && rule.top_k < row.V : rule.top_p < 1.0f)) continue;
    Selection wanted{{max, rule.inverse_temperature(), top_k ? 0.0f : unit_of_mass(row.V)}, 0.0, 0.0, top_k};
    if (top_k) {
      wanted.target = rule.top_k;
    } else {
      wanted.share = rule.top_p > 0.0f ? rule.top_p : DBL_MIN;  // values out of range keep one token
    }
    cut = larger(cut, select_cut(group, row, slice, cut, wanted));
  }
  if (rule.min_p > 0.0f) cut = larger(cut, min_p_cut(rule.min_p, max, rule.temperature));
  return cut < top ? cut : top;
}

// Maps doubles to integers in the same order.
__device__ __forceinline__ unsigned long long ordered(double value) {
  unsigned long long bits;
  value += 0.0;
  memcpy(&bits, &value, sizeof bits);
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}

// The draw in double, where scores in float32 are too close to tell: 6e-5 of all draws.
template <LogitsDtype kDtype>
__device__ __noinline__ int64_t draw_exactly(Group& group, const Row<kDtype>& row, const Slice& slice,
                                             const Pass& pass, float temperature) {
  unsigned long long best = 0;
  uint32_t token = 0;
#pragma unroll 1
  for (int64_t v = slice.begin + threadIdx.x; v < slice.end; v += kThreads) {
    const float x = row[v];
    if (token_key(x, v) < pass.cut) continue;
    const double noise = gumbel_double(noise_word(pass.seed, pass.position, v));
    const unsigned long long score = ordered(static_cast<double>(x) / temperature + noise);
    if (score > best) best = score, token = static_cast<uint32_t>(v);
  }
  const uint64_t highest = group.max(best);
  return token_of(group.max(best == highest ? 0xFFFFFFFFull - token : 0));
}

}  // namespace
}  // namespace specfuse
