// CorpusIndex remembers answers and proposes trees of tokens from them.
//
// A token is predicted by every context of the answer so far that was seen before: its last k tokens for
// several k, the last tokens together with their place in the answer, a context with a gap, the longest
// match. Each context remembers its successors with weights that decay with every occurrence; CorpusMixer
// blends the contexts. A tree is grown best first: the node with the highest path probability is added next,
// so that the expected number of accepted tokens is the largest that the estimates allow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <shared_mutex>
#include <vector>

#include "corpus_mixer.h"
#include "corpus_table.h"

namespace specfuse {

// Tokens of an answer up to some point. tokens[0] is token number `skipped` of the answer.
struct AnswerWindow {
  const int32_t* tokens;
  int count;
  int64_t skipped;
  uint64_t scope;     // hash of the question
  uint64_t evidence;  // hash of another model's answer, 0 if there is none
};

struct DraftedTree {
  std::vector<int32_t> tokens;
  std::vector<int32_t> parents;  // index of the parent in these arrays, -1 for a child of the root
  std::vector<float> probs;      // estimated probability that the target takes the whole path to the node
};

struct CorpusContent {
  std::vector<int32_t> tokens;     // answers one after the other, oldest first
  std::vector<int64_t> lengths;    // one per answer
  std::vector<uint64_t> scopes;    // one per answer
  std::vector<uint64_t> evidence;  // one per answer
  std::vector<float> gates;
};

class CorpusIndex {
 public:
  // first_position: where positions start to count; only tests of their end set it.
  explicit CorpusIndex(size_t max_tokens, uint32_t first_position = 1);

  // Learns one finished answer; the oldest answers go when more than max_tokens would be kept. Of an answer
  // longer than max_tokens, the end is learned. Token ids are not negative.
  void observe(const int32_t* tokens, size_t count, uint64_t scope, uint64_t evidence);

  // Drafts at most max_nodes nodes, none deeper than max_depth, behind the answer so far (which may be
  // empty).
  void propose(const AnswerWindow& window, int max_nodes, int max_depth, DraftedTree* tree) const;

  void clear();
  size_t num_answers() const;
  size_t num_tokens() const;
  size_t bytes() const;
  size_t max_tokens() const { return max_tokens_; }

  // What is remembered now. import_content replaces the content by learning it again in the same order; it
  // returns false and changes nothing where the arrays do not fit together.
  CorpusContent export_content() const;
  bool import_content(const CorpusContent& content);

 private:
  struct Answer {
    uint32_t start;  // history position of its first token; the one before holds kSeparator
    uint32_t count;
    uint64_t scope, evidence;
  };
  struct Expert;
  struct Gathered;
  class TreeBuilder;

  void prepare(const AnswerWindow& window, Gathered* found) const;
  void gather(Gathered* found) const;
  void gather_match(const AnswerWindow& window, Gathered* found) const;
  void evaluate(Expert* expert, const Gathered& found, uint64_t scope) const;
  void train(Gathered* found, const AnswerWindow& window, uint32_t token);
  void evaluate_context(Expert* expert, size_t place, uint16_t scope) const;
  void learn_token(const AnswerWindow& window, Gathered* found, uint32_t token, uint32_t position,
                   bool trains);
  void observe_locked(const int32_t* tokens, size_t count, uint64_t scope, uint64_t evidence, bool trains);
  void relearn(const CorpusContent& content);
  void evict(size_t needed);
  void clear_locked();
  CorpusContent content_locked() const;
  float age_in_answers(uint32_t last) const;
  uint32_t history(uint32_t position) const { return history_[position - history_start_]; }
  uint32_t end() const { return history_start_ + static_cast<uint32_t>(history_.size()); }

  const size_t max_tokens_;
  ContextTable table_;
  CorpusMixer mixer_;
  std::vector<uint32_t> history_;  // live answers, each behind a kSeparator
  uint32_t history_start_ = 1;     // position of history_[0]
  uint32_t oldest_ = 1;            // position of the oldest live answer
  std::deque<Answer> answers_;
  size_t live_tokens_ = 0;
  float answers_per_token_ = 0.0f;
  uint64_t observed_ = 0;  // tokens, for the rate at which gates are trained
  mutable std::shared_mutex mutex_;
};

}  // namespace specfuse
