// The top-k router over E independent logits, and the places of its pairs in queues of a capacity.
#include "omni_moe/topk_router.h"

#include "backend.h"
#include "checks.h"
#include "ops.h"

// ---- Schemas -----------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  // logits (T, E); bias (E); mask (T) bool; replayed ids (T, K) int32 or int64
  // -> (T, K), (T, K) int32, (E) int64.
  m.def(
      "omni_topk_router(Tensor router_logits, SymInt num_experts_per_token, "
      "str scoring_func='softmax', bool norm_topk_prob=False, float routed_scaling_factor=1.0, "
      "int n_group=1, int topk_group=1, str group_score='top2_sum', "
      "Tensor? e_score_correction_bias=None, Tensor? token_mask=None, "
      "Tensor? replay_indices=None) "
      "-> (Tensor routing_weights, Tensor indices, Tensor expert_counts)");
  m.def(
      "_omni_topk_router_backward(Tensor grad_routing_weights, Tensor router_logits, "
      "Tensor indices, str scoring_func, bool norm_topk_prob, float routed_scaling_factor) "
      "-> Tensor grad_router_logits");

  // ids (T, K) int32, priorities (T, K) -> (T, K) int32.
  m.def(
      "omni_expert_slots(Tensor indices, SymInt num_experts, SymInt capacity, "
      "Tensor? priorities=None) -> Tensor slots");
}

