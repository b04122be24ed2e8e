// CUDA implementation of verify_tree_rejection: one launch, a group of blocks per tree that walks it.
//
// Only visited rows are read: V * itemsize bytes of logits at each, and V * itemsize of q (k * (itemsize + 8)
// where sparse) at those with children. That read is the floor: with bf16 and V = 32,000 128 KB per node with
// children and 64 KB per leaf, 11 us of an H200's 4.3 TB/s for 256 trees that accept one draft and reach a
// leaf. Rejections and the draw are further passes over both rows from L2 or L1 (a slice of 32,000 / 8 tokens
// is 16 KB) and write nothing, see verify_tree_rejection.h; where q is sparse a rejection looks at its k
// entries only. For few trees time goes to latency instead: per visited node two passes and their barriers,
// one more per rejection and one for the draw, an estimated 2 to 3 us each.
//
// A coin or a draw is decided in float32: the definition in double may decide otherwise where the two sides
// agree to about 1e-5 of p before any rejection. V below 2^31. Compiled and emulated, not run on a GPU.
#include "verify_tree_rejection_cuda_residual.cuh"

namespace specfuse {
namespace {

struct Emission {
  int64_t token;  // -1 where there is no distribution
  float logprob;
  int child;  // the one that holds the token, or -1
};

__device__ __forceinline__ Emission no_distribution() {
  return {-1, NAN, -1};
}

// One tree and how its rows are sampled.
struct Tree {
  const int64_t* tokens;   // [N]
  const int32_t* parents;  // [N]
  int num_nodes;
  int64_t seed, position;  // of the root
  Rule rule;

