// What launch plans read of a device, and integer arithmetic. Needs no CUDA toolkit.
#pragma once

#ifdef __CUDACC__
#define OMNI_MOE_HOST_DEVICE __host__ __device__
#else
#define OMNI_MOE_HOST_DEVICE
#endif

namespace omni_moe::cuda {

struct DeviceInfo {
  int num_sms = 1;
  int compute_capability = 80;     // 10 * major + minor
  int shared_bytes_per_sm = 0;     // what one SM shares among its blocks
  int shared_bytes_per_block = 0;  // the opt-in limit of one block
  // What the code can do that runs on the device; it may be compiled from PTX of an older one.
  bool has_early_launch = false;  // it can wait for the kernel before (dependent_launch.cuh)
  bool has_hopper_code = false;   // kernels of sm_90a do not trap (hopper/wgmma.cuh)
};

template <class Int>
OMNI_MOE_HOST_DEVICE constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

template <class Int>
OMNI_MOE_HOST_DEVICE constexpr Int round_up(Int a, Int b) {
  return ceil_div(a, b) * b;
}

}  // namespace omni_moe::cuda
