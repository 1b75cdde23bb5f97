// Groups the T K pairs by expert (see schedule.h). A radix sort of 64 Ki pairs takes as long as a
// whole expert pass, so small problems are counted instead: count per expert, hand out segments,
// drop the pairs into them in any order, and order each segment by comparing its pair ids. Reads
// and writes about 10 words per pair and 3 per expert. Atomics decide only where a segment lies and
// the order before the comparison, neither of which shows in the result.
#include <algorithm>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/device/device_radix_sort.cuh>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/expert_id.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/experts/expert_tuning.h"
#include "cuda/experts/schedule.h"

namespace omni_moe::cuda {
namespace {

constexpr int kThreads = ScheduleTuning::kThreads;

int key_bits(int64_t num_experts) {
  int bits = 1;
  while (bits < 31 && (int64_t{1} << bits) < num_experts) ++bits;
  return bits;
}

unsigned blocks_for(int64_t items) {
  return static_cast<unsigned>(ceil_div<int64_t>(items, kThreads));
}

__device__ __forceinline__ int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// ---- Long segments ------------------------------------------------------------------------------

// Lists the segment of this thread's expert if it is longer than part_pairs. Called by whole
// warps; the lanes write the parts of one expert together.
__device__ __forceinline__ void warp_list_long_segments(const ExpertSchedule& schedule,
                                                        int32_t expert, uint32_t length) {
  const int lane = threadIdx.x % kWarpSize;
  unsigned waiting = __ballot_sync(kFullWarp, length > schedule.part_pairs);
  while (waiting != 0) {
    const int owner = __ffs(waiting) - 1;
    waiting &= waiting - 1;
    const int32_t long_expert = __shfl_sync(kFullWarp, expert, owner);
    const uint32_t long_length = __shfl_sync(kFullWarp, length, owner);
    const uint32_t num_parts = (long_length + schedule.part_pairs - 1) / schedule.part_pairs;
    uint32_t first_part = 0;
    if (lane == 0) {
      first_part = atomicAdd(&schedule.counters->num_parts, num_parts);
      schedule.long_segments[atomicAdd(&schedule.counters->num_long, 1u)] = {
          long_expert, static_cast<int32_t>(first_part), static_cast<int32_t>(num_parts)};
    }
    first_part = __shfl_sync(kFullWarp, first_part, 0);
    for (uint32_t part = lane; part < num_parts; part += kWarpSize) {
      schedule.parts[first_part + part] = {long_expert, static_cast<int32_t>(part)};
    }
  }
}

// ---- Counting -----------------------------------------------------------------------------------

// counts[e] = pairs of expert e; rank[pair] = some distinct number below it.
__global__ void __launch_bounds__(kThreads)
    count_pairs_kernel(const void* indices, IndexType index_type, int64_t num_pairs,
                       int64_t num_experts, uint32_t* counts, uint32_t* rank) {
  let_next_kernel_start();
  const int64_t pair = global_thread();
  const unsigned active = __ballot_sync(kFullWarp, pair < num_pairs);
  if (pair >= num_pairs) return;
  const int32_t expert = load_expert_id(indices, index_type, pair, num_experts);
  // One atomic per expert and warp: a million pairs on one expert would queue at one address.
  const unsigned peers = __match_any_sync(active, expert);
  const int lane = threadIdx.x % kWarpSize;
  const int leader = __ffs(peers) - 1;
  uint32_t base = 0;
  if (lane == leader) base = atomicAdd(&counts[expert], static_cast<uint32_t>(__popc(peers)));
  base = __shfl_sync(peers, base, leader);
  rank[pair] = base + __popc(peers & ((1u << lane) - 1));
}

// Turns counts (in segment_end) into segments, in expert order within a block, blocks as they come.
__global__ void __launch_bounds__(kThreads)
    allocate_segments_kernel(ExpertSchedule schedule, int64_t num_experts, int32_t* huge_experts) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  using BlockScan = cub::BlockScan<uint32_t, kThreads>;
  __shared__ typename BlockScan::TempStorage scan_storage;
  __shared__ uint32_t block_base;
  const int64_t expert = global_thread();
  const uint32_t count = expert < num_experts ? schedule.segment_end[expert] : 0;
  uint32_t begin = 0;
  uint32_t block_total = 0;
  BlockScan(scan_storage).ExclusiveSum(count, begin, block_total);
  if (threadIdx.x == 0) block_base = atomicAdd(&schedule.counters->num_positions, block_total);
  __syncthreads();
  begin += block_base;
  if (expert < num_experts) {
    schedule.segment_begin[expert] = begin;
    schedule.segment_end[expert] = begin + count;
  }
  if (count > ScheduleTuning::kHugeSegment) {
    huge_experts[atomicAdd(&schedule.counters->num_huge, 1u)] = static_cast<int32_t>(expert);
  }
  warp_list_long_segments(schedule, static_cast<int32_t>(expert), count);
}

__global__ void __launch_bounds__(kThreads)
    place_pairs_kernel(const void* indices, IndexType index_type, int64_t num_pairs,
                       const uint32_t* segment_begin, const uint32_t* rank, uint32_t* pairs) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t pair = global_thread();
  if (pair >= num_pairs) return;
  const int64_t expert = load_index(indices, index_type, pair);
  pairs[segment_begin[expert] + rank[pair]] = static_cast<uint32_t>(pair);
}

