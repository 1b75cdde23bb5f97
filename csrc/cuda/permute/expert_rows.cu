// Rows of pairs in expert order, by a counting sort: each block, a warp, counts the experts of its
// stretch of pairs; the counts are scanned over the blocks; then each block adds up the experts'
// totals and numbers its pairs from where their expert begins. No atomics in global memory, the
// same rows every run. Bytes moved: P ids (and slots) in twice, P rows out, and four times E counts
// a block, all of it in L2: such a call is bound by its launches.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/expert_id.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/warp_scan.cuh"
#include "cuda/common/workspace.h"
#include "cuda/permute/permute_tuning.h"
#include "cuda/topk_router/block_counts.h"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

namespace {

struct Workspace {
  int32_t* block_counts;  // [blocks, E]
  int64_t* totals;        // [E]

  Workspace(const ExpertRowsParams& params, const ExpertRowsPlan& plan) {
    WorkspaceCutter cutter(params.workspace);
    block_counts = cutter.take<int32_t>(plan.num_blocks * params.num_experts);
    totals = cutter.take<int64_t>(params.num_experts);
  }
};

// ---- Device helpers -----------------------------------------------------------------------------

// The pair's expert, or -1 where the pair has no place in its queue.
__device__ __forceinline__ int32_t load_queued_id(const ExpertRowsParams& params, int64_t pair) {
  const int32_t id = load_id_or_none(params.indices, pair, params.num_experts);
  return params.slots != nullptr && params.slots[pair] < 0 ? -1 : id;
}

// Adds the pairs of each expert in [begin, end) to the counts, which start at zero here.
__device__ __forceinline__ void warp_count_pairs(const ExpertRowsParams& params, int64_t begin,
                                                 int64_t end, unsigned* counts) {
  const int lane = threadIdx.x;
  for (int64_t e = lane; e < params.num_experts; e += kWarpSize) counts[e] = 0;
  __syncwarp();
  for (int64_t pair = begin + lane; pair < end; pair += kWarpSize) {
    const int32_t id = load_queued_id(params, pair);
    if (id >= 0) atomicAdd(&counts[id], 1u);
  }
  __syncwarp();
}

// ---- Kernels ------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kWarpSize)
    expert_rows_count_kernel(const ExpertRowsParams params, int pairs_per_block,
                             int32_t* block_counts) {
  extern __shared__ unsigned counts[];  // [E]
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t begin = int64_t{blockIdx.x} * pairs_per_block;
  warp_count_pairs(params, begin, min(begin + pairs_per_block, params.num_pairs), counts);
  int32_t* row = block_counts + blockIdx.x * params.num_experts;
  for (int64_t e = threadIdx.x; e < params.num_experts; e += kWarpSize) {
    row[e] = static_cast<int32_t>(counts[e]);
  }
}

// block_counts has the pairs of each expert before each block; one block alone counts for itself.
__global__ void __launch_bounds__(kWarpSize)
    expert_rows_place_kernel(const ExpertRowsParams params, int pairs_per_block,
                             const int32_t* block_counts, const int64_t* totals) {
  extern __shared__ unsigned next_row[];  // [E] which pairs past a capacity may take to 2^32
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int lane = threadIdx.x;
  const bool is_padded = params.capacity >= 0;
  const bool is_alone = gridDim.x == 1;
  const int64_t first = int64_t{blockIdx.x} * pairs_per_block;
  const int64_t last = min(first + pairs_per_block, params.num_pairs);

  // 1. Where each expert begins and ends, and where its pairs of this block go on.
  if (is_alone) warp_count_pairs(params, first, last, next_row);
  const int32_t* before = block_counts + blockIdx.x * params.num_experts;
  unsigned sum = 0;
  for (int64_t base = 0; base < params.num_experts; base += kWarpSize) {
    const int64_t e = base + lane;
    const bool is_expert = e < params.num_experts;
    const int64_t total = !is_expert ? 0 : is_alone ? next_row[e] : totals[e];
    const unsigned end_in_order = sum + warp_inclusive_scan(static_cast<unsigned>(total));
    sum = __shfl_sync(kFullWarp, end_in_order, kWarpSize - 1);
    if (!is_expert) continue;
    const int64_t begin = is_padded ? e * params.capacity : int64_t{end_in_order} - total;
    const int64_t end = begin + (is_padded ? min(total, params.capacity) : total);
    if (blockIdx.x == 0) params.expert_ends[e] = static_cast<int32_t>(end);
    const bool in_order = params.slots == nullptr;
    next_row[e] = static_cast<unsigned>(begin + (in_order && !is_alone ? before[e] : 0));
  }
  __syncwarp();

  // 2. The pairs: by their slots, or numbered in the order in which they lie.
  for (int64_t base = first; base < last; base += kWarpSize) {
    const int64_t pair = base + lane;
    const bool is_pair = pair < last;
    const int32_t id = is_pair ? load_queued_id(params, pair) : -1;
    int64_t row = -1;
    if (params.slots != nullptr) {
      if (id >= 0) row = int64_t{next_row[id]} + params.slots[pair];
    } else {
      const unsigned peers = __match_any_sync(kFullWarp, id);
      const int place = __popc(peers & ((1u << lane) - 1));
      if (id >= 0) row = int64_t{next_row[id]} + place;
      __syncwarp();
      if (id >= 0 && place + 1 == __popc(peers)) next_row[id] = static_cast<unsigned>(row) + 1;
      __syncwarp();
    }
    const bool is_past_capacity = is_padded && row >= (int64_t{id} + 1) * params.capacity;
    if (is_pair) params.row_id_map[pair] = is_past_capacity ? -1 : static_cast<int32_t>(row);
  }
}

}  // namespace

cudaError_t expert_rows(const ExpertRowsParams& params, const ExpertRowsPlan& plan,
                        cudaStream_t stream) {
  if (params.num_experts > ExpertRowsTuning::kMaxExperts) return cudaErrorInvalidValue;
  if (params.num_pairs > INT32_MAX) return cudaErrorInvalidValue;
  if (params.num_experts == 0) {  // every pair is one of none
    return clear_failure(
        cudaMemsetAsync(params.row_id_map, 0xff, params.num_pairs * sizeof(int32_t), stream));
  }
  const Workspace workspace(params, plan);
  const LaunchOptions options{dim3(static_cast<unsigned>(plan.num_blocks)), kWarpSize,
                              params.num_experts * sizeof(int32_t)};
  const bool needs_scan = plan.num_blocks > 1;
  return run_steps(
      [&] {
        if (!needs_scan) return cudaSuccess;
        return launch_early(expert_rows_count_kernel, options, plan.device, stream, params,
                            plan.pairs_per_block, workspace.block_counts);
      },
      [&] {
        if (!needs_scan) return cudaSuccess;
        return scan_block_counts(workspace.block_counts, plan.num_blocks, params.num_experts,
                                 workspace.totals, plan.device, stream);
      },
      [&] {
        return launch_early(expert_rows_place_kernel, options, plan.device, stream, params,
                            plan.pairs_per_block, workspace.block_counts, workspace.totals);
      });
}

}  // namespace omni_moe::cuda
