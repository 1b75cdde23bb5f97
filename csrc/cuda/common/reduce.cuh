// Reductions whose order of additions is fixed by the lane and warp numbers alone, and whose result
// every thread gets. CUB's give it to the first thread, from where it would have to be sent back.
#pragma once

#include <cuda_runtime.h>

namespace omni_moe::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;

template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = op(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

// Every lane gets the same bits: the butterfly adds the same pairs on both sides.
__device__ __forceinline__ float warp_sum(float value) {
  return warp_reduce(value, [](float a, float b) { return a + b; });
}

// Several sums at once, so that their shuffles overlap.
template <int kCount>
__device__ __forceinline__ void warp_sum(float (&values)[kCount]) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] += __shfl_xor_sync(kFullWarp, values[i], offset);
    }
  }
}

// Reduction over a block of kWarps whole warps; every thread gets the result. `scratch` holds
// kWarps values and may be used again after the caller's next __syncthreads().
template <int kWarps, class T, class Op>
__device__ __forceinline__ T block_reduce(T value, T* scratch, Op op) {
  value = warp_reduce(value, op);
  if constexpr (kWarps == 1) return value;
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  T result = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) result = op(result, scratch[warp]);
  return result;
}

template <int kWarps>
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  return block_reduce<kWarps>(value, scratch, [](float a, float b) { return a + b; });
}

template <int kWarps>
__device__ __forceinline__ float block_max(float value, float* scratch) {
  return block_reduce<kWarps>(value, scratch, [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace omni_moe::cuda
