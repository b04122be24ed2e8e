// Which contexts of an answer predict its next token, from the least to the most specific.
#pragma once

#include <cstdint>

#include "corpus_index.h"

namespace specfuse {

enum class ContextType : uint8_t {
  kOrder,     // the last `order` tokens
  kPlace,     // the last `order` tokens, the place in the answer and the question
  kCopy,      // the last `order` tokens and what followed the last token earlier in this answer
  kEvidence,  // the last `order` tokens and another model's answer
};

struct ContextKind {
  ContextType type;
  int order;
  int parent;      // a context is kept only if this one was seen before: a chance sequence costs few contexts
  int successors;  // at most so many are remembered; specific contexts have few that matter
};

constexpr ContextKind kContextKinds[] = {
    {ContextType::kOrder, 0, -1, 32},   {ContextType::kOrder, 1, -1, 24},   {ContextType::kPlace, 1, 1, 16},
    {ContextType::kEvidence, 1, 1, 12}, {ContextType::kOrder, 2, -1, 16},   {ContextType::kPlace, 2, 4, 12},
    {ContextType::kCopy, 2, 4, 12},     {ContextType::kEvidence, 2, 4, 12}, {ContextType::kOrder, 3, 4, 12},
    {ContextType::kOrder, 4, 8, 12},    {ContextType::kOrder, 6, 9, 12},    {ContextType::kOrder, 10, 10, 12},
    {ContextType::kOrder, 20, 11, 8},
};
constexpr int kContexts = sizeof(kContextKinds) / sizeof(kContextKinds[0]);
constexpr int kMatchExpert = kContexts;  // the longest match is an expert without a context of its own
constexpr int kExperts = kContexts + 1;
constexpr int kMaxOrder = 20;
constexpr int kMaxMatch = 40;
// How far back the copy context looks for the last token.
constexpr int kCopyReach = 256;

// Writes the hash of every context and returns a bit mask of those that exist here.
uint32_t context_hashes(const AnswerWindow& window, uint32_t* hashes);

}  // namespace specfuse
