// BatchNorm of the router's logits, both axes of the grid at once, without affine parameters:
// normed = (logits - mean) / sqrt(var + eps), mean and variance of each column over the T tokens.
#pragma once

#include "omni_moe/types.h"

namespace omni_moe {

// What a BatchNorm of n columns carries from batch to batch.
struct BatchNormBuffers {
  void* running_mean = nullptr;            // [n] of stats_dtype, or null: none
  void* running_var = nullptr;             // [n] of stats_dtype, or null: none
  int64_t* num_batches_tracked = nullptr;  // [] or null: none
};

// training: mean and (biased) variance are those of the batch, and the buffers are updated:
//   running_mean += momentum (mean - running_mean), running_var likewise with the unbiased
//   variance, num_batches_tracked += 1.
// One token has no unbiased variance: it leaves the running statistics as they are, as none does,
// and its logits are 0; the torch boundary refuses it where there is no mask. Else: mean and
// variance are the running ones, nothing is updated.
// In training a token that token_mask leaves out takes no part: the batch is that of the others.
// Its logits are 0. Outside training the mask is not read.
struct BatchNormForwardParams {
  const void* logits =
      nullptr;         // [T, R + C], rows logits_stride apart: of the grid's rows, then columns
  void* normed_x;      // [T, R]
  void* normed_y;      // [T, C]
  void* inv_std;       // [R + C] 1 / sqrt(var + eps) in fp32 (fp64 for fp64), or null: not wanted
  BatchNormBuffers x;  // of the R columns
  BatchNormBuffers y;  // of the C columns
  int64_t num_tokens;
  int64_t num_rows;
  int64_t num_cols;
  int64_t logits_stride = 0;
  DType dtype;
  DType stats_dtype;  // dtype, or kFloat32
  bool training;
  double momentum;
  double eps;
  const bool* token_mask = nullptr;  // [T] false: left out; or null: none is
  void* workspace = nullptr;         // CUDA: plan.workspace_bytes bytes; CPU: unused
};

// With n = normed, for each column: training: grad = inv_std (g - mean(g) - n mean(g n)), means
// over the tokens of the batch, and 0 for those left out; else grad = inv_std g.
struct BatchNormBackwardParams {
  const void* grad_x;    // [T, R]
  const void* grad_y;    // [T, C]
  const void* normed_x;  // [T, R]
  const void* normed_y;  // [T, C]
  const void* inv_std;   // [R + C] of the forward
  void* grad_logits;     // [T, R + C]
  int64_t num_tokens;
  int64_t num_rows;
  int64_t num_cols;
  DType dtype;
  bool training;
  const bool* token_mask = nullptr;  // [T], as in the forward
  void* workspace = nullptr;         // CUDA: plan.workspace_bytes bytes; CPU: unused
};

}  // namespace omni_moe
