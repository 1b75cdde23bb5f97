// Gradients. Each op has a torch::autograd::Function that saves its inputs and calls the registered
// backward op; no Python runs in backward. The backward ops have no gradient of their own: torch's
// fallback raises a clear error if one is asked for.
#include <ATen/SavedTensorHooks.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>

#include "checks.h"
#include "ops.h"

namespace omni_moe::torch_api {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// A gradient that was not asked for came back empty: hand autograd an undefined tensor instead.
Tensor if_wanted(bool wanted, const Tensor& grad) { return wanted ? grad : Tensor(); }

// Forward-mode AD counts, too: `Function` has the error that says there is none.
bool any_needs_grad(std::initializer_list<std::reference_wrapper<const Tensor>> inputs) {
  return std::any_of(inputs.begin(), inputs.end(), [](const Tensor& input) {
    return (input.requires_grad() && at::GradMode::is_enabled()) || input._fw_grad(0).defined();
  });
}

class RouterFunction : public Function<RouterFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& router_logits_x,
                               const Tensor& router_logits_y, const c10::SymInt& k) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [scores, indices] = omni_router(router_logits_x, router_logits_y, k);
    ctx->save_for_backward({indices});
    ctx->saved_data["num_rows"] = router_logits_x.sym_size(1);
    ctx->saved_data["num_cols"] = router_logits_y.sym_size(1);
    return {scores, indices};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [grad_x, grad_y] =
        omni_router_backward(grads[0], saved[0], ctx->saved_data["num_rows"].toSymInt(),
                             ctx->saved_data["num_cols"].toSymInt());
    return {grad_x, grad_y, Tensor()};
  }
};

class SoftmaxRouterFunction : public Function<SoftmaxRouterFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& router_logits_x,
                               const Tensor& router_logits_y, const c10::SymInt& k,
                               bool norm_topk_prob) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [weights, indices] =
        omni_softmax_router(router_logits_x, router_logits_y, k, norm_topk_prob);
    ctx->save_for_backward({router_logits_x, router_logits_y, indices});
    ctx->saved_data["norm_topk_prob"] = norm_topk_prob;
    return {weights, indices};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [grad_x, grad_y] = omni_softmax_router_backward(
        grads[0], saved[0], saved[1], saved[2], ctx->saved_data["norm_topk_prob"].toBool());
    return {grad_x, grad_y, Tensor(), Tensor()};
  }
};

class ExpertFunction : public Function<ExpertFunction> {
  static constexpr size_t kAddendInput = 5;  // among the tensors

 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& hidden_states, const Tensor& up_weights,
                        const Tensor& down_weights, const Tensor& routing_weights,
                        const Tensor& indices, std::string_view activation,
                        const std::optional<Tensor>& addend) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [expert_states, scores] = omni_expert_save_scores(
        hidden_states, up_weights, down_weights, routing_weights, indices, activation, addend);
    ctx->saved_data["has_addend"] = addend.has_value();
    ctx->save_for_backward(
        {hidden_states, up_weights, down_weights, routing_weights, indices, scores});
    ctx->saved_data["activation"] = std::string(activation);
    return expert_states;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const std::array<bool, 4> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                      ctx->needs_input_grad(2), ctx->needs_input_grad(3)};
    auto [grad_hidden, grad_up, grad_down, grad_routing] =
        omni_expert_backward(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4],
                             ctx->saved_data["activation"].toStringRef(), mask, saved[5]);
    const bool want_addend =
        ctx->saved_data["has_addend"].toBool() && ctx->needs_input_grad(kAddendInput);
    return {if_wanted(mask[0], grad_hidden),
            if_wanted(mask[1], grad_up),
            if_wanted(mask[2], grad_down),
            if_wanted(mask[3], grad_routing),
            Tensor(),
            Tensor(),
            if_wanted(want_addend, grads[0])};
  }
};

