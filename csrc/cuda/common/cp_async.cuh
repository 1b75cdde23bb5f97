// Copies of 16 bytes from global to shared memory that a thread starts and waits for in groups;
// unlike TMA's, each has an address of its own, so that they gather rows. sm_80 and later. CUDA's
// __pipeline_memcpy_async takes the number of bytes to fill with zeros at compile time only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace omni_moe::cuda {

// Copies 16 bytes, or fills them with zeros where `exists` is false; `from` is not read then. L1
// does not keep them.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(exists ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the last kPending committed groups of this thread have landed.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace omni_moe::cuda
