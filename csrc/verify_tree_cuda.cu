// CUDA implementation of verify_tree: one block per tree walks it, reading only the rows it visits.
//
// Bytes moved: V * itemsize per visited node from memory, and the same again from L2 for the log-probability,
// for the draw, and for each of the 32 steps of a top-k or top-p search. The floor is one read of the visited
// rows; a whole scan of the logits is B * N * V * itemsize. One block per tree leaves most of the device idle
// at small B.
//
// Tokens are chosen in float32: they can differ from the CPU's where two scores agree to about 1e-6.
#include <cuda_runtime.h>

#include <cfloat>

#include "verify_tree.h"

namespace specfuse {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
static_assert(kThreads % 32 == 0, "reductions work on whole warps");

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

// Sorts as (value descending, id ascending) when keys are taken from the largest down; above all others for
// NaN.
__device__ __forceinline__ uint64_t token_key(float value, int64_t token) {
  if (value != value) return kNanKey;
  return uint64_t{ordered(value)} << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(token));
}

__device__ __forceinline__ int64_t token_of(uint64_t key) {
  return 0xFFFFFFFFu - static_cast<uint32_t>(key);
}

template <LogitsDtype kDtype>
struct Row {
  const void* data;
  int64_t stride, V;

  __device__ __forceinline__ float operator[](int64_t token) const {
    if (kDtype == LogitsDtype::kFloat32) return static_cast<const float*>(data)[token * stride];
    const uint16_t bits = static_cast<const uint16_t*>(data)[token * stride];
    return kDtype == LogitsDtype::kFloat16 ? float_from_half(bits) : float_from_bfloat16(bits);
  }
};

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
    value = combine(value, __shfl_xor_sync(0xFFFFFFFFu, value, lanes));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  T result = warps[0];
  for (int w = 1; w < kWarps; ++w) result = combine(result, warps[w]);
  __syncthreads();  // before the next call writes
  return result;
}

template <LogitsDtype kDtype>
__device__ uint64_t top_token(const Row<kDtype>& row) {
  unsigned long long best = 0;
  for (int64_t v = threadIdx.x; v < row.V; v += kThreads) {
    const unsigned long long key = token_key(row[v], v);
    best = best > key ? best : key;
  }
  return block_reduce(best, Max());
}

// Sum of exp((x - max) / temperature) over tokens whose key is at least `cut`.
template <LogitsDtype kDtype>
__device__ double mass(const Row<kDtype>& row, float max, float inverse_temperature, uint64_t cut) {
  float sum = 0.0f;
  for (int64_t v = threadIdx.x; v < row.V; v += kThreads) {
    const float x = row[v];
    if (token_key(x, v) >= cut) sum += expf((x - max) * inverse_temperature);
  }
  return block_reduce(static_cast<double>(sum), Sum());
}

// Number of tokens whose key lies in [low, high].
template <LogitsDtype kDtype>
__device__ int count(const Row<kDtype>& row, uint64_t low, uint64_t high) {
  int found = 0;
  for (int64_t v = threadIdx.x; v < row.V; v += kThreads) {
    const uint64_t key = token_key(row[v], v);
    found += key >= low && key <= high;
  }
  return block_reduce(found, Sum());
}

__device__ __forceinline__ uint64_t larger(uint64_t a, uint64_t b) {
  return a > b ? a : b;
}

