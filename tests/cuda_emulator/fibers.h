// Test code: the threads of a CUDA block as fibers, the blocks of a cluster as threads of the system of which
// one runs at a time.
//
// Warp after warp runs on to the next barrier, and block after block to the next cluster barrier: as far
// ahead of the others as the barriers let it, which is what shows a missing one. A barrier that not all
// threads reach, or a shuffle that not all lanes of a warp reach, is an error. CUDA_EMULATOR_ORDER is the
// order of clusters, blocks, warps and lanes: forward, reverse, or a number that seeds a shuffle. Shared
// memory is thread-local, so that each block of a cluster has its own; it is filled with 0xA5 before every
// block.
#pragma once

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulator {

constexpr size_t kStackBytes = 128 * 1024;
enum class State { kReady, kAtBarrier, kAtShuffle, kAtCluster, kDone };

struct Fiber {
  State state = State::kReady;
  unsigned shuffles = 0;
  jmp_buf resume;
  ucontext_t start;
  void* fake_stack = nullptr;
};

// Orders 0 .. count - 1 as CUDA_EMULATOR_ORDER says.
class Order {
 public:
  Order() {
    const char* text = std::getenv("CUDA_EMULATOR_ORDER");
    const std::string order = text ? text : "forward";
    reverse_ = order == "reverse";
    shuffle_ = !reverse_ && order != "forward";
    if (shuffle_) random_.seed(static_cast<unsigned>(std::atoi(order.c_str())));
  }
  // `items` ascend, or come from an earlier call.
  void arrange(std::vector<unsigned>& items) {
    if (reverse_ && items.front() < items.back()) std::reverse(items.begin(), items.end());
    if (shuffle_) std::shuffle(items.begin(), items.end(), random_);
  }

 private:
  bool reverse_, shuffle_;
  std::mt19937 random_;
};

// The blocks of one cluster take turns: `turn` runs until it ends or waits at the cluster's barrier.
struct Cluster {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<unsigned> order;  // ranks
  std::vector<State> states;
  unsigned turn = 0;  // a rank, or kNobody at the end
  static constexpr unsigned kNobody = ~0u;
  bool failed = false;

  void wait_for_turn(unsigned rank) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return turn == rank; });
  }

  void wait_for_end() { wait_for_turn(kNobody); }

  // Hands on to the next block in `order`; opens the barrier when every block that has not ended waits at it.
  void hand_on(unsigned rank, State state, Order& by) {
    std::unique_lock<std::mutex> lock(mutex);
    states[rank] = state;
    const auto pick = [&] {
      for (unsigned next : order) {
        if (states[next] == State::kReady) return static_cast<int>(next);
      }
      return -1;
    };
    int next = pick();
    if (next < 0) {
      for (State& s : states) s = s == State::kAtCluster ? State::kReady : s;
      by.arrange(order);
      next = pick();
    }
    turn = next < 0 ? kNobody : static_cast<unsigned>(next);
    changed.notify_all();
  }
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<char[]>>* stacks = nullptr;
  unsigned char exchange[2][1024][8];
  unsigned current = 0, rank = 0, ranks = 1;
  jmp_buf scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void (*run)(void*) = nullptr;
  void* arguments = nullptr;
  Cluster* cluster = nullptr;
  Order* order = nullptr;
  std::unique_ptr<char[]> dynamic_shared;  // exact, so that the address sanitizer sees an overrun
};

inline thread_local Block* current_block = nullptr;

#ifdef __SANITIZE_ADDRESS__
inline void start_switch(void** save, const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(save, stack, bytes);
}
inline void finish_switch(void* saved, const void** stack = nullptr, size_t* bytes = nullptr) {
  __sanitizer_finish_switch_fiber(saved, stack, bytes);
}
#else
inline void start_switch(void**, const void*, size_t) {}
inline void finish_switch(void*, const void** = nullptr, size_t* = nullptr) {}
#endif

