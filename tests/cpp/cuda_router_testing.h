// What the tests of the CUDA router share: cases, their logits, and a problem with its oracle, the
// CPU backend's router: the choice, which both make by sums in fp32, exactly; weights in fp64.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda_kernel_testing.h"

namespace omni_moe {

// ---- cases ----

enum class Logits { kNormal, kTies, kZeros, kCollapse, kMasked, kSpecial, kBothInfinities };
inline constexpr Logits kFiniteLogits[] = {Logits::kNormal, Logits::kTies, Logits::kZeros,
                                           Logits::kCollapse};
inline constexpr Logits kOddLogits[] = {Logits::kMasked, Logits::kSpecial, Logits::kBothInfinities};
inline constexpr Logits kAllLogits[] = {Logits::kNormal,        Logits::kTies,   Logits::kZeros,
                                        Logits::kCollapse,      Logits::kMasked, Logits::kSpecial,
                                        Logits::kBothInfinities};
inline constexpr RouterScore kScores[] = {RouterScore::kLogit, RouterScore::kSoftmax,
                                          RouterScore::kSoftmaxTopK};

inline void fill_logits(Operand& operand, Logits kind, bool is_y, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  operand.fill([&] {
    const float p = uniform(random);
    float v = normal(random);
    switch (kind) {
      case Logits::kNormal:
        break;
      case Logits::kTies:
        v = std::round(2 * v) / 2;
        break;
      case Logits::kZeros:
        v = p < 0.5f ? 0.0f : -0.0f;
        break;
      // Gaps below the ulp of the sums.
      case Logits::kCollapse:
        v = is_y ? std::round(v) * 1e-9f : 1.0f + std::round(v) * 2e-8f;
        break;
      case Logits::kMasked:
        v = p < 0.7f ? -kInf : v;
        break;
      case Logits::kSpecial:
        v = p < 0.03f ? kNaN : p < 0.06f ? kInf : p < 0.09f ? -kNaN : v;
        break;
      case Logits::kBothInfinities:
        v = p < 0.1f ? kInf : p < 0.3f ? -kInf : p < 0.32f ? kNaN : v;
    }
    return v;
  });
}

struct Case {
  int64_t num_tokens, num_rows, num_cols, k;
  DType dtype;
  RouterScore score;
  Logits logits;

  std::string name() const {
    return std::string(name_of(dtype)) + " T" + std::to_string(num_tokens) + " " +
           std::to_string(num_rows) + "x" + std::to_string(num_cols) + " K" + std::to_string(k) +
           " score " + std::to_string(static_cast<int>(score)) + " logits " +
           std::to_string(static_cast<int>(logits));
  }
};

// ---- oracles ----

// Softmax of each row of [T, n] in fp64, as the weights of a grid of one column; NaN where the
// router's log_softmax is.
inline Values softmax(const Values& logits, int64_t num_tokens, int64_t n) {
  const Values zeros(num_tokens);
  Values sorted(logits.size()), result(logits.size());
  std::vector<int32_t> ids(logits.size());
  cpu::router_forward({logits.data(), zeros.data(), sorted.data(), ids.data(), num_tokens, n, 1, n,
                       DType::kFloat64, RouterScore::kSoftmax, nullptr},
                      kSerial);
  for (size_t i = 0; i < sorted.size(); ++i) result[i / n * n + ids[i]] = sorted[i];
  return result;
}

struct Problem {
  explicit Problem(const Case& c)
      : c(c),
        x(c.dtype, c.num_tokens * c.num_rows),
        y(c.dtype, c.num_tokens * c.num_cols),
        weights(c.dtype, num_pairs()),
        grad_weights(c.dtype, num_pairs()),
        grad_x(c.dtype, x.values.size()),
        grad_y(c.dtype, y.values.size()),
        ids(num_pairs()),
        device_ids(num_pairs() * sizeof(int32_t)) {
    fill_logits(x, c.logits, false, 1);
    fill_logits(y, c.logits, true, 1001);
    softmax_x = softmax(x.values, c.num_tokens, c.num_rows);
    softmax_y = softmax(y.values, c.num_tokens, c.num_cols);
    choose();
  }

  int64_t num_pairs() const { return c.num_tokens * c.k; }
  bool is_softmax() const { return c.score != RouterScore::kLogit; }

  // Ids, and weights that are logits: one rounding of the sums in fp32. Those of the softmax are in
  // fp64, but for these ids: the fp64 kernel would break ties of the fp32 sums.
  void choose() {
    const std::vector<float> logits_x(x.values.begin(), x.values.end());
    const std::vector<float> logits_y(y.values.begin(), y.values.end());
    std::vector<float> sums(num_pairs());
    cpu::router_forward({logits_x.data(), logits_y.data(), sums.data(), ids.data(), c.num_tokens,
                         c.num_rows, c.num_cols, c.k, DType::kFloat32, c.score, nullptr},
                        kSerial);
    for (int64_t t = 0; t < c.num_tokens; ++t) {
      double total = 0;
      for (int64_t i = t * c.k; i < (t + 1) * c.k; ++i) {
        weights.values[i] = is_softmax() ? softmax_of_pair(i) : rounded(c.dtype, sums[i]);
        total += weights.values[i];
      }
      if (c.score != RouterScore::kSoftmaxTopK) continue;
      for (int64_t i = t * c.k; i < (t + 1) * c.k; ++i) weights.values[i] /= total;
    }
  }

  // Positions of a chosen pair's logits in x and in y.
  int64_t x_of(int64_t pair) const { return pair / c.k * c.num_rows + ids[pair] / c.num_cols; }
  int64_t y_of(int64_t pair) const { return pair / c.k * c.num_cols + ids[pair] % c.num_cols; }
  double softmax_of_pair(int64_t pair) const {
    return softmax_x[x_of(pair)] * softmax_y[y_of(pair)];
  }

  // Of the forward on the device, or of the backward on either side; without the workspace.
  template <typename Params>
  Params params_of(Side side) {
    constexpr bool kIsForward = std::is_same_v<Params, RouterForwardParams>;
    Params params{};
    if (kIsForward || is_softmax()) {
      params.logits_x = x.at(side);
      params.logits_y = y.at(side);
    }
    params.indices = side == Side::kDevice ? static_cast<int32_t*>(device_ids.data()) : ids.data();
    if constexpr (kIsForward) {
      params.weights = weights.at(side);
    } else {
      params.grad_weights = grad_weights.at(side);
      params.grad_logits_x = grad_x.at(side);
      params.grad_logits_y = grad_y.at(side);
    }
    params.num_tokens = c.num_tokens;
    params.num_rows = c.num_rows;
    params.num_cols = c.num_cols;
    params.num_experts_per_token = c.k;
    params.dtype = dtype_on(side, c.dtype);
    params.score = c.score;
    return params;
  }

  Case c;
  Operand x, y, weights, grad_weights, grad_x, grad_y;
  Values softmax_x, softmax_y;  // [T, R], [T, C]
  std::vector<int32_t> ids;     // [T, K]
  DeviceArray device_ids;
};

}  // namespace omni_moe
