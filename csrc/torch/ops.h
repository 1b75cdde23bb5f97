// C++ entry points of the ops: what a libtorch program calls. They go through the dispatcher, so
// autograd, autocast and meta tensors work as from Python.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <string_view>
#include <tuple>

namespace omni_moe::torch_api {

using Tensor = at::Tensor;

std::tuple<Tensor, Tensor> omni_router(const Tensor& router_logits_x, const Tensor& router_logits_y,
                                       c10::SymInt num_experts_per_token);
std::tuple<Tensor, Tensor> omni_router_backward(const Tensor& grad_scores, const Tensor& indices,
                                                c10::SymInt num_rows, c10::SymInt num_cols);

std::tuple<Tensor, Tensor> omni_softmax_router(const Tensor& router_logits_x,
                                               const Tensor& router_logits_y,
                                               c10::SymInt num_experts_per_token,
                                               bool norm_topk_prob);
std::tuple<Tensor, Tensor> omni_softmax_router_backward(const Tensor& grad_routing_weights,
                                                        const Tensor& router_logits_x,
                                                        const Tensor& router_logits_y,
                                                        const Tensor& indices, bool norm_topk_prob);

Tensor omni_expert(const Tensor& hidden_states, const Tensor& up_weights,
                   const Tensor& down_weights, const Tensor& routing_weights, const Tensor& indices,
                   std::string_view activation = "silu",
                   const std::optional<Tensor>& addend = std::nullopt);
std::tuple<Tensor, Tensor> omni_expert_save_scores(
    const Tensor& hidden_states, const Tensor& up_weights, const Tensor& down_weights,
    const Tensor& routing_weights, const Tensor& indices, std::string_view activation,
    const std::optional<Tensor>& addend = std::nullopt);
std::tuple<Tensor, Tensor, Tensor, Tensor> omni_expert_backward(
    const Tensor& grad_expert_states, const Tensor& hidden_states, const Tensor& up_weights,
    const Tensor& down_weights, const Tensor& routing_weights, const Tensor& indices,
    std::string_view activation, std::array<bool, 4> output_mask,
    const std::optional<Tensor>& scores = std::nullopt,
    const std::optional<Tensor>& addend = std::nullopt);
Tensor flash_expert(const Tensor& hidden_states, const Tensor& down_weights,
                    const Tensor& up_weights, const Tensor& indices, const Tensor& routing_weights,
                    std::string_view activation = "silu");

Tensor omni_mlp(const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
                const Tensor& down_weight, std::string_view activation = "silu",
                bool recompute = false);
std::tuple<Tensor, Tensor, Tensor> omni_mlp_save_gates(const Tensor& x, const Tensor& gate_weight,
                                                       const Tensor& up_weight,
                                                       const Tensor& down_weight,
                                                       std::string_view activation);
std::tuple<Tensor, Tensor, Tensor, Tensor> omni_mlp_backward(
    const Tensor& grad_output, const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
    const Tensor& down_weight, const std::optional<Tensor>& gate, const std::optional<Tensor>& up,
    std::string_view activation, std::array<bool, 4> output_mask);
std::tuple<Tensor, Tensor, Tensor, Tensor> omni_mlp_backward_consume(
    const Tensor& grad_output, const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
    const Tensor& down_weight, Tensor& gate, Tensor& up, std::string_view activation,
    std::array<bool, 4> output_mask);

Tensor omni_expert_mlp(const Tensor& hidden_states, const Tensor& up_embed,
                       const Tensor& down_embed, const Tensor& routing_weights,
                       const Tensor& indices, const Tensor& gate_weight, const Tensor& up_weight,
                       const Tensor& down_weight, std::string_view activation = "silu",
                       bool recompute = false);

std::tuple<Tensor, Tensor, Tensor, Tensor> omni_expert_mlp_save(
    const Tensor& hidden_states, const Tensor& up_embed, const Tensor& down_embed,
    const Tensor& routing_weights, const Tensor& indices, const Tensor& gate_weight,
    const Tensor& up_weight, const Tensor& down_weight, std::string_view activation,
    bool save_products);

// Updates the running statistics and counters in place, if training.
std::tuple<Tensor, Tensor> omni_batch_norm(const Tensor& router_logits, c10::SymInt num_rows,
                                           const std::optional<Tensor>& running_mean_x,
                                           const std::optional<Tensor>& running_var_x,
                                           const std::optional<Tensor>& num_batches_tracked_x,
                                           const std::optional<Tensor>& running_mean_y,
                                           const std::optional<Tensor>& running_var_y,
                                           const std::optional<Tensor>& num_batches_tracked_y,
                                           bool training, double momentum = 0.1, double eps = 1e-5);
std::tuple<Tensor, Tensor, Tensor> omni_batch_norm_save_stats(
    const Tensor& router_logits, c10::SymInt num_rows, const std::optional<Tensor>& running_mean_x,
    const std::optional<Tensor>& running_var_x, const std::optional<Tensor>& num_batches_tracked_x,
    const std::optional<Tensor>& running_mean_y, const std::optional<Tensor>& running_var_y,
    const std::optional<Tensor>& num_batches_tracked_y, bool training, double momentum, double eps);
Tensor omni_batch_norm_backward(const Tensor& grad_normed_x, const Tensor& grad_normed_y,
                                const Tensor& normed_x, const Tensor& normed_y,
                                const Tensor& inv_std, bool training);

// Likewise.
std::tuple<Tensor, Tensor> omni_router_logits(
    const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
    const std::optional<Tensor>& running_mean_x, const std::optional<Tensor>& running_var_x,
    const std::optional<Tensor>& num_batches_tracked_x, const std::optional<Tensor>& running_mean_y,
    const std::optional<Tensor>& running_var_y, const std::optional<Tensor>& num_batches_tracked_y,
    bool training, double momentum = 0.1, double eps = 1e-5);
std::tuple<Tensor, Tensor, Tensor> omni_router_logits_save_stats(
    const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
    const std::optional<Tensor>& running_mean_x, const std::optional<Tensor>& running_var_x,
    const std::optional<Tensor>& num_batches_tracked_x, const std::optional<Tensor>& running_mean_y,
    const std::optional<Tensor>& running_var_y, const std::optional<Tensor>& num_batches_tracked_y,
    bool training, double momentum, double eps);
std::tuple<Tensor, Tensor> omni_router_logits_backward(
    const Tensor& grad_router_logits_x, const Tensor& grad_router_logits_y,
    const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
    const Tensor& router_logits_x, const Tensor& router_logits_y, const Tensor& inv_std,
    bool training, std::array<bool, 2> output_mask);

}  // namespace omni_moe::torch_api