// A thread per position: the pair's place in its segment is the number of smaller pair ids there.
__device__ __forceinline__ void order_short_segment(const void* indices, IndexType index_type,
                                                    int64_t position, const uint32_t* pairs,
                                                    const ExpertSchedule& schedule) {
  const uint32_t pair = pairs[position];
  const int64_t expert = load_index(indices, index_type, pair);
  const uint32_t begin = schedule.segment_begin[expert];
  const uint32_t end = schedule.segment_end[expert];
  if (end - begin > ScheduleTuning::kHugeSegment) return;
  uint32_t smaller = 0;
#pragma unroll 4
  for (uint32_t i = begin; i < end; ++i) smaller += pairs[i] < pair;
  schedule.pair_position[pair] = begin + smaller;
}

// Huge segments are read off the indices instead, in order. The pairs are cut into chunks; a block
// counts the expert's pairs before its chunk (in parallel, at the speed of L2) and then numbers
// those within. With more huge experts than blocks a chunk is everything and nothing is recounted.
__device__ void order_huge_segments(const void* indices, IndexType index_type, int64_t num_pairs,
                                    const int32_t* huge_experts, const ExpertSchedule& schedule,
                                    int first_task, int num_workers) {
  using BlockReduce = cub::BlockReduce<uint32_t, kThreads>;
  using BlockScan = cub::BlockScan<uint32_t, kThreads>;
  __shared__ union {
    typename BlockReduce::TempStorage reduce;
    typename BlockScan::TempStorage scan;
  } storage;
  __shared__ uint32_t before_chunk;
  const int num_huge = static_cast<int>(schedule.counters->num_huge);
  if (num_huge == 0) return;
  const int num_chunks = num_workers > num_huge ? num_workers / num_huge : 1;
  const int64_t steps = (num_pairs + kThreads - 1) / kThreads;
  const int64_t chunk_pairs = (steps + num_chunks - 1) / num_chunks * kThreads;

  for (int task = first_task; task < num_huge * num_chunks; task += num_workers) {
    const int32_t expert = huge_experts[task / num_chunks];
    const int64_t chunk_begin = task % num_chunks * chunk_pairs;
    if (chunk_begin >= num_pairs) continue;  // uniform: the last chunks may be empty
    const int64_t chunk_end = min(chunk_begin + chunk_pairs, num_pairs);
    // 1. The expert's pairs before the chunk.
    uint32_t count = 0;
#pragma unroll 8
    for (int64_t pair = threadIdx.x; pair < chunk_begin; pair += kThreads) {
      count += load_index(indices, index_type, pair) == expert;
    }
    const uint32_t total = BlockReduce(storage.reduce).Sum(count);
    if (threadIdx.x == 0) before_chunk = total;
    __syncthreads();
    // 2. Those within, in order.
    uint32_t position = schedule.segment_begin[expert] + before_chunk;
    for (int64_t first = chunk_begin; first < chunk_end; first += kThreads) {
      const int64_t pair = first + threadIdx.x;
      const bool mine = pair < chunk_end && load_index(indices, index_type, pair) == expert;
      uint32_t rank = 0;
      uint32_t found = 0;
      BlockScan(storage.scan).ExclusiveSum(static_cast<uint32_t>(mine), rank, found);
      if (mine) schedule.pair_position[pair] = position + rank;
      position += found;
      __syncthreads();  // before the storage is used again
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    order_segments_kernel(const void* indices, IndexType index_type, int64_t num_pairs,
                          const uint32_t* pairs, const int32_t* huge_experts,
                          ExpertSchedule schedule, int num_huge_workers) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (static_cast<int>(blockIdx.x) < num_huge_workers) {
    order_huge_segments(indices, index_type, num_pairs, huge_experts, schedule,
                        static_cast<int>(blockIdx.x), num_huge_workers);
    return;
  }
  const int64_t block = static_cast<int64_t>(blockIdx.x) - num_huge_workers;
  const int64_t position = block * kThreads + threadIdx.x;
  if (position < num_pairs) {
    order_short_segment(indices, index_type, position, pairs, schedule);
  }
}

cudaError_t schedule_by_counting(const ScheduleShape& shape, const void* indices,
                                 IndexType index_type, const ScheduleWorkspace& workspace,
                                 const DeviceInfo& device, cudaStream_t stream) {
  const ExpertSchedule& schedule = workspace.schedule;
  const unsigned pair_blocks = blocks_for(shape.num_pairs);
  // No huge segment can exist where all pairs together are too few for one.
  const int huge_workers = shape.num_pairs > ScheduleTuning::kHugeSegment
                               ? ScheduleTuning::kHugeBlocksPerSm * device.num_sms
                               : 0;
  return run_steps(
      [&] {
        // The counters lie right before the counts: one memset.
        const size_t bytes = reinterpret_cast<char*>(schedule.segment_end + shape.num_experts) -
                             reinterpret_cast<char*>(schedule.counters);
        return cudaMemsetAsync(schedule.counters, 0, bytes, stream);
      },
      [&] {
        count_pairs_kernel<<<pair_blocks, kThreads, 0, stream>>>(
            indices, index_type, shape.num_pairs, shape.num_experts, schedule.segment_end,
            schedule.pair_position);
        return launch_status();
      },
      [&] {
        return launch_early(allocate_segments_kernel, blocks_for(shape.num_experts), kThreads,
                            device, stream, schedule, shape.num_experts, workspace.huge_experts);
      },
      [&] {
        return launch_early(place_pairs_kernel, pair_blocks, kThreads, device, stream, indices,
                            index_type, shape.num_pairs, schedule.segment_begin,
                            schedule.pair_position, workspace.pairs);
      },
      [&] {
        return launch_early(order_segments_kernel, huge_workers + pair_blocks, kThreads, device,
                            stream, indices, index_type, shape.num_pairs, workspace.pairs,
                            workspace.huge_experts, schedule, huge_workers);
      });
}

// ---- Radix sort ---------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    make_keys_kernel(const void* indices, IndexType index_type, int64_t num_pairs,
                     int64_t num_experts, uint32_t* keys, uint32_t* pairs) {
  const int64_t pair = global_thread();
  if (pair >= num_pairs) return;
  keys[pair] = static_cast<uint32_t>(load_expert_id(indices, index_type, pair, num_experts));
  pairs[pair] = static_cast<uint32_t>(pair);
}

__global__ void __launch_bounds__(kThreads)
    mark_segments_kernel(const uint32_t* keys, const uint32_t* pairs, int64_t num_pairs,
                         ExpertSchedule schedule) {
  const int64_t position = global_thread();
  if (position >= num_pairs) return;
  const uint32_t expert = keys[position];
  if (position == 0 || keys[position - 1] != expert) {
    schedule.segment_begin[expert] = static_cast<uint32_t>(position);
  }
  if (position == num_pairs - 1 || keys[position + 1] != expert) {
    schedule.segment_end[expert] = static_cast<uint32_t>(position + 1);
  }
  schedule.pair_position[pairs[position]] = static_cast<uint32_t>(position);
}

__global__ void __launch_bounds__(kThreads)
    list_long_segments_kernel(ExpertSchedule schedule, int64_t num_experts) {
  const int64_t expert = global_thread();
  const uint32_t length =
      expert < num_experts ? schedule.segment_end[expert] - schedule.segment_begin[expert] : 0;
  warp_list_long_segments(schedule, static_cast<int32_t>(expert), length);
}

// With null storage the sort only reports the size it needs.
cudaError_t sort_pairs(const ScheduleShape& shape, const ScheduleWorkspace& workspace,
                       void* storage, size_t* storage_bytes, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(storage, *storage_bytes, workspace.keys[0],
                                         workspace.keys[1], workspace.pairs, workspace.pairs_sorted,
                                         static_cast<int>(shape.num_pairs), 0,
                                         key_bits(shape.num_experts), stream);
}

cudaError_t schedule_by_sorting(const ScheduleShape& shape, const void* indices,
                                IndexType index_type, const SchedulePlan& plan,
                                const ScheduleWorkspace& workspace, cudaStream_t stream) {
  const ExpertSchedule& schedule = workspace.schedule;
  size_t storage_bytes = plan.sort_storage_bytes;
  return run_steps(
      [&] {
        // Counters, ends and begins: experts without pairs stay empty.
        const size_t bytes = reinterpret_cast<char*>(schedule.segment_begin + shape.num_experts) -
                             reinterpret_cast<char*>(schedule.counters);
        return cudaMemsetAsync(schedule.counters, 0, bytes, stream);
      },
      [&] {
        make_keys_kernel<<<blocks_for(shape.num_pairs), kThreads, 0, stream>>>(
            indices, index_type, shape.num_pairs, shape.num_experts, workspace.keys[0],
            workspace.pairs);
        return launch_status();
      },
      [&] { return sort_pairs(shape, workspace, workspace.sort_storage, &storage_bytes, stream); },
      [&] {
        mark_segments_kernel<<<blocks_for(shape.num_pairs), kThreads, 0, stream>>>(
            workspace.keys[1], workspace.pairs_sorted, shape.num_pairs, schedule);
        return launch_status();
      },
      [&] {
        list_long_segments_kernel<<<blocks_for(shape.num_experts), kThreads, 0, stream>>>(
            schedule, shape.num_experts);
        return launch_status();
      });
}

}  // namespace

// ---- Launcher -----------------------------------------------------------------------------------

size_t sort_storage_bytes(const ScheduleShape& shape) {
  size_t bytes = 0;
  return sort_pairs(shape, {}, nullptr, &bytes, nullptr) == cudaSuccess ? bytes : 0;
}

cudaError_t schedule_pairs(const ScheduleShape& shape, const void* indices, IndexType index_type,
                           const SchedulePlan& plan, const ScheduleWorkspace& workspace,
                           const DeviceInfo& device, cudaStream_t stream) {
  if (shape.num_pairs == 0) {
    const size_t bytes =
        reinterpret_cast<char*>(workspace.schedule.segment_begin + shape.num_experts) -
        reinterpret_cast<char*>(workspace.schedule.counters);
    return cudaMemsetAsync(workspace.schedule.counters, 0, bytes, stream);
  }
  return plan.by_counting
             ? schedule_by_counting(shape, indices, index_type, workspace, device, stream)
             : schedule_by_sorting(shape, indices, index_type, plan, workspace, stream);
}

}  // namespace omni_moe::cuda
