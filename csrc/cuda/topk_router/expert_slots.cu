// Places of pairs in their experts' queues, by a scan: each block, a warp, counts the experts of
// its stretch of pairs; the counts are scanned over the blocks; then each block numbers its pairs
// from where the blocks before it end. No atomics in global memory, the same slots every run.
// Bytes moved: P ids in twice, P slots out, and four times E counts a block.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/topk_router/block_counts.h"
#include "cuda/topk_router/topk_router_tuning.h"
#include "cuda/topk_router/topk_scores.cuh"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

namespace {

// A block's stretch of the pairs.
struct Stretch {
  int64_t begin;
  int64_t end;

  __device__ Stretch(int64_t num_pairs, int pairs_per_block)
      : begin(int64_t{blockIdx.x} * pairs_per_block),
        end(min(begin + pairs_per_block, num_pairs)) {}
};

__global__ void __launch_bounds__(kWarpSize)
    expert_slots_count_kernel(const ExpertSlotsParams params, int pairs_per_block) {
  extern __shared__ int32_t counts[];  // [E]
  let_next_kernel_start();
  const int lane = threadIdx.x;
  for (int64_t e = lane; e < params.num_experts; e += kWarpSize) counts[e] = 0;
  __syncwarp();
  wait_for_previous_kernel();
  const Stretch stretch(params.num_pairs, pairs_per_block);
  for (int64_t pair = stretch.begin + lane; pair < stretch.end; pair += kWarpSize) {
    const int32_t id = load_id_or_none(params.indices, pair, params.num_experts);
    if (id >= 0) atomicAdd(&counts[id], 1);
  }
  __syncwarp();
  int32_t* row = static_cast<int32_t*>(params.workspace) + blockIdx.x * params.num_experts;
  for (int64_t e = lane; e < params.num_experts; e += kWarpSize) row[e] = counts[e];
}

// The workspace has the pairs of each expert before each block, unless there is one block.
__global__ void __launch_bounds__(kWarpSize)
    expert_slots_place_kernel(const ExpertSlotsParams params, int pairs_per_block) {
  extern __shared__ int32_t queued[];  // [E]
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int lane = threadIdx.x;
  const int32_t* row =
      static_cast<const int32_t*>(params.workspace) + blockIdx.x * params.num_experts;
  for (int64_t e = lane; e < params.num_experts; e += kWarpSize) {
    queued[e] = gridDim.x == 1 ? 0 : row[e];
  }
  __syncwarp();
  const Stretch stretch(params.num_pairs, pairs_per_block);
  for (int64_t first = stretch.begin; first < stretch.end; first += kWarpSize) {
    const int64_t pair = first + lane;
    const bool is_pair = pair < stretch.end;
    const int32_t id = is_pair ? load_id_or_none(params.indices, pair, params.num_experts) : -1;
    const unsigned peers = __match_any_sync(kFullWarp, id);
    const int before = __popc(peers & ((1u << lane) - 1));
    const int32_t slot = id >= 0 ? queued[id] + before : -1;
    __syncwarp();
    if (id >= 0 && before + 1 == __popc(peers)) queued[id] = slot + 1;
    __syncwarp();
    if (is_pair) params.slots[pair] = slot < params.capacity ? slot : -1;
  }
}

}  // namespace

cudaError_t expert_slots(const ExpertSlotsParams& params, const ExpertSlotsPlan& plan,
                         cudaStream_t stream) {
  if (params.num_experts > TopKRouterTuning::kMaxExperts) return cudaErrorInvalidValue;
  if (params.num_pairs > INT32_MAX) return cudaErrorInvalidValue;
  if (params.num_pairs == 0) return cudaSuccess;
  const LaunchOptions options{dim3(static_cast<unsigned>(plan.num_blocks)), kWarpSize,
                              params.num_experts * sizeof(int32_t)};
  const bool needs_scan = plan.num_blocks > 1;
  return run_steps(
      [&] {
        if (!needs_scan) return cudaSuccess;
        return launch_early(expert_slots_count_kernel, options, plan.device, stream, params,
                            plan.pairs_per_block);
      },
      [&] {
        if (!needs_scan) return cudaSuccess;
        return scan_block_counts(static_cast<int32_t*>(params.workspace), plan.num_blocks,
                                 params.num_experts, /*totals=*/nullptr, plan.device, stream);
      },
      [&] {
        return launch_early(expert_slots_place_kernel, options, plan.device, stream, params,
                            plan.pairs_per_block);
      });
}

}  // namespace omni_moe::cuda
