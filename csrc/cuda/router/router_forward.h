// The two kernel families of the router's forward, between which router_forward.cu chooses.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "omni_moe/router.h"

namespace omni_moe::cuda {

// One warp per token, for few experts per token and axes that fit a warp's registers.
bool fits_router_forward_warp(const RouterForwardParams& params);
cudaError_t router_forward_warp(const RouterForwardParams& params, cudaStream_t stream);

// One block per token, for any shape.
cudaError_t router_forward_block(const RouterForwardParams& params, cudaStream_t stream);
size_t router_forward_block_workspace_size(const RouterForwardParams& params);

}  // namespace omni_moe::cuda
