// What the ops of the router's logits have in common: both gates, one norm or another behind them.
#pragma once

#include <tuple>

#include "ops.h"

namespace omni_moe::torch_api {

// Raises unless hidden_states (T, H), gate_x (R, H) and gate_y (C, H) fit.
void check_gates(const char* op, const Tensor& hidden_states, const Tensor& gate_x,
                 const Tensor& gate_y);

// Raises unless the gradients of the logits and the logits, (T, R) and (T, C), fit the gates as
// well.
void check_logits_of_gates(const char* op, const Tensor& grad_router_logits_x,
                           const Tensor& grad_router_logits_y, const Tensor& hidden_states,
                           const Tensor& gate_x, const Tensor& gate_y,
                           const Tensor& router_logits_x, const Tensor& router_logits_y);

// The products of both gates, (T, R + C).
Tensor gate_products(const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y);

// Empty gradients of hidden_states, (T, H), and of both gates, (R + C, H), where the mask asks for
// them.
std::tuple<Tensor, Tensor> gate_gradients(const Tensor& hidden_states, const Tensor& gate_x,
                                          const Tensor& gate_y, Mask<2> output_mask);

// Fills them from the gradient of the products, (T, R + C).
void fill_gate_gradients(const Tensor& grad_products, const Tensor& hidden_states,
                         const Tensor& gate_x, const Tensor& gate_y, Mask<2> output_mask,
                         Tensor& grad_hidden_states, Tensor& grad_gates);

// Which of the two a node of a graph asks for, whose first inputs are hidden states and gates.
Mask<2> wanted_gate_gradients(AutogradContext* ctx);

// Sets what a node's backward returns for these three inputs.
void return_gate_gradients(AutogradContext* ctx, const std::tuple<Tensor, Tensor>& gradients,
                           const Tensor& gate_x, const Tensor& gate_y, variable_list& input_grads);

}  // namespace omni_moe::torch_api
