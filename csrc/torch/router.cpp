// The Cartesian-product router, on its logits as they are or behind a softmax.
#include "omni_moe/router.h"

#include <limits>

#include "backend.h"
#include "checks.h"
#include "named_range.h"
#include "ops.h"

// ---- Schemas -----------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  // x (T, R), y (T, C) -> (T, K), (T, K) int32. Unless `sorted`, a token's K experts come in an
  // order that is free, but the same on every run.
  m.def(
      "omni_router(Tensor router_logits_x, Tensor router_logits_y, SymInt num_experts_per_token, "
      "bool sorted=True) -> (Tensor scores, Tensor indices)");
  m.def(
      "_omni_router_backward(Tensor grad_scores, Tensor indices, SymInt num_rows, "
      "SymInt num_cols) -> (Tensor grad_router_logits_x, Tensor grad_router_logits_y)");

  // The same behind log_softmax and exp: what the layer uses. Mask (T) bool; masked tokens get the
  // ids -1 and the weights 0, and so does their gradient. `sorted` goes by keyword, because
  // torch.export.draft_export takes a mask of None for one that the op mutates, unless it is left
  // out behind the last argument that is given.
  m.def(
      "omni_softmax_router(Tensor router_logits_x, Tensor router_logits_y, "
      "SymInt num_experts_per_token, bool norm_topk_prob=False, Tensor? token_mask=None, "
      "*, bool sorted=True) -> (Tensor routing_weights, Tensor indices)");
  m.def(
      "_omni_softmax_router_backward(Tensor grad_routing_weights, Tensor router_logits_x, "
      "Tensor router_logits_y, Tensor indices, bool norm_topk_prob) "
      "-> (Tensor grad_router_logits_x, Tensor grad_router_logits_y)");
}

