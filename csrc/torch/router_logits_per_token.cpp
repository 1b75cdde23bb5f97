// The router's logits: both gates, and the norm of each token's products on their own.
#include "backend.h"
#include "checks.h"
#include "named_range.h"
#include "omni_moe/token_norm.h"
#include "ops.h"
#include "router_gates.h"

// ---- Schemas -----------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  // hidden (T, H), gates (R, H) and (C, H) -> (T, R), (T, C), and for the backward 1 / sqrt(var +
  // eps) (T, 2) of both axes in the accumulation type.
  m.def(
      "omni_router_logits_per_token(Tensor hidden_states, Tensor gate_x, Tensor gate_y, "
      "str norm=\"layer_norm\", float eps=1e-05) "
      "-> (Tensor router_logits_x, Tensor router_logits_y, Tensor inv_std)");
  // The gradient of the gates is that of both, (R + C, H). One that output_mask does not ask for
  // comes back empty.
  m.def(
      "_omni_router_logits_per_token_backward(Tensor grad_router_logits_x, "
      "Tensor grad_router_logits_y, Tensor hidden_states, Tensor gate_x, Tensor gate_y, "
      "Tensor router_logits_x, Tensor router_logits_y, Tensor inv_std, str norm, "
      "bool[2] output_mask) -> (Tensor grad_hidden_states, Tensor grad_gates)");
}

