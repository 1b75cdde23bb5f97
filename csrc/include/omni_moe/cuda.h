// Entry points of the CUDA backend. Pointers are device memory of the current device; every call
// only enqueues on `stream` (no synchronisation, no allocation) and returns the launch status.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "omni_moe/batch_norm.h"
#include "omni_moe/expert.h"
#include "omni_moe/mlp.h"
#include "omni_moe/router.h"
#include "omni_moe/router_logits.h"
#include "omni_moe/schedule.h"

namespace omni_moe::cuda {

cudaError_t router_forward(const RouterForwardParams& params, cudaStream_t stream);
cudaError_t router_backward(const RouterBackwardParams& params, cudaStream_t stream);
// H > 0; of the backward T K < 2^31, since pairs are numbered in 32 bits.
cudaError_t expert_forward(const ExpertForwardParams& params, cudaStream_t stream);
cudaError_t expert_backward(const ExpertBackwardParams& params, cudaStream_t stream);
cudaError_t gated_activation_forward(const GatedActivationForwardParams& params,
                                     cudaStream_t stream);
cudaError_t gated_activation_backward(const GatedActivationBackwardParams& params,
                                      cudaStream_t stream);

// Whether kernels may start before the kernel in front of them has ended, where the device can;
// returns what was set before. For tests: results are the same bits either way.
bool set_early_launch(bool allowed);

// Of the code that the current device runs of this library: whether kernels do start early, and
// whether it has the kernels of Hopper's own instructions.
bool has_early_launch();
bool has_hopper_kernels();

// With params.training one cooperative launch each; cudaErrorNotSupported on devices without them.
cudaError_t batch_norm_forward(const BatchNormForwardParams& params, cudaStream_t stream);
cudaError_t batch_norm_backward(const BatchNormBackwardParams& params, cudaStream_t stream);

// Whether gated_linear_forward or _backward has a kernel for these operands on the current device
// (Hopper in a build for sm_90a, 16-bit elements, H and I multiples of 8, 16-byte aligned
// pointers). Where not, it returns cudaErrorNotSupported.
bool gated_linear_forward_supported(const GatedLinearForwardParams& params);
cudaError_t gated_linear_forward(const GatedLinearForwardParams& params, cudaStream_t stream);
bool gated_linear_backward_supported(const GatedLinearBackwardParams& params);
cudaError_t gated_linear_backward(const GatedLinearBackwardParams& params, cudaStream_t stream);

// Whether router_logits_forward has a kernel for these operands on the current device: Hopper in a
// build for sm_90a, 16-bit elements, H, R and C multiples of 8, 16-byte aligned pointers, and a
// grid that fits on the device at once (4096 tokens by 768 logits on an H200). Where not, it
// returns cudaErrorNotSupported, also where training finds only a part of the device's SMs.
bool router_logits_forward_supported(const RouterLogitsForwardParams& params);
cudaError_t router_logits_forward(const RouterLogitsForwardParams& params, cudaStream_t stream);

// Bytes of workspace (aligned to 256), from the shapes and the current device's properties alone.
size_t router_forward_workspace_size(const RouterForwardParams& params);
size_t router_backward_workspace_size(const RouterBackwardParams& params);
size_t expert_forward_workspace_size(const ExpertForwardParams& params);
size_t expert_backward_workspace_size(const ExpertBackwardParams& params);
size_t batch_norm_forward_workspace_size(const BatchNormForwardParams& params);
size_t batch_norm_backward_workspace_size(const BatchNormBackwardParams& params);
size_t router_logits_forward_workspace_size(const RouterLogitsForwardParams& params);

}  // namespace omni_moe::cuda