// Leaves the running fiber; returns once the scheduler finds it ready again.
__attribute__((noinline)) inline void wait_in(State state) {
  Block& b = *current_block;
  Fiber& fiber = b.fibers[b.current];
  fiber.state = state;
  if (_setjmp(fiber.resume) == 0) {
    start_switch(&fiber.fake_stack, b.scheduler_stack, b.scheduler_stack_bytes);
    _longjmp(b.scheduler, 1);
  }
  finish_switch(fiber.fake_stack);
}

inline void fiber_main() {
  Block& b = *current_block;
  finish_switch(nullptr, &b.scheduler_stack, &b.scheduler_stack_bytes);
  b.run(b.arguments);
  b.fibers[b.current].state = State::kDone;
  start_switch(nullptr, b.scheduler_stack, b.scheduler_stack_bytes);
  _longjmp(b.scheduler, 1);
}

inline void resume(unsigned thread, bool fresh) {
  Block& b = *current_block;
  b.current = thread;
  threadIdx = dim3(thread, 0, 0);
  if (_setjmp(b.scheduler) == 0) {
    start_switch(&b.scheduler_fake_stack, (*b.stacks)[thread].get(), kStackBytes);
    if (!fresh) _longjmp(b.fibers[thread].resume, 1);
    ucontext_t& context = b.fibers[thread].start;
    getcontext(&context);
    context.uc_stack.ss_sp = (*b.stacks)[thread].get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
  }
  finish_switch(b.scheduler_fake_stack);
}

// True if all of fibers [first, last) are in `state`; they become ready then.
inline bool release(unsigned first, unsigned last, State state) {
  std::vector<Fiber>& fibers = current_block->fibers;
  for (unsigned t = first; t < last; ++t) {
    if (fibers[t].state != state) return false;
  }
  for (unsigned t = first; t < last; ++t) fibers[t].state = State::kReady;
  return true;
}

// Fills this thread's copy of the module's thread-local storage, where shared memory lies, except for what
// the emulator itself keeps there.
inline void poison_shared() {
  const dim3 indices[] = {threadIdx, blockIdx, blockDim, gridDim};
  Block* const block = current_block;
  const auto fill = [](dl_phdr_info* module, size_t, void* here) {
    const auto address = reinterpret_cast<uintptr_t>(here);
    size_t tls_bytes = 0;
    bool found = false;
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const auto& header = module->dlpi_phdr[i];
      const uintptr_t first = module->dlpi_addr + header.p_vaddr;
      if (header.p_type == PT_TLS) tls_bytes = header.p_memsz;
      if (header.p_type == PT_LOAD && address >= first && address < first + header.p_memsz) found = true;
    }
    if (found && module->dlpi_tls_data) std::memset(module->dlpi_tls_data, 0xA5, tls_bytes);
    return found ? 1 : 0;
  };
  dl_iterate_phdr(fill, reinterpret_cast<void*>(&wait_in));
  threadIdx = indices[0], blockIdx = indices[1], blockDim = indices[2], gridDim = indices[3];
  current_block = block;
}

// Runs every warp on to its next barrier.
inline void run_warps(unsigned threads, std::vector<bool>& started) {
  Block& b = *current_block;
  std::vector<unsigned> warps;
  for (unsigned first = 0; first < threads; first += 32) warps.push_back(first);
  b.order->arrange(warps);
  for (unsigned first : warps) {
    const unsigned last = std::min(first + 32, threads);
    std::vector<unsigned> lanes(last - first);
    std::iota(lanes.begin(), lanes.end(), first);
    do {
      b.order->arrange(lanes);
      for (unsigned t : lanes) {
        if (b.fibers[t].state != State::kReady) continue;
        const bool fresh = !started[t];
        started[t] = true;
        resume(t, fresh);
      }
    } while (release(first, last, State::kAtShuffle));
  }
}

