// The router's logits: both gates, and the BatchNorm of their products. One kernel where the
// backend has one, else a matrix product of ATen and the kernels of the BatchNorm.
#include "omni_moe/router_logits.h"

#include <string>
#include <vector>

#include "backend.h"
#include "checks.h"
#include "named_range.h"
#include "ops.h"
#include "router_gates.h"

// ---- Schemas -----------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  // hidden (T, H), gates (R, H) and (C, H) -> (T, R), (T, C), and 1 / sqrt(var + eps) (R + C) in
  // the accumulation type, for the backward. Normalises by the statistics of the batch. The buffers
  // are none, or six: running_mean_x, running_var_x, num_batches_tracked_x, and the same of y,
  // which are updated. The batch is of the tokens that the mask (T) bool counts in; the logits of
  // the others are 0, and so are their gradients.
  m.def(
      "omni_router_logits(Tensor hidden_states, Tensor gate_x, Tensor gate_y, "
      "Tensor(a!)[] batch_norm_buffers, float momentum=0.1, float eps=1e-05, "
      "Tensor? token_mask=None) -> (Tensor router_logits_x, Tensor router_logits_y, Tensor "
      "inv_std)");
  // Normalises by the running statistics, and writes to nothing but its outputs. No list here:
  // torch.vmap has no fallback for ops that take one.
  m.def(
      "_omni_router_logits_eval(Tensor hidden_states, Tensor gate_x, Tensor gate_y, "
      "Tensor running_mean_x, Tensor running_var_x, Tensor running_mean_y, Tensor running_var_y, "
      "float eps=1e-05) -> (Tensor router_logits_x, Tensor router_logits_y, Tensor inv_std)");
  // The gradient of the gates is that of both, (R + C, H). One that output_mask does not ask for
  // comes back empty.
  m.def(
      "_omni_router_logits_backward(Tensor grad_router_logits_x, Tensor grad_router_logits_y, "
      "Tensor hidden_states, Tensor gate_x, Tensor gate_y, Tensor router_logits_x, "
      "Tensor router_logits_y, Tensor inv_std, bool training, bool[2] output_mask, "
      "Tensor? token_mask=None) -> (Tensor grad_hidden_states, Tensor grad_gates)");
}