// The two products of the MLP that its backward uses, or none where it computes them again. They
// are 4 T I bytes in 16 bits, the most of what a layer keeps, and no one else ever sees them: a
// backward pass that is the last through its graph takes their memory for their gradients, then
// gives it back.
struct MlpProducts {
  Tensor gate, up;

  // Asked in the forward and in the backward: what sees tensors as they are saved or computed may
  // also keep them.
  static bool may_be_consumed() {
    return !at::SavedTensorDefaultHooks::get_hooks() &&
           !c10::impl::TorchDispatchModeTLS::any_modes_set();
  }
};

// Wrappers of tensors (fake, functional, batched) belong to what traces this pass.
bool are_plain(std::initializer_list<std::reference_wrapper<const Tensor>> tensors) {
  constexpr c10::DispatchKeySet kWrappers(
      {c10::DispatchKey::Python, c10::DispatchKey::Functionalize, c10::DispatchKey::Batched,
       c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper});
  return std::none_of(tensors.begin(), tensors.end(),
                      [&](const Tensor& tensor) { return tensor.key_set().has_any(kWrappers); });
}

// For mlp_backward.
void save_mlp_options(AutogradContext* ctx, std::string_view activation) {
  ctx->saved_data["activation"] = std::string(activation);
  ctx->saved_data["may_consume"] = MlpProducts::may_be_consumed();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_backward(AutogradContext* ctx, const Tensor& grad,
                                                        const Tensor& x, const Tensor& gate_weight,
                                                        const Tensor& up_weight,
                                                        const Tensor& down_weight,
                                                        MlpProducts products,
                                                        std::array<bool, 4> mask) {
  const std::string activation = ctx->saved_data["activation"].toStringRef();
  if (!products.gate.defined()) {
    return omni_mlp_backward(grad, x, gate_weight, up_weight, down_weight, std::nullopt,
                             std::nullopt, activation, mask);
  }
  if (ctx->saved_data["may_consume"].toBool() && MlpProducts::may_be_consumed() &&
      are_plain({grad, x, gate_weight, up_weight, down_weight, products.gate, products.up}) &&
      !torch::autograd::get_current_graph_task_keep_graph()) {
    auto grads = omni_mlp_backward_consume(grad, x, gate_weight, up_weight, down_weight,
                                           products.gate, products.up, activation, mask);
    // The node holds on to them until it has returned, after the experts' backward. If that fails,
    // their versions tell a second try that they are no longer what was saved.
    for (const Tensor& product : {products.gate, products.up}) {
      product.storage().unsafeGetStorageImpl()->reset();
    }
    return grads;
  }
  return omni_mlp_backward(grad, x, gate_weight, up_weight, down_weight, products.gate, products.up,
                           activation, mask);
}

class MlpFunction : public Function<MlpFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& gate_weight,
                        const Tensor& up_weight, const Tensor& down_weight,
                        std::string_view activation, bool recompute) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    save_mlp_options(ctx, activation);
    Tensor output;
    MlpProducts products;
    if (recompute) {
      output = omni_mlp(x, gate_weight, up_weight, down_weight, activation, recompute);
    } else {
      std::tie(output, products.gate, products.up) =
          omni_mlp_save_gates(x, gate_weight, up_weight, down_weight, activation);
    }
    ctx->save_for_backward({x, gate_weight, up_weight, down_weight, products.gate, products.up});
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const std::array<bool, 4> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                      ctx->needs_input_grad(2), ctx->needs_input_grad(3)};
    auto [grad_x, grad_gate, grad_up, grad_down] = mlp_backward(
        ctx, grads[0], saved[0], saved[1], saved[2], saved[3], {saved[4], saved[5]}, mask);
    return {if_wanted(mask[0], grad_x),
            if_wanted(mask[1], grad_gate),
            if_wanted(mask[2], grad_up),
            if_wanted(mask[3], grad_down),
            Tensor(),
            Tensor()};
  }
};

