// CUDA implementation of verify_tree: one launch that walks, or one that scans all rows and one that walks.
//
// Walking: a cluster of blocks per tree, the vocabulary of a visited row split over them, partial results
// exchanged at the cluster's barrier. Reads the visited rows once, V * itemsize each, and pays a latency per
// depth (memory, two reductions, a barrier: 2 to 3 us). Scanning first reads every row of every tree, B * N *
// V * itemsize, split over `splits` blocks per row, and leaves 32 bytes per row and split to a walk that pays
// no more per depth than a look into shared memory. Floors on an H200 (4.3 TB/s): 16 x 16 x 32000 bf16 3.8
// us, 64 x 64 61 us, one row of 32,000 bf16 15 ns. Sampled scans also cost arithmetic, see
// verify_tree_cuda_scan.cuh. Rows with filters are refined when visited only: per row 4 to 9 passes that the
// cluster shares, each with a barrier.
//
// Two launches, not a counter that tells the last block of a tree: a counter is state that needs zeroing and
// that two streams or two replays of a graph could share. The first launch leaves all it found in scratch
// memory of this call.
//
// Tokens are those of the definition in double: draws too close to tell in float32 are repeated in double. V
// and B * N * splits are below 2^31. Compiled and emulated, not yet run on a GPU.
#include "verify_tree_cuda_select.cuh"

namespace specfuse {
namespace {

constexpr int kNoToken = -1, kUndecided = -2;

struct Emission {
  int token;  // kNoToken where there is no distribution
  float logprob;
};

struct RowRule : Rule {
  int64_t seed, position;  // of the token that the row emits

