// Counts of experts, a row for each block of a kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "omni_moe/cuda_plan.h"

namespace omni_moe::cuda {

// totals[e] = the sum of column e of block_counts [num_blocks, num_experts].
cudaError_t sum_block_counts(int32_t* block_counts, int64_t num_blocks, int64_t num_experts,
                             int64_t* totals, const DeviceInfo& device, cudaStream_t stream);

// Replaces each count by the sum of those above it; writes the totals too, unless that is null.
cudaError_t scan_block_counts(int32_t* block_counts, int64_t num_blocks, int64_t num_experts,
                              int64_t* totals, const DeviceInfo& device, cudaStream_t stream);

}  // namespace omni_moe::cuda
