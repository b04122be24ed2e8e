// Python module specfuse._C_cpu. Tensors arrive as addresses: shapes, dtypes and strides are checked by the
// callers in specfuse/ops, values by the functions called here (std::invalid_argument becomes ValueError).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>
#include <vector>

#include "bindings_arguments.h"
#include "verify_tree_cpu_noise.h"

void bind_compact_kv_table(pybind11::module_& module);
void bind_corpus_index(pybind11::module_& module);
void bind_step(pybind11::module_& module);

using namespace specfuse::bindings;

namespace {

template <typename Error>
void raise_on(const Error& error) {
  if (!error.message) return;
  std::ostringstream text;
  text << error.message << ", got " << error.value << " in row " << error.row;
  throw std::invalid_argument(text.str());
}

void verify_tree(uintptr_t logits, int dtype, const std::array<int64_t, 3>& shape,
                 const std::array<int64_t, 3>& strides, const std::array<uintptr_t, 9>& inputs,
                 const std::array<uintptr_t, 4>& outputs, int threads) {
  const auto params = verify_tree_params(logits, dtype, shape, strides, inputs, outputs);
  specfuse::ArgumentError error;
  {
    pybind11::gil_scoped_release release;
    error = specfuse::verify_tree_cpu(params, threads);
  }
  raise_on(error);
}

void verify_tree_rejection(uintptr_t logits, int dtype, const std::array<int64_t, 3>& shape,
                           const std::array<int64_t, 3>& strides, const std::array<uintptr_t, 9>& inputs,
                           const std::array<uintptr_t, 4>& outputs, uintptr_t draft_probs, int draft_dtype,
                           int64_t W, const std::array<int64_t, 3>& draft_strides, uintptr_t draft_ids,
                           bool sparse, bool with_replacement, int threads) {
  const auto tree = verify_tree_params(logits, dtype, shape, strides, inputs, outputs);
  const auto params = verify_tree_rejection_params(tree, draft_probs, draft_dtype, W, draft_strides,
                                                   draft_ids, sparse, with_replacement);
  specfuse::ArgumentError error;
  {
    pybind11::gil_scoped_release release;
    error = specfuse::verify_tree_rejection_cpu(params, threads);
  }
  raise_on(error);
}

void compact_kv(const pybind11::bytes& tensors, int64_t B, int64_t K, uintptr_t path, uintptr_t length,
                uintptr_t start) {
  const auto params = compact_kv_params(B, K, path, length, start);
  const auto table = kv_tensors(tensors);
  specfuse::CompactKvError error;
  {
    pybind11::gil_scoped_release release;
    error = specfuse::compact_kv_cpu(params, table.data(), static_cast<int64_t>(table.size()));
  }
  raise_on(error);
}

// The random word of one token, for tests of the noise.
uint32_t noise_word(int64_t seed, int64_t position, int64_t token, uint32_t stream) {
  return specfuse::noise_word(seed, position, token, static_cast<specfuse::NoiseStream>(stream));
}

// The words of tokens 0 .. count - 1 as the row passes draw them; count is a multiple of their step.
std::vector<uint32_t> noise_words(int64_t seed, int64_t position, int64_t count, bool portable) {
  if (count % specfuse::kNoiseStep != 0) throw std::invalid_argument("count must be a multiple of 64");
  auto* step = &specfuse::step_noise_baseline;
#ifdef SPECFUSE_X86
  if (!portable && __builtin_cpu_supports("avx2")) step = &specfuse::step_noise_avx2;
#else
  static_cast<void>(portable);
#endif
  std::vector<uint32_t> words(count);
  for (int64_t base = 0; base < count; base += specfuse::kNoiseStep)
    step(base, seed, position, specfuse::NoiseStream::kTarget, words.data() + base);
  return words;
}

}  // namespace

PYBIND11_MODULE(_C_cpu, module) {
  module.def("verify_tree", &verify_tree);
  module.def("verify_tree_rejection", &verify_tree_rejection);
  module.def("compact_kv", &compact_kv);
  module.def("noise_word", &noise_word, pybind11::arg("seed"), pybind11::arg("position"),
             pybind11::arg("token"), pybind11::arg("stream") = 0);
  module.def("noise_words", &noise_words);
  bind_compact_kv_table(module);
  bind_corpus_index(module);
  bind_step(module);
}
