// One row of logits on the CPU: what its filters keep, and the token drawn from it.
#pragma once

#include <cstdint>
#include <vector>

#include "verify_tree.h"
#include "verify_tree_cpu_rows.h"

namespace specfuse {

// Holds scratch memory between rows: one object per thread.
class Row {
 public:
  explicit Row(const VerifyTreeParams& params) : p_(params), passes_(row_passes()) {}

  // Reads the row of `node` as floats. What follows speaks of this row.
  void load(int64_t b, int64_t node);

  // False for NaN, for -inf alone and, where tokens are sampled, for +inf.
  bool has_distribution(double temperature) const;

  // Emits the token of the row; false where there is no distribution.
  bool emit(int64_t b, int64_t position, int64_t* token, double* logprob);

  // Writes exp((x - max) / temperature), 0 for what the filters of row b leave out, for all V tokens, and
  // returns the sum. Needs temperature > 0 and a distribution.
  double weigh(int64_t b, double* weights);

  // (x - max) / temperature: the logarithm of what weigh() writes.
  double log_weight(int64_t token, double temperature) const;

 private:
  struct Candidate {
    float value;
    int64_t id;
    double weight;
  };

  static bool precedes(const Candidate& a, const Candidate& b) {
    return a.value != b.value ? a.value > b.value : a.id < b.id;
  }

  const float* gather(const float* in);
  const uint16_t* gather_halves(const uint16_t* in);
  int64_t first_max() const;
  double weight(float value, double temperature) const;
  float mth_chunk_maximum(int64_t m);
  void collect(float threshold);
  Cut find_cut(int64_t b, double temperature);
  Cut top_k_cut(int64_t k);
  Cut top_p_cut(double top_p, double temperature, Cut within);
  Cut min_p_cut(double min_p, double temperature, Cut cut) const;
  double weigh_candidates(double temperature);
  bool select_in_histogram(double top_p, double temperature, double rough_total, Cut* cut);
  bool select(double before, double target, double tolerance, Cut* cut);

  const VerifyTreeParams& p_;
  std::vector<float> values_, maxima_, sorted_maxima_;
  std::vector<uint16_t> halves_;
  std::vector<Candidate> candidates_;
  std::vector<double> bins_;
  const RowPasses& passes_;
  const float* x_ = nullptr;
  float max_ = 0.0f;
  bool has_nan_ = false;
};

}  // namespace specfuse
