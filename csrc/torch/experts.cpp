// Atomic experts: out[t] = addend[t] + Σ_k act(hidden[t] · up[idx[t,k]]) routing[t,k]
// down[idx[t,k]].
#include "experts.h"

#include <limits>
#include <string>

#include "backend.h"
#include "checks.h"
#include "huge_pages.h"
#include "named_range.h"
#include "omni_moe/expert.h"

// ---- Schemas -----------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  // hidden (T, H), up and down (E, H), routing and indices (T, K), addend (T, H) -> (T, H). With
  // save_for_backward also hidden[t] · up[idx[t,k]], (T, K) in the accumulation type, else empty;
  // with a gradient to come, autograd saves it by itself, and it comes back empty. num_cols: C, if
  // the experts are the cells row * C + col of a router's grid, which many experts per token are
  // fast with; 0: they are not.
  m.def(
      "omni_expert(Tensor hidden_states, Tensor up_weights, Tensor down_weights, "
      "Tensor routing_weights, Tensor indices, str activation=\"silu\", Tensor? addend=None, "
      "bool save_for_backward=False, SymInt num_cols=0) "
      "-> (Tensor expert_states, Tensor pre_activations)");
  // The addend (T, H) is added to grad_hidden_states. A gradient that output_mask does not ask for
  // comes back empty.
  m.def(
      "_omni_expert_backward(Tensor grad_expert_states, Tensor hidden_states, Tensor up_weights, "
      "Tensor down_weights, Tensor routing_weights, Tensor indices, Tensor pre_activations, "
      "str activation, Tensor? addend, bool[4] output_mask, SymInt num_cols=0) "
      "-> (Tensor grad_hidden_states, Tensor grad_up_weights, Tensor grad_down_weights, Tensor "
      "grad_routing_weights)");
}

namespace omni_moe::torch_api {

// ---- Outputs -----------------------------------------------------------------------------------

namespace {

// (T, H), as the hidden states.
void check_like_tokens(const Argument& argument, const Argument& hidden) {
  check_rank(argument, 2);
  check_like(argument, hidden);
  check_size(argument, 0, hidden.tensor.sym_size(0), "number of tokens of hidden_states");
  check_size(argument, 1, hidden.tensor.sym_size(1), "hidden_size of hidden_states");
}

// The passes of a gradient on the GPU number the T·K pairs of a token and an expert in 32 bits.
// Asked by the forward that saves for a backward, too, so that a training step is refused at its
// start. Neither a forward alone nor the CPU has the limit; a meta tensor stands for any device.
void check_num_pairs_of_gradient(const char* op, const Tensor& indices) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(!indices.is_cuda() || indices.numel() <= kMost, op,
                    ": expected indices to have at most ", kMost, " elements for gradients on ",
                    indices.device(), ", but got shape ", indices.sizes(), " (", indices.numel(),
                    ")");
}

}  // namespace

void check_experts(const ExpertOperands& operands, const OptionalTensor& addend) {
  const char* op = operands.op;
  const Argument hidden{op, "hidden_states", operands.hidden_states};
  const Argument up{op, operands.up_name, operands.up_weights};
  const Argument down{op, operands.down_name, operands.down_weights};
  const Argument routing{op, "routing_weights", operands.routing_weights};
  const Argument ids{op, "indices", operands.indices};
  for (const auto& argument : {hidden, up, down, routing, ids}) check_rank(argument, 2);
  check_floating(hidden);
  for (const auto& argument : {up, down, routing}) check_like(argument, hidden);
  check_integer(ids);
  check_like(ids, hidden, /*same_dtype=*/false);
  const c10::SymInt num_tokens = hidden.tensor.sym_size(0), hidden_size = hidden.tensor.sym_size(1);
  check_size(up, 1, hidden_size, "hidden_size of hidden_states");
  check_size(down, 0, up.tensor.sym_size(0), std::string("number of experts of ") + up.name);
  check_size(down, 1, hidden_size, "hidden_size of hidden_states");
  check_size(ids, 0, num_tokens, "number of tokens of hidden_states");
  check_size(routing, 0, num_tokens, "number of tokens of hidden_states");
  check_size(routing, 1, ids.tensor.sym_size(1), "experts per token of indices");
  if (addend) check_like_tokens({op, "addend", *addend}, hidden);
  const c10::SymInt num_experts = up.tensor.sym_size(0), &num_cols = operands.num_cols;
  TORCH_CHECK_VALUE(num_cols == 0 || (num_cols > 0 && num_experts % num_cols == 0), op,
                    ": expected num_cols to be 0 or to divide the number of experts (", num_experts,
                    "), but got ", num_cols);
}

std::tuple<Tensor, Tensor> expert_outputs_of(const ExpertOperands& operands,
                                             bool save_for_backward) {
  const Tensor& hidden = operands.hidden_states;
  if (save_for_backward) check_num_pairs_of_gradient(operands.op, operands.indices);
  return {at::empty_symint(hidden.sym_sizes(), hidden.options()),
          empty_if(save_for_backward, operands.indices.sym_sizes(),
                   hidden.options().dtype(accumulation_dtype(hidden.scalar_type())))};
}

