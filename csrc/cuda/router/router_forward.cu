// Cartesian-product router, forward: the K best of the R × C sums x[row] + y[col], by the kernel
// family that the shape fits, and nothing for masked tokens.
#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/vec.cuh"
#include "cuda/router/router_forward.h"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

namespace {

constexpr int kThreads = 256;

// Overwrites what masked tokens have chosen. A kernel of its own: a look at the mask in the warps'
// kernel took up to 8 registers of every token, masked or not, and made one of its forms spill.
template <class T>
__global__ void __launch_bounds__(kThreads) mask_choice_kernel(const RouterForwardParams params) {
  const int64_t pair = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t k = params.num_experts_per_token;
  if (pair >= params.num_tokens * k || params.token_mask[pair / k]) return;
  static_cast<T*>(params.weights)[pair] = from_float<T>(0.0f);
  params.indices[pair] = -1;
}

cudaError_t mask_choice(const RouterForwardParams& params, cudaStream_t stream) {
  const int64_t num_pairs = params.num_tokens * params.num_experts_per_token;
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(num_pairs, kThreads));
  return dispatch_dtype(params.dtype, [&](auto tag) {
    mask_choice_kernel<typename decltype(tag)::type><<<blocks, kThreads, 0, stream>>>(params);
    return launch_status();
  });
}

}  // namespace

cudaError_t router_forward(const RouterForwardParams& params, const RouterForwardPlan& plan,
                           cudaStream_t stream) {
  if (element_size(params.dtype) == 0) return cudaErrorInvalidValue;
  if (params.num_tokens == 0 || params.num_experts_per_token == 0) return cudaSuccess;
  return run_steps(
      [&] {
        switch (plan.kernel) {
          case RouterForwardKernel::kWarp:
            return router_forward_warp(params, plan, stream);
          case RouterForwardKernel::kUnsorted:
            return router_forward_unsorted(params, plan, stream);
          default:
            return router_forward_block(params, plan, stream);
        }
      },
      [&] { return params.token_mask == nullptr ? cudaSuccess : mask_choice(params, stream); });
}

}  // namespace omni_moe::cuda
