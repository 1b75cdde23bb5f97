// Expert order on the device: which positions belong to which expert, and the position of every
// (token, k) pair. Positions of one expert are consecutive and ordered by pair id, so sums over
// them always run in the same order. Where an expert's positions start may vary from run to run.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/workspace.h"
#include "omni_moe/types.h"

namespace omni_moe::cuda {

// A part of the pairs of an expert that has too many for one warp.
struct SegmentPart {
  int32_t expert;
  int32_t part;  // positions segment_begin[expert] + part * part_pairs …
};

struct LongSegment {
  int32_t expert;
  int32_t first_part;  // its parts are consecutive in ExpertSchedule::parts
  int32_t num_parts;
};

struct ScheduleCounters {
  uint32_t num_positions;  // handed out so far
  uint32_t num_parts;
  uint32_t num_long;
  uint32_t num_huge;
};

struct ExpertSchedule {
  uint32_t* segment_begin;     // [E], meaningful where the segment is not empty
  uint32_t* segment_end;       // [E], begin == end: idle expert
  uint32_t* pair_position;     // [T * K]
  SegmentPart* parts;          // [counters->num_parts] of segments longer than part_pairs
  LongSegment* long_segments;  // [counters->num_long]
  ScheduleCounters* counters;
  uint32_t part_pairs;
  int64_t max_parts;  // from shapes alone
};

struct ScheduleShape {
  int64_t num_pairs;    // < 2^31
  int64_t num_experts;  // < 2^31
};

// Takes the schedule and the scratch memory it is made in out of `workspace`.
struct ScheduleWorkspace {
  ExpertSchedule schedule;
  uint32_t* pairs;         // [T * K] pair ids by position
  uint32_t* keys[2];       // [T * K] radix sort
  uint32_t* pairs_sorted;  // [T * K] radix sort
  int32_t* huge_experts;   // counting
  char* sort_storage;
  size_t sort_storage_bytes;
};
ScheduleWorkspace take_schedule_workspace(const ScheduleShape& shape, WorkspaceCutter* workspace);

// Fills workspace.schedule from indices [T, K]; checks every index.
cudaError_t schedule_pairs(const ScheduleShape& shape, const void* indices, IndexType index_type,
                           const ScheduleWorkspace& workspace, const DeviceInfo& device,
                           cudaStream_t stream);

}  // namespace omni_moe::cuda
