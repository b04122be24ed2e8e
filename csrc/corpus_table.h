// The store behind CorpusIndex: context hash -> the tokens that followed it, with recency-decayed weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace specfuse {

// One token that followed a context.
struct Successor {
  uint32_t token;
  uint32_t last;    // history position of its latest occurrence
  uint16_t weight;  // occurrences, decayed once per occurrence of the context, in units of 1 / kWeightOne
  uint16_t scopes;  // Bloom bits of the scopes it occurred in
};

constexpr int kWeightOne = 1024;
constexpr int kMaxSuccessors = 32;

// A context. Most contexts have a single successor: it is kept in the slot itself, without a list.
struct ContextSlot {
  uint32_t hash;     // of the context; two contexts that share all 32 bits share their statistics
  uint32_t last;     // history position of its latest occurrence
  uint32_t payload;  // the only successor's token, or the index of the list in the pool
  uint16_t scopes;   // Bloom bits of the scopes it occurred in
  uint8_t count;     // successors; 0 marks an empty slot
  uint8_t extra;     // one successor: its occurrences (saturating); a list: log2 of its capacity
};
static_assert(sizeof(Successor) == 12 && sizeof(ContextSlot) == 16, "memory per token is a promise");

// The successors of one context, heaviest first.
struct SuccessorView {
  const Successor* items = nullptr;
  int count = 0;
  uint32_t last = 0;
  uint16_t scopes = 0;
};

// Open addressing with linear probing. What was seen before `oldest` is dead: it reads as absent and its room
// is reused, so evicting an answer costs nothing until the next rehash.
class ContextTable {
 public:
  ContextTable();

  // Where `hash` is, or where it would go. Valid until the next reserve().
  struct Place {
    size_t index;
    bool found;
  };
  Place find(uint32_t hash, uint32_t oldest) const;
  void prefetch(uint32_t hash) const { __builtin_prefetch(&slots_[home(hash)]); }

  // Asks for the successors of a found place, to be there when view() or add() needs them.
  void prefetch_list(size_t index) const {
    const ContextSlot& slot = slots_[index];
    if (slot.count < 2) return;
    const char* list = reinterpret_cast<const char*>(&pool_[slot.payload]);
    const size_t bytes = slot.count * sizeof(Successor);
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(list + line);
  }

  // Reads a found place; `single` holds the successor of a context without a list.
  SuccessorView view(size_t index, Successor* single) const;
  const ContextSlot& slot(size_t index) const { return slots_[index]; }

  // Makes room for `count` new contexts; dead ones are dropped on the way.
  void reserve(size_t count, uint32_t oldest);
  // Counts one more occurrence of the context, followed by `added` (of weight kWeightOne). A place that is
  // not found is created. Of more than `most` successors the lightest go.
  void add(uint32_t hash, Place place, const Successor& added, int most, uint32_t oldest);

  void clear();
  size_t bytes() const {
    return slots_.capacity() * sizeof(ContextSlot) + pool_.capacity() * sizeof(Successor);
  }
  size_t used() const { return used_; }

 private:
  size_t home(uint32_t hash) const { return (uint64_t{hash} * slots_.size()) >> 32; }
  uint32_t allocate(int log2);
  void release(ContextSlot* slot);
  void rehash(size_t size, uint32_t oldest);
  void move_live(const ContextSlot& slot, const std::vector<Successor>& pool, uint32_t oldest);
  void add_to_list(ContextSlot* slot, Successor added, int most, uint32_t oldest);
  Successor* grown(ContextSlot* slot);

  std::vector<ContextSlot> slots_;
  std::vector<Successor> pool_;
  std::vector<uint32_t> free_lists_[6];  // by log2 of the capacity
  size_t used_ = 0;                      // slots that are not empty, dead ones included
};

}  // namespace specfuse
