// Dense gradients of the expert tables from per-pair coefficients in expert order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/experts/expert_plan.h"
#include "cuda/experts/schedule.h"
#include "omni_moe/expert.h"

namespace omni_moe::cuda {

// What the token pass leaves at ExpertSchedule::pair_position[t * K + k].
struct alignas(16) PairRecord {
  int32_t token;
  float up_coefficient;    // routing act'(s) g
  float down_coefficient;  // routing act(s)
  int32_t unused;
};

// fp32 sums of the parts of long segments: [max_parts, 2 (up, down), H].
inline size_t weight_grad_partial_count(const ExpertSchedule& schedule, int64_t hidden_size) {
  return static_cast<size_t>(schedule.max_parts) * 2 * hidden_size;
}

// Writes every row of grad_up_weights and grad_down_weights (where not null).
cudaError_t weight_grad(const ExpertBackwardParams& params, const ExpertSchedule& schedule,
                        const PairRecord* records, float* partial, const ExpertDeviceInfo& device,
                        cudaStream_t stream);

}  // namespace omni_moe::cuda
