// Top-k router over E independent logits: scores, the choice of K experts per token, their routing
// weights, and how often each expert was chosen.
#pragma once

#include "omni_moe/types.h"

namespace omni_moe {

// score(x) of a token's logits.
enum class ScoringFunction : int8_t {
  kSoftmax,       // over the token's E logits
  kSigmoid,       // 1 / (1 + exp(-x))
  kSqrtSoftplus,  // sqrt(log(1 + exp(x)))
};

// What a group of experts is worth in the choice of groups.
enum class GroupScore : int8_t {
  kTop2Sum,  // the sum of its two best scores, bias included
  kMax,      // its best score, bias included
};

// What forward and backward share.
struct TopKRouterShape {
  int64_t num_tokens;
  int64_t num_experts;
  int64_t num_experts_per_token;  // 0 <= K <= topk_group * E / n_group
  DType dtype;
  ScoringFunction scoring_func;
  bool norm_topk_prob;
  double routed_scaling_factor;
};

// Added to the sum by which scores are divided, unless they are those of a softmax.
inline constexpr double kNormEpsilon = 1e-20;

// weight = routed_scaling_factor * score, with norm_topk_prob divided by the token's sum of the
// chosen scores. Chosen are, of the topk_group best of n_group groups of E / n_group neighbouring
// experts, the K experts of the greatest score + bias: descending, equal ones by ascending id, NaN
// first. Without a bias that is the order of the logits, which are compared as they are.
// Where a softmax is NaN (a NaN or +inf logit, or all of them -inf) every weight of the token is
// NaN, and equal scores give the ids 0 … K-1.
// A masked token has the ids -1 and the weights 0.
struct TopKRouterForwardParams : TopKRouterShape {
  const void* logits = nullptr;         // [T, E]
  const void* bias = nullptr;           // [E] fp32 (fp64 for kFloat64), or null
  const bool* token_mask = nullptr;     // [T] false: masked; or null: none is
  const int32_t* replay_ids = nullptr;  // [T, K] in [-1, E): the choice, or null: to be made
  void* weights = nullptr;              // [T, K] in the dtype of the logits
  int32_t* indices = nullptr;           // [T, K]
  int64_t* expert_counts = nullptr;     // [E] pairs of each expert
  int64_t n_group = 1;                  // divides E
  int64_t topk_group = 1;               // 1 … n_group
  GroupScore group_score = GroupScore::kTop2Sum;
  void* workspace = nullptr;  // CUDA: plan.workspace_bytes bytes; CPU: unused
};

// The gradient of the logits, through the scores of the chosen experts alone: the choice has none.
// Pairs of id -1 contribute nothing, and a token of nothing else gets zeros.
struct TopKRouterBackwardParams : TopKRouterShape {
  const void* grad_weights = nullptr;  // [T, K]
  const void* logits = nullptr;        // [T, E]
  const int32_t* indices = nullptr;    // [T, K] in [-1, E)
  void* grad_logits = nullptr;         // [T, E]
};

// slots[p] = the number of pairs before p with the same expert, where that is less than the
// capacity; else, and where the id is -1, it is -1.
struct ExpertSlotsParams {
  const int32_t* indices;  // [P] in [-1, E)
  int32_t* slots;          // [P]
  int64_t num_pairs;       // below 2^31
  int64_t num_experts;
  int64_t capacity;
  void* workspace = nullptr;  // CUDA: plan.workspace_bytes bytes; CPU: unused
};

}  // namespace omni_moe
