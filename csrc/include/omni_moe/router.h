// Cartesian-product router: the K best of the R × C sums x[row] + y[col], id = row * C + col.
#pragma once

#include "omni_moe/types.h"

namespace omni_moe {

// What is written for a chosen pair whose logits sum to s.
enum class RouterScore : int8_t {
  kLogit,        // s itself
  kSoftmax,      // exp(log_softmax(x)[row] + log_softmax(y)[col])
  kSoftmaxTopK,  // the same, divided by its sum over the K chosen pairs
};

// Order: descending s, compared in fp32 (fp64 for kFloat64); equal s by ascending id; NaN first.
// Unless `sorted`, the same K pairs come in an order that is free, but the same on every run.
// Sums of finite logits that overflow keep their order: beside such logits all sums are compared as
// halves.
// Where a log_softmax is NaN (a NaN or +inf logit, or all logits -inf) every weight of that token
// is NaN and its ids are 0 … K-1.
// A masked token has the ids -1 and the weights 0.
struct RouterForwardParams {
  const void* logits_x;  // [T, R]
  const void* logits_y;  // [T, C]
  void* weights;         // [T, K] scores or routing weights, in the dtype of the logits
  int32_t* indices;      // [T, K]
  int64_t num_tokens;
  int64_t num_rows;
  int64_t num_cols;
  int64_t num_experts_per_token;  // 0 <= K <= R * C < 2^31
  DType dtype;
  RouterScore score;
  const bool* token_mask = nullptr;  // [T] false: masked; or null: none is
  void* workspace = nullptr;         // CUDA: plan.workspace_bytes bytes; CPU: unused
  bool sorted = true;
};

// kLogit: grad_x[row] = Σ grad_weights over the chosen pairs in that row, grad_y likewise.
// kSoftmax, kSoftmaxTopK: through the softmax, recomputed from the logits.
// A token whose ids are -1 has chosen nothing and gets zeros, whatever its logits.
struct RouterBackwardParams {
  const void* grad_weights;        // [T, K]
  const void* logits_x = nullptr;  // [T, R], unused (may be null) for kLogit
  const void* logits_y = nullptr;  // [T, C], unused (may be null) for kLogit
  const int32_t* indices;          // [T, K], a token's all -1 or none of them
  void* grad_logits_x;             // [T, R]
  void* grad_logits_y;             // [T, C]
  int64_t num_tokens;
  int64_t num_rows;
  int64_t num_cols;
  int64_t num_experts_per_token;
  DType dtype;
  RouterScore score;
  void* workspace = nullptr;  // CUDA: plan.workspace_bytes bytes; CPU: unused
};

}  // namespace omni_moe
