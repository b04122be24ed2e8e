// CPU implementation of verify_tree_rejection, in double: the reference's choices except where a coin or two
// scores agree to about 1e-15. Per visited node one read of its logits and, if it has children, of its q;
// every rejection is one more pass over W entries in cache (12 bytes each). Most of the time goes to weights
// in double and to the noise of a draw.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "parallel_trees.h"
#include "verify_tree_cpu_row.h"
#include "verify_tree_rejection.h"

namespace specfuse {
namespace {

constexpr double kLargest = std::numeric_limits<float>::max();

// What is left of p at one node while its children are tried, and the draw from it.
class Residual {
 public:
  explicit Residual(const VerifyTreeRejectionParams& params)
      : p_(params), passes_(row_passes()), weights_(params.tree.V) {}

  // [V], for p: to be filled at each node before anything else is called.
  double* weights() {
    q_.clear();
    ids_.clear();
    return weights_.data();
  }

  // Reads q; false where a value of it is negative, infinite or NaN.
  bool load_drafts(int64_t b, int64_t node) {
    const int64_t first = b * p_.draft_stride_b + node * p_.draft_stride_n;
    if (p_.sparse) {
      load_sparse(first, p_.draft_ids + (b * p_.tree.N + node) * p_.W);
    } else {
      load_dense(first);
    }
    int outside = 0;
    for (const float q : q_) outside |= !(q >= 0.0f) | !(q <= kLargest);
    if (!outside) split();
    return !outside;
  }

  // True if a child that holds `token` is accepted with coin u; otherwise what is left shrinks. A token of
  // which q has nothing cannot have been drawn: nothing happens.
  bool accepts(int64_t token, double u) {
    const int64_t j = entry_of(token);
    if (j < 0 || !(q_[j] > 0.0f)) return false;
    const double held = held_[j], step = left_ / drawable_;
    const float q = q_[j];
    if (left_of(held, taken_ + u * step, q) > 0.0) return true;
    held_[j] = 0.0;
    if (!p_.with_replacement) q_[j] = 0.0f;
    double left;
    sum(taken_ + step, &left, &drawable_);
    if (left > 0.0) {
      taken_ += step;
      left_ = left;
    } else {  // only by rounding, as a rejection has probability 0 where p = q: p stays
      held_[j] = p_.with_replacement ? held : left_of(held, taken_, q);
    }
    return false;
  }

  // Gumbel-argmax over what is left, as the largest left / -log(u); ties go to the lowest id.
  int64_t draw(int64_t seed, int64_t position) {
    for (size_t j = 0; j < q_.size(); ++j) weights_[id_of(j)] = left_of(held_[j], taken_, q_[j]);
    int64_t token = -1;
    double best = 0.0;
    for (int64_t base = 0; base < p_.tree.V; base += kChunk) {
      const double* left = &weights_[base];
      const int count = static_cast<int>(std::min(kChunk, p_.tree.V - base));
      const double largest = *std::max_element(left, left + count);
      if (!(largest > best * 0x1p-24)) continue;  // -log(u) is at least 2^-24
      uint32_t words[kChunk];
      passes_.noise(base, seed, position, NoiseStream::kResidual, words);
      for (int i = 0; i < count; ++i) {
        const double u = (words[i] >> 8) * 0x1p-24;
        // -log(u) is at least 1 - u; the factor covers the rounding of a score.
        if (!(left[i] * 1.000001 > best * (1.0 - u)) || left[i] == 0.0) continue;
        const double score = left[i] / -std::log(std::max(u, 0x1p-25));
        if (!(score > best)) continue;
        best = score;
        token = base + i;
      }
    }
    return token;
  }

 private:
  bool in_vocabulary(int64_t id) const { return id >= 0 && id < p_.tree.V; }
  int64_t id_of(size_t j) const { return p_.sparse ? ids_[j] : static_cast<int64_t>(j); }

  int64_t entry_of(int64_t token) const {
    if (!p_.sparse) return in_vocabulary(token) ? token : -1;
    const auto found = std::find(ids_.begin(), ids_.end(), token);
    return found == ids_.end() ? -1 : found - ids_.begin();
  }

  float draft_prob(int64_t offset) const {
    if (p_.draft_dtype == LogitsDtype::kFloat32) return static_cast<const float*>(p_.draft_probs)[offset];
    const uint16_t bits = static_cast<const uint16_t*>(p_.draft_probs)[offset];
    return p_.draft_dtype == LogitsDtype::kFloat16 ? float_from_half(bits) : float_from_bfloat16(bits);
  }

  void load_sparse(int64_t first, const int64_t* ids) {
    for (int64_t j = 0; j < p_.W; ++j) {
      if (!in_vocabulary(ids[j])) continue;
      q_.push_back(draft_prob(first + j * p_.draft_stride_w));
      ids_.push_back(ids[j]);
    }
  }

  void load_dense(int64_t first) {
    q_.resize(p_.W);
    if (p_.draft_stride_w != 1) {
      for (int64_t j = 0; j < p_.W; ++j) q_[j] = draft_prob(first + j * p_.draft_stride_w);
    } else if (p_.draft_dtype == LogitsDtype::kFloat32) {
      std::memcpy(q_.data(), static_cast<const float*>(p_.draft_probs) + first, p_.W * sizeof(float));
    } else {
      const bool half = p_.draft_dtype == LogitsDtype::kFloat16;
      (half ? passes_.from_half : passes_.from_bfloat16)(static_cast<const uint16_t*>(p_.draft_probs) + first,
                                                         p_.W, q_.data());
    }
  }

