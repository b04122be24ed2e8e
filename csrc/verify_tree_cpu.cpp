// CPU implementation of verify_tree. Only visited rows are read: V * itemsize bytes each, once from memory
// and once or twice more from cache. Tokens are chosen in double, exactly as the eager reference chooses
// them.
#include <algorithm>
#include <cmath>
#include <limits>

#include "parallel_trees.h"
#include "verify_tree.h"
#include "verify_tree_cpu_row.h"

namespace specfuse {

ArgumentError check_verify_tree(const VerifyTreeParams& p) {
  for (int64_t b = 0; b < p.B; ++b) {
    if (p.num_nodes[b] < 0 || p.num_nodes[b] > p.N) {
      return {"num_nodes must lie between 0 and the tree's width", b, static_cast<double>(p.num_nodes[b])};
    }
    // Written so that NaN fails.
    if (!(p.temperature[b] >= 0.0f && p.temperature[b] < std::numeric_limits<float>::infinity())) {
      return {"temperature must be finite and not negative", b, p.temperature[b]};
    }
    if (p.top_k[b] < 0) return {"top_k must not be negative", b, static_cast<double>(p.top_k[b])};
    if (!(p.top_p[b] > 0.0f && p.top_p[b] <= 1.0f)) return {"top_p must lie in (0, 1]", b, p.top_p[b]};
    if (!(p.min_p[b] >= 0.0f && p.min_p[b] <= 1.0f)) return {"min_p must lie in [0, 1]", b, p.min_p[b]};
  }
  return {nullptr, 0, 0.0};
}

namespace {

void walk(const VerifyTreeParams& p, int64_t b, Row& row) {
  int32_t* path = p.path + b * p.N;
  float* logprobs = p.logprobs + b * p.N;
  std::fill(path, path + p.N, -1);
  std::fill(logprobs, logprobs + p.N, 0.0f);
  int32_t visited = 0;
  int64_t token = -1;
  int node = p.num_nodes[b] > 0 ? 0 : -1;
  while (node >= 0) {
    double logprob = std::nan("");
    row.load(b, node);
    if (!row.emit(b, p.positions[b] + visited + 1, &token, &logprob)) token = -1;
    path[visited] = node;
    logprobs[visited++] = static_cast<float>(logprob);
    node = token < 0 ? -1 : find_child(p.tokens + b * p.N, p.parents + b * p.N, p.num_nodes[b], node, token);
  }
  p.length[b] = visited;
  p.next_token[b] = token;
}

}  // namespace

ArgumentError verify_tree_cpu(const VerifyTreeParams& params, int threads) {
  const ArgumentError error = check_verify_tree(params);
  if (error.message) return error;
  parallel_trees(params.B, worthwhile_threads(params.B, params.V, threads), [&](const auto& take) {
    Row row(params);
    for (int64_t b = take(); b >= 0; b = take()) walk(params, b, row);
  });
  return error;
}

}  // namespace specfuse
