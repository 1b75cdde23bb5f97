// The shared MLP: (act(x gateᵀ) * (x upᵀ)) downᵀ. Its products are ATen's (cuBLAS, oneDNN), the
// gated activation is the backends' own, and both are one kernel where a backend can.
#include "mlp.h"

#include <ATen/SavedTensorHooks.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/graph_task.h>

#include <functional>
#include <string>
#include <utility>

#include "backend.h"
#include "checks.h"
#include "named_range.h"
#include "omni_moe/mlp.h"

// ---- Schemas -----------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  // x (…, H), gate and up (I, H), down (H, I) -> (…, H). With save_for_backward also the products x
  // gateᵀ and x upᵀ (…, I), else empty; with a gradient to come, autograd saves them by itself, and
  // they come back empty.
  m.def(
      "omni_mlp(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor down_weight, "
      "str activation=\"silu\", bool save_for_backward=False) "
      "-> (Tensor output, Tensor gate, Tensor up)");
  // A gradient that output_mask does not ask for comes back empty.
  m.def(
      "_omni_mlp_backward(Tensor grad_output, Tensor x, Tensor gate_weight, Tensor up_weight, "
      "Tensor down_weight, Tensor gate, Tensor up, str activation, bool[4] output_mask) "
      "-> (Tensor grad_x, Tensor grad_gate_weight, Tensor grad_up_weight, "
      "Tensor grad_down_weight)");
  // The same, and takes gate and up for its own memory: their values are lost.
  m.def(
      "_omni_mlp_backward_consume(Tensor grad_output, Tensor x, Tensor gate_weight, "
      "Tensor up_weight, Tensor down_weight, Tensor(a!) gate, Tensor(b!) up, str activation, "
      "bool[4] output_mask) -> (Tensor grad_x, Tensor grad_gate_weight, Tensor grad_up_weight, "
      "Tensor grad_down_weight)");
}

namespace omni_moe::torch_api {

// ---- Outputs -----------------------------------------------------------------------------------

void check_mlp(const char* op, const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
               const Tensor& down_weight, const char* x_name) {
  const Argument input{op, x_name, x};
  const std::string hidden_size = std::string("hidden_size of ") + x_name;
  const Argument gate{op, "gate_weight", gate_weight};
  const Argument up{op, "up_weight", up_weight};
  const Argument down{op, "down_weight", down_weight};
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": expected ", x_name,
                    " to have at least 1 dimension, but got a scalar");
  check_floating(input);
  for (const auto& argument : {gate, up, down}) {
    check_rank(argument, 2);
    check_like(argument, input);
  }
  check_size(gate, 1, x.sym_size(-1), hidden_size);
  check_size(up, 0, gate_weight.sym_size(0), "intermediate_size of gate_weight");
  check_size(up, 1, x.sym_size(-1), hidden_size);
  check_size(down, 0, x.sym_size(-1), hidden_size);
  check_size(down, 1, gate_weight.sym_size(0), "intermediate_size of gate_weight");
}

std::tuple<Tensor, Tensor> mlp_products(const Tensor& x, const Tensor& gate_weight,
                                        bool save_for_backward) {
  auto shape = x.sym_sizes().vec();
  shape.back() = gate_weight.sym_size(0);
  return {empty_if(save_for_backward, shape, x.options()),
          empty_if(save_for_backward, shape, x.options())};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> mlp_outputs(const Tensor& x, const Tensor& gate_weight,
                                               const Tensor& up_weight, const Tensor& down_weight,
                                               std::string_view activation,
                                               bool save_for_backward) {
  parse_activation(omni_mlp.name, activation);
  check_mlp(omni_mlp.name, x, gate_weight, up_weight, down_weight);
  auto [gate, up] = mlp_products(x, gate_weight, save_for_backward);
  return {at::empty_symint(x.sym_sizes(), x.options()), gate, up};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

void check_mlp_backward(const char* op, const Tensor& grad_output, const Tensor& x,
                        const Tensor& gate_weight, const Tensor& up_weight,
                        const Tensor& down_weight, const Tensor& gate, const Tensor& up) {
  check_mlp(op, x, gate_weight, up_weight, down_weight);
  const auto check_leading = [&](const Argument& argument, const c10::SymInt& last,
                                 const char* meaning) {
    check_rank(argument, x.dim());
    check_like(argument, {op, "x", x});
    for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) {
      check_size(argument, dim, x.sym_size(dim), "same size of x");
    }
    check_size(argument, x.dim() - 1, last, meaning);
  };
  check_leading({op, "grad_output", grad_output}, x.sym_size(-1), "hidden_size of x");
  check_leading({op, "gate", gate}, gate_weight.sym_size(0), "intermediate_size of gate_weight");
  check_leading({op, "up", up}, gate_weight.sym_size(0), "intermediate_size of gate_weight");
}

// The meta kernel alone: the kernel's gradients come from products, one after the other, for the
// least memory.
Gradients mlp_backward_outputs(const Tensor& grad_output, const Tensor& x,
                               const Tensor& gate_weight, const Tensor& up_weight,
                               const Tensor& down_weight, const Tensor& gate, const Tensor& up,
                               std::string_view activation, Mask<4> output_mask) {
  const char* op = omni_mlp_backward.name;
  parse_activation(op, activation);
  check_mlp_backward(op, grad_output, x, gate_weight, up_weight, down_weight, gate, up);
  const auto gradient = [&](size_t i, const Tensor& like) {
    return empty_if(output_mask[i], like.sym_sizes(), like.options());
  };
  return {gradient(0, x), gradient(1, gate_weight), gradient(2, up_weight),
          gradient(3, down_weight)};
}

Gradients mlp_backward_consume_outputs(const Tensor& grad_output, const Tensor& x,
                                       const Tensor& gate_weight, const Tensor& up_weight,
                                       const Tensor& down_weight, Tensor& gate, Tensor& up,
                                       std::string_view activation, Mask<4> output_mask) {
  return mlp_backward_outputs(grad_output, x, gate_weight, up_weight, down_weight, gate, up,
                              activation, output_mask);
}

// ---- Forward kernel ----------------------------------------------------------------------------

Tensor as_rows(const Tensor& t) { return t.dim() == 1 ? t.unsqueeze(0) : t.flatten(0, -2); }

}  // namespace