// Runs one block to its end; false if its threads wait for each other in vain.
inline bool run_block(unsigned threads) {
  Block& b = *current_block;
  b.fibers.assign(threads, Fiber{});
  while (b.stacks->size() < threads) b.stacks->emplace_back(new char[kStackBytes]);
  std::vector<bool> started(threads, false);
  while (true) {
    run_warps(threads, started);
    const auto done = [](const Fiber& f) { return f.state == State::kDone; };
    if (std::all_of(b.fibers.begin(), b.fibers.end(), done)) return true;
    if (release(0, threads, State::kAtBarrier)) continue;
    if (!release(0, threads, State::kAtCluster)) return false;
    b.cluster->hand_on(b.rank, State::kAtCluster, *b.order);
    b.cluster->wait_for_turn(b.rank);
  }
}

struct Launch {
  dim3 grid, threads;
  unsigned cluster;
  size_t dynamic_bytes;
  void (*run)(void*);
  void* arguments;
};

// What the thread of rank `rank` does: its block of every cluster in turn.
inline void run_rank(const Launch& launch, const std::vector<unsigned>& clusters, unsigned rank,
                     std::vector<Cluster>& states, Order& order) {
  static std::vector<std::unique_ptr<char[]>> stacks[16];  // kept: their pages cost more than most blocks
  Block b;
  current_block = &b;
  b.stacks = &stacks[rank];
  b.rank = rank, b.ranks = launch.cluster, b.run = launch.run, b.arguments = launch.arguments;
  b.order = &order;
  gridDim = launch.grid;
  blockDim = launch.threads;
  for (size_t i = 0; i < clusters.size(); ++i) {
    b.cluster = &states[i];
    b.cluster->wait_for_turn(rank);
    const unsigned index = clusters[i] * launch.cluster + rank;
    blockIdx = dim3(index % launch.grid.x, index / launch.grid.x % launch.grid.y,
                    index / launch.grid.x / launch.grid.y);
    poison_shared();
    b.dynamic_shared.reset(new char[launch.dynamic_bytes]);
    std::memset(b.dynamic_shared.get(), 0xA5, launch.dynamic_bytes);
    if (!run_block(launch.threads.x)) b.cluster->failed = true;
    b.cluster->hand_on(rank, State::kDone, order);
    b.cluster->wait_for_end();
  }
}

// True unless threads waited for each other in vain.
inline bool run_grid(const Launch& launch) {
  Order order;
  const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  if (launch.grid.x % launch.cluster != 0 || launch.threads.x > 1024 || launch.cluster > 16) return false;
  std::vector<unsigned> clusters(blocks / launch.cluster);
  std::iota(clusters.begin(), clusters.end(), 0u);
  order.arrange(clusters);
  std::vector<Cluster> states(clusters.size());
  for (Cluster& c : states) {
    c.order.resize(launch.cluster);
    std::iota(c.order.begin(), c.order.end(), 0u);
    order.arrange(c.order);
    c.states.assign(launch.cluster, State::kReady);
    c.turn = c.order[0];
  }
  std::vector<std::thread> ranks;
  std::vector<std::unique_ptr<Order>> orders;
  for (unsigned rank = 0; rank < launch.cluster; ++rank) {
    orders.push_back(std::make_unique<Order>());
    ranks.emplace_back(run_rank, std::cref(launch), std::cref(clusters), rank, std::ref(states),
                       std::ref(*orders.back()));
  }
  for (std::thread& rank : ranks) rank.join();
  return std::none_of(states.begin(), states.end(), [](const Cluster& c) { return c.failed; });
}

inline void* dynamic_shared() {
  return current_block->dynamic_shared.get();
}

// What each lane of the warp gave; every lane of the warp calls it.
template <typename T, typename Read>
auto exchange(T value, Read read) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
  Block& b = *current_block;
  const unsigned thread = b.current;
  // Two buffers: a lane is at most one shuffle ahead of the others of its warp.
  auto& slots = b.exchange[b.fibers[thread].shuffles++ % 2];
  std::memcpy(slots[thread], &value, sizeof value);
  wait_in(State::kAtShuffle);
  return read([&](unsigned lane) {
    T other;
    std::memcpy(&other, slots[thread / 32 * 32 + lane], sizeof other);
    return other;
  });
}

}  // namespace cuda_emulator
