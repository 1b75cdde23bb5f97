// Plans of the expert ops; see omni_moe/cuda_plan.h.
#include "cuda/experts/expert_plan.h"

#include <algorithm>
#include <initializer_list>

#include "cuda/common/operands.h"
#include "cuda/common/workspace.h"
#include "cuda/experts/bands/band_plan.h"
#include "cuda/experts/expert_tuning.h"
#include "cuda/experts/expert_workspace.h"

namespace omni_moe::cuda {
namespace {

constexpr int64_t kMaxFusedRowBytes = 4096;

int64_t row_bytes_of(const TokenPassShape& shape) {
  return shape.hidden_size * static_cast<int64_t>(shape.element_size);
}

// Blocks per token. One is enough once the tokens fill the device; beyond kMaxPairs the ids and
// coefficients of a token no longer fit one block's shared memory.
int64_t two_phase_splits(const TokenPassShape& shape, const DeviceInfo& device) {
  const int64_t num_pairs = shape.num_experts_per_token;
  if (num_pairs == 0 || shape.num_tokens == 0) return 1;
  const int64_t needed = ceil_div<int64_t>(num_pairs, TwoPhaseTuning::kMaxPairs);
  const int64_t wanted =
      int64_t{TwoPhaseTuning::kSplitBlocksPerSm} * device.num_sms / shape.num_tokens;
  const int64_t useful = num_pairs / TwoPhaseTuning::kMinSplitPairs;
  return std::max({int64_t{1}, needed, std::min(wanted, useful)});
}

bool wide_tiles_pay(const TokenPassShape& shape, const DeviceInfo& device) {
  using Wide = L2TileTuning<512>;
  const int64_t blocks = ceil_div<int64_t>(row_bytes_of(shape), Wide::kBytes) *
                         ceil_div<int64_t>(shape.num_tokens, Wide::kWarps);
  const int64_t wave = int64_t{Wide::kBlocksPerSm} * device.num_sms;
  return double{Wide::kBytes} * static_cast<double>(shape.num_experts) <=
             L2TilePlanTuning::kWideL2Share * device.l2_bytes &&
         blocks >= L2TilePlanTuning::kMinWideWaves * wave;
}

// The numbers are medians in µs on an H200 with bf16, H 1024 and uniform ids; of two, the first is
// fused and the second l2_tiled by 256 bytes, both forward.
TokenPassStrategy choose_strategy(const TokenPassShape& shape, const DeviceInfo& device) {
  if (bands_pay(shape, device)) return TokenPassStrategy::kBands;
  if (!supports(TokenPassStrategy::kFused, shape)) return TokenPassStrategy::kTwoPhase;
  // Where few tokens have many pairs, two_phase splits a token's pairs over idle SMs. Otherwise
  // fused has a whole batch of rows in flight at once: against two_phase T1 K16 went from 5.3
  // to 2.4, and T64 K16 from 5.5 to 2.9.
  if (shape.num_tokens <= device.num_sms) {
    return two_phase_splits(shape, device) > 1 ? TokenPassStrategy::kTwoPhase
                                               : TokenPassStrategy::kFused;
  }
  // Tiles leave HBM once: T16384 E65536 K32 510 / 325, T4096 E65536 K16 74.9 / 63.7, but without
  // reuse T4096 E1048576 K64 269 / 273. Tables whose rows are used once on average gain already,
  // because the ids that repeat find L2 cold otherwise. Tables that fit L2 gain too: T4096 E4096
  // K16 51.4 / 43.9.
  const bool rows_recur = shape.num_tokens * shape.num_experts_per_token >= shape.num_experts;
  const bool tiles_follow =
      shape.num_tokens >= int64_t{L2TilePlanTuning::kMinTokensPerSm} * device.num_sms &&
      row_bytes_of(shape) >= int64_t{L2TilePlanTuning::kMinTiles} * L2TileTuning<256>::kBytes;
  return rows_recur && tiles_follow ? TokenPassStrategy::kL2Tiled : TokenPassStrategy::kFused;
}

}  // namespace

bool supports(TokenPassStrategy strategy, const TokenPassShape& shape) {
  if (strategy == TokenPassStrategy::kTwoPhase) return true;
  const int64_t row_bytes = row_bytes_of(shape);
  const bool has_rows =
      shape.is_aligned && row_bytes > 0 && shape.num_experts > 0 && shape.num_experts_per_token > 0;
  switch (strategy) {
    case TokenPassStrategy::kFused:
      return has_rows && row_bytes <= kMaxFusedRowBytes;
    case TokenPassStrategy::kL2Tiled:
      return has_rows && row_bytes <= INT32_MAX;
    case TokenPassStrategy::kBands:
      return has_rows && bands_support(shape);
    default:
      return false;
  }
}

TokenPassPlan plan_token_pass(const TokenPassShape& shape, const DeviceInfo& device,
                              TokenPassStrategy strategy) {
  TokenPassPlan plan{};
  plan.strategy = strategy;
  const int64_t splits = two_phase_splits(shape, device);
  plan.pairs_per_split =
      std::max<int64_t>(1, ceil_div<int64_t>(shape.num_experts_per_token, splits));
  // Rounding the share up may leave the last splits without pairs.
  plan.num_splits = static_cast<int>(
      std::max<int64_t>(1, ceil_div<int64_t>(shape.num_experts_per_token, plan.pairs_per_split)));
  plan.threads = shape.num_tokens * plan.num_splits <=
                         int64_t{TwoPhaseTuning::kDecodeTokensPerSm} * device.num_sms
                     ? TwoPhaseTuning::kDecodeThreads
                     : TwoPhaseTuning::kThreads;
  plan.tile_bytes = wide_tiles_pay(shape, device) ? 512 : 256;
  if (strategy == TokenPassStrategy::kBands) plan.bands = plan_bands(shape);
  return plan;
}

TokenPassPlan plan_token_pass(const TokenPassShape& shape, const DeviceInfo& device) {
  return plan_token_pass(shape, device, choose_strategy(shape, device));
}

const char* name(TokenPassStrategy strategy) {
  switch (strategy) {
    case TokenPassStrategy::kTwoPhase:
      return "two_phase";
    case TokenPassStrategy::kFused:
      return "fused";
    case TokenPassStrategy::kL2Tiled:
      return "l2_tiled";
    case TokenPassStrategy::kBands:
      return "bands";
  }
  return "unknown";
}

size_t token_pass_workspace_floats(const TokenPassShape& shape, const TokenPassPlan& plan) {
  if (plan.strategy == TokenPassStrategy::kTwoPhase && plan.num_splits > 1) {
    return static_cast<size_t>(shape.num_tokens) * plan.num_splits * shape.hidden_size;
  }
  if (plan.strategy == TokenPassStrategy::kL2Tiled) {
    const int64_t num_tiles = ceil_div<int64_t>(row_bytes_of(shape), plan.tile_bytes);
    return static_cast<size_t>(shape.num_tokens) * shape.num_experts_per_token * (num_tiles + 1);
  }
  if (plan.strategy == TokenPassStrategy::kBands) {
    return band_workspace_bytes(shape, plan.bands) / sizeof(float);
  }
  return 0;
}

// ---- Operands -----------------------------------------------------------------------------------

namespace {

template <class Params>
bool has_kernel(const Params& params) {
  constexpr int64_t kMax = INT32_MAX;  // grid size; ids and k are 32-bit in registers
  return params.num_tokens >= 0 && params.num_tokens <= kMax && params.hidden_size > 0 &&
         params.num_experts >= 0 && params.num_experts <= kMax &&
         params.num_experts_per_token >= 0 && params.num_experts_per_token <= kMax &&
         element_size(params.dtype) != 0 && is_valid(params.activation) &&
         is_valid(params.index_type);
}

// `rows`: the operands whose rows the pass reads or writes.
TokenPassShape token_pass_shape(const ExpertShape& shape, std::initializer_list<const void*> rows) {
  const size_t element = element_size(shape.dtype);
  const auto starts_aligned = [](const void* operand) { return is_aligned(operand, 16); };
  return {.num_tokens = shape.num_tokens,
          .hidden_size = shape.hidden_size,
          .num_experts = shape.num_experts,
          .num_experts_per_token = shape.num_experts_per_token,
          .element_size = element,
          .is_aligned = shape.hidden_size * element % 16 == 0 &&
                        std::all_of(rows.begin(), rows.end(), starts_aligned),
          .num_cols = shape.num_cols};
}

}  // namespace

bool is_supported(const ExpertForwardParams& params) { return has_kernel(params); }

bool is_supported(const ExpertBackwardParams& params) {
  // Pair ids are 32-bit.
  return has_kernel(params) && params.num_tokens * params.num_experts_per_token <= INT32_MAX;
}

TokenPassShape token_pass_shape(const ExpertForwardParams& params) {
  return token_pass_shape(params, {params.hidden_states, params.up_weights, params.down_weights,
                                   params.expert_states, params.addend});
}

TokenPassShape token_pass_shape(const ExpertBackwardParams& params) {
  return token_pass_shape(
      params,
      {params.grad_expert_states, params.hidden_states, params.up_weights, params.down_weights,
       params.addend, params.grad_hidden_states, params.grad_up_weights, params.grad_down_weights});
}

// ---- Ops ----------------------------------------------------------------------------------------

SchedulePlan plan_schedule(int64_t num_pairs, int64_t num_experts) {
  SchedulePlan plan{};
  plan.by_counting = num_pairs <= ScheduleTuning::kMaxCountingPairs &&
                     num_pairs <= ScheduleTuning::kMaxCountingMean * num_experts;
  const int64_t part_pairs =
      std::max<int64_t>(WeightGradTuning::kMinPartPairs,
                        ceil_div<int64_t>(2 * num_pairs, WeightGradTuning::kMaxParts));
  plan.part_pairs = static_cast<uint32_t>(part_pairs);
  // A segment of n > part_pairs pairs has fewer than 2 n / part_pairs parts.
  plan.max_parts = num_pairs > part_pairs ? 2 * num_pairs / part_pairs : 0;
  return plan;
}

ExpertForwardPlan plan_expert_forward(const ExpertForwardParams& params, const DeviceInfo& device,
                                      const TokenPassPlan& token_pass) {
  const size_t floats = token_pass_workspace_floats(token_pass_shape(params), token_pass);
  return {device, token_pass,
          round_up<size_t>(floats * sizeof(float), WorkspaceCutter::kAlignment)};
}

ExpertForwardPlan plan_expert_forward(const ExpertForwardParams& params, const DeviceInfo& device) {
  if (!is_supported(params)) return {device, {}, 0};
  return plan_expert_forward(params, device, plan_token_pass(token_pass_shape(params), device));
}

ExpertBackwardPlan plan_expert_backward(const ExpertBackwardParams& params,
                                        const DeviceInfo& device, const TokenPassPlan& token_pass,
                                        size_t sort_storage_bytes) {
  ExpertBackwardPlan plan{};
  plan.device = device;
  plan.token_pass = token_pass;
  plan.token_pass.bands.has_weight_gradients = token_pass.strategy == TokenPassStrategy::kBands;
  plan.schedule =
      plan_schedule(params.num_tokens * params.num_experts_per_token, params.num_experts);
  if (!plan.schedule.by_counting) plan.schedule.sort_storage_bytes = sort_storage_bytes;
  ExpertBackwardParams sizes_only = params;
  sizes_only.workspace = nullptr;
  plan.workspace_bytes = cut_workspace(sizes_only, plan).size;
  return plan;
}

ExpertBackwardPlan plan_expert_backward(const ExpertBackwardParams& params,
                                        const DeviceInfo& device) {
  if (!is_supported(params)) return {device, {}, {}, 0};
  return plan_expert_backward(params, device, plan_token_pass(token_pass_shape(params), device),
                              /*sort_storage_bytes=*/0);
}

// ---- Workspace ----------------------------------------------------------------------------------

namespace {

ScheduleWorkspace take_schedule_workspace(int64_t num_pairs, int64_t num_experts,
                                          const SchedulePlan& plan, WorkspaceCutter* workspace) {
  ScheduleWorkspace taken{};
  ExpertSchedule& schedule = taken.schedule;
  schedule.part_pairs = plan.part_pairs;
  schedule.max_parts = plan.max_parts;
  schedule.counters = workspace->take<ScheduleCounters>(1);
  schedule.segment_end = workspace->take<uint32_t>(num_experts);
  schedule.segment_begin = workspace->take<uint32_t>(num_experts);
  schedule.pair_position = workspace->take<uint32_t>(num_pairs);
  schedule.parts = workspace->take<SegmentPart>(plan.max_parts);
  schedule.long_segments = workspace->take<LongSegment>(num_pairs / plan.part_pairs);
  taken.pairs = workspace->take<uint32_t>(num_pairs);
  if (plan.by_counting) {
    taken.huge_experts = workspace->take<int32_t>(num_pairs / ScheduleTuning::kHugeSegment);
  } else {
    taken.keys[0] = workspace->take<uint32_t>(num_pairs);
    taken.keys[1] = workspace->take<uint32_t>(num_pairs);
    taken.pairs_sorted = workspace->take<uint32_t>(num_pairs);
    taken.sort_storage = workspace->take<char>(plan.sort_storage_bytes);
  }
  return taken;
}

}  // namespace

BackwardWorkspace cut_workspace(const ExpertBackwardParams& params,
                                const ExpertBackwardPlan& plan) {
  WorkspaceCutter cutter(params.workspace);
  BackwardWorkspace workspace{};
  const int64_t num_pairs = params.num_tokens * params.num_experts_per_token;
  workspace.token_pass =
      cutter.take<float>(token_pass_workspace_floats(token_pass_shape(params), plan.token_pass));
  if (plan.token_pass.strategy == TokenPassStrategy::kBands) {  // whose lists are all it takes
    workspace.size = cutter.size();
    return workspace;
  }
  workspace.schedule =
      take_schedule_workspace(num_pairs, params.num_experts, plan.schedule, &cutter);
  workspace.records = cutter.take<PairRecord>(num_pairs);
  workspace.weight_partial =
      cutter.take<float>(static_cast<size_t>(plan.schedule.max_parts) * 2 * params.hidden_size);
  workspace.size = cutter.size();
  return workspace;
}

}  // namespace omni_moe::cuda
