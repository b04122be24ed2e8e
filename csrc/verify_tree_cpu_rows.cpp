#include "verify_tree_cpu_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "verify_tree.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SPECFUSE_X86 1
#endif
#define SPECFUSE_INLINE static inline __attribute__((always_inline))

namespace specfuse {
namespace {

// Tokens per step of the sampling pass: 16 Philox blocks of four tokens each.
constexpr int64_t kStep = 64;
static_assert(kStep == kChunk, "a step covers one chunk");

SPECFUSE_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// exp(x) for x <= 0, relative error about 2e-7 near 0 growing to 1e-5 at -87, where it levels off; exactly 1
// at 0. 2^f on [-1/2, 1/2] is its Taylor polynomial, scaled by writing the integer part into the exponent.
SPECFUSE_INLINE float exp_nonpositive(float x) {
  const float t = std::max(x, -87.0f) * 1.44269504f;
  const float shifted = t + 12582912.0f;  // 1.5 * 2^23 rounds t to an integer in the low bits
  const float f = t - (shifted - 12582912.0f);
  float p = 1.54035304e-4f;
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  uint32_t exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &p, sizeof bits);
  return bits_to_float(bits + (exponent << 23));
}

SPECFUSE_INLINE void from_half_body(const uint16_t* in, int64_t V, float* out) {
  for (int64_t i = 0; i < V; ++i) {
    const uint32_t magnitude = static_cast<uint32_t>(in[i] & 0x7FFF) << 13;
    const uint32_t sign = static_cast<uint32_t>(in[i] & 0x8000) << 16;
    // Multiplying by 2^112 moves the exponent's bias and normalises subnormals; infinity and NaN keep all
    // ones.
    const float scaled = bits_to_float(magnitude) * 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &scaled, sizeof bits);
    bits |= (magnitude >= 0x0F800000u) ? 0x7F800000u : 0u;
    out[i] = bits_to_float(bits | sign);
  }
}

SPECFUSE_INLINE void from_bfloat16_body(const uint16_t* in, int64_t V, float* out) {
  for (int64_t i = 0; i < V; ++i) out[i] = bits_to_float(static_cast<uint32_t>(in[i]) << 16);
}

SPECFUSE_INLINE bool chunk_maxima_body(const float* x, int64_t V, float* maxima) {
  constexpr int kLanes = 16;
  int32_t nan[kLanes] = {};
  int64_t base = 0;
  for (; base + kChunk <= V; base += kChunk) {
    float best[kLanes];
    for (int j = 0; j < kLanes; ++j) best[j] = -std::numeric_limits<float>::infinity();
    for (int64_t i = base; i < base + kChunk; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) {
        const float value = x[i + j];
        best[j] = value > best[j] ? value : best[j];
        nan[j] |= value != value;
      }
    }
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int j = 0; j < width; ++j) best[j] = best[j + width] > best[j] ? best[j + width] : best[j];
    }
    maxima[base / kChunk] = best[0];
  }
  bool found = false;
  if (base < V) {
    float best = -std::numeric_limits<float>::infinity();
    for (int64_t i = base; i < V; ++i) {
      best = x[i] > best ? x[i] : best;
      found |= x[i] != x[i];
    }
    maxima[base / kChunk] = best;
  }
  for (int j = 0; j < kLanes; ++j) found |= nan[j] != 0;
  return found;
}

SPECFUSE_INLINE bool inside(float value, int64_t id, Cut cut) {
  return value > cut.value || (value == cut.value && id <= cut.last_id);
}

// Weights of up to one step of tokens, 0 outside the cut; returns their sum.
SPECFUSE_INLINE double step_weights(const float* x, int64_t base, int64_t count, float max,
                                    float inverse_temperature, Cut cut, float* weights) {
  const int32_t last = static_cast<int32_t>(std::clamp<int64_t>(cut.last_id - base, -1, kStep));
  float sums[8] = {};
  if (count == kStep) {
    for (int i = 0; i < kStep; i += 8) {
      for (int j = 0; j < 8; ++j) {
        const float value = x[base + i + j];
        const int keep = (value > cut.value) | ((value == cut.value) & (i + j <= last));
        const float weight = keep ? exp_nonpositive((value - max) * inverse_temperature) : 0.0f;
        weights[i + j] = weight;
        sums[j] += weight;
      }
    }
  } else {
    for (int i = 0; i < count; ++i) {
      const float value = x[base + i];
      weights[i] = inside(value, base + i, cut) ? exp_nonpositive((value - max) * inverse_temperature) : 0.0f;
      sums[0] += weights[i];
    }
  }
  double sum = 0.0;
  for (int j = 0; j < 8; ++j) sum += sums[j];
  return sum;
}

SPECFUSE_INLINE double exp_mass_body(const float* x, int64_t V, float max, float inverse_temperature,
                                     Cut cut) {
  float weights[kStep];
  double mass = 0.0;
  for (int64_t base = 0; base < V; base += kStep) {
    mass += step_weights(x, base, std::min(kStep, V - base), max, inverse_temperature, cut, weights);
  }
  return mass;
}