  // Takes the tokens that q knows out of p; rejections never touch the rest.
  void split() {
    outside_ = 0.0;
    if (p_.sparse) {
      held_.resize(q_.size());
      for (size_t j = 0; j < q_.size(); ++j) held_[j] = weights_[ids_[j]];
      for (int64_t id : ids_) weights_[id] = 0.0;
      for (double weight : weights_) outside_ += weight;
    } else {
      held_ = weights_;
    }
    taken_ = 0.0;
    sum(taken_, &left_, &drawable_);
  }

  // R and Q of the header's comment at S = taken.
  void sum(double taken, double* left, double* drawable) const {
    // Independent sums, which fit into vectors.
    constexpr size_t kLanes = 8;
    double lefts[kLanes] = {}, drawables[kLanes] = {};
    const size_t count = q_.size(), whole = count - count % kLanes;
    const double* held = held_.data();
    const float* q = q_.data();
    for (size_t j = 0; j < whole; j += kLanes) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        lefts[lane] += left_of(held[j + lane], taken, q[j + lane]);
        drawables[lane] += q[j + lane];
      }
    }
    for (size_t j = whole; j < count; ++j) {
      lefts[0] += left_of(held[j], taken, q[j]);
      drawables[0] += q[j];
    }
    *left = outside_;
    *drawable = 0.0;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      *left += lefts[lane];
      *drawable += drawables[lane];
    }
  }

  const VerifyTreeRejectionParams& p_;
  const RowPasses& passes_;
  std::vector<double> weights_;                       // [V] p; without the tokens of held_ where sparse
  std::vector<double> held_;                          // [W] p of the tokens that q knows
  std::vector<float> q_;                              // [W]
  std::vector<int64_t> ids_;                          // [W] their ids where sparse
  double outside_ = 0.0;                              // sum of p over all other tokens
  double taken_ = 0.0, left_ = 0.0, drawable_ = 0.0;  // S, R, Q
};

struct Emission {
  int64_t token;  // -1 where there is no distribution
  double logprob;
  int child;  // the one that holds the token, or -1
};

Emission sample(const VerifyTreeRejectionParams& params, int64_t b, int node, int64_t position, Row& row,
                Residual& residual) {
  const VerifyTreeParams& p = params.tree;
  const int64_t* tokens = p.tokens + b * p.N;
  const int32_t* parents = p.parents + b * p.N;
  const double log_mass = std::log(row.weigh(b, residual.weights()));
  const auto emission = [&](int64_t token, int child) {
    return Emission{token, row.log_weight(token, p.temperature[b]) - log_mass, child};
  };
  int64_t ordinal = 0;
  for (int child = node + 1; child < p.num_nodes[b]; ++child) {
    if (parents[child] != node) continue;
    // A leaf's q is not read.
    if (ordinal == 0 && !residual.load_drafts(b, node)) return {-1, std::nan(""), -1};
    const uint32_t coin = noise_word(p.seed[b], position, ordinal++, NoiseStream::kCoin);
    if (residual.accepts(tokens[child], (coin >> 8) * 0x1p-24)) return emission(tokens[child], child);
  }
  const int64_t token = residual.draw(p.seed[b], position);
  return emission(token, find_child(tokens, parents, p.num_nodes[b], node, token));
}

Emission visit(const VerifyTreeRejectionParams& params, int64_t b, int node, int64_t position, Row& row,
               Residual& residual) {
  const VerifyTreeParams& p = params.tree;
  Emission none{-1, std::nan(""), -1};
  row.load(b, node);
  if (!row.has_distribution(p.temperature[b])) return none;
  if (p.temperature[b] > 0.0f) return sample(params, b, node, position, row, residual);
  Emission greedy = none;
  row.emit(b, position, &greedy.token, &greedy.logprob);
  greedy.child = find_child(p.tokens + b * p.N, p.parents + b * p.N, p.num_nodes[b], node, greedy.token);
  return greedy;
}

void walk(const VerifyTreeRejectionParams& params, int64_t b, Row& row, Residual& residual) {
  const VerifyTreeParams& p = params.tree;
  int32_t* path = p.path + b * p.N;
  float* logprobs = p.logprobs + b * p.N;
  std::fill(path, path + p.N, -1);
  std::fill(logprobs, logprobs + p.N, 0.0f);
  int32_t visited = 0;
  p.next_token[b] = -1;
  for (int node = p.num_nodes[b] > 0 ? 0 : -1; node >= 0;) {
    const Emission emission = visit(params, b, node, p.positions[b] + visited + 1, row, residual);
    path[visited] = node;
    logprobs[visited++] = static_cast<float>(emission.logprob);
    p.next_token[b] = emission.token;
    node = emission.child;
  }
  p.length[b] = visited;
}

}  // namespace

ArgumentError verify_tree_rejection_cpu(const VerifyTreeRejectionParams& params, int threads) {
  const VerifyTreeParams& p = params.tree;
  const ArgumentError error = check_verify_tree(p);
  if (error.message) return error;
  parallel_trees(p.B, worthwhile_threads(p.B, p.V, threads), [&](const auto& take) {
    Row row(p);
    Residual residual(params);
    for (int64_t b = take(); b >= 0; b = take()) walk(params, b, row, residual);
  });
  return error;
}

}  // namespace specfuse
