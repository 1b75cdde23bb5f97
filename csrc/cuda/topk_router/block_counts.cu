// Sums of counts over blocks. A kernel that counts adds up in shared memory and writes a row for
// each block: no memory has to be zero before it starts, and nothing needs atomics in global
// memory. Bytes moved: the counts once for sums, three times for a scan; mostly in L2.
#include <cuda_runtime.h>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/operands.h"
#include "cuda/common/reduce.cuh"
#include "cuda/topk_router/block_counts.h"

namespace omni_moe::cuda {

namespace {

constexpr int kParts = 32;  // warps of a block, each of which takes a part of the rows
constexpr int kThreads = kParts * kWarpSize;

// A block has 32 columns. The totals are written, unless null; kIsScan: each count becomes the sum
// of those above it.
template <bool kIsScan>
__global__ void __launch_bounds__(kThreads)
    scan_block_counts_kernel(int32_t* block_counts, int64_t num_blocks, int64_t num_experts,
                             int64_t* totals) {
  __shared__ int32_t sums[kParts][kWarpSize];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int lane = threadIdx.x % kWarpSize;
  const int part = threadIdx.x / kWarpSize;
  const int64_t expert = int64_t{blockIdx.x} * kWarpSize + lane;
  const bool is_expert = expert < num_experts;
  const int64_t rows = ceil_div<int64_t>(num_blocks, kParts);
  const int64_t begin = part * rows;
  const int64_t end = min(begin + rows, num_blocks);

  // 1. Each part's sum.
  int32_t sum = 0;
  if (is_expert) {
#pragma unroll 8
    for (int64_t row = begin; row < end; ++row) sum += block_counts[row * num_experts + expert];
  }
  sums[part][lane] = sum;
  __syncthreads();
  if (!is_expert) return;

  // 2. What lies above the part, or all.
  if constexpr (kIsScan) {
    int32_t above = 0;
    for (int other = 0; other < part; ++other) above += sums[other][lane];
#pragma unroll 4
    for (int64_t row = begin; row < end; ++row) {
      int32_t& count = block_counts[row * num_experts + expert];
      const int32_t own = count;
      count = above;
      above += own;
    }
    if (part == kParts - 1 && totals != nullptr) totals[expert] = above;
  } else if (part == 0) {
    int64_t total = 0;
#pragma unroll
    for (int other = 0; other < kParts; ++other) total += sums[other][lane];
    totals[expert] = total;
  }
}

unsigned blocks_for(int64_t num_experts) {
  return static_cast<unsigned>(ceil_div<int64_t>(num_experts, kWarpSize));
}

}  // namespace

cudaError_t sum_block_counts(int32_t* block_counts, int64_t num_blocks, int64_t num_experts,
                             int64_t* totals, const DeviceInfo& device, cudaStream_t stream) {
  return launch_early(scan_block_counts_kernel<false>, blocks_for(num_experts), kThreads, device,
                      stream, block_counts, num_blocks, num_experts, totals);
}

cudaError_t scan_block_counts(int32_t* block_counts, int64_t num_blocks, int64_t num_experts,
                              int64_t* totals, const DeviceInfo& device, cudaStream_t stream) {
  return launch_early(scan_block_counts_kernel<true>, blocks_for(num_experts), kThreads, device,
                      stream, block_counts, num_blocks, num_experts, totals);
}

}  // namespace omni_moe::cuda
