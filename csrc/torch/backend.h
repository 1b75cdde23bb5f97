// Hands a Params struct to the backend of a device: the one place that knows which backends exist.
// The table of their kernels, one row each, is in backend.cpp.
#pragma once

#include <ATen/ATen.h>

#include "omni_moe/cuda_plan.h"

namespace omni_moe::torch_api {

// Runs a kernel on the current stream (CUDA) or on at::parallel_for's threads (CPU), with the
// workspace that it asks for, and raises if it fails.
template <typename Params>
void launch(Params params, at::Device device);

// The same where the device's backend has a kernel for these operands. False, and nothing has run:
// there is none, or the stream has too few of the device's multiprocessors for it.
template <typename Params>
bool try_launch(Params params, at::Device device);

// What the plans of CUDA kernels read of a device; raises without CUDA.
cuda::DeviceInfo device_info(at::Device device);

// As in namespace cuda; false without CUDA.
bool set_early_launch(bool allowed);

}  // namespace omni_moe::torch_api
