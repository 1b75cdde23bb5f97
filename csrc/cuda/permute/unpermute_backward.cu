// Un-permute, backward, in one pass over the rows: grad_rows = weight * grad_token, and for each
// pair the dot product of its row and its token's gradient. A warp per pair, whose dot product is
// lane sums and one butterfly: no atomics, the same bits every run.
//
// Memory is the bound: T H + N H elements in (the K warps of a token share its gradient in L1), N H
// out.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/common/reduce.cuh"
#include "cuda/permute/permute_rows.cuh"
#include "cuda/permute/permute_tuning.h"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

namespace {

template <class T, int kVec>
__device__ __forceinline__ void warp_pair_gradient(const UnpermuteBackwardParams& params,
                                                   int64_t pair, int lane) {
  using V = Vec<T, kVec>;
  const int64_t n = params.hidden_size;
  const int32_t row = load_id_or_none(params.row_id_map, pair, params.num_rows);
  float dot = 0.0f;
  if (row >= 0) {
    const float weight = load_weight<T>(params, params.weights, pair);
    const T* grad_token =
        static_cast<const T*>(params.grad_tokens) + pair / params.num_experts_per_token * n;
    const T* own = static_cast<const T*>(params.rows) + row * n;
    T* grad_row =
        params.grad_rows == nullptr ? nullptr : static_cast<T*>(params.grad_rows) + row * n;
#pragma unroll 4
    for (int64_t col = lane * kVec; col < n; col += kWarpSize * kVec) {
      float grad[kVec], values[kVec];
      unpack(load_vec<V>(grad_token + col), grad);
      unpack(load_vec<V>(own + col), values);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        dot += grad[i] * values[i];
        grad[i] *= weight;
      }
      if (grad_row == nullptr) continue;
      V out;
      pack(grad, out);
      store_vec(grad_row + col, out);
    }
  }
  dot = warp_sum(dot);
  if (lane != 0) return;
  if (params.has_wide_weights) {
    static_cast<float*>(params.grad_weights)[pair] = dot;
  } else {
    static_cast<T*>(params.grad_weights)[pair] = from_float<T>(dot);
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(PermuteTuning::kThreads, PermuteTuning::kBlocksPerSm)
    unpermute_backward_kernel(const UnpermuteBackwardParams params) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Place place(kWarpSize);
  if (place.index < params.num_tokens * params.num_experts_per_token) {
    warp_pair_gradient<T, kVec>(params, place.index, place.thread);
  }
  if (params.grad_rows == nullptr) return;
  clear_empty_rows<T, kVec>(params, params.expert_ends, static_cast<T*>(params.grad_rows), place);
}

}  // namespace

cudaError_t unpermute_backward(const UnpermuteBackwardParams& params, const PermutePlan& plan,
                               cudaStream_t stream) {
  if (element_size(params.dtype) == 0) return cudaErrorInvalidValue;
  if (plan.num_blocks == 0) return cudaSuccess;
  if (plan.num_blocks > INT32_MAX) return cudaErrorInvalidValue;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto vec) {
      return launch_early(unpermute_backward_kernel<T, decltype(vec)::value>,
                          static_cast<unsigned>(plan.num_blocks), PermuteTuning::kThreads,
                          plan.device, stream, params);
    };
    return plan.uses_vectors ? run(ValueTag<kVecWidth<T>>{}) : run(ValueTag<1>{});
  });
}

}  // namespace omni_moe::cuda
