// Test code: runs CUDA kernels on the CPU. Found in place of CUDA's own header when a .cu file is compiled as
// C++.
//
// Blocks run one after the other; the threads of a block are fibers that switch at barriers and warp
// shuffles. A barrier that not all threads reach, or a shuffle that not all lanes of a warp reach, is
// reported as an error. The order in which fibers run is shuffled; CUDA_EMULATOR_ORDER seeds it, so that
// results which depend on it differ.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static  // one block at a time, all of it on one OS thread

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorIllegalInstruction = 715 };
using cudaStream_t = void*;
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorInvalidValue ? "invalid value"
                                         : "threads diverged at a barrier or shuffle (emulated)";
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulator {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kMaxThreads = 1024;
enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  State state = State::kReady;
  unsigned shuffles = 0;
  jmp_buf resume;
  ucontext_t start;
};

struct Block {
  std::vector<Fiber> fibers;
  std::unique_ptr<char[]> stacks{new char[kMaxThreads * kStackBytes]};
  unsigned char exchange[2][kMaxThreads][8];
  unsigned current = 0;
  jmp_buf scheduler;
  void (*run)(void*) = nullptr;
  void* arguments = nullptr;
};

inline Block& block() {
  static Block instance;
  return instance;
}

// Leaves the running fiber; returns once the scheduler finds it ready again.
inline void wait_in(State state) {
  Block& b = block();
  Fiber& fiber = b.fibers[b.current];
  fiber.state = state;
  if (_setjmp(fiber.resume) == 0) _longjmp(b.scheduler, 1);
}

inline void fiber_main() {
  Block& b = block();
  b.run(b.arguments);
  b.fibers[b.current].state = State::kDone;
  _longjmp(b.scheduler, 1);
}

inline void resume(unsigned thread, bool fresh) {
  Block& b = block();
  b.current = thread;
  threadIdx = dim3(thread);
  if (_setjmp(b.scheduler) != 0) return;
  if (!fresh) _longjmp(b.fibers[thread].resume, 1);
  ucontext_t& context = b.fibers[thread].start;
  getcontext(&context);
  context.uc_stack.ss_sp = b.stacks.get() + thread * kStackBytes;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

// True if all of fibers [first, last) are in `state`; they become ready then.
inline bool release(unsigned first, unsigned last, State state) {
  std::vector<Fiber>& fibers = block().fibers;
  for (unsigned t = first; t < last; ++t) {
    if (fibers[t].state != state) return false;
  }
  for (unsigned t = first; t < last; ++t) fibers[t].state = State::kReady;
  return true;
}

// Runs one block to its end; false if its threads wait for each other in vain. Warp after warp runs on to the
// next barrier, in random order: as far ahead of the others as the barriers let it, which is what shows a
// missing one.
inline bool run_block(unsigned threads, std::mt19937& random) {
  Block& b = block();
  b.fibers.assign(threads, Fiber{});
  std::vector<unsigned> warps;
  for (unsigned first = 0; first < threads; first += 32) warps.push_back(first);
  std::vector<bool> started(threads, false);
  while (true) {
    std::shuffle(warps.begin(), warps.end(), random);
    for (unsigned first : warps) {
      const unsigned last = std::min(first + 32, threads);
      std::vector<unsigned> lanes;
      for (unsigned t = first; t < last; ++t) lanes.push_back(t);
      do {
        std::shuffle(lanes.begin(), lanes.end(), random);
        for (unsigned t : lanes) {
          if (b.fibers[t].state != State::kReady) continue;
          const bool fresh = !started[t];
          started[t] = true;
          resume(t, fresh);
        }
      } while (release(first, last, State::kAtShuffle));
    }
    const auto done = [](const Fiber& f) { return f.state == State::kDone; };
    if (std::all_of(b.fibers.begin(), b.fibers.end(), done)) return true;
    if (!release(0, threads, State::kAtBarrier)) return false;
  }
}

template <typename... Arguments>
struct Call {
  void (*kernel)(Arguments...);
  void** values;

  static void run(void* self) { static_cast<Call*>(self)->invoke(std::index_sequence_for<Arguments...>{}); }
  template <size_t... I>
  void invoke(std::index_sequence<I...>) {
    kernel(*static_cast<Arguments*>(values[I])...);
  }
};

}  // namespace cuda_emulator

inline void __syncthreads() {
  cuda_emulator::wait_in(cuda_emulator::State::kAtBarrier);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
  cuda_emulator::Block& b = cuda_emulator::block();
  const unsigned thread = b.current;
  // Two buffers: a lane is at most one shuffle ahead of the others of its warp.
  auto& slots = b.exchange[b.fibers[thread].shuffles++ % 2];
  std::memcpy(slots[thread], &value, sizeof value);
  cuda_emulator::wait_in(cuda_emulator::State::kAtShuffle);
  std::memcpy(&value, slots[thread ^ static_cast<unsigned>(lanes)], sizeof value);
  return value;
}

template <typename... Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments...), dim3 grid, dim3 threads, void** arguments, size_t,
                             cudaStream_t) {
  cuda_emulator::Call<Arguments...> call{kernel, arguments};
  cuda_emulator::block().run = &cuda_emulator::Call<Arguments...>::run;
  cuda_emulator::block().arguments = &call;
  const char* order = std::getenv("CUDA_EMULATOR_ORDER");
  std::mt19937 random(order ? std::atoi(order) : 0);
  gridDim = grid;
  blockDim = threads;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        if (!cuda_emulator::run_block(threads.x, random)) return cudaErrorIllegalInstruction;
      }
    }
  }
  return cudaSuccess;
}
