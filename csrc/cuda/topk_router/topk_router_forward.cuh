// The kernels of the top-k router's forward, by the shape that they serve.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "omni_moe/cuda_plan.h"

namespace omni_moe::cuda {

// With one block they write expert_counts, else a row [E] of the workspace for each block.
cudaError_t topk_router_forward_warp(const TopKRouterForwardParams& params,
                                     const TopKRouterForwardPlan& plan, cudaStream_t stream);
cudaError_t topk_router_forward_block(const TopKRouterForwardParams& params,
                                      const TopKRouterForwardPlan& plan, cudaStream_t stream);

// Their end: writes what a block has counted. All threads call it.
__device__ __forceinline__ void write_block_counts(const TopKRouterForwardParams& params,
                                                   const int32_t* counts) {
  __syncthreads();
  auto* rows = static_cast<int32_t*>(params.workspace);
  for (int64_t e = threadIdx.x; e < params.num_experts; e += blockDim.x) {
    if (gridDim.x == 1)
      params.expert_counts[e] = counts[e];
    else
      rows[blockIdx.x * params.num_experts + e] = counts[e];
  }
}

}  // namespace omni_moe::cuda
