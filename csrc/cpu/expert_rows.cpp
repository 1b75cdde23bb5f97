// Rows of pairs in expert order, on the CPU: a count, a sum over experts and one more pass, serial,
// O(P + E).
#include <algorithm>
#include <vector>

#include "omni_moe/cpu.h"

namespace omni_moe::cpu {

void expert_rows(const ExpertRowsParams& params, const Executor& /*executor*/) {
  const auto& p = params;
  const bool is_padded = p.capacity >= 0;
  std::vector<int64_t> counts(p.num_experts), begins(p.num_experts);
  for (int64_t pair = 0; pair < p.num_pairs; ++pair) {
    const int32_t id = p.indices[pair];
    if (id >= 0 && (p.slots == nullptr || p.slots[pair] >= 0)) ++counts[id];
  }
  int64_t end = 0;
  for (int64_t e = 0; e < p.num_experts; ++e) {
    begins[e] = is_padded ? e * p.capacity : end;
    end = begins[e] + (is_padded ? std::min(counts[e], p.capacity) : counts[e]);
    p.expert_ends[e] = static_cast<int32_t>(end);
  }
  std::fill(counts.begin(), counts.end(), 0);
  for (int64_t pair = 0; pair < p.num_pairs; ++pair) {
    const int32_t id = p.indices[pair];
    int64_t slot = -1;
    if (id >= 0) slot = p.slots == nullptr ? counts[id]++ : p.slots[pair];
    const bool has_row = slot >= 0 && (!is_padded || slot < p.capacity);
    p.row_id_map[pair] = has_row ? static_cast<int32_t>(begins[id] + slot) : -1;
  }
}

}  // namespace omni_moe::cpu
