// Shared MLP at the torch boundary: GEMMs through ATen (cuBLAS, oneDNN), the gated activation
// through the backends' own kernels, and both of them in one where a backend can.
#include <torch/library.h>

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
  const Activation act = parse_activation(kOp, activation);
  check_mlp(kOp, x, gate_weight, up_weight, down_weight);
  const Tensor activated = gated_linear(as_rows(x), gate_weight, up_weight, act,
                                        /*want_products=*/false, /*want_activated=*/true)
                               .activated;
  return at::mm(activated, down_weight.t()).view(x.sizes());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> omni_mlp_backward_kernel(
    const Tensor& grad_output, const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
    const Tensor& down_weight, const std::optional<Tensor>& saved_gate,
    const std::optional<Tensor>& saved_up, std::string_view activation,
    std::array<bool, 4> output_mask) {
  constexpr auto kOp = "omni_mlp_backward";
  const Activation act = parse_activation(kOp, activation);
  check_mlp_backward(kOp, grad_output, x, gate_weight, up_weight, down_weight, saved_gate,
                     saved_up);
  const Tensor rows = as_rows(x), grad = as_rows(grad_output);
  Tensor gate, up;
  if (saved_gate && saved_up) {
    gate = as_rows(*saved_gate).contiguous();
    up = as_rows(*saved_up).contiguous();
  } else {
    const GatedLinear again = gated_linear(rows, gate_weight, up_weight, act,
                                           /*want_products=*/true, /*want_activated=*/false);
    gate = again.gate;
    up = again.up;
  }

  // 1. Through the down product and the activation; act(gate) * up again, for the weight gradient.
  const Tensor grad_activated = at::mm(grad, down_weight);
  const auto none = [&] { return at::empty({0}, x.options()); };  // outputs must not alias
  Tensor activated = output_mask[3] ? at::empty_like(gate) : none();
  Tensor grad_gate = at::empty_like(gate), grad_up = at::empty_like(up);
  launch(
      {grad_activated.const_data_ptr(), gate.const_data_ptr(), up.const_data_ptr(),
       grad_gate.mutable_data_ptr(), grad_up.mutable_data_ptr(),
       output_mask[3] ? activated.mutable_data_ptr() : nullptr, gate.size(0), gate.size(1),
       gate.stride(0), up.stride(0), grad_gate.stride(0), grad_up.stride(0), to_dtype(gate), act},
      x.device());

  // 2. Through the gate and up products.
  Tensor grad_x = none();
  if (output_mask[0]) {
    grad_x = at::mm(grad_gate, gate_weight).addmm_(grad_up, up_weight).view(x.sizes());
  }
  return {grad_x, output_mask[1] ? at::mm(grad_gate.t(), rows) : none(),
          output_mask[2] ? at::mm(grad_up.t(), rows) : none(),
          output_mask[3] ? at::mm(grad.t(), activated) : none()};
}

void register_kernels(torch::Library& m) {
  m.impl("omni_mlp", omni_mlp_kernel);
  m.impl("omni_mlp_save_gates", omni_mlp_save_gates_kernel);
  m.impl("omni_mlp_backward", omni_mlp_backward_kernel);
}

}  // namespace

TORCH_LIBRARY_IMPL(omni_moe, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(omni_moe, CUDA, m) { register_kernels(m); }

}  // namespace omni_moe::torch_api
