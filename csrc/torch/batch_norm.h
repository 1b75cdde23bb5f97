// What the ops with a BatchNorm of both axes share.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "checks.h"
#include "omni_moe/batch_norm.h"

namespace omni_moe::torch_api {

// The buffers and options of these ops.
struct BatchNormOptions {
  BatchNormBufferArguments x, y;
  bool training;
  double momentum;
  double eps;
};

// What a BatchNorm makes of T tokens.
struct Normed {
  at::Tensor x;        // (T, R)
  at::Tensor y;        // (T, C)
  at::Tensor inv_std;  // (R + C), or undefined: not wanted
};

// The ops' arguments have been checked. Raises where a buffer is not dense; counts up the versions
// of those that will be written.
void prepare_buffers(const char* op, const BatchNormOptions& options);

// Parameters with everything but logits and outputs.
BatchNormForwardParams parameters_of(const at::Tensor& like, int64_t num_tokens, int64_t num_rows,
                                     int64_t num_cols, const BatchNormOptions& options);

// The outputs, of which the parameters are told.
Normed allocate_normed(const at::Tensor& like, bool want_inv_std, BatchNormForwardParams* params);

// Of logits (T, R + C); their buffers are prepared.
Normed normalise(const at::Tensor& logits, int64_t num_rows, const BatchNormOptions& options,
                 bool want_inv_std);

// The gradient of the logits (T, R + C).
at::Tensor normalise_backward(const at::Tensor& grad_normed_x, const at::Tensor& grad_normed_y,
                              const at::Tensor& normed_x, const at::Tensor& normed_y,
                              const at::Tensor& inv_std, bool training);

}  // namespace omni_moe::torch_api
