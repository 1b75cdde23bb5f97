// Norm of each token's logits on their own, both axes of the grid at once, without affine
// parameters: what LayerNorm and RMSNorm make of (T, R) and of (T, C).
#pragma once

#include "omni_moe/types.h"

namespace omni_moe {

enum class TokenNorm : int8_t {
  kLayerNorm,  // (x - mean) / sqrt(mean((x - mean)²) + eps)
  kRmsNorm,    // x / sqrt(mean(x²) + eps)
};

// Means over the R logits of a token's rows, and over the C of its columns.
struct TokenNormForwardParams {
  const void* logits;  // [T, R + C], rows logits_stride apart: of the grid's rows, then columns
  void* normed_x;      // [T, R]
  void* normed_y;      // [T, C]
  void* inv_std;       // [T, 2] 1 / sqrt(… + eps) of both axes in fp32 (fp64 for fp64), or null
  int64_t num_tokens;
  int64_t num_rows;
  int64_t num_cols;
  int64_t logits_stride;
  DType dtype;
  TokenNorm norm;
  double eps;
};

// With n = normed, for each token and axis: grad = inv_std (g - mean(g) - n mean(g n)), means over
// the axis; kRmsNorm leaves mean(g) out.
struct TokenNormBackwardParams {
  const void* grad_x;    // [T, R]
  const void* grad_y;    // [T, C]
  const void* normed_x;  // [T, R]
  const void* normed_y;  // [T, C]
  const void* inv_std;   // [T, 2] of the forward
  void* grad_logits;     // [T, R + C]
  int64_t num_tokens;
  int64_t num_rows;
  int64_t num_cols;
  DType dtype;
  TokenNorm norm;
};

}  // namespace omni_moe
