// What the tests of the top-k router of both backends share: the choice, the weights and the
// gradient of one token by their definitions, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "kernel_testing.h"
#include "omni_moe/topk_router.h"

namespace omni_moe {

struct TopKCase {
  int64_t num_tokens, num_experts, k;
  int64_t n_group = 1, topk_group = 1;
  GroupScore group_score = GroupScore::kTop2Sum;

  int64_t group_size() const { return num_experts / n_group; }
};

// Empty, one expert, odd sizes, all experts, borders of the CUDA kernels, groups.
inline constexpr TopKCase kTopKCases[] = {
    {0, 8, 2},
    {1, 1, 1},
    {37, 8, 0},
    {37, 7, 7},
    {199, 60, 4},
    {37, 65, 33},
    {37, 256, 8},
    {5, 1000, 32},
    {3, 1025, 3},
    {2, 4096, 40},
    {37, 256, 8, 8, 4},
    {37, 60, 5, 12, 5},
    {37, 12, 3, 12, 5},
    {9, 90, 20, 9, 2},
    {3, 4096, 9, 64, 3},
    {5, 1000, 40, 8, 2},
    {37, 256, 8, 8, 4, GroupScore::kMax},
};
inline constexpr ScoringFunction kScoringFunctions[] = {
    ScoringFunction::kSoftmax, ScoringFunction::kSigmoid, ScoringFunction::kSqrtSoftplus};

struct TopKOptions {
  ScoringFunction scoring_func;
  bool norm_topk_prob;
  double routed_scaling_factor;
};

// NaN greatest.
inline bool is_greater(double a, double b) { return std::isnan(a) ? !std::isnan(b) : a > b; }

// Positions of `values`, the greatest first, equal ones in order.
inline std::vector<int32_t> sorted_positions(std::span<const double> values) {
  std::vector<int32_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return is_greater(values[a], values[b]); });
  return order;
}

inline bool has_nan_softmax(std::span<const double> logits) {
  double max = -kInf;
  for (const double logit : logits) {
    if (!(logit < kInf)) return true;
    max = std::max(max, logit);
  }
  return max == -kInf;
}

inline std::vector<double> scores_of_token(ScoringFunction function,
                                           std::span<const double> logits) {
  std::vector<double> scores(logits.begin(), logits.end());
  if (function == ScoringFunction::kSoftmax) {
    const double max = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    for (double& score : scores) sum += score = std::exp(score - max);
    for (double& score : scores) score = has_nan_softmax(logits) ? kNaN : score / sum;
    return scores;
  }
  for (double& x : scores) {
    x = function == ScoringFunction::kSigmoid
            ? 1 / (1 + std::exp(-x))
            : std::sqrt(std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))));
  }
  return scores;
}

struct TopKChoice {
  std::vector<int32_t> ids;
  bool is_clear = true;  // no two values that were compared are so near that fp32 decides
};

// `bias` is empty: none.
inline TopKChoice choose_experts(const TopKCase& c, ScoringFunction function,
                                 std::span<const double> logits, std::span<const double> bias) {
  const std::vector<double> scores = scores_of_token(function, logits);
  const bool by_logits =
      bias.empty() && !(function == ScoringFunction::kSoftmax && has_nan_softmax(logits));
  std::vector<double> values(scores), keys;
  for (size_t e = 0; e < bias.size(); ++e) values[e] += bias[e];
  double magnitude = 0;
  for (const double value : values) magnitude = std::max(magnitude, std::abs(value));
  const double margin = 4e-6 * magnitude;
  TopKChoice choice;

  // 1. Groups.
  std::vector<int32_t> groups(c.n_group);
  std::iota(groups.begin(), groups.end(), 0);
  if (c.topk_group < c.n_group) {
    std::vector<double> worth;
    const bool is_max = c.group_score == GroupScore::kMax;
    for (int64_t g = 0; g < c.n_group; ++g) {
      const double* first = is_max && by_logits ? logits.data() : values.data();
      std::vector<double> group(first + g * c.group_size(), first + (g + 1) * c.group_size());
      const auto order = sorted_positions(group);
      const bool is_sum = !is_max && group.size() > 1;
      worth.push_back(is_sum ? group[order[0]] + group[order[1]] : group[order[0]]);
    }
    groups = sorted_positions(worth);
    const double gap = worth[groups[c.topk_group - 1]] - worth[groups[c.topk_group]];
    if (!(is_max && by_logits) && std::abs(gap) <= 2 * margin) choice.is_clear = false;
    groups.resize(c.topk_group);
    std::sort(groups.begin(), groups.end());
  }

  // 2. Experts.
  std::vector<int32_t> ids;
  for (const int32_t g : groups) {
    for (int64_t e = g * c.group_size(); e < (g + 1) * c.group_size(); ++e) {
      ids.push_back(static_cast<int32_t>(e));
      keys.push_back(by_logits ? logits[e] : values[e]);
    }
  }
  const auto order = sorted_positions(keys);
  for (int64_t i = 0; i < c.k; ++i) {
    choice.ids.push_back(ids[order[i]]);
    const bool is_last = i + 1 == static_cast<int64_t>(order.size());
    if (by_logits || is_last) continue;
    if (std::abs(keys[order[i]] - keys[order[i + 1]]) <= margin) choice.is_clear = false;
  }
  return choice;
}

// Weights of the ids, and the gradient of the logits for that of the weights.
struct TopKToken {
  std::vector<double> weights, grad_logits;
};
inline TopKToken weigh_experts(const TopKOptions& o, std::span<const double> logits,
                               std::span<const int32_t> ids, std::span<const double> grad) {
  TopKToken token{std::vector<double>(ids.size()), std::vector<double>(logits.size())};
  const bool is_softmax = o.scoring_func == ScoringFunction::kSoftmax;
  if (std::all_of(ids.begin(), ids.end(), [](int32_t id) { return id < 0; })) return token;
  const std::vector<double> scores = scores_of_token(o.scoring_func, logits);
  double sum = is_softmax ? 0 : kNormEpsilon, weighted = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0) continue;
    sum += scores[ids[i]];
    weighted += grad[i] * scores[ids[i]];
  }
  const double scale = o.routed_scaling_factor / (o.norm_topk_prob ? sum : 1);
  std::vector<double> grad_scores(logits.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0) continue;
    token.weights[i] = scores[ids[i]] * scale;
    grad_scores[ids[i]] += scale * (grad[i] - (o.norm_topk_prob ? weighted / sum : 0));
  }
  double mean = 0;
  for (size_t e = 0; e < logits.size(); ++e) mean += grad_scores[e] * scores[e];
  for (size_t e = 0; e < logits.size(); ++e) {
    const double s = scores[e];
    const double slope = o.scoring_func == ScoringFunction::kSigmoid
                             ? s * (1 - s)
                             : 1 / (1 + std::exp(-logits[e])) / (2 * s);
    token.grad_logits[e] = is_softmax            ? s * (grad_scores[e] - mean)
                           : grad_scores[e] == 0 ? 0
                                                 : grad_scores[e] * slope;
  }
  return token;
}

}  // namespace omni_moe