namespace {

std::tuple<Tensor, Tensor> expert_outputs(const Tensor& hidden_states, const Tensor& up_weights,
                                          const Tensor& down_weights, const Tensor& routing_weights,
                                          const Tensor& indices, std::string_view activation,
                                          const OptionalTensor& addend, bool save_for_backward,
                                          c10::SymInt num_cols) {
  const ExpertOperands operands{omni_expert.name, hidden_states, up_weights, down_weights,
                                routing_weights,  indices,       num_cols};
  parse_activation(operands.op, activation);
  check_experts(operands, addend);
  return expert_outputs_of(operands, save_for_backward);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients expert_backward_outputs(const Tensor& grad_expert_states, const Tensor& hidden_states,
                                  const Tensor& up_weights, const Tensor& down_weights,
                                  const Tensor& routing_weights, const Tensor& indices,
                                  const Tensor& pre_activations, std::string_view activation,
                                  const OptionalTensor& addend, Mask<4> output_mask,
                                  c10::SymInt num_cols) {
  const char* op = omni_expert_backward.name;
  const Argument hidden{op, "hidden_states", hidden_states};
  parse_activation(op, activation);
  check_experts({op, hidden_states, up_weights, down_weights, routing_weights, indices, num_cols},
                addend);
  check_like_tokens({op, "grad_expert_states", grad_expert_states}, hidden);
  const Argument saved{op, "pre_activations", pre_activations};
  check_rank(saved, 2);
  check_like(saved, hidden, /*same_dtype=*/false);
  check_dtype(saved, accumulation_dtype(hidden_states.scalar_type()));
  check_size(saved, 0, hidden_states.sym_size(0), "number of tokens of hidden_states");
  check_size(saved, 1, indices.sym_size(1), "experts per token of indices");
  check_num_pairs_of_gradient(op, indices);
  const auto gradient = [&](size_t i, const Tensor& like) {
    return output_mask[i] ? empty_like_on_huge_pages(like) : at::empty({0}, like.options());
  };
  return {gradient(0, hidden_states), gradient(1, up_weights), gradient(2, down_weights),
          gradient(3, routing_weights)};
}

}  // namespace

// ---- Kernels -----------------------------------------------------------------------------------

namespace {

ExpertShape shape_of(const Tensor& hidden_states, const Tensor& up_weights, const Tensor& indices,
                     const char* op, std::string_view activation, const c10::SymInt& num_cols) {
  return {.num_tokens = hidden_states.size(0),
          .hidden_size = hidden_states.size(1),
          .num_experts = up_weights.size(0),
          .num_experts_per_token = indices.size(1),
          .dtype = to_dtype(hidden_states),
          .index_type = to_index_type(indices),
          .activation = parse_activation(op, activation),
          .num_cols = num_cols.expect_int()};
}

}  // namespace

void run_experts(const ExpertOperands& operands, std::string_view activation,
                 const OptionalTensor& addend, const std::tuple<Tensor, Tensor>& outputs) {
  const NamedRange range(kExpertsRange);
  const auto& [expert_states, pre_activations] = outputs;
  const bool save_for_backward = pre_activations.dim() == 2;
  check_indices(operands.op, operands.indices, operands.up_weights.size(0));
  const Tensor hidden = operands.hidden_states.contiguous(), up = operands.up_weights.contiguous(),
               down = operands.down_weights.contiguous(),
               routing = operands.routing_weights.contiguous(), ids = operands.indices.contiguous(),
               more = addend ? addend->contiguous() : Tensor();
  if (hidden.size(1) == 0) {  // no column: nothing to launch for, and every product is an empty sum
    if (save_for_backward) pre_activations.zero_();
    return;
  }
  ExpertForwardParams params{shape_of(hidden, up, ids, operands.op, activation, operands.num_cols)};
  params.hidden_states = hidden.const_data_ptr();
  params.up_weights = up.const_data_ptr();
  params.down_weights = down.const_data_ptr();
  params.routing_weights = routing.const_data_ptr();
  params.indices = ids.const_data_ptr();
  if (addend) params.addend = more.const_data_ptr();
  params.expert_states = expert_states.mutable_data_ptr();
  if (save_for_backward) params.pre_activations = pre_activations.mutable_data_ptr();
  launch(params, hidden.device());
}

namespace {

std::tuple<Tensor, Tensor> expert_kernel(const Tensor& hidden_states, const Tensor& up_weights,
                                         const Tensor& down_weights, const Tensor& routing_weights,
                                         const Tensor& indices, std::string_view activation,
                                         const OptionalTensor& addend, bool save_for_backward,
                                         c10::SymInt num_cols) {
  const auto outputs = expert_outputs(hidden_states, up_weights, down_weights, routing_weights,
                                      indices, activation, addend, save_for_backward, num_cols);
  run_experts({omni_expert.name, hidden_states, up_weights, down_weights, routing_weights, indices,
               num_cols},
              activation, addend, outputs);
  return outputs;
}

Gradients expert_backward_kernel(const Tensor& grad_expert_states, const Tensor& hidden_states,
                                 const Tensor& up_weights, const Tensor& down_weights,
                                 const Tensor& routing_weights, const Tensor& indices,
                                 const Tensor& pre_activations, std::string_view activation,
                                 const OptionalTensor& addend, Mask<4> output_mask,
                                 c10::SymInt num_cols) {
  const NamedRange range(kExpertsRange);
  const auto outputs = expert_backward_outputs(
      grad_expert_states, hidden_states, up_weights, down_weights, routing_weights, indices,
      pre_activations, activation, addend, output_mask, num_cols);
  const auto& [grad_hidden, grad_up, grad_down, grad_routing] = outputs;
  check_indices(omni_expert_backward.name, indices, up_weights.size(0));
  const Tensor grad = grad_expert_states.contiguous(), hidden = hidden_states.contiguous(),
               up = up_weights.contiguous(), down = down_weights.contiguous(),
               routing = routing_weights.contiguous(), ids = indices.contiguous(),
               saved = pre_activations.contiguous(),
               more = addend ? addend->contiguous() : Tensor();
  if (hidden.size(1) == 0) {  // as in the forward: only the routing weights' gradient has elements
    grad_routing.zero_();
    return outputs;
  }
  ExpertBackwardParams params{
      shape_of(hidden, up, ids, omni_expert_backward.name, activation, num_cols)};
  params.grad_expert_states = grad.const_data_ptr();
  params.hidden_states = hidden.const_data_ptr();
  params.up_weights = up.const_data_ptr();
  params.down_weights = down.const_data_ptr();
  params.routing_weights = routing.const_data_ptr();
  params.indices = ids.const_data_ptr();
  params.pre_activations = saved.const_data_ptr();
  if (addend) params.addend = more.const_data_ptr();
  if (output_mask[0]) params.grad_hidden_states = grad_hidden.mutable_data_ptr();
  if (output_mask[1]) params.grad_up_weights = grad_up.mutable_data_ptr();
  if (output_mask[2]) params.grad_down_weights = grad_down.mutable_data_ptr();
  if (output_mask[3]) params.grad_routing_weights = grad_routing.mutable_data_ptr();
  launch(params, hidden.device());
  return outputs;
}

// ---- Gradient ----------------------------------------------------------------------------------

struct OmniExpertBackward : Function<OmniExpertBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& hidden_states,
                               const Tensor& up_weights, const Tensor& down_weights,
                               const Tensor& routing_weights, const Tensor& indices,
                               std::string_view activation, const OptionalTensor& addend,
                               bool /*save_for_backward: the node does*/,
                               const c10::SymInt& num_cols) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [expert_states, pre_activations] =
        omni_expert(hidden_states, up_weights, down_weights, routing_weights, indices, activation,
                    addend, /*save_for_backward=*/true, num_cols);
    ctx->save_for_backward(
        {hidden_states, up_weights, down_weights, routing_weights, indices, pre_activations});
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["has_addend"] = addend.has_value();
    ctx->saved_data["num_cols"] = num_cols;
    return {expert_states};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    Mask<4> mask;
    for (size_t i = 0; i < 4; ++i) mask[i] = ctx->needs_input_grad(i);
    auto [grad_hidden, grad_up, grad_down, grad_routing] =
        omni_expert_backward(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5],
                             ctx->saved_data["activation"].toStringRef(), /*addend=*/std::nullopt,
                             mask, ctx->saved_data["num_cols"].toSymInt());
    constexpr size_t kAddendEdge = 5;  // among the tensors of the forward
    const bool want_addend =
        ctx->saved_data["has_addend"].toBool() && ctx->needs_input_grad(kAddendEdge);
    return {if_wanted(mask[0], grad_hidden),
            if_wanted(mask[1], grad_up),
            if_wanted(mask[2], grad_down),
            if_wanted(mask[3], grad_routing),
            /*indices=*/Tensor(),
            /*activation=*/Tensor(),
            if_wanted(want_addend, grads[0]),
            /*save_for_backward=*/Tensor(),
            /*num_cols=*/Tensor()};
  }
};

// ---- Registration ------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  register_kernels(m, omni_expert, expert_outputs, expert_kernel);
  register_gradient<omni_expert, OmniExpertBackward>(m);
  register_autocast<omni_expert, AutocastTo::kAutocastDtype>(m);

  register_kernels(m, omni_expert_backward, expert_backward_outputs, expert_backward_kernel);
  register_no_gradient(m, omni_expert_backward);
}

}  // namespace

}  // namespace omni_moe::torch_api
