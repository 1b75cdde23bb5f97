// The device that the token passes are planned for, and the passes with a plan given by the caller,
// for tests and measurements.
#pragma once

#include "cuda/common/check.h"
#include "cuda/experts/expert_plan.h"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

inline cudaError_t current_expert_device_info(ExpertDeviceInfo* info) {
  int device = 0;
  return run_steps(
      [&] { return current_device_info(info); }, [&] { return cudaGetDevice(&device); },
      [&] { return cudaDeviceGetAttribute(&info->l2_bytes, cudaDevAttrL2CacheSize, device); });
}

TokenPassShape token_pass_shape(const ExpertForwardParams& params);
TokenPassShape token_pass_shape(const ExpertBackwardParams& params);

size_t expert_forward_workspace_size(const ExpertForwardParams& params, const TokenPassPlan& plan);
size_t expert_backward_workspace_size(const ExpertBackwardParams& params,
                                      const TokenPassPlan& plan);

cudaError_t expert_forward(const ExpertForwardParams& params, const TokenPassPlan& plan,
                           cudaStream_t stream);
cudaError_t expert_backward(const ExpertBackwardParams& params, const TokenPassPlan& plan,
                            cudaStream_t stream);

}  // namespace omni_moe::cuda
