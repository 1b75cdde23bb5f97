// What device memory of the tests holds before a kernel writes it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdlib>

namespace omni_moe {

inline constexpr unsigned char kPoison = 0xff;  // all bytes: a NaN in every floating-point type

// Poisons `bytes` bytes between two guards, and the guards. With OMNI_MOE_TEST_INITCHECK set, as
// sanitize.sh does for compute-sanitizer's initcheck, only the guards: that tool finds reads of
// memory that nobody has written, and poison counts as written.
inline cudaError_t poison_device_memory(void* base, size_t guard_before, size_t bytes,
                                        size_t guard_after) {
  if (std::getenv("OMNI_MOE_TEST_INITCHECK") == nullptr) {
    return cudaMemset(base, kPoison, guard_before + bytes + guard_after);
  }
  const cudaError_t status = cudaMemset(base, kPoison, guard_before);
  if (status != cudaSuccess) return status;
  return cudaMemset(static_cast<char*>(base) + guard_before + bytes, kPoison, guard_after);
}

}  // namespace omni_moe
