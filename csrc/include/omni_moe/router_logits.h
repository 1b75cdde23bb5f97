// The router's logits in one pass: both gates and the BatchNorm behind them.
#pragma once

#include "omni_moe/batch_norm.h"

namespace omni_moe {

// BatchNorm, as the base says, of logits = hidden_states [gate_x; gate_y]ᵀ; `logits` and
// `logits_stride` are not read. Operands are dense, row-major and of `dtype`. Sums are in fp32, and
// the products are not rounded before they are normalised.
struct RouterLogitsForwardParams : BatchNormForwardParams {
  const void* hidden_states = nullptr;  // [T, H]
  const void* gate_x = nullptr;         // [R, H]
  const void* gate_y = nullptr;         // [C, H]
  int64_t hidden_size = 0;
};

}  // namespace omni_moe
