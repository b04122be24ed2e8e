#include "verify_tree_cpu_rows.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "verify_tree.h"
#include "verify_tree_cpu_noise.h"

// Vectors never cross a call that is not inlined, so the ABI notes about them are moot.
#pragma GCC diagnostic ignored "-Wpsabi"

#define SPECFUSE_INLINE static inline __attribute__((always_inline))

namespace specfuse {
namespace {

constexpr int64_t kStep = kNoiseStep;
static_assert(kStep == kChunk, "a step covers one chunk");

// Vector types of the compiler, because it does not vectorise comparisons of floats on its own unless told
// that they cannot trap. Eight lanes are one AVX register, or two SSE or NEON ones.
constexpr int kLanes = 8;
template <int kWidth>
struct Lanes {
  typedef float Floats __attribute__((vector_size(4 * kWidth)));
  typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
  typedef double Doubles __attribute__((vector_size(8 * kWidth)));
};
typedef Lanes<kLanes>::Floats Floats;
typedef Lanes<kLanes>::Ints Ints;
typedef double Doubles __attribute__((vector_size(32)));
typedef int64_t Longs __attribute__((vector_size(32)));

template <typename Vector = Floats>
SPECFUSE_INLINE Vector load(const float* x) {
  Vector values;
  std::memcpy(&values, x, sizeof values);
  return values;
}

// exp(x) for x <= 0, relative error about 2e-7 near 0 growing to 1e-5 at -87, where it levels off; exactly 1
// at 0. 2^f on [-1/2, 1/2] is its Taylor polynomial, scaled by writing the integer part into the exponent.
template <int kWidth = kLanes>
SPECFUSE_INLINE typename Lanes<kWidth>::Floats exp_nonpositive(const typename Lanes<kWidth>::Floats& x) {
  typedef typename Lanes<kWidth>::Floats Floats;
  typedef typename Lanes<kWidth>::Ints Ints;
  const Floats lowest = Floats{} - 87.0f;
  const Floats t = (x > -87.0f ? x : lowest) * 1.44269504f;
  const Floats shifted = t + 12582912.0f;  // 1.5 * 2^23 rounds t to an integer in the low bits
  const Floats f = t - (shifted - 12582912.0f);
  Floats p = 1.54035304e-4f * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(p) + (reinterpret_cast<Ints>(shifted) << 23));
}

// The kStep logits from `base` on, behind the row's end filled up with -inf (impossible tokens) in `buffer`.
SPECFUSE_INLINE const float* step_at(const float* x, int64_t base, int64_t V, float* buffer) {
  if (base + kStep <= V) return x + base;
  std::fill(buffer, buffer + kStep, -std::numeric_limits<float>::infinity());
  std::memcpy(buffer, x + base, (V - base) * sizeof(float));
  return buffer;
}

SPECFUSE_INLINE void from_half_body(const uint16_t* in, int64_t V, float* out) {
  for (int64_t i = 0; i < V; ++i) out[i] = float_from_half(in[i]);
}

SPECFUSE_INLINE void from_bfloat16_body(const uint16_t* in, int64_t V, float* out) {
  for (int64_t i = 0; i < V; ++i) out[i] = float_from_bfloat16(in[i]);
}

// Folded in halves: a chain of scalar comparisons would be mispredicted branches.
template <int kWidth>
SPECFUSE_INLINE float largest(const typename Lanes<kWidth>::Floats& values) {
  typename Lanes<kWidth / 2>::Floats low, high;
  std::memcpy(&low, &values, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&values) + sizeof low, sizeof high);
  if constexpr (kWidth == 4) {
    const float first = low[0] > high[0] ? low[0] : high[0], second = low[1] > high[1] ? low[1] : high[1];
    return first > second ? first : second;
  } else {
    return largest<kWidth / 2>(low > high ? low : high);
  }
}

template <int kWidth>
SPECFUSE_INLINE bool chunk_maxima_body(const float* x, int64_t V, float* maxima) {
  typedef typename Lanes<kWidth>::Floats Floats;
  typedef typename Lanes<kWidth>::Ints Ints;
  Ints nan{};
  float buffer[kStep];
  for (int64_t base = 0; base < V; base += kStep) {
    const float* step = step_at(x, base, V, buffer);
    Floats best = load<Floats>(step);
    for (int i = 0; i < kStep; i += kWidth) {
      const Floats values = load<Floats>(step + i);
      best = values > best ? values : best;
      // Negative for NaN only: compilers take a comparison kept as a value apart into scalars here.
      nan |= 0x7F800000 - (reinterpret_cast<Ints>(values) & 0x7FFFFFFF);
    }
    maxima[base / kStep] = largest<kWidth>(best);
  }
  int32_t found = 0;
  for (int j = 0; j < kWidth; ++j) found |= nan[j];
  return found < 0;
}

