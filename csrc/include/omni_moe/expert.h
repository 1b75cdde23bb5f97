// Atomic experts:
//   out[t] = addend[t] + Σ_k act(hidden[t] · up[idx[t,k]]) * routing[t,k] * down[idx[t,k]].
#pragma once

#include <cstddef>

#include "omni_moe/types.h"

namespace omni_moe {

// What every pass over the experts is told of its operands.
struct ExpertShape {
  int64_t num_tokens;             // T
  int64_t hidden_size;            // H
  int64_t num_experts;            // E
  int64_t num_experts_per_token;  // K
  DType dtype;
  IndexType index_type;
  Activation activation;
  // C, where experts are the cells row * C + col of a grid, E = R * C, and a token's ids are those
  // of a router over rows and columns; 0: no grid. Any ids are right, but a strategy may rely on
  // the grid for its speed.
  int64_t num_cols = 0;
};

// The backward wants the pre-activations s = hidden[t] · up[i] again. Indices must lie in [0, E):
// the torch boundary checks them for the CPU backend, the kernels of the CUDA backend themselves.
struct ExpertForwardParams : ExpertShape {
  const void* hidden_states = nullptr;    // [T, H]
  const void* up_weights = nullptr;       // [E, H]
  const void* down_weights = nullptr;     // [E, H]
  const void* routing_weights = nullptr;  // [T, K]
  const void* indices = nullptr;          // [T, K], of index_type
  const void* addend = nullptr;           // [T, H], or null: none
  void* expert_states = nullptr;          // [T, H]
  void* pre_activations = nullptr;        // [T, K] s in fp32 (fp64 for fp64), or null: not wanted
  void* workspace = nullptr;              // CUDA: plan.workspace_bytes bytes; CPU: unused
};

// With s of the forward and g = grad[t] · down[i] for each pair (t, k), i = idx[t,k]:
//   grad_routing[t,k] = act(s) g     grad_hidden[t] = addend[t] + Σ_k routing act'(s) g up[i]
//   grad_down[i] += routing act(s) grad[t]     grad_up[i] += routing act'(s) g hidden[t]
// Every row of the dense weight gradients is written once, those of idle experts with zeros.
struct ExpertBackwardParams : ExpertShape {
  const void* grad_expert_states = nullptr;  // [T, H]
  const void* hidden_states = nullptr;       // [T, H]
  const void* up_weights = nullptr;          // [E, H]
  const void* down_weights = nullptr;        // [E, H]
  const void* routing_weights = nullptr;     // [T, K]
  const void* indices = nullptr;             // [T, K], of index_type
  const void* pre_activations = nullptr;     // [T, K] s, as the forward saved them
  const void* addend = nullptr;              // [T, H] of grad_hidden_states, or null: none
  void* grad_hidden_states = nullptr;        // [T, H], or null: not wanted
  void* grad_up_weights = nullptr;           // [E, H], or null: not wanted
  void* grad_down_weights = nullptr;         // [E, H], or null: not wanted
  void* grad_routing_weights = nullptr;      // [T, K], or null: not wanted
  // CUDA: plan.workspace_bytes bytes; CPU: expert_backward_workspace_size(params) bytes
  void* workspace = nullptr;
};

}  // namespace omni_moe
