// Test code: runs CUDA kernels on the CPU. Found in place of CUDA's own header when a .cu file is compiled as
// C++; holds what the kernels of csrc use. fibers.h says how blocks and threads run.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "fibers.h"

#define SPECFUSE_CUDA_EMULATOR
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ thread_local  // one thread of the system per block of a cluster

#define CUDA_EMULATOR_VECTOR(name, T)                 \
  struct alignas(2 * sizeof(T)) name##2 {             \
    T x, y;                                           \
  };                                                  \
  struct alignas(4 * sizeof(T)) name##4 {             \
    T x, y, z, w;                                     \
  };                                                  \
  inline name##2 make_##name##2(T x, T y) {           \
    return {x, y};                                    \
  }                                                   \
  inline name##4 make_##name##4(T x, T y, T z, T w) { \
    return {x, y, z, w};                              \
  }
CUDA_EMULATOR_VECTOR(uint, uint32_t)
CUDA_EMULATOR_VECTOR(int, int32_t)
CUDA_EMULATOR_VECTOR(float, float)

// ---------------------------------------------------------------- within a block

inline void __syncthreads() {
  cuda_emulator::wait_in(cuda_emulator::State::kAtBarrier);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// The barrier of a cluster, which csrc spells in PTX.
inline void cuda_emulator_cluster_sync() {
  cuda_emulator::wait_in(cuda_emulator::State::kAtCluster);
}

inline unsigned cuda_emulator_lane() {
  return cuda_emulator::current_block->current % 32;
}

inline void __syncwarp(unsigned = 0xFFFFFFFFu) {
  cuda_emulator::exchange(0, [](auto) { return 0; });
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_emulator::exchange(value, [=](auto at) { return at(static_cast<unsigned>(lane) % 32); });
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_emulator::exchange(value, [=](auto at) { return at(cuda_emulator_lane() ^ mask); });
}

template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned by) {
  const unsigned lane = cuda_emulator_lane();
  return cuda_emulator::exchange(value, [=](auto at) { return at(lane + by < 32 ? lane + by : lane); });
}

template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned by) {
  const unsigned lane = cuda_emulator_lane();
  return cuda_emulator::exchange(value, [=](auto at) { return at(lane >= by ? lane - by : lane); });
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  return cuda_emulator::exchange(predicate, [](auto at) {
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane) bits |= (at(lane) != 0 ? 1u : 0u) << lane;
    return bits;
  });
}

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return cuda_emulator::exchange(value, [](auto at) {
    unsigned result = 0;
    for (unsigned lane = 0; lane < 32; ++lane) result = at(lane) > result ? at(lane) : result;
    return result;
  });
}

inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == 0xFFFFFFFFu;
}

// ---------------------------------------------------------------- memory, bits, fast arithmetic

// One fiber runs at a time, so that reading and writing in turn is atomic.
template <typename T, typename Combine>
T cuda_emulator_atomic(T* address, Combine combine) {
  const T old = *address;
  *address = combine(old);
  return old;
}
template <typename T>
T atomicAdd(T* address, T value) {
  return cuda_emulator_atomic(address, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* address, T value) {
  return cuda_emulator_atomic(address, [=](T old) { return old > value ? old : value; });
}
template <typename T>
T atomicMin(T* address, T value) {
  return cuda_emulator_atomic(address, [=](T old) { return old < value ? old : value; });
}
template <typename T>
T atomicOr(T* address, T value) {
  return cuda_emulator_atomic(address, [=](T old) { return old | value; });
}
template <typename T>
T atomicExch(T* address, T value) {
  return cuda_emulator_atomic(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  return cuda_emulator_atomic(address, [=](T old) { return old == expected ? value : old; });
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __clz(int bits) {
  return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits));
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline float __expf(float x) {
  return expf(x);
}
inline float __logf(float x) {
  return logf(x);
}
inline float __log2f(float x) {
  return log2f(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// ---------------------------------------------------------------- launches

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorIllegalInstruction = 715 };
using cudaStream_t = void*;
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorInvalidValue ? "invalid value"
                                         : "threads diverged at a barrier or shuffle (emulated)";
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_emulator {

template <typename... Arguments>
struct Call {
  void (*kernel)(Arguments...);
  void** values;

  static void run(void* self) { static_cast<Call*>(self)->invoke(std::index_sequence_for<Arguments...>{}); }
  template <size_t... I>
  void invoke(std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<Arguments>*>(values[I])...);
  }
};

template <typename... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), dim3 grid, dim3 threads, void** arguments,
                   size_t dynamic_bytes, unsigned cluster) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads.x == 0) return cudaErrorInvalidValue;
  Call<Arguments...> call{kernel, arguments};
  const Launch all{grid, threads, cluster, dynamic_bytes, &Call<Arguments...>::run, &call};
  return run_grid(all) ? cudaSuccess : cudaErrorIllegalInstruction;
}

}  // namespace cuda_emulator

template <typename... Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments...), dim3 grid, dim3 threads, void** arguments,
                             size_t dynamic_bytes, cudaStream_t) {
  return cuda_emulator::launch(kernel, grid, threads, arguments, dynamic_bytes, 1);
}

template <typename... Arguments, typename... Values>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments...),
                               Values&&... values) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
      cluster = config->attrs[i].val.clusterDim.x;
  }
  std::tuple<Arguments...> held(std::forward<Values>(values)...);
  return std::apply(
      [&](auto&... each) {
        void* arguments[] = {const_cast<void*>(static_cast<const void*>(&each))...};
        return cuda_emulator::launch(kernel, config->gridDim, config->blockDim, arguments,
                                     config->dynamicSmemBytes, cluster);
      },
      held);
}
