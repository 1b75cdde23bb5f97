#include "backend.h"

#include <ATen/Parallel.h>

#include <optional>

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

template <typename Params, typename Plan>
cudaError_t enqueue(Params params, const Plan& plan, at::Device device,
                    cudaError_t (*kernel)(const Params&, const Plan&, cudaStream_t)) {
  at::Tensor workspace;
  if (plan.workspace_bytes > 0) {
    // Goes back to the caching allocator on return and is reused in stream order.
    workspace = at::empty({static_cast<int64_t>(plan.workspace_bytes)},
                          at::TensorOptions().device(device).dtype(at::kByte));
    if constexpr (requires { params.workspace; }) params.workspace = workspace.mutable_data_ptr();
  }
  return kernel(params, plan, c10::cuda::getCurrentCUDAStream(device.index()));
}

template <typename Params, typename Plan>
void launch_cuda(const Params& params, at::Device device, Plan (*make_plan)(const Params&),
                 cudaError_t (*kernel)(const Params&, const Plan&, cudaStream_t)) {
  const c10::cuda::CUDAGuard guard(device);
  check_launch(enqueue(params, make_plan(params), device, kernel));
}

template <typename Params, typename Plan>
void launch_cuda(const Params& params, at::Device device,
                 std::optional<Plan> (*make_plan)(const Params&),
                 cudaError_t (*kernel)(const Params&, const Plan&, cudaStream_t)) {
  const c10::cuda::CUDAGuard guard(device);
  const std::optional<Plan> plan = make_plan(params);
  check_launch(plan ? enqueue(params, *plan, device, kernel) : cudaErrorNotSupported);
}
#endif

}  // namespace

void launch(RouterForwardParams params, at::Device device) {
  if (device.is_cpu()) return cpu::router_forward(params, AtExecutor());
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    return launch_cuda(params, device, cuda::plan_router_forward, cuda::router_forward);
  }
#endif
  no_backend(device);
}

void launch(RouterBackwardParams params, at::Device device) {
  if (device.is_cpu()) return cpu::router_backward(params, AtExecutor());
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    return launch_cuda(params, device, cuda::plan_router_backward, cuda::router_backward);
  }
#endif
  no_backend(device);
}

void launch(ExpertForwardParams params, at::Device device) {
  if (device.is_cpu()) return cpu::expert_forward(params, AtExecutor());
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    return launch_cuda(params, device, cuda::plan_expert_forward, cuda::expert_forward);
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
    return launch_cuda(params, device, cuda::plan_expert_backward, cuda::expert_backward);
  }
#endif
  no_backend(device);
}

void launch(GatedActivationForwardParams params, at::Device device) {
  if (device.is_cpu()) return cpu::gated_activation_forward(params, AtExecutor());
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    return launch_cuda(params, device, cuda::plan_gated_activation_forward,
                       cuda::gated_activation_forward);
  }
#endif
  no_backend(device);
}

void launch(GatedActivationBackwardParams params, at::Device device) {
  if (device.is_cpu()) return cpu::gated_activation_backward(params, AtExecutor());
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    return launch_cuda(params, device, cuda::plan_gated_activation_backward,
                       cuda::gated_activation_backward);
  }
#endif
  no_backend(device);
}

void launch(BatchNormForwardParams params, at::Device device) {
  if (device.is_cpu()) return cpu::batch_norm_forward(params, AtExecutor());
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    return launch_cuda(params, device, cuda::plan_batch_norm_forward, cuda::batch_norm_forward);
  }
#endif
  no_backend(device);
}

void launch(BatchNormBackwardParams params, at::Device device) {
  if (device.is_cpu()) return cpu::batch_norm_backward(params, AtExecutor());
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    return launch_cuda(params, device, cuda::plan_batch_norm_backward, cuda::batch_norm_backward);
  }
#endif
  no_backend(device);
}

bool supports([[maybe_unused]] const GatedLinearForwardParams& params,
              [[maybe_unused]] at::Device device) {
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    return cuda::plan_gated_linear_forward(params).has_value();
  }
#endif
  return false;
}

void launch([[maybe_unused]] GatedLinearForwardParams params, at::Device device) {
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda())
    return launch_cuda(params, device, cuda::plan_gated_linear_forward, cuda::gated_linear_forward);
#endif
  no_backend(device);
}

bool supports([[maybe_unused]] const GatedLinearBackwardParams& params,
              [[maybe_unused]] at::Device device) {
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    return cuda::plan_gated_linear_backward(params).has_value();
  }
#endif
  return false;
}

void launch([[maybe_unused]] GatedLinearBackwardParams params, at::Device device) {
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda())
    return launch_cuda(params, device, cuda::plan_gated_linear_backward,
                       cuda::gated_linear_backward);
#endif
  no_backend(device);
}

bool supports([[maybe_unused]] const RouterLogitsForwardParams& params,
              [[maybe_unused]] at::Device device) {
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    return cuda::plan_router_logits_forward(params).has_value();
  }
#endif
  return false;
}

bool try_launch([[maybe_unused]] const RouterLogitsForwardParams& params, at::Device device) {
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    const auto plan = cuda::plan_router_logits_forward(params);
    if (!plan) return false;
    const cudaError_t status = enqueue(params, *plan, device, cuda::router_logits_forward);
    if (status == cudaErrorNotSupported) return false;
    check_launch(status);
    return true;
  }
#endif
  no_backend(device);
}

#if OMNI_MOE_WITH_CUDA
bool set_early_launch(bool allowed) { return cuda::set_early_launch(allowed); }
bool has_early_launch() { return cuda::current_device().has_early_launch; }
bool has_hopper_kernels() { return cuda::current_device().has_hopper_kernels; }
#else
bool set_early_launch(bool) { return false; }
bool has_early_launch() { return false; }
bool has_hopper_kernels() { return false; }
#endif

}  // namespace omni_moe::torch_api