namespace omni_moe::torch_api {

namespace {

// ---- Outputs -----------------------------------------------------------------------------------

using Normed = std::tuple<Tensor, Tensor, Tensor>;

// The BatchNorm's buffers by name: all of them, or none. In evaluation the counters are undefined.
struct Buffers {
  static constexpr const char* kNames[] = {"running_mean_x",        "running_var_x",
                                           "num_batches_tracked_x", "running_mean_y",
                                           "running_var_y",         "num_batches_tracked_y"};
  static constexpr size_t kPerAxis = 3, kCount = 6;
  static bool is_counter(size_t i) { return i % kPerAxis == 2; }
};

void check_buffers(const Argument& hidden, const Tensor& gate_x, const Tensor& gate_y,
                   at::TensorList buffers) {
  for (size_t i = 0; i < Buffers::kCount; ++i) {
    if (!buffers[i].defined()) continue;
    const Argument buffer{hidden.op, Buffers::kNames[i], buffers[i]};
    check_like(buffer, hidden, /*same_dtype=*/false);
    if (Buffers::is_counter(i)) {
      check_rank(buffer, 0);
      check_dtype(buffer, at::kLong);
      continue;
    }
    check_rank(buffer, 1);
    check_size(buffer, 0, (i < Buffers::kPerAxis ? gate_x : gate_y).sym_size(0),
               "number of logits of its axis");
    const auto dtype = buffer.tensor.scalar_type();
    TORCH_CHECK_VALUE(at::isFloatingType(dtype), buffer.op, ": expected ", buffer.name,
                      " to be of floating point, but got ", dtype);
    TORCH_CHECK_VALUE(dtype == buffers[0].scalar_type(), buffer.op,
                      ": expected the running statistics in one dtype (", buffers[0].scalar_type(),
                      "), but got ", dtype, " for ", buffer.name);
  }
}

Normed normed_outputs(const char* op, const Tensor& hidden_states, const Tensor& gate_x,
                      const Tensor& gate_y, at::TensorList buffers, double eps) {
  const Argument hidden{op, "hidden_states", hidden_states};
  check_gates(op, hidden_states, gate_x, gate_y);
  TORCH_CHECK_VALUE(eps > 0, op, ": expected eps to be positive, but got ", eps);
  TORCH_CHECK_VALUE(
      buffers.empty() || buffers.size() == Buffers::kCount, op,
      ": expected batch_norm_buffers to be none or ", Buffers::kCount,
      " (running_mean, running_var and num_batches_tracked of x, then of y), but got ",
      buffers.size());
  if (!buffers.empty()) check_buffers(hidden, gate_x, gate_y, buffers);
  const auto num_tokens = hidden_states.sym_size(0);
  const auto num_rows = gate_x.sym_size(0), num_cols = gate_y.sym_size(0);
  const auto options = hidden_states.options();
  return {at::empty_symint({num_tokens, num_rows}, options),
          at::empty_symint({num_tokens, num_cols}, options),
          at::empty_symint({num_rows + num_cols},
                           options.dtype(accumulation_dtype(hidden_states.scalar_type())))};
}

Normed training_outputs(const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
                        at::TensorList batch_norm_buffers, double /*momentum*/, double eps,
                        const OptionalTensor& token_mask) {
  const char* op = omni_router_logits.name;
  auto outputs = normed_outputs(op, hidden_states, gate_x, gate_y, batch_norm_buffers, eps);
  if (token_mask) {
    check_token_mask({op, "token_mask", *token_mask}, {op, "hidden_states", hidden_states});
    return outputs;  // how many it counts in is not known here
  }
  // PyTorch's own words, which a BatchNorm module raises.
  TORCH_CHECK_VALUE(hidden_states.sym_size(0) != 1, op,
                    ": Expected more than 1 value per channel when training, but got hidden_states "
                    "of shape ",
                    hidden_states.sym_sizes());
  return outputs;
}

Normed eval_outputs(const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
                    const Tensor& running_mean_x, const Tensor& running_var_x,
                    const Tensor& running_mean_y, const Tensor& running_var_y, double eps) {
  return normed_outputs(
      omni_router_logits_eval.name, hidden_states, gate_x, gate_y,
      {running_mean_x, running_var_x, Tensor(), running_mean_y, running_var_y, Tensor()}, eps);
}

// The gradients are products of the kernel: this is the meta kernel alone.
std::tuple<Tensor, Tensor> backward_outputs(const Tensor& grad_router_logits_x,
                                            const Tensor& grad_router_logits_y,
                                            const Tensor& hidden_states, const Tensor& gate_x,
                                            const Tensor& gate_y, const Tensor& router_logits_x,
                                            const Tensor& router_logits_y, const Tensor& inv_std,
                                            bool /*training*/, Mask<2> output_mask,
                                            const OptionalTensor& token_mask) {
  const char* op = omni_router_logits_backward.name;
  check_logits_of_gates(op, grad_router_logits_x, grad_router_logits_y, hidden_states, gate_x,
                        gate_y, router_logits_x, router_logits_y);
  const Argument scale{op, "inv_std", inv_std};
  check_rank(scale, 1);
  check_like(scale, {op, "hidden_states", hidden_states}, /*same_dtype=*/false);
  check_dtype(scale, accumulation_dtype(hidden_states.scalar_type()));
  check_size(scale, 0, gate_x.sym_size(0) + gate_y.sym_size(0), "width of both axes");
  if (token_mask) {
    check_token_mask({op, "token_mask", *token_mask}, {op, "hidden_states", hidden_states});
  }
  return gate_gradients(hidden_states, gate_x, gate_y, output_mask);
}

// ---- Kernels -----------------------------------------------------------------------------------

// In-place updates cannot go to a copy; and autograd sees them by the versions of tensors. (Tensors
// of inference mode have none and raise.)
void prepare_updates(const char* op, at::TensorList buffers) {
  for (size_t i = 0; i < buffers.size(); ++i) {
    TORCH_CHECK_VALUE(buffers[i].is_contiguous(), op, ": expected ", Buffers::kNames[i],
                      " to be contiguous, but got stride ", buffers[i].strides());
    buffers[i].unsafeGetTensorImpl()->bump_version();
  }
}

// The kernels read running statistics in the dtype of the logits and in fp32. Any other, bf16
// beside logits in fp32 say, comes to them as a copy in the accumulation type. That is a few
// kilobytes, while another instantiation of every kernel would be built for all.
std::vector<Tensor> statistics_for_kernels(at::TensorList buffers, at::ScalarType dtype) {
  std::vector<Tensor> statistics = buffers.vec();
  for (Tensor& tensor : statistics) {
    if (!tensor.defined() || !tensor.is_floating_point()) continue;
    const auto own = tensor.scalar_type();
    if (own != dtype && own != at::kFloat) tensor = tensor.to(accumulation_dtype(dtype));
  }
  return statistics;
}

BatchNormBuffers pointers_to(at::TensorList buffers, bool training) {
  const auto data = [&](size_t i) -> void* {
    if (!buffers[i].defined()) return nullptr;
    return training ? buffers[i].mutable_data_ptr()
                    : const_cast<void*>(buffers[i].const_data_ptr());
  };
  return {.running_mean = data(0),
          .running_var = data(1),
          .num_batches_tracked = static_cast<int64_t*>(data(2))};
}

void fill_normed(const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
                 at::TensorList buffers, bool training, double momentum, double eps,
                 const OptionalTensor& token_mask, const Normed& outputs) {
  const NamedRange range(kRouterRange);
  const auto guard = without_autocast();
  const auto& [x, y, inv_std] = outputs;
  const bool has_buffers = !buffers.empty();
  const Tensor mask = token_mask ? token_mask->contiguous() : Tensor();
  BatchNormForwardParams norm{
      .normed_x = x.mutable_data_ptr(),
      .normed_y = y.mutable_data_ptr(),
      .inv_std = inv_std.mutable_data_ptr(),
      .x = has_buffers ? pointers_to(buffers.slice(0, Buffers::kPerAxis), training)
                       : BatchNormBuffers{},
      .y = has_buffers ? pointers_to(buffers.slice(Buffers::kPerAxis), training)
                       : BatchNormBuffers{},
      .num_tokens = x.size(0),
      .num_rows = x.size(1),
      .num_cols = y.size(1),
      .dtype = to_dtype(x),
      .stats_dtype = to_dtype(has_buffers ? buffers[0] : x),
      .training = training,
      .momentum = momentum,
      .eps = eps,
      .token_mask = token_mask ? mask.const_data_ptr<bool>() : nullptr};

  // The one kernel knows no masks.
  if (!token_mask && hidden_states.is_contiguous() && gate_x.is_contiguous() &&
      gate_y.is_contiguous()) {
    RouterLogitsForwardParams params{norm};
    params.hidden_states = hidden_states.const_data_ptr();
    params.gate_x = gate_x.const_data_ptr();
    params.gate_y = gate_y.const_data_ptr();
    params.hidden_size = hidden_states.size(1);
    if (try_launch(params, x.device())) return;
  }
  const Tensor logits = gate_products(hidden_states, gate_x, gate_y);
  norm.logits = logits.const_data_ptr();
  norm.logits_stride = logits.stride(0);
  launch(norm, x.device());
}

Normed training_kernel(const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
                       at::TensorList batch_norm_buffers, double momentum, double eps,
                       const OptionalTensor& token_mask) {
  const auto outputs = training_outputs(hidden_states, gate_x, gate_y, batch_norm_buffers, momentum,
                                        eps, token_mask);
  prepare_updates(omni_router_logits.name, batch_norm_buffers);
  // The updates below must not be counted a second time.
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto statistics = statistics_for_kernels(batch_norm_buffers, hidden_states.scalar_type());
  fill_normed(hidden_states, gate_x, gate_y, statistics, /*training=*/true, momentum, eps,
              token_mask, outputs);
  for (size_t i = 0; i < statistics.size(); ++i) {
    if (!statistics[i].is_same(batch_norm_buffers[i])) batch_norm_buffers[i].copy_(statistics[i]);
  }
  return outputs;
}

Normed eval_kernel(const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
                   const Tensor& running_mean_x, const Tensor& running_var_x,
                   const Tensor& running_mean_y, const Tensor& running_var_y, double eps) {
  const auto outputs = eval_outputs(hidden_states, gate_x, gate_y, running_mean_x, running_var_x,
                                    running_mean_y, running_var_y, eps);
  const auto statistics =
      statistics_for_kernels({running_mean_x.contiguous(), running_var_x.contiguous(), Tensor(),
                              running_mean_y.contiguous(), running_var_y.contiguous(), Tensor()},
                             hidden_states.scalar_type());
  fill_normed(hidden_states, gate_x, gate_y, statistics, /*training=*/false, /*momentum=*/0, eps,
              /*token_mask=*/std::nullopt, outputs);
  return outputs;
}

std::tuple<Tensor, Tensor> backward_kernel(const Tensor& grad_router_logits_x,
                                           const Tensor& grad_router_logits_y,
                                           const Tensor& hidden_states, const Tensor& gate_x,
                                           const Tensor& gate_y, const Tensor& router_logits_x,
                                           const Tensor& router_logits_y, const Tensor& inv_std,
                                           bool training, Mask<2> output_mask,
                                           const OptionalTensor& token_mask) {
  const NamedRange range(kRouterRange);
  const auto guard = without_autocast();
  auto [grad_hidden, grad_gates] = backward_outputs(
      grad_router_logits_x, grad_router_logits_y, hidden_states, gate_x, gate_y, router_logits_x,
      router_logits_y, inv_std, training, output_mask, token_mask);
  const Tensor mask = token_mask ? token_mask->contiguous() : Tensor();
  const Tensor grad_x = grad_router_logits_x.contiguous(),
               grad_y = grad_router_logits_y.contiguous(), x = router_logits_x.contiguous(),
               y = router_logits_y.contiguous(), scale = inv_std.contiguous();
  const Tensor grad_logits = at::empty({x.size(0), x.size(1) + y.size(1)}, x.options());
  launch(BatchNormBackwardParams{.grad_x = grad_x.const_data_ptr(),
                                 .grad_y = grad_y.const_data_ptr(),
                                 .normed_x = x.const_data_ptr(),
                                 .normed_y = y.const_data_ptr(),
                                 .inv_std = scale.const_data_ptr(),
                                 .grad_logits = grad_logits.mutable_data_ptr(),
                                 .num_tokens = x.size(0),
                                 .num_rows = x.size(1),
                                 .num_cols = y.size(1),
                                 .dtype = to_dtype(x),
                                 .training = training,
                                 .token_mask = token_mask ? mask.const_data_ptr<bool>() : nullptr},
         x.device());
  fill_gate_gradients(grad_logits, hidden_states, gate_x, gate_y, output_mask, grad_hidden,
                      grad_gates);
  return {grad_hidden, grad_gates};
}

// ---- Gradient ----------------------------------------------------------------------------------

// Autograd counts each tensor of a list as an input.
template <typename Other>
size_t num_inputs(const Other& /*one argument*/) {
  return 1;
}
size_t num_inputs(at::TensorList list) { return list.size(); }

// The mask among the arguments behind the gates: the last one, in training.
template <typename... Rest>
OptionalTensor mask_among(const Rest&... rest) {
  const auto last = std::get<sizeof...(Rest) - 1>(std::tie(rest...));
  if constexpr (std::is_same_v<std::decay_t<decltype(last)>, OptionalTensor>) return last;
  return std::nullopt;
}

// Of the op in training and in evaluation, whose inputs with a gradient are the same three.
template <const auto& op, bool kTraining>
struct OmniRouterLogitsBackward : Function<OmniRouterLogitsBackward<op, kTraining>> {
  template <typename... Rest>
  static variable_list forward(AutogradContext* ctx, const Tensor& hidden_states,
                               const Tensor& gate_x, const Tensor& gate_y, const Rest&... rest) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [x, y, inv_std] = op(hidden_states, gate_x, gate_y, rest...);
    const OptionalTensor mask = mask_among(rest...);
    ctx->save_for_backward({hidden_states, gate_x, gate_y, x, y, inv_std, mask.value_or(Tensor())});
    ctx->saved_data["num_inputs"] = static_cast<int64_t>(3 + (num_inputs(rest) + ...));
    return {x, y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &gate_x = saved[1], &gate_y = saved[2], &mask = saved[6];
    const auto gradients = omni_router_logits_backward(
        grads[0], grads[1], saved[0], gate_x, gate_y, saved[3], saved[4], saved[5], kTraining,
        wanted_gate_gradients(ctx), mask.defined() ? OptionalTensor(mask) : std::nullopt);
    variable_list input_grads(ctx->saved_data["num_inputs"].toInt());
    return_gate_gradients(ctx, gradients, gate_x, gate_y, input_grads);
    return input_grads;
  }
};

// ---- Registration ------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  register_kernels(m, omni_router_logits, training_outputs, training_kernel);
  register_gradient<omni_router_logits, OmniRouterLogitsBackward<omni_router_logits, true>>(m);
  register_autocast<omni_router_logits, AutocastTo::kAutocastDtype>(m);

  register_kernels(m, omni_router_logits_eval, eval_outputs, eval_kernel);
  register_gradient<omni_router_logits_eval,
                    OmniRouterLogitsBackward<omni_router_logits_eval, false>>(m);
  // The first three: hidden states and gates, not the running statistics.
  register_autocast<omni_router_logits_eval, AutocastTo::kAutocastDtype, 3>(m);

  register_kernels(m, omni_router_logits_backward, backward_outputs, backward_kernel);
  register_no_gradient(m, omni_router_logits_backward);
}

}  // namespace

}  // namespace omni_moe::torch_api
