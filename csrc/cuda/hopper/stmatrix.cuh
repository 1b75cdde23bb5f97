// Stores fp32 accumulators of a warp as rows of 16-bit elements in shared memory, four 8x8 matrices
// at a time. Lane l gives the address of row l % 8 of matrix l / 8 and holds, of each matrix,
// columns 2 (l % 4) + {0, 1} of row l / 4, which is the layout of the tensor cores' accumulators.
// sm_90 and later.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/hopper/mbarrier.cuh"
#include "cuda/hopper/tma.cuh"

namespace omni_moe::cuda {

__device__ __forceinline__ uint32_t pack_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t pack_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// cuda::ptx has no stmatrix.
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&fragment)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
      : "memory");
}

// The same, but address l % 8 is that of column l % 8.
__device__ __forceinline__ void store_transposed_matrices(void* col,
                                                          const uint32_t (&fragment)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(col)),
               "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
}

// Stores the warp's 16 rows by 64 columns of a wgmma's D as rows of a swizzled tile. pair(i) packs
// the values for the places of accumulators i and i + 1, i = 0 … 31.
template <class Pair>
__device__ __forceinline__ void store_rows(char* tile, Pair pair) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {  // of 16 columns
    uint32_t fragment[4];
#pragma unroll
    for (int p = 0; p < 4; ++p) fragment[p] = pair(quarter * 8 + p * 2);
    // Matrices in accumulator order: rows 0-7, rows 8-15, then the same of the next 8 columns.
    store_matrices(tile + swizzle128(lane % 16, quarter * 2 + lane / 16), fragment);
  }
}

}  // namespace omni_moe::cuda
