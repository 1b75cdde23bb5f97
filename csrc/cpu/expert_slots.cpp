// Places of pairs in their experts' queues, on the CPU: one pass, serial, O(P + E).
#include <vector>

#include "omni_moe/cpu.h"

namespace omni_moe::cpu {

void expert_slots(const ExpertSlotsParams& params, const Executor& /*executor*/) {
  std::vector<int32_t> queued(params.num_experts);
  for (int64_t pair = 0; pair < params.num_pairs; ++pair) {
    const int32_t id = params.indices[pair];
    const int32_t slot = id < 0 ? -1 : queued[id]++;
    params.slots[pair] = slot < params.capacity ? slot : -1;
  }
}

}  // namespace omni_moe::cpu
