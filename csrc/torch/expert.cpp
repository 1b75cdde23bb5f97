// Atomic experts at the torch boundary: check, allocate, launch.
#include <torch/library.h>

#include "backend.h"
#include "checks.h"
#include "huge_pages.h"
#include "ops.h"

namespace omni_moe::torch_api {

namespace {

constexpr auto kForwardOp = "omni_expert";

// Scores are undefined where not wanted.
std::tuple<Tensor, Tensor> expert_forward(const Tensor& hidden_states, const Tensor& up_weights,
                                          const Tensor& down_weights, const Tensor& routing_weights,
                                          const Tensor& indices, std::string_view activation,
                                          const std::optional<Tensor>& addend, bool want_scores) {
  const Activation act = parse_activation(kForwardOp, activation);
  check_expert(kForwardOp, hidden_states, up_weights, down_weights, routing_weights, indices,
               addend);
  if (want_scores) check_num_pairs_of_gradient({kForwardOp, "indices", indices});
  check_indices(kForwardOp, indices, up_weights.size(0));
  const Tensor hidden = hidden_states.contiguous(), up = up_weights.contiguous(),
               down = down_weights.contiguous(), routing = routing_weights.contiguous(),
               ids = indices.contiguous(), more = addend ? addend->contiguous() : Tensor();
  Tensor out = at::empty_like(hidden);
  Tensor scores;
  if (want_scores) {
    const auto dtype = accumulation_dtype(hidden.scalar_type());
    scores = at::empty(ids.sizes(), hidden.options().dtype(dtype));
  }
  if (hidden.size(1) == 0) {  // no column: nothing to launch for, and every score is an empty sum
    if (want_scores) scores.zero_();
    return {out, scores};
  }
  launch({hidden.const_data_ptr(), up.const_data_ptr(), down.const_data_ptr(),
          routing.const_data_ptr(), ids.const_data_ptr(), addend ? more.const_data_ptr() : nullptr,
          out.mutable_data_ptr(), want_scores ? scores.mutable_data_ptr() : nullptr, hidden.size(0),
          hidden.size(1), up.size(0), ids.size(1), to_dtype(hidden), to_index_type(ids), act,
          /*workspace=*/nullptr},
         hidden.device());
  return {out, scores};
}

Tensor omni_expert_kernel(const Tensor& hidden_states, const Tensor& up_weights,
                          const Tensor& down_weights, const Tensor& routing_weights,
                          const Tensor& indices, std::string_view activation,
                          const std::optional<Tensor>& addend) {
  return std::get<0>(expert_forward(hidden_states, up_weights, down_weights, routing_weights,
                                    indices, activation, addend, /*want_scores=*/false));
}

std::tuple<Tensor, Tensor> omni_expert_save_scores_kernel(
    const Tensor& hidden_states, const Tensor& up_weights, const Tensor& down_weights,
    const Tensor& routing_weights, const Tensor& indices, std::string_view activation,
    const std::optional<Tensor>& addend) {
  return expert_forward(hidden_states, up_weights, down_weights, routing_weights, indices,
                        activation, addend, /*want_scores=*/true);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> omni_expert_backward_kernel(
    const Tensor& grad_expert_states, const Tensor& hidden_states, const Tensor& up_weights,
    const Tensor& down_weights, const Tensor& routing_weights, const Tensor& indices,
    std::string_view activation, std::array<bool, 4> output_mask,
    const std::optional<Tensor>& saved_scores, const std::optional<Tensor>& addend) {
  constexpr auto kOp = "omni_expert_backward";
  const Activation act = parse_activation(kOp, activation);
  check_expert_backward(kOp, grad_expert_states, hidden_states, up_weights, down_weights,
                        routing_weights, indices, saved_scores, addend);
  check_num_pairs_of_gradient({kOp, "indices", indices});
  check_indices(kOp, indices, up_weights.size(0));
  const Tensor grad = grad_expert_states.contiguous(), hidden = hidden_states.contiguous(),
               up = up_weights.contiguous(), down = down_weights.contiguous(),
               routing = routing_weights.contiguous(), ids = indices.contiguous(),
               more = addend ? addend->contiguous() : Tensor();
  const Tensor scores = saved_scores
                            ? saved_scores->contiguous()
                            : std::get<1>(expert_forward(hidden, up, down, routing, ids, activation,
                                                         /*addend=*/std::nullopt,
                                                         /*want_scores=*/true));
  const auto wanted = [&](bool asked, const Tensor& like) {
    return asked ? empty_like_on_huge_pages(like) : at::empty({0}, like.options());
  };
  const auto data = [](bool asked, Tensor& t) { return asked ? t.mutable_data_ptr() : nullptr; };
  Tensor grad_hidden = wanted(output_mask[0], hidden), grad_up = wanted(output_mask[1], up),
         grad_down = wanted(output_mask[2], down), grad_routing = wanted(output_mask[3], routing);
  // As in the forward: of the gradients only that of the routing weights has elements, all zero.
  if (hidden.size(1) == 0) return {grad_hidden, grad_up, grad_down, grad_routing.zero_()};
  launch({grad.const_data_ptr(),
          hidden.const_data_ptr(),
          up.const_data_ptr(),
          down.const_data_ptr(),
          routing.const_data_ptr(),
          ids.const_data_ptr(),
          scores.const_data_ptr(),
          addend ? more.const_data_ptr() : nullptr,
          data(output_mask[0], grad_hidden),
          data(output_mask[1], grad_up),
          data(output_mask[2], grad_down),
          data(output_mask[3], grad_routing),
          hidden.size(0),
          hidden.size(1),
          up.size(0),
          ids.size(1),
          to_dtype(hidden),
          to_index_type(ids),
          act,
          /*workspace=*/nullptr},
         hidden.device());
  return {grad_hidden, grad_up, grad_down, grad_routing};
}

// The older naming: its down_weights score and its up_weights project back.
Tensor flash_expert_composite(const Tensor& hidden_states, const Tensor& down_weights,
                              const Tensor& up_weights, const Tensor& indices,
                              const Tensor& routing_weights, std::string_view activation) {
  return omni_expert(hidden_states, /*up_weights=*/down_weights, /*down_weights=*/up_weights,
                     routing_weights, indices, activation);
}

void register_kernels(torch::Library& m) {
  m.impl("omni_expert", omni_expert_kernel);
  m.impl("omni_expert_save_scores", omni_expert_save_scores_kernel);
  m.impl("omni_expert_backward", omni_expert_backward_kernel);
}

}  // namespace

TORCH_LIBRARY_IMPL(omni_moe, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(omni_moe, CUDA, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(omni_moe, CompositeImplicitAutograd, m) {
  m.impl("flash_expert", flash_expert_composite);
}

}  // namespace omni_moe::torch_api
