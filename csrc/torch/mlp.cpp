// Shared MLP at the torch boundary: GEMMs through ATen (cuBLAS, oneDNN), the gated activation
// through the backends' own kernels, and both of them in one where a backend can.
#include <torch/library.h>

#include <utility>

#include "autocast.h"
#include "backend.h"
#include "checks.h"
#include "ops.h"

namespace omni_moe::torch_api {

namespace {

Tensor as_rows(const Tensor& t) { return t.dim() == 1 ? t.unsqueeze(0) : t.flatten(0, -2); }

// act(gate) * up
Tensor gated_activation(const Tensor& gate, const Tensor& up, Activation activation) {
  Tensor activated = at::empty_like(gate);
  launch({gate.const_data_ptr(), up.const_data_ptr(), activated.mutable_data_ptr(), gate.size(0),
          gate.size(1), gate.stride(0), up.stride(0), to_dtype(gate), activation},
         gate.device());
  return activated;
}

struct GatedLinear {
  Tensor gate, up;   // x gate_weightᵀ, x up_weightᵀ: where wanted
  Tensor activated;  // act(gate) * up: where wanted
};

// The fused kernel where there is one, else two GEMMs and the activation. The choice depends on the
// operands alone, not on what is wanted of them: products recomputed in the backward are the
// forward's bit for bit.
GatedLinear gated_linear(const Tensor& rows, const Tensor& gate_weight, const Tensor& up_weight,
                         Activation activation, bool want_products, bool want_activated) {
  GatedLinear result;
  GatedLinearForwardParams params{rows.const_data_ptr(),
                                  gate_weight.const_data_ptr(),
                                  up_weight.const_data_ptr(),
                                  /*activated=*/nullptr,
                                  /*gate=*/nullptr,
                                  /*up=*/nullptr,
                                  rows.size(0),
                                  rows.size(1),
                                  gate_weight.size(0),
                                  to_dtype(rows),
                                  activation};
  const bool dense =
      rows.is_contiguous() && gate_weight.is_contiguous() && up_weight.is_contiguous();
  if (dense && supports(params, rows.device())) {
    const auto output = [&](Tensor& tensor) {
      tensor = at::empty({params.num_tokens, params.intermediate_size}, rows.options());
      return tensor.mutable_data_ptr();
    };
    if (want_activated) params.activated = output(result.activated);
    if (want_products) {
      params.gate = output(result.gate);
      params.up = output(result.up);
    }
    launch(params, rows.device());
    return result;
  }
  result.gate = at::mm(rows, gate_weight.t());
  result.up = at::mm(rows, up_weight.t());
  if (want_activated) result.activated = gated_activation(result.gate, result.up, activation);
  return result;
}

std::tuple<Tensor, Tensor, Tensor> omni_mlp_save_gates_kernel(const Tensor& x,
                                                              const Tensor& gate_weight,
                                                              const Tensor& up_weight,
                                                              const Tensor& down_weight,
                                                              std::string_view activation) {
  constexpr auto kOp = "omni_mlp";
  const auto guard = without_autocast();
  const Activation act = parse_activation(kOp, activation);
  check_mlp(kOp, x, gate_weight, up_weight, down_weight);
  const auto [gate, up, activated] =
      gated_linear(as_rows(x), gate_weight, up_weight, act, /*want_products=*/true,
                   /*want_activated=*/true);
  const Tensor out = at::mm(activated, down_weight.t());
  auto gate_shape = x.sizes().vec();
  gate_shape.back() = gate_weight.size(0);
  return {out.view(x.sizes()), gate.view(gate_shape), up.view(gate_shape)};
}

Tensor omni_mlp_kernel(const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
                       const Tensor& down_weight, std::string_view activation,
                       bool /*recompute: there is nothing to save here*/) {
  constexpr auto kOp = "omni_mlp";
  const auto guard = without_autocast();
  const Activation act = parse_activation(kOp, activation);
  check_mlp(kOp, x, gate_weight, up_weight, down_weight);
  const Tensor activated = gated_linear(as_rows(x), gate_weight, up_weight, act,
                                        /*want_products=*/false, /*want_activated=*/true)
                               .activated;
  return at::mm(activated, down_weight.t()).view(x.sizes());
}

struct GatedGradients {
  Tensor gate, up;   // of the two products
  Tensor activated;  // act(gate) * up again: where wanted
};

// Gradients through the down product and the activation. Those of gate and up take the memory of
// the products where these are this call's own. One kernel where there is one, else a GEMM and the
// activation's own; grad_activated is rounded in between in either case.
GatedGradients gated_gradients(const Tensor& grad, const Tensor& down_weight, Tensor gate,
                               Tensor up, bool owns_products, Activation activation,
                               bool want_activated) {
  const auto like = [](const Tensor& t, bool wanted) {
    return wanted ? at::empty_like(t) : Tensor();
  };
  GatedLinearBackwardParams fused{grad.const_data_ptr(), down_weight.const_data_ptr(),
                                  gate.const_data_ptr(), up.const_data_ptr(),
                                  /*grad_gate=*/nullptr,
                                  /*grad_up=*/nullptr,
                                  /*activated=*/nullptr, grad.size(0),
                                  grad.size(1),          gate.size(1),
                                  to_dtype(gate),        activation};
  if (down_weight.is_contiguous() && supports(fused, gate.device())) {
    GatedGradients result{owns_products ? gate : at::empty_like(gate),
                          owns_products ? up : at::empty_like(up), like(gate, want_activated)};
    fused.grad_gate = result.gate.mutable_data_ptr();
    fused.grad_up = result.up.mutable_data_ptr();
    fused.activated = want_activated ? result.activated.mutable_data_ptr() : nullptr;
    launch(fused, gate.device());
    return result;
  }
  // Some results take the memory of grad_activated, too.
  Tensor grad_activated = at::mm(grad, down_weight);
  const GatedGradients result =
      owns_products
          ? GatedGradients{gate, up, want_activated ? grad_activated : Tensor()}
          : GatedGradients{grad_activated, at::empty_like(up), like(gate, want_activated)};
  launch({grad_activated.const_data_ptr(), gate.const_data_ptr(), up.const_data_ptr(),
          result.gate.mutable_data_ptr(), result.up.mutable_data_ptr(),
          want_activated ? result.activated.mutable_data_ptr() : nullptr, gate.size(0),
          gate.size(1), gate.stride(0), up.stride(0), result.gate.stride(0), result.up.stride(0),
          to_dtype(gate), activation},
         gate.device());
  return result;
}

// The gradients from the two products, in whose memory they are computed if it is owned.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_of_products(
    const Tensor& grad_output, const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
    const Tensor& down_weight, Tensor gate, Tensor up, bool owns_products, Activation activation,
    std::array<bool, 4> output_mask) {
  const Tensor rows = as_rows(x), grad = as_rows(grad_output).contiguous();

  // 1. Through the down product and the activation; act(gate) * up again, for the weight gradient.
  GatedGradients grads =
      gated_gradients(grad, down_weight, std::move(gate), std::move(up), owns_products, activation,
                      /*want_activated=*/output_mask[3]);

  // 2. Through the gate and up products. Each operand is freed after its last use: memory peaks
  //    here, where the weights' gradients pile up.
  const auto none = [&] { return at::empty({0}, x.options()); };  // outputs must not alias
  const Tensor grad_down = output_mask[3] ? at::mm(grad.t(), grads.activated) : none();
  grads.activated.reset();
  Tensor grad_x = none();
  if (output_mask[0]) {
    grad_x = at::mm(grads.gate, gate_weight).addmm_(grads.up, up_weight).view(x.sizes());
  }
  const Tensor grad_gate_weight = output_mask[1] ? at::mm(grads.gate.t(), rows) : none();
  grads.gate.reset();
  return {grad_x, grad_gate_weight, output_mask[2] ? at::mm(grads.up.t(), rows) : none(),
          grad_down};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> omni_mlp_backward_kernel(
    const Tensor& grad_output, const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
    const Tensor& down_weight, const std::optional<Tensor>& gate, const std::optional<Tensor>& up,
    std::string_view activation, std::array<bool, 4> output_mask) {
  constexpr auto kOp = "omni_mlp_backward";
  const auto guard = without_autocast();
  const Activation act = parse_activation(kOp, activation);
  check_mlp_backward(kOp, grad_output, x, gate_weight, up_weight, down_weight, gate, up);
  if (gate && up) {
    return backward_of_products(grad_output, x, gate_weight, up_weight, down_weight,
                                as_rows(*gate).contiguous(), as_rows(*up).contiguous(),
                                /*owns_products=*/false, act, output_mask);
  }
  GatedLinear products = gated_linear(as_rows(x), gate_weight, up_weight, act,
                                      /*want_products=*/true, /*want_activated=*/false);
  return backward_of_products(grad_output, x, gate_weight, up_weight, down_weight,
                              std::move(products.gate), std::move(products.up),
                              /*owns_products=*/true, act, output_mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> omni_mlp_backward_consume_kernel(
    const Tensor& grad_output, const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
    const Tensor& down_weight, Tensor& gate, Tensor& up, std::string_view activation,
    std::array<bool, 4> output_mask) {
  constexpr auto kOp = "omni_mlp_backward_consume";
  const auto guard = without_autocast();
  const Activation act = parse_activation(kOp, activation);
  check_mlp_backward(kOp, grad_output, x, gate_weight, up_weight, down_weight, gate, up);
  for (Tensor* product : {&gate, &up}) product->unsafeGetTensorImpl()->bump_version();
  return backward_of_products(grad_output, x, gate_weight, up_weight, down_weight,
                              as_rows(gate).contiguous(), as_rows(up).contiguous(),
                              /*owns_products=*/true, act, output_mask);
}

// The MLP onto the experts' states: no pass of its own for the sum. The experts come first, while
// the tokens are in the cache behind the router, and start early behind it. -> the products.
GatedLinear add_mlp(Tensor& expert_states, const Tensor& x, const Tensor& gate_weight,
                    const Tensor& up_weight, const Tensor& down_weight, Activation activation,
                    bool want_products) {
  GatedLinear result = gated_linear(x, gate_weight, up_weight, activation, want_products,
                                    /*want_activated=*/true);
  expert_states.addmm_(result.activated, down_weight.t());
  return result;
}

Tensor omni_expert_mlp_kernel(const Tensor& hidden_states, const Tensor& up_embed,
                              const Tensor& down_embed, const Tensor& routing_weights,
                              const Tensor& indices, const Tensor& gate_weight,
                              const Tensor& up_weight, const Tensor& down_weight,
                              std::string_view activation,
                              bool /*recompute: there is nothing to save here*/) {
  constexpr auto kOp = "omni_expert_mlp";
  const auto guard = without_autocast();
  const Activation act = parse_activation(kOp, activation);
  check_expert_mlp(kOp, hidden_states, up_embed, down_embed, routing_weights, indices, gate_weight,
                   up_weight, down_weight);
  Tensor output =
      omni_expert(hidden_states, up_embed, down_embed, routing_weights, indices, activation);
  add_mlp(output, hidden_states, gate_weight, up_weight, down_weight, act,
          /*want_products=*/false);
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> omni_expert_mlp_save_kernel(
    const Tensor& hidden_states, const Tensor& up_embed, const Tensor& down_embed,
    const Tensor& routing_weights, const Tensor& indices, const Tensor& gate_weight,
    const Tensor& up_weight, const Tensor& down_weight, std::string_view activation,
    bool save_products) {
  constexpr auto kOp = "omni_expert_mlp";
  const auto guard = without_autocast();
  const Activation act = parse_activation(kOp, activation);
  check_expert_mlp(kOp, hidden_states, up_embed, down_embed, routing_weights, indices, gate_weight,
                   up_weight, down_weight);
  auto [output, scores] = omni_expert_save_scores(hidden_states, up_embed, down_embed,
                                                  routing_weights, indices, activation);
  const GatedLinear products =
      add_mlp(output, hidden_states, gate_weight, up_weight, down_weight, act, save_products);
  if (save_products) return {output, scores, products.gate, products.up};
  const auto empty = [&] { return at::empty({0}, hidden_states.options()); };
  return {output, scores, empty(), empty()};
}

void register_kernels(torch::Library& m) {
  m.impl("omni_mlp", omni_mlp_kernel);
  m.impl("omni_mlp_save_gates", omni_mlp_save_gates_kernel);
  m.impl("omni_mlp_backward", omni_mlp_backward_kernel);
  m.impl("omni_mlp_backward_consume", omni_mlp_backward_consume_kernel);
  m.impl("omni_expert_mlp", omni_expert_mlp_kernel);
  m.impl("omni_expert_mlp_save", omni_expert_mlp_save_kernel);
}

}  // namespace

TORCH_LIBRARY_IMPL(omni_moe, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(omni_moe, CUDA, m) { register_kernels(m); }

}  // namespace omni_moe::torch_api
