#include "corpus_mixer.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace specfuse {
namespace {

constexpr float kLearningRate = 0.05f;
// Probability that no expert vouches for; keeps the gradient finite.
constexpr float kFloor = 1e-4f;

// The logistic function on [-8, 8] in steps of 1/32.
constexpr int kSteps = 512;
std::array<float, kSteps + 1> logistic_table() {
  std::array<float, kSteps + 1> table{};
  for (int i = 0; i <= kSteps; ++i) table[i] = 1.0f / (1.0f + std::exp(8.0f - static_cast<float>(i) / 32.0f));
  return table;
}
const std::array<float, kSteps + 1> kLogistic = logistic_table();

float logistic(float x) {
  const float step = std::clamp((x + 8.0f) * 32.0f, 0.0f, static_cast<float>(kSteps));
  return kLogistic[static_cast<int>(step + 0.5f)];
}

}  // namespace

CorpusMixer::CorpusMixer(int experts, int match_expert) : parameters_(experts * kPerExpert) {
  for (int k = 0; k < experts; ++k) {
    float* p = &parameters_[k * kPerExpert];
    p[kBias] = 0.7f;
    // The fewer and the more even the successors, the less a context says beyond the one below it.
    for (int shape = 0; shape < kShapes && k != match_expert; ++shape) {
      const int spread = shape / 4, occurrences = shape % 4;
      p[kShape + shape] = -0.3f * (spread - 1) + (spread == 0 ? 0.3f * (occurrences - 1) : 0.0f);
    }
    for (int age = 0; age < kAges; ++age) p[kAge + age] = -0.2f * (age - 1);
    p[kScope] = -1.0f;
  }
}

float CorpusMixer::gate(int expert, const GateInput& input) const {
  const float* p = &parameters_[expert * kPerExpert];
  return logistic(p[kBias] + p[kShape + input.shape] + p[kAge + input.age] + p[kScope + input.same_scope]);
}

void CorpusMixer::learn(int count, const int* expert, const GateInput* input, const float* share,
                        const float* gate) {
  constexpr int kMaxExperts = 32;
  float below[kMaxExperts];  // p_{k-1} of the token that came
  float p = kFloor;
  for (int i = 0; i < count; ++i) {
    below[i] = p;
    p = gate[i] * share[i] + (1.0f - gate[i]) * p;
  }
  float chain = kLearningRate / p;  // d log p / d p_k, times the rate
  for (int i = count - 1; i >= 0; --i) {
    const float step = chain * (share[i] - below[i]) * gate[i] * (1.0f - gate[i]);
    float* q = &parameters_[expert[i] * kPerExpert];
    q[kBias] += step;
    q[kShape + input[i].shape] += step;
    q[kAge + input[i].age] += step;
    q[kScope + input[i].same_scope] += step;
    chain *= 1.0f - gate[i];
  }
}

}  // namespace specfuse