namespace omni_moe::torch_api {

namespace {

using Pair = std::tuple<Tensor, Tensor>;

RouterScore score_of(bool norm_topk_prob) {
  return norm_topk_prob ? RouterScore::kSoftmaxTopK : RouterScore::kSoftmax;
}

// ---- Outputs -----------------------------------------------------------------------------------

void check_logits(const char* op, const Tensor& router_logits_x, const Tensor& router_logits_y,
                  const c10::SymInt& num_experts_per_token) {
  const Argument x{op, "router_logits_x", router_logits_x};
  const Argument y{op, "router_logits_y", router_logits_y};
  check_rank(x, 2);
  check_rank(y, 2);
  check_floating(x);
  check_like(y, x);
  check_size(y, 0, router_logits_x.sym_size(0), "number of tokens of router_logits_x");
  const c10::SymInt num_rows = router_logits_x.sym_size(1), num_cols = router_logits_y.sym_size(1);
  TORCH_CHECK_VALUE(num_rows * num_cols <= std::numeric_limits<int32_t>::max(), op,
                    ": expected at most 2^31 - 1 experts, but the grid is ", num_rows, " x ",
                    num_cols);
  TORCH_CHECK_VALUE(num_experts_per_token >= 0 && num_experts_per_token <= num_rows * num_cols, op,
                    ": expected num_experts_per_token between 0 and the ", num_rows * num_cols,
                    " experts of the grid, but got ", num_experts_per_token);
}

// Gradient (T, K) of what was chosen, and the choice (T, K) int32.
void check_choice(const Argument& grad, const Tensor& indices) {
  const Argument ids{grad.op, "indices", indices};
  check_rank(grad, 2);
  check_rank(ids, 2);
  check_floating(grad);
  check_dtype(ids, at::kInt);
  check_like(ids, grad, /*same_dtype=*/false);
  check_size(ids, 0, grad.tensor.sym_size(0), "number of tokens of the gradient");
  check_size(ids, 1, grad.tensor.sym_size(1), "experts per token of the gradient");
}

Pair choice(const char* op, const Tensor& router_logits_x, const Tensor& router_logits_y,
            const c10::SymInt& num_experts_per_token) {
  check_logits(op, router_logits_x, router_logits_y, num_experts_per_token);
  const c10::SymInt shape[] = {router_logits_x.sym_size(0), num_experts_per_token};
  const auto options = router_logits_x.options();
  return {at::empty_symint(shape, options), at::empty_symint(shape, options.dtype(at::kInt))};
}

Pair router_outputs(const Tensor& router_logits_x, const Tensor& router_logits_y,
                    c10::SymInt num_experts_per_token, bool /*sorted*/) {
  return choice(omni_router.name, router_logits_x, router_logits_y, num_experts_per_token);
}

Pair softmax_router_outputs(const Tensor& router_logits_x, const Tensor& router_logits_y,
                            c10::SymInt num_experts_per_token, bool /*norm_topk_prob*/,
                            const OptionalTensor& token_mask, bool /*sorted*/) {
  const char* op = omni_softmax_router.name;
  auto outputs = choice(op, router_logits_x, router_logits_y, num_experts_per_token);
  if (token_mask) {
    check_token_mask({op, "token_mask", *token_mask}, {op, "router_logits_x", router_logits_x});
  }
  return outputs;
}

Pair router_backward_outputs(const Tensor& grad_scores, const Tensor& indices, c10::SymInt num_rows,
                             c10::SymInt num_cols) {
  check_choice({omni_router_backward.name, "grad_scores", grad_scores}, indices);
  const c10::SymInt num_tokens = grad_scores.sym_size(0);
  return {at::empty_symint({num_tokens, num_rows}, grad_scores.options()),
          at::empty_symint({num_tokens, num_cols}, grad_scores.options())};
}

Pair softmax_router_backward_outputs(const Tensor& grad_routing_weights,
                                     const Tensor& router_logits_x, const Tensor& router_logits_y,
                                     const Tensor& indices, bool /*norm_topk_prob*/) {
  const char* op = omni_softmax_router_backward.name;
  const Argument grad{op, "grad_routing_weights", grad_routing_weights};
  check_choice(grad, indices);
  check_logits(op, router_logits_x, router_logits_y, indices.sym_size(1));
  check_like(grad, {op, "router_logits_x", router_logits_x});
  check_size(grad, 0, router_logits_x.sym_size(0), "number of tokens of router_logits_x");
  return {at::empty_symint(router_logits_x.sym_sizes(), router_logits_x.options()),
          at::empty_symint(router_logits_y.sym_sizes(), router_logits_y.options())};
}

// ---- Kernels -----------------------------------------------------------------------------------

Pair route(Pair outputs, const Tensor& router_logits_x, const Tensor& router_logits_y,
           RouterScore score, bool sorted, const OptionalTensor& token_mask = std::nullopt) {
  const NamedRange range(kRouterRange);
  const Tensor x = router_logits_x.contiguous(), y = router_logits_y.contiguous();
  const Tensor mask = token_mask ? token_mask->contiguous() : Tensor();
  auto& [weights, indices] = outputs;
  launch(RouterForwardParams{.logits_x = x.const_data_ptr(),
                             .logits_y = y.const_data_ptr(),
                             .weights = weights.mutable_data_ptr(),
                             .indices = indices.mutable_data_ptr<int32_t>(),
                             .num_tokens = x.size(0),
                             .num_rows = x.size(1),
                             .num_cols = y.size(1),
                             .num_experts_per_token = indices.size(1),
                             .dtype = to_dtype(x),
                             .score = score,
                             .token_mask = token_mask ? mask.const_data_ptr<bool>() : nullptr,
                             .sorted = sorted},
         x.device());
  return outputs;
}

Pair router_kernel(const Tensor& router_logits_x, const Tensor& router_logits_y,
                   c10::SymInt num_experts_per_token, bool sorted) {
  return route(
      router_outputs(router_logits_x, router_logits_y, std::move(num_experts_per_token), sorted),
      router_logits_x, router_logits_y, RouterScore::kLogit, sorted);
}

Pair softmax_router_kernel(const Tensor& router_logits_x, const Tensor& router_logits_y,
                           c10::SymInt num_experts_per_token, bool norm_topk_prob,
                           const OptionalTensor& token_mask, bool sorted) {
  return route(
      softmax_router_outputs(router_logits_x, router_logits_y, std::move(num_experts_per_token),
                             norm_topk_prob, token_mask, sorted),
      router_logits_x, router_logits_y, score_of(norm_topk_prob), sorted, token_mask);
}

Pair router_backward_kernel(const Tensor& grad_scores, const Tensor& indices, c10::SymInt num_rows,
                            c10::SymInt num_cols) {
  const NamedRange range(kRouterRange);
  auto outputs = router_backward_outputs(grad_scores, indices, num_rows, num_cols);
  auto& [grad_x, grad_y] = outputs;
  const Tensor grad = grad_scores.contiguous(), ids = indices.contiguous();
  check_indices(omni_router_backward.name, ids, grad_x.size(1) * grad_y.size(1));
  launch(RouterBackwardParams{.grad_weights = grad.const_data_ptr(),
                              .indices = ids.const_data_ptr<int32_t>(),
                              .grad_logits_x = grad_x.mutable_data_ptr(),
                              .grad_logits_y = grad_y.mutable_data_ptr(),
                              .num_tokens = grad.size(0),
                              .num_rows = grad_x.size(1),
                              .num_cols = grad_y.size(1),
                              .num_experts_per_token = ids.size(1),
                              .dtype = to_dtype(grad),
                              .score = RouterScore::kLogit},
         grad.device());
  return outputs;
}

Pair softmax_router_backward_kernel(const Tensor& grad_routing_weights,
                                    const Tensor& router_logits_x, const Tensor& router_logits_y,
                                    const Tensor& indices, bool norm_topk_prob) {
  const NamedRange range(kRouterRange);
  auto outputs = softmax_router_backward_outputs(grad_routing_weights, router_logits_x,
                                                 router_logits_y, indices, norm_topk_prob);
  auto& [grad_x, grad_y] = outputs;
  const Tensor grad = grad_routing_weights.contiguous(), ids = indices.contiguous();
  const Tensor x = router_logits_x.contiguous(), y = router_logits_y.contiguous();
  check_indices(omni_softmax_router_backward.name, ids, x.size(1) * y.size(1), /*lowest=*/-1);
  launch(RouterBackwardParams{.grad_weights = grad.const_data_ptr(),
                              .logits_x = x.const_data_ptr(),
                              .logits_y = y.const_data_ptr(),
                              .indices = ids.const_data_ptr<int32_t>(),
                              .grad_logits_x = grad_x.mutable_data_ptr(),
                              .grad_logits_y = grad_y.mutable_data_ptr(),
                              .num_tokens = x.size(0),
                              .num_rows = x.size(1),
                              .num_cols = y.size(1),
                              .num_experts_per_token = ids.size(1),
                              .dtype = to_dtype(x),
                              .score = score_of(norm_topk_prob)},
         x.device());
  return outputs;
}

// ---- Gradients ---------------------------------------------------------------------------------

// Of their two outputs the ids have no gradient, and autograd shall not make zeros for it.
struct OmniRouterBackward : Function<OmniRouterBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& router_logits_x,
                               const Tensor& router_logits_y, const c10::SymInt& k, bool sorted) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [scores, indices] = omni_router(router_logits_x, router_logits_y, k, sorted);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({indices});
    ctx->saved_data["num_rows"] = router_logits_x.sym_size(1);
    ctx->saved_data["num_cols"] = router_logits_y.sym_size(1);
    return {scores, indices};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list input_grads(4);
    if (!grads[0].defined()) return input_grads;
    std::tie(input_grads[0], input_grads[1]) = omni_router_backward(
        grads[0], ctx->get_saved_variables()[0], ctx->saved_data["num_rows"].toSymInt(),
        ctx->saved_data["num_cols"].toSymInt());
    return input_grads;
  }
};

