// Entry points of the CUDA backend. A call is planned once, by plan_<kernel>(params); its caller
// puts plan.workspace_bytes bytes (aligned to 256) into params.workspace and launches the kernel
// with the plan. Pointers are device memory of the current device, which the plan must have been
// made for; every launch only enqueues on `stream` (no synchronisation, no allocation) and returns
// its status.
#pragma once

#include <cuda_runtime_api.h>

#include "omni_moe/cuda_plan.h"

namespace omni_moe::cuda {

// Describes the current device and the code of this library that runs on it; the defaults where
// there is no device.
DeviceInfo current_device();

// Plans for the current device.
inline RouterForwardPlan plan_router_forward(const RouterForwardParams& params) {
  return plan_router_forward(params, current_device());
}
inline RouterBackwardPlan plan_router_backward(const RouterBackwardParams& params) {
  return plan_router_backward(params, current_device());
}
inline std::optional<RouterLogitsForwardPlan> plan_router_logits_forward(
    const RouterLogitsForwardParams& params) {
  return plan_router_logits_forward(params, current_device());
}
inline BatchNormForwardPlan plan_batch_norm_forward(const BatchNormForwardParams& params) {
  return plan_batch_norm_forward(params, current_device());
}
inline BatchNormBackwardPlan plan_batch_norm_backward(const BatchNormBackwardParams& params) {
  return plan_batch_norm_backward(params, current_device());
}
inline TopKRouterForwardPlan plan_topk_router_forward(const TopKRouterForwardParams& params) {
  return plan_topk_router_forward(params, current_device());
}
inline TopKRouterBackwardPlan plan_topk_router_backward(const TopKRouterBackwardParams& params) {
  return plan_topk_router_backward(params, current_device());
}
inline ExpertSlotsPlan plan_expert_slots(const ExpertSlotsParams& params) {
  return plan_expert_slots(params, current_device());
}
inline ExpertRowsPlan plan_expert_rows(const ExpertRowsParams& params) {
  return plan_expert_rows(params, current_device());
}
inline PermutePlan plan_permute(const PermuteParams& params) {
  return plan_permute(params, current_device());
}
inline PermutePlan plan_unpermute(const UnpermuteParams& params) {
  return plan_unpermute(params, current_device());
}
inline PermutePlan plan_unpermute_backward(const UnpermuteBackwardParams& params) {
  return plan_unpermute_backward(params, current_device());
}
inline ExpertForwardPlan plan_expert_forward(const ExpertForwardParams& params) {
  return plan_expert_forward(params, current_device());
}
ExpertBackwardPlan plan_expert_backward(const ExpertBackwardParams& params);
inline std::optional<GatedLinearForwardPlan> plan_gated_linear_forward(
    const GatedLinearForwardParams& params) {
  return plan_gated_linear_forward(params, current_device());
}
inline std::optional<GatedLinearBackwardPlan> plan_gated_linear_backward(
    const GatedLinearBackwardParams& params) {
  return plan_gated_linear_backward(params, current_device());
}

cudaError_t router_forward(const RouterForwardParams& params, const RouterForwardPlan& plan,
                           cudaStream_t stream);
cudaError_t router_backward(const RouterBackwardParams& params, const RouterBackwardPlan& plan,
                            cudaStream_t stream);
// In training a cooperative launch; cudaErrorNotSupported where the stream has only a part of the
// device's SMs and the grid does not fit on them.
cudaError_t router_logits_forward(const RouterLogitsForwardParams& params,
                                  const RouterLogitsForwardPlan& plan, cudaStream_t stream);
// In training one cooperative launch each; cudaErrorNotSupported on devices without them.
cudaError_t batch_norm_forward(const BatchNormForwardParams& params,
                               const BatchNormForwardPlan& plan, cudaStream_t stream);
cudaError_t batch_norm_backward(const BatchNormBackwardParams& params,
                                const BatchNormBackwardPlan& plan, cudaStream_t stream);
cudaError_t token_norm_forward(const TokenNormForwardParams& params,
                               const TokenNormForwardPlan& plan, cudaStream_t stream);
cudaError_t token_norm_backward(const TokenNormBackwardParams& params,
                                const TokenNormBackwardPlan& plan, cudaStream_t stream);
// At most 4096 experts.
cudaError_t topk_router_forward(const TopKRouterForwardParams& params,
                                const TopKRouterForwardPlan& plan, cudaStream_t stream);
cudaError_t topk_router_backward(const TopKRouterBackwardParams& params,
                                 const TopKRouterBackwardPlan& plan, cudaStream_t stream);
cudaError_t expert_slots(const ExpertSlotsParams& params, const ExpertSlotsPlan& plan,
                         cudaStream_t stream);
cudaError_t expert_rows(const ExpertRowsParams& params, const ExpertRowsPlan& plan,
                        cudaStream_t stream);
cudaError_t permute(const PermuteParams& params, const PermutePlan& plan, cudaStream_t stream);
cudaError_t unpermute(const UnpermuteParams& params, const PermutePlan& plan, cudaStream_t stream);
cudaError_t unpermute_backward(const UnpermuteBackwardParams& params, const PermutePlan& plan,
                               cudaStream_t stream);
// H > 0; of the backward T K < 2^31, since pairs are numbered in 32 bits.
cudaError_t expert_forward(const ExpertForwardParams& params, const ExpertForwardPlan& plan,
                           cudaStream_t stream);
cudaError_t expert_backward(const ExpertBackwardParams& params, const ExpertBackwardPlan& plan,
                            cudaStream_t stream);
cudaError_t gated_activation_forward(const GatedActivationForwardParams& params,
                                     const GatedActivationForwardPlan& plan, cudaStream_t stream);
cudaError_t gated_activation_backward(const GatedActivationBackwardParams& params,
                                      const GatedActivationBackwardPlan& plan, cudaStream_t stream);
cudaError_t gated_linear_forward(const GatedLinearForwardParams& params,
                                 const GatedLinearForwardPlan& plan, cudaStream_t stream);
cudaError_t gated_linear_backward(const GatedLinearBackwardParams& params,
                                  const GatedLinearBackwardPlan& plan, cudaStream_t stream);

// Whether kernels may start before the kernel in front of them has ended, where the device can;
// returns what was set before. For tests: results are the same bits either way.
bool set_early_launch(bool allowed);

}  // namespace omni_moe::cuda
