// CPU implementation of verify_tree. Only visited rows are read: V * itemsize bytes each, once from memory
// and once or twice more from cache. Tokens are chosen in double, exactly as the eager reference chooses
// them.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "verify_tree.h"
#include "verify_tree_cpu_rows.h"

namespace specfuse {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr Cut kKeepAll{-kInfinity, -1};  // -inf is an impossible token: never inside

struct Candidate {
  float value;
  int64_t id;
  double weight;
};

// Finite also for the smallest temperatures, so that 0 stays 0.
float inverse(double temperature) {
  return static_cast<float>(std::min(1.0 / temperature, double{kLargest}));
}

bool precedes(const Candidate& a, const Candidate& b) {
  return a.value != b.value ? a.value > b.value : a.id < b.id;
}

// One row of logits as floats, with what its filters and its draw need.
class Row {
 public:
  explicit Row(const VerifyTreeParams& params) : p_(params), passes_(row_passes()) {}

  void load(int64_t b, int64_t node) {
    const int64_t offset = b * p_.stride_b + node * p_.stride_n;
    if (p_.dtype == LogitsDtype::kFloat32) {
      const float* in = static_cast<const float*>(p_.logits) + offset;
      x_ = p_.stride_v == 1 ? in : gather(in);
    } else {
      const uint16_t* in = static_cast<const uint16_t*>(p_.logits) + offset;
      if (p_.stride_v != 1) in = gather_halves(in);
      values_.resize(p_.V);
      (p_.dtype == LogitsDtype::kFloat16 ? passes_.from_half : passes_.from_bfloat16)(in, p_.V,
                                                                                      values_.data());
      x_ = values_.data();
    }
    maxima_.resize((p_.V + kChunk - 1) / kChunk);
    has_nan_ = passes_.chunk_maxima(x_, p_.V, maxima_.data());
    max_ = *std::max_element(maxima_.begin(), maxima_.end());
  }

  // Emits the token of this row; false where there is no distribution.
  bool emit(int64_t b, int64_t position, int64_t* token, double* logprob) {
    if (has_nan_ || max_ == -kInfinity) return false;
    const double temperature = p_.temperature[b];
    const int64_t top = first_max();
    if (temperature == 0.0) {
      *token = top;
      // inf - inf: a row with an infinite logit has an argmax but no probabilities.
      *logprob =
          max_ == kInfinity ? std::nan("") : -std::log(passes_.exp_mass(x_, p_.V, max_, 1.0f, kKeepAll));
      return true;
    }
    if (max_ == kInfinity) return false;
    const SampleQuery query{max_, temperature, find_cut(b, temperature), p_.seed[b], position, top};
    const Sample sample = passes_.sample(x_, p_.V, query);
    *token = sample.token;
    *logprob = (static_cast<double>(x_[sample.token]) - max_) / temperature - sample.log_mass;
    return true;
  }

 private:
  const float* gather(const float* in) {
    values_.resize(p_.V);
    for (int64_t v = 0; v < p_.V; ++v) values_[v] = in[v * p_.stride_v];
    return values_.data();
  }

  const uint16_t* gather_halves(const uint16_t* in) {
    halves_.resize(p_.V);
    for (int64_t v = 0; v < p_.V; ++v) halves_[v] = in[v * p_.stride_v];
    return halves_.data();
  }

  int64_t first_max() const {
    const int64_t chunk = std::find(maxima_.begin(), maxima_.end(), max_) - maxima_.begin();
    return std::find(x_ + chunk * kChunk, x_ + p_.V, max_) - x_;
  }

  double weight(float value, double temperature) const {
    return std::exp(static_cast<double>(value) / temperature - static_cast<double>(max_) / temperature);
  }

  // The m-th largest chunk maximum: at least m tokens are as large.
  float mth_chunk_maximum(int64_t m) {
    sorted_maxima_ = maxima_;
    std::nth_element(sorted_maxima_.begin(), sorted_maxima_.begin() + (m - 1), sorted_maxima_.end(),
                     std::greater<float>());
    return sorted_maxima_[m - 1];
  }

