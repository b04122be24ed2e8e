// Python module specfuse._C_cpu. Tensors arrive as addresses: shapes, dtypes and strides are checked by the
// callers in specfuse/ops, values by the functions called here (std::invalid_argument becomes ValueError).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>
#include <vector>

#include "bindings_arguments.h"
#include "verify_tree_cpu_noise.h"

void bind_corpus_index(pybind11::module_& module);

using namespace specfuse::bindings;

namespace {

void verify_tree(uintptr_t logits, int dtype, const std::array<int64_t, 3>& shape,
                 const std::array<int64_t, 3>& strides, const std::array<uintptr_t, 9>& inputs,
                 const std::array<uintptr_t, 4>& outputs, int threads) {
  const auto params = verify_tree_params(logits, dtype, shape, strides, inputs, outputs);
  specfuse::ArgumentError error;
  {
    pybind11::gil_scoped_release release;
    error = specfuse::verify_tree_cpu(params, threads);
  }
  if (error.message) {
    std::ostringstream text;
    text << error.message << ", got " << error.value << " in row " << error.row;
    throw std::invalid_argument(text.str());
  }
}

void compact_kv(const std::vector<KvTuple>& tensors, int64_t B, int64_t K, uintptr_t path, uintptr_t length,
                uintptr_t start) {
  const auto params = compact_kv_params(B, K, path, length, start);
  const auto table = kv_tensors(tensors);
  const char* error;
  {
    pybind11::gil_scoped_release release;
    error = specfuse::compact_kv_cpu(params, table.data(), static_cast<int64_t>(table.size()));
  }
  if (error) throw std::invalid_argument(error);
}

// The random word of one token, for tests of the noise.
uint32_t noise_word(int64_t seed, int64_t position, int64_t token) {
  return specfuse::noise_word(seed, position, token);
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
    step(base, seed, position, words.data() + base);
  return words;
}

}  // namespace

PYBIND11_MODULE(_C_cpu, module) {
  module.def("verify_tree", &verify_tree);
  module.def("compact_kv", &compact_kv);
  module.def("noise_word", &noise_word);
  module.def("noise_words", &noise_words);
  bind_corpus_index(module);
}