// The 24-bit uniforms of kStep consecutive tokens, the first a multiple of kStep.
SPECFUSE_INLINE void step_noise(int64_t base, int64_t seed, int64_t position, uint32_t* words) {
  constexpr int kBlocks = kStep / 4;
  uint32_t c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks];
  for (int j = 0; j < kBlocks; ++j) {
    c0[j] = static_cast<uint32_t>(base / 4 + j);
    c1[j] = static_cast<uint32_t>(position);
    c2[j] = static_cast<uint32_t>(position >> 32);
    c3[j] = 0;
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int j = 0; j < kBlocks; ++j) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c0[j], p1 = uint64_t{0xCD9E8D57u} * c2[j];
      c0[j] = static_cast<uint32_t>(p1 >> 32) ^ c1[j] ^ key0;
      c1[j] = static_cast<uint32_t>(p1);
      c2[j] = static_cast<uint32_t>(p0 >> 32) ^ c3[j] ^ key1;
      c3[j] = static_cast<uint32_t>(p0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int j = 0; j < kBlocks; ++j) {
    words[4 * j] = c0[j];
    words[4 * j + 1] = c1[j];
    words[4 * j + 2] = c2[j];
    words[4 * j + 3] = c3[j];
  }
}

SPECFUSE_INLINE Sample sample_body(const float* x, int64_t V, const SampleQuery& q) {
  const float inverse_temperature =
      static_cast<float>(std::min<double>(1.0 / q.temperature, std::numeric_limits<float>::max()));
  const double top_score = q.max / q.temperature + gumbel_double(noise_word(q.seed, q.position, q.top));
  Sample best{q.top, 0.0};
  double best_score = top_score, mass = 0.0;
  // A token wins only if -log(u) < exp(z - best). As 1 - u <= -log(u), the test 1 - u <= weight * scale with
  // scale = exp(max / T - best) lets every winner through; 1.0001 covers the weights' rounding.
  const auto scale_of = [&](double score) {
    return static_cast<float>(1.0001 * std::exp(q.max / q.temperature - score));
  };
  float scale = scale_of(best_score);
  float weights[kStep];
  uint32_t words[kStep];
  for (int64_t base = 0; base < V; base += kStep) {
    const int64_t count = std::min(kStep, V - base);
    const double sum = step_weights(x, base, count, q.max, inverse_temperature, q.cut, weights);
    mass += sum;
    // 1 - u is at least 2^-24: a step of smaller weights holds no winner and needs no noise.
    if (sum * scale < 0x1p-24) continue;
    step_noise(base, q.seed, q.position, words);
    for (int64_t i = count; i < kStep; ++i) weights[i] = 0.0f;
    int32_t candidates = 0;
    for (int i = 0; i < kStep; ++i) {
      const float rest = 1.0f - static_cast<float>(static_cast<int32_t>(words[i] >> 8)) * 0x1p-24f;
      candidates += rest <= weights[i] * scale;
    }
    if (candidates == 0) continue;
    for (int64_t i = 0; i < count; ++i) {
      const float rest = 1.0f - static_cast<float>(static_cast<int32_t>(words[i] >> 8)) * 0x1p-24f;
      if (rest > weights[i] * scale) continue;
      const double score = x[base + i] / q.temperature + gumbel_double(words[i]);
      if (score > best_score || (score == best_score && base + i < best.token)) {
        best_score = score;
        best.token = base + i;
        scale = scale_of(score);
      }
    }
  }
  best.log_mass = std::log(mass);
  return best;
}

#define SPECFUSE_ROW_PASSES(suffix, attributes)                                                          \
  attributes void from_half_##suffix(const uint16_t* in, int64_t V, float* out) {                        \
    from_half_body(in, V, out);                                                                          \
  }                                                                                                      \
  attributes void from_bfloat16_##suffix(const uint16_t* in, int64_t V, float* out) {                    \
    from_bfloat16_body(in, V, out);                                                                      \
  }                                                                                                      \
  attributes bool chunk_maxima_##suffix(const float* x, int64_t V, float* maxima) {                      \
    return chunk_maxima_body(x, V, maxima);                                                              \
  }                                                                                                      \
  attributes double exp_mass_##suffix(const float* x, int64_t V, float max, float inverse_temperature,   \
                                      Cut cut) {                                                         \
    return exp_mass_body(x, V, max, inverse_temperature, cut);                                           \
  }                                                                                                      \
  attributes Sample sample_##suffix(const float* x, int64_t V, const SampleQuery& query) {               \
    return sample_body(x, V, query);                                                                     \
  }                                                                                                      \
  constexpr RowPasses passes_##suffix{from_half_##suffix, from_bfloat16_##suffix, chunk_maxima_##suffix, \
                                      exp_mass_##suffix, sample_##suffix};

SPECFUSE_ROW_PASSES(baseline, )
#ifdef SPECFUSE_X86
SPECFUSE_ROW_PASSES(avx2, __attribute__((target("avx2,fma"))))
#endif

}  // namespace

const RowPasses& row_passes() {
#ifdef SPECFUSE_X86
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) return passes_avx2;
#endif
  return passes_baseline;
}

}  // namespace specfuse
