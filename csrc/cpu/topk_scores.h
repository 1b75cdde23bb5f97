// The scores of the top-k router and their derivatives, for a scalar or a vector of accumulators.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "activation.h"
#include "omni_moe/topk_router.h"

namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY {

// Where log(1 + exp(x)) is exp(x) to the last bit.
template <typename Acc>
inline constexpr Acc kFarBelow = std::is_same_v<Acc, double> ? -40 : -18;

// sqrt(log(1 + exp(x))). Far below zero it is exp(x / 2), since exp(x) would underflow.
template <typename Acc>
inline Acc sqrt_softplus(Acc x) {
  if (x < kFarBelow<Acc>) return std::exp(x / 2);
  return std::sqrt(std::max(x, Acc(0)) + std::log1p(std::exp(-std::abs(x))));
}

// The score of one logit, unless of a softmax.
template <typename Acc>
inline Acc score_of(ScoringFunction function, Acc x) {
  return function == ScoringFunction::kSigmoid ? sigmoid(x) : sqrt_softplus(x);
}
template <typename Acc>
inline Vec<Acc> scores_of(ScoringFunction function, Vec<Acc> logits) {
  if (function == ScoringFunction::kSigmoid) return sigmoid(logits);
  return map_lanes(logits, [](Acc x) { return sqrt_softplus(x); });
}

// Its derivative.
template <typename Acc>
inline Acc score_slope(ScoringFunction function, Acc x) {
  if (function == ScoringFunction::kSigmoid) {
    const Acc e = std::exp(-std::abs(x));  // of the smaller side, so that no digits cancel
    return e / ((1 + e) * (1 + e));
  }
  // sigmoid(x) / (2 score), which far below zero is half the score.
  const Acc score = sqrt_softplus(x);
  return x < kFarBelow<Acc> ? score / 2 : sigmoid(x) / (2 * score);
}

// The softmax of a token's logits: exp(x - max) / sum. `max` and `sum` are NaN where it is NaN: a
// NaN or +inf logit, or all of them -inf.
template <typename Acc>
struct Softmax {
  Acc max = 0, sum = 1;

  Softmax() = default;
  // Arrays are filled up to whole vectors with -inf.
  explicit Softmax(const std::vector<Acc>& logits) {
    Vec<Acc> largest = {}, sums = {};
    largest -= std::numeric_limits<Acc>::infinity();
    auto any_nan = largest != largest;
    for (size_t i = 0; i < logits.size(); i += kLanes<Acc>) {
      const Vec<Acc> values = load(logits.data() + i);
      any_nan |= values != values;
      largest = values > largest ? values : largest;
    }
    max = largest[0];
    for (int lane = 1; lane < kLanes<Acc>; ++lane) max = std::max<Acc>(max, largest[lane]);
    if (lane_bits(any_nan) != 0 || !std::isfinite(max)) {
      max = sum = std::numeric_limits<Acc>::quiet_NaN();
      return;
    }
    for (size_t i = 0; i < logits.size(); i += kLanes<Acc>) {
      sums += exp_of(load(logits.data() + i) - max);
    }
    sum = sum_of_lanes<Acc>(sums);
  }

  bool is_nan() const { return std::isnan(sum); }
  template <typename Values>
  Values operator()(Values logits) const {
    return exp_of(logits - max) / sum;
  }
};

}  // namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY
