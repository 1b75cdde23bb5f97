// Atomic experts plus shared MLP of the same tokens: the layer behind its router.
#include "backend.h"
#include "checks.h"
#include "experts.h"
#include "mlp.h"
#include "named_range.h"

// ---- Schema ------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  // hidden (T, H), embeds (E, H), routing and indices (T, K), gate and up (I, H), down (H, I) ->
  // (T, H). With save_for_backward also what the two backward ops take, as omni_expert and omni_mlp
  // return it.
  m.def(
      "omni_expert_mlp(Tensor hidden_states, Tensor up_embed, Tensor down_embed, "
      "Tensor routing_weights, Tensor indices, Tensor gate_weight, Tensor up_weight, "
      "Tensor down_weight, str activation=\"silu\", bool save_for_backward=False, "
      "SymInt num_cols=0) "
      "-> (Tensor output, Tensor pre_activations, Tensor gate, Tensor up)");
}

namespace omni_moe::torch_api {

namespace {

// ---- Outputs -----------------------------------------------------------------------------------

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

ExpertOperands operands_of(const Tensor& hidden_states, const Tensor& up_embed,
                           const Tensor& down_embed, const Tensor& routing_weights,
                           const Tensor& indices, const c10::SymInt& num_cols) {
  return {omni_expert_mlp.name, hidden_states, up_embed, down_embed,
          routing_weights,      indices,       num_cols, "up_embed",
          "down_embed"};
}

Outputs expert_mlp_outputs(const Tensor& hidden_states, const Tensor& up_embed,
                           const Tensor& down_embed, const Tensor& routing_weights,
                           const Tensor& indices, const Tensor& gate_weight,
                           const Tensor& up_weight, const Tensor& down_weight,
                           std::string_view activation, bool save_for_backward,
                           c10::SymInt num_cols) {
  const ExpertOperands operands =
      operands_of(hidden_states, up_embed, down_embed, routing_weights, indices, num_cols);
  parse_activation(operands.op, activation);
  check_experts(operands, /*addend=*/std::nullopt);
  check_mlp(operands.op, hidden_states, gate_weight, up_weight, down_weight, "hidden_states");
  return std::tuple_cat(expert_outputs_of(operands, save_for_backward),
                        mlp_products(hidden_states, gate_weight, save_for_backward));
}

// ---- Kernel ------------------------------------------------------------------------------------

// The MLP goes onto the experts' states: no pass of its own for the sum. The experts come first,
// while the tokens are in the cache behind the router, and start early behind it.
Outputs expert_mlp_kernel(const Tensor& hidden_states, const Tensor& up_embed,
                          const Tensor& down_embed, const Tensor& routing_weights,
                          const Tensor& indices, const Tensor& gate_weight, const Tensor& up_weight,
                          const Tensor& down_weight, std::string_view activation,
                          bool save_for_backward, c10::SymInt num_cols) {
  const auto guard = without_autocast();
  const auto outputs =
      expert_mlp_outputs(hidden_states, up_embed, down_embed, routing_weights, indices, gate_weight,
                         up_weight, down_weight, activation, save_for_backward, num_cols);
  const auto& [output, pre_activations, gate, up] = outputs;
  run_experts(operands_of(hidden_states, up_embed, down_embed, routing_weights, indices, num_cols),
              activation, /*addend=*/std::nullopt, {output, pre_activations});
  const NamedRange range(kMlpRange);
  const Tensor activated =
      gated_linear(hidden_states, gate_weight, up_weight,
                   parse_activation(omni_expert_mlp.name, activation), {gate, up});
  output.addmm_(activated, down_weight.t());
  return outputs;
}

// ---- Gradient ----------------------------------------------------------------------------------

// The MLP's backward comes first, while the experts' weight gradients are not there yet (memory
// peaks in it), and the experts' adds the gradient of the tokens onto it.
struct OmniExpertMlpBackward : Function<OmniExpertMlpBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& hidden_states,
                               const Tensor& up_embed, const Tensor& down_embed,
                               const Tensor& routing_weights, const Tensor& indices,
                               const Tensor& gate_weight, const Tensor& up_weight,
                               const Tensor& down_weight, std::string_view activation,
                               bool /*save_for_backward: the node does*/,
                               const c10::SymInt& num_cols) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, pre_activations, gate, up] =
        omni_expert_mlp(hidden_states, up_embed, down_embed, routing_weights, indices, gate_weight,
                        up_weight, down_weight, activation, /*save_for_backward=*/true, num_cols);
    save_mlp_options(ctx, activation);
    ctx->saved_data["num_cols"] = num_cols;
    ctx->save_for_backward({hidden_states, up_embed, down_embed, routing_weights, indices,
                            gate_weight, up_weight, down_weight, pre_activations, gate, up});
    return {output};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto& hidden_states = saved[0];
    const auto needs = [&](size_t input) { return ctx->needs_input_grad(input); };
    const Mask<4> mlp_mask = {needs(0), needs(5), needs(6), needs(7)};
    const Mask<4> expert_mask = {needs(0), needs(1), needs(2), needs(3)};
    const auto any = [](const Mask<4>& mask) {
      return std::any_of(mask.begin(), mask.end(), [](bool wanted) { return wanted; });
    };

    variable_list result(11);
    if (any(mlp_mask)) {
      auto [grad_x, grad_gate, grad_up, grad_down] =
          mlp_backward(ctx, grads[0], hidden_states, saved[5], saved[6], saved[7], saved[9],
                       saved[10], mlp_mask);
      result[0] = if_wanted(mlp_mask[0], grad_x);
      result[5] = if_wanted(mlp_mask[1], grad_gate);
      result[6] = if_wanted(mlp_mask[2], grad_up);
      result[7] = if_wanted(mlp_mask[3], grad_down);
    }
    if (any(expert_mask)) {
      auto [grad_hidden, grad_up, grad_down, grad_routing] =
          omni_expert_backward(grads[0], hidden_states, saved[1], saved[2], saved[3], saved[4],
                               saved[8], ctx->saved_data["activation"].toStringRef(),
                               needs(0) ? std::optional(result[0]) : std::nullopt, expert_mask,
                               ctx->saved_data["num_cols"].toSymInt());
      result[0] = if_wanted(expert_mask[0], grad_hidden);
      result[1] = if_wanted(expert_mask[1], grad_up);
      result[2] = if_wanted(expert_mask[2], grad_down);
      result[3] = if_wanted(expert_mask[3], grad_routing);
    }
    return result;
  }
};

// ---- Registration ------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  register_kernels(m, omni_expert_mlp, expert_mlp_outputs, expert_mlp_kernel);
  register_gradient<omni_expert_mlp, OmniExpertMlpBackward>(m);
  register_autocast<omni_expert_mlp, AutocastTo::kAutocastDtype>(m);
}

}  // namespace

}  // namespace omni_moe::torch_api
