// Reference: TokenTree.validate, depths and ancestor_mask (specfuse/tree.py), which say the same in Python.
#include "tree_layout.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace specfuse {
namespace {

// Open addressing over (parent, token); twice as many places as nodes keeps chains short.
class Siblings {
 public:
  explicit Siblings(int64_t nodes) {
    size_t places = 16;
    while (places < static_cast<size_t>(2 * nodes)) places *= 2;
    node_.assign(places, -1);
  }

  void clear() { std::fill(node_.begin(), node_.end(), -1); }

  // False where an earlier node of the same parent holds the same token.
  bool add(const int64_t* tokens, const int32_t* parents, int32_t node) {
    const uint64_t key = static_cast<uint64_t>(tokens[node]) * 0x9E3779B97F4A7C15u +
                         static_cast<uint64_t>(parents[node]) * 0xC2B2AE3D27D4EB4Fu;
    const size_t last = node_.size() - 1;
    for (size_t at = (key >> 32) & last;; at = (at + 1) & last) {
      const int32_t other = node_[at];
      if (other < 0) {
        node_[at] = node;
        return true;
      }
      if (parents[other] == parents[node] && tokens[other] == tokens[node]) return false;
    }
  }

 private:
  std::vector<int32_t> node_;
};

// Where a node hangs: -1 for the root, padding, and a parent that TokenTree.validate would refuse.
int64_t parent_of(const TreeBatch& trees, int64_t b, int64_t node) {
  if (node == 0 || node >= trees.num_nodes[b]) return -1;
  const int32_t parent = trees.parents[b * trees.N + node];
  return parent < node ? parent : -1;
}

}  // namespace

bool sound_trees(const TreeBatch& trees) {
  Siblings siblings(trees.N);
  for (int64_t b = 0; b < trees.B; ++b) {
    const int64_t* tokens = trees.tokens + b * trees.N;
    const int32_t* parents = trees.parents + b * trees.N;
    const int32_t count = trees.num_nodes[b];
    if (count < 0 || count > trees.N || (count > 0 && parents[0] != -1)) return false;
    if (count < 2) continue;
    siblings.clear();
    for (int32_t node = 1; node < count; ++node) {
      if (parents[node] < 0 || parents[node] >= node) return false;
      if (!siblings.add(tokens, parents, node)) return false;
    }
  }
  return true;
}

bool foreign_tokens(const TreeBatch& trees, int64_t limit, const int64_t* refused, int64_t num_refused) {
  for (int64_t b = 0; b < trees.B; ++b) {
    for (int64_t node = 1; node < trees.N; ++node) {
      const int64_t token = trees.tokens[b * trees.N + node];
      if (token < 0 || token >= limit) return true;
      if (std::find(refused, refused + num_refused, token) != refused + num_refused) return true;
    }
  }
  return false;
}

void node_positions(const TreeBatch& trees, const int64_t* roots, int64_t largest, int64_t* positions) {
  std::vector<int64_t> depths(trees.N);
  for (int64_t b = 0; b < trees.B; ++b) {
    for (int64_t node = 0; node < trees.N; ++node) {
      const int64_t parent = parent_of(trees, b, node);
      depths[node] = parent < 0 ? 0 : depths[parent] + 1;
      positions[b * trees.N + node] = std::min(roots[b] + depths[node], largest);
    }
  }
}

void ancestor_bits(const TreeBatch& trees, int64_t* bits) {
  for (int64_t b = 0; b < trees.B; ++b) {
    int64_t* row = bits + b * trees.N;
    for (int64_t node = 0; node < trees.N; ++node) {
      const int64_t parent = parent_of(trees, b, node);
      const uint64_t above = parent < 0 ? 0 : static_cast<uint64_t>(row[parent]);
      row[node] = static_cast<int64_t>(above | uint64_t{1} << node);
    }
  }
}

void write_step_mask(const TreeBatch& trees, const StepMask& mask) {
  for (int64_t b = 0; b < trees.B; ++b) {
    const int64_t start = mask.start[b], done = std::min(mask.done[b], start);
    bool* row = mask.cells + b * mask.stride_row;
    for (int64_t node = 0; node < mask.nodes; ++node) {
      bool* cells = row + node * mask.stride_node;
      std::memset(cells + done, 1, start - done);
      std::memset(cells + start, 0, mask.end - start);
      if (node >= trees.N) continue;
      const int64_t parent = parent_of(trees, b, node);
      if (parent >= 0) std::memcpy(cells + start, row + parent * mask.stride_node + start, node);
      cells[start + node] = true;
    }
  }
}

void write_rows(const NewRows& rows, const int64_t* start, int64_t B, int64_t G, int64_t q,
                int64_t row_bytes) {
  const bool dense = rows.source_s == row_bytes && rows.target_s == row_bytes;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t g = 0; g < G; ++g) {
      const char* source = rows.source + b * rows.source_b + g * rows.source_g;
      char* target = rows.target + b * rows.target_b + g * rows.target_g + start[b] * rows.target_s;
      if (dense) {
        std::memcpy(target, source, q * row_bytes);
        continue;
      }
      for (int64_t s = 0; s < q; ++s)
        std::memcpy(target + s * rows.target_s, source + s * rows.source_s, row_bytes);
    }
  }
}

}  // namespace specfuse
