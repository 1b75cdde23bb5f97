// Launch status and host-side queries shared by every launcher.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/common/operands.h"
#include "omni_moe/cuda_plan.h"

namespace omni_moe::cuda {

// Returns the status of this thread's last `<<<>>>`. It reads and clears the non-sticky error, so
// that a bad launch is reported by the call that made it.
inline cudaError_t launch_status() { return cudaGetLastError(); }

// Clears the error that a failed call leaves behind beside returning it: the next launch_status()
// would otherwise report it for a launch that worked.
inline cudaError_t clear_failure(cudaError_t status) {
  if (status != cudaSuccess) (void)cudaGetLastError();
  return status;
}

// Runs the steps in order and returns the first failure.
//   return run_steps([&] { return launch_a(); }, [&] { return launch_b(); });
template <class... Steps>
cudaError_t run_steps(Steps&&... steps) {
  cudaError_t status = cudaSuccess;
  ((status = status == cudaSuccess ? steps() : status), ...);
  return clear_failure(status);
}

// A block gets more than 48 KB of shared memory only after its kernel has been opted in, once per
// device. The limit belongs to the kernel, not to the launch: it is always set to all that the
// device allows, so that no thread lowers it under another's launch.
template <class Kernel>
cudaError_t allow_shared_memory(Kernel* kernel, size_t bytes) {
  constexpr size_t kAlwaysAllowed = 40 * 1024;  // 48 KB, less what the kernel declares statically
  if (bytes <= kAlwaysAllowed) return cudaSuccess;
  const auto* function = reinterpret_cast<const void*>(kernel);
  int device = 0;
  int limit = 0;
  cudaFuncAttributes attributes{};
  return run_steps(
      [&] { return cudaGetDevice(&device); },
      [&] {
        return cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      },
      [&] { return cudaFuncGetAttributes(&attributes, function); },
      [&] {
        return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    limit - static_cast<int>(attributes.sharedSizeBytes));
      });
}

}  // namespace omni_moe::cuda
