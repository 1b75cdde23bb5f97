// Plans of the permutation's kernels; see omni_moe/cuda_plan.h.
#include <algorithm>
#include <initializer_list>

#include "cuda/common/operands.h"
#include "cuda/common/workspace.h"
#include "cuda/permute/permute_tuning.h"
#include "omni_moe/cuda_plan.h"

namespace omni_moe::cuda {
namespace {

// For `num_tasks` tokens or pairs, and for the rows that may have to be zeros.
PermutePlan plan_permutation(const PermuteShape& shape, const DeviceInfo& device,
                             std::initializer_list<const void*> pointers, int64_t num_tasks,
                             int threads_per_row, bool clears_rows) {
  using Tuning = PermuteTuning;
  PermutePlan plan{};
  plan.device = device;
  const size_t bytes = element_size(shape.dtype);
  if (bytes == 0) return plan;
  const auto vec = static_cast<int64_t>(16 / bytes);
  plan.uses_vectors = shape.hidden_size % vec == 0 &&
                      std::all_of(pointers.begin(), pointers.end(),
                                  [](const void* pointer) { return is_aligned(pointer, 16); });
  plan.threads_per_row = threads_per_row;
  const int64_t for_zeros =
      clears_rows ? ceil_div<int64_t>(shape.num_rows, Tuning::kRowsPerPlace) : 0;
  plan.num_blocks =
      ceil_div<int64_t>(std::max(num_tasks, for_zeros), Tuning::kThreads / threads_per_row);
  return plan;
}

// As many threads as a row has vectors, in powers of two up to a block.
int threads_of_row(const PermuteShape& shape) {
  const size_t bytes = element_size(shape.dtype);
  int threads = PermuteTuning::kThreads;
  const int64_t length = bytes == 0 ? 1 : shape.hidden_size * static_cast<int64_t>(bytes) / 16;
  while (threads > 1 && threads / 2 >= length) threads /= 2;
  return threads;
}

}  // namespace

ExpertRowsPlan plan_expert_rows(const ExpertRowsParams& params, const DeviceInfo& device) {
  ExpertRowsPlan plan{};
  plan.device = device;
  if (params.num_experts == 0) return plan;
  plan.pairs_per_block = static_cast<int>(std::max<int64_t>(
      ExpertRowsTuning::kMinPairsPerBlock, round_up<int64_t>(params.num_experts, 32)));
  plan.num_blocks = std::max<int64_t>(1, ceil_div<int64_t>(params.num_pairs, plan.pairs_per_block));
  WorkspaceCutter cutter(nullptr);
  cutter.take<int32_t>(plan.num_blocks * params.num_experts);
  cutter.take<int64_t>(params.num_experts);
  plan.workspace_bytes = cutter.size();
  return plan;
}

PermutePlan plan_permute(const PermuteParams& params, const DeviceInfo& device) {
  return plan_permutation(params, device, {params.tokens, params.rows}, params.num_tokens,
                          threads_of_row(params), /*clears_rows=*/true);
}

PermutePlan plan_unpermute(const UnpermuteParams& params, const DeviceInfo& device) {
  return plan_permutation(params, device, {params.rows, params.tokens}, params.num_tokens,
                          threads_of_row(params), /*clears_rows=*/false);
}

PermutePlan plan_unpermute_backward(const UnpermuteBackwardParams& params,
                                    const DeviceInfo& device) {
  // A pair has one warp, in which its dot product ends.
  return plan_permutation(params, device, {params.grad_tokens, params.rows, params.grad_rows},
                          params.num_tokens * params.num_experts_per_token, /*threads_per_row=*/32,
                          /*clears_rows=*/true);
}

}  // namespace omni_moe::cuda