// Keeps the k largest and their ties: the largest value that k tokens reach, by bisection.
template <LogitsDtype kDtype>
__device__ uint64_t top_k_cut(const Row<kDtype>& row, int k, uint64_t top) {
  uint32_t low = kMinusInfinity, high = static_cast<uint32_t>(top >> 32);
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2 + 1;
    if (count(row, uint64_t{middle} << 32, kNanKey) >= k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return larger(uint64_t{low} << 32, kKeepAll);
}

// Keeps a token if the mass strictly before it is below top_p of the mass inside `cut`: bisection for the
// lowest value of which a token is kept, then for the last id among its ties.
template <LogitsDtype kDtype>
__device__ uint64_t top_p_cut(const Row<kDtype>& row, float top_p, float max, float inverse_temperature,
                              uint64_t top, uint64_t cut) {
  const double target = top_p * mass(row, max, inverse_temperature, cut);
  uint32_t low = static_cast<uint32_t>(cut >> 32), high = static_cast<uint32_t>(top >> 32);
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (mass(row, max, inverse_temperature, uint64_t{middle + 1} << 32) < target) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const uint64_t ties = uint64_t{low} << 32;
  const double before = mass(row, max, inverse_temperature, uint64_t{low + 1} << 32);
  const double weight = expf((from_ordered(low) - max) * inverse_temperature);
  const double wanted = ceil((target - before) / weight);
  if (!(wanted < count(row, ties, ties | 0xFFFFFFFFu))) return larger(ties, cut);
  const int kept = wanted > 1.0 ? static_cast<int>(wanted) : 1;
  uint32_t first = 0, last = static_cast<uint32_t>(row.V - 1);
  while (first < last) {
    const uint32_t middle = first + (last - first) / 2;
    if (count(row, ties | (0xFFFFFFFFu - middle), ties | 0xFFFFFFFFu) >= kept) {
      last = middle;
    } else {
      first = middle + 1;
    }
  }
  return larger(ties | (0xFFFFFFFFu - last), cut);
}

// Keeps tokens of at least min_p times the largest probability.
__device__ __forceinline__ uint64_t min_p_cut(float min_p, float max, float temperature, uint64_t cut) {
  const double threshold = max + log(static_cast<double>(min_p)) * temperature;
  float lowest = static_cast<float>(threshold);
  if (lowest < threshold) lowest = nextafterf(lowest, INFINITY);
  return larger(uint64_t{ordered(lowest)} << 32, cut);
}

__device__ __forceinline__ float gumbel_float(uint32_t word) {
  const float u = static_cast<float>(word >> 8) * 0x1p-24f;
  return -logf(-logf(u > 0x1p-25f ? u : 0x1p-25f));
}

// Gumbel-argmax over the tokens inside the cut.
template <LogitsDtype kDtype>
__device__ int64_t draw(const Row<kDtype>& row, float max, float inverse_temperature, uint64_t cut,
                        int64_t seed, int64_t position) {
  unsigned long long best = 0;
  for (int64_t block = threadIdx.x; block * 4 < row.V; block += kThreads) {
    uint32_t words[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(position),
                         static_cast<uint32_t>(position >> 32), 0u};
    philox4x32(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    for (int j = 0; j < 4; ++j) {
      const int64_t v = block * 4 + j;
      if (v >= row.V) break;
      const float x = row[v];
      if (token_key(x, v) < cut) continue;
      const unsigned long long key = token_key((x - max) * inverse_temperature + gumbel_float(words[j]), v);
      best = best > key ? best : key;
    }
  }
  return token_of(block_reduce(best, Max()));
}

struct Emission {
  int64_t token;  // -1 where there is no distribution
  float logprob;
};

template <LogitsDtype kDtype>
__device__ Emission emit(const VerifyTreeParams& p, const Row<kDtype>& row, int64_t b, int64_t position) {
  const Emission none{-1, NAN};
  const uint64_t top = top_token(row);
  const float temperature = p.temperature[b];
  if (top == kNanKey || top < kKeepAll || !(temperature >= 0.0f)) return none;
  const float max = from_ordered(static_cast<uint32_t>(top >> 32));
  if (temperature == 0.0f) {
    // inf - inf: a row with an infinite logit has an argmax but no probabilities.
    const bool infinite = max == INFINITY;
    return {token_of(top), infinite ? NAN : static_cast<float>(-log(mass(row, max, 1.0f, kKeepAll)))};
  }
  if (max == INFINITY) return none;
  const float inverse_temperature = fminf(1.0f / temperature, FLT_MAX);
  uint64_t cut = kKeepAll;
  if (p.top_k[b] > 0 && p.top_k[b] < row.V) cut = top_k_cut(row, p.top_k[b], top);
  if (p.top_p[b] < 1.0f) cut = top_p_cut(row, p.top_p[b], max, inverse_temperature, top, cut);
  if (p.min_p[b] > 0.0f) cut = min_p_cut(p.min_p[b], max, temperature, cut);
  if (cut > top) cut = top;  // values out of range keep one token
  const int64_t token = draw(row, max, inverse_temperature, cut, p.seed[b], position);
  const double log_mass = log(mass(row, max, inverse_temperature, cut));
  return {token, static_cast<float>((row[token] - max) * inverse_temperature - log_mass)};
}

// The lowest-numbered child of `node` that holds `token`, or -1.
__device__ int find_child_in_block(const VerifyTreeParams& p, int64_t b, int num_nodes, int node,
                                   int64_t token) {
  int found = 0;  // kMaxTreeNodes - child, so that the lowest child is the maximum
  for (int child = node + 1 + static_cast<int>(threadIdx.x); child < num_nodes; child += kThreads) {
    const bool fits = p.parents[b * p.N + child] == node && p.tokens[b * p.N + child] == token;
    if (fits && kMaxTreeNodes - child > found) found = kMaxTreeNodes - child;
  }
  found = block_reduce(found, Max());
  return found == 0 ? -1 : kMaxTreeNodes - found;
}

template <LogitsDtype kDtype>
__global__ void __launch_bounds__(kThreads) verify_tree_kernel(const VerifyTreeParams p) {
  const int64_t b = blockIdx.x;
  const int64_t width = p.N;
  const int num_nodes = static_cast<int>(p.num_nodes[b] < width ? p.num_nodes[b] : width);
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    p.path[b * width + i] = -1;
    p.logprobs[b * width + i] = 0.0f;
  }
  int visited = 0, node = num_nodes > 0 ? 0 : -1;
  int64_t token = -1;
  while (node >= 0) {
    const int64_t offset = b * p.stride_b + node * p.stride_n;
    const int itemsize = kDtype == LogitsDtype::kFloat32 ? 4 : 2;
    const Row<kDtype> row{static_cast<const char*>(p.logits) + offset * itemsize, p.stride_v, p.V};
    const Emission emission = emit(p, row, b, p.positions[b] + visited + 1);
    token = emission.token;
    if (threadIdx.x == 0) {  // over the padding, which the barriers in emit come after
      p.path[b * width + visited] = node;
      p.logprobs[b * width + visited] = emission.logprob;
    }
    ++visited;
    node = token < 0 ? -1 : find_child_in_block(p, b, num_nodes, node, token);
  }
  if (threadIdx.x == 0) {
    p.length[b] = visited;
    p.next_token[b] = token;
  }
}

template <LogitsDtype kDtype>
cudaError_t launch(const VerifyTreeParams& params, cudaStream_t stream) {
  VerifyTreeParams copy = params;
  void* arguments[] = {&copy};
  return cudaLaunchKernel(verify_tree_kernel<kDtype>, dim3(static_cast<unsigned>(params.B)), dim3(kThreads),
                          arguments, 0, stream);
}

}  // namespace

const char* verify_tree_cuda(const VerifyTreeParams& params, void* stream) {
  if (params.B == 0) return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  cudaError_t status = cudaErrorInvalidValue;
  switch (params.dtype) {
    case LogitsDtype::kFloat32:
      status = launch<LogitsDtype::kFloat32>(params, on);
      break;
    case LogitsDtype::kFloat16:
      status = launch<LogitsDtype::kFloat16>(params, on);
      break;
    case LogitsDtype::kBFloat16:
      status = launch<LogitsDtype::kBFloat16>(params, on);
      break;
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace specfuse
