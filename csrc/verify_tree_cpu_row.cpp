#include "verify_tree_cpu_row.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace specfuse {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr Cut kKeepAll{-kInfinity, -1};  // -inf is an impossible token: never inside

// Finite also for the smallest temperatures, so that 0 stays 0.
float inverse(double temperature) {
  return static_cast<float>(std::min(1.0 / temperature, double{kLargest}));
}

}  // namespace

void Row::load(int64_t b, int64_t node) {
  const int64_t offset = b * p_.stride_b + node * p_.stride_n;
  if (p_.dtype == LogitsDtype::kFloat32) {
    const float* in = static_cast<const float*>(p_.logits) + offset;
    x_ = p_.stride_v == 1 ? in : gather(in);
  } else {
    const uint16_t* in = static_cast<const uint16_t*>(p_.logits) + offset;
    if (p_.stride_v != 1) in = gather_halves(in);
    values_.resize(p_.V);
    (p_.dtype == LogitsDtype::kFloat16 ? passes_.from_half : passes_.from_bfloat16)(in, p_.V, values_.data());
    x_ = values_.data();
  }
  maxima_.resize((p_.V + kChunk - 1) / kChunk);
  has_nan_ = passes_.chunk_maxima(x_, p_.V, maxima_.data());
  max_ = *std::max_element(maxima_.begin(), maxima_.end());
}

bool Row::emit(int64_t b, int64_t position, int64_t* token, double* logprob) {
  const double temperature = p_.temperature[b];
  if (!has_distribution(temperature)) return false;
  const int64_t top = first_max();
  if (temperature == 0.0) {
    *token = top;
    // inf - inf: a row with an infinite logit has an argmax but no probabilities.
    *logprob = max_ == kInfinity ? std::nan("") : -std::log(passes_.exp_mass(x_, p_.V, max_, 1.0f, kKeepAll));
    return true;
  }
  const SampleQuery query{max_, temperature, find_cut(b, temperature), p_.seed[b], position, top};
  const Sample sample = passes_.sample(x_, p_.V, query);
  *token = sample.token;
  *logprob = (static_cast<double>(x_[sample.token]) - max_) / temperature - sample.log_mass;
  return true;
}

const float* Row::gather(const float* in) {
  values_.resize(p_.V);
  for (int64_t v = 0; v < p_.V; ++v) values_[v] = in[v * p_.stride_v];
  return values_.data();
}

const uint16_t* Row::gather_halves(const uint16_t* in) {
  halves_.resize(p_.V);
  for (int64_t v = 0; v < p_.V; ++v) halves_[v] = in[v * p_.stride_v];
  return halves_.data();
}

int64_t Row::first_max() const {
  const int64_t chunk = std::find(maxima_.begin(), maxima_.end(), max_) - maxima_.begin();
  return std::find(x_ + chunk * kChunk, x_ + p_.V, max_) - x_;
}

double Row::weight(float value, double temperature) const {
  return std::exp(static_cast<double>(value) / temperature - static_cast<double>(max_) / temperature);
}

// The m-th largest chunk maximum: at least m tokens are as large.
float Row::mth_chunk_maximum(int64_t m) {
  sorted_maxima_ = maxima_;
  std::nth_element(sorted_maxima_.begin(), sorted_maxima_.begin() + (m - 1), sorted_maxima_.end(),
                   std::greater<float>());
  return sorted_maxima_[m - 1];
}

// Tokens of at least `threshold`, -inf excluded.
void Row::collect(float threshold) {
  candidates_.clear();
  for (size_t chunk = 0; chunk < maxima_.size(); ++chunk) {
    if (maxima_[chunk] < threshold) continue;
    const int64_t end = std::min<int64_t>(p_.V, (chunk + 1) * kChunk);
    for (int64_t i = chunk * kChunk; i < end; ++i) {
      if (x_[i] >= threshold && x_[i] > -kInfinity) candidates_.push_back({x_[i], i, 0.0});
    }
  }
}

