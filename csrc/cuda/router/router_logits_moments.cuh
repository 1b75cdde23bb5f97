// Mean and Σ (x - mean)² of the columns of router_logits_sm90.cu, merged over rows of a warp, warps
// of a block and blocks of the grid. Every sum has an order given by the shape alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/operands.h"
#include "cuda/common/reduce.cuh"
#include "cuda/router/router_logits_layout.cuh"

namespace omni_moe::cuda::router_logits {

__device__ __forceinline__ int rows_within(int num_tokens, int first, int rows) {
  return min(max(num_tokens - first, 0), rows);
}

// Synchronises the threads that hold a panel's columns, by a barrier of their own: CUDA's functions
// have only barriers of the block, a tile of a warp, or in memory.
template <class B>
__device__ __forceinline__ void sync_panel(int panel) {
  asm volatile("bar.sync %0, %1;" ::"r"(panel + 1), "n"(B::kTokenTiles * kTileThreads) : "memory");
}

// Merges moments of one column as sums relative to `base`, one of the means or close to them.
class MomentSums {
 public:
  __device__ __forceinline__ explicit MomentSums(float base) : base_(base) {}

  __device__ __forceinline__ void add(int rows, float mean, float m2) {
    const float distance = mean - base_;
    const float weighted = static_cast<float>(rows) * distance;
    sum_ += weighted;
    squares_ += weighted * distance + m2;
  }
  __device__ __forceinline__ void add_lane(int mask) {
    sum_ += __shfl_xor_sync(kFullWarp, sum_, mask);
    squares_ += __shfl_xor_sync(kFullWarp, squares_, mask);
  }
  // One over the number of values -> mean, Σ (x - mean)².
  __device__ __forceinline__ float2 get(float share) const {
    const float shift = sum_ * share;
    const float m2 = squares_ - sum_ * shift;
    return make_float2(base_ + shift, m2 < 0.0f ? 0.0f : m2);  // NaN stays
  }

 private:
  float base_;
  float sum_ = 0.0f;
  float squares_ = 0.0f;
};

// Moments of the warp's 16 rows, column by column, merged in halves: of the columns that two lanes
// have in common each goes on with one half, so that at the end a lane has one column of 32.
__device__ __forceinline__ void warp_moments(const float (&d)[kRegisters], int num_rows,
                                             float2* moments) {
  const int lane = threadIdx.x % kWarpSize;
  const bool has_first = lane / 4 < num_rows, has_second = lane / 4 + 8 < num_rows;
#pragma unroll
  for (int part = 0; part < kRegisters / 16; ++part) {  // of 32 columns, 8 of them here
    float count = static_cast<float>(has_first + has_second);
    float mean[8], m2[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int at = part * 16 + i / 2 * 4 + i % 2;
      const float first = d[at], second = d[at + 2];
      const float half = 0.5f * (second - first);
      mean[i] = has_second ? first + half : first;
      m2[i] = has_second ? 2.0f * half * half : 0.0f;
    }
#pragma unroll
    for (int step = 0; step < 3; ++step) {
      const int offset = 16 >> step, kept = 4 >> step;
      const bool is_upper = (lane & offset) != 0;
      const float more = __shfl_xor_sync(kFullWarp, count, offset);
      const float share = __fdividef(more, fmaxf(count + more, 1.0f));
      const float cross = count * share;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i >= kept) break;
        const float own_mean = is_upper ? mean[i + kept] : mean[i];
        const float own_m2 = is_upper ? m2[i + kept] : m2[i];
        const float distance =
            __shfl_xor_sync(kFullWarp, is_upper ? mean[i] : mean[i + kept], offset) - own_mean;
        mean[i] = own_mean + distance * share;
        m2[i] = own_m2 + distance * distance * cross +
                __shfl_xor_sync(kFullWarp, is_upper ? m2[i] : m2[i + kept], offset);
      }
      count += more;
    }
    // Bits 4, 3 and 2 of the lane chose bits 2, 1 and 0 of i.
    const int i = (lane >> 4 & 1) * 4 + (lane >> 3 & 1) * 2 + (lane >> 2 & 1);
    moments[part * 32 + i / 2 * 8 + lane % 4 * 2 + i % 2] = make_float2(mean[0], m2[0]);
  }
}

// The panel's moments in this block -> workspace, [panel][block along the tokens][column].
template <class B>
__device__ __forceinline__ void publish_moments(const Arguments& args,
                                                const PanelStatistics<B>& statistics,
                                                const Panel& panel, int thread) {
  if (thread >= kPanelCols || panel.index >= args.num_panels) return;
  const int token = blockIdx.x * B::kTokens;
  MomentSums sums(statistics.moments[0][thread].x);
#pragma unroll
  for (int warp = 0; warp < B::kTokenTiles * kTileWarps; ++warp) {
    const float2 moments = statistics.moments[warp][thread];
    sums.add(rows_within(args.num_tokens, token + warp * kWarpRows, kWarpRows), moments.x,
             moments.y);
  }
  float2* partials =
      static_cast<float2*>(args.norm.workspace) + int64_t{panel.index} * gridDim.x * kPanelCols;
  partials[blockIdx.x * kPanelCols + thread] =
      sums.get(__fdividef(1.0f, fmaxf(rows_within(args.num_tokens, token, B::kTokens), 1.0f)));
}

// What all blocks have published -> moments of two columns over the batch, in all threads of the
// warp that take turns at the blocks: those with the same lane % kColumnPairs.
template <class B>
__device__ __forceinline__ void batch_moments(const Arguments& args, const Panel& panel,
                                              int column_pair, float2 (&moments)[2]) {
  constexpr int kMergers = kWarpSize / B::kColumnPairs;
  const auto* partials = reinterpret_cast<const float4*>(args.norm.workspace) +
                         int64_t{panel.index} * gridDim.x * (kPanelCols / 2) + column_pair;
  const int num_blocks = ceil_div(args.num_tokens, B::kTokens);
  const float4 base = __ldcg(partials);  // from L2: of other blocks
  MomentSums low(base.x), high(base.z);
#pragma unroll 16
  for (int i = threadIdx.x % kWarpSize / B::kColumnPairs; i < num_blocks; i += kMergers) {
    const float4 partial = __ldcg(partials + i * (kPanelCols / 2));
    const int rows = rows_within(args.num_tokens, i * B::kTokens, B::kTokens);
    low.add(rows, partial.x, partial.y);
    high.add(rows, partial.z, partial.w);
  }
#pragma unroll
  for (int mask = B::kColumnPairs; mask < kWarpSize; mask *= 2) {
    low.add_lane(mask);
    high.add_lane(mask);
  }
  moments[0] = low.get(args.token_share);
  moments[1] = high.get(args.token_share);
}

}  // namespace omni_moe::cuda::router_logits
