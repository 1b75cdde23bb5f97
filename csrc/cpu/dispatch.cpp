// Entry points of the CPU backend: picks, once, the best instruction set of this processor among
// those compiled in.
#include "expert_workspace.h"
#include "omni_moe/cpu.h"

#define OMNI_MOE_CPU_CAPABILITY baseline
#include "kernels.inc"
#undef OMNI_MOE_CPU_CAPABILITY

#if defined(OMNI_MOE_CPU_X86)
#define OMNI_MOE_CPU_CAPABILITY avx2
#include "kernels.inc"
#undef OMNI_MOE_CPU_CAPABILITY
#define OMNI_MOE_CPU_CAPABILITY avx512
#include "kernels.inc"
#undef OMNI_MOE_CPU_CAPABILITY
#endif

namespace omni_moe::cpu {

const std::vector<KernelTable>& kernel_tables() {
  static const std::vector<KernelTable> tables = [] {
    std::vector<KernelTable> supported = {
        {"baseline", baseline::router_forward, baseline::router_backward, baseline::expert_forward,
         baseline::expert_backward, baseline::gated_activation_forward,
         baseline::gated_activation_backward, baseline::batch_norm_forward,
         baseline::batch_norm_backward, baseline::token_norm_forward, baseline::token_norm_backward,
         baseline::topk_router_forward, baseline::topk_router_backward, baseline::permute,
         baseline::unpermute, baseline::unpermute_backward}};
#if defined(OMNI_MOE_CPU_X86)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_avx2) {
      supported.push_back(
          {"avx2", avx2::router_forward, avx2::router_backward, avx2::expert_forward,
           avx2::expert_backward, avx2::gated_activation_forward, avx2::gated_activation_backward,
           avx2::batch_norm_forward, avx2::batch_norm_backward, avx2::token_norm_forward,
           avx2::token_norm_backward, avx2::topk_router_forward, avx2::topk_router_backward,
           avx2::permute, avx2::unpermute, avx2::unpermute_backward});
    }
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      supported.push_back({"avx512", avx512::router_forward, avx512::router_backward,
                           avx512::expert_forward, avx512::expert_backward,
                           avx512::gated_activation_forward, avx512::gated_activation_backward,
                           avx512::batch_norm_forward, avx512::batch_norm_backward,
                           avx512::token_norm_forward, avx512::token_norm_backward,
                           avx512::topk_router_forward, avx512::topk_router_backward,
                           avx512::permute, avx512::unpermute, avx512::unpermute_backward});
    }
#endif
    return supported;
  }();
  return tables;
}

const KernelTable& kernels() {
  static const KernelTable table = kernel_tables().back();
  return table;
}

void router_forward(const RouterForwardParams& params, const Executor& executor) {
  kernels().router_forward(params, executor);
}
void router_backward(const RouterBackwardParams& params, const Executor& executor) {
  kernels().router_backward(params, executor);
}
void expert_forward(const ExpertForwardParams& params, const Executor& executor) {
  kernels().expert_forward(params, executor);
}
void expert_backward(const ExpertBackwardParams& params, const Executor& executor) {
  kernels().expert_backward(params, executor);
}
void gated_activation_forward(const GatedActivationForwardParams& params,
                              const Executor& executor) {
  kernels().gated_activation_forward(params, executor);
}
void gated_activation_backward(const GatedActivationBackwardParams& params,
                               const Executor& executor) {
  kernels().gated_activation_backward(params, executor);
}
void batch_norm_forward(const BatchNormForwardParams& params, const Executor& executor) {
  kernels().batch_norm_forward(params, executor);
}
void batch_norm_backward(const BatchNormBackwardParams& params, const Executor& executor) {
  kernels().batch_norm_backward(params, executor);
}
void token_norm_forward(const TokenNormForwardParams& params, const Executor& executor) {
  kernels().token_norm_forward(params, executor);
}
void token_norm_backward(const TokenNormBackwardParams& params, const Executor& executor) {
  kernels().token_norm_backward(params, executor);
}
void topk_router_forward(const TopKRouterForwardParams& params, const Executor& executor) {
  kernels().topk_router_forward(params, executor);
}
void topk_router_backward(const TopKRouterBackwardParams& params, const Executor& executor) {
  kernels().topk_router_backward(params, executor);
}
void permute(const PermuteParams& params, const Executor& executor) {
  kernels().permute(params, executor);
}
void unpermute(const UnpermuteParams& params, const Executor& executor) {
  kernels().unpermute(params, executor);
}
void unpermute_backward(const UnpermuteBackwardParams& params, const Executor& executor) {
  kernels().unpermute_backward(params, executor);
}

size_t expert_backward_workspace_size(const ExpertBackwardParams& params) {
  return ExpertBackwardWorkspace(params).size;
}

}  // namespace omni_moe::cpu