// Both branches of the layer. The MLP's backward comes first, while the experts' weight gradients
// are not there yet (memory peaks in it), and the experts' adds the gradient of the tokens onto it.
class ExpertMlpFunction : public Function<ExpertMlpFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& hidden_states, const Tensor& up_embed,
                        const Tensor& down_embed, const Tensor& routing_weights,
                        const Tensor& indices, const Tensor& gate_weight, const Tensor& up_weight,
                        const Tensor& down_weight, std::string_view activation, bool recompute) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    save_mlp_options(ctx, activation);
    auto [output, scores, gate, up] = omni_expert_mlp_save(
        hidden_states, up_embed, down_embed, routing_weights, indices, gate_weight, up_weight,
        down_weight, activation, /*save_products=*/!recompute);
    const MlpProducts products = recompute ? MlpProducts{} : MlpProducts{gate, up};
    ctx->save_for_backward({hidden_states, up_embed, down_embed, routing_weights, indices,
                            gate_weight, up_weight, down_weight, scores, products.gate,
                            products.up});
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto& hidden_states = saved[0];
    const std::string activation = ctx->saved_data["activation"].toStringRef();
    const auto needs = [&](size_t input) { return ctx->needs_input_grad(input); };
    const std::array<bool, 4> mlp_mask = {needs(0), needs(5), needs(6), needs(7)};
    const std::array<bool, 4> expert_mask = {needs(0), needs(1), needs(2), needs(3)};
    const auto any = [](const std::array<bool, 4>& mask) {
      return std::any_of(mask.begin(), mask.end(), [](bool wanted) { return wanted; });
    };

    variable_list result(10);
    if (any(mlp_mask)) {
      auto [grad_x, grad_gate, grad_up, grad_down] =
          mlp_backward(ctx, grads[0], hidden_states, saved[5], saved[6], saved[7],
                       {saved[9], saved[10]}, mlp_mask);
      result[0] = if_wanted(mlp_mask[0], grad_x);
      result[5] = if_wanted(mlp_mask[1], grad_gate);
      result[6] = if_wanted(mlp_mask[2], grad_up);
      result[7] = if_wanted(mlp_mask[3], grad_down);
    }
    if (any(expert_mask)) {
      auto [grad_hidden, grad_up, grad_down, grad_routing] = omni_expert_backward(
          grads[0], hidden_states, saved[1], saved[2], saved[3], saved[4], activation, expert_mask,
          saved[8], needs(0) ? std::optional(result[0]) : std::nullopt);
      result[0] = if_wanted(expert_mask[0], grad_hidden);
      result[1] = if_wanted(expert_mask[1], grad_up);
      result[2] = if_wanted(expert_mask[2], grad_down);
      result[3] = if_wanted(expert_mask[3], grad_routing);
    }
    return result;
  }
};

class BatchNormFunction : public Function<BatchNormFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& router_logits,
                               const c10::SymInt& num_rows,
                               const std::optional<Tensor>& running_mean_x,
                               const std::optional<Tensor>& running_var_x,
                               const std::optional<Tensor>& num_batches_tracked_x,
                               const std::optional<Tensor>& running_mean_y,
                               const std::optional<Tensor>& running_var_y,
                               const std::optional<Tensor>& num_batches_tracked_y, bool training,
                               double momentum, double eps) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [normed_x, normed_y, inv_std] = omni_batch_norm_save_stats(
        router_logits, num_rows, running_mean_x, running_var_x, num_batches_tracked_x,
        running_mean_y, running_var_y, num_batches_tracked_y, training, momentum, eps);
    ctx->save_for_backward({normed_x, normed_y, inv_std});
    ctx->saved_data["training"] = training;
    return {normed_x, normed_y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    variable_list input_grads(kInputs);
    input_grads[0] = omni_batch_norm_backward(grads[0], grads[1], saved[0], saved[1], saved[2],
                                              ctx->saved_data["training"].toBool());
    return input_grads;
  }

 private:
  static constexpr size_t kInputs = 11;
};

