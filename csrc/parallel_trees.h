// Trees of a batch on several CPU threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace specfuse {

// A thread costs about 20 us to start and join: it should find this many logits to look at, several times as
// much work. Threads are not kept between calls, so that a forked process is as good as any other.
constexpr int64_t kLogitsPerThread = 128 * 1024;

// Threads worth starting for B trees that visit at least one row of V logits each; `most` is the caller's
// limit.
inline int worthwhile_threads(int64_t B, int64_t V, int most) {
  return static_cast<int>(std::max<int64_t>(1, std::min({int64_t{most}, B, B * V / kLogitsPerThread})));
}

// Calls body(take) on `threads` threads, the caller's among them; take() hands out 0 .. count - 1, each once,
// then -1. The first exception of any thread is thrown again here.
template <typename Body>
void parallel_trees(int64_t count, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const auto take = [&]() -> int64_t {
    const int64_t i = failed ? count : next++;
    return i < count ? i : -1;
  };
  const auto run = [&] {
    try {
      body(take);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
  std::vector<std::thread> started;
  started.reserve(static_cast<size_t>(threads - 1));
  try {
    for (int i = 1; i < threads; ++i) started.emplace_back(run);
  } catch (const std::system_error&) {  // no more threads to be had: those there are do the work
  }
  run();
  for (std::thread& thread : started) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace specfuse