  // Tokens of at least `threshold`, -inf excluded.
  void collect(float threshold) {
    candidates_.clear();
    for (size_t chunk = 0; chunk < maxima_.size(); ++chunk) {
      if (maxima_[chunk] < threshold) continue;
      const int64_t end = std::min<int64_t>(p_.V, (chunk + 1) * kChunk);
      for (int64_t i = chunk * kChunk; i < end; ++i) {
        if (x_[i] >= threshold && x_[i] > -kInfinity) candidates_.push_back({x_[i], i, 0.0});
      }
    }
  }

  Cut find_cut(int64_t b, double temperature) {
    Cut cut = kKeepAll;
    const int64_t k = p_.top_k[b];
    if (k > 0 && k < p_.V) cut = top_k_cut(k);
    if (p_.top_p[b] < 1.0f) cut = top_p_cut(p_.top_p[b], temperature, cut);
    if (p_.min_p[b] > 0.0f) cut = min_p_cut(p_.min_p[b], temperature, cut);
    return cut;
  }

  Cut top_k_cut(int64_t k) {
    const int64_t chunks = static_cast<int64_t>(maxima_.size());
    collect(k <= chunks ? mth_chunk_maximum(k) : -kInfinity);
    if (static_cast<int64_t>(candidates_.size()) < k) return kKeepAll;  // the rest is -inf
    std::nth_element(candidates_.begin(), candidates_.begin() + (k - 1), candidates_.end(), precedes);
    return {candidates_[k - 1].value, p_.V};  // ties with the k-th stay
  }

  // Keeps a token if the mass strictly before it is below top_p of the mass inside `within`. Looks at the
  // largest tokens first, then at the one bin of a mass histogram where the boundary lies, and weighs every
  // token only where that is too close to a token's edge to call.
  Cut top_p_cut(double top_p, double temperature, Cut within) {
    Cut cut = within;
    const auto chunks = static_cast<int64_t>(maxima_.size());
    if (chunks > 32 && within.value == -kInfinity) {
      const double total = passes_.exp_mass(x_, p_.V, max_, inverse(temperature), within);
      // A weight at distance d from the largest is off by at most 2e-7 (d + 1), and the mean distance is at
      // most log(V / total).
      const double tolerance = total * (2.5e-7 * std::log(p_.V / total) + 4e-7);
      collect(mth_chunk_maximum(32));
      if (weigh(temperature) > top_p * total + tolerance && select(0.0, top_p * total, tolerance, &cut))
        return cut;
      if (select_in_histogram(top_p, temperature, total, &cut)) return cut;
    }
    collect(within.value);
    const double total = weigh(temperature);
    select(0.0, top_p * total, 0.0, &cut);
    return cut;
  }

  double weigh(double temperature) {
    double mass = 0.0;
    for (Candidate& c : candidates_) mass += c.weight = weight(c.value, temperature);
    return mass;
  }

  bool select_in_histogram(double top_p, double temperature, double rough_total, Cut* cut) {
    // Tokens lighter than (1 - top_p) * total / V all lie beyond the boundary: the histogram ends there.
    const double reach = temperature * std::log(p_.V / ((1.0 - top_p) * rough_total));
    const auto bins_per_unit = static_cast<float>(std::min(kMassBins / reach, double{kLargest}));
    bins_.assign(kMassBins, 0.0);
    passes_.mass_histogram(x_, p_.V, max_, temperature, bins_per_unit, bins_.data());
    double total = 0.0, before = 0.0;
    for (double mass : bins_) total += mass;
    int bin = 0;
    while (bin < kMassBins - 1 && before + bins_[bin] < top_p * total) before += bins_[bin++];
    candidates_.clear();
    for (int64_t i = 0; i < p_.V; ++i) {
      if (mass_bin(x_[i], max_, bins_per_unit) != bin || x_[i] == -kInfinity) continue;
      candidates_.push_back({x_[i], i, weight(x_[i], temperature)});
    }
    // Sums in double, taken in another order than the reference's.
    const double tolerance = 1e-11 * total;
    return !candidates_.empty() && top_p * total - before >= tolerance &&
           select(before, top_p * total, tolerance, cut);
  }

