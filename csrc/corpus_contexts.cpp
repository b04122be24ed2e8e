#include "corpus_contexts.h"

#include <algorithm>

namespace specfuse {
namespace {

constexpr uint64_t kStart = 0xFFFFFFFFull;  // stands before the first token of an answer

constexpr uint64_t kFactor = 0xFF51AFD7ED558CCDull;

uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ (value + 1)) * kFactor;
  return hash ^ (hash >> 32);
}

uint32_t finish(uint64_t hash, int kind) {
  return static_cast<uint32_t>(mix(hash, static_cast<uint64_t>(kind) << 40) >> 16);
}

// Places are told apart finely at the start of an answer and in octaves later.
uint64_t place(int64_t position, int width) {
  if (position < 48) return static_cast<uint64_t>(position / width);
  return 64 - static_cast<uint64_t>(__builtin_clzll(static_cast<uint64_t>(position)));
}

// The token that followed the latest earlier occurrence of the last token, or -1.
int64_t copied(const AnswerWindow& window) {
  const int last = window.count - 1;
  for (int i = last - 1; i >= std::max(0, last - kCopyReach); --i)
    if (window.tokens[i] == window.tokens[last]) return window.tokens[i + 1];
  return -1;
}

}  // namespace

uint32_t context_hashes(const AnswerWindow& window, uint32_t* hashes) {
  const int64_t position = window.skipped + window.count;
  // prefix[k]: the last k tokens as a polynomial; the start of the answer counts as one token before the
  // first.
  uint64_t prefix[kMaxOrder + 1] = {0x9E3779B97F4A7C15ull};
  int longest = 0;
  while (longest < kMaxOrder && longest <= window.count) {
    const bool start = longest == window.count;
    if (start && window.skipped > 0) break;
    const uint64_t token = start ? kStart : static_cast<uint32_t>(window.tokens[window.count - 1 - longest]);
    prefix[longest + 1] = (prefix[longest] + token + 1) * kFactor;
    ++longest;
  }
  const int64_t copy = window.count >= 2 ? copied(window) : -1;
  uint32_t present = 0;
  for (int k = 0; k < kContexts; ++k) {
    const ContextKind& kind = kContextKinds[k];
    const int order = kind.type == ContextType::kOrder ? kind.order : std::min(kind.order, longest);
    if (order > longest) continue;
    uint64_t hash = prefix[order];
    switch (kind.type) {
      case ContextType::kOrder:
        break;
      case ContextType::kPlace:
        hash = mix(mix(hash, place(position, kind.order == 1 ? 6 : 4)), window.scope);
        break;
      case ContextType::kCopy:
        if (copy < 0) continue;
        hash = mix(hash, static_cast<uint64_t>(copy));
        break;
      case ContextType::kEvidence:
        if (window.evidence == 0) continue;
        hash = mix(hash, window.evidence);
        break;
    }
    hashes[k] = finish(hash, k);
    present |= 1u << k;
  }
  return present;
}

}  // namespace specfuse
