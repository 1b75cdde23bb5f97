// Shapes and dtypes without data, for fake tensors and torch.compile. Sizes stay symbolic.
#include <torch/library.h>

#include "checks.h"
#include "ops.h"

namespace omni_moe::torch_api {

namespace {

Tensor empty_like_contiguous(const Tensor& t) {
  return at::empty_symint(t.sym_sizes(), t.options());
}

Tensor if_wanted(bool wanted, const Tensor& like) {
  return wanted ? empty_like_contiguous(like) : at::empty({0}, like.options());
}

std::tuple<Tensor, Tensor> choice(const Tensor& logits, const c10::SymInt& k) {
  return {at::empty_symint({logits.sym_size(0), k}, logits.options()),
          at::empty_symint({logits.sym_size(0), k}, logits.options().dtype(at::kInt))};
}

std::tuple<Tensor, Tensor> omni_router_meta(const Tensor& router_logits_x,
                                            const Tensor& router_logits_y, c10::SymInt k) {
  check_router_logits("omni_router", router_logits_x, router_logits_y, k);
  return choice(router_logits_x, k);
}

std::tuple<Tensor, Tensor> omni_softmax_router_meta(const Tensor& router_logits_x,
                                                    const Tensor& router_logits_y, c10::SymInt k,
                                                    bool /*norm_topk_prob*/) {
  check_router_logits("omni_softmax_router", router_logits_x, router_logits_y, k);
  return choice(router_logits_x, k);
}

std::tuple<Tensor, Tensor> omni_router_backward_meta(const Tensor& grad_scores,
                                                     const Tensor& indices, c10::SymInt num_rows,
                                                     c10::SymInt num_cols) {
  constexpr auto kOp = "omni_router_backward";
  check_router_choice(kOp, {kOp, "grad_scores", grad_scores}, {kOp, "indices", indices});
  return {at::empty_symint({grad_scores.sym_size(0), num_rows}, grad_scores.options()),
          at::empty_symint({grad_scores.sym_size(0), num_cols}, grad_scores.options())};
}

std::tuple<Tensor, Tensor> omni_softmax_router_backward_meta(const Tensor& grad_routing_weights,
                                                             const Tensor& router_logits_x,
                                                             const Tensor& router_logits_y,
                                                             const Tensor& indices,
                                                             bool /*norm_topk_prob*/) {
  check_softmax_router_backward("omni_softmax_router_backward", grad_routing_weights,
                                router_logits_x, router_logits_y, indices);
  return {empty_like_contiguous(router_logits_x), empty_like_contiguous(router_logits_y)};
}

Tensor omni_expert_meta(const Tensor& hidden_states, const Tensor& up_weights,
                        const Tensor& down_weights, const Tensor& routing_weights,
                        const Tensor& indices, std::string_view activation,
                        const std::optional<Tensor>& addend) {
  parse_activation("omni_expert", activation);
  check_expert("omni_expert", hidden_states, up_weights, down_weights, routing_weights, indices,
               addend);
  return empty_like_contiguous(hidden_states);
}

std::tuple<Tensor, Tensor> omni_expert_save_scores_meta(
    const Tensor& hidden_states, const Tensor& up_weights, const Tensor& down_weights,
    const Tensor& routing_weights, const Tensor& indices, std::string_view activation,
    const std::optional<Tensor>& addend) {
  const auto dtype = accumulation_dtype(hidden_states.scalar_type());
  return {omni_expert_meta(hidden_states, up_weights, down_weights, routing_weights, indices,
                           activation, addend),
          at::empty_symint(indices.sym_sizes(), hidden_states.options().dtype(dtype))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> omni_expert_backward_meta(
    const Tensor& grad_expert_states, const Tensor& hidden_states, const Tensor& up_weights,
    const Tensor& down_weights, const Tensor& routing_weights, const Tensor& indices,
    std::string_view activation, std::array<bool, 4> output_mask,
    const std::optional<Tensor>& scores, const std::optional<Tensor>& addend) {
  parse_activation("omni_expert_backward", activation);
  check_expert_backward("omni_expert_backward", grad_expert_states, hidden_states, up_weights,
                        down_weights, routing_weights, indices, scores, addend);
  return {if_wanted(output_mask[0], hidden_states), if_wanted(output_mask[1], up_weights),
          if_wanted(output_mask[2], down_weights), if_wanted(output_mask[3], routing_weights)};
}

std::tuple<Tensor, Tensor, Tensor> omni_mlp_save_gates_meta(const Tensor& x,
                                                            const Tensor& gate_weight,
                                                            const Tensor& up_weight,
                                                            const Tensor& down_weight,
                                                            std::string_view activation) {
  parse_activation("omni_mlp", activation);
  check_mlp("omni_mlp", x, gate_weight, up_weight, down_weight);
  auto gate_shape = x.sym_sizes().vec();
  gate_shape.back() = gate_weight.sym_size(0);
  return {empty_like_contiguous(x), at::empty_symint(gate_shape, x.options()),
          at::empty_symint(gate_shape, x.options())};
}

Tensor omni_mlp_meta(const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
                     const Tensor& down_weight, std::string_view activation, bool /*recompute*/) {
  parse_activation("omni_mlp", activation);
  check_mlp("omni_mlp", x, gate_weight, up_weight, down_weight);
  return empty_like_contiguous(x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> omni_mlp_backward_meta(
    const Tensor& grad_output, const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
    const Tensor& down_weight, const std::optional<Tensor>& gate, const std::optional<Tensor>& up,
    std::string_view activation, std::array<bool, 4> output_mask) {
  parse_activation("omni_mlp_backward", activation);
  check_mlp_backward("omni_mlp_backward", grad_output, x, gate_weight, up_weight, down_weight, gate,
                     up);
  return {if_wanted(output_mask[0], x), if_wanted(output_mask[1], gate_weight),
          if_wanted(output_mask[2], up_weight), if_wanted(output_mask[3], down_weight)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> omni_mlp_backward_consume_meta(
    const Tensor& grad_output, const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
    const Tensor& down_weight, Tensor& gate, Tensor& up, std::string_view activation,
    std::array<bool, 4> output_mask) {
  return omni_mlp_backward_meta(grad_output, x, gate_weight, up_weight, down_weight, gate, up,
                                activation, output_mask);
}

Tensor omni_expert_mlp_meta(const Tensor& hidden_states, const Tensor& up_embed,
                            const Tensor& down_embed, const Tensor& routing_weights,
                            const Tensor& indices, const Tensor& gate_weight,
                            const Tensor& up_weight, const Tensor& down_weight,
                            std::string_view activation, bool /*recompute*/) {
  parse_activation("omni_expert_mlp", activation);
  check_expert_mlp("omni_expert_mlp", hidden_states, up_embed, down_embed, routing_weights, indices,
                   gate_weight, up_weight, down_weight);
  return empty_like_contiguous(hidden_states);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> omni_expert_mlp_save_meta(
    const Tensor& hidden_states, const Tensor& up_embed, const Tensor& down_embed,
    const Tensor& routing_weights, const Tensor& indices, const Tensor& gate_weight,
    const Tensor& up_weight, const Tensor& down_weight, std::string_view activation,
    bool save_products) {
  const Tensor output =
      omni_expert_mlp_meta(hidden_states, up_embed, down_embed, routing_weights, indices,
                           gate_weight, up_weight, down_weight, activation, !save_products);
  const auto options = hidden_states.options();
  const auto dtype = accumulation_dtype(hidden_states.scalar_type());
  const auto product = [&] {
    return save_products
               ? at::empty_symint({hidden_states.sym_size(0), gate_weight.sym_size(0)}, options)
               : at::empty({0}, options);
  };
  return {output, at::empty_symint(indices.sym_sizes(), options.dtype(dtype)), product(),
          product()};
}

std::tuple<Tensor, Tensor, Tensor> omni_batch_norm_save_stats_meta(
    const Tensor& router_logits, c10::SymInt num_rows, const std::optional<Tensor>& running_mean_x,
    const std::optional<Tensor>& running_var_x, const std::optional<Tensor>& num_batches_tracked_x,
    const std::optional<Tensor>& running_mean_y, const std::optional<Tensor>& running_var_y,
    const std::optional<Tensor>& num_batches_tracked_y, bool training, double /*momentum*/,
    double eps) {
  check_batch_norm("omni_batch_norm", router_logits, num_rows,
                   {"x", running_mean_x, running_var_x, num_batches_tracked_x},
                   {"y", running_mean_y, running_var_y, num_batches_tracked_y}, training, eps);
  const auto num_tokens = router_logits.sym_size(0), width = router_logits.sym_size(1);
  const auto dtype = accumulation_dtype(router_logits.scalar_type());
  return {at::empty_symint({num_tokens, num_rows}, router_logits.options()),
          at::empty_symint({num_tokens, width - num_rows}, router_logits.options()),
          at::empty_symint({width}, router_logits.options().dtype(dtype))};
}

std::tuple<Tensor, Tensor> omni_batch_norm_meta(const Tensor& router_logits, c10::SymInt num_rows,
                                                const std::optional<Tensor>& running_mean_x,
                                                const std::optional<Tensor>& running_var_x,
                                                const std::optional<Tensor>& num_batches_tracked_x,
                                                const std::optional<Tensor>& running_mean_y,
                                                const std::optional<Tensor>& running_var_y,
                                                const std::optional<Tensor>& num_batches_tracked_y,
                                                bool training, double momentum, double eps) {
  auto [normed_x, normed_y, inv_std] = omni_batch_norm_save_stats_meta(
      router_logits, std::move(num_rows), running_mean_x, running_var_x, num_batches_tracked_x,
      running_mean_y, running_var_y, num_batches_tracked_y, training, momentum, eps);
  return {normed_x, normed_y};
}

Tensor omni_batch_norm_backward_meta(const Tensor& grad_normed_x, const Tensor& grad_normed_y,
                                     const Tensor& normed_x, const Tensor& normed_y,
                                     const Tensor& inv_std, bool /*training*/) {
  check_batch_norm_backward("omni_batch_norm_backward", grad_normed_x, grad_normed_y, normed_x,
                            normed_y, inv_std);
  return at::empty_symint({normed_x.sym_size(0), normed_x.sym_size(1) + normed_y.sym_size(1)},
                          normed_x.options());
}

std::tuple<Tensor, Tensor, Tensor> omni_router_logits_save_stats_meta(
    const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
    const std::optional<Tensor>& running_mean_x, const std::optional<Tensor>& running_var_x,
    const std::optional<Tensor>& num_batches_tracked_x, const std::optional<Tensor>& running_mean_y,
    const std::optional<Tensor>& running_var_y, const std::optional<Tensor>& num_batches_tracked_y,
    bool training, double /*momentum*/, double eps) {
  check_normed_router_logits("omni_router_logits", hidden_states, gate_x, gate_y,
                             {"x", running_mean_x, running_var_x, num_batches_tracked_x},
                             {"y", running_mean_y, running_var_y, num_batches_tracked_y}, training,
                             eps);
  const auto num_tokens = hidden_states.sym_size(0);
  const auto num_rows = gate_x.sym_size(0), num_cols = gate_y.sym_size(0);
  const auto dtype = accumulation_dtype(hidden_states.scalar_type());
  return {at::empty_symint({num_tokens, num_rows}, hidden_states.options()),
          at::empty_symint({num_tokens, num_cols}, hidden_states.options()),
          at::empty_symint({num_rows + num_cols}, hidden_states.options().dtype(dtype))};
}

std::tuple<Tensor, Tensor> omni_router_logits_meta(
    const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
    const std::optional<Tensor>& running_mean_x, const std::optional<Tensor>& running_var_x,
    const std::optional<Tensor>& num_batches_tracked_x, const std::optional<Tensor>& running_mean_y,
    const std::optional<Tensor>& running_var_y, const std::optional<Tensor>& num_batches_tracked_y,
    bool training, double momentum, double eps) {
  auto [x, y, inv_std] = omni_router_logits_save_stats_meta(
      hidden_states, gate_x, gate_y, running_mean_x, running_var_x, num_batches_tracked_x,
      running_mean_y, running_var_y, num_batches_tracked_y, training, momentum, eps);
  return {x, y};
}

std::tuple<Tensor, Tensor> omni_router_logits_backward_meta(
    const Tensor& grad_router_logits_x, const Tensor& grad_router_logits_y,
    const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
    const Tensor& router_logits_x, const Tensor& router_logits_y, const Tensor& inv_std,
    bool /*training*/, std::array<bool, 2> output_mask) {
  check_router_logits_backward("omni_router_logits_backward", grad_router_logits_x,
                               grad_router_logits_y, hidden_states, gate_x, gate_y, router_logits_x,
                               router_logits_y, inv_std);
  const auto width = gate_x.sym_size(0) + gate_y.sym_size(0);
  return {if_wanted(output_mask[0], hidden_states),
          output_mask[1] ? at::empty_symint({width, gate_x.sym_size(1)}, gate_x.options())
                         : at::empty({0}, gate_x.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(omni_moe, Meta, m) {
  m.impl("omni_router", omni_router_meta);
  m.impl("omni_router_backward", omni_router_backward_meta);
  m.impl("omni_softmax_router", omni_softmax_router_meta);
  m.impl("omni_softmax_router_backward", omni_softmax_router_backward_meta);
  m.impl("omni_expert", omni_expert_meta);
  m.impl("omni_expert_save_scores", omni_expert_save_scores_meta);
  m.impl("omni_expert_backward", omni_expert_backward_meta);
  m.impl("omni_mlp", omni_mlp_meta);
  m.impl("omni_mlp_save_gates", omni_mlp_save_gates_meta);
  m.impl("omni_mlp_backward", omni_mlp_backward_meta);
  m.impl("omni_mlp_backward_consume", omni_mlp_backward_consume_meta);
  m.impl("omni_expert_mlp", omni_expert_mlp_meta);
  m.impl("omni_expert_mlp_save", omni_expert_mlp_save_meta);
  m.impl("omni_batch_norm", omni_batch_norm_meta);
  m.impl("omni_batch_norm_save_stats", omni_batch_norm_save_stats_meta);
  m.impl("omni_batch_norm_backward", omni_batch_norm_backward_meta);
  m.impl("omni_router_logits", omni_router_logits_meta);
  m.impl("omni_router_logits_save_stats", omni_router_logits_save_stats_meta);
  m.impl("omni_router_logits_backward", omni_router_logits_backward_meta);
}

}  // namespace omni_moe::torch_api
