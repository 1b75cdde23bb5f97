// Schemas of every op. Shapes and meanings: docs/, one page per op.
#include <torch/library.h>

TORCH_LIBRARY(omni_moe, m) {
  // Cartesian-product router: x (T, R), y (T, C) -> (T, K), (T, K) int32.
  m.def(
      "omni_router(Tensor router_logits_x, Tensor router_logits_y, SymInt num_experts_per_token) "
      "-> (Tensor scores, Tensor indices)");
  m.def(
      "omni_router_backward(Tensor grad_scores, Tensor indices, SymInt num_rows, SymInt num_cols) "
      "-> (Tensor grad_router_logits_x, Tensor grad_router_logits_y)");

  // The same behind log_softmax and exp: what the layer uses.
  m.def(
      "omni_softmax_router(Tensor router_logits_x, Tensor router_logits_y, "
      "SymInt num_experts_per_token, bool norm_topk_prob=False) "
      "-> (Tensor routing_weights, Tensor indices)");
  m.def(
      "omni_softmax_router_backward(Tensor grad_routing_weights, Tensor router_logits_x, "
      "Tensor router_logits_y, Tensor indices, bool norm_topk_prob) "
      "-> (Tensor grad_router_logits_x, Tensor grad_router_logits_y)");

  // Atomic experts: hidden (T, H), up and down (E, H), routing and indices (T, K) -> (T, H),
  // onto an addend (T, H) if there is one.
  // omni_expert_save_scores also returns s = hidden[t] . up[i] (T, K) in the accumulation type,
  // which the backward computes again where it is not given. The backward's addend (T, H) is added
  // to grad_hidden_states. A gradient that output_mask does not ask for comes back empty.
  m.def(
      "omni_expert(Tensor hidden_states, Tensor up_weights, Tensor down_weights, "
      "Tensor routing_weights, Tensor indices, str activation=\"silu\", Tensor? addend=None) "
      "-> Tensor");
  m.def(
      "omni_expert_save_scores(Tensor hidden_states, Tensor up_weights, Tensor down_weights, "
      "Tensor routing_weights, Tensor indices, str activation, Tensor? addend=None) "
      "-> (Tensor expert_states, Tensor scores)");
  m.def(
      "omni_expert_backward(Tensor grad_expert_states, Tensor hidden_states, Tensor up_weights, "
      "Tensor down_weights, Tensor routing_weights, Tensor indices, str activation, "
      "bool[4] output_mask, Tensor? scores=None, Tensor? addend=None) -> ("
      "Tensor grad_hidden_states, Tensor grad_up_weights, Tensor grad_down_weights, "
      "Tensor grad_routing_weights)");
  m.def(
      "flash_expert(Tensor hidden_states, Tensor down_weights, Tensor up_weights, Tensor indices, "
      "Tensor routing_weights, str activation=\"silu\") -> Tensor");

  // Shared MLP: x (…, H), gate and up (I, H), down (H, I) -> (…, H). omni_mlp_save_gates also
  // returns the two products (…, I) that the backward can use instead of computing them again.
  m.def(
      "omni_mlp(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor down_weight, "
      "str activation=\"silu\", bool recompute=False) -> Tensor");
  m.def(
      "omni_mlp_save_gates(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor down_weight, "
      "str activation) -> (Tensor output, Tensor gate, Tensor up)");
  m.def(
      "omni_mlp_backward(Tensor grad_output, Tensor x, Tensor gate_weight, Tensor up_weight, "
      "Tensor down_weight, Tensor? gate, Tensor? up, str activation, bool[4] output_mask) "
      "-> (Tensor grad_x, Tensor grad_gate_weight, Tensor grad_up_weight, "
      "Tensor grad_down_weight)");
  // The same, and takes gate and up for its own memory: their values are lost.
  m.def(
      "omni_mlp_backward_consume(Tensor grad_output, Tensor x, Tensor gate_weight, "
      "Tensor up_weight, Tensor down_weight, Tensor(a!) gate, Tensor(b!) up, str activation, "
      "bool[4] output_mask) -> (Tensor grad_x, Tensor grad_gate_weight, Tensor grad_up_weight, "
      "Tensor grad_down_weight)");

  // Atomic experts and shared MLP on the same tokens: hidden (T, H), embeds (E, H), routing and
  // indices (T, K), gate and up (I, H), down (H, I) -> (T, H). omni_expert_mlp_save also returns
  // what the two backward ops take: the scores and, with save_products (else empty), gate and up.
  m.def(
      "omni_expert_mlp(Tensor hidden_states, Tensor up_embed, Tensor down_embed, "
      "Tensor routing_weights, Tensor indices, Tensor gate_weight, Tensor up_weight, "
      "Tensor down_weight, str activation=\"silu\", bool recompute=False) -> Tensor");
  m.def(
      "omni_expert_mlp_save(Tensor hidden_states, Tensor up_embed, Tensor down_embed, "
      "Tensor routing_weights, Tensor indices, Tensor gate_weight, Tensor up_weight, "
      "Tensor down_weight, str activation, bool save_products) "
      "-> (Tensor output, Tensor scores, Tensor gate, Tensor up)");

  // BatchNorm of the router's logits (T, R + C), the rows' then the columns', R = num_rows ->
  // (T, R), (T, C). Updates the running statistics and counters that it is given, if training.
  // omni_batch_norm_save_stats also returns 1 / sqrt(var + eps) (R + C) in the accumulation type.
  m.def(
      "omni_batch_norm(Tensor router_logits, SymInt num_rows, Tensor(a!)? running_mean_x, "
      "Tensor(b!)? running_var_x, Tensor(c!)? num_batches_tracked_x, Tensor(d!)? running_mean_y, "
      "Tensor(e!)? running_var_y, Tensor(f!)? num_batches_tracked_y, bool training, "
      "float momentum=0.1, float eps=1e-05) -> (Tensor normed_x, Tensor normed_y)");
  m.def(
      "omni_batch_norm_save_stats(Tensor router_logits, SymInt num_rows, "
      "Tensor(a!)? running_mean_x, Tensor(b!)? running_var_x, Tensor(c!)? num_batches_tracked_x, "
      "Tensor(d!)? running_mean_y, Tensor(e!)? running_var_y, Tensor(f!)? num_batches_tracked_y, "
      "bool training, float momentum=0.1, float eps=1e-05) "
      "-> (Tensor normed_x, Tensor normed_y, Tensor inv_std)");
  m.def(
      "omni_batch_norm_backward(Tensor grad_normed_x, Tensor grad_normed_y, Tensor normed_x, "
      "Tensor normed_y, Tensor inv_std, bool training) -> Tensor");

  // Both gates and that BatchNorm: hidden (T, H), gates (R, H) and (C, H) -> (T, R), (T, C). The
  // backward's gradient of the gates is that of both, (R + C, H); what output_mask does not ask for
  // comes back empty.
  m.def(
      "omni_router_logits(Tensor hidden_states, Tensor gate_x, Tensor gate_y, "
      "Tensor(a!)? running_mean_x, Tensor(b!)? running_var_x, Tensor(c!)? num_batches_tracked_x, "
      "Tensor(d!)? running_mean_y, Tensor(e!)? running_var_y, Tensor(f!)? num_batches_tracked_y, "
      "bool training, float momentum=0.1, float eps=1e-05) "
      "-> (Tensor router_logits_x, Tensor router_logits_y)");
  m.def(
      "omni_router_logits_save_stats(Tensor hidden_states, Tensor gate_x, Tensor gate_y, "
      "Tensor(a!)? running_mean_x, Tensor(b!)? running_var_x, Tensor(c!)? num_batches_tracked_x, "
      "Tensor(d!)? running_mean_y, Tensor(e!)? running_var_y, Tensor(f!)? num_batches_tracked_y, "
      "bool training, float momentum=0.1, float eps=1e-05) "
      "-> (Tensor router_logits_x, Tensor router_logits_y, Tensor inv_std)");
  m.def(
      "omni_router_logits_backward(Tensor grad_router_logits_x, Tensor grad_router_logits_y, "
      "Tensor hidden_states, Tensor gate_x, Tensor gate_y, Tensor router_logits_x, "
      "Tensor router_logits_y, Tensor inv_std, bool training, bool[2] output_mask) "
      "-> (Tensor grad_hidden_states, Tensor grad_gates)");
}
