// CUDA implementation of verify_tree: one block per tree walks it, reading only the rows it visits.
//
// Bytes moved: V * itemsize per visited node from memory, and the same again from L2 for the log-probability,
// for the draw, and for each of the 32 steps of a top-k or top-p search. The floor is one read of the visited
// rows; a whole scan of the logits is B * N * V * itemsize. One block per tree leaves most of the device idle
// at small B.
//
// Tokens are chosen in float32: they can differ from the CPU's where two scores agree to about 1e-6.
#include "verify_tree_cuda_row.cuh"

namespace specfuse {
namespace {

struct Emission {
  int64_t token;  // -1 where there is no distribution
  float logprob;
};

template <LogitsDtype kDtype>
__device__ Emission emit(const VerifyTreeParams& p, const Row<kDtype>& row, int64_t b, int64_t position) {
  const Emission none{-1, NAN};
  const uint64_t top = top_token(row);
  const float temperature = p.temperature[b];
  if (top == kNanKey || top < kKeepAll || !(temperature >= 0.0f && temperature < INFINITY)) return none;
  const float max = from_ordered(static_cast<uint32_t>(top >> 32));
  if (temperature == 0.0f) {
    // inf - inf: a row with an infinite logit has an argmax but no probabilities.
    const bool infinite = max == INFINITY;
    return {token_of(top), infinite ? NAN : static_cast<float>(-log(mass(row, max, 1.0f, kKeepAll)))};
  }
  if (max == INFINITY) return none;
  const Rule rule{temperature, p.top_k[b], p.top_p[b], p.min_p[b]};
  const float inverse_temperature = rule.inverse_temperature();
  const uint64_t cut = filtered_cut(row, rule, top);
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
