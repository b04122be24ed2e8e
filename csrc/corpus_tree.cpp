// CorpusIndex::propose: the best-first tree.
#include <algorithm>
#include <functional>
#include <mutex>

#include "corpus_gather.h"

namespace specfuse {
namespace {

constexpr int kLargestTree = 1 << 14;
// Experts are not asked any more once this little is left to give ...
constexpr float kNegligible = 1e-3f;
// ... or this little, where no token they name could enter the tree.
constexpr float kSettled = 0.1f;

}  // namespace

// Grows one tree. A node is worth its path probability; the candidates are a heap, and only those that can
// still be among the max_nodes best are kept.
class CorpusIndex::TreeBuilder {
 public:
  TreeBuilder(const CorpusIndex& index, const AnswerWindow& window, int max_nodes, int max_depth,
              DraftedTree* tree)
      : index_(index),
        window_(window),
        max_nodes_(static_cast<size_t>(max_nodes)),
        max_depth_(max_depth),
        tree_(*tree) {
    const int tail = std::min(window.count, kCopyReach);
    path_.assign(window.tokens + window.count - tail, window.tokens + window.count);
    window_.skipped += window.count - tail;
    base_ = path_.size();
    path_.resize(base_ + static_cast<size_t>(std::min(max_depth, max_nodes)));
  }

  void build() {
    expand(-1, 0, 1.0f);
    while (!candidates_.empty()) {
      std::pop_heap(candidates_.begin(), candidates_.end());
      const Candidate best = candidates_.back();
      candidates_.pop_back();
      const int node = static_cast<int>(tree_.tokens.size());
      tree_.tokens.push_back(best.token);
      tree_.parents.push_back(best.parent);
      tree_.probs.push_back(best.prob);
      if (tree_.tokens.size() == max_nodes_) return;
      depths_.push_back(best.parent < 0 ? 1 : depths_[static_cast<size_t>(best.parent)] + 1);
      expand(node, depths_.back(), best.prob);
    }
  }

 private:
  struct Candidate {
    float prob;
    int32_t parent, token;
    // Ties go to the older node, then to the smaller token: the order does not depend on the heap.
    bool operator<(const Candidate& other) const {
      if (prob != other.prob) return prob < other.prob;
      if (parent != other.parent) return parent > other.parent;
      return token > other.token;
    }
  };
  static constexpr size_t kSlots = 1024;  // more than kExperts * kMaxSuccessors, a power of two
  static_assert(kSlots > size_t{kExperts} * kMaxSuccessors, "the blend must never fill up");

  void expand(int node, int depth, float prob) {
    if (depth >= max_depth_) return;
    int at = depth;
    for (int i = node; i >= 0; i = tree_.parents[static_cast<size_t>(i)])
      path_[base_ + static_cast<size_t>(--at)] = tree_.tokens[static_cast<size_t>(i)];
    window_.tokens = path_.data();
    window_.count = static_cast<int>(base_) + depth;
    blend(prob);
    for (uint32_t i = 0; i < count_; ++i) {
      // Never above the parent's, whatever the rounding of the sum.
      const float path_prob = prob * std::min(probs_[i], 1.0f);
      if (path_prob <= threshold()) continue;
      candidates_.push_back({path_prob, node, static_cast<int32_t>(tokens_[i])});
      std::push_heap(candidates_.begin(), candidates_.end());
      remember(path_prob);
    }
  }

  // The next token's probabilities: gates from the most specific expert down, until nothing is left to give.
  void blend(float prob) {
    index_.prepare(window_, &found_);
    index_.gather(&found_);
    index_.gather_match(window_, &found_);
    count_ = 0;
    ++epoch_;
    // A share that is not above `least` cannot enter the tree.
    const float least = threshold() / prob;
    float rest = 1.0f, likeliest = 0.0f;
    for (int i = found_.count - 1; i >= 0 && rest > kNegligible; --i) {
      if (likeliest + rest <= least) return;
      if (rest <= least && rest < kSettled) return;
      Expert& expert = found_.experts[i];
      index_.evaluate(&expert, found_, window_.scope);
      const float scale = rest * expert.gate / expert.total;
      rest *= 1.0f - expert.gate;
      for (int j = 0; j < expert.count; ++j) {
        const float share = scale * expert.weights[j];
        // What the experts below may add to a token is at most `rest`.
        likeliest = std::max(likeliest, add(expert.tokens[j], share, share + rest > least));
      }
    }
  }

  // Returns what the token has now; one that is not there yet comes in only where `newcomers` do.
  float add(uint32_t token, float prob, bool newcomers) {
    for (size_t i = token * 2654435761u >> 22;; i = (i + 1) % kSlots) {
      if (slots_[i] >> 16 != epoch_) {
        if (!newcomers) return 0.0f;
        slots_[i] = epoch_ << 16 | count_;
        tokens_[count_] = token;
        probs_[count_++] = prob;
        return prob;
      }
      const uint32_t at = slots_[i] & 0xFFFF;
      if (tokens_[at] == token) return probs_[at] += prob;
    }
  }

  // The max_nodes-th best path probability so far: what is not above it cannot enter the tree.
  float threshold() const { return best_.size() < max_nodes_ ? 0.0f : best_.front(); }
  void remember(float prob) {
    if (best_.size() == max_nodes_) {
      std::pop_heap(best_.begin(), best_.end(), std::greater<float>());
      best_.pop_back();
    }
    best_.push_back(prob);
    std::push_heap(best_.begin(), best_.end(), std::greater<float>());
  }

  const CorpusIndex& index_;
  AnswerWindow window_;
  const size_t max_nodes_;
  const int max_depth_;
  DraftedTree& tree_;
  size_t base_;
  std::vector<int32_t> path_;  // the end of the answer, then the path to the node that is expanded
  std::vector<int> depths_;
  std::vector<Candidate> candidates_;
  std::vector<float> best_;
  // The blend: tokens named so far with their probabilities, found by token through slots_.
  uint32_t tokens_[kSlots];
  float probs_[kSlots];
  uint32_t count_ = 0;
  uint32_t slots_[kSlots] = {};  // epoch << 16 | index
  uint32_t epoch_ = 0;
  Gathered found_{};
};

void CorpusIndex::propose(const AnswerWindow& window, int max_nodes, int max_depth, DraftedTree* tree) const {
  tree->tokens.clear();
  tree->parents.clear();
  tree->probs.clear();
  if (max_nodes < 1 || max_depth < 1) return;
  max_nodes = std::min(max_nodes, kLargestTree);
  std::shared_lock<std::shared_mutex> lock(mutex_);
  TreeBuilder(*this, window, max_nodes, max_depth, tree).build();
}

}  // namespace specfuse
