// Expert order: the pairs (token, k) grouped by expert, stable, so that sums over an expert's
// pairs always run in the same order.
#pragma once

#include <cstddef>

#include "omni_moe/types.h"

namespace omni_moe {

struct ScheduleParams {
  const void* indices;      // [T, K], of index_type
  int64_t* expert_offsets;  // [E + 1]: expert e owns pairs[expert_offsets[e] … expert_offsets[e+1])
  int64_t* pairs;           // [T * K] pair ids t * K + k by ascending (expert, pair id)
  int64_t num_pairs;        // T * K
  int64_t num_experts;
  IndexType index_type;
};

}  // namespace omni_moe
