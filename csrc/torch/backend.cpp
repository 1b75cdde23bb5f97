#include "backend.h"

#include <ATen/Parallel.h>

#include "omni_moe/cpu.h"

#if OMNI_MOE_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "omni_moe/cuda.h"
#else
#include "omni_moe/router_logits.h"
#endif

namespace omni_moe::torch_api {

namespace {

// ---- The kernels of each backend ---------------------------------------------------------------

template <typename Params>
struct CpuKernel {
  void (*run)(const Params&, const cpu::Executor&) = nullptr;  // null: there is none
  size_t (*workspace_size)(const Params&) = nullptr;           // null: it needs none
};

template <typename Params>
constexpr CpuKernel<Params> kCpu{};
template <>
constexpr CpuKernel<RouterForwardParams> kCpu<RouterForwardParams>{cpu::router_forward};
template <>
constexpr CpuKernel<RouterBackwardParams> kCpu<RouterBackwardParams>{cpu::router_backward};
template <>
constexpr CpuKernel<ExpertForwardParams> kCpu<ExpertForwardParams>{cpu::expert_forward};
template <>
constexpr CpuKernel<ExpertBackwardParams> kCpu<ExpertBackwardParams>{
    cpu::expert_backward, cpu::expert_backward_workspace_size};
template <>
constexpr CpuKernel<GatedActivationForwardParams> kCpu<GatedActivationForwardParams>{
    cpu::gated_activation_forward};
template <>
constexpr CpuKernel<GatedActivationBackwardParams> kCpu<GatedActivationBackwardParams>{
    cpu::gated_activation_backward};
template <>
constexpr CpuKernel<BatchNormForwardParams> kCpu<BatchNormForwardParams>{cpu::batch_norm_forward};
template <>
constexpr CpuKernel<BatchNormBackwardParams> kCpu<BatchNormBackwardParams>{
    cpu::batch_norm_backward};

#if OMNI_MOE_WITH_CUDA
template <typename Params>
struct CudaKernel {
  cudaError_t (*run)(const Params&, cudaStream_t);
  size_t (*workspace_size)(const Params&) = nullptr;  // null: it needs none
  bool (*supports)(const Params&) = nullptr;          // null: every operand
};

template <typename Params>
constexpr CudaKernel<Params> kCuda;
template <>
constexpr CudaKernel<RouterForwardParams> kCuda<RouterForwardParams>{
    cuda::router_forward, cuda::router_forward_workspace_size};
template <>
constexpr CudaKernel<RouterBackwardParams> kCuda<RouterBackwardParams>{
    cuda::router_backward, cuda::router_backward_workspace_size};
template <>
constexpr CudaKernel<ExpertForwardParams> kCuda<ExpertForwardParams>{
    cuda::expert_forward, cuda::expert_forward_workspace_size};
template <>
constexpr CudaKernel<ExpertBackwardParams> kCuda<ExpertBackwardParams>{
    cuda::expert_backward, cuda::expert_backward_workspace_size};
template <>
constexpr CudaKernel<GatedActivationForwardParams> kCuda<GatedActivationForwardParams>{
    cuda::gated_activation_forward};
template <>
constexpr CudaKernel<GatedActivationBackwardParams> kCuda<GatedActivationBackwardParams>{
    cuda::gated_activation_backward};
template <>
constexpr CudaKernel<BatchNormForwardParams> kCuda<BatchNormForwardParams>{
    cuda::batch_norm_forward, cuda::batch_norm_forward_workspace_size};
template <>
constexpr CudaKernel<BatchNormBackwardParams> kCuda<BatchNormBackwardParams>{
    cuda::batch_norm_backward, cuda::batch_norm_backward_workspace_size};
template <>
constexpr CudaKernel<GatedLinearForwardParams> kCuda<GatedLinearForwardParams>{
    cuda::gated_linear_forward, nullptr, cuda::gated_linear_forward_supported};
template <>
constexpr CudaKernel<GatedLinearBackwardParams> kCuda<GatedLinearBackwardParams>{
    cuda::gated_linear_backward, nullptr, cuda::gated_linear_backward_supported};
template <>
constexpr CudaKernel<RouterLogitsForwardParams> kCuda<RouterLogitsForwardParams>{
    cuda::router_logits_forward, cuda::router_logits_forward_workspace_size,
    cuda::router_logits_forward_supported};
#endif

// ---- How they are run --------------------------------------------------------------------------

class AtExecutor final : public cpu::Executor {
 public:
  void parallel_for(int64_t begin, int64_t end, int64_t grain,
                    const std::function<void(int64_t, int64_t)>& body) const override {
    at::parallel_for(begin, end, grain, body);
  }
};

// Sets params.workspace where a kernel asks for one. The memory of a CUDA workspace goes back to
// the caching allocator with the tensor and is reused in stream order.
template <typename Params>
at::Tensor provide_workspace(Params& params, size_t (*workspace_size)(const Params&),
                             at::Device device) {
  at::Tensor workspace;
  if constexpr (requires { params.workspace; }) {
    params.workspace = nullptr;
    if (const size_t bytes = workspace_size ? workspace_size(params) : 0; bytes > 0) {
      workspace = at::empty({static_cast<int64_t>(bytes)},
                            at::TensorOptions().device(device).dtype(at::kByte));
      params.workspace = workspace.mutable_data_ptr();
    }
  }
  return workspace;
}

template <typename Params>
bool try_launch_on_cpu(Params params) {
  constexpr CpuKernel<Params> kernel = kCpu<Params>;
  if constexpr (kernel.run == nullptr) {
    return false;
  } else {
    const at::Tensor workspace = provide_workspace(params, kernel.workspace_size, at::kCPU);
    kernel.run(params, AtExecutor());
    return true;
  }
}

#if OMNI_MOE_WITH_CUDA
template <typename Params>
bool try_launch_on_cuda(Params params, at::Device device) {
  constexpr CudaKernel<Params> kernel = kCuda<Params>;
  const c10::cuda::CUDAGuard guard(device);
  if constexpr (kernel.supports != nullptr) {
    if (!kernel.supports(params)) return false;
  }
  const at::Tensor workspace = provide_workspace(params, kernel.workspace_size, device);
  const cudaError_t status = kernel.run(params, c10::cuda::getCurrentCUDAStream(device.index()));
  if (kernel.supports != nullptr && status == cudaErrorNotSupported) return false;
  TORCH_CHECK(status == cudaSuccess, "omni_moe: CUDA launch failed: ", cudaGetErrorString(status));
  return true;
}
#endif

}  // namespace

template <typename Params>
bool try_launch(Params params, at::Device device) {
  if (device.is_cpu()) return try_launch_on_cpu(params);
#if OMNI_MOE_WITH_CUDA
  if (device.is_cuda()) return try_launch_on_cuda(params, device);
#endif
  return false;
}

template <typename Params>
void launch(Params params, at::Device device) {
  TORCH_CHECK(try_launch(params, device), "omni_moe has no kernels for device ", device,
              device.is_cuda() ? ": it was built without CUDA. Reinstall with nvcc on PATH, a CUDA "
                                 "build of torch, and OMNI_MOE_CUDA=ON"
                               : "");
}

template void launch(RouterForwardParams, at::Device);
template void launch(RouterBackwardParams, at::Device);
template void launch(ExpertForwardParams, at::Device);
template void launch(ExpertBackwardParams, at::Device);
template void launch(GatedActivationForwardParams, at::Device);
template void launch(GatedActivationBackwardParams, at::Device);
template void launch(BatchNormForwardParams, at::Device);
template void launch(BatchNormBackwardParams, at::Device);
template bool try_launch(GatedLinearForwardParams, at::Device);
template bool try_launch(GatedLinearBackwardParams, at::Device);
template bool try_launch(RouterLogitsForwardParams, at::Device);

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
