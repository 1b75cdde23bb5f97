// Plans of the router's kernels; see omni_moe/cuda_plan.h.
#include <algorithm>
#include <initializer_list>
#include <iterator>

#include "cuda/common/operands.h"
#include "cuda/common/workspace.h"
#include "cuda/router/batch_norm_grid.h"
#include "cuda/router/router_tuning.h"
#include "omni_moe/cuda_plan.h"

namespace omni_moe::cuda {
namespace {

constexpr size_t kAlignment = WorkspaceCutter::kAlignment;

bool are_aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* pointer) { return is_aligned(pointer, 16); });
}

// Both axes, packed into packed_bytes an element, and the entries; each twice, for merges.
size_t list_bytes(const RouterForwardParams& params, size_t packed_bytes) {
  const int64_t axes = round_up<int64_t>(params.num_rows + params.num_cols, 2);
  const int64_t entries = RouterBlockTuning::entry_capacity(params.num_experts_per_token);
  return 2 * (axes * packed_bytes + entries * sizeof(uint64_t));
}

// Of the kernels that hold an axis of n logits in the registers of a warp.
int items_per_lane(int64_t n) { return n <= 64 ? 2 : n <= 256 ? 8 : n <= 512 ? 16 : 32; }

void plan_warp_kernel(const RouterForwardParams& params, RouterForwardPlan* plan) {
  const int64_t k = params.num_experts_per_token;
  plan->kernel = RouterForwardKernel::kWarp;
  plan->items_per_lane = items_per_lane(std::max(params.num_rows, params.num_cols));
  // The border check needs rank K + 1 of each axis, so that the sorts must be wider than K.
  plan->sort_width = k < 32 ? 32 : k < 64 ? 64 : k < 128 ? 128 : 256;
  plan->num_blocks = ceil_div<int64_t>(params.num_tokens, RouterWarpTuning::kWarpsPerBlock);
}

// Bytes of a block of the unsorted kernel.
size_t unsorted_list_bytes(const RouterForwardParams& params) {
  using Tuning = RouterUnsortedTuning;
  const bool has_mass = params.score == RouterScore::kSoftmaxTopK;
  return Tuning::kWarpsPerBlock * Tuning::token_bytes(params.num_rows, params.num_cols, has_mass);
}

void plan_unsorted_kernel(const RouterForwardParams& params, RouterForwardPlan* plan) {
  plan->kernel = RouterForwardKernel::kUnsorted;
  plan->items_per_lane = items_per_lane(params.num_cols);
  plan->list_bytes = unsorted_list_bytes(params);
  plan->num_blocks = ceil_div<int64_t>(params.num_tokens, RouterUnsortedTuning::kWarpsPerBlock);
}

void plan_block_kernel(const RouterForwardParams& params, RouterForwardPlan* plan) {
  using Tuning = RouterBlockTuning;
  const DeviceInfo& device = plan->device;
  plan->kernel = RouterForwardKernel::kBlock;
  const bool is_16_bit = element_size(params.dtype) == 2;
  plan->list_bytes = list_bytes(params, is_16_bit ? sizeof(uint32_t) : sizeof(uint64_t));
  // A 16-bit position serves 65536 logits; lists this long do not fit shared memory on any device.
  const bool positions_fit = std::max(params.num_rows, params.num_cols) <= 65536;
  plan->lists_in_shared = positions_fit && plan->list_bytes + Tuning::kScratchBytes <=
                                               static_cast<size_t>(device.shared_bytes_per_block);
  plan->num_blocks = std::min<int64_t>(params.num_tokens, INT32_MAX);
  if (plan->lists_in_shared) return;
  plan->list_bytes = round_up<size_t>(list_bytes(params, sizeof(uint64_t)), kAlignment);
  const int64_t affordable = Tuning::kMaxWorkspace / static_cast<int64_t>(plan->list_bytes);
  plan->num_blocks =
      std::min(params.num_tokens,
               std::clamp<int64_t>(affordable, 1, int64_t{Tuning::kBlocksPerSm} * device.num_sms));
  plan->workspace_bytes = plan->list_bytes * static_cast<size_t>(plan->num_blocks);
}

// Two numbers of each column of a block, and behind those of all blocks how many tokens each has.
size_t batch_norm_workspace_bytes(int64_t num_rows, int64_t num_cols, int num_sms) {
  using Tuning = BatchNormTuning;
  // A panel has at most as many parts as the grid has blocks for it.
  const int64_t partials = std::max<int64_t>(ceil_div<int64_t>(num_rows, Tuning::kPanelColumns) +
                                                 ceil_div<int64_t>(num_cols, Tuning::kPanelColumns),
                                             int64_t{Tuning::kBlocksPerSm} * num_sms);
  return round_up<size_t>(partials * (Tuning::kPanelColumns * 2 + 1) * sizeof(float), kAlignment);
}

