// The token passes with a plan given by the caller, for tests and measurements.
#pragma once

#include "omni_moe/cuda.h"
#include "plan.h"

namespace omni_moe::cuda {

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
