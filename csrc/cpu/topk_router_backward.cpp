// Gradient of the top-k router on the CPU, token by token, no atomics.
//
// With c the scaling factor, s the scores of the chosen experts and g the gradient of the weights:
//   w = c s            grad_s = c g
//   w = c s / Σ s      grad_s = c (g - Σ g s / Σ s) / Σ s
// and the gradient of a logit is grad_s times the slope of its score. That of a softmax over all
// experts is c (g p - p Σ g p) for every expert, g being 0 where it is not chosen; that of one over
// the chosen is c q (g - Σ g q) for these alone.
#include <algorithm>
#include <limits>
#include <vector>

#include "omni_moe/cpu.h"
#include "topk_scores.h"

namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY {

namespace {

template <typename T>
class TokenGradient {
 public:
  using Acc = acc_t<T>;

  explicit TokenGradient(const TopKRouterBackwardParams& params)
      : p_(params),
        logits_(whole_vectors<Acc>(params.num_experts), -std::numeric_limits<Acc>::infinity()),
        grad_(logits_.size()) {}

  void run(int64_t t) {
    const int64_t n = p_.num_experts;
    widen(static_cast<const T*>(p_.logits) + t * n, logits_.data(), n);
    std::fill(grad_.begin(), grad_.end(), Acc(0));
    pairs_.clear();
    for (int64_t i = 0; i < p_.num_experts_per_token; ++i) {
      const int64_t pair = t * p_.num_experts_per_token + i;
      if (p_.indices[pair] < 0) continue;
      const Acc grad = load_scalar(static_cast<const T*>(p_.grad_weights) + pair) *
                       static_cast<Acc>(p_.routed_scaling_factor);
      pairs_.push_back({p_.indices[pair], logits_[p_.indices[pair]], grad, 0});
    }
    if (!pairs_.empty()) {
      p_.scoring_func == ScoringFunction::kSoftmax ? through_softmax() : through_scores();
    }
    narrow(grad_.data(), static_cast<T*>(p_.grad_logits) + t * n, n);
  }

 private:
  struct Pair {
    int32_t id;
    Acc logit, grad, score;
  };

  void through_scores() {
    Acc sum = Acc(kNormEpsilon), weighted = 0;
    for (Pair& pair : pairs_) {
      pair.score = score_of(p_.scoring_func, pair.logit);
      sum += pair.score;
      weighted += pair.grad * pair.score;
    }
    for (const Pair& pair : pairs_) {
      const Acc grad = p_.norm_topk_prob ? (pair.grad - weighted / sum) / sum : pair.grad;
      grad_[pair.id] += grad * score_slope(p_.scoring_func, pair.logit);
    }
  }

  void through_softmax() {
    const Softmax<Acc> softmax(logits_);
    if (softmax.is_nan()) {
      std::fill(grad_.begin(), grad_.end(), std::numeric_limits<Acc>::quiet_NaN());
      return;
    }
    Acc largest = -std::numeric_limits<Acc>::infinity();
    for (const Pair& pair : pairs_) largest = std::max(largest, pair.logit);
    Acc sum = 0, weighted = 0;
    for (Pair& pair : pairs_) {
      pair.score = p_.norm_topk_prob ? std::exp(pair.logit - largest) : softmax(pair.logit);
      sum += pair.score;
      weighted += pair.grad * pair.score;
    }
    if (p_.norm_topk_prob) {
      for (const Pair& pair : pairs_) {
        grad_[pair.id] += pair.score / sum * (pair.grad - weighted / sum);
      }
      return;
    }
    for (size_t i = 0; i < grad_.size(); i += kLanes<Acc>) {
      store(grad_.data() + i, softmax(load(logits_.data() + i)) * -weighted);
    }
    for (const Pair& pair : pairs_) grad_[pair.id] += pair.grad * pair.score;
  }

  const TopKRouterBackwardParams& p_;
  std::vector<Acc> logits_, grad_;  // [E], then -inf; then unused lanes
  std::vector<Pair> pairs_;
};

}  // namespace

void topk_router_backward(const TopKRouterBackwardParams& params, const Executor& executor) {
  constexpr int64_t kGrain = 16;  // as in the forward pass
  dispatch_dtype(params.dtype, [&](auto value) {
    executor.parallel_for(0, params.num_tokens, kGrain, [&](int64_t begin, int64_t end) {
      TokenGradient<typename decltype(value)::type> gradient(params);
      for (int64_t t = begin; t < end; ++t) gradient.run(t);
    });
  });
}

}  // namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY
