// What a device has and which of the library's code runs on it. Asking the device alone is not
// enough: a GPU newer than every compiled architecture runs the PTX of an older one, and so does
// any GPU that the build had no code for.
#include <atomic>

#include "cuda/common/check.h"
#include "cuda/hopper/tma.cuh"
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

DeviceInfo current_device() {
  DeviceInfo info;
  int device = 0;
  int cooperative = 0;
  cudaFuncAttributes probe{};
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    return [=, &device] { return cudaDeviceGetAttribute(value, attribute, device); };
  };
  // Nothing is cached, so that several devices just work.
  const cudaError_t status = run_steps(
      [&] { return cudaGetDevice(&device); }, read(&info.num_sms, cudaDevAttrMultiProcessorCount),
      read(&info.l2_bytes, cudaDevAttrL2CacheSize),
      read(&info.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin),
      read(&cooperative, cudaDevAttrCooperativeLaunch),
      [&] { return cudaFuncGetAttributes(&probe, code_probe_kernel); });
  if (status != cudaSuccess) return {};
  info.has_cooperative_launch = cooperative != 0;
  const auto code = static_cast<Code>(probe.maxThreadsPerBlock / kThreadsPerCode);
  info.has_early_launch = code >= Code::kEarlyLaunch && allow_early_launch;
  info.has_hopper_kernels = code == Code::kHopper && tensor_map_encoder() != nullptr;
  return info;
}

}  // namespace omni_moe::cuda
