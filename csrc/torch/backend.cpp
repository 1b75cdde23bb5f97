#include "backend.h"

#include <ATen/Parallel.h>

#include <optional>

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
template <>
constexpr CpuKernel<TokenNormForwardParams> kCpu<TokenNormForwardParams>{cpu::token_norm_forward};
template <>
constexpr CpuKernel<TokenNormBackwardParams> kCpu<TokenNormBackwardParams>{
    cpu::token_norm_backward};
template <>
constexpr CpuKernel<TopKRouterForwardParams> kCpu<TopKRouterForwardParams>{
    cpu::topk_router_forward};
template <>
constexpr CpuKernel<TopKRouterBackwardParams> kCpu<TopKRouterBackwardParams>{
    cpu::topk_router_backward};
template <>
constexpr CpuKernel<ExpertSlotsParams> kCpu<ExpertSlotsParams>{cpu::expert_slots};
template <>
constexpr CpuKernel<ExpertRowsParams> kCpu<ExpertRowsParams>{cpu::expert_rows};
template <>
constexpr CpuKernel<PermuteParams> kCpu<PermuteParams>{cpu::permute};
template <>
constexpr CpuKernel<UnpermuteParams> kCpu<UnpermuteParams>{cpu::unpermute};
template <>
constexpr CpuKernel<UnpermuteBackwardParams> kCpu<UnpermuteBackwardParams>{cpu::unpermute_backward};

#if OMNI_MOE_WITH_CUDA
// Planned is the kernel's plan, or std::optional of it where the kernel may not take the operands.
template <typename Params, typename Planned, typename Plan = Planned>
struct CudaKernel {
  Planned (*plan)(const Params&);
  cudaError_t (*run)(const Params&, const Plan&, cudaStream_t);
};
template <typename Params, typename Plan>
using OptionalCudaKernel = CudaKernel<Params, std::optional<Plan>, Plan>;

template <typename Params>
constexpr int kCuda = 0;
template <>
constexpr CudaKernel<RouterForwardParams, cuda::RouterForwardPlan> kCuda<RouterForwardParams>{
    cuda::plan_router_forward, cuda::router_forward};
template <>
constexpr CudaKernel<RouterBackwardParams, cuda::RouterBackwardPlan> kCuda<RouterBackwardParams>{
    cuda::plan_router_backward, cuda::router_backward};
template <>
constexpr OptionalCudaKernel<RouterLogitsForwardParams, cuda::RouterLogitsForwardPlan>
    kCuda<RouterLogitsForwardParams>{cuda::plan_router_logits_forward, cuda::router_logits_forward};
template <>
constexpr CudaKernel<BatchNormForwardParams, cuda::BatchNormForwardPlan>
    kCuda<BatchNormForwardParams>{cuda::plan_batch_norm_forward, cuda::batch_norm_forward};
template <>
constexpr CudaKernel<BatchNormBackwardParams, cuda::BatchNormBackwardPlan>
    kCuda<BatchNormBackwardParams>{cuda::plan_batch_norm_backward, cuda::batch_norm_backward};
template <>
constexpr CudaKernel<TokenNormForwardParams, cuda::TokenNormForwardPlan>
    kCuda<TokenNormForwardParams>{cuda::plan_token_norm_forward, cuda::token_norm_forward};
template <>
constexpr CudaKernel<TokenNormBackwardParams, cuda::TokenNormBackwardPlan>
    kCuda<TokenNormBackwardParams>{cuda::plan_token_norm_backward, cuda::token_norm_backward};
template <>
constexpr CudaKernel<TopKRouterForwardParams, cuda::TopKRouterForwardPlan>
    kCuda<TopKRouterForwardParams>{cuda::plan_topk_router_forward, cuda::topk_router_forward};
template <>
constexpr CudaKernel<TopKRouterBackwardParams, cuda::TopKRouterBackwardPlan>
    kCuda<TopKRouterBackwardParams>{cuda::plan_topk_router_backward, cuda::topk_router_backward};
template <>
constexpr CudaKernel<ExpertSlotsParams, cuda::ExpertSlotsPlan> kCuda<ExpertSlotsParams>{
    cuda::plan_expert_slots, cuda::expert_slots};
template <>
constexpr CudaKernel<ExpertRowsParams, cuda::ExpertRowsPlan> kCuda<ExpertRowsParams>{
    cuda::plan_expert_rows, cuda::expert_rows};
template <>
constexpr CudaKernel<PermuteParams, cuda::PermutePlan> kCuda<PermuteParams>{cuda::plan_permute,
                                                                            cuda::permute};
template <>
constexpr CudaKernel<UnpermuteParams, cuda::PermutePlan> kCuda<UnpermuteParams>{
    cuda::plan_unpermute, cuda::unpermute};
template <>
constexpr CudaKernel<UnpermuteBackwardParams, cuda::PermutePlan> kCuda<UnpermuteBackwardParams>{
    cuda::plan_unpermute_backward, cuda::unpermute_backward};
