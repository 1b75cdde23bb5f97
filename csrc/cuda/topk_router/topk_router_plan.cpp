// Plans of the top-k router's kernels; see omni_moe/cuda_plan.h.
#include <algorithm>

#include "cuda/common/operands.h"
#include "cuda/common/workspace.h"
#include "cuda/topk_router/topk_router_tuning.h"
#include "omni_moe/cuda_plan.h"

namespace omni_moe::cuda {
namespace {

size_t counts_of_blocks(int64_t num_blocks, int64_t num_experts) {
  WorkspaceCutter cutter(nullptr);
  cutter.take<int32_t>(num_blocks * num_experts);
  return cutter.size();
}

}  // namespace

TopKRouterForwardPlan plan_topk_router_forward(const TopKRouterForwardParams& params,
                                               const DeviceInfo& device) {
  TopKRouterForwardPlan plan{};
  plan.device = device;
  const int64_t num_experts = params.num_experts, k = params.num_experts_per_token;
  if (params.num_tokens == 0 || k == 0) return plan;
  const bool chooses_groups = params.topk_group < params.n_group;
  if (num_experts <= TopKWarpTuning::kMaxExperts && k <= TopKWarpTuning::kMaxExpertsPerToken &&
      (!chooses_groups || params.n_group <= TopKWarpTuning::kMaxGroups)) {
    using Tuning = TopKWarpTuning;
    plan.kernel = TopKRouterForwardKernel::kWarp;
    plan.items_per_lane = num_experts <= 64 ? 2 : num_experts <= 256 ? 8 : 32;
    plan.shared_bytes =
        (num_experts + (chooses_groups ? Tuning::kWarpsPerBlock * num_experts : 0)) * sizeof(float);
    plan.num_blocks =
        std::min<int64_t>(ceil_div<int64_t>(params.num_tokens, Tuning::kWarpsPerBlock),
                          int64_t{Tuning::kBlocksPerSm} * device.num_sms);
  } else {
    plan.kernel = TopKRouterForwardKernel::kBlock;
    // Two lists of entries, and the counts.
    plan.shared_bytes = num_experts * (2 * sizeof(uint64_t) + sizeof(int32_t));
    plan.num_blocks = std::min<int64_t>(params.num_tokens,
                                        int64_t{TopKBlockTuning::kBlocksPerSm} * device.num_sms);
  }
  if (plan.num_blocks > 1) plan.workspace_bytes = counts_of_blocks(plan.num_blocks, num_experts);
  return plan;
}

TopKRouterBackwardPlan plan_topk_router_backward(const TopKRouterBackwardParams& params,
                                                 const DeviceInfo& device) {
  using Tuning = TopKBackwardTuning;
  TopKRouterBackwardPlan plan{};
  plan.device = device;
  if (params.num_tokens == 0 || params.num_experts == 0) return plan;
  const int64_t token_bytes = params.num_experts * static_cast<int64_t>(sizeof(float));
  plan.warps_per_block = static_cast<int>(
      std::clamp<int64_t>(Tuning::kMaxSharedBytes / token_bytes, 1, Tuning::kMaxWarps));
  plan.shared_bytes = static_cast<size_t>(plan.warps_per_block * token_bytes);
  plan.num_blocks =
      std::min<int64_t>(ceil_div<int64_t>(params.num_tokens, plan.warps_per_block), INT32_MAX);
  return plan;
}

ExpertSlotsPlan plan_expert_slots(const ExpertSlotsParams& params, const DeviceInfo& device) {
  ExpertSlotsPlan plan{};
  plan.device = device;
  if (params.num_pairs == 0) return plan;
  plan.pairs_per_block = static_cast<int>(std::max<int64_t>(
      ExpertSlotsTuning::kMinPairsPerBlock, round_up<int64_t>(params.num_experts, 32)));
  plan.num_blocks = ceil_div<int64_t>(params.num_pairs, plan.pairs_per_block);
  if (plan.num_blocks > 1) {
    plan.workspace_bytes = counts_of_blocks(plan.num_blocks, params.num_experts);
  }
  return plan;
}

}  // namespace omni_moe::cuda
