// Dense gradients of the expert tables from per-pair coefficients in expert order.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/experts/expert_workspace.h"
#include "omni_moe/expert.h"

namespace omni_moe::cuda {

// Writes every row of grad_up_weights and grad_down_weights (where not null).
cudaError_t weight_grad(const ExpertBackwardParams& params, const ExpertSchedule& schedule,
                        const PairRecord* records, float* partial, const DeviceInfo& device,
                        cudaStream_t stream);

}  // namespace omni_moe::cuda