  __device__ __forceinline__ bool greedy() const { return temperature == 0.0f; }
  __device__ __forceinline__ bool valid() const { return temperature >= 0.0f && temperature < INFINITY; }
  __device__ __forceinline__ Pass pass(int64_t V) const {
    return {greedy() ? 1.0f : inverse_temperature(), kKeepAll, !greedy() && valid() && !filters(V), seed,
            position};
  }
};

// Everything of tree b that a row's pass needs; `depth` of the node below the root.
__device__ __forceinline__ RowRule rule_of(const VerifyTreeParams& p, int64_t b, int depth) {
  RowRule rule;
  rule.temperature = p.temperature[b];
  rule.top_k = p.top_k[b];
  rule.top_p = p.top_p[b];
  rule.min_p = p.min_p[b];
  rule.seed = p.seed[b];
  rule.position = p.positions[b] + depth + 1;
  return rule;
}

template <LogitsDtype kDtype>
__device__ __forceinline__ Row<kDtype> row_of(const VerifyTreeParams& p, int64_t b, int64_t node) {
  const int64_t offset = b * p.stride_b + node * p.stride_n;
  const int itemsize = kDtype == LogitsDtype::kFloat32 ? 4 : 2;
  return {static_cast<const char*>(p.logits) + offset * itemsize, p.stride_v, p.V};
}

__device__ __forceinline__ int nodes_of(const VerifyTreeParams& p, int64_t b) {
  const int64_t nodes = p.num_nodes[b];
  return static_cast<int>(nodes < 0 ? 0 : nodes < p.N ? nodes : p.N);
}

__device__ __forceinline__ Emission drawn(const Partial& found, float inverse_temperature) {
  if (found.best == 0 || !(value_of(found.best) - margin(value_of(found.best)) > found.second))
    return {kUndecided, 0.0f};
  const float scaled = (found.best_logit - value_of(found.top)) * inverse_temperature;
  return {static_cast<int>(token_of(found.best)), scaled - logf(found.sum)};
}

// What a whole row emits, unless only a closer look can tell.
__device__ __forceinline__ Emission decide(const Partial& found, const RowRule& rule, int64_t V) {
  const Emission none{kNoToken, NAN};
  if (found.sum != found.sum || found.top == 0 || !rule.valid()) return none;
  const bool infinite = value_of(found.top) == INFINITY;
  // inf - inf: a row with an infinite logit has an argmax but no probabilities.
  if (rule.greedy()) return {static_cast<int>(token_of(found.top)), infinite ? NAN : -logf(found.sum)};
  if (infinite) return none;
  if (rule.filters(V)) return {kUndecided, 0.0f};
  return drawn(found, rule.inverse_temperature());
}

// The group's slices of a row, merged; all threads of all its blocks get the result.
template <LogitsDtype kDtype>
__device__ __noinline__ Partial scan_row(Group& group, const Row<kDtype>& row, const Slice& slice,
                                         const Pass& pass) {
  Tokens<kDtype> first;
  first.load(row, slice, slice.begin);
  const Partial mine = scan_slice(row, slice, pass, first);
  if (group.size == 1) return mine;
  const uint4* slots = group.publish(mine);
  Partial all = empty_partial();
  for (unsigned r = 0; r < group.size; ++r) {
    const uint4 words[2] = {__ldcg(slots + 2 * r), __ldcg(slots + 2 * r + 1)};
    Partial other;
    memcpy(&other, words, sizeof other);
    all = merge(all, other, scale2_of(pass.inverse_temperature));
  }
  return all;
}

// Edges between a node and the root; parents come through shared memory, since a chain of loads from global
// memory costs a latency each.
__device__ int depth_of(const int32_t* parents, int node) {
  __shared__ int above[kMaxTreeNodes];
  for (int i = threadIdx.x; i <= node; i += kThreads) above[i] = parents[i];
  __syncthreads();
  int depth = 0;
  for (int at = node; at > 0 && above[at] < at; at = above[at]) ++depth;
  return depth;
}

// One block per row and part of the vocabulary.
template <LogitsDtype kDtype>
__global__ void __launch_bounds__(kThreads, 2) verify_tree_scan_kernel(const VerifyTreeParams p) {
  const unsigned splits = static_cast<unsigned>(p.splits);
  const unsigned index = blockIdx.x / splits, width = static_cast<unsigned>(p.N);
  const int64_t b = index / width;
  const int node = static_cast<int>(index % width);
  const Row<kDtype> row = row_of<kDtype>(p, b, node);
  const Slice slice = slice_of(p.V, blockIdx.x % splits, splits);
  // Before anything is read of the tree: its latency hides behind that of the row.
  Tokens<kDtype> first;
  first.load(row, slice, slice.begin);
  if (node >= nodes_of(p, b)) return;
  Pass pass = rule_of(p, b, 0).pass(p.V);
  if (pass.draw) pass.position += depth_of(p.parents + b * p.N, node);
  const Partial found = scan_slice(row, slice, pass, first);
  if (threadIdx.x == 0) static_cast<Partial*>(p.scratch)[blockIdx.x] = found;
}

struct Walk {
  int token[kMaxTreeNodes];  // what a node emits, kUndecided where that is not known yet
  float logprob[kMaxTreeNodes];
  int child[kMaxTreeNodes];  // that holds it, kMaxTreeNodes where none does
};

__device__ __forceinline__ Partial load_partial(const Partial* partial) {
  const uint4* words = reinterpret_cast<const uint4*>(partial);
  const uint4 held[2] = {__ldcg(words), __ldcg(words + 1)};
  Partial result;
  memcpy(&result, held, sizeof result);
  return result;
}

// The parts of one row, `first` being this lane's row; neighbouring lanes take neighbouring parts.
__device__ __forceinline__ Partial scanned_row(const VerifyTreeParams& p, int64_t row, bool exists,
                                               float inverse_temperature) {
  const int splits = static_cast<int>(p.splits);
  const Partial* parts = static_cast<const Partial*>(p.scratch) + row * splits;
  const Partial mine = exists ? load_partial(parts + threadIdx.x % splits) : empty_partial();
  return merge_lanes(mine, scale2_of(inverse_temperature), splits);
}

// What every node of tree b emits, from the partial results of the scan, and the child that holds it.
__device__ void decide_all(const VerifyTreeParams& p, int64_t b, int num_nodes, Walk& walk) {
  const int splits = static_cast<int>(p.splits);
  const RowRule rule = rule_of(p, b, 0);
  const int rounds = (num_nodes * splits + kThreads - 1) / kThreads;
  for (int round = 0; round < rounds; ++round) {
    const int node = (round * kThreads + static_cast<int>(threadIdx.x)) / splits;
    const Partial found =
        scanned_row(p, b * p.N + node, node < num_nodes, rule.pass(p.V).inverse_temperature);
    if (node < num_nodes && threadIdx.x % splits == 0) {
      const Emission emission = decide(found, rule, p.V);
      walk.token[node] = emission.token;
      walk.logprob[node] = emission.logprob;
      walk.child[node] = kMaxTreeNodes;
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < num_nodes; c += kThreads) {
    const int parent = p.parents[b * p.N + c];
    if (parent >= 0 && parent < c && walk.token[parent] >= 0 && p.tokens[b * p.N + c] == walk.token[parent])
      atomicMin(&walk.child[parent], c);
  }
  __syncthreads();
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

// What a visited node emits: a pass over its row unless the scan has made it, and another where filters are
// on.
template <LogitsDtype kDtype>
__device__ Emission emit(Group& group, const VerifyTreeParams& p, int64_t b, int node, int depth,
                         bool scanned) {
  const RowRule rule = rule_of(p, b, depth);
  const Row<kDtype> row = row_of<kDtype>(p, b, node);
  const Slice slice = slice_of(p.V, group.rank, group.size);
  Pass pass = rule.pass(p.V);
  Partial found;
  if (scanned) {
    found = scanned_row(p, b * p.N + node, true, pass.inverse_temperature);
  } else {
    found = scan_row(group, row, slice, pass);
  }
  Emission emission = decide(found, rule, p.V);
  if (emission.token != kUndecided) return emission;
  const float max = value_of(found.top);
  if (rule.filters(p.V)) {
    pass.draw = true;
    pass.cut = filtered_cut(group, row, slice, rule, found.top);
    found = scan_row(group, row, slice, pass);
    emission = drawn(found, pass.inverse_temperature);
    if (emission.token != kUndecided) return emission;
  }
  const int64_t token = draw_exactly(group, row, slice, pass, rule.temperature);
  return {static_cast<int>(token), (row[token] - max) * pass.inverse_temperature - logf(found.sum)};
}

// One group of blocks per tree. All blocks walk the same path; the first one writes it.
template <LogitsDtype kDtype>
__global__ void __launch_bounds__(kThreads, 1) verify_tree_walk_kernel(const VerifyTreeParams p) {
  __shared__ Walk walk;
  const unsigned ranks = static_cast<unsigned>(p.cluster);
  const int64_t b = blockIdx.x / ranks;
  Group group = single_block();
  group.rank = blockIdx.x % ranks;
  group.size = ranks;
  group.scratch = static_cast<GroupScratch*>(p.group_scratch) + b;
  const bool scanned = p.splits > 0, writes = group.rank == 0;
  const int num_nodes = nodes_of(p, b);
  for (int64_t i = threadIdx.x; writes && i < p.N; i += kThreads) {
    p.path[b * p.N + i] = -1;
    p.logprobs[b * p.N + i] = 0.0f;
  }
  if (num_nodes > 0 && rule_of(p, b, 0).filters(p.V)) group.clear_bins();
  if (scanned) decide_all(p, b, num_nodes, walk);
  __syncthreads();  // the padding is written before the path
  int visited = 0, node = num_nodes > 0 ? 0 : -1, token = kNoToken;
  while (node >= 0) {
    Emission emission{kUndecided, 0.0f};
    if (scanned) emission = {walk.token[node], walk.logprob[node]};
    const bool known = emission.token != kUndecided;
    if (!known) emission = emit<kDtype>(group, p, b, node, visited, scanned);
    token = emission.token;
    if (threadIdx.x == 0 && writes) {
      p.path[b * p.N + visited] = node;
      p.logprobs[b * p.N + visited] = emission.logprob;
    }
    ++visited;
    if (token < 0) break;
    if (known) {
      node = walk.child[node] < kMaxTreeNodes ? walk.child[node] : -1;
    } else {
      node = find_child_in_block(p, b, num_nodes, node, token);
    }
  }
  if (threadIdx.x == 0 && writes) {
    p.length[b] = visited;
    p.next_token[b] = token;
  }
}

template <LogitsDtype kDtype>
cudaError_t launch(const VerifyTreeParams& params, cudaStream_t stream) {
  if (params.splits > 0) {
    VerifyTreeParams copy = params;
    void* arguments[] = {&copy};
    const int64_t blocks = params.B * params.N * params.splits;
    const cudaError_t status =
        cudaLaunchKernel(verify_tree_scan_kernel<kDtype>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                         arguments, 0, stream);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(params.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(params.B * params.cluster));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = params.cluster > 1 ? 1 : 0;  // devices before sm_90 know no clusters
  return cudaLaunchKernelEx(&config, verify_tree_walk_kernel<kDtype>, params);
}

int64_t partial_bytes(const VerifyTreeParams& params) {
  return params.B * params.N * params.splits * static_cast<int64_t>(sizeof(Partial));
}

bool power_of_two(int64_t value) {
  return value > 0 && (value & (value - 1)) == 0;
}

}  // namespace

int64_t verify_tree_cuda_scratch_bytes(const VerifyTreeParams& params) {
  const int64_t groups = params.cluster > 1 ? params.B : 0;
  return partial_bytes(params) + groups * static_cast<int64_t>(sizeof(GroupScratch));
}

const char* verify_tree_cuda(const VerifyTreeParams& params, void* stream) {
  if (params.B == 0) return nullptr;
  if (params.splits != 0 && (!power_of_two(params.splits) || params.splits > 32))
    return "splits must be 0 or a power of two up to 32";
  if (!power_of_two(params.cluster) || params.cluster > kMaxRanks)
    return "cluster must be a power of two up to 8";
  if (params.B * params.N * (params.splits + 1) >= int64_t{1} << 31 || params.V >= int64_t{1} << 31)
    return "more rows or tokens than one launch takes";
  VerifyTreeParams placed = params;
  placed.group_scratch = static_cast<char*>(params.scratch) + partial_bytes(params);
  if (params.N == 0) placed.splits = 0;
  const auto on = static_cast<cudaStream_t>(stream);
  cudaError_t status = cudaErrorInvalidValue;
  switch (params.dtype) {
    case LogitsDtype::kFloat32:
      status = launch<LogitsDtype::kFloat32>(placed, on);
      break;
    case LogitsDtype::kFloat16:
      status = launch<LogitsDtype::kFloat16>(placed, on);
      break;
    case LogitsDtype::kBFloat16:
      status = launch<LogitsDtype::kBFloat16>(placed, on);
      break;
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace specfuse