struct OmniSoftmaxRouterBackward : Function<OmniSoftmaxRouterBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& router_logits_x,
                               const Tensor& router_logits_y, const c10::SymInt& k,
                               bool norm_topk_prob, const OptionalTensor& token_mask, bool sorted) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [weights, indices] = omni_softmax_router(router_logits_x, router_logits_y, k,
                                                  norm_topk_prob, token_mask, sorted);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({router_logits_x, router_logits_y, indices});
    ctx->saved_data["norm_topk_prob"] = norm_topk_prob;
    return {weights, indices};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list input_grads(6);
    if (!grads[0].defined()) return input_grads;
    const auto saved = ctx->get_saved_variables();
    std::tie(input_grads[0], input_grads[1]) = omni_softmax_router_backward(
        grads[0], saved[0], saved[1], saved[2], ctx->saved_data["norm_topk_prob"].toBool());
    return input_grads;
  }
};

// ---- Registration ------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  register_kernels(m, omni_router, router_outputs, router_kernel);
  register_gradient<omni_router, OmniRouterBackward>(m);
  register_autocast<omni_router, AutocastTo::kWidestInput>(m);

  register_kernels(m, omni_router_backward, router_backward_outputs, router_backward_kernel);
  register_no_gradient(m, omni_router_backward);

  register_kernels(m, omni_softmax_router, softmax_router_outputs, softmax_router_kernel);
  register_gradient<omni_softmax_router, OmniSoftmaxRouterBackward>(m);
  register_autocast<omni_softmax_router, AutocastTo::kWidestInput>(m);

  register_kernels(m, omni_softmax_router_backward, softmax_router_backward_outputs,
                   softmax_router_backward_kernel);
  register_no_gradient(m, omni_softmax_router_backward);
}

}  // namespace

}  // namespace omni_moe::torch_api
