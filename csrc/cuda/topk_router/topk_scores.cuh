// The scores of the top-k router and their derivatives, and the softmax of a token's logits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/expert_id.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/router/router_keys.cuh"
#include "omni_moe/topk_router.h"

namespace omni_moe::cuda {

// Where log(1 + exp(x)) is exp(x) to the last bit.
inline constexpr float kFarBelow = -18.0f;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// sqrt(log(1 + exp(x))). Far below zero it is exp(x / 2), since exp(x) would underflow.
__device__ __forceinline__ float sqrt_softplus(float x) {
  if (x < kFarBelow) return expf(0.5f * x);
  return sqrtf(fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))));
}

// The score of a logit, unless of a softmax, and its derivative.
__device__ __forceinline__ float score_of(ScoringFunction function, float x) {
  return function == ScoringFunction::kSigmoid ? sigmoid(x) : sqrt_softplus(x);
}
__device__ __forceinline__ float score_slope(ScoringFunction function, float x) {
  if (function == ScoringFunction::kSigmoid) {
    const float e = expf(-fabsf(x));  // of the smaller side, so that no digits cancel
    return e / ((1.0f + e) * (1.0f + e));
  }
  // sigmoid(x) / (2 score), which far below zero is half the score.
  const float score = sqrt_softplus(x);
  return x < kFarBelow ? 0.5f * score : sigmoid(x) / (2.0f * score);
}

// exp(logit - max) / sum; NaN where any logit of the token is NaN or +inf, or all are -inf.
struct SoftmaxOfToken {
  float max = 0.0f;
  float sum = 1.0f;
  bool is_nan = false;

  __device__ float operator()(float logit) const { return expf(logit - max) / sum; }
};

// What is written for a chosen expert, before the division by the token's sum and the scaling.
__device__ __forceinline__ float raw_weight(const TopKRouterShape& shape,
                                            const SoftmaxOfToken& softmax, float logit,
                                            float max_chosen) {
  if (shape.scoring_func != ScoringFunction::kSoftmax) return score_of(shape.scoring_func, logit);
  if (softmax.is_nan) return value_of_key(kKeyOfNaN);
  // The softmax of the chosen alone is their share in that of all, and cannot underflow.
  return shape.norm_topk_prob ? expf(logit - max_chosen) : softmax(logit);
}

// The factor of the raw weights of a token whose sum is `sum`.
__device__ __forceinline__ float weight_scale(const TopKRouterShape& shape, float sum) {
  const auto scale = static_cast<float>(shape.routed_scaling_factor);
  if (!shape.norm_topk_prob) return scale;
  const float epsilon =
      shape.scoring_func == ScoringFunction::kSoftmax ? 0.0f : static_cast<float>(kNormEpsilon);
  return scale / (sum + epsilon);
}

// ---- The two best of a group --------------------------------------------------------------------

struct TopTwo {
  uint32_t best = 0;  // keys; 0: none
  uint32_t second = 0;

  __device__ void add(uint32_t key) {
    second = max(second, min(best, key));
    best = max(best, key);
  }
  __device__ uint32_t group_key(GroupScore score) const {
    const float value = value_of_key(best);
    const bool is_sum = score == GroupScore::kTop2Sum && second != 0;
    return ordered_key(is_sum ? value + value_of_key(second) : value);
  }
};

}  // namespace omni_moe::cuda