template <>
constexpr CudaKernel<ExpertForwardParams, cuda::ExpertForwardPlan> kCuda<ExpertForwardParams>{
    cuda::plan_expert_forward, cuda::expert_forward};
template <>
constexpr CudaKernel<ExpertBackwardParams, cuda::ExpertBackwardPlan> kCuda<ExpertBackwardParams>{
    cuda::plan_expert_backward, cuda::expert_backward};
template <>
constexpr CudaKernel<GatedActivationForwardParams, cuda::GatedActivationForwardPlan>
    kCuda<GatedActivationForwardParams>{cuda::plan_gated_activation_forward,
                                        cuda::gated_activation_forward};
template <>
constexpr CudaKernel<GatedActivationBackwardParams, cuda::GatedActivationBackwardPlan>
    kCuda<GatedActivationBackwardParams>{cuda::plan_gated_activation_backward,
                                         cuda::gated_activation_backward};
template <>
constexpr OptionalCudaKernel<GatedLinearForwardParams, cuda::GatedLinearForwardPlan>
    kCuda<GatedLinearForwardParams>{cuda::plan_gated_linear_forward, cuda::gated_linear_forward};
template <>
constexpr OptionalCudaKernel<GatedLinearBackwardParams, cuda::GatedLinearBackwardPlan>
    kCuda<GatedLinearBackwardParams>{cuda::plan_gated_linear_backward, cuda::gated_linear_backward};
#endif

// ---- How they are run --------------------------------------------------------------------------

[[noreturn]] void no_kernels(at::Device device) {
  TORCH_CHECK(false, "omni_moe has no kernels for device ", device,
              device.is_cuda() && !OMNI_MOE_WITH_CUDA
                  ? ": it was built without CUDA. Reinstall with nvcc on PATH, a CUDA build of "
                    "torch, and OMNI_MOE_CUDA=ON"
                  : "");
}

class AtExecutor final : public cpu::Executor {
 public:
  void parallel_for(int64_t begin, int64_t end, int64_t grain,
                    const std::function<void(int64_t, int64_t)>& body) const override {
    at::parallel_for(begin, end, grain, body);
  }
};

// Points params.workspace to so many bytes. The memory of a CUDA workspace goes back to the caching
// allocator with the tensor and is reused in stream order.
template <typename Params>
at::Tensor provide_workspace(Params& params, size_t bytes, at::Device device) {
  at::Tensor workspace;
  if constexpr (requires { params.workspace; }) {
    params.workspace = nullptr;
    if (bytes > 0) {
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
    size_t bytes = 0;
    if constexpr (kernel.workspace_size != nullptr) bytes = kernel.workspace_size(params);
    const at::Tensor workspace = provide_workspace(params, bytes, at::kCPU);
    kernel.run(params, AtExecutor());
    return true;
  }
}

#if OMNI_MOE_WITH_CUDA
template <typename Params>
bool try_launch_on_cuda(Params params, at::Device device) {
  constexpr auto kernel = kCuda<Params>;
  const c10::cuda::CUDAGuard guard(device);
  const std::optional plan = kernel.plan(params);
  if (!plan) return false;
  const at::Tensor workspace = provide_workspace(params, plan->workspace_bytes, device);
  const cudaError_t status =
      kernel.run(params, *plan, c10::cuda::getCurrentCUDAStream(device.index()));
  if (status == cudaErrorNotSupported) return false;
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
  if (!try_launch(params, device)) no_kernels(device);
}

template void launch(RouterForwardParams, at::Device);
template void launch(RouterBackwardParams, at::Device);
template void launch(ExpertForwardParams, at::Device);
template void launch(ExpertBackwardParams, at::Device);
template void launch(GatedActivationForwardParams, at::Device);
template void launch(GatedActivationBackwardParams, at::Device);
template void launch(BatchNormForwardParams, at::Device);
template void launch(BatchNormBackwardParams, at::Device);
template void launch(TokenNormForwardParams, at::Device);
template void launch(TokenNormBackwardParams, at::Device);
template void launch(TopKRouterForwardParams, at::Device);
template void launch(TopKRouterBackwardParams, at::Device);
template void launch(ExpertSlotsParams, at::Device);
template void launch(ExpertRowsParams, at::Device);
template void launch(PermuteParams, at::Device);
template void launch(UnpermuteParams, at::Device);
template void launch(UnpermuteBackwardParams, at::Device);
template bool try_launch(GatedLinearForwardParams, at::Device);
template bool try_launch(GatedLinearBackwardParams, at::Device);
template bool try_launch(RouterLogitsForwardParams, at::Device);

#if OMNI_MOE_WITH_CUDA
cuda::DeviceInfo device_info(at::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  return cuda::current_device();
}
bool set_early_launch(bool allowed) { return cuda::set_early_launch(allowed); }
#else
cuda::DeviceInfo device_info(at::Device device) { no_kernels(device); }
bool set_early_launch(bool) { return false; }
#endif

}  // namespace omni_moe::torch_api