class RouterLogitsFunction : public Function<RouterLogitsFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& hidden_states,
                               const Tensor& gate_x, const Tensor& gate_y,
                               const std::optional<Tensor>& running_mean_x,
                               const std::optional<Tensor>& running_var_x,
                               const std::optional<Tensor>& num_batches_tracked_x,
                               const std::optional<Tensor>& running_mean_y,
                               const std::optional<Tensor>& running_var_y,
                               const std::optional<Tensor>& num_batches_tracked_y, bool training,
                               double momentum, double eps) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [logits_x, logits_y, inv_std] = omni_router_logits_save_stats(
        hidden_states, gate_x, gate_y, running_mean_x, running_var_x, num_batches_tracked_x,
        running_mean_y, running_var_y, num_batches_tracked_y, training, momentum, eps);
    ctx->save_for_backward({hidden_states, gate_x, gate_y, logits_x, logits_y, inv_std});
    ctx->saved_data["training"] = training;
    return {logits_x, logits_y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &gate_x = saved[1], &gate_y = saved[2];
    const bool want_x = ctx->needs_input_grad(1), want_y = ctx->needs_input_grad(2);
    const std::array<bool, 2> mask = {ctx->needs_input_grad(0), want_x || want_y};
    auto [grad_hidden, grad_gates] =
        omni_router_logits_backward(grads[0], grads[1], saved[0], gate_x, gate_y, saved[3],
                                    saved[4], saved[5], ctx->saved_data["training"].toBool(), mask);
    variable_list input_grads(kInputs);
    input_grads[0] = if_wanted(mask[0], grad_hidden);
    const auto num_rows = gate_x.sym_size(0);
    if (want_x) input_grads[1] = grad_gates.narrow_symint(0, 0, num_rows);
    if (want_y) input_grads[2] = grad_gates.narrow_symint(0, num_rows, gate_y.sym_size(0));
    return input_grads;
  }

 private:
  static constexpr size_t kInputs = 12;
};

std::tuple<Tensor, Tensor> omni_router_autograd(const Tensor& router_logits_x,
                                                const Tensor& router_logits_y, c10::SymInt k) {
  const auto outputs = RouterFunction::apply(router_logits_x, router_logits_y, k);
  return {outputs[0], outputs[1]};
}

std::tuple<Tensor, Tensor> omni_softmax_router_autograd(const Tensor& router_logits_x,
                                                        const Tensor& router_logits_y,
                                                        c10::SymInt k, bool norm_topk_prob) {
  const auto outputs =
      SoftmaxRouterFunction::apply(router_logits_x, router_logits_y, k, norm_topk_prob);
  return {outputs[0], outputs[1]};
}

Tensor omni_expert_autograd(const Tensor& hidden_states, const Tensor& up_weights,
                            const Tensor& down_weights, const Tensor& routing_weights,
                            const Tensor& indices, std::string_view activation,
                            const std::optional<Tensor>& addend) {
  // Without a gradient to come, the scores need not be kept.
  if (!any_needs_grad({hidden_states, up_weights, down_weights, routing_weights}) &&
      !(addend && any_needs_grad({*addend}))) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return omni_expert(hidden_states, up_weights, down_weights, routing_weights, indices,
                       activation, addend);
  }
  return ExpertFunction::apply(hidden_states, up_weights, down_weights, routing_weights, indices,
                               activation, addend);
}

Tensor omni_mlp_autograd(const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
                         const Tensor& down_weight, std::string_view activation, bool recompute) {
  // Without a gradient to come, the two products need not be kept.
  if (!any_needs_grad({x, gate_weight, up_weight, down_weight})) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return omni_mlp(x, gate_weight, up_weight, down_weight, activation, recompute);
  }
  return MlpFunction::apply(x, gate_weight, up_weight, down_weight, activation, recompute);
}

