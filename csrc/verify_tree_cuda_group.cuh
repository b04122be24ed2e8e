// The blocks that work on one row together: a thread-block cluster, or a single block.
//
// They exchange values through scratch memory and the cluster's barrier, which orders memory between them
// (release on arrival, acquire on departure). Loads bypass L1, where a line of the turn before may lie.
#pragma once

#include "verify_tree_cuda_load.cuh"

namespace specfuse {
namespace {

constexpr int kMaxRanks = 8;  // clusters of any size up to 8 are portable
constexpr int kBins = 2048;

// Scratch of one group of more than one block.
struct GroupScratch {
  uint4 slots[2][kMaxRanks][2];  // what each rank says, for two turns
  unsigned long long bins[3]
                         [kBins];  // of this turn, of the next (zero already), and of the last (being read)
};

__device__ __forceinline__ void cluster_sync() {
#ifdef SPECFUSE_CUDA_EMULATOR
  cuda_emulator_cluster_sync();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#else
  __syncthreads();  // clusters begin with sm_90: groups are single blocks here
#endif
}

struct Group {
  unsigned rank, size;
  GroupScratch* scratch;  // null for a single block
  unsigned turn;          // counts exchanges, the same in all blocks
  unsigned bins_turn;

  __device__ __forceinline__ void sync() const {
    if (size == 1) {
      __syncthreads();
    } else {
      cluster_sync();
    }
  }

  // Each rank's 32-byte `mine`, for all ranks: `read` gives the value of rank r. A slot is written again two
  // turns later, after a barrier that no block reaches before it has read.
  template <typename T>
  __device__ __forceinline__ const uint4* publish(const T& mine) {
    static_assert(sizeof(T) == 32, "a slot is two 16-byte words");
    const auto& slots = scratch->slots[turn++ % 2];
    if (threadIdx.x < 2) {
      uint4 words[2];
      memcpy(words, &mine, sizeof mine);
      __stcg(const_cast<uint4*>(&slots[rank][threadIdx.x]), words[threadIdx.x]);
    }
    cluster_sync();
    return &slots[0][0];
  }

  __device__ uint64_t max(unsigned long long value) {
    value = block_reduce(value, Max());
    if (size == 1) return value;
    struct Slot {
      unsigned long long value, unused[3];
    };
    const uint4* slots = publish(Slot{value, {}});
    for (unsigned r = 0; r < size; ++r) {
      const uint4 word = __ldcg(slots + 2 * r);
      const unsigned long long other = uint64_t{word.y} << 32 | word.x;
      value = value > other ? value : other;
    }
    return value;
  }

  // Before the first histogram: both that come next are zero.
  __device__ void clear_bins() {
    if (size == 1) return;
    for (unsigned i = rank * kThreads + threadIdx.x; i < kBins; i += size * kThreads)
      __stcg(&scratch->bins[0][i], 0ull);
    sync();
  }
};

__device__ __forceinline__ Group single_block() {
  return {0, 1, nullptr, 0, 0};
}

}  // namespace
}  // namespace specfuse
