// Launch status and host-side queries shared by every launcher.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "device_info.h"

namespace omni_moe::cuda {

// What the last `<<<>>>` of this thread returned. Reads and clears the non-sticky error, so that a
// bad launch is reported by the call that made it.
inline cudaError_t launch_status() { return cudaGetLastError(); }

// Runs the steps in order and returns the first failure.
//   return run_steps([&] { return launch_a(); }, [&] { return launch_b(); });
template <class... Steps>
cudaError_t run_steps(Steps&&... steps) {
  cudaError_t status = cudaSuccess;
  ((status = status == cudaSuccess ? steps() : status), ...);
  return status;
}

// cudaDeviceGetAttribute takes tens of nanoseconds, so nothing is cached and several devices just
// work.
inline cudaError_t current_device_info(DeviceInfo* info) {
  int device = 0;
  int major = 0;
  int minor = 0;
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    return [=, &device] { return cudaDeviceGetAttribute(value, attribute, device); };
  };
  const cudaError_t status = run_steps(
      [&] { return cudaGetDevice(&device); }, read(&info->num_sms, cudaDevAttrMultiProcessorCount),
      read(&major, cudaDevAttrComputeCapabilityMajor),
      read(&minor, cudaDevAttrComputeCapabilityMinor),
      read(&info->shared_bytes_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor),
      read(&info->shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin));
  if (status == cudaSuccess) info->compute_capability = 10 * major + minor;
  return status;
}

// A block gets more than 48 KB of shared memory only after its kernel has been opted in, once per
// device; asking again is cheap.
template <class Kernel>
cudaError_t allow_shared_memory(Kernel* kernel, size_t bytes) {
  constexpr size_t kAlwaysAllowed = 40 * 1024;  // 48 KB, less what the kernel declares statically
  if (bytes <= kAlwaysAllowed) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace omni_moe::cuda
