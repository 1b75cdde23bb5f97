// Shared MLP at the torch boundary: GEMMs through ATen (cuBLAS, oneDNN), the gated activation
// through the backends' own kernels.
#include <torch/library.h>

#include "backend.h"
#include "checks.h"
#include "ops.h"

namespace omni_moe::torch_api {

namespace {

Tensor as_rows(const Tensor& t) { return t.reshape({-1, t.size(-1)}); }

// act(gate) * up
Tensor gated_activation(const Tensor& gate, const Tensor& up, Activation activation) {
  Tensor activated = at::empty_like(gate);
  launch({gate.const_data_ptr(), up.const_data_ptr(), activated.mutable_data_ptr(), gate.size(0),
          gate.size(1), gate.stride(0), up.stride(0), to_dtype(gate), activation},
         gate.device());
  return activated;
}

std::tuple<Tensor, Tensor, Tensor> omni_mlp_save_gates_kernel(const Tensor& x,
                                                              const Tensor& gate_weight,
                                                              const Tensor& up_weight,
                                                              const Tensor& down_weight,
                                                              std::string_view activation) {
  constexpr auto kOp = "omni_mlp";
  const Activation act = parse_activation(kOp, activation);
  check_mlp(kOp, x, gate_weight, up_weight, down_weight);
  const Tensor rows = as_rows(x);
  const Tensor gate = at::mm(rows, gate_weight.t()), up = at::mm(rows, up_weight.t());
  const Tensor out = at::mm(gated_activation(gate, up, act), down_weight.t());
  auto gate_shape = x.sizes().vec();
  gate_shape.back() = gate_weight.size(0);
  return {out.view(x.sizes()), gate.view(gate_shape), up.view(gate_shape)};
}

Tensor omni_mlp_kernel(const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
                       const Tensor& down_weight, std::string_view activation,
                       bool /*recompute: there is nothing to save here*/) {
  return std::get<0>(
      omni_mlp_save_gates_kernel(x, gate_weight, up_weight, down_weight, activation));
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
  const Tensor gate =
      saved_gate ? as_rows(*saved_gate).contiguous() : at::mm(rows, gate_weight.t());
  const Tensor up = saved_up ? as_rows(*saved_up).contiguous() : at::mm(rows, up_weight.t());

  // 1. Through the down product and the activation; act(gate) * up again, for the weight gradient.
  const Tensor grad_activated = at::mm(grad, down_weight);
  const Tensor none = at::empty({0}, x.options());
  Tensor activated = output_mask[3] ? at::empty_like(gate) : none;
  Tensor grad_gate = at::empty_like(gate), grad_up = at::empty_like(up);
  launch(
      {grad_activated.const_data_ptr(), gate.const_data_ptr(), up.const_data_ptr(),
       grad_gate.mutable_data_ptr(), grad_up.mutable_data_ptr(),
       output_mask[3] ? activated.mutable_data_ptr() : nullptr, gate.size(0), gate.size(1),
       gate.stride(0), up.stride(0), grad_gate.stride(0), grad_up.stride(0), to_dtype(gate), act},
      x.device());

  // 2. Through the gate and up products.
  Tensor grad_x = none;
  if (output_mask[0]) {
    grad_x = at::mm(grad_gate, gate_weight).addmm_(grad_up, up_weight).view(x.sizes());
  }
  return {grad_x, output_mask[1] ? at::mm(grad_gate.t(), rows) : none,
          output_mask[2] ? at::mm(grad_up.t(), rows) : none,
          output_mask[3] ? at::mm(grad.t(), activated) : none};
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
