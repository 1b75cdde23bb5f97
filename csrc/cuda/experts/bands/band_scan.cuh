// Sums over a block, for the kernels that make lists of tasks.
#pragma once

#include "cuda/common/reduce.cuh"
#include "cuda/common/warp_scan.cuh"

namespace omni_moe::cuda {

template <int kBlockWarps>
__device__ __forceinline__ int block_add(int value, int* scratch) {
  const int sum = block_reduce<kBlockWarps>(value, scratch, [](int a, int b) { return a + b; });
  __syncthreads();
  return sum;
}

// The sum of the values of the threads before this one, and in `total` that of all.
template <int kBlockWarps>
__device__ __forceinline__ int block_exclusive_scan(int value, int* scratch, int* total) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int end = static_cast<int>(warp_inclusive_scan(static_cast<unsigned>(value)));
  if (lane == kWarpSize - 1) scratch[warp] = end;
  __syncthreads();
  int before = end - value;
  int all = 0;
  for (int w = 0; w < kBlockWarps; ++w) {
    if (w < warp) before += scratch[w];
    all += scratch[w];
  }
  __syncthreads();
  *total = all;
  return before;
}

}  // namespace omni_moe::cuda
