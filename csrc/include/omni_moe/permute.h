// Tokens into expert order and back. Each pair of a token and an expert has a row; the rows of one
// expert lie together. With K pairs a token and `row_id_map` their rows:
//   permute      rows[row_id_map[t, k]] = tokens[t]
//   un-permute   tokens[t] = Σ_k weights[t, k] rows[row_id_map[t, k]]
// A pair of row -1 (a masked token, a pair past its expert's capacity) is left out of both.
#pragma once

#include "omni_moe/types.h"

namespace omni_moe {

// row_id_map[p] = first row of the pair's expert + its place in the expert's queue. Rows lie one
// expert after the other without gaps, or, with a capacity, each expert has that many.
struct ExpertRowsParams {
  const int32_t* indices = nullptr;  // [P] in [-1, E)
  const int32_t* slots = nullptr;    // [P] places in the queues (-1: none), or null: in order
  int32_t* row_id_map = nullptr;     // [P]
  int32_t* expert_ends = nullptr;    // [E] the row behind the last of each expert
  int64_t num_pairs = 0;             // below 2^31
  int64_t num_experts = 0;
  int64_t capacity = -1;      // rows of each expert, or -1: as many as it has pairs
  void* workspace = nullptr;  // CUDA: plan.workspace_bytes bytes; CPU: unused
};

struct PermuteShape {
  int64_t num_tokens;
  int64_t num_rows;
  int64_t hidden_size;
  int64_t num_experts_per_token;
  int64_t num_experts;
  bool is_padded;  // each expert has num_rows / num_experts rows
  DType dtype;
  bool has_wide_weights;  // weights are in fp32 (fp64 for kFloat64), else in dtype
};

// Rows that no pair has are zeros: those from expert_ends of their expert on, or of the last expert
// where rows are not padded.
struct PermuteParams : PermuteShape {
  const void* tokens = nullptr;          // [T, H]
  const int32_t* row_id_map = nullptr;   // [T, K] in [-1, N), no row twice
  const int32_t* expert_ends = nullptr;  // [E]
  const void* weights = nullptr;         // [T, K] that multiply the rows, or null: ones
  void* rows = nullptr;                  // [N, H]
  void* workspace = nullptr;             // unused
};

struct UnpermuteParams : PermuteShape {
  const void* rows = nullptr;           // [N, H]
  const int32_t* row_id_map = nullptr;  // [T, K] in [-1, N)
  const void* weights = nullptr;        // [T, K], or null: ones
  void* tokens = nullptr;               // [T, H]
  void* workspace = nullptr;            // unused
};

// grad_rows[row of (t, k)] = weights[t, k] grad_tokens[t], zeros as PermuteParams has them;
// grad_weights[t, k] = grad_tokens[t] · rows[row of (t, k)], 0 for pairs without a row.
struct UnpermuteBackwardParams : PermuteShape {
  const void* grad_tokens = nullptr;     // [T, H]
  const void* rows = nullptr;            // [N, H]
  const void* weights = nullptr;         // [T, K]
  const int32_t* row_id_map = nullptr;   // [T, K] in [-1, N), no row twice
  const int32_t* expert_ends = nullptr;  // [E]
  void* grad_rows = nullptr;             // [N, H], or null: not wanted
  void* grad_weights = nullptr;          // [T, K] in the dtype of the weights
  void* workspace = nullptr;             // unused
};

}  // namespace omni_moe