namespace omni_moe::torch_api {

namespace {

TokenNorm parse_token_norm(const char* op, std::string_view name) {
  if (name == "layer_norm") return TokenNorm::kLayerNorm;
  if (name == "rms_norm") return TokenNorm::kRmsNorm;
  TORCH_CHECK_VALUE(false, op, ": expected norm to be one of layer_norm, rms_norm, but got '", name,
                    "'");
}

// ---- Outputs -----------------------------------------------------------------------------------

using Normed = std::tuple<Tensor, Tensor, Tensor>;

Normed per_token_outputs(const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
                         std::string_view norm, double eps) {
  const char* op = omni_router_logits_per_token.name;
  check_gates(op, hidden_states, gate_x, gate_y);
  parse_token_norm(op, norm);
  TORCH_CHECK_VALUE(eps > 0, op, ": expected eps to be positive, but got ", eps);
  const c10::SymInt num_tokens = hidden_states.sym_size(0);
  const auto options = hidden_states.options();
  return {at::empty_symint({num_tokens, gate_x.sym_size(0)}, options),
          at::empty_symint({num_tokens, gate_y.sym_size(0)}, options),
          at::empty_symint({num_tokens, 2},
                           options.dtype(accumulation_dtype(hidden_states.scalar_type())))};
}

// The gradients are products of the kernel: this is the meta kernel alone.
std::tuple<Tensor, Tensor> per_token_backward_outputs(
    const Tensor& grad_router_logits_x, const Tensor& grad_router_logits_y,
    const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
    const Tensor& router_logits_x, const Tensor& router_logits_y, const Tensor& inv_std,
    std::string_view norm, Mask<2> output_mask) {
  const char* op = omni_router_logits_per_token_backward.name;
  check_logits_of_gates(op, grad_router_logits_x, grad_router_logits_y, hidden_states, gate_x,
                        gate_y, router_logits_x, router_logits_y);
  parse_token_norm(op, norm);
  const Argument scale{op, "inv_std", inv_std};
  check_rank(scale, 2);
  check_like(scale, {op, "hidden_states", hidden_states}, /*same_dtype=*/false);
  check_dtype(scale, accumulation_dtype(hidden_states.scalar_type()));
  check_size(scale, 0, hidden_states.sym_size(0), "number of tokens of hidden_states");
  check_size(scale, 1, 2, "number of axes");
  return gate_gradients(hidden_states, gate_x, gate_y, output_mask);
}

// ---- Kernels -----------------------------------------------------------------------------------

Normed per_token_kernel(const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
                        std::string_view norm, double eps) {
  const NamedRange range(kRouterRange);
  const auto guard = without_autocast();
  const auto outputs = per_token_outputs(hidden_states, gate_x, gate_y, norm, eps);
  const auto& [x, y, inv_std] = outputs;
  const Tensor logits = gate_products(hidden_states, gate_x, gate_y);
  launch(TokenNormForwardParams{.logits = logits.const_data_ptr(),
                                .normed_x = x.mutable_data_ptr(),
                                .normed_y = y.mutable_data_ptr(),
                                .inv_std = inv_std.mutable_data_ptr(),
                                .num_tokens = x.size(0),
                                .num_rows = x.size(1),
                                .num_cols = y.size(1),
                                .logits_stride = logits.stride(0),
                                .dtype = to_dtype(x),
                                .norm = parse_token_norm(omni_router_logits_per_token.name, norm),
                                .eps = eps},
         x.device());
  return outputs;
}

std::tuple<Tensor, Tensor> per_token_backward_kernel(
    const Tensor& grad_router_logits_x, const Tensor& grad_router_logits_y,
    const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
    const Tensor& router_logits_x, const Tensor& router_logits_y, const Tensor& inv_std,
    std::string_view norm, Mask<2> output_mask) {
  const NamedRange range(kRouterRange);
  const auto guard = without_autocast();
  auto [grad_hidden, grad_gates] = per_token_backward_outputs(
      grad_router_logits_x, grad_router_logits_y, hidden_states, gate_x, gate_y, router_logits_x,
      router_logits_y, inv_std, norm, output_mask);
  const Tensor grad_x = grad_router_logits_x.contiguous(),
               grad_y = grad_router_logits_y.contiguous(), x = router_logits_x.contiguous(),
               y = router_logits_y.contiguous(), scale = inv_std.contiguous();
  const Tensor grad_logits = at::empty({x.size(0), x.size(1) + y.size(1)}, x.options());
  launch(TokenNormBackwardParams{.grad_x = grad_x.const_data_ptr(),
                                 .grad_y = grad_y.const_data_ptr(),
                                 .normed_x = x.const_data_ptr(),
                                 .normed_y = y.const_data_ptr(),
                                 .inv_std = scale.const_data_ptr(),
                                 .grad_logits = grad_logits.mutable_data_ptr(),
                                 .num_tokens = x.size(0),
                                 .num_rows = x.size(1),
                                 .num_cols = y.size(1),
                                 .dtype = to_dtype(x),
                                 .norm = parse_token_norm(
                                     omni_router_logits_per_token_backward.name, norm)},
         x.device());
  fill_gate_gradients(grad_logits, hidden_states, gate_x, gate_y, output_mask, grad_hidden,
                      grad_gates);
  return {grad_hidden, grad_gates};
}

// ---- Gradient ----------------------------------------------------------------------------------

struct OmniRouterLogitsPerTokenBackward : Function<OmniRouterLogitsPerTokenBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& hidden_states,
                               const Tensor& gate_x, const Tensor& gate_y, std::string_view norm,
                               double eps) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [x, y, inv_std] = omni_router_logits_per_token(hidden_states, gate_x, gate_y, norm, eps);
    ctx->save_for_backward({hidden_states, gate_x, gate_y, x, y, inv_std});
    ctx->saved_data["norm"] = std::string(norm);
    return {x, y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &gate_x = saved[1], &gate_y = saved[2];
    const auto gradients = omni_router_logits_per_token_backward(
        grads[0], grads[1], saved[0], gate_x, gate_y, saved[3], saved[4], saved[5],
        ctx->saved_data["norm"].toStringRef(), wanted_gate_gradients(ctx));
    variable_list input_grads(5);
    return_gate_gradients(ctx, gradients, gate_x, gate_y, input_grads);
    return input_grads;
  }
};

// ---- Registration ------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  register_kernels(m, omni_router_logits_per_token, per_token_outputs, per_token_kernel);
  register_gradient<omni_router_logits_per_token, OmniRouterLogitsPerTokenBackward>(m);
  register_autocast<omni_router_logits_per_token, AutocastTo::kAutocastDtype>(m);

  register_kernels(m, omni_router_logits_per_token_backward, per_token_backward_outputs,
                   per_token_backward_kernel);
  register_no_gradient(m, omni_router_logits_per_token_backward);
}

}  // namespace

}  // namespace omni_moe::torch_api
