// Entry points of the CPU backend. Pointers are host memory; every call returns when it is done.
#pragma once

#include <cstddef>
#include <vector>

#include "omni_moe/batch_norm.h"
#include "omni_moe/executor.h"
#include "omni_moe/expert.h"
#include "omni_moe/mlp.h"
#include "omni_moe/permute.h"
#include "omni_moe/router.h"
#include "omni_moe/schedule.h"
#include "omni_moe/token_norm.h"
#include "omni_moe/topk_router.h"

namespace omni_moe::cpu {

// One set of kernels, compiled for one instruction set. All compute the same function; the order
// of additions, and so the last bits, may differ between sets.
struct KernelTable {
  const char* capability;  // "baseline", "avx2", "avx512"
  void (*router_forward)(const RouterForwardParams&, const Executor&);
  void (*router_backward)(const RouterBackwardParams&, const Executor&);
  void (*expert_forward)(const ExpertForwardParams&, const Executor&);
  void (*expert_backward)(const ExpertBackwardParams&, const Executor&);
  void (*gated_activation_forward)(const GatedActivationForwardParams&, const Executor&);
  void (*gated_activation_backward)(const GatedActivationBackwardParams&, const Executor&);
  void (*batch_norm_forward)(const BatchNormForwardParams&, const Executor&);
  void (*batch_norm_backward)(const BatchNormBackwardParams&, const Executor&);
  void (*token_norm_forward)(const TokenNormForwardParams&, const Executor&);
  void (*token_norm_backward)(const TokenNormBackwardParams&, const Executor&);
  void (*topk_router_forward)(const TopKRouterForwardParams&, const Executor&);
  void (*topk_router_backward)(const TopKRouterBackwardParams&, const Executor&);
  void (*permute)(const PermuteParams&, const Executor&);
  void (*unpermute)(const UnpermuteParams&, const Executor&);
  void (*unpermute_backward)(const UnpermuteBackwardParams&, const Executor&);
};

// The sets this processor can run, best last.
const std::vector<KernelTable>& kernel_tables();

// The best of them; what the functions below call.
const KernelTable& kernels();

void router_forward(const RouterForwardParams& params, const Executor& executor);
void router_backward(const RouterBackwardParams& params, const Executor& executor);
void expert_forward(const ExpertForwardParams& params, const Executor& executor);
void expert_backward(const ExpertBackwardParams& params, const Executor& executor);
void gated_activation_forward(const GatedActivationForwardParams& params, const Executor& executor);
void gated_activation_backward(const GatedActivationBackwardParams& params,
                               const Executor& executor);
void batch_norm_forward(const BatchNormForwardParams& params, const Executor& executor);
void batch_norm_backward(const BatchNormBackwardParams& params, const Executor& executor);
void token_norm_forward(const TokenNormForwardParams& params, const Executor& executor);
void token_norm_backward(const TokenNormBackwardParams& params, const Executor& executor);
void topk_router_forward(const TopKRouterForwardParams& params, const Executor& executor);
void topk_router_backward(const TopKRouterBackwardParams& params, const Executor& executor);
void expert_slots(const ExpertSlotsParams& params, const Executor& executor);
void expert_rows(const ExpertRowsParams& params, const Executor& executor);
void permute(const PermuteParams& params, const Executor& executor);
void unpermute(const UnpermuteParams& params, const Executor& executor);
void unpermute_backward(const UnpermuteBackwardParams& params, const Executor& executor);

// Bytes of ExpertBackwardParams::workspace (aligned to 64); depends on shapes alone.
size_t expert_backward_workspace_size(const ExpertBackwardParams& params);

// Groups pairs by expert with a stable counting sort.
void schedule(const ScheduleParams& params);

// Position of the first index outside [lowest, num_experts), or -1.
int64_t find_invalid_index(const void* indices, IndexType index_type, int64_t count,
                           int64_t num_experts, int64_t lowest = 0);

}  // namespace omni_moe::cpu
