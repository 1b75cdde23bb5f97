// What a device has and which of the library's code runs on it. Asking the device alone is not
// enough: a GPU newer than every compiled architecture runs the PTX of an older one, and so does
// any GPU that the build had no code for.
#include <atomic>

#include "cuda/common/check.h"
#include "cuda/common/device_info.h"
#include "cuda/hopper/wgmma.cuh"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

namespace {

enum class Code { kBase = 1, kEarlyLaunch = 2, kHopper = 3 };

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr Code kCode = kHasHopperInstructions ? Code::kHopper : Code::kEarlyLaunch;
#else
constexpr Code kCode = Code::kBase;
#endif

constexpr int kThreadsPerCode = 32;

// Never launched: of all kernels, compiled for the same architectures, it tells which were chosen.
__global__ void __launch_bounds__(static_cast<int>(kCode) * kThreadsPerCode) code_probe_kernel() {}

std::atomic<bool> allow_early_launch{true};

}  // namespace

bool set_early_launch(bool allowed) { return allow_early_launch.exchange(allowed); }

bool has_early_launch() {
  DeviceInfo info;
  return current_device_info(&info) == cudaSuccess && info.has_early_launch;
}

bool has_hopper_kernels() {
  DeviceInfo info;
  return current_device_info(&info) == cudaSuccess && info.has_hopper_code;
}

// Nothing is cached, so that several devices just work.
cudaError_t current_device_info(DeviceInfo* info) {
  int device = 0;
  int major = 0;
  int minor = 0;
  cudaFuncAttributes probe{};
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    return [=, &device] { return cudaDeviceGetAttribute(value, attribute, device); };
  };
  const cudaError_t status = run_steps(
      [&] { return cudaGetDevice(&device); }, read(&info->num_sms, cudaDevAttrMultiProcessorCount),
      read(&major, cudaDevAttrComputeCapabilityMajor),
      read(&minor, cudaDevAttrComputeCapabilityMinor),
      read(&info->shared_bytes_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor),
      read(&info->shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin),
      [&] { return cudaFuncGetAttributes(&probe, code_probe_kernel); });
  if (status != cudaSuccess) return status;
  info->compute_capability = 10 * major + minor;
  const auto code = static_cast<Code>(probe.maxThreadsPerBlock / kThreadsPerCode);
  info->has_early_launch = code >= Code::kEarlyLaunch && allow_early_launch;
  info->has_hopper_code = code == Code::kHopper;
  return cudaSuccess;
}

}  // namespace omni_moe::cuda
