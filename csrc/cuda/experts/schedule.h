// Expert order on the device: which positions belong to which expert, and the position of every
// (token, k) pair. Positions of one expert are consecutive and ordered by pair id, so that sums
// over them always run in the same order. Where an expert's positions start may vary from run to
// run.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/experts/expert_workspace.h"

namespace omni_moe::cuda {

struct ScheduleShape {
  int64_t num_pairs;    // < 2^31
  int64_t num_experts;  // < 2^31
};

// What CUB's radix sort keeps in the workspace on the current device.
size_t sort_storage_bytes(const ScheduleShape& shape);

// Fills workspace.schedule from indices [T, K]; checks every index.
cudaError_t schedule_pairs(const ScheduleShape& shape, const void* indices, IndexType index_type,
                           const SchedulePlan& plan, const ScheduleWorkspace& workspace,
                           const DeviceInfo& device, cudaStream_t stream);

}  // namespace omni_moe::cuda
