// Expert order on the CPU: a stable counting sort of the pairs by expert, O(T·K + E).
// Serial: at T16384 K32 it is 1% of the backward pass that reads those pairs' rows.
#include "omni_moe/schedule.h"

#include <algorithm>

#include "omni_moe/cpu.h"

namespace omni_moe::cpu {

namespace {

template <typename Index>
void counting_sort(const ScheduleParams& params) {
  const auto* indices = static_cast<const Index*>(params.indices);
  int64_t* offsets = params.expert_offsets;

  // 1. Count into offsets[e + 1], so that the running sum leaves expert e's start in offsets[e].
  std::fill_n(offsets, params.num_experts + 1, int64_t{0});
  for (int64_t pair = 0; pair < params.num_pairs; ++pair) ++offsets[indices[pair] + 1];
  for (int64_t e = 0; e < params.num_experts; ++e) offsets[e + 1] += offsets[e];

  // 2. Place; offsets[e] moves from expert e's start to its end, which is expert e + 1's start.
  for (int64_t pair = 0; pair < params.num_pairs; ++pair) {
    params.pairs[offsets[indices[pair]]++] = pair;
  }

  // 3. Shift the starts back.
  for (int64_t e = params.num_experts; e > 0; --e) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
}

template <typename Index>
int64_t first_outside(const Index* indices, int64_t count, int64_t num_experts, int64_t lowest) {
  const auto* end = indices + count;
  const auto* found = std::find_if(
      indices, end, [=](Index index) { return index < lowest || index >= num_experts; });
  return found == end ? -1 : found - indices;
}

}  // namespace

void schedule(const ScheduleParams& params) {
  params.index_type == IndexType::kInt32 ? counting_sort<int32_t>(params)
                                         : counting_sort<int64_t>(params);
}

int64_t find_invalid_index(const void* indices, IndexType index_type, int64_t count,
                           int64_t num_experts, int64_t lowest) {
  return index_type == IndexType::kInt32
             ? first_outside(static_cast<const int32_t*>(indices), count, num_experts, lowest)
             : first_outside(static_cast<const int64_t*>(indices), count, num_experts, lowest);
}

}  // namespace omni_moe::cpu