Tensor omni_expert_mlp_autograd(const Tensor& hidden_states, const Tensor& up_embed,
                                const Tensor& down_embed, const Tensor& routing_weights,
                                const Tensor& indices, const Tensor& gate_weight,
                                const Tensor& up_weight, const Tensor& down_weight,
                                std::string_view activation, bool recompute) {
  if (!any_needs_grad({hidden_states, up_embed, down_embed, routing_weights, gate_weight, up_weight,
                       down_weight})) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return omni_expert_mlp(hidden_states, up_embed, down_embed, routing_weights, indices,
                           gate_weight, up_weight, down_weight, activation, recompute);
  }
  return ExpertMlpFunction::apply(hidden_states, up_embed, down_embed, routing_weights, indices,
                                  gate_weight, up_weight, down_weight, activation, recompute);
}

std::tuple<Tensor, Tensor> omni_batch_norm_autograd(
    const Tensor& router_logits, c10::SymInt num_rows, const std::optional<Tensor>& running_mean_x,
    const std::optional<Tensor>& running_var_x, const std::optional<Tensor>& num_batches_tracked_x,
    const std::optional<Tensor>& running_mean_y, const std::optional<Tensor>& running_var_y,
    const std::optional<Tensor>& num_batches_tracked_y, bool training, double momentum,
    double eps) {
  if (!any_needs_grad({router_logits})) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return omni_batch_norm(router_logits, std::move(num_rows), running_mean_x, running_var_x,
                           num_batches_tracked_x, running_mean_y, running_var_y,
                           num_batches_tracked_y, training, momentum, eps);
  }
  const auto outputs = BatchNormFunction::apply(
      router_logits, num_rows, running_mean_x, running_var_x, num_batches_tracked_x, running_mean_y,
      running_var_y, num_batches_tracked_y, training, momentum, eps);
  return {outputs[0], outputs[1]};
}

std::tuple<Tensor, Tensor> omni_router_logits_autograd(
    const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
    const std::optional<Tensor>& running_mean_x, const std::optional<Tensor>& running_var_x,
    const std::optional<Tensor>& num_batches_tracked_x, const std::optional<Tensor>& running_mean_y,
    const std::optional<Tensor>& running_var_y, const std::optional<Tensor>& num_batches_tracked_y,
    bool training, double momentum, double eps) {
  if (!any_needs_grad({hidden_states, gate_x, gate_y})) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return omni_router_logits(hidden_states, gate_x, gate_y, running_mean_x, running_var_x,
                              num_batches_tracked_x, running_mean_y, running_var_y,
                              num_batches_tracked_y, training, momentum, eps);
  }
  const auto outputs = RouterLogitsFunction::apply(
      hidden_states, gate_x, gate_y, running_mean_x, running_var_x, num_batches_tracked_x,
      running_mean_y, running_var_y, num_batches_tracked_y, training, momentum, eps);
  return {outputs[0], outputs[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(omni_moe, Autograd, m) {
  m.impl("omni_router", omni_router_autograd);
  m.impl("omni_softmax_router", omni_softmax_router_autograd);
  m.impl("omni_expert", omni_expert_autograd);
  m.impl("omni_mlp", omni_mlp_autograd);
  m.impl("omni_expert_mlp", omni_expert_mlp_autograd);
  m.impl("omni_batch_norm", omni_batch_norm_autograd);
  m.impl("omni_router_logits", omni_router_logits_autograd);
  for (const char* op :
       {"omni_router_backward", "omni_softmax_router_backward", "omni_expert_save_scores",
        "omni_expert_backward", "omni_mlp_save_gates", "omni_mlp_backward",
        "omni_mlp_backward_consume", "omni_batch_norm_save_stats", "omni_batch_norm_backward",
        "omni_expert_mlp_save", "omni_router_logits_save_stats", "omni_router_logits_backward"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace omni_moe::torch_api
