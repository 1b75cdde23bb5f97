// What the kernels of the permutation share: places in the grid, weights, and rows of zeros.
//
// A block is cut into places of `threads_per_row` threads, each of which has one token or pair; its
// threads take the row's vectors in turn. Rows are read and written by vectors of 16 bytes in all
// places or in none, so that a sum does not depend on where its token lies.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/expert_id.cuh"
#include "cuda/common/vec.cuh"
#include "omni_moe/permute.h"

namespace omni_moe::cuda {

// Of the calling thread.
struct Place {
  int64_t index;
  int64_t count;  // of the grid
  int thread;     // in its place
  int num_threads;

  __device__ explicit Place(int threads_per_row)
      : thread(static_cast<int>(threadIdx.x) % threads_per_row), num_threads(threads_per_row) {
    const int places_per_block = static_cast<int>(blockDim.x) / threads_per_row;
    index =
        int64_t{blockIdx.x} * places_per_block + static_cast<int>(threadIdx.x) / threads_per_row;
    count = int64_t{gridDim.x} * places_per_block;
  }
};

template <class T>
__device__ __forceinline__ float load_weight(const PermuteShape& shape, const void* weights,
                                             int64_t pair) {
  if (weights == nullptr) return 1.0f;
  return shape.has_wide_weights ? static_cast<const float*>(weights)[pair]
                                : to_float(static_cast<const T*>(weights)[pair]);
}

// Writes zeros to the rows of this place that no pair has.
template <class T, int kVec>
__device__ __forceinline__ void clear_empty_rows(const PermuteShape& shape,
                                                 const int32_t* expert_ends, T* rows,
                                                 const Place& place) {
  const int64_t rows_per_part =
      shape.is_padded ? shape.num_rows / max(shape.num_experts, int64_t{1}) : shape.num_rows;
  // Without padding only the rows behind the last expert are empty.
  const bool is_one_part = !shape.is_padded && shape.num_experts > 0;
  const int64_t first = is_one_part ? max(expert_ends[shape.num_experts - 1], 0) : 0;
  for (int64_t row = first + place.index; row < shape.num_rows; row += place.count) {
    if (shape.is_padded && row < expert_ends[row / rows_per_part]) continue;
    const Vec<T, kVec> zeros{};
    for (int64_t col = place.thread * kVec; col < shape.hidden_size;
         col += place.num_threads * kVec) {
      store_vec(rows + row * shape.hidden_size + col, zeros);
    }
  }
}

}  // namespace omni_moe::cuda
