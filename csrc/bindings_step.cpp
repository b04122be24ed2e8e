// The step's host work for specfuse/passes/tree_layout.py, specfuse/passes/step_mask.py and
// specfuse/passes/kv_cache.py, which check shapes, dtypes and bounds; tensors arrive as addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "tree_layout.h"

namespace specfuse {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

TreeBatch trees(uintptr_t tokens, uintptr_t parents, uintptr_t num_nodes, int64_t B, int64_t N) {
  return {pointer<const int64_t>(tokens), pointer<const int32_t>(parents), pointer<const int32_t>(num_nodes),
          B, N};
}

bool sound(uintptr_t tokens, uintptr_t parents, uintptr_t num_nodes, int64_t B, int64_t N) {
  return sound_trees(trees(tokens, parents, num_nodes, B, N));
}

bool foreign(uintptr_t tokens, int64_t B, int64_t N, int64_t limit, const std::vector<int64_t>& refused) {
  return foreign_tokens(trees(tokens, 0, 0, B, N), limit, refused.data(), refused.size());
}

void positions(uintptr_t parents, uintptr_t num_nodes, int64_t B, int64_t N, uintptr_t roots, int64_t largest,
               uintptr_t out) {
  node_positions(trees(0, parents, num_nodes, B, N), pointer<const int64_t>(roots), largest,
                 pointer<int64_t>(out));
}

void bits(uintptr_t parents, uintptr_t num_nodes, int64_t B, int64_t N, uintptr_t out) {
  ancestor_bits(trees(0, parents, num_nodes, B, N), pointer<int64_t>(out));
}

void mask(uintptr_t parents, uintptr_t num_nodes, int64_t B, int64_t N, uintptr_t cells,
          const std::array<int64_t, 3>& buffer, const std::vector<int64_t>& done,
          const std::vector<int64_t>& start, int64_t end) {
  // A slot outside the buffer would be somebody else's memory.
  if (buffer[0] < B || buffer[1] < N || end > buffer[2] || static_cast<int64_t>(done.size()) != B ||
      static_cast<int64_t>(start.size()) != B)
    throw std::invalid_argument("the kept mask does not hold these trees");
  for (const int64_t slot : start)
    if (slot < 0 || slot + N > end)
      throw std::invalid_argument("trees must lie inside the mask, got slot " + std::to_string(slot));
  write_step_mask(trees(0, parents, num_nodes, B, N), {pointer<bool>(cells), buffer[1] * buffer[2], buffer[2],
                                                       buffer[1], done.data(), start.data(), end});
}

// Strides in elements of (B, G, slots); shape = (B, G, q, D * bytes of an element).
void rows(const std::vector<std::array<uintptr_t, 2>>& copies,
          const std::vector<std::array<int64_t, 6>>& strides, const std::array<int64_t, 4>& shape,
          const std::vector<int64_t>& start) {
  if (static_cast<int64_t>(start.size()) != shape[0])
    throw std::invalid_argument("first slots must be one per row, got " + std::to_string(start.size()));
  for (size_t i = 0; i < copies.size(); ++i) {
    const auto& step = strides[i];
    write_rows({pointer<const char>(copies[i][0]), step[0], step[1], step[2], pointer<char>(copies[i][1]),
                step[3], step[4], step[5]},
               start.data(), shape[0], shape[1], shape[2], shape[3]);
  }
}

}  // namespace
}  // namespace specfuse

void bind_step(pybind11::module_& module) {
  module.def("sound_trees", &specfuse::sound);
  module.def("foreign_tokens", &specfuse::foreign);
  module.def("node_positions", &specfuse::positions);
  module.def("ancestor_bits", &specfuse::bits);
  module.def("write_step_mask", &specfuse::mask);
  module.def("write_rows", &specfuse::rows);
}
