// Strategy of the expert passes as data; see plan.h.
#include "plan.h"

#include <algorithm>

#include "tuning.h"

namespace omni_moe::cuda {
namespace {

constexpr int64_t kLoadBytes = 16;
constexpr int64_t kWarpLoadBytes = 32 * kLoadBytes;

// Blocks per token. One is enough once the tokens fill the device; beyond kMaxPairs the ids and
// coefficients of a token no longer fit one block's shared memory.
int64_t phased_splits(const TokenPassShape& shape, const DeviceInfo& device) {
  const int64_t num_pairs = shape.num_experts_per_token;
  if (num_pairs == 0 || shape.num_tokens == 0) return 1;
  const int64_t needed = ceil_div<int64_t>(num_pairs, PhasedTuning::kMaxPairs);
  const int64_t wanted =
      int64_t{PhasedTuning::kSplitBlocksPerSm} * device.num_sms / shape.num_tokens;
  const int64_t useful = num_pairs / PhasedTuning::kMinSplitPairs;
  return std::max({int64_t{1}, needed, std::min(wanted, useful)});
}

bool ring_applies(const TokenPassShape& shape, const DeviceInfo& device) {
  const int64_t row_bytes = shape.hidden_size * static_cast<int64_t>(shape.element_size);
  return shape.is_aligned && row_bytes > 0 && row_bytes <= 8 * kWarpLoadBytes &&
         shape.num_tokens >= int64_t{RingTuning::kMinTokensPerSm} * device.num_sms &&
         shape.num_experts_per_token >= RingTuning::kMinPairs;
}

}  // namespace

TokenPassPlan plan_token_pass(const TokenPassShape& shape, const DeviceInfo& device) {
  TokenPassPlan plan{};
  const int64_t row_bytes = shape.hidden_size * static_cast<int64_t>(shape.element_size);
  const int64_t splits = phased_splits(shape, device);
  plan.pairs_per_split =
      std::max<int64_t>(1, ceil_div<int64_t>(shape.num_experts_per_token, splits));
  // Rounding the share up may leave the last splits without pairs.
  plan.num_splits = static_cast<int>(std::max<int64_t>(
      1, ceil_div<int64_t>(shape.num_experts_per_token, plan.pairs_per_split)));
  plan.threads = shape.num_tokens * plan.num_splits <=
                         int64_t{PhasedTuning::kDecodeTokensPerSm} * device.num_sms
                     ? PhasedTuning::kDecodeThreads
                     : PhasedTuning::kThreads;
  plan.strategy =
      ring_applies(shape, device) ? TokenPassStrategy::kRing : TokenPassStrategy::kPhased;
  plan.copy = device.compute_capability >= 90 ? RowCopy::kBulk : RowCopy::kAsync;
  plan.chunks_per_lane = row_bytes <= 4 * kWarpLoadBytes ? 4 : 8;
  return plan;
}

size_t token_pass_workspace_size(const TokenPassShape& shape, const DeviceInfo& device) {
  TokenPassShape unaligned = shape;
  unaligned.is_aligned = false;  // the ring needs no workspace
  const TokenPassPlan plan = plan_token_pass(unaligned, device);
  if (plan.num_splits <= 1) return 0;
  return static_cast<size_t>(shape.num_tokens) * plan.num_splits * shape.hidden_size *
         sizeof(float);
}

}  // namespace omni_moe::cuda
