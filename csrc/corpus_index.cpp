#include "corpus_index.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "corpus_contexts.h"
#include "corpus_gather.h"

namespace specfuse {
namespace {

// Positions are 32 bits wide; before they run out everything is learned again from the start.
constexpr uint32_t kLastPosition = 0xF0000000u;
// Gates are trained on every token at first and on ever fewer later, when they hardly move any more.
bool is_training_token(uint64_t observed) {
  const uint64_t period = observed < (1 << 14) ? 1 : observed < (1 << 17) ? 4 : 16;
  return observed % period == 0;
}

}  // namespace

CorpusIndex::CorpusIndex(size_t max_tokens, uint32_t first_position)
    : max_tokens_(max_tokens),
      mixer_(kExperts, kMatchExpert),
      history_start_(first_position),
      oldest_(first_position) {}

void CorpusIndex::learn_token(const AnswerWindow& window, Gathered* found, uint32_t token, uint32_t position,
                              bool trains) {
  table_.reserve(kContexts, oldest_);
  gather(found);
  if (trains) {
    gather_match(window, found);
    train(found, window, token);
  }
  const Successor added = {token, position, kWeightOne, scope_bit(window.scope)};
  for (int k = 0; k < kContexts; ++k) {
    const ContextKind& kind = kContextKinds[k];
    if (!(found->present >> k & 1) || (kind.parent >= 0 && !found->has(kind.parent))) continue;
    table_.add(found->hashes[k], found->places[k], added, kind.successors, oldest_);
  }
}

void CorpusIndex::observe(const int32_t* tokens, size_t count, uint64_t scope, uint64_t evidence) {
  std::unique_lock<std::shared_mutex> lock(mutex_);
  observe_locked(tokens, count, scope, evidence, true);
}

void CorpusIndex::observe_locked(const int32_t* tokens, size_t count, uint64_t scope, uint64_t evidence,
                                 bool trains) {
  int64_t skipped = 0;
  if (count > max_tokens_) {
    skipped = static_cast<int64_t>(count - max_tokens_);
    tokens += skipped;
    count = max_tokens_;
  }
  if (count == 0) return;
  evict(count);
  if (end() > kLastPosition - count) {
    const CorpusContent content = content_locked();
    relearn(content);
  }
  history_.push_back(kSeparator);
  const uint32_t start = end();
  history_.insert(history_.end(), tokens, tokens + count);
  const auto window = [&](size_t i) {
    const size_t tail = std::min<size_t>(i, kCopyReach);
    return AnswerWindow{tokens + (i - tail), static_cast<int>(tail), skipped + static_cast<int64_t>(i - tail),
                        scope, evidence};
  };
  Gathered found[2];  // of this token and of the next, whose slots are fetched meanwhile
  prepare(window(0), &found[0]);
  for (size_t i = 0; i < count; ++i) {
    if (i + 1 < count) prepare(window(i + 1), &found[(i + 1) % 2]);
    const bool now = trains && is_training_token(observed_);
    learn_token(window(i), &found[i % 2], static_cast<uint32_t>(tokens[i]), start + static_cast<uint32_t>(i),
                now);
    ++observed_;
  }
  answers_.push_back({start, static_cast<uint32_t>(count), scope, evidence});
  live_tokens_ += count;
  answers_per_token_ =
      static_cast<float>(answers_.size()) / static_cast<float>(live_tokens_ + answers_.size());
}

void CorpusIndex::evict(size_t needed) {
  while (!answers_.empty() && live_tokens_ + needed > max_tokens_) {
    live_tokens_ -= answers_.front().count;
    answers_.pop_front();
  }
  oldest_ = answers_.empty() ? end() + 1 : answers_.front().start;
  // The front of the history is given back once it is as long as what is alive.
  const size_t dead = oldest_ - 1 - history_start_;
  if (dead > 1024 && dead > history_.size() / 4) {
    history_.erase(history_.begin(), history_.begin() + static_cast<std::ptrdiff_t>(dead));
    history_start_ += static_cast<uint32_t>(dead);
  }
}

void CorpusIndex::clear() {
  std::unique_lock<std::shared_mutex> lock(mutex_);
  clear_locked();
  mixer_ = CorpusMixer(kExperts, kMatchExpert);
}

void CorpusIndex::clear_locked() {
  table_.clear();
  history_ = {};
  answers_.clear();
  history_start_ = oldest_ = 1;
  live_tokens_ = 0;
  observed_ = 0;
  answers_per_token_ = 0.0f;
}

size_t CorpusIndex::num_answers() const {
  std::shared_lock<std::shared_mutex> lock(mutex_);
  return answers_.size();
}

size_t CorpusIndex::num_tokens() const {
  std::shared_lock<std::shared_mutex> lock(mutex_);
  return live_tokens_;
}

size_t CorpusIndex::bytes() const {
  std::shared_lock<std::shared_mutex> lock(mutex_);
  return table_.bytes() + history_.capacity() * sizeof(uint32_t) + answers_.size() * sizeof(Answer) +
         mixer_.parameters().size() * sizeof(float) + sizeof(*this);
}

CorpusContent CorpusIndex::export_content() const {
  std::shared_lock<std::shared_mutex> lock(mutex_);
  return content_locked();
}

CorpusContent CorpusIndex::content_locked() const {
  CorpusContent content;
  for (const Answer& answer : answers_) {
    for (uint32_t i = 0; i < answer.count; ++i)
      content.tokens.push_back(static_cast<int32_t>(history(answer.start + i)));
    content.lengths.push_back(answer.count);
    content.scopes.push_back(answer.scope);
    content.evidence.push_back(answer.evidence);
  }
  content.gates = mixer_.parameters();
  return content;
}

bool CorpusIndex::import_content(const CorpusContent& content) {
  std::unique_lock<std::shared_mutex> lock(mutex_);
  const size_t answers = content.lengths.size();
  if (content.scopes.size() != answers || content.evidence.size() != answers) return false;
  if (!content.gates.empty() && content.gates.size() != mixer_.parameters().size()) return false;
  if (std::any_of(content.gates.begin(), content.gates.end(), [](float x) { return !std::isfinite(x); }))
    return false;
  size_t left = content.tokens.size();
  for (const int64_t length : content.lengths) {
    if (length < 1 || static_cast<size_t>(length) > left) return false;
    left -= static_cast<size_t>(length);
  }
  if (left != 0 || std::any_of(content.tokens.begin(), content.tokens.end(), [](int32_t t) { return t < 0; }))
    return false;
  relearn(content);
  return true;
}

void CorpusIndex::relearn(const CorpusContent& content) {
  clear_locked();
  // Content without gates (the Python index learns none) trains them like any other answers.
  const bool trains = content.gates.empty();
  mixer_ = CorpusMixer(kExperts, kMatchExpert);
  if (!trains) mixer_.parameters() = content.gates;
  const int32_t* tokens = content.tokens.data();
  for (size_t i = 0; i < content.lengths.size(); ++i) {
    const size_t count = static_cast<size_t>(content.lengths[i]);
    observe_locked(tokens, count, content.scopes[i], content.evidence[i], trains);
    tokens += count;
  }
}

}  // namespace specfuse