  // Quickselect among the candidates, which the mass `before` precedes, for the last token whose preceding
  // mass is below `target`. False where that comes within `tolerance` of the token's edge.
  bool select(double before, double target, double tolerance, Cut* cut) {
    size_t low = 0, high = candidates_.size();
    double kept_before = before;
    Candidate kept = candidates_[0];
    while (low < high) {
      const auto begin = candidates_.begin() + low, end = candidates_.begin() + high;
      std::iter_swap(begin + (high - low) / 2, end - 1);
      const Candidate pivot = *(end - 1);
      const auto middle =
          std::partition(begin, end - 1, [&](const Candidate& c) { return precedes(c, pivot); });
      double pivot_before = before;
      for (auto c = begin; c != middle; ++c) pivot_before += c->weight;
      std::iter_swap(middle, end - 1);
      if (pivot_before < target) {
        kept = pivot;
        kept_before = pivot_before;
        before = pivot_before + pivot.weight;
        low = static_cast<size_t>(middle - candidates_.begin()) + 1;
      } else {
        high = static_cast<size_t>(middle - candidates_.begin());
      }
    }
    *cut = {kept.value, kept.id};
    return target - kept_before >= tolerance && kept_before + kept.weight - target >= tolerance;
  }

  // Keeps tokens of at least min_p times the largest probability; `cut` is what the earlier filters left.
  Cut min_p_cut(double min_p, double temperature, Cut cut) const {
    const double threshold = max_ + std::log(min_p) * temperature;
    // Only values this close to the threshold need the exact weight.
    const double slack = 1e-9 * (std::fabs(threshold) + std::fabs(max_) + temperature);
    float lowest = max_;
    for (size_t chunk = 0; chunk < maxima_.size(); ++chunk) {
      if (maxima_[chunk] < threshold - slack) continue;
      const int64_t end = std::min<int64_t>(p_.V, (chunk + 1) * kChunk);
      for (int64_t i = chunk * kChunk; i < end; ++i) {
        const float value = x_[i];
        if (value >= lowest || value < threshold - slack) continue;
        if (value > threshold + slack || weight(value, temperature) >= min_p) lowest = value;
      }
    }
    return lowest > cut.value ? Cut{lowest, p_.V} : cut;
  }

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

ArgumentError check(const VerifyTreeParams& p) {
  for (int64_t b = 0; b < p.B; ++b) {
    if (p.num_nodes[b] < 0 || p.num_nodes[b] > p.N) {
      return {"num_nodes must lie between 0 and the tree's width", b, static_cast<double>(p.num_nodes[b])};
    }
    // Written so that NaN fails.
    if (!(p.temperature[b] >= 0.0f && p.temperature[b] < kInfinity)) {
      return {"temperature must be finite and not negative", b, p.temperature[b]};
    }
    if (p.top_k[b] < 0) return {"top_k must not be negative", b, static_cast<double>(p.top_k[b])};
    if (!(p.top_p[b] > 0.0f && p.top_p[b] <= 1.0f)) return {"top_p must lie in (0, 1]", b, p.top_p[b]};
    if (!(p.min_p[b] >= 0.0f && p.min_p[b] <= 1.0f)) return {"min_p must lie in [0, 1]", b, p.min_p[b]};
  }
  return {nullptr, 0, 0.0};
}

void walk(const VerifyTreeParams& p, int64_t b, Row& row) {
  int32_t* path = p.path + b * p.N;
  float* logprobs = p.logprobs + b * p.N;
  std::fill(path, path + p.N, -1);
  std::fill(logprobs, logprobs + p.N, 0.0f);
  int32_t visited = 0;
  int64_t token = -1;
  int node = p.num_nodes[b] > 0 ? 0 : -1;
  while (node >= 0) {
    double logprob = std::nan("");
    row.load(b, node);
    if (!row.emit(b, p.positions[b] + visited + 1, &token, &logprob)) token = -1;
    path[visited] = node;
    logprobs[visited++] = static_cast<float>(logprob);
    node = token < 0 ? -1 : find_child(p.tokens + b * p.N, p.parents + b * p.N, p.num_nodes[b], node, token);
  }
  p.length[b] = visited;
  p.next_token[b] = token;
}

}  // namespace

ArgumentError verify_tree_cpu(const VerifyTreeParams& params) {
  const ArgumentError error = check(params);
  if (error.message) return error;
  Row row(params);
  for (int64_t b = 0; b < params.B; ++b) walk(params, b, row);
  return error;
}

}  // namespace specfuse
