// Workspace of the experts' backward: the schedule and the scratch memory that it is made in, what
// the token pass leaves for the weight gradients, and partial sums. Needs no CUDA toolkit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/common/workspace.h"
#include "omni_moe/cuda_plan.h"

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

struct ScheduleWorkspace {
  ExpertSchedule schedule;
  uint32_t* pairs;         // [T * K] pair ids by position
  uint32_t* keys[2];       // [T * K] radix sort
  uint32_t* pairs_sorted;  // [T * K] radix sort
  int32_t* huge_experts;   // counting
  char* sort_storage;      // radix sort
};

// What the token pass leaves at ExpertSchedule::pair_position[t * K + k].
struct alignas(16) PairRecord {
  int32_t token;
  float up_coefficient;    // routing act'(s) g
  float down_coefficient;  // routing act(s)
  int32_t unused;
};

struct BackwardWorkspace {
  float* token_pass;  // token_pass_workspace_floats
  ScheduleWorkspace schedule;
  PairRecord* records;    // [T * K]
  float* weight_partial;  // parts of long segments: [max_parts, 2 (up, down), H]
  size_t size;
};

// Cuts params.workspace; with a null one only its size is meant. The layout does not depend on
// which gradients are wanted.
BackwardWorkspace cut_workspace(const ExpertBackwardParams& params, const ExpertBackwardPlan& plan);

}  // namespace omni_moe::cuda
