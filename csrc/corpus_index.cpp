#include "corpus_index.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <mutex>

#include "corpus_contexts.h"
#include "corpus_gather.h"

namespace specfuse {
namespace {

constexpr uint32_t kSeparator = 0xFFFFFFFFu;
// Positions are 32 bits wide; before they run out everything is learned again from the start.
constexpr uint32_t kLastPosition = 0xF0000000u;
// What a successor known only from other questions counts.
constexpr float kOtherScope = 0.25f;
// A successor that is this many times lighter than the heaviest of its context is not asked for.
constexpr int kLightest = 32;
// Gates are trained on every token at first and on ever fewer later, when they hardly move any more.
bool is_training_token(uint64_t observed) {
  const uint64_t period = observed < (1 << 14) ? 1 : observed < (1 << 17) ? 4 : 16;
  return observed % period == 0;
}

int bit_width(uint32_t x) {
  return x == 0 ? 0 : 32 - __builtin_clz(x);
}

uint16_t scope_bit(uint64_t scope) {
  return static_cast<uint16_t>(1u << ((scope * 0x9E3779B97F4A7C15ull) >> 60));
}

// 1 / sqrt(2 + age) in steps of a sixteenth octave: how much a successor seen that many answers ago still
// counts.
constexpr uint32_t kRecencyFirst = 0x40000000u >> 19;  // the bits of 2.0f
std::array<float, 512> recency_table() {
  std::array<float, 512> table{};
  for (uint32_t i = 0; i < table.size(); ++i) {
    const uint32_t bits = ((i + kRecencyFirst) << 19) + (1u << 18);
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    table[i] = 1.0f / std::sqrt(x);
  }
  return table;
}
const std::array<float, 512> kRecency = recency_table();

float recency(float age) {
  const float x = 2.0f + age;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return kRecency[((bits >> 19) - kRecencyFirst) & 511];
}

// 0..4: from a single successor to an even spread.
int spread(int count, float heaviest, float total) {
  if (count == 1) return 0;
  const float ratio = heaviest / total;
  return ratio > 0.9f ? 1 : ratio > 0.7f ? 2 : ratio > 0.45f ? 3 : 4;
}

int occurrences_bucket(float weight) {
  const float occurrences = weight / kWeightOne;
  return occurrences < 1.2f ? 0 : occurrences < 2.2f ? 1 : occurrences < 3.5f ? 2 : 3;
}

}  // namespace

CorpusIndex::CorpusIndex(size_t max_tokens, uint32_t first_position)
    : max_tokens_(max_tokens),
      mixer_(kExperts, kMatchExpert),
      history_start_(first_position),
      oldest_(first_position) {}

float CorpusIndex::age_in_answers(uint32_t last) const {
  return static_cast<float>(static_cast<int32_t>(end() - last)) * answers_per_token_;
}

// Hashes the contexts and asks for their slots, to be there when gather() reads them.
void CorpusIndex::prepare(const AnswerWindow& window, Gathered* found) const {
  found->present = context_hashes(window, found->hashes);
  for (int k = 0; k < kContexts; ++k)
    if (found->present >> k & 1) table_.prefetch(found->hashes[k]);
}

void CorpusIndex::gather(Gathered* found) const {
  found->clear();
  const uint32_t present = found->present;
  for (int k = 0; k < kContexts; ++k) {
    const int parent = kContextKinds[k].parent;
    if (!(present >> k & 1) || (parent >= 0 && !found->has(parent))) continue;
    found->places[k] = table_.find(found->hashes[k], oldest_);
    if (!found->places[k].found) continue;
    table_.prefetch_list(found->places[k].index);
    found->add(k, table_.slot(found->places[k].index).last);
  }
}

// The most recent occurrence of the longest context found, followed back as far as it agrees.
void CorpusIndex::gather_match(const AnswerWindow& window, Gathered* found) const {
  if (found->longest_order < 2) return;
  const uint32_t at = found->longest_last;
  int length = 0;
  while (length < kMaxMatch) {
    const uint32_t before = history(at - 1 - static_cast<uint32_t>(length));
    if (length == window.count) {
      length += before == kSeparator && window.skipped == 0;
      break;
    }
    if (before != static_cast<uint32_t>(window.tokens[window.count - 1 - length])) break;
    ++length;
  }
  if (length <= found->longest_order) return;
  found->match_length = length;
  found->add(kMatchExpert, at);
}

void CorpusIndex::evaluate(Expert* expert, const Gathered& found, uint64_t scope) const {
  Evidence& evidence = expert->evidence;
  evidence.age = std::min(bit_width(1 + static_cast<uint32_t>(age_in_answers(expert->last))), 15);
  if (expert->kind == kMatchExpert) {
    expert->count = 1;
    expert->tokens[0] = history(expert->last);
    expert->weights[0] = expert->total = 1.0f;
    evidence.shape = std::min(found.match_length / 2, CorpusMixer::kShapes - 1);
    evidence.same_scope = 1;
  } else {
    evaluate_context(expert, found.places[expert->kind].index, scope_bit(scope));
  }
  expert->gate = mixer_.gate(expert->kind, evidence);
}

void CorpusIndex::evaluate_context(Expert* expert, size_t place, uint16_t scope) const {
  Successor single;
  const SuccessorView view = table_.view(place, &single);
  float heaviest = 0.0f, occurrences = 0.0f, total = 0.0f;
  int count = 0;
  for (int i = 0; i < view.count; ++i) {
    const Successor& s = view.items[i];
    if (s.weight < view.items[0].weight / kLightest) break;
    const float weight = s.weight * recency(age_in_answers(s.last)) * (s.scopes & scope ? 1.0f : kOtherScope);
    expert->tokens[count] = s.token;
    expert->weights[count] = weight;
    if (s.last < oldest_) continue;
    ++count;
    heaviest = std::max(heaviest, weight);
    occurrences += s.weight;
    total += weight;
  }
  expert->count = count;
  expert->total = total;
  expert->evidence.shape = spread(count, heaviest, total) * 4 + occurrences_bucket(occurrences);
  expert->evidence.same_scope = (view.scopes & scope) != 0;
}

void CorpusIndex::train(Gathered* found, const AnswerWindow& window, uint32_t token) {
  int kinds[kExperts];
  Evidence evidence[kExperts];
  float share[kExperts], gate[kExperts];
  for (int i = 0; i < found->count; ++i) {
    Expert& expert = found->experts[i];
    evaluate(&expert, *found, window.scope);
    kinds[i] = expert.kind;
    evidence[i] = expert.evidence;
    gate[i] = expert.gate;
    share[i] = 0.0f;
    for (int j = 0; j < expert.count; ++j)
      if (expert.tokens[j] == token) share[i] = expert.weights[j] / expert.total;
  }
  mixer_.learn(found->count, kinds, evidence, share, gate);
}

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