// Vectors lie within one axis and are aligned in every operand.
bool allows_vectors(int vec, int64_t num_rows, int64_t num_cols, int64_t logits_stride,
                    std::initializer_list<const void*> pointers) {
  return num_rows % vec == 0 && num_cols % vec == 0 && logits_stride % vec == 0 &&
         are_aligned(pointers);
}

// What the instructions and TMA ask of shapes and operands.
bool is_representable(const RouterLogitsForwardParams& params) {
  constexpr int64_t kMaxSize = 1 << 20;
  if (params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) return false;
  if (params.stats_dtype != params.dtype && params.stats_dtype != DType::kFloat32) return false;
  const int64_t multiples_of_8[] = {params.num_rows, params.num_cols, params.hidden_size};
  const bool sizes_fit =
      std::all_of(std::begin(multiples_of_8), std::end(multiples_of_8),
                  [](int64_t size) { return size > 0 && size <= kMaxSize && size % 8 == 0; });
  return sizes_fit && params.num_tokens > 0 && params.num_tokens <= kMaxSize &&
         are_aligned({params.hidden_states, params.gate_x, params.gate_y, params.normed_x,
                      params.normed_y});
}

}  // namespace

RouterForwardPlan plan_router_forward(const RouterForwardParams& params, const DeviceInfo& device) {
  RouterForwardPlan plan{};
  plan.device = device;
  if (params.num_tokens == 0 || params.num_experts_per_token == 0) return plan;
  const int64_t axis = std::max(params.num_rows, params.num_cols);
  const bool fits_warp = params.num_experts_per_token <= RouterWarpTuning::kMaxExperts &&
                         axis <= RouterWarpTuning::kMaxAxis;
  const bool fits_unsorted =
      !params.sorted && axis <= RouterUnsortedTuning::kMaxAxis &&
      params.num_tokens >= int64_t{RouterUnsortedTuning::kMinTokensPerSm} * device.num_sms &&
      unsorted_list_bytes(params) <= static_cast<size_t>(device.shared_bytes_per_block);
  if (fits_warp) {
    plan_warp_kernel(params, &plan);
  } else if (fits_unsorted) {
    plan_unsorted_kernel(params, &plan);
  } else {
    plan_block_kernel(params, &plan);
  }
  return plan;
}

RouterBackwardPlan plan_router_backward(const RouterBackwardParams& params,
                                        const DeviceInfo& device) {
  using Tuning = RouterBackwardTuning;
  RouterBackwardPlan plan{};
  plan.device = device;
  if (params.num_tokens == 0) return plan;
  const size_t token_bytes = (params.num_rows + params.num_cols) * sizeof(float);
  const auto fits = [&](size_t bytes) {
    return bytes + Tuning::kScratchBytes <= static_cast<size_t>(device.shared_bytes_per_block);
  };
  plan.warps_per_token =
      params.num_experts_per_token >= Tuning::kManyPairs && fits(Tuning::kManyWarps * token_bytes)
          ? Tuning::kManyWarps
          : 1;
  const int tokens_per_block = plan.warps_per_token == 1 ? Tuning::kTokensPerBlock : 1;
  plan.sum_bytes = tokens_per_block * plan.warps_per_token * token_bytes;
  plan.sums_in_shared = fits(plan.sum_bytes);
  plan.num_blocks =
      std::min(ceil_div<int64_t>(params.num_tokens, tokens_per_block), int64_t{INT32_MAX});
  if (plan.sums_in_shared) return plan;
  plan.warps_per_token = Tuning::kManyWarps;
  plan.sum_bytes = Tuning::kManyWarps * token_bytes;
  plan.num_blocks =
      std::min(params.num_tokens,
               std::clamp<int64_t>(Tuning::kMaxWorkspace / static_cast<int64_t>(plan.sum_bytes), 1,
                                   int64_t{Tuning::kBlocksPerSm} * device.num_sms));
  plan.workspace_bytes =
      round_up<size_t>(plan.sum_bytes * static_cast<size_t>(plan.num_blocks), kAlignment);
  return plan;
}

