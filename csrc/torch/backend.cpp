#include "backend.h"

#include <ATen/Parallel.h>

#include "omni_moe/cpu.h"

#if OMNI_MOE_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "omni_moe/cuda.h"
#endif

namespace omni_moe::torch_api {

namespace {

class AtExecutor final : public cpu::Executor {
 public:
  void parallel_for(int64_t begin, int64_t end, int64_t grain,
                    const std::function<void(int64_t, int64_t)>& body) const override {
    at::parallel_for(begin, end, grain, body);
  }
};

[[noreturn]] void no_backend(at::Device device) {
  TORCH_CHECK(false, "omni_moe has no kernels for device ", device,
              device.is_cuda() ? ": it was built without CUDA. Reinstall with nvcc on PATH, a CUDA "
                                 "build of torch, and OMNI_MOE_CUDA=ON"
                               : "");
}

#if OMNI_MOE_WITH_CUDA
void check_launch(cudaError_t status) {
  TORCH_CHECK(status == cudaSuccess, "omni_moe: CUDA launch failed: ", cudaGetErrorString(status));
}

template <typename Params>
cudaError_t enqueue(const Params& params, at::Device device,
                    cudaError_t (*kernel)(const Params&, cudaStream_t)) {
  const c10::cuda::CUDAGuard guard(device);
  return kernel(params, c10::cuda::getCurrentCUDAStream(device.index()));
}

template <typename Params>
cudaError_t enqueue(Params params, at::Device device,
                    cudaError_t (*kernel)(const Params&, cudaStream_t),
                    size_t (*workspace_size)(const Params&)) {
  const c10::cuda::CUDAGuard guard(device);
  const auto bytes = static_cast<int64_t>(workspace_size(params));
  // Goes back to the caching allocator on return and is reused in stream order.
  const at::Tensor workspace =
      at::empty({bytes}, at::TensorOptions().device(device).dtype(at::kByte));
  params.workspace = bytes > 0 ? workspace.mutable_data_ptr() : nullptr;
  return enqueue(params, device, kernel);
}

template <typename Params, typename... Functions>
void launch_cuda(const Params& params, at::Device device, Functions... functions) {
  check_launch(enqueue(params, device, functions...));
}
#endif

}  // namespace

void launch(RouterForwardParams params, at::Device device) {
  if (device.is_cpu()) return cpu::router_forward(params, AtExecutor());
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    return launch_cuda(params, device, cuda::router_forward, cuda::router_forward_workspace_size);
  }
#endif
  no_backend(device);
}

void launch(RouterBackwardParams params, at::Device device) {
  if (device.is_cpu()) return cpu::router_backward(params, AtExecutor());
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    return launch_cuda(params, device, cuda::router_backward, cuda::router_backward_workspace_size);
  }
#endif
  no_backend(device);
}

void launch(ExpertForwardParams params, at::Device device) {
  if (device.is_cpu()) return cpu::expert_forward(params, AtExecutor());
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    return launch_cuda(params, device, cuda::expert_forward, cuda::expert_forward_workspace_size);
  }
#endif
  no_backend(device);
}

void launch(ExpertBackwardParams params, at::Device device) {
  if (device.is_cpu()) {
    const auto bytes = static_cast<int64_t>(cpu::expert_backward_workspace_size(params));
    const at::Tensor workspace = at::empty({bytes}, at::TensorOptions().dtype(at::kByte));
    params.workspace = workspace.mutable_data_ptr();
    return cpu::expert_backward(params, AtExecutor());
  }
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    return launch_cuda(params, device, cuda::expert_backward, cuda::expert_backward_workspace_size);
  }
#endif
  no_backend(device);
}

void launch(GatedActivationForwardParams params, at::Device device) {
  if (device.is_cpu()) return cpu::gated_activation_forward(params, AtExecutor());
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) return launch_cuda(params, device, cuda::gated_activation_forward);
#endif
  no_backend(device);
}

void launch(GatedActivationBackwardParams params, at::Device device) {
  if (device.is_cpu()) return cpu::gated_activation_backward(params, AtExecutor());
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) return launch_cuda(params, device, cuda::gated_activation_backward);
#endif
  no_backend(device);
}

void launch(BatchNormForwardParams params, at::Device device) {
  if (device.is_cpu()) return cpu::batch_norm_forward(params, AtExecutor());
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    return launch_cuda(params, device, cuda::batch_norm_forward,
                       cuda::batch_norm_forward_workspace_size);
  }
#endif
  no_backend(device);
}

void launch(BatchNormBackwardParams params, at::Device device) {
  if (device.is_cpu()) return cpu::batch_norm_backward(params, AtExecutor());
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    return launch_cuda(params, device, cuda::batch_norm_backward,
                       cuda::batch_norm_backward_workspace_size);
  }
#endif
  no_backend(device);
}

bool supports([[maybe_unused]] const GatedLinearForwardParams& params,
              [[maybe_unused]] at::Device device) {
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    return cuda::gated_linear_forward_supported(params);
  }
#endif
  return false;
}

void launch([[maybe_unused]] GatedLinearForwardParams params, at::Device device) {
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) return launch_cuda(params, device, cuda::gated_linear_forward);
#endif
  no_backend(device);
}

bool supports([[maybe_unused]] const GatedLinearBackwardParams& params,
              [[maybe_unused]] at::Device device) {
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    return cuda::gated_linear_backward_supported(params);
  }
#endif
  return false;
}

void launch([[maybe_unused]] GatedLinearBackwardParams params, at::Device device) {
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) return launch_cuda(params, device, cuda::gated_linear_backward);
#endif
  no_backend(device);
}

bool supports([[maybe_unused]] const RouterLogitsForwardParams& params,
              [[maybe_unused]] at::Device device) {
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    return cuda::router_logits_forward_supported(params);
  }
#endif
  return false;
}

bool try_launch([[maybe_unused]] const RouterLogitsForwardParams& params, at::Device device) {
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    const cudaError_t status = enqueue(params, device, cuda::router_logits_forward,
                                       cuda::router_logits_forward_workspace_size);
    if (status == cudaErrorNotSupported) return false;
    check_launch(status);
    return true;
  }
#endif
  no_backend(device);
}

#if OMNI_MOE_WITH_CUDA
bool set_early_launch(bool allowed) { return cuda::set_early_launch(allowed); }
bool has_early_launch() { return cuda::has_early_launch(); }
bool has_hopper_kernels() { return cuda::has_hopper_kernels(); }
#else
bool set_early_launch(bool) { return false; }
bool has_early_launch() { return false; }
bool has_hopper_kernels() { return false; }
#endif

}  // namespace omni_moe::torch_api
