// What is known about one context of an answer: the experts that speak, from the least to the most specific.
#pragma once

#include "corpus_contexts.h"

namespace specfuse {

// Stands before every answer in the history.
constexpr uint32_t kSeparator = 0xFFFFFFFFu;

// The Bloom bit of a scope.
inline uint16_t scope_bit(uint64_t scope) {
  return static_cast<uint16_t>(1u << ((scope * 0x9E3779B97F4A7C15ull) >> 60));
}

// One context found in the index, or the longest match.
struct CorpusIndex::Expert {
  int kind;
  uint32_t last;  // history position of its latest occurrence
  // Filled by evaluate().
  GateInput input;
  float gate, total;
  int count;
  uint32_t tokens[kMaxSuccessors];
  float weights[kMaxSuccessors];
};

struct CorpusIndex::Gathered {
  uint32_t hashes[kContexts];
  uint32_t present = 0;  // bit k: context k exists at this point of the answer
  uint32_t found = 0;    // bit k: expert k has something to say
  ContextTable::Place places[kContexts];
  int count = 0;
  int longest_order = 0;  // of the plain contexts found
  uint32_t longest_last = 0;
  int match_length = 0;
  Expert experts[kExperts];

  void clear() {
    found = 0;
    count = longest_order = match_length = 0;
  }
  bool has(int kind) const { return found >> kind & 1; }
  void add(int kind, uint32_t last) {
    experts[count].kind = kind;
    experts[count++].last = last;
    found |= 1u << kind;
    if (kind == kMatchExpert || kContextKinds[kind].type != ContextType::kOrder) return;
    longest_order = kContextKinds[kind].order;
    longest_last = last;
  }
};

}  // namespace specfuse