// The fused kernel where there is one, else two GEMMs and the activation. The choice depends on the
// operands alone, not on what is wanted of them.
Tensor gated_linear(const Tensor& rows, const Tensor& gate_weight, const Tensor& up_weight,
                    Activation activation, const std::tuple<Tensor, Tensor>& products) {
  Tensor gate = as_rows(std::get<0>(products)), up = as_rows(std::get<1>(products));
  const bool save_products = gate.numel() > 0;
  const Tensor activated = at::empty({rows.size(0), gate_weight.size(0)}, rows.options());
  const bool dense =
      rows.is_contiguous() && gate_weight.is_contiguous() && up_weight.is_contiguous();
  if (dense &&
      try_launch(GatedLinearForwardParams{.x = rows.const_data_ptr(),
                                          .gate_weight = gate_weight.const_data_ptr(),
                                          .up_weight = up_weight.const_data_ptr(),
                                          .activated = activated.mutable_data_ptr(),
                                          .gate = save_products ? gate.mutable_data_ptr() : nullptr,
                                          .up = save_products ? up.mutable_data_ptr() : nullptr,
                                          .num_tokens = rows.size(0),
                                          .hidden_size = rows.size(1),
                                          .intermediate_size = gate_weight.size(0),
                                          .dtype = to_dtype(rows),
                                          .activation = activation},
                 rows.device())) {
    return activated;
  }
  if (save_products) {
    at::mm_out(gate, rows, gate_weight.t());
    at::mm_out(up, rows, up_weight.t());
  } else {
    gate = at::mm(rows, gate_weight.t());
    up = at::mm(rows, up_weight.t());
  }
  launch(GatedActivationForwardParams{.gate = gate.const_data_ptr(),
                                      .up = up.const_data_ptr(),
                                      .activated = activated.mutable_data_ptr(),
                                      .num_tokens = gate.size(0),
                                      .intermediate_size = gate.size(1),
                                      .gate_stride = gate.stride(0),
                                      .up_stride = up.stride(0),
                                      .dtype = to_dtype(gate),
                                      .activation = activation},
         gate.device());
  return activated;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> mlp_kernel(const Tensor& x, const Tensor& gate_weight,
                                              const Tensor& up_weight, const Tensor& down_weight,
                                              std::string_view activation, bool save_for_backward) {
  const NamedRange range(kMlpRange);
  const auto guard = without_autocast();
  const auto outputs =
      mlp_outputs(x, gate_weight, up_weight, down_weight, activation, save_for_backward);
  const auto& [output, gate, up] = outputs;
  const Tensor activated = gated_linear(as_rows(x), gate_weight, up_weight,
                                        parse_activation(omni_mlp.name, activation), {gate, up});
  Tensor rows = as_rows(output);
  at::mm_out(rows, activated, down_weight.t());
  return outputs;
}

// ---- Backward kernels --------------------------------------------------------------------------

struct GatedGradients {
  Tensor gate, up;   // of the two products
  Tensor activated;  // act(gate) * up again: where wanted
};

// Gradients through the down product and the activation. Those of gate and up take the memory of
// the products where these are this call's own. One kernel where there is one, else a GEMM and the
// activation's own; grad_activated is rounded in between in either case.
GatedGradients gated_gradients(const Tensor& grad, const Tensor& down_weight, const Tensor& gate,
                               const Tensor& up, bool owns_products, Activation activation,
                               bool want_activated) {
  const auto data_if = [](bool wanted, const Tensor& tensor) {
    return wanted ? tensor.mutable_data_ptr() : nullptr;
  };
  GatedGradients result{owns_products ? gate : at::empty_like(gate),
                        owns_products ? up : at::empty_like(up),
                        want_activated ? at::empty_like(gate) : Tensor()};
  if (down_weight.is_contiguous() &&
      try_launch(GatedLinearBackwardParams{.grad_output = grad.const_data_ptr(),
                                           .down_weight = down_weight.const_data_ptr(),
                                           .gate = gate.const_data_ptr(),
                                           .up = up.const_data_ptr(),
                                           .grad_gate = result.gate.mutable_data_ptr(),
                                           .grad_up = result.up.mutable_data_ptr(),
                                           .activated = data_if(want_activated, result.activated),
                                           .num_tokens = grad.size(0),
                                           .hidden_size = grad.size(1),
                                           .intermediate_size = gate.size(1),
                                           .dtype = to_dtype(gate),
                                           .activation = activation},
                 gate.device())) {
    return result;
  }
  // grad_activated shares its memory with a result.
  Tensor grad_activated;
  if (owns_products) {
    result.activated.reset();
    grad_activated = at::mm(grad, down_weight);
    if (want_activated) result.activated = grad_activated;
  } else {
    grad_activated = at::mm_out(result.gate, grad, down_weight);
  }
  launch(GatedActivationBackwardParams{.grad_activated = grad_activated.const_data_ptr(),
                                       .gate = gate.const_data_ptr(),
                                       .up = up.const_data_ptr(),
                                       .grad_gate = result.gate.mutable_data_ptr(),
                                       .grad_up = result.up.mutable_data_ptr(),
                                       .activated = data_if(want_activated, result.activated),
                                       .num_tokens = gate.size(0),
                                       .intermediate_size = gate.size(1),
                                       .gate_stride = gate.stride(0),
                                       .up_stride = up.stride(0),
                                       .grad_gate_stride = result.gate.stride(0),
                                       .grad_up_stride = result.up.stride(0),
                                       .dtype = to_dtype(gate),
                                       .activation = activation},
         gate.device());
  return result;
}

// The gradients from the two products, in whose memory they are computed if it is owned.
Gradients backward_of_products(const Tensor& grad_output, const Tensor& x,
                               const Tensor& gate_weight, const Tensor& up_weight,
                               const Tensor& down_weight, const Tensor& gate, const Tensor& up,
                               bool owns_products, Activation activation, Mask<4> output_mask) {
  const NamedRange range(kMlpRange);
  const Tensor rows = as_rows(x), grad = as_rows(grad_output).contiguous();

  // 1. Through the down product and the activation; act(gate) * up again, for the weight gradient.
  GatedGradients grads =
      gated_gradients(grad, down_weight, as_rows(gate).contiguous(), as_rows(up).contiguous(),
                      owns_products, activation, /*want_activated=*/output_mask[3]);

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

Gradients mlp_backward_kernel(const Tensor& grad_output, const Tensor& x, const Tensor& gate_weight,
                              const Tensor& up_weight, const Tensor& down_weight,
                              const Tensor& gate, const Tensor& up, std::string_view activation,
                              Mask<4> output_mask) {
  const char* op = omni_mlp_backward.name;
  const auto guard = without_autocast();
  const Activation act = parse_activation(op, activation);
  check_mlp_backward(op, grad_output, x, gate_weight, up_weight, down_weight, gate, up);
  return backward_of_products(grad_output, x, gate_weight, up_weight, down_weight, gate, up,
                              /*owns_products=*/false, act, output_mask);
}

Gradients mlp_backward_consume_kernel(const Tensor& grad_output, const Tensor& x,
                                      const Tensor& gate_weight, const Tensor& up_weight,
                                      const Tensor& down_weight, Tensor& gate, Tensor& up,
                                      std::string_view activation, Mask<4> output_mask) {
  const char* op = omni_mlp_backward_consume.name;
  const auto guard = without_autocast();
  const Activation act = parse_activation(op, activation);
  check_mlp_backward(op, grad_output, x, gate_weight, up_weight, down_weight, gate, up);
  TORCH_CHECK_VALUE(!gate.is_alias_of(up), op,
                    ": expected gate and up in memory of their own, but got one storage for both");
  for (Tensor* product : {&gate, &up}) product->unsafeGetTensorImpl()->bump_version();
  return backward_of_products(grad_output, x, gate_weight, up_weight, down_weight, gate, up,
                              /*owns_products=*/true, act, output_mask);
}

// ---- Gradient ----------------------------------------------------------------------------------

// The two products are 4 T I bytes in 16 bits, the most of what a layer keeps, and no one but the
// node of the graph ever sees them: a backward pass that is the last through its graph takes their
// memory for their gradients, then gives it back.
//
// Asked in the forward and in the backward: what sees tensors as they are saved or computed may
// also keep them.
bool products_may_be_consumed() {
  return !at::SavedTensorDefaultHooks::get_hooks() &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// Wrappers of tensors (fake, functional, batched) belong to what traces this pass.
bool are_plain(std::initializer_list<std::reference_wrapper<const Tensor>> tensors) {
  constexpr c10::DispatchKeySet kWrappers(
      {c10::DispatchKey::Python, c10::DispatchKey::Functionalize, c10::DispatchKey::Batched,
       c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper});
  return std::none_of(tensors.begin(), tensors.end(),
                      [&](const Tensor& tensor) { return tensor.key_set().has_any(kWrappers); });
}

}  // namespace

void save_mlp_options(AutogradContext* ctx, std::string_view activation) {
  ctx->saved_data["activation"] = std::string(activation);
  ctx->saved_data["may_consume"] = products_may_be_consumed();
}

// Why it is safe to free the products: the engine holds a node's mutex while the node's backward
// runs, so passes of several threads through one graph take turns at it. Whichever comes behind the
// one that consumed finds the products' version counters moved, or the variables released, and
// raises; so does a second try after this pass has failed further down. A pass that comes before it
// has kept the graph and did not consume. Work on the GPU is ordered by the stream, which is the
// forward's for every pass.
std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_backward(AutogradContext* ctx, const Tensor& grad,
                                                        const Tensor& x, const Tensor& gate_weight,
                                                        const Tensor& up_weight,
                                                        const Tensor& down_weight, Tensor gate,
                                                        Tensor up, Mask<4> mask) {
  const std::string activation = ctx->saved_data["activation"].toStringRef();
  if (!ctx->saved_data["may_consume"].toBool() || !products_may_be_consumed() ||
      !are_plain({grad, x, gate_weight, up_weight, down_weight, gate, up}) ||
      torch::autograd::get_current_graph_task_keep_graph()) {
    return omni_mlp_backward(grad, x, gate_weight, up_weight, down_weight, gate, up, activation,
                             mask);
  }
  auto grads = omni_mlp_backward_consume(grad, x, gate_weight, up_weight, down_weight, gate, up,
                                         activation, mask);
  // The node holds on to them until it has returned, after the experts' backward.
  for (const Tensor& product : {gate, up}) product.storage().unsafeGetStorageImpl()->reset();
  return grads;
}

namespace {

struct OmniMlpBackward : Function<OmniMlpBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& gate_weight,
                               const Tensor& up_weight, const Tensor& down_weight,
                               std::string_view activation,
                               bool /*save_for_backward: the node does*/) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, gate, up] = omni_mlp(x, gate_weight, up_weight, down_weight, activation,
                                       /*save_for_backward=*/true);
    save_mlp_options(ctx, activation);
    ctx->save_for_backward({x, gate_weight, up_weight, down_weight, gate, up});
    return {output};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    Mask<4> mask;
    for (size_t i = 0; i < 4; ++i) mask[i] = ctx->needs_input_grad(i);
    auto [grad_x, grad_gate, grad_up, grad_down] = mlp_backward(
        ctx, grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], mask);
    return {if_wanted(mask[0], grad_x),    if_wanted(mask[1], grad_gate),
            if_wanted(mask[2], grad_up),   if_wanted(mask[3], grad_down),
            /*activation=*/Tensor(),
            /*save_for_backward=*/Tensor()};
  }
};

// ---- Registration ------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  register_kernels(m, omni_mlp, mlp_outputs, mlp_kernel);
  register_gradient<omni_mlp, OmniMlpBackward>(m);
  register_autocast<omni_mlp, AutocastTo::kAutocastDtype>(m);

  register_kernels(m, omni_mlp_backward, mlp_backward_outputs, mlp_backward_kernel);
  register_no_gradient(m, omni_mlp_backward);

  register_kernels(m, omni_mlp_backward_consume, mlp_backward_consume_outputs,
                   mlp_backward_consume_kernel);
  register_no_gradient(m, omni_mlp_backward_consume);
}

}  // namespace

}  // namespace omni_moe::torch_api
