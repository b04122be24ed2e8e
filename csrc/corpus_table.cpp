#include "corpus_table.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace specfuse {
namespace {

constexpr size_t kFirstSize = 1024;
// Decay per occurrence of the context, in 1/65536: about the last 20 occurrences count.
constexpr uint32_t kDecay = 62259;  // 0.95

uint16_t decayed(uint16_t weight) {
  return static_cast<uint16_t>((weight * kDecay) >> 16);
}

// Weight of a successor that followed its context `occurrences` times without exception.
std::array<uint16_t, 256> repeated_weights() {
  std::array<uint16_t, 256> weights{};
  for (size_t i = 1; i < weights.size(); ++i)
    weights[i] = static_cast<uint16_t>(decayed(weights[i - 1]) + kWeightOne);
  return weights;
}
const std::array<uint16_t, 256> kRepeatedWeight = repeated_weights();

int log2_capacity(int count) {
  int log2 = 1;
  while ((1 << log2) < count) ++log2;
  return log2;
}

}  // namespace

ContextTable::ContextTable() : slots_(kFirstSize) {}

void ContextTable::clear() {
  slots_.assign(kFirstSize, ContextSlot{});
  slots_.shrink_to_fit();
  pool_ = {};
  for (auto& list : free_lists_) list = {};
  used_ = 0;
}

ContextTable::Place ContextTable::find(uint32_t hash, uint32_t oldest) const {
  size_t reusable = slots_.size();
  for (size_t i = home(hash);; i = i + 1 == slots_.size() ? 0 : i + 1) {
    const ContextSlot& slot = slots_[i];
    if (slot.count == 0) return {reusable < slots_.size() ? reusable : i, false};
    if (slot.last < oldest) {
      if (reusable == slots_.size()) reusable = i;
    } else if (slot.hash == hash) {
      return {i, true};
    }
  }
}

SuccessorView ContextTable::view(size_t index, Successor* single) const {
  const ContextSlot& slot = slots_[index];
  if (slot.count == 1) {
    *single = {slot.payload, slot.last, kRepeatedWeight[slot.extra], slot.scopes};
    return {single, 1, slot.last, slot.scopes};
  }
  return {&pool_[slot.payload], slot.count, slot.last, slot.scopes};
}

uint32_t ContextTable::allocate(int log2) {
  auto& free = free_lists_[log2];
  if (!free.empty()) {
    const uint32_t index = free.back();
    free.pop_back();
    return index;
  }
  const size_t index = pool_.size();
  const size_t needed = index + (size_t{1} << log2);
  // Growth by a quarter instead of a half: the bound on bytes per token covers the slack too.
  if (needed > pool_.capacity()) pool_.reserve(std::max(needed, index + index / 4 + 64));
  pool_.resize(needed);
  return static_cast<uint32_t>(index);
}

void ContextTable::release(ContextSlot* slot) {
  if (slot->count > 1) free_lists_[slot->extra].push_back(slot->payload);
}

void ContextTable::reserve(size_t count, uint32_t oldest) {
  if ((used_ + count) * 4 <= slots_.size() * 3) return;
  size_t live = count;
  for (const ContextSlot& slot : slots_) live += slot.count != 0 && slot.last >= oldest;
  // Grown by a third (load 0.75 -> 0.56) unless dropping the dead is enough.
  rehash(std::max(slots_.size(), live * 16 / 9 + 64), oldest);
}

void ContextTable::rehash(size_t size, uint32_t oldest) {
  std::vector<ContextSlot> slots(size);
  slots.swap(slots_);
  std::vector<Successor> pool;
  pool.swap(pool_);
  size_t live_successors = 0;
  for (const ContextSlot& slot : slots)
    if (slot.count > 1 && slot.last >= oldest) live_successors += size_t{1} << slot.extra;
  pool_.reserve(live_successors + live_successors / 8);
  for (auto& list : free_lists_) list.clear();
  used_ = 0;
  for (const ContextSlot& slot : slots)
    if (slot.count != 0 && slot.last >= oldest) move_live(slot, pool, oldest);
}

void ContextTable::move_live(const ContextSlot& slot, const std::vector<Successor>& pool, uint32_t oldest) {
  ContextSlot& moved = slots_[find(slot.hash, 0).index];
  moved = slot;
  ++used_;
  if (slot.count == 1) return;
  Successor live[kMaxSuccessors];
  int count = 0;
  for (int i = 0; i < slot.count; ++i)
    if (pool[slot.payload + i].last >= oldest) live[count++] = pool[slot.payload + i];
  moved.count = static_cast<uint8_t>(count);
  if (count == 1) {
    moved.payload = live[0].token;
    const auto* occurrences =
        std::lower_bound(kRepeatedWeight.begin() + 1, kRepeatedWeight.end() - 1, live[0].weight);
    moved.extra = static_cast<uint8_t>(occurrences - kRepeatedWeight.begin());
    return;
  }
  moved.extra = static_cast<uint8_t>(log2_capacity(count));
  moved.payload = allocate(moved.extra);
  std::copy(live, live + count, &pool_[moved.payload]);
}

void ContextTable::add(uint32_t hash, Place place, const Successor& added, int most, uint32_t oldest) {
  // A context added since `place` was found may have taken its slot.
  if (!place.found && slots_[place.index].count != 0 && slots_[place.index].last >= oldest)
    place = find(hash, oldest);
  ContextSlot& slot = slots_[place.index];
  if (!place.found) {
    used_ += slot.count == 0;
    release(&slot);
    slot = {hash, added.last, added.token, added.scopes, 1, 1};
    return;
  }
  if (slot.count > 1) {
    add_to_list(&slot, added, most, oldest);
  } else if (slot.payload == added.token) {
    slot.extra += slot.extra < 255;
  } else {
    const Successor before = {slot.payload, slot.last, decayed(kRepeatedWeight[slot.extra]), slot.scopes};
    slot.payload = allocate(1);
    slot.extra = 1;
    slot.count = 2;
    pool_[slot.payload] = before;
    pool_[slot.payload + 1] = added;
    if (before.weight < kWeightOne) std::swap(pool_[slot.payload], pool_[slot.payload + 1]);
  }
  slot.last = added.last;
  slot.scopes |= added.scopes;
}

void ContextTable::add_to_list(ContextSlot* slot, Successor added, int most, uint32_t oldest) {
  Successor* items = &pool_[slot->payload];
  int at = -1;
  for (int i = 0; i < slot->count; ++i) {
    items[i].weight = decayed(items[i].weight);
    at = items[i].token == added.token ? i : at;
  }
  if (at >= 0) {
    if (items[at].last >= oldest) {
      added.weight = static_cast<uint16_t>(added.weight + items[at].weight);
      added.scopes |= items[at].scopes;
    }
  } else if (slot->count < most) {
    items = grown(slot);
    at = slot->count++;
  } else {
    at = slot->count - 1;  // the lightest makes room
  }
  // Heaviest first; of equals, the latest.
  for (; at + 1 < slot->count && items[at + 1].weight > added.weight; ++at) items[at] = items[at + 1];
  for (; at > 0 && items[at - 1].weight <= added.weight; --at) items[at] = items[at - 1];
  items[at] = added;
}

Successor* ContextTable::grown(ContextSlot* slot) {
  if (slot->count < (1 << slot->extra)) return &pool_[slot->payload];
  const uint32_t list = allocate(slot->extra + 1);
  std::copy_n(&pool_[slot->payload], slot->count, &pool_[list]);
  release(slot);
  slot->payload = list;
  ++slot->extra;
  return &pool_[list];
}

}  // namespace specfuse
