// How far each context is trusted: CorpusIndex blends the predictions of several contexts with gates that it
// learns from every answer it observes.
#pragma once

#include <cstdint>
#include <vector>

namespace specfuse {

// What a gate knows of one expert (a context found in the index) besides which context it is.
struct GateInput {
  int shape;       // how sure the context's own statistics are, below kShapes
  int age;         // log2 of the number of answers since the context was last seen, below kAges
  int same_scope;  // 1 if it was seen under the same question
};

// Expert k predicts p_k = gate_k * q_k + (1 - gate_k) * p_{k-1}, from the least to the most specific context.
// The gate is the logistic function of a sum of four learned numbers: a bias, one for the shape, one for the
// age and one for the scope. Few parameters per expert: they are right after a handful of answers.
class CorpusMixer {
 public:
  static constexpr int kShapes = 20, kAges = 16;

  explicit CorpusMixer(int experts, int match_expert);

  float gate(int expert, const GateInput& input) const;

  // One step of gradient ascent on log p of the token that came. Arrays run from the least specific expert.
  // share[i]: what expert i's own statistics gave the token; gate[i]: its gate.
  void learn(int count, const int* expert, const GateInput* input, const float* share, const float* gate);

  std::vector<float>& parameters() { return parameters_; }
  const std::vector<float>& parameters() const { return parameters_; }

 private:
  static constexpr int kBias = 0, kShape = 1, kAge = kShape + kShapes, kScope = kAge + kAges;
  static constexpr int kPerExpert = kScope + 2;

  std::vector<float> parameters_;  // [experts, kPerExpert]
};

}  // namespace specfuse