// Weights of one step of tokens, the first of which is `base`; 0 outside the cut. Returns their sums per
// lane.
SPECFUSE_INLINE Floats step_weights(const float* step, int64_t base, float max, float inverse_temperature,
                                    Cut cut, float* weights) {
  const auto last = static_cast<int32_t>(std::clamp<int64_t>(cut.last_id - base, -1, kStep));
  Ints index = {0, 1, 2, 3, 4, 5, 6, 7};
  Floats sums{};
  for (int i = 0; i < kStep; i += kLanes) {
    const Floats values = load(step + i);
    const Ints keep = (values > cut.value) | ((values == cut.value) & (index <= last));
    const Floats exps = exp_nonpositive((values - max) * inverse_temperature);
    const auto kept = reinterpret_cast<Floats>(reinterpret_cast<Ints>(exps) & keep);
    std::memcpy(weights + i, &kept, sizeof kept);
    sums += kept;
    index += kLanes;
  }
  return sums;
}

SPECFUSE_INLINE double sum_of(const Floats& values) {
  double sum = 0.0;
  for (int j = 0; j < kLanes; ++j) sum += values[j];
  return sum;
}

// The mass of a row that no filter cuts. An impossible token adds exp(-87), 2e-38 beside the 1 of the
// largest. Sums go over to double step by step, lane by lane.
template <int kWidth>
SPECFUSE_INLINE double whole_mass(const float* x, int64_t V, float max, float inverse_temperature) {
  typedef typename Lanes<kWidth>::Floats Floats;
  typedef typename Lanes<kWidth>::Doubles Doubles;
  float buffer[kStep];
  Doubles total{};
  for (int64_t base = 0; base < V; base += kStep) {
    const float* step = step_at(x, base, V, buffer);
    Floats sums{};
    for (int i = 0; i < kStep; i += kWidth) {
      const Floats values = load<Floats>(step + i);
      sums += exp_nonpositive<kWidth>((values - max) * inverse_temperature);
    }
    total += __builtin_convertvector(sums, Doubles);
  }
  double mass = 0.0;
  for (int j = 0; j < kWidth; ++j) mass += total[j];
  return mass;
}

template <int kWidth>
SPECFUSE_INLINE double exp_mass_body(const float* x, int64_t V, float max, float inverse_temperature,
                                     Cut cut) {
  if (cut.value == -std::numeric_limits<float>::infinity()) {
    return whole_mass<kWidth>(x, V, max, inverse_temperature);
  }
  float weights[kStep], buffer[kStep];
  double mass = 0.0;
  for (int64_t base = 0; base < V; base += kStep) {
    mass += sum_of(step_weights(step_at(x, base, V, buffer), base, max, inverse_temperature, cut, weights));
  }
  return mass;
}

SPECFUSE_INLINE bool any_candidate(const uint32_t* words, const float* weights, float scale) {
  Floats best = Floats{} - 1.0f;
  for (int i = 0; i < kStep; i += kLanes) {
    Ints bits;
    std::memcpy(&bits, words + i, sizeof bits);
    const Floats uniforms = __builtin_convertvector((bits >> 8) & 0xFFFFFF, Floats) * 0x1p-24f;
    const Floats margin = load(weights + i) * scale - (1.0f - uniforms);
    best = margin > best ? margin : best;
  }
  return largest<kLanes>(best) >= 0.0f;
}