  // The first child of `node` behind `after`, of any token or of one, or -1. Every warp looks for itself.
  __device__ int next_child(int node, int after, const int64_t* token = nullptr) const {
    for (int first = after + 1; first < num_nodes; first += 32) {
      const int c = first + static_cast<int>(threadIdx.x % 32);
      const bool fits = c < num_nodes && parents[c] == node && (!token || tokens[c] == *token);
      const unsigned found = __ballot_sync(kAllLanes, fits);
      if (found) return first + __ffs(static_cast<int>(found)) - 1;
    }
    return -1;
  }
};

template <LogitsDtype kDtype>
__device__ uint64_t top_of_group(Group& group, const Row<kDtype>& row, const Slice& slice) {
  unsigned long long best = 0;
  for (int64_t first = slice.begin + threadIdx.x * kTokensPerThread; first < slice.end;
       first += kThreads * kTokensPerThread) {
    float x[kTokensPerThread];
    load_eight(row, first, x);
#pragma unroll
    for (int t = 0; t < kTokensPerThread; ++t) {
      const unsigned long long key = token_key(x[t], first + t);
      best = best > key && first + t < row.V ? best : first + t < row.V ? key : best;
    }
  }
  return group.max(best);
}

// Accepts a child or draws from what the children leave.
template <LogitsDtype kDtype>
__device__ __noinline__ Emission sample(const Tree& tree, int node, int64_t position,
                                        Residual<kDtype>& residual) {
  const Target<kDtype>& p = residual.p;
  int child = tree.next_child(node, node);
  const bool leaf = child < 0, sparse = residual.q.ids != nullptr;
  Sums sums{0.0, 0.0};
  if (leaf) residual.q = DraftRow{nullptr, 0, 0, LogitsDtype::kFloat32, nullptr};
  if (!leaf) residual.begin();
  const Sums outside = residual.over_tokens(taken_of(0.0));
  sums = outside;
  if (!leaf && sparse) {
    sums = residual.over_entries(taken_of(0.0));
    sums.left += outside.left;
  }
  if (sums.drawable != sums.drawable) return no_distribution();
  const double log_mass = log(sums.left);
  const auto emission = [&](int64_t token, int at) -> Emission {
    const double scaled = static_cast<double>(p.row[token] - p.max) * tree.rule.inverse_temperature();
    return {token, static_cast<float>(scaled - log_mass), at};
  };
  double taken = 0.0;
  for (int64_t ordinal = 0; child >= 0; ++ordinal, child = tree.next_child(node, child)) {
    const int64_t token = tree.tokens[child];
    const float draft = residual.drawable(token);
    if (!(draft > 0.0f)) continue;  // cannot have been drawn
    const double u = (noise_word(tree.seed, position, ordinal, NoiseStream::kCoin) >> 8) * 0x1p-24;
    const double step = sums.left / sums.drawable;
    if (left_of(p[token], taken_of(taken + u * step), draft) > 0.0f) return emission(token, child);
    residual.remove(token);
    const Taken next = taken_of(taken + step);
    Sums after = sparse ? residual.over_entries(next) : residual.over_tokens(next);
    if (sparse) after.left += outside.left;
    // Nothing left by rounding only: a rejection has probability 0 where p = q.
    if (after.left > 0.0) taken += step, sums.left = after.left;
    sums.drawable = after.drawable;
  }
  const int64_t token = residual.draw(taken_of(taken), tree.seed, position);
  if (token < 0) return no_distribution();
  return emission(token, tree.next_child(node, node, &token));
}

template <LogitsDtype kDtype>
__device__ Emission visit(const VerifyTreeRejectionParams& params, Group& group, SharedState& shared,
                          const Tree& tree, int64_t b, int node, int64_t position) {
  const VerifyTreeParams& p = params.tree;
  const char* logits = static_cast<const char*>(p.logits);
  const int64_t itemsize = kDtype == LogitsDtype::kFloat32 ? 4 : 2;
  const Row<kDtype> row{logits + (b * p.stride_b + node * p.stride_n) * itemsize, p.stride_v, p.V};
  const Slice slice = slice_of(p.V, group.rank, group.size);
  const uint64_t top = top_of_group(group, row, slice);
  const bool greedy = tree.rule.temperature == 0.0f;
  if (top == kNanKey || top < kKeepAll) return no_distribution();
  if (!(tree.rule.temperature >= 0.0f && tree.rule.temperature < INFINITY)) return no_distribution();
  const float max = value_of(top);
  if (max == INFINITY && !greedy) return no_distribution();
  Target<kDtype> target{row, slice, max, kLog2e, kKeepAll};
  const int64_t draft_size = params.draft_dtype == LogitsDtype::kFloat32 ? 4 : 2;
  const int64_t offset = b * params.draft_stride_b + node * params.draft_stride_n;
  DraftRow q{static_cast<const char*>(params.draft_probs) + offset * draft_size, params.draft_stride_w,
             params.W, params.draft_dtype, nullptr};
  if (params.sparse) q.ids = params.draft_ids + (b * p.N + node) * params.W;
  if (params.W == 0) q.data = nullptr;
  Residual<kDtype> residual{group, shared, target, q, params.with_replacement};
  if (greedy) {
    residual.q = DraftRow{nullptr, 0, 0, LogitsDtype::kFloat32, nullptr};
    const double mass = residual.over_tokens(taken_of(0.0)).left;
    const int64_t token = token_of(top);
    // inf - inf: a row with an infinite logit has an argmax but no probabilities.
    const float logprob = max == INFINITY ? NAN : static_cast<float>(-log(mass));
    return {token, logprob, tree.next_child(node, node, &token)};
  }
  target.scale2 = scale2_of(tree.rule.inverse_temperature());
  if (tree.rule.filters(p.V)) target.cut = filtered_cut(group, row, slice, tree.rule, top);
  return sample(tree, node, position, residual);
}

// All blocks of a group walk the same path; the first one writes it.
template <LogitsDtype kDtype>
__global__ void __launch_bounds__(kThreads, 1)
    verify_tree_rejection_kernel(const VerifyTreeRejectionParams params) {
  __shared__ SharedState shared;
  const VerifyTreeParams& p = params.tree;
  const unsigned ranks = static_cast<unsigned>(p.cluster);
  const int64_t b = blockIdx.x / ranks;
  Group group = single_block();
  group.rank = blockIdx.x % ranks;
  group.size = ranks;
  group.scratch = static_cast<GroupScratch*>(p.scratch) + b;
  const Tree tree{
      p.tokens + b * p.N, p.parents + b * p.N, static_cast<int>(p.num_nodes[b] < p.N ? p.num_nodes[b] : p.N),
      p.seed[b],          p.positions[b],      {p.temperature[b], p.top_k[b], p.top_p[b], p.min_p[b]}};
  const bool writes = group.rank == 0;
  for (int64_t i = threadIdx.x; writes && i < p.N; i += kThreads) {
    p.path[b * p.N + i] = -1;
    p.logprobs[b * p.N + i] = 0.0f;
  }
  if (tree.num_nodes > 0 && tree.rule.filters(p.V)) group.clear_bins();
  int visited = 0, node = tree.num_nodes > 0 ? 0 : -1;
  int64_t token = -1;
  while (node >= 0) {
    const Emission emission =
        visit<kDtype>(params, group, shared, tree, b, node, tree.position + visited + 1);
    if (threadIdx.x == 0 && writes) {  // over the padding, which the barriers in visit come after
      p.path[b * p.N + visited] = node;
      p.logprobs[b * p.N + visited] = emission.logprob;
    }
    ++visited;
    token = emission.token;
    node = emission.child;
  }
  if (threadIdx.x == 0 && writes) {
    p.length[b] = visited;
    p.next_token[b] = token;
  }
}

template <LogitsDtype kDtype>
cudaError_t launch(const VerifyTreeRejectionParams& params, cudaStream_t stream) {
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(params.tree.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(params.tree.B * params.tree.cluster));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = params.tree.cluster > 1 ? 1 : 0;  // devices before sm_90 know no clusters
  return cudaLaunchKernelEx(&config, verify_tree_rejection_kernel<kDtype>, params);
}

}  // namespace

int64_t verify_tree_rejection_cuda_scratch_bytes(int64_t B, int64_t cluster) {
  return cluster > 1 ? B * static_cast<int64_t>(sizeof(GroupScratch)) : 0;
}

const char* verify_tree_rejection_cuda(const VerifyTreeRejectionParams& params, void* stream) {
  const int64_t cluster = params.tree.cluster;
  if (params.tree.B == 0) return nullptr;
  if (cluster < 1 || cluster > kMaxRanks || (cluster & (cluster - 1)) != 0)
    return "cluster must be a power of two up to 8";
  if (params.tree.B * cluster >= int64_t{1} << 31 || params.tree.V >= int64_t{1} << 31)
    return "more rows or tokens than one launch takes";
  const auto on = static_cast<cudaStream_t>(stream);
  cudaError_t status = cudaErrorInvalidValue;
  switch (params.tree.dtype) {
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
