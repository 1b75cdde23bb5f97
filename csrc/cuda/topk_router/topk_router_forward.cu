// Top-k router, forward: scores, groups, choice, weights and counts, by the kernel that the shape
// fits, and the sum of the counts over its blocks.
#include "cuda/common/check.h"
#include "cuda/common/operands.h"
#include "cuda/topk_router/block_counts.h"
#include "cuda/topk_router/topk_router_forward.cuh"
#include "cuda/topk_router/topk_router_tuning.h"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

cudaError_t topk_router_forward(const TopKRouterForwardParams& params,
                                const TopKRouterForwardPlan& plan, cudaStream_t stream) {
  if (element_size(params.dtype) == 0) return cudaErrorInvalidValue;
  if (params.num_experts > TopKRouterTuning::kMaxExperts) return cudaErrorInvalidValue;
  if (params.num_tokens == 0 || params.num_experts_per_token == 0) {
    return clear_failure(
        cudaMemsetAsync(params.expert_counts, 0, params.num_experts * sizeof(int64_t), stream));
  }
  return run_steps(
      [&] {
        return plan.kernel == TopKRouterForwardKernel::kWarp
                   ? topk_router_forward_warp(params, plan, stream)
                   : topk_router_forward_block(params, plan, stream);
      },
      [&] {
        if (plan.num_blocks == 1) return cudaSuccess;
        return sum_block_counts(static_cast<int32_t*>(params.workspace), plan.num_blocks,
                                params.num_experts, params.expert_counts, plan.device, stream);
      });
}

}  // namespace omni_moe::cuda
