// Cartesian-product router, forward: the K best of the R × C sums x[row] + y[col], by the kernel
// family that the shape fits.
#include "cuda/common/operands.h"
#include "cuda/router/router_forward.h"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

cudaError_t router_forward(const RouterForwardParams& params, const RouterForwardPlan& plan,
                           cudaStream_t stream) {
  if (element_size(params.dtype) == 0) return cudaErrorInvalidValue;
  if (params.num_tokens == 0 || params.num_experts_per_token == 0) return cudaSuccess;
  return plan.kernel == RouterForwardKernel::kWarp ? router_forward_warp(params, plan, stream)
                                                   : router_forward_block(params, plan, stream);
}

}  // namespace omni_moe::cuda
