#include "router_gates.h"

#include "checks.h"

namespace omni_moe::torch_api {

void check_gates(const char* op, const Tensor& hidden_states, const Tensor& gate_x,
                 const Tensor& gate_y) {
  const Argument hidden{op, "hidden_states", hidden_states};
  check_rank(hidden, 2);
  check_floating(hidden);
  for (const Argument& gate : {Argument{op, "gate_x", gate_x}, Argument{op, "gate_y", gate_y}}) {
    check_rank(gate, 2);
    check_like(gate, hidden);
    TORCH_CHECK_VALUE(gate.tensor.sym_size(0) >= 1, op, ": expected ", gate.name,
                      " to have rows, but got shape ", gate.tensor.sym_sizes());
    check_size(gate, 1, hidden_states.sym_size(1), "hidden_size of hidden_states");
  }
}

void check_logits_of_gates(const char* op, const Tensor& grad_router_logits_x,
                           const Tensor& grad_router_logits_y, const Tensor& hidden_states,
                           const Tensor& gate_x, const Tensor& gate_y,
                           const Tensor& router_logits_x, const Tensor& router_logits_y) {
  const Argument hidden{op, "hidden_states", hidden_states};
  check_gates(op, hidden_states, gate_x, gate_y);
  for (const Argument& argument : {Argument{op, "router_logits_x", router_logits_x},
                                   Argument{op, "grad_router_logits_x", grad_router_logits_x},
                                   Argument{op, "router_logits_y", router_logits_y},
                                   Argument{op, "grad_router_logits_y", grad_router_logits_y}}) {
    const bool is_x =
        &argument.tensor == &router_logits_x || &argument.tensor == &grad_router_logits_x;
    check_rank(argument, 2);
    check_like(argument, hidden);
    check_size(argument, 0, hidden_states.sym_size(0), "number of tokens of hidden_states");
    check_size(argument, 1, (is_x ? gate_x : gate_y).sym_size(0),
               is_x ? "number of rows of gate_x" : "number of rows of gate_y");
  }
}

Tensor gate_products(const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y) {
  return at::mm(hidden_states, at::cat({gate_x, gate_y}).t());
}

std::tuple<Tensor, Tensor> gate_gradients(const Tensor& hidden_states, const Tensor& gate_x,
                                          const Tensor& gate_y, Mask<2> output_mask) {
  const c10::SymInt width = gate_x.sym_size(0) + gate_y.sym_size(0);
  return {empty_if(output_mask[0], hidden_states.sym_sizes(), hidden_states.options()),
          empty_if(output_mask[1], {width, gate_x.sym_size(1)}, gate_x.options())};
}

void fill_gate_gradients(const Tensor& grad_products, const Tensor& hidden_states,
                         const Tensor& gate_x, const Tensor& gate_y, Mask<2> output_mask,
                         Tensor& grad_hidden_states, Tensor& grad_gates) {
  if (output_mask[0]) at::mm_out(grad_hidden_states, grad_products, at::cat({gate_x, gate_y}));
  if (output_mask[1]) at::mm_out(grad_gates, grad_products.t(), hidden_states);
}

Mask<2> wanted_gate_gradients(AutogradContext* ctx) {
  return {ctx->needs_input_grad(0), ctx->needs_input_grad(1) || ctx->needs_input_grad(2)};
}

void return_gate_gradients(AutogradContext* ctx, const std::tuple<Tensor, Tensor>& gradients,
                           const Tensor& gate_x, const Tensor& gate_y, variable_list& input_grads) {
  const auto& [grad_hidden_states, grad_gates] = gradients;
  input_grads[0] = if_wanted(ctx->needs_input_grad(0), grad_hidden_states);
  const c10::SymInt num_rows = gate_x.sym_size(0);
  if (ctx->needs_input_grad(1)) input_grads[1] = grad_gates.narrow_symint(0, 0, num_rows);
  if (ctx->needs_input_grad(2)) {
    input_grads[2] = grad_gates.narrow_symint(0, num_rows, gate_y.sym_size(0));
  }
}

}  // namespace omni_moe::torch_api