namespace omni_moe::torch_api {

namespace {

using Triple = std::tuple<Tensor, Tensor, Tensor>;

constexpr int64_t kMaxExperts = 4096;  // one token's list of them fits in shared memory

ScoringFunction parse_scoring_func(const char* op, std::string_view name) {
  if (name == "softmax") return ScoringFunction::kSoftmax;
  if (name == "sigmoid") return ScoringFunction::kSigmoid;
  if (name == "sqrtsoftplus") return ScoringFunction::kSqrtSoftplus;
  TORCH_CHECK_VALUE(false, op, ": expected scoring_func to be one of softmax, sigmoid, ",
                    "sqrtsoftplus, but got '", name, "'");
}

GroupScore parse_group_score(const char* op, std::string_view name) {
  if (name == "top2_sum") return GroupScore::kTop2Sum;
  if (name == "max") return GroupScore::kMax;
  TORCH_CHECK_VALUE(false, op, ": expected group_score to be one of top2_sum, max, but got '", name,
                    "'");
}

// ---- Outputs -----------------------------------------------------------------------------------

void check_logits(const Argument& logits) {
  check_rank(logits, 2);
  check_floating(logits);
  const c10::SymInt num_experts = logits.tensor.sym_size(1);
  TORCH_CHECK_VALUE(num_experts <= kMaxExperts, logits.op, ": expected at most ", kMaxExperts,
                    " experts, but got ", num_experts);
}

// Ids (T, K) of the tokens of `first`.
void check_ids(const Argument& ids, const Argument& first) {
  check_rank(ids, 2);
  check_like(ids, first, /*same_dtype=*/false);
  check_size(ids, 0, first.tensor.sym_size(0), std::string("number of tokens of ") + first.name);
}

Triple topk_router_outputs(const Tensor& router_logits, c10::SymInt num_experts_per_token,
                           std::string_view scoring_func, bool /*norm_topk_prob*/,
                           double /*routed_scaling_factor*/, int64_t n_group, int64_t topk_group,
                           std::string_view group_score,
                           const OptionalTensor& e_score_correction_bias,
                           const OptionalTensor& token_mask, const OptionalTensor& replay_indices) {
  const char* op = omni_topk_router.name;
  const Argument logits{op, "router_logits", router_logits};
  check_logits(logits);
  parse_scoring_func(op, scoring_func);
  parse_group_score(op, group_score);
  const c10::SymInt num_tokens = router_logits.sym_size(0), num_experts = router_logits.sym_size(1);
  TORCH_CHECK_VALUE(n_group >= 1 && num_experts % n_group == 0, op,
                    ": expected n_group to divide the ", num_experts, " experts, but got ",
                    n_group);
  TORCH_CHECK_VALUE(topk_group >= 1 && topk_group <= n_group, op,
                    ": expected topk_group between 1 and the ", n_group, " groups, but got ",
                    topk_group);
  const c10::SymInt num_choices = num_experts / n_group * topk_group;
  TORCH_CHECK_VALUE(num_experts_per_token >= 0 && num_experts_per_token <= num_choices, op,
                    ": expected num_experts_per_token between 0 and the ", num_choices,
                    " experts of the chosen groups, but got ", num_experts_per_token);
  if (e_score_correction_bias) {
    const Argument bias{op, "e_score_correction_bias", *e_score_correction_bias};
    check_rank(bias, 1);
    check_like(bias, logits, /*same_dtype=*/false);
    check_dtype(bias, accumulation_dtype(router_logits.scalar_type()));
    check_size(bias, 0, num_experts, "number of experts of router_logits");
  }
  if (token_mask) check_token_mask({op, "token_mask", *token_mask}, logits);
  if (replay_indices) {
    const Argument ids{op, "replay_indices", *replay_indices};
    check_ids(ids, logits);
    check_integer(ids);
    check_size(ids, 1, num_experts_per_token, "num_experts_per_token");
  }
  const c10::SymInt pairs[] = {num_tokens, num_experts_per_token}, experts[] = {num_experts};
  const auto options = router_logits.options();
  return {at::empty_symint(pairs, options), at::empty_symint(pairs, options.dtype(at::kInt)),
          at::empty_symint(experts, options.dtype(at::kLong))};
}

Tensor topk_router_backward_outputs(const Tensor& grad_routing_weights, const Tensor& router_logits,
                                    const Tensor& indices, std::string_view scoring_func,
                                    bool /*norm_topk_prob*/, double /*routed_scaling_factor*/) {
  const char* op = omni_topk_router_backward.name;
  const Argument grad{op, "grad_routing_weights", grad_routing_weights};
  const Argument logits{op, "router_logits", router_logits};
  const Argument ids{op, "indices", indices};
  check_logits(logits);
  parse_scoring_func(op, scoring_func);
  check_rank(grad, 2);
  check_like(grad, logits);
  check_size(grad, 0, router_logits.sym_size(0), "number of tokens of router_logits");
  check_ids(ids, logits);
  check_dtype(ids, at::kInt);
  check_size(ids, 1, grad_routing_weights.sym_size(1), "experts per token of the gradient");
  return at::empty_symint(router_logits.sym_sizes(), router_logits.options());
}

Tensor expert_slots_outputs(const Tensor& indices, c10::SymInt num_experts, c10::SymInt capacity,
                            const OptionalTensor& priorities) {
  const char* op = omni_expert_slots.name;
  const Argument ids{op, "indices", indices};
  check_rank(ids, 2);
  check_dtype(ids, at::kInt);
  TORCH_CHECK_VALUE(num_experts >= 0 && num_experts <= kMaxExperts, op,
                    ": expected num_experts between 0 and ", kMaxExperts, ", but got ",
                    num_experts);
  TORCH_CHECK_VALUE(capacity >= 0, op, ": expected capacity >= 0, but got ", capacity);
  check_fits_int32(op, indices.sym_numel(), "indices");  // slots are int32
  if (priorities) {
    const Argument order{op, "priorities", *priorities};
    check_rank(order, 2);
    check_floating(order);
    check_like(order, ids, /*same_dtype=*/false);
    check_size(order, 0, indices.sym_size(0), "number of tokens of indices");
    check_size(order, 1, indices.sym_size(1), "experts per token of indices");
  }
  return at::empty_symint(indices.sym_sizes(), indices.options());
}

// ---- Kernels -----------------------------------------------------------------------------------

TopKRouterShape shape_of(const char* op, const Tensor& logits, int64_t num_experts_per_token,
                         std::string_view scoring_func, bool norm_topk_prob,
                         double routed_scaling_factor) {
  return {.num_tokens = logits.size(0),
          .num_experts = logits.size(1),
          .num_experts_per_token = num_experts_per_token,
          .dtype = to_dtype(logits),
          .scoring_func = parse_scoring_func(op, scoring_func),
          .norm_topk_prob = norm_topk_prob,
          .routed_scaling_factor = routed_scaling_factor};
}

Tensor contiguous(const OptionalTensor& tensor) { return tensor ? tensor->contiguous() : Tensor(); }

Triple topk_router_kernel(const Tensor& router_logits, c10::SymInt num_experts_per_token,
                          std::string_view scoring_func, bool norm_topk_prob,
                          double routed_scaling_factor, int64_t n_group, int64_t topk_group,
                          std::string_view group_score,
                          const OptionalTensor& e_score_correction_bias,
                          const OptionalTensor& token_mask, const OptionalTensor& replay_indices) {
  const char* op = omni_topk_router.name;
  auto outputs =
      topk_router_outputs(router_logits, std::move(num_experts_per_token), scoring_func,
                          norm_topk_prob, routed_scaling_factor, n_group, topk_group, group_score,
                          e_score_correction_bias, token_mask, replay_indices);
  auto& [weights, indices, counts] = outputs;
  const Tensor logits = router_logits.contiguous(), bias = contiguous(e_score_correction_bias),
               mask = contiguous(token_mask);
  Tensor replay = contiguous(replay_indices);
  if (replay_indices) {
    check_indices(op, replay, logits.size(1), /*lowest=*/-1);
    replay = replay.to(at::kInt);
  }
  TopKRouterForwardParams params{
      shape_of(op, logits, indices.size(1), scoring_func, norm_topk_prob, routed_scaling_factor)};
  params.logits = logits.const_data_ptr();
  if (e_score_correction_bias) params.bias = bias.const_data_ptr();
  if (token_mask) params.token_mask = mask.const_data_ptr<bool>();
  if (replay_indices) params.replay_ids = replay.const_data_ptr<int32_t>();
  params.weights = weights.mutable_data_ptr();
  params.indices = indices.mutable_data_ptr<int32_t>();
  params.expert_counts = counts.mutable_data_ptr<int64_t>();
  params.n_group = n_group;
  params.topk_group = topk_group;
  params.group_score = parse_group_score(op, group_score);
  launch(params, logits.device());
  return outputs;
}

Tensor topk_router_backward_kernel(const Tensor& grad_routing_weights, const Tensor& router_logits,
                                   const Tensor& indices, std::string_view scoring_func,
                                   bool norm_topk_prob, double routed_scaling_factor) {
  const char* op = omni_topk_router_backward.name;
  Tensor grad_logits =
      topk_router_backward_outputs(grad_routing_weights, router_logits, indices, scoring_func,
                                   norm_topk_prob, routed_scaling_factor);
  const Tensor grad = grad_routing_weights.contiguous(), logits = router_logits.contiguous(),
               ids = indices.contiguous();
  check_indices(op, ids, logits.size(1), /*lowest=*/-1);
  TopKRouterBackwardParams params{
      shape_of(op, logits, ids.size(1), scoring_func, norm_topk_prob, routed_scaling_factor)};
  params.grad_weights = grad.const_data_ptr();
  params.logits = logits.const_data_ptr();
  params.indices = ids.const_data_ptr<int32_t>();
  params.grad_logits = grad_logits.mutable_data_ptr();
  launch(params, logits.device());
  return grad_logits;
}

// Slots of pairs that queue in the order in which they lie.
Tensor slots_in_order(const Tensor& ids, int64_t num_experts, int64_t capacity) {
  Tensor slots = at::empty_like(ids);
  launch(ExpertSlotsParams{.indices = ids.const_data_ptr<int32_t>(),
                           .slots = slots.mutable_data_ptr<int32_t>(),
                           .num_pairs = ids.numel(),
                           .num_experts = num_experts,
                           .capacity = capacity},
         ids.device());
  return slots;
}

Tensor expert_slots_kernel(const Tensor& indices, c10::SymInt num_experts, c10::SymInt capacity,
                           const OptionalTensor& priorities) {
  const char* op = omni_expert_slots.name;
  expert_slots_outputs(indices, num_experts, capacity, priorities);
  const int64_t experts = num_experts.expect_int(), places = capacity.expect_int();
  const Tensor ids = indices.contiguous();
  check_indices(op, ids, experts, /*lowest=*/-1);
  if (!priorities) return slots_in_order(ids, experts, places);
  // The pairs queue by priority: put in that order, given their slots, and put back.
  const Tensor order = at::argsort(priorities->flatten(), /*stable=*/true, /*dim=*/0,
                                   /*descending=*/true);
  const Tensor sorted = slots_in_order(ids.flatten().index_select(0, order), experts, places);
  return at::empty_like(sorted).scatter_(0, order, sorted).view_as(ids);
}

// ---- Gradient ----------------------------------------------------------------------------------

// Of its outputs the ids and counts have no gradient, and autograd shall not make zeros for them.
struct OmniTopKRouterBackward : Function<OmniTopKRouterBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& router_logits,
                               const c10::SymInt& num_experts_per_token,
                               std::string_view scoring_func, bool norm_topk_prob,
                               double routed_scaling_factor, int64_t n_group, int64_t topk_group,
                               std::string_view group_score,
                               const OptionalTensor& e_score_correction_bias,
                               const OptionalTensor& token_mask,
                               const OptionalTensor& replay_indices) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [weights, indices, counts] = omni_topk_router(
        router_logits, num_experts_per_token, scoring_func, norm_topk_prob, routed_scaling_factor,
        n_group, topk_group, group_score, e_score_correction_bias, token_mask, replay_indices);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({router_logits, indices});
    ctx->saved_data["scoring_func"] = std::string(scoring_func);
    ctx->saved_data["norm_topk_prob"] = norm_topk_prob;
    ctx->saved_data["routed_scaling_factor"] = routed_scaling_factor;
    return {weights, indices, counts};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list input_grads(11);
    if (!grads[0].defined() || !ctx->needs_input_grad(0)) return input_grads;
    const auto saved = ctx->get_saved_variables();
    input_grads[0] = omni_topk_router_backward(grads[0], saved[0], saved[1],
                                               ctx->saved_data["scoring_func"].toStringRef(),
                                               ctx->saved_data["norm_topk_prob"].toBool(),
                                               ctx->saved_data["routed_scaling_factor"].toDouble());
    return input_grads;
  }
};

// ---- Registration ------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  register_kernels(m, omni_topk_router, topk_router_outputs, topk_router_kernel);
  register_gradient<omni_topk_router, OmniTopKRouterBackward>(m);

  register_kernels(m, omni_topk_router_backward, topk_router_backward_outputs,
                   topk_router_backward_kernel);
  register_no_gradient(m, omni_topk_router_backward);

  register_kernels(m, omni_expert_slots, expert_slots_outputs, expert_slots_kernel);
  register_no_gradient(m, omni_expert_slots);
}

}  // namespace

}  // namespace omni_moe::torch_api
