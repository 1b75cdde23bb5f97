// The second stage of passes that cut a sum over pairs into parts. It adds the fp32 partial rows of
// a token in a fixed order and rounds once; it reads parts * H * 4 bytes per row.
#pragma once

#include "cuda/common/check.h"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"

namespace omni_moe::cuda {

inline constexpr int kSplitReduceWarps = 8;

// out[row] = addend[row] + Σ_part partial[row][part], for blockIdx.x = row; a lane owns one column,
// a warp every kSplitReduceWarps-th part.
template <class T>
__global__ void __launch_bounds__(kSplitReduceWarps* kWarpSize)
    split_k_reduce_kernel(const float* partial,  // [rows, num_parts, H]
                          const T* addend,       // [rows, H], or null: none
                          T* out,                // [rows, H]
                          int num_parts, int64_t hidden_size) {
  __shared__ float warp_sums[kSplitReduceWarps][kWarpSize];
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = blockIdx.x;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kWarpSize + lane;
  float sum = 0.0f;
  if (column < hidden_size) {
    const float* parts = partial + row * num_parts * hidden_size + column;
#pragma unroll 8
    for (int part = warp; part < num_parts; part += kSplitReduceWarps) {
      sum += parts[part * hidden_size];
    }
  }
  warp_sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < hidden_size) {
#pragma unroll
    for (int w = 1; w < kSplitReduceWarps; ++w) sum += warp_sums[w][lane];
    const int64_t at = row * hidden_size + column;
    if (addend != nullptr) sum += to_float(addend[at]);
    out[at] = from_float<T>(sum);
  }
}

template <class T>
cudaError_t launch_split_k_reduce(const float* partial, const T* addend, T* out, int64_t rows,
                                  int num_parts, int64_t hidden_size, cudaStream_t stream) {
  const int64_t column_blocks = ceil_div<int64_t>(hidden_size, kWarpSize);
  if (column_blocks > 65535) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(column_blocks));
  split_k_reduce_kernel<T><<<grid, kSplitReduceWarps * kWarpSize, 0, stream>>>(
      partial, addend, out, num_parts, hidden_size);
  return launch_status();
}

}  // namespace omni_moe::cuda