// exp(x) for x <= 0 to about 1e-15, levelling off at -700: Cody and Waite's reduction, then the Taylor
// polynomial.
SPECFUSE_INLINE Doubles exp_nonpositive(const Doubles& x) {
  const Doubles lowest = Doubles{} - 700.0;
  const Doubles bounded = x > -700.0 ? x : lowest;
  const Doubles shifted =
      bounded * 1.4426950408889634 + 6755399441055744.0;  // 1.5 * 2^52 rounds to an integer
  const Doubles n = shifted - 6755399441055744.0;
  const Doubles r = (bounded - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  constexpr double kInverse[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
      1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  Doubles p = Doubles{} + kInverse[0];
  for (int i = 1; i < 13; ++i) p = p * r + kInverse[i];
  return reinterpret_cast<Doubles>(reinterpret_cast<Longs>(p) + (reinterpret_cast<Longs>(shifted) << 52));
}

SPECFUSE_INLINE double weights_body(const float* x, int64_t V, float max, double temperature, Cut cut,
                                    double* out) {
  typedef float FourFloats __attribute__((vector_size(16)));
  typedef int32_t FourInts __attribute__((vector_size(16)));
  float buffer[kStep];
  double kept[kStep];
  Doubles sums{};
  const double inverse_temperature = 1.0 / temperature;
  for (int64_t base = 0; base < V; base += kStep) {
    const float* step = step_at(x, base, V, buffer);
    const auto last = static_cast<int32_t>(std::clamp<int64_t>(cut.last_id - base, -1, kStep));
    FourInts index = {0, 1, 2, 3};
    for (int i = 0; i < kStep; i += 4) {
      FourFloats values;
      std::memcpy(&values, step + i, sizeof values);
      const Doubles distance = __builtin_convertvector(values, Doubles) - static_cast<double>(max);
      const Doubles exps = exp_nonpositive(distance * inverse_temperature);
      const FourInts inside = (values > cut.value) | ((values == cut.value) & (index <= last));
      const Longs mask = __builtin_convertvector(inside, Longs);
      const auto weights = reinterpret_cast<Doubles>(reinterpret_cast<Longs>(exps) & mask);
      std::memcpy(kept + i, &weights, sizeof weights);
      sums += weights;
      index += 4;
    }
    std::memcpy(out + base, kept, std::min(kStep, V - base) * sizeof(double));
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

SPECFUSE_INLINE void mass_histogram_body(const float* x, int64_t V, float max, double temperature,
                                         float bins_per_unit, double* bins) {
  typedef float FourFloats __attribute__((vector_size(16)));
  float buffer[kStep];
  const double inverse_temperature = 1.0 / temperature;
  for (int64_t base = 0; base < V; base += kStep) {
    const float* step = step_at(x, base, V, buffer);
    for (int i = 0; i < kStep; i += 4) {
      FourFloats values;
      std::memcpy(&values, step + i, sizeof values);
      const Doubles distance = __builtin_convertvector(values, Doubles) - static_cast<double>(max);
      const Doubles weights = exp_nonpositive(distance * inverse_temperature);
      for (int j = 0; j < 4; ++j) bins[mass_bin(step[i + j], max, bins_per_unit)] += weights[j];
    }
  }
}

template <void (*step_noise)(int64_t, int64_t, int64_t, NoiseStream, uint32_t*)>
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
  float weights[kStep], buffer[kStep];
  uint32_t words[kStep];
  for (int64_t base = 0; base < V; base += kStep) {
    const float* step = step_at(x, base, V, buffer);
    const double sum = sum_of(step_weights(step, base, q.max, inverse_temperature, q.cut, weights));
    mass += sum;
    // 1 - u is at least 2^-24: a step of smaller weights holds no winner and needs no noise.
    if (sum * scale < 0x1p-24) continue;
    step_noise(base, q.seed, q.position, NoiseStream::kTarget, words);
    if (!any_candidate(words, weights, scale)) continue;
    for (int i = 0; i < kStep; ++i) {
      const float rest = 1.0f - static_cast<float>(words[i] >> 8) * 0x1p-24f;
      if (rest > weights[i] * scale) continue;
      const double score = step[i] / q.temperature + gumbel_double(words[i]);
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

#define SPECFUSE_ROW_PASSES(suffix, width, noise, attributes)                                           \
  attributes void from_half_##suffix(const uint16_t* in, int64_t V, float* out) {                       \
    from_half_body(in, V, out);                                                                         \
  }                                                                                                     \
  attributes void from_bfloat16_##suffix(const uint16_t* in, int64_t V, float* out) {                   \
    from_bfloat16_body(in, V, out);                                                                     \
  }                                                                                                     \
  attributes bool chunk_maxima_##suffix(const float* x, int64_t V, float* maxima) {                     \
    return chunk_maxima_body<width>(x, V, maxima);                                                      \
  }                                                                                                     \
  attributes double exp_mass_##suffix(const float* x, int64_t V, float max, float inverse_temperature,  \
                                      Cut cut) {                                                        \
    return exp_mass_body<width>(x, V, max, inverse_temperature, cut);                                   \
  }                                                                                                     \
  attributes double weights_##suffix(const float* x, int64_t V, float max, double temperature, Cut cut, \
                                     double* out) {                                                     \
    return weights_body(x, V, max, temperature, cut, out);                                              \
  }                                                                                                     \
  attributes void mass_histogram_##suffix(const float* x, int64_t V, float max, double temperature,     \
                                          float bins_per_unit, double* bins) {                          \
    mass_histogram_body(x, V, max, temperature, bins_per_unit, bins);                                   \
  }                                                                                                     \
  attributes Sample sample_##suffix(const float* x, int64_t V, const SampleQuery& query) {              \
    return sample_body<noise>(x, V, query);                                                             \
  }                                                                                                     \
  constexpr RowPasses passes_##suffix{                                                                  \
      from_half_##suffix, from_bfloat16_##suffix,  chunk_maxima_##suffix, exp_mass_##suffix,            \
      weights_##suffix,   mass_histogram_##suffix, sample_##suffix,       noise};

SPECFUSE_ROW_PASSES(baseline, kLanes, step_noise_baseline, )
#ifdef SPECFUSE_X86
SPECFUSE_ROW_PASSES(avx2, kLanes, step_noise_avx2, __attribute__((target("avx2,fma"))))
SPECFUSE_ROW_PASSES(
    avx512, 16, step_noise_avx2,
    __attribute__((target("avx2,fma,avx512f,avx512vl,avx512bw,avx512dq,prefer-vector-width=512"))))
#endif

}  // namespace

const RowPasses& row_passes() {
#ifdef SPECFUSE_X86
  static const RowPasses& chosen = []() -> const RowPasses& {
    const char* most = std::getenv("SPECFUSE_CPU_ISA");
    const auto allowed = [&](const char* lower) { return !most || std::strcmp(most, lower) != 0; };
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && allowed("baseline");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (avx512 && allowed("avx2")) return passes_avx512;
    return avx2 ? passes_avx2 : passes_baseline;
  }();
  return chosen;
#else
  return passes_baseline;
#endif
}

}  // namespace specfuse
