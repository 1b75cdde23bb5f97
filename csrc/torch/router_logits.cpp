// Both gates of the router and the BatchNorm of their logits at the torch boundary: one kernel
// where the backend has one, else a matrix product of ATen and the kernels of batch_norm.cpp.
#include <torch/library.h>

#include "autocast.h"
#include "backend.h"
#include "batch_norm.h"
#include "ops.h"

namespace omni_moe::torch_api {

namespace {

using OptionalTensor = std::optional<Tensor>;

Normed router_logits(const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
                     const BatchNormOptions& options, bool want_inv_std) {
  constexpr auto kOp = "omni_router_logits";
  const auto guard = without_autocast();
  check_normed_router_logits(kOp, hidden_states, gate_x, gate_y, options.x, options.y,
                             options.training, options.eps);
  prepare_buffers(kOp, options);

  RouterLogitsForwardParams params{
      parameters_of(hidden_states, hidden_states.size(0), gate_x.size(0), gate_y.size(0), options),
      hidden_states.const_data_ptr(), gate_x.const_data_ptr(), gate_y.const_data_ptr(),
      hidden_states.size(1)};
  const bool dense =
      hidden_states.is_contiguous() && gate_x.is_contiguous() && gate_y.is_contiguous();
  if (dense && supports(params, hidden_states.device())) {
    const Normed normed = allocate_normed(hidden_states, want_inv_std, &params);
    if (try_launch(params, hidden_states.device())) return normed;
  }
  const Tensor logits = at::mm(hidden_states, at::cat({gate_x, gate_y}).t());
  return normalise(logits, gate_x.size(0), options, want_inv_std);
}

std::tuple<Tensor, Tensor> omni_router_logits_kernel(
    const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
    const OptionalTensor& running_mean_x, const OptionalTensor& running_var_x,
    const OptionalTensor& num_batches_tracked_x, const OptionalTensor& running_mean_y,
    const OptionalTensor& running_var_y, const OptionalTensor& num_batches_tracked_y, bool training,
    double momentum, double eps) {
  auto normed = router_logits(hidden_states, gate_x, gate_y,
                              {{"x", running_mean_x, running_var_x, num_batches_tracked_x},
                               {"y", running_mean_y, running_var_y, num_batches_tracked_y},
                               training,
                               momentum,
                               eps},
                              /*want_inv_std=*/false);
  return {normed.x, normed.y};
}

std::tuple<Tensor, Tensor, Tensor> omni_router_logits_save_stats_kernel(
    const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
    const OptionalTensor& running_mean_x, const OptionalTensor& running_var_x,
    const OptionalTensor& num_batches_tracked_x, const OptionalTensor& running_mean_y,
    const OptionalTensor& running_var_y, const OptionalTensor& num_batches_tracked_y, bool training,
    double momentum, double eps) {
  auto normed = router_logits(hidden_states, gate_x, gate_y,
                              {{"x", running_mean_x, running_var_x, num_batches_tracked_x},
                               {"y", running_mean_y, running_var_y, num_batches_tracked_y},
                               training,
                               momentum,
                               eps},
                              /*want_inv_std=*/true);
  return {normed.x, normed.y, normed.inv_std};
}

std::tuple<Tensor, Tensor> omni_router_logits_backward_kernel(
    const Tensor& grad_router_logits_x, const Tensor& grad_router_logits_y,
    const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
    const Tensor& router_logits_x, const Tensor& router_logits_y, const Tensor& inv_std,
    bool training, std::array<bool, 2> output_mask) {
  const auto guard = without_autocast();
  check_router_logits_backward("omni_router_logits_backward", grad_router_logits_x,
                               grad_router_logits_y, hidden_states, gate_x, gate_y, router_logits_x,
                               router_logits_y, inv_std);
  const Tensor grad_products =
      normalise_backward(grad_router_logits_x, grad_router_logits_y, router_logits_x,
                         router_logits_y, inv_std, training);
  const auto empty = [&] { return at::empty({0}, hidden_states.options()); };
  return {output_mask[0] ? at::mm(grad_products, at::cat({gate_x, gate_y})) : empty(),
          output_mask[1] ? at::mm(grad_products.t(), hidden_states) : empty()};
}

void register_kernels(torch::Library& m) {
  m.impl("omni_router_logits", omni_router_logits_kernel);
  m.impl("omni_router_logits_save_stats", omni_router_logits_save_stats_kernel);
  m.impl("omni_router_logits_backward", omni_router_logits_backward_kernel);
}

}  // namespace

TORCH_LIBRARY_IMPL(omni_moe, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(omni_moe, CUDA, m) { register_kernels(m); }

}  // namespace omni_moe::torch_api
