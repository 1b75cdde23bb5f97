#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace omni_moe::torch_api {

namespace {

// Looks the op up once per call site, then calls it with the signature of `function`.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name, Signature* /*function*/) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

std::tuple<Tensor, Tensor> omni_router(const Tensor& router_logits_x, const Tensor& router_logits_y,
                                       c10::SymInt num_experts_per_token) {
  static const auto op = find_op("omni_moe::omni_router", omni_router);
  return op.call(router_logits_x, router_logits_y, std::move(num_experts_per_token));
}

std::tuple<Tensor, Tensor> omni_router_backward(const Tensor& grad_scores, const Tensor& indices,
                                                c10::SymInt num_rows, c10::SymInt num_cols) {
  static const auto op = find_op("omni_moe::omni_router_backward", omni_router_backward);
  return op.call(grad_scores, indices, std::move(num_rows), std::move(num_cols));
}

std::tuple<Tensor, Tensor> omni_softmax_router(const Tensor& router_logits_x,
                                               const Tensor& router_logits_y,
                                               c10::SymInt num_experts_per_token,
                                               bool norm_topk_prob) {
  static const auto op = find_op("omni_moe::omni_softmax_router", omni_softmax_router);
  return op.call(router_logits_x, router_logits_y, std::move(num_experts_per_token),
                 norm_topk_prob);
}

std::tuple<Tensor, Tensor> omni_softmax_router_backward(const Tensor& grad_routing_weights,
                                                        const Tensor& router_logits_x,
                                                        const Tensor& router_logits_y,
                                                        const Tensor& indices,
                                                        bool norm_topk_prob) {
  static const auto op =
      find_op("omni_moe::omni_softmax_router_backward", omni_softmax_router_backward);
  return op.call(grad_routing_weights, router_logits_x, router_logits_y, indices, norm_topk_prob);
}

Tensor omni_expert(const Tensor& hidden_states, const Tensor& up_weights,
                   const Tensor& down_weights, const Tensor& routing_weights, const Tensor& indices,
                   std::string_view activation, const std::optional<Tensor>& addend) {
  static const auto op = find_op("omni_moe::omni_expert", omni_expert);
  return op.call(hidden_states, up_weights, down_weights, routing_weights, indices, activation,
                 addend);
}

std::tuple<Tensor, Tensor> omni_expert_save_scores(
    const Tensor& hidden_states, const Tensor& up_weights, const Tensor& down_weights,
    const Tensor& routing_weights, const Tensor& indices, std::string_view activation,
    const std::optional<Tensor>& addend) {
  static const auto op = find_op("omni_moe::omni_expert_save_scores", omni_expert_save_scores);
  return op.call(hidden_states, up_weights, down_weights, routing_weights, indices, activation,
                 addend);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> omni_expert_backward(
    const Tensor& grad_expert_states, const Tensor& hidden_states, const Tensor& up_weights,
    const Tensor& down_weights, const Tensor& routing_weights, const Tensor& indices,
    std::string_view activation, std::array<bool, 4> output_mask,
    const std::optional<Tensor>& scores, const std::optional<Tensor>& addend) {
  static const auto op = find_op("omni_moe::omni_expert_backward", omni_expert_backward);
  return op.call(grad_expert_states, hidden_states, up_weights, down_weights, routing_weights,
                 indices, activation, output_mask, scores, addend);
}

Tensor flash_expert(const Tensor& hidden_states, const Tensor& down_weights,
                    const Tensor& up_weights, const Tensor& indices, const Tensor& routing_weights,
                    std::string_view activation) {
  static const auto op = find_op("omni_moe::flash_expert", flash_expert);
  return op.call(hidden_states, down_weights, up_weights, indices, routing_weights, activation);
}

Tensor omni_mlp(const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
                const Tensor& down_weight, std::string_view activation, bool recompute) {
  static const auto op = find_op("omni_moe::omni_mlp", omni_mlp);
  return op.call(x, gate_weight, up_weight, down_weight, activation, recompute);
}

std::tuple<Tensor, Tensor, Tensor> omni_mlp_save_gates(const Tensor& x, const Tensor& gate_weight,
                                                       const Tensor& up_weight,
                                                       const Tensor& down_weight,
                                                       std::string_view activation) {
  static const auto op = find_op("omni_moe::omni_mlp_save_gates", omni_mlp_save_gates);
  return op.call(x, gate_weight, up_weight, down_weight, activation);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> omni_mlp_backward(
    const Tensor& grad_output, const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
    const Tensor& down_weight, const std::optional<Tensor>& gate, const std::optional<Tensor>& up,
    std::string_view activation, std::array<bool, 4> output_mask) {
  static const auto op = find_op("omni_moe::omni_mlp_backward", omni_mlp_backward);
  return op.call(grad_output, x, gate_weight, up_weight, down_weight, gate, up, activation,
                 output_mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> omni_mlp_backward_consume(
    const Tensor& grad_output, const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
    const Tensor& down_weight, Tensor& gate, Tensor& up, std::string_view activation,
    std::array<bool, 4> output_mask) {
  static const auto op = find_op("omni_moe::omni_mlp_backward_consume", omni_mlp_backward_consume);
  return op.call(grad_output, x, gate_weight, up_weight, down_weight, gate, up, activation,
                 output_mask);
}

Tensor omni_expert_mlp(const Tensor& hidden_states, const Tensor& up_embed,
                       const Tensor& down_embed, const Tensor& routing_weights,
                       const Tensor& indices, const Tensor& gate_weight, const Tensor& up_weight,
                       const Tensor& down_weight, std::string_view activation, bool recompute) {
  static const auto op = find_op("omni_moe::omni_expert_mlp", omni_expert_mlp);
  return op.call(hidden_states, up_embed, down_embed, routing_weights, indices, gate_weight,
                 up_weight, down_weight, activation, recompute);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> omni_expert_mlp_save(
    const Tensor& hidden_states, const Tensor& up_embed, const Tensor& down_embed,
    const Tensor& routing_weights, const Tensor& indices, const Tensor& gate_weight,
    const Tensor& up_weight, const Tensor& down_weight, std::string_view activation,
    bool save_products) {
  static const auto op = find_op("omni_moe::omni_expert_mlp_save", omni_expert_mlp_save);
  return op.call(hidden_states, up_embed, down_embed, routing_weights, indices, gate_weight,
                 up_weight, down_weight, activation, save_products);
}

std::tuple<Tensor, Tensor> omni_batch_norm(const Tensor& router_logits, c10::SymInt num_rows,
                                           const std::optional<Tensor>& running_mean_x,
                                           const std::optional<Tensor>& running_var_x,
                                           const std::optional<Tensor>& num_batches_tracked_x,
                                           const std::optional<Tensor>& running_mean_y,
                                           const std::optional<Tensor>& running_var_y,
                                           const std::optional<Tensor>& num_batches_tracked_y,
                                           bool training, double momentum, double eps) {
  static const auto op = find_op("omni_moe::omni_batch_norm", omni_batch_norm);
  return op.call(router_logits, std::move(num_rows), running_mean_x, running_var_x,
                 num_batches_tracked_x, running_mean_y, running_var_y, num_batches_tracked_y,
                 training, momentum, eps);
}

std::tuple<Tensor, Tensor, Tensor> omni_batch_norm_save_stats(
    const Tensor& router_logits, c10::SymInt num_rows, const std::optional<Tensor>& running_mean_x,
    const std::optional<Tensor>& running_var_x, const std::optional<Tensor>& num_batches_tracked_x,
    const std::optional<Tensor>& running_mean_y, const std::optional<Tensor>& running_var_y,
    const std::optional<Tensor>& num_batches_tracked_y, bool training, double momentum,
    double eps) {
  static const auto op =
      find_op("omni_moe::omni_batch_norm_save_stats", omni_batch_norm_save_stats);
  return op.call(router_logits, std::move(num_rows), running_mean_x, running_var_x,
                 num_batches_tracked_x, running_mean_y, running_var_y, num_batches_tracked_y,
                 training, momentum, eps);
}

Tensor omni_batch_norm_backward(const Tensor& grad_normed_x, const Tensor& grad_normed_y,
                                const Tensor& normed_x, const Tensor& normed_y,
                                const Tensor& inv_std, bool training) {
  static const auto op = find_op("omni_moe::omni_batch_norm_backward", omni_batch_norm_backward);
  return op.call(grad_normed_x, grad_normed_y, normed_x, normed_y, inv_std, training);
}

std::tuple<Tensor, Tensor> omni_router_logits(
    const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
    const std::optional<Tensor>& running_mean_x, const std::optional<Tensor>& running_var_x,
    const std::optional<Tensor>& num_batches_tracked_x, const std::optional<Tensor>& running_mean_y,
    const std::optional<Tensor>& running_var_y, const std::optional<Tensor>& num_batches_tracked_y,
    bool training, double momentum, double eps) {
  static const auto op = find_op("omni_moe::omni_router_logits", omni_router_logits);
  return op.call(hidden_states, gate_x, gate_y, running_mean_x, running_var_x,
                 num_batches_tracked_x, running_mean_y, running_var_y, num_batches_tracked_y,
                 training, momentum, eps);
}

std::tuple<Tensor, Tensor, Tensor> omni_router_logits_save_stats(
    const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
    const std::optional<Tensor>& running_mean_x, const std::optional<Tensor>& running_var_x,
    const std::optional<Tensor>& num_batches_tracked_x, const std::optional<Tensor>& running_mean_y,
    const std::optional<Tensor>& running_var_y, const std::optional<Tensor>& num_batches_tracked_y,
    bool training, double momentum, double eps) {
  static const auto op =
      find_op("omni_moe::omni_router_logits_save_stats", omni_router_logits_save_stats);
  return op.call(hidden_states, gate_x, gate_y, running_mean_x, running_var_x,
                 num_batches_tracked_x, running_mean_y, running_var_y, num_batches_tracked_y,
                 training, momentum, eps);
}

std::tuple<Tensor, Tensor> omni_router_logits_backward(
    const Tensor& grad_router_logits_x, const Tensor& grad_router_logits_y,
    const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
    const Tensor& router_logits_x, const Tensor& router_logits_y, const Tensor& inv_std,
    bool training, std::array<bool, 2> output_mask) {
  static const auto op =
      find_op("omni_moe::omni_router_logits_backward", omni_router_logits_backward);
  return op.call(grad_router_logits_x, grad_router_logits_y, hidden_states, gate_x, gate_y,
                 router_logits_x, router_logits_y, inv_std, training, output_mask);
}

}  // namespace omni_moe::torch_api
