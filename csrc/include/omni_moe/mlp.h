// The shared MLP up to its down product: act(gate) * up elementwise for products that are GEMMs of
// the caller's (ATen in csrc/torch/mlp.cpp), or fused with the gate and up products where a backend
// has a kernel for that.
#pragma once

#include "omni_moe/types.h"

namespace omni_moe {

// gate and up may be the two halves of one [T, 2I] product, hence the row strides (in elements).
struct GatedActivationForwardParams {
  const void* gate;  // [T, I], rows gate_stride apart
  const void* up;    // [T, I], rows up_stride apart
  void* activated;   // [T, I] act(gate) * up
  int64_t num_tokens;
  int64_t intermediate_size;
  int64_t gate_stride;
  int64_t up_stride;
  DType dtype;
  Activation activation;
};

// grad_gate = grad * up * act'(gate), grad_up = grad * act(gate).
// An output may be the same memory as an input of the same row stride: at each position all inputs
// are read before an output is written.
struct GatedActivationBackwardParams {
  const void* grad_activated;  // [T, I]
  const void* gate;            // [T, I], rows gate_stride apart
  const void* up;              // [T, I], rows up_stride apart
  void* grad_gate;             // [T, I], rows grad_gate_stride apart
  void* grad_up;               // [T, I], rows grad_up_stride apart
  void* activated;             // [T, I] act(gate) * up again, or null: not wanted
  int64_t num_tokens;
  int64_t intermediate_size;
  int64_t gate_stride;
  int64_t up_stride;
  int64_t grad_gate_stride;
  int64_t grad_up_stride;
  DType dtype;
  Activation activation;
};

// activated = act(x gate_weightᵀ) * (x up_weightᵀ), all operands dense and row-major. Sums and the
// activation are in fp32 and each output is rounded once. An output may be null: not wanted.
struct GatedLinearForwardParams {
  const void* x;            // [T, H]
  const void* gate_weight;  // [I, H]
  const void* up_weight;    // [I, H]
  void* activated;          // [T, I], or null
  void* gate;               // [T, I] x gate_weightᵀ, or null
  void* up;                 // [T, I] x up_weightᵀ, or null
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t intermediate_size;
  DType dtype;
  Activation activation;
};

// The gradient through the down product and the gated activation, all operands dense and row-major:
//   grad_activated = grad_output down_weight                                [T, I], never written
//   grad_gate = grad_activated * up * act'(gate),  grad_up = grad_activated * act(gate)
// Sums and the activation are in fp32. grad_activated is rounded to the dtype, as the product alone
// would be, and each output once. An output may be the same memory as gate or as up: at each
// position both are read before an output is written.
struct GatedLinearBackwardParams {
  const void* grad_output;  // [T, H]
  const void* down_weight;  // [H, I]
  const void* gate;         // [T, I]
  const void* up;           // [T, I]
  void* grad_gate;          // [T, I]
  void* grad_up;            // [T, I]
  void* activated;          // [T, I] act(gate) * up again, or null: not wanted
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t intermediate_size;
  DType dtype;
  Activation activation;
};

}  // namespace omni_moe
