// Integer arithmetic, and what plans and launchers ask of operands. Needs no CUDA toolkit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "omni_moe/types.h"

#ifdef __CUDACC__
#define OMNI_MOE_HOST_DEVICE __host__ __device__
#else
#define OMNI_MOE_HOST_DEVICE
#endif

namespace omni_moe::cuda {

template <class Int>
OMNI_MOE_HOST_DEVICE constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

template <class Int>
OMNI_MOE_HOST_DEVICE constexpr Int round_up(Int a, Int b) {
  return ceil_div(a, b) * b;
}

inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Bytes of one element; 0 for what has no CUDA kernel.
constexpr size_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    default:
      return 0;
  }
}

constexpr bool is_valid(Activation activation) {
  return activation >= Activation::kSilu && activation <= Activation::kIdentity;
}

constexpr bool is_valid(IndexType index_type) {
  return index_type == IndexType::kInt32 || index_type == IndexType::kInt64;
}

}  // namespace omni_moe::cuda
