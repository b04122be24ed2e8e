// What CorpusIndex knows of the next token: the contexts found, and how far each is trusted.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "corpus_contexts.h"
#include "corpus_gather.h"

namespace specfuse {
namespace {

// What a successor known only from other questions counts.
constexpr float kOtherScope = 0.25f;
// A successor that is this many times lighter than the heaviest of its context is not asked for.
constexpr int kLightest = 32;
int bit_width(uint32_t x) {
  return x == 0 ? 0 : 32 - __builtin_clz(x);
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
  GateInput& input = expert->input;
  input.age = std::min(bit_width(1 + static_cast<uint32_t>(age_in_answers(expert->last))), 15);
  if (expert->kind == kMatchExpert) {
    expert->count = 1;
    expert->tokens[0] = history(expert->last);
    expert->weights[0] = expert->total = 1.0f;
    input.shape = std::min(found.match_length / 2, CorpusMixer::kShapes - 1);
    input.same_scope = 1;
  } else {
    evaluate_context(expert, found.places[expert->kind].index, scope_bit(scope));
  }
  expert->gate = mixer_.gate(expert->kind, input);
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
  expert->input.shape = spread(count, heaviest, total) * 4 + occurrences_bucket(occurrences);
  expert->input.same_scope = (view.scopes & scope) != 0;
}

void CorpusIndex::train(Gathered* found, const AnswerWindow& window, uint32_t token) {
  int kinds[kExperts];
  GateInput inputs[kExperts];
  float share[kExperts], gate[kExperts];
  for (int i = 0; i < found->count; ++i) {
    Expert& expert = found->experts[i];
    evaluate(&expert, *found, window.scope);
    kinds[i] = expert.kind;
    inputs[i] = expert.input;
    gate[i] = expert.gate;
    share[i] = 0.0f;
    for (int j = 0; j < expert.count; ++j)
      if (expert.tokens[j] == token) share[i] = expert.weights[j] / expert.total;
  }
  mixer_.learn(found->count, kinds, inputs, share, gate);
}

}  // namespace specfuse