BatchNormGrid plan_batch_norm_grid(int64_t num_tokens, int64_t num_rows, int64_t num_cols, int vec,
                                   int rows, int num_sms) {
  using Tuning = BatchNormTuning;
  const int64_t slots = Tuning::slots(vec);
  const int64_t max_blocks = int64_t{Tuning::kBlocksPerSm} * num_sms;
  const int64_t panels_x = ceil_div<int64_t>(num_rows, Tuning::kPanelColumns);
  const int64_t num_panels = panels_x + ceil_div<int64_t>(num_cols, Tuning::kPanelColumns);
  const int64_t panels_per_round = std::max<int64_t>(1, std::min(num_panels, max_blocks));
  // One block per SM where their registers hold everything, which makes the barrier cheaper.
  int64_t parts = std::max<int64_t>(1, num_sms / panels_per_round);
  if (ceil_div(num_tokens, parts) > slots * rows) parts = max_blocks / panels_per_round;
  parts = std::clamp<int64_t>(parts, 1, std::max<int64_t>(1, ceil_div(num_tokens, slots)));
  const int64_t tokens_per_part = std::max<int64_t>(1, ceil_div(num_tokens, parts));
  return {static_cast<int>(panels_x),
          static_cast<int>(num_panels),
          static_cast<int>(panels_per_round),
          static_cast<int>(ceil_div(num_panels, panels_per_round)),
          static_cast<int>(std::max<int64_t>(1, ceil_div(num_tokens, tokens_per_part))),
          tokens_per_part};
}

BatchNormForwardPlan plan_batch_norm_forward(const BatchNormForwardParams& params,
                                             const DeviceInfo& device) {
  BatchNormForwardPlan plan{};
  plan.device = device;
  if (element_size(params.dtype) == 0) return plan;
  const int vec = static_cast<int>(16 / element_size(params.dtype));
  plan.uses_vectors = allows_vectors(vec, params.num_rows, params.num_cols, params.logits_stride,
                                     {params.logits, params.normed_x, params.normed_y});
  const int used = plan.uses_vectors ? vec : 1;
  plan.grid = plan_batch_norm_grid(params.num_tokens, params.num_rows, params.num_cols, used,
                                   BatchNormTuning::forward_rows(used), device.num_sms);
  if (params.training) {
    plan.workspace_bytes =
        batch_norm_workspace_bytes(params.num_rows, params.num_cols, device.num_sms);
  }
  return plan;
}

BatchNormBackwardPlan plan_batch_norm_backward(const BatchNormBackwardParams& params,
                                               const DeviceInfo& device) {
  BatchNormBackwardPlan plan{};
  plan.device = device;
  if (element_size(params.dtype) == 0 || params.num_tokens == 0) return plan;
  const int vec = static_cast<int>(16 / element_size(params.dtype));
  plan.uses_vectors = allows_vectors(
      vec, params.num_rows, params.num_cols, params.num_rows + params.num_cols,
      {params.grad_x, params.grad_y, params.normed_x, params.normed_y, params.grad_logits});
  const int used = plan.uses_vectors ? vec : 1;
  plan.grid = plan_batch_norm_grid(params.num_tokens, params.num_rows, params.num_cols, used,
                                   BatchNormTuning::backward_rows(used), device.num_sms);
  if (params.training) {
    plan.workspace_bytes =
        batch_norm_workspace_bytes(params.num_rows, params.num_cols, device.num_sms);
  }
  return plan;
}

TokenNormForwardPlan plan_token_norm_forward(const TokenNormForwardParams& params) {
  TokenNormForwardPlan plan{};
  if (element_size(params.dtype) == 0) return plan;
  plan.uses_vectors = allows_vectors(static_cast<int>(16 / element_size(params.dtype)),
                                     params.num_rows, params.num_cols, params.logits_stride,
                                     {params.logits, params.normed_x, params.normed_y});
  return plan;
}

TokenNormBackwardPlan plan_token_norm_backward(const TokenNormBackwardParams& params) {
  TokenNormBackwardPlan plan{};
  if (element_size(params.dtype) == 0) return plan;
  plan.uses_vectors = allows_vectors(
      static_cast<int>(16 / element_size(params.dtype)), params.num_rows, params.num_cols,
      params.num_rows + params.num_cols,
      {params.grad_x, params.grad_y, params.normed_x, params.normed_y, params.grad_logits});
  return plan;
}

std::optional<RouterLogitsForwardPlan> plan_router_logits_forward(
    const RouterLogitsForwardParams& params, const DeviceInfo& device) {
  using Tuning = RouterLogitsTuning;
  if (!device.has_hopper_kernels || !is_representable(params) ||
      static_cast<size_t>(device.shared_bytes_per_block) < Tuning::kMaxSharedBytes) {
    return std::nullopt;
  }
  const int64_t panels = Tuning::panels_of(params.num_rows, params.num_cols);
  for (const auto& block : Tuning::kBlocks) {  // one on each SM
    const int64_t token_blocks = Tuning::token_blocks(params.num_tokens, block.token_tiles);
    if (token_blocks * ceil_div<int64_t>(panels, block.panels) > device.num_sms) continue;
    RouterLogitsForwardPlan plan{device, block.token_tiles, block.panels, 0};
    if (params.training) {
      const size_t partials = static_cast<size_t>(token_blocks * panels * Tuning::kPanelCols);
      plan.workspace_bytes = round_up<size_t>(partials * 2 * sizeof(float), kAlignment);
    }
    return plan;
  }
  return std::nullopt;
}

}  // namespace omni_moe::cuda
