// The passes over one row of logits that verify_tree needs on the CPU, written so that the compiler
// vectorises them.
#pragma once

#include <cstdint>

#include "verify_tree.h"

namespace specfuse {

// Tokens per chunk: row maxima are kept per chunk, so that filters look only where a large value can be.
constexpr int64_t kChunk = 64;

// Bins of the mass histogram, from the largest logit down; the last one also takes what lies beyond.
constexpr int kMassBins = 1024;

inline int mass_bin(float value, float max, float bins_per_unit) {
  const float bin = (max - value) * bins_per_unit;
  return bin < static_cast<float>(kMassBins - 1) ? static_cast<int>(bin) : kMassBins - 1;
}

// Tokens that a filter keeps: those above `value`, and of those equal to it the ids up to `last_id`.
// Every filter (top-k, top-p, min-p) keeps a prefix of the order (value descending, id ascending).
struct Cut {
  float value;
  int64_t last_id;
};

struct SampleQuery {
  float max;           // largest logit of the row, finite
  double temperature;  // > 0
  Cut cut;
  int64_t seed, position;  // of the noise
  int64_t top;  // id of the largest logit: evaluated first, so that most others need no exact noise
};

struct Sample {
  int64_t token;
  double log_mass;  // log of the kept tokens' sum of exp((x - max) / temperature)
};

// The instruction set is chosen once, at the first call: AVX-512, AVX2 or the baseline, whatever the
// processor has; SPECFUSE_CPU_ISA=avx2 or =baseline in the environment asks for a lesser one. Results agree
// in every discrete output.
struct RowPasses {
  // Converts V fp16 or bf16 values to float.
  void (*from_half)(const uint16_t* in, int64_t V, float* out);
  void (*from_bfloat16)(const uint16_t* in, int64_t V, float* out);
  // Writes the maximum of each chunk; returns whether the row holds a NaN.
  bool (*chunk_maxima)(const float* x, int64_t V, float* maxima);
  // Sum of exp((x - max) * inverse_temperature) over tokens inside the cut.
  double (*exp_mass)(const float* x, int64_t V, float max, float inverse_temperature, Cut cut);
  // Writes exp((x - max) / temperature), good to 1e-15, or 0 outside the cut; returns the sum.
  double (*weights)(const float* x, int64_t V, float max, double temperature, Cut cut, double* out);
  // Adds each token's exp((x - max) / temperature), good to 1e-15, to its bin.
  void (*mass_histogram)(const float* x, int64_t V, float max, double temperature, float bins_per_unit,
                         double* bins);
  // Gumbel-argmax over the tokens inside the cut, exact in double; ties go to the lowest id.
  Sample (*sample)(const float* x, int64_t V, const SampleQuery& query);
  // Words of the kChunk tokens from `base` on, a multiple of kChunk.
  void (*noise)(int64_t base, int64_t seed, int64_t position, NoiseStream stream, uint32_t* words);
};

const RowPasses& row_passes();

}  // namespace specfuse
