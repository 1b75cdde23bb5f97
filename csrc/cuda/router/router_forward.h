// The kernel families of the router's forward, between which the plan chooses.
#pragma once

#include <cuda_runtime_api.h>

#include "omni_moe/cuda_plan.h"

namespace omni_moe::cuda {

cudaError_t router_forward_warp(const RouterForwardParams& params, const RouterForwardPlan& plan,
                                cudaStream_t stream);
cudaError_t router_forward_unsorted(const RouterForwardParams& params,
                                    const RouterForwardPlan& plan, cudaStream_t stream);
cudaError_t router_forward_block(const RouterForwardParams& params, const RouterForwardPlan& plan,
                                 cudaStream_t stream);

}  // namespace omni_moe::cuda
