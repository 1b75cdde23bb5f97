// C++ entry points of the ops: what a libtorch program calls. What each computes is said in docs/,
// one page per op, and at its schema.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <string_view>
#include <tuple>

#include "op.h"

namespace omni_moe::torch_api {

using OptionalTensor = std::optional<Tensor>;
template <size_t kCount>
using Mask = std::array<bool, kCount>;  // which gradients are wanted

inline constexpr Op<"omni_router", std::tuple<Tensor, Tensor>(
                                       const Tensor& router_logits_x, const Tensor& router_logits_y,
                                       c10::SymInt num_experts_per_token, bool sorted)>
    omni_router;
inline constexpr Op<"_omni_router_backward",
                    std::tuple<Tensor, Tensor>(const Tensor& grad_scores, const Tensor& indices,
                                               c10::SymInt num_rows, c10::SymInt num_cols)>
    omni_router_backward;

inline constexpr Op<"omni_softmax_router",
                    std::tuple<Tensor, Tensor>(
                        const Tensor& router_logits_x, const Tensor& router_logits_y,
                        c10::SymInt num_experts_per_token, bool norm_topk_prob,
                        const OptionalTensor& token_mask, bool sorted)>
    omni_softmax_router;
inline constexpr Op<"_omni_softmax_router_backward",
                    std::tuple<Tensor, Tensor>(
                        const Tensor& grad_routing_weights, const Tensor& router_logits_x,
                        const Tensor& router_logits_y, const Tensor& indices, bool norm_topk_prob)>
    omni_softmax_router_backward;

inline constexpr Op<"omni_topk_router",
                    std::tuple<Tensor, Tensor, Tensor>(
                        const Tensor& router_logits, c10::SymInt num_experts_per_token,
                        std::string_view scoring_func, bool norm_topk_prob,
                        double routed_scaling_factor, int64_t n_group, int64_t topk_group,
                        std::string_view group_score, const OptionalTensor& e_score_correction_bias,
                        const OptionalTensor& token_mask, const OptionalTensor& replay_indices)>
    omni_topk_router;
inline constexpr Op<"_omni_topk_router_backward",
                    Tensor(const Tensor& grad_routing_weights, const Tensor& router_logits,
                           const Tensor& indices, std::string_view scoring_func,
                           bool norm_topk_prob, double routed_scaling_factor)>
    omni_topk_router_backward;
inline constexpr Op<"omni_expert_slots",
                    Tensor(const Tensor& indices, c10::SymInt num_experts, c10::SymInt capacity,
                           const OptionalTensor& priorities)>
    omni_expert_slots;

inline constexpr Op<"omni_expert_rows",
                    std::tuple<Tensor, Tensor>(const Tensor& indices, c10::SymInt num_experts,
                                               const OptionalTensor& slots,
                                               const std::optional<c10::SymInt>& capacity)>
    omni_expert_rows;
inline constexpr Op<"omni_permute",
                    Tensor(const Tensor& tokens, const Tensor& row_id_map,
                           const Tensor& expert_ends, c10::SymInt num_rows, bool padded)>
    omni_permute;
inline constexpr Op<"omni_unpermute",
                    Tensor(const Tensor& rows, const Tensor& row_id_map, const Tensor& expert_ends,
                           const OptionalTensor& weights, bool padded)>
    omni_unpermute;
inline constexpr Op<"_omni_unpermute_backward",
                    std::tuple<Tensor, Tensor>(const Tensor& grad_tokens, const Tensor& rows,
                                               const Tensor& row_id_map, const Tensor& expert_ends,
                                               const Tensor& weights, bool padded,
                                               Mask<2> output_mask)>
    omni_unpermute_backward;

inline constexpr Op<"_omni_grouped_linear",
                    Tensor(const Tensor& rows, const Tensor& weight, const Tensor& expert_ends)>
    omni_grouped_linear;
inline constexpr Op<"_omni_grouped_linear_backward",
                    std::tuple<Tensor, Tensor>(const Tensor& grad_output, const Tensor& rows,
                                               const Tensor& weight, const Tensor& expert_ends,
                                               Mask<2> output_mask)>
    omni_grouped_linear_backward;
inline constexpr Op<"_omni_gated_activation",
                    Tensor(const Tensor& gate_up, std::string_view activation)>
    omni_gated_activation;
inline constexpr Op<"_omni_gated_activation_backward",
                    Tensor(const Tensor& grad_activated, const Tensor& gate_up,
                           std::string_view activation)>
    omni_gated_activation_backward;

inline constexpr Op<"omni_router_logits",
                    std::tuple<Tensor, Tensor, Tensor>(
                        const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
                        at::TensorList batch_norm_buffers, double momentum, double eps,
                        const OptionalTensor& token_mask)>
    omni_router_logits;
inline constexpr Op<"_omni_router_logits_eval",
                    std::tuple<Tensor, Tensor, Tensor>(
                        const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
                        const Tensor& running_mean_x, const Tensor& running_var_x,
                        const Tensor& running_mean_y, const Tensor& running_var_y, double eps)>
    omni_router_logits_eval;
inline constexpr Op<"_omni_router_logits_backward",
                    std::tuple<Tensor, Tensor>(
                        const Tensor& grad_router_logits_x, const Tensor& grad_router_logits_y,
                        const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
                        const Tensor& router_logits_x, const Tensor& router_logits_y,
                        const Tensor& inv_std, bool training, Mask<2> output_mask,
                        const OptionalTensor& token_mask)>
    omni_router_logits_backward;

inline constexpr Op<"omni_router_logits_per_token",
                    std::tuple<Tensor, Tensor, Tensor>(const Tensor& hidden_states,
                                                       const Tensor& gate_x, const Tensor& gate_y,
                                                       std::string_view norm, double eps)>
    omni_router_logits_per_token;
inline constexpr Op<"_omni_router_logits_per_token_backward",
                    std::tuple<Tensor, Tensor>(
                        const Tensor& grad_router_logits_x, const Tensor& grad_router_logits_y,
                        const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
                        const Tensor& router_logits_x, const Tensor& router_logits_y,
                        const Tensor& inv_std, std::string_view norm, Mask<2> output_mask)>
    omni_router_logits_per_token_backward;

inline constexpr Op<"omni_expert",
                    std::tuple<Tensor, Tensor>(
                        const Tensor& hidden_states, const Tensor& up_weights,
                        const Tensor& down_weights, const Tensor& routing_weights,
                        const Tensor& indices, std::string_view activation,
                        const OptionalTensor& addend, bool save_for_backward, c10::SymInt num_cols)>
    omni_expert;
inline constexpr Op<"_omni_expert_backward",
                    std::tuple<Tensor, Tensor, Tensor, Tensor>(
                        const Tensor& grad_expert_states, const Tensor& hidden_states,
                        const Tensor& up_weights, const Tensor& down_weights,
                        const Tensor& routing_weights, const Tensor& indices,
                        const Tensor& pre_activations, std::string_view activation,
                        const OptionalTensor& addend, Mask<4> output_mask, c10::SymInt num_cols)>
    omni_expert_backward;

inline constexpr Op<"omni_mlp", std::tuple<Tensor, Tensor, Tensor>(
                                    const Tensor& x, const Tensor& gate_weight,
                                    const Tensor& up_weight, const Tensor& down_weight,
                                    std::string_view activation, bool save_for_backward)>
    omni_mlp;
inline constexpr Op<"_omni_mlp_backward",
                    std::tuple<Tensor, Tensor, Tensor, Tensor>(
                        const Tensor& grad_output, const Tensor& x, const Tensor& gate_weight,
                        const Tensor& up_weight, const Tensor& down_weight, const Tensor& gate,
                        const Tensor& up, std::string_view activation, Mask<4> output_mask)>
    omni_mlp_backward;
inline constexpr Op<"_omni_mlp_backward_consume",
                    std::tuple<Tensor, Tensor, Tensor, Tensor>(
                        const Tensor& grad_output, const Tensor& x, const Tensor& gate_weight,
                        const Tensor& up_weight, const Tensor& down_weight, Tensor& gate,
                        Tensor& up, std::string_view activation, Mask<4> output_mask)>
    omni_mlp_backward_consume;

inline constexpr Op<"omni_expert_mlp",
                    std::tuple<Tensor, Tensor, Tensor, Tensor>(
                        const Tensor& hidden_states, const Tensor& up_embed,
                        const Tensor& down_embed, const Tensor& routing_weights,
                        const Tensor& indices, const Tensor& gate_weight, const Tensor& up_weight,
                        const Tensor& down_weight, std::string_view activation,
                        bool save_for_backward, c10::SymInt num_cols)>
    omni_expert_mlp;

}  // namespace omni_moe::torch_api
