// Layout of ExpertBackwardParams::workspace on the CPU, the same for every instruction set.
#pragma once

#include "omni_moe/expert.h"

namespace omni_moe::cpu {

// What the token pass of the backward leaves for its expert pass, per pair.
template <typename Acc>
struct PairCoefficients {
  Acc up;    // routing * act'(s) * g: grad_up[i] += up * hidden[t]
  Acc down;  // routing * act(s): grad_down[i] += down * grad[t]
};

struct ExpertBackwardWorkspace {
  void* coefficients;       // PairCoefficients [T * K], sized for fp64
  int64_t* pairs;           // [T * K]
  int64_t* expert_offsets;  // [E + 1]
  size_t size;              // bytes of the whole

  explicit ExpertBackwardWorkspace(const ExpertBackwardParams& params) {
    const int64_t num_pairs = params.num_tokens * params.num_experts_per_token;
    const size_t coefficient_bytes = num_pairs * sizeof(PairCoefficients<double>);
    coefficients = params.workspace;
    pairs = reinterpret_cast<int64_t*>(static_cast<char*>(params.workspace) + coefficient_bytes);
    expert_offsets = pairs + num_pairs;
    size = coefficient_bytes + (num_pairs + params.num_experts + 1) * sizeof(int64_t);
  }
};

}  // namespace omni_moe::cpu
