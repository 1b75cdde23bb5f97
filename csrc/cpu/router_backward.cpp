// Gradient of the Cartesian-product router on the CPU, token by token, no atomics.
//
// kLogit: grad_x[row] = Σ grad over the chosen pairs in that row. kSoftmax: with w =
// exp(log_softmax) and u = grad * w, grad_x[row] = Σ u in that row - softmax(x)[row] Σ u.
// kSoftmaxTopK: with w the softmax over the K chosen sums, grad_x[row] = Σ w (grad - Σ grad w) in
// that row; the log-sum-exps cancel.
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "activation.h"
#include "omni_moe/cpu.h"

namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY {

namespace {

// One axis of one token: its logits and its gradient. Arrays are filled up to whole vectors, the
// logits with -inf.
template <typename Acc>
struct AxisGradient {
  int64_t n;
  std::vector<Acc> logits, softmax, grad;

  explicit AxisGradient(int64_t n)
      : n(n), logits(whole_vectors<Acc>(n)), softmax(logits.size()), grad(logits.size()) {}

  // Reads the logits and replaces them by log_softmax; NaN where torch.log_softmax gives NaN.
  template <typename T>
  void load_log_softmax(const T* source) {
    constexpr int kWidth = kLanes<Acc>;
    constexpr Acc kLowest = -std::numeric_limits<Acc>::infinity();
    const auto padded = static_cast<int64_t>(logits.size());
    Vec<Acc> largest_lanes = Vec<Acc>{} + kLowest;
    for (int64_t i = 0; i < padded; i += kWidth) {
      const Vec<Acc> values =
          n - i >= kWidth ? load(source + i) : load_partial(source + i, n - i, kLowest);
      store(logits.data() + i, values);
      largest_lanes = values > largest_lanes ? values : largest_lanes;
    }
    Acc largest = kLowest;
    for (int lane = 0; lane < kWidth; ++lane) largest = std::max<Acc>(largest, largest_lanes[lane]);

    Vec<Acc> sums = {};
    for (int64_t i = 0; i < padded; i += kWidth) {
      const Vec<Acc> value = exp_of(load(logits.data() + i) - largest);
      store(softmax.data() + i, value);
      sums += value;
    }
    const Acc total = sum_of_lanes<Acc>(sums), log_total = std::log(total);
    for (int64_t i = 0; i < padded; i += kWidth) {
      store(logits.data() + i, (load(logits.data() + i) - largest) - log_total);
      store(softmax.data() + i, load(softmax.data() + i) / total);
    }
  }
};

// The chosen pairs of one token.
template <typename Acc>
struct PairGradients {
  std::vector<int32_t> rows, cols;  // [K]
  std::vector<Acc> weights;         // [K], then unused lanes
  std::vector<Acc> grad_sums;       // [K]

  explicit PairGradients(int64_t k)
      : rows(k), cols(k), weights(whole_vectors<Acc>(k)), grad_sums(k) {}
};

// Turns grad_weights of one token into the gradient of the K chosen sums, and returns the factor of
// the softmax that each axis subtracts.
template <typename Acc, typename T>
Acc grad_of_sums(const RouterBackwardParams& p, const AxisGradient<Acc>& x,
                 const AxisGradient<Acc>& y, const T* grad_weights, PairGradients<Acc>& pairs) {
  const int64_t k = p.num_experts_per_token;
  std::vector<Acc>& weights = pairs.weights;
  std::vector<Acc>& grad_sums = pairs.grad_sums;
  widen(grad_weights, grad_sums.data(), k);
  if (p.score == RouterScore::kLogit) return Acc(0);

  for (int64_t i = 0; i < k; ++i) weights[i] = x.logits[pairs.rows[i]] + y.logits[pairs.cols[i]];
  for (size_t i = 0; i < weights.size(); i += kLanes<Acc>) {
    store(weights.data() + i, exp_of(load(weights.data() + i)));
  }
  Acc total_weight = 0, total_grad = 0;
  for (int64_t i = 0; i < k; ++i) {
    total_weight += weights[i];
    total_grad += grad_sums[i] * weights[i];
  }
  if (p.score == RouterScore::kSoftmax) {
    for (int64_t i = 0; i < k; ++i) grad_sums[i] *= weights[i];
    return total_grad;
  }
  for (int64_t i = 0; i < k; ++i) {
    grad_sums[i] = weights[i] / total_weight * (grad_sums[i] - total_grad / total_weight);
  }
  return total_grad * Acc(0);
}

template <typename T>
void router_backward_tokens(const RouterBackwardParams& p, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t k = p.num_experts_per_token;
  AxisGradient<Acc> x(p.num_rows), y(p.num_cols);
  PairGradients<Acc> pairs(k);
  for (int64_t t = begin; t < end; ++t) {
    T* grad_x = static_cast<T*>(p.grad_logits_x) + t * p.num_rows;
    T* grad_y = static_cast<T*>(p.grad_logits_y) + t * p.num_cols;
    const int32_t* ids = p.indices + t * k;
    if (std::any_of(ids, ids + k, [](int32_t id) { return id < 0; })) {
      std::memset(grad_x, 0, p.num_rows * sizeof(T));
      std::memset(grad_y, 0, p.num_cols * sizeof(T));
      continue;
    }
    for (int64_t i = 0; i < k; ++i) {
      const int32_t id = ids[i];
      pairs.rows[i] = static_cast<int32_t>(id / p.num_cols);
      pairs.cols[i] = static_cast<int32_t>(id % p.num_cols);
    }
    // 1. The gradient of each chosen sum.
    if (p.score != RouterScore::kLogit) {
      x.load_log_softmax(static_cast<const T*>(p.logits_x) + t * p.num_rows);
      y.load_log_softmax(static_cast<const T*>(p.logits_y) + t * p.num_cols);
    }
    const Acc softmax_factor =
        grad_of_sums(p, x, y, static_cast<const T*>(p.grad_weights) + t * k, pairs);

    // 2. What the softmax takes away from every logit: for kSoftmaxTopK nothing, but the factor 0
    // is
    //    NaN for a token one of whose two softmaxes is, and so are then all its gradients.
    for (AxisGradient<Acc>* axis : {&x, &y}) {
      if (p.score == RouterScore::kLogit) {
        std::fill(axis->grad.begin(), axis->grad.end(), Acc(0));
        continue;
      }
      for (size_t i = 0; i < axis->grad.size(); i += kLanes<Acc>) {
        store(axis->grad.data() + i, load(axis->softmax.data() + i) * -softmax_factor);
      }
    }

    // 3. What the chosen sums add to theirs.
    for (int64_t i = 0; i < k; ++i) {
      x.grad[pairs.rows[i]] += pairs.grad_sums[i];
      y.grad[pairs.cols[i]] += pairs.grad_sums[i];
    }
    narrow(x.grad.data(), grad_x, p.num_rows);
    narrow(y.grad.data(), grad_y, p.num_cols);
  }
}

}  // namespace

void router_backward(const RouterBackwardParams& params, const Executor& executor) {
  constexpr int64_t kGrain = 16;  // as in the forward pass
  dispatch_dtype(params.dtype, [&](auto value) {
    executor.parallel_for(0, params.num_tokens, kGrain, [&](int64_t begin, int64_t end) {
      router_backward_tokens<typename decltype(value)::type>(params, begin, end);
    });
  });
}

}  // namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY
