// Gradient of the Cartesian-product router on the CPU, token by token, no atomics.
//
// kLogit: grad_x[row] = Σ grad over the chosen pairs in that row. kSoftmax: with w =
// exp(log_softmax) and u = grad * w, grad_x[row] = Σ u in that row - softmax(x)[row] Σ u.
// kSoftmaxTopK: with w the softmax over the K chosen sums, grad_x[row] = Σ w (grad - Σ grad w) in
// that row; the log-sum-exps cancel.
#include <algorithm>
#include <limits>
#include <vector>

#include "activation.h"
#include "omni_moe/cpu.h"

namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY {

namespace {

// One axis of one token: its logits and its gradient.
template <typename Acc>
struct AxisGradient {
  std::vector<Acc> logits, softmax, grad;

  explicit AxisGradient(int64_t n) : logits(n), softmax(n), grad(n) {}

  // Reads the logits and replaces them by log_softmax; NaN where torch.log_softmax gives NaN.
  template <typename T>
  void load_log_softmax(const T* source) {
    const auto n = static_cast<int64_t>(logits.size());
    Acc largest = -std::numeric_limits<Acc>::infinity();
    widen(source, logits.data(), n);
    for (const Acc logit : logits) largest = std::max(largest, logit);
    Acc total = 0;
    for (int64_t i = 0; i < n; ++i) {
      softmax[i] = std::exp(logits[i] - largest);
      total += softmax[i];
    }
    const Acc log_total = std::log(total);
    for (int64_t i = 0; i < n; ++i) {
      logits[i] = (logits[i] - largest) - log_total;
      softmax[i] /= total;
    }
  }
};

// Turns grad_weights of one token into the gradient of the K chosen sums, and returns the factor of
// the softmax that each axis subtracts.
template <typename Acc, typename T>
Acc grad_of_sums(const RouterBackwardParams& p, const AxisGradient<Acc>& x,
                 const AxisGradient<Acc>& y, const T* grad_weights, const int32_t* indices,
                 std::vector<Acc>& weights, std::vector<Acc>& grad_sums) {
  const int64_t k = p.num_experts_per_token;
  widen(grad_weights, grad_sums.data(), k);
  if (p.score == RouterScore::kLogit) return Acc(0);

  for (int64_t i = 0; i < k; ++i) {
    weights[i] = std::exp(x.logits[indices[i] / p.num_cols] + y.logits[indices[i] % p.num_cols]);
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
  return Acc(0);
}

template <typename T>
void router_backward_tokens(const RouterBackwardParams& p, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t k = p.num_experts_per_token;
  AxisGradient<Acc> x(p.num_rows), y(p.num_cols);
  std::vector<Acc> weights(k), grad_sums(k);
  for (int64_t t = begin; t < end; ++t) {
    const int32_t* indices = p.indices + t * k;
    // 1. The gradient of each chosen sum.
    if (p.score != RouterScore::kLogit) {
      x.load_log_softmax(static_cast<const T*>(p.logits_x) + t * p.num_rows);
      y.load_log_softmax(static_cast<const T*>(p.logits_y) + t * p.num_cols);
    }
    const Acc softmax_factor = grad_of_sums(p, x, y, static_cast<const T*>(p.grad_weights) + t * k,
                                            indices, weights, grad_sums);

    // 2. What the softmax takes away from every logit: for kSoftmaxTopK nothing, but NaN * 0 keeps
    //    the NaN of a token whose softmax has one.
    if (p.score != RouterScore::kLogit) {
      for (int64_t r = 0; r < p.num_rows; ++r) x.grad[r] = -softmax_factor * x.softmax[r];
      for (int64_t c = 0; c < p.num_cols; ++c) y.grad[c] = -softmax_factor * y.softmax[c];
    } else {
      std::fill(x.grad.begin(), x.grad.end(), Acc(0));
      std::fill(y.grad.begin(), y.grad.end(), Acc(0));
    }

    // 3. What the chosen sums add to theirs.
    for (int64_t i = 0; i < k; ++i) {
      x.grad[indices[i] / p.num_cols] += grad_sums[i];
      y.grad[indices[i] % p.num_cols] += grad_sums[i];
    }
    narrow(x.grad.data(), static_cast<T*>(p.grad_logits_x) + t * p.num_rows, p.num_rows);
    narrow(y.grad.data(), static_cast<T*>(p.grad_logits_y) + t * p.num_cols, p.num_cols);
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
