// Expert ids as the caller gave them, checked once where they are read.
#pragma once

#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>

#include "omni_moe/types.h"

// What assert() calls; <cassert> declares it only without NDEBUG.
extern "C" __host__ __device__ void __assert_fail(const char* assertion, const char* file,
                                                  unsigned int line, const char* function) noexcept
    __attribute__((__noreturn__));

namespace omni_moe::cuda {

// PyTorch's convention for embeddings: an id outside [0, num_experts) ends the kernel with a
// device-side assert. Unlike assert(), this one stays in builds with NDEBUG.
__device__ __forceinline__ void check_expert_id(int64_t id, int64_t num_experts) {
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(num_experts)) {
    __assert_fail("omni_moe: index out of range, indices must lie in [0, num_experts)", __FILE__,
                  __LINE__, "check_expert_id");
  }
}

// An int32 id: in [0, E), or -1 for none.
__device__ __forceinline__ int32_t load_id_or_none(const int32_t* ids, int64_t i,
                                                   int64_t num_experts) {
  const int32_t id = ids[i];
  check_expert_id(int64_t{id} + 1, num_experts + 1);
  return id;
}

// indices[i] of either type, unchecked: for loads that are issued long before they are needed.
__device__ __forceinline__ int64_t load_index(const void* indices, IndexType index_type,
                                              int64_t i) {
  return index_type == IndexType::kInt32
             ? static_cast<int64_t>(static_cast<const int32_t*>(indices)[i])
             : static_cast<const int64_t*>(indices)[i];
}

// The same as the 32 bits every valid id fits in (launchers reject larger E).
__device__ __forceinline__ int32_t load_expert_id(const void* indices, IndexType index_type,
                                                  int64_t i, int64_t num_experts) {
  const int64_t id = load_index(indices, index_type, i);
  check_expert_id(id, num_experts);
  return static_cast<int32_t>(id);
}

}  // namespace omni_moe::cuda
