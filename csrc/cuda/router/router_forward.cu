// Cartesian-product router, forward: the K best of the R × C sums x[row] + y[col], by the kernel
// family that the shape fits.
#include "cuda/common/dispatch.h"
#include "cuda/router/router_forward.h"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

cudaError_t router_forward(const RouterForwardParams& params, cudaStream_t stream) {
  if (element_size(params.dtype) == 0) return cudaErrorInvalidValue;
  if (params.num_tokens == 0 || params.num_experts_per_token == 0) return cudaSuccess;
  return fits_router_forward_warp(params) ? router_forward_warp(params, stream)
                                          : router_forward_block(params, stream);
}

size_t router_forward_workspace_size(const RouterForwardParams& params) {
  if (params.num_tokens == 0 || params.num_experts_per_token == 0) return 0;
  return fits_router_forward_warp(params) ? 0 : router_forward_block_workspace_size(params);
}

}  // namespace omni_moe::cuda