Cut Row::find_cut(int64_t b, double temperature) {
  Cut cut = kKeepAll;
  const int64_t k = p_.top_k[b];
  if (k > 0 && k < p_.V) cut = top_k_cut(k);
  if (p_.top_p[b] < 1.0f) cut = top_p_cut(p_.top_p[b], temperature, cut);
  if (p_.min_p[b] > 0.0f) cut = min_p_cut(p_.min_p[b], temperature, cut);
  return cut;
}

Cut Row::top_k_cut(int64_t k) {
  const int64_t chunks = static_cast<int64_t>(maxima_.size());
  collect(k <= chunks ? mth_chunk_maximum(k) : -kInfinity);
  if (static_cast<int64_t>(candidates_.size()) < k) return kKeepAll;  // the rest is -inf
  std::nth_element(candidates_.begin(), candidates_.begin() + (k - 1), candidates_.end(), precedes);
  return {candidates_[k - 1].value, p_.V};  // ties with the k-th stay
}

// Keeps a token if the mass strictly before it is below top_p of the mass inside `within`. Looks at the
// largest tokens first, then at the one bin of a mass histogram where the boundary lies, and weighs every
// token only where that is too close to a token's edge to call.
Cut Row::top_p_cut(double top_p, double temperature, Cut within) {
  Cut cut = within;
  const auto chunks = static_cast<int64_t>(maxima_.size());
  if (chunks > 32 && within.value == -kInfinity) {
    const double total = passes_.exp_mass(x_, p_.V, max_, inverse(temperature), within);
    // A weight at distance d from the largest is off by at most 2e-7 (d + 1), and the mean distance is at
    // most log(V / total).
    const double tolerance = total * (2.5e-7 * std::log(p_.V / total) + 4e-7);
    collect(mth_chunk_maximum(32));
    if (weigh_candidates(temperature) > top_p * total + tolerance &&
        select(0.0, top_p * total, tolerance, &cut))
      return cut;
    if (select_in_histogram(top_p, temperature, total, &cut)) return cut;
  }
  collect(within.value);
  const double total = weigh_candidates(temperature);
  select(0.0, top_p * total, 0.0, &cut);
  return cut;
}

double Row::weigh_candidates(double temperature) {
  double mass = 0.0;
  for (Candidate& c : candidates_) mass += c.weight = weight(c.value, temperature);
  return mass;
}

bool Row::select_in_histogram(double top_p, double temperature, double rough_total, Cut* cut) {
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
bool Row::select(double before, double target, double tolerance, Cut* cut) {
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
// Logarithms are compared: at high temperatures weights round to equal ones.
Cut Row::min_p_cut(double min_p, double temperature, Cut cut) const {
  const double log_min_p = std::log(min_p), scaled_max = max_ / temperature;
  const double threshold = max_ + log_min_p * temperature;
  // Only values this close to the threshold need the division.
  const double slack = 1e-9 * (std::fabs(threshold) + std::fabs(max_) + temperature);
  float lowest = max_;
  for (size_t chunk = 0; chunk < maxima_.size(); ++chunk) {
    if (maxima_[chunk] < threshold - slack) continue;
    const int64_t end = std::min<int64_t>(p_.V, (chunk + 1) * kChunk);
    for (int64_t i = chunk * kChunk; i < end; ++i) {
      const float value = x_[i];
      if (value >= lowest || value < threshold - slack) continue;
      if (value > threshold + slack || value / temperature - scaled_max >= log_min_p) lowest = value;
    }
  }
  return lowest > cut.value ? Cut{lowest, p_.V} : cut;
}

bool Row::has_distribution(double temperature) const {
  return !has_nan_ && max_ > -kInfinity && (temperature == 0.0 || max_ < kInfinity);
}

double Row::weigh(int64_t b, double* weights) {
  const double temperature = p_.temperature[b];
  return passes_.weights(x_, p_.V, max_, temperature, find_cut(b, temperature), weights);
}

double Row::log_weight(int64_t token, double temperature) const {
  return (static_cast<double>(x_[token]) - max_) / temperature;
}

}  // namespace specfuse
