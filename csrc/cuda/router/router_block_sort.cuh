// Sorts lists of a token's keys in descending order: warps sort chunks in registers, then the block
// merges them. Lists of any length may lie in shared or in global memory, which is why this is not
// cub::BlockMergeSort, whose keys are a fixed number per thread in registers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/operands.h"
#include "cuda/common/reduce.cuh"
#include "cuda/router/router_tuning.h"
#include "cuda/router/warp_sort.cuh"

namespace omni_moe::cuda::router_block {

inline constexpr int kThreads = RouterBlockTuning::kThreads;
inline constexpr int kWarps = kThreads / kWarpSize;
inline constexpr int kSortItems = 4;  // per lane
inline constexpr int kChunk = kSortItems * kWarpSize;

// out[0 … n) = load(0 … n), sorted within chunks. `first_warp` rotates the warps, so that two lists
// can be sorted side by side.
template <class Key, class Load>
__device__ __forceinline__ void block_sort_chunks(int n, Key* out, int first_warp, Load load) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = (threadIdx.x / kWarpSize + first_warp) % kWarps;
  for (int base = warp * kChunk; base < n; base += kWarps * kChunk) {
    Key keys[kSortItems];
#pragma unroll
    for (int i = 0; i < kSortItems; ++i) {
      const int source = base + i * kWarpSize + lane;
      keys[i] = source < n ? load(source) : 0;
    }
    __syncwarp();  // `out` may be what was loaded
    warp_sort_descending(keys);
#pragma unroll
    for (int i = 0; i < kSortItems; ++i) {
      const int target = base + lane * kSortItems + i;
      if (target < n) out[target] = keys[i];
    }
  }
}

// Merges each two neighbouring runs of `width` of `in` into `out`. Each thread finds by bisection
// where its stretch of the output begins in both runs, then merges serially. Keys are distinct.
template <class Key>
__device__ __forceinline__ void block_merge_runs(const Key* in, Key* out, int n, int width,
                                                 int thread) {
  const int stretch = ceil_div(n, kThreads) | 1;  // odd: neighbours write to different banks
  int target = min(thread * stretch, n);
  const int target_end = min(target + stretch, n);
  while (target < target_end) {
    const int first = target / (2 * width) * (2 * width);
    const int second = min(first + width, n);
    const int end = min(second + width, n);
    const int diagonal = target - first;
    // How many of the first `diagonal` merged keys come from the first run.
    int low = max(0, diagonal - (end - second));
    int high = min(diagonal, second - first);
    while (low < high) {
      const int middle = (low + high) / 2;
      if (in[first + middle] > in[second + diagonal - middle - 1])
        low = middle + 1;
      else
        high = middle;
    }
    int a = first + low;
    int b = second + diagonal - low;
    for (const int stop = min(target_end, end); target < stop; ++target) {
      const bool take_first = b >= end || (a < second && in[a] > in[b]);
      out[target] = in[take_first ? a++ : b++];
    }
  }
}

// Merges the sorted chunks of `from` into one sorted list; returns which of the two buffers holds
// it.
__device__ __forceinline__ const uint64_t* block_merge_chunks(uint64_t* from, uint64_t* to, int n) {
  for (int width = kChunk; width < n; width *= 2) {
    __syncthreads();
    block_merge_runs(from, to, n, width, threadIdx.x);
    uint64_t* merged = to;
    to = from;
    from = merged;
  }
  __syncthreads();
  return from;
}

}  // namespace omni_moe::cuda::router_block
