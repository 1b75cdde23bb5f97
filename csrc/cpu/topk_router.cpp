// Top-k router on the CPU, token by token: scores, groups, choice, weights. O(E + K log K) a token.
#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "omni_moe/cpu.h"
#include "select.h"
#include "topk_scores.h"

namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY {

namespace {

template <typename Acc>
constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
template <typename Acc>
constexpr Acc kNaN = std::numeric_limits<Acc>::quiet_NaN();

template <typename T>
class TokenRouter {
 public:
  using Acc = acc_t<T>;

  explicit TokenRouter(const TopKRouterForwardParams& params)
      : p_(params),
        bias_(static_cast<const Acc*>(params.bias)),
        group_size_(params.num_experts / params.n_group),
        chooses_groups_(params.topk_group < params.n_group),
        logits_(whole_vectors<Acc>(params.num_experts), -kInfinity<Acc>),
        choice_scores_(logits_.size()),
        keys_(logits_.size()),
        group_values_(params.n_group),
        groups_(params.n_group),
        order_(params.num_experts),
        selector_(params.num_experts),
        weights_(params.num_experts_per_token) {}

  void route(int64_t t) {
    const int64_t k = p_.num_experts_per_token;
    int32_t* ids = p_.indices + t * k;
    T* weights = static_cast<T*>(p_.weights) + t * k;
    if (p_.token_mask != nullptr && !p_.token_mask[t]) {
      for (int64_t i = 0; i < k; ++i) {
        ids[i] = -1;
        store_scalar(weights + i, Acc(0));
      }
      return;
    }
    widen(static_cast<const T*>(p_.logits) + t * p_.num_experts, logits_.data(), p_.num_experts);
    if (is_softmax()) softmax_ = Softmax<Acc>(logits_);
    if (p_.replay_ids != nullptr) {
      std::copy_n(p_.replay_ids + t * k, k, ids);
    } else {
      choose(ids);
    }
    weigh(ids);
    for (int64_t i = 0; i < k; ++i) store_scalar(weights + i, weights_[i]);
  }

 private:
  bool is_softmax() const { return p_.scoring_func == ScoringFunction::kSoftmax; }

  // ---- Choice ----

  void choose(int32_t* ids) {
    const int64_t k = p_.num_experts_per_token;
    const bool sums_scores = chooses_groups_ && p_.group_score == GroupScore::kTop2Sum;
    const bool all_nan = is_softmax() && softmax_.is_nan();
    if (bias_ != nullptr || sums_scores || all_nan) fill_choice_scores();
    // Where nothing is added to them, scores are in the order of their logits, which has no ties
    // but those of equal logits.
    const std::vector<Acc>& values = bias_ == nullptr && !all_nan ? logits_ : choice_scores_;
    if (!chooses_groups_) {
      std::iota(groups_.begin(), groups_.end(), 0);
    } else {
      choose_groups(sums_scores ? choice_scores_ : values);
    }
    // Keys of the experts of the kept groups, side by side.
    int64_t n = 0;
    for (int64_t i = 0; i < p_.topk_group; ++i) {
      const Acc* group = values.data() + groups_[i] * group_size_;
      for (int64_t e = 0; e < group_size_; ++e) keys_[n++] = to_key<Acc>(group[e]);
    }
    std::fill(keys_.begin() + n, keys_.begin() + whole_vectors<Acc>(n), kNoKey<Acc>);
    selector_.best(keys_.data(), n, k, order_.data());
    for (int64_t i = 0; i < k; ++i) {
      const int64_t position = order_[i];
      ids[i] = static_cast<int32_t>(groups_[position / group_size_] * group_size_ +
                                    position % group_size_);
    }
  }

  // The scores of all experts, and the bias.
  void fill_choice_scores() {
    for (size_t i = 0; i < logits_.size(); i += kLanes<Acc>) {
      const Vec<Acc> values = load(logits_.data() + i);
      store(choice_scores_.data() + i,
            is_softmax() ? softmax_(values) : scores_of<Acc>(p_.scoring_func, values));
    }
    if (bias_ == nullptr) return;
    for (int64_t e = 0; e < p_.num_experts; ++e) choice_scores_[e] += bias_[e];
  }

  // groups_[0, topk_group) = the best groups, by ascending id.
  void choose_groups(const std::vector<Acc>& values) {
    for (int64_t g = 0; g < p_.n_group; ++g) {
      group_values_[g] = to_key<Acc>(group_value(values.data() + g * group_size_));
    }
    std::iota(groups_.begin(), groups_.end(), 0);
    std::stable_sort(groups_.begin(), groups_.end(),
                     [&](int64_t a, int64_t b) { return group_values_[a] > group_values_[b]; });
    std::sort(groups_.begin(), groups_.begin() + p_.topk_group);
  }

  Acc group_value(const Acc* values) const {
    Key<Acc> best = kNoKey<Acc>, second = kNoKey<Acc>;
    for (int64_t e = 0; e < group_size_; ++e) {
      const Key<Acc> key = to_key<Acc>(values[e]);
      second = std::max(second, std::min(best, key));
      best = std::max(best, key);
    }
    const Acc value = from_key<Acc>(best);
    if (p_.group_score == GroupScore::kMax || second == kNoKey<Acc>) return value;
    return value + from_key<Acc>(second);
  }

  // ---- Weights ----

  void weigh(const int32_t* ids) {
    const int64_t k = p_.num_experts_per_token;
    // The softmax of the chosen alone is their share in that of all, and cannot underflow.
    Acc largest = -kInfinity<Acc>;
    for (int64_t i = 0; i < k; ++i) {
      if (ids[i] >= 0) largest = std::max(largest, logits_[ids[i]]);
    }
    Acc sum = is_softmax() ? Acc(0) : Acc(kNormEpsilon);
    for (int64_t i = 0; i < k; ++i) {
      weights_[i] = 0;
      if (ids[i] < 0) continue;
      const Acc logit = logits_[ids[i]];
      weights_[i] = !is_softmax()       ? score_of(p_.scoring_func, logit)
                    : softmax_.is_nan() ? kNaN<Acc>
                    : p_.norm_topk_prob ? std::exp(logit - largest)
                                        : softmax_(logit);
      sum += weights_[i];
    }
    for (int64_t i = 0; i < k; ++i) {
      if (ids[i] < 0) continue;
      if (p_.norm_topk_prob) weights_[i] /= sum;
      weights_[i] *= static_cast<Acc>(p_.routed_scaling_factor);
    }
  }

  const TopKRouterForwardParams& p_;
  const Acc* bias_;
  const int64_t group_size_;
  const bool chooses_groups_;
  std::vector<Acc> logits_, choice_scores_;  // [E], then -inf; then unused lanes
  Softmax<Acc> softmax_;                     // of the logits, for kSoftmax
  std::vector<Key<Acc>> keys_;               // of the experts to choose from
  std::vector<Key<Acc>> group_values_;       // [n_group]
  std::vector<int64_t> groups_;              // [n_group], the kept ones first
  std::vector<int32_t> order_;
  Selector<Acc> selector_;
  std::vector<Acc> weights_;  // [K]
};

}  // namespace

void topk_router_forward(const TopKRouterForwardParams& params, const Executor& executor) {
  std::fill_n(params.expert_counts, params.num_experts, int64_t{0});
  const int64_t num_pairs = params.num_tokens * params.num_experts_per_token;
  if (num_pairs == 0) return;
  constexpr int64_t kGrain = 16;  // as of the Cartesian router
  dispatch_dtype(params.dtype, [&](auto value) {
    executor.parallel_for(0, params.num_tokens, kGrain, [&](int64_t begin, int64_t end) {
      TokenRouter<typename decltype(value)::type> router(params);
      for (int64_t t = begin; t < end; ++t) router.route(t);
    });
  });
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    if (params.indices[pair] >= 0) ++params.expert_counts[params.indices[pair]];
  }
}

}  // namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY
