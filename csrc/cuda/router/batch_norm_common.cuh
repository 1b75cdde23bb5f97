// What BatchNorm's forward and backward share: how blocks and threads lie over tokens and columns,
// and statistics of columns merged over threads, block and grid.
//
// A block owns kPanelColumns columns of one axis over a stretch of the tokens. It reads them once
// into registers, as far as they fit, and writes the stretch's statistics to the workspace; after a
// barrier of the grid it merges those of its columns and computes its results out of its registers.
// Every sum has an order given by the shape and the device alone: no atomics, the same bits every
// run.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/router/batch_norm_grid.h"
#include "cuda/router/router_tuning.h"
#include "omni_moe/batch_norm.h"

namespace omni_moe::cuda::batch_norm {

inline constexpr int kThreads = BatchNormTuning::kThreads;
inline constexpr int kBlocksPerSm = BatchNormTuning::kBlocksPerSm;
inline constexpr int kPanelColumns = BatchNormTuning::kPanelColumns;
inline constexpr int kWarps = kThreads / kWarpSize;
static_assert(kPanelColumns == kWarpSize, "a warp reads one partial of each column");

// How the threads of a block lie over its columns: kLanes side by side, each a vector of columns,
// kSlots rows at once.
template <class T, int kVec>
struct Tiling {
  static constexpr int kLanes = kPanelColumns / kVec;
  static constexpr int kSlots = BatchNormTuning::slots(kVec);
  static constexpr int kForwardRows = BatchNormTuning::forward_rows(kVec);
  static constexpr int kBackwardRows = BatchNormTuning::backward_rows(kVec);
};

// ---- Partial statistics -------------------------------------------------------------------------

// Of `count` values of one column.
struct Moments {
  float count;
  float mean;
  float m2;  // Σ (x - mean)²
};

// Merges moments in the order of the calls, as sums relative to the first mean. These lose at most
// the digits of a number that is (values merged) / (values behind the first mean) times the result.
class MomentsMerger {
 public:
  __device__ void add(float count, float mean, float m2) {
    base_ = count_ == 0.0f ? mean : base_;
    const float distance = mean - base_;
    const float weighted = count * distance;
    count_ += count;
    sum_ += weighted;
    squares_ += weighted * distance;
    m2_ += m2;
  }
  // Merges the same columns of the lane `offset` further by Chan's formula.
  template <int kVec>
  __device__ static __forceinline__ void add_lane(int offset, float& count, float (&mean)[kVec],
                                                  float (&m2)[kVec]) {
    const float more = __shfl_down_sync(kFullWarp, count, offset);
    const float share = more / fmaxf(count + more, 1.0f);
    const float cross = count * share;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float distance = __shfl_down_sync(kFullWarp, mean[i], offset) - mean[i];
      mean[i] += distance * share;
      m2[i] += __shfl_down_sync(kFullWarp, m2[i], offset) + distance * distance * cross;
    }
    count += more;
  }
  __device__ Moments get() const {
    const float shift = sum_ / fmaxf(count_, 1.0f);
    const float spread = squares_ - sum_ * shift;
    return {count_, base_ + shift, m2_ + (spread < 0.0f ? 0.0f : spread)};  // NaN stays
  }

 private:
  float count_ = 0.0f;
  float base_ = 0.0f;
  float sum_ = 0.0f;
  float squares_ = 0.0f;
  float m2_ = 0.0f;
};

// Two sums of one column. SumsMerger has the interface of MomentsMerger.
struct Sums {
  float count;
  float first;
  float second;
};

class SumsMerger {
 public:
  __device__ void add(float count, float first, float second) {
    total_.count += count;
    total_.first += first;
    total_.second += second;
  }
  template <int kVec>
  __device__ static __forceinline__ void add_lane(int offset, float& count, float (&first)[kVec],
                                                  float (&second)[kVec]) {
    count += __shfl_down_sync(kFullWarp, count, offset);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      first[i] += __shfl_down_sync(kFullWarp, first[i], offset);
      second[i] += __shfl_down_sync(kFullWarp, second[i], offset);
    }
  }
  __device__ Sums get() const { return total_; }

 private:
  Sums total_{};
};

// Partials of the block's columns, one of each column per warp.
using WarpPartials = float[kWarps][3][kPanelColumns];

// Gives every thread the merged partials of column threadIdx.x % kPanelColumns.
template <class Merger>
__device__ __forceinline__ auto merge_warps(const WarpPartials& partials) {
  const int column = threadIdx.x % kPanelColumns;
  __syncthreads();
  Merger total;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    total.add(partials[w][0][column], partials[w][1][column], partials[w][2][column]);
  }
  __syncthreads();  // before they are written again
  return total.get();
}

// ---- A block's share ----------------------------------------------------------------------------

// kPanelColumns columns of one axis over one part of the tokens, and this thread's place in them.
struct Tile {
  bool is_y;
  int panel;
  int part;
  int64_t begin, end;    // tokens
  int64_t num_tokens;    // of all parts
  int64_t axis_width;    // columns of the axis
  int64_t axis_begin;    // the axis' first column among both
  int64_t first_column;  // of the panel in its axis

  __device__ Tile(const BatchNormGrid& grid, int round, int64_t num_tokens, int64_t num_rows,
                  int64_t num_cols)
      : num_tokens(num_tokens) {
    panel = round * grid.panels_per_round + blockIdx.x % grid.panels_per_round;
    part = blockIdx.x / grid.panels_per_round;
    begin = part * grid.tokens_per_part;
    end = min(num_tokens, begin + grid.tokens_per_part);
    is_y = panel >= grid.panels_x;
    axis_width = is_y ? num_cols : num_rows;
    axis_begin = is_y ? num_rows : 0;
    first_column = int64_t{is_y ? panel - grid.panels_x : panel} * kPanelColumns;
  }
  __device__ bool has(int column) const { return first_column + column < axis_width; }
};

// The rows of a tile that a thread reads: from `row` on, every kSlots-th, kRows at a time.
template <class T, int kVec>
struct ThreadRows {
  using Threads = Tiling<T, kVec>;
  int column;  // within the panel
  int64_t row;
  int count;

  __device__ explicit ThreadRows(const Tile& tile)
      : column(threadIdx.x % Threads::kLanes * kVec),
        row(tile.begin + threadIdx.x / Threads::kLanes),
        count(tile.has(column) ? rows_from(tile.end - row) : 0) {}

  __device__ static int rows_from(int64_t rest) {
    return rest > 0 ? static_cast<int>((rest + Threads::kSlots - 1) / Threads::kSlots) : 0;
  }

  template <int kRows>
  __device__ __forceinline__ void load(const T* column_of_row_0, int64_t stride, int first,
                                       Vec<T, kVec> (&rows)[kRows]) const {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      rows[j] = first + j < count
                    ? load_vec_readonly<Vec<T, kVec>>(column_of_row_0 + at(first + j) * stride)
                    : Vec<T, kVec>{};
    }
  }
  // Keeps the compiler from holding the unpacked values of `rows`, which take twice the registers.
  template <int kRows>
  __device__ static __forceinline__ void keep_packed(Vec<T, kVec> (&rows)[kRows]) {
    if constexpr (sizeof(T) * kVec == 16) {
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        auto* words = reinterpret_cast<unsigned*>(rows[j].data);
        asm volatile("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]));
      }
    }
  }
  __device__ int64_t at(int i) const { return row + int64_t{i} * Threads::kSlots; }
};

// Which of the rows that a thread holds, kRows from `first` on, are those of tokens that count.
// Without a mask it is the first ones.
template <bool kMasked>
struct CountedRows {
  int count;      // how many
  unsigned bits;  // which, with a mask

  template <int kRows, class Rows>
  __device__ static __forceinline__ CountedRows of(const Rows& rows, const bool* token_mask,
                                                   int first) {
    const int count = min(rows.count - first, kRows);
    if constexpr (!kMasked) return {count, 0};
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (j < count && token_mask[rows.at(first + j)]) bits |= 1u << j;
    }
    return {__popc(bits), bits};
  }
  __device__ __forceinline__ bool has(int j) const {
    return kMasked ? (bits >> j & 1u) != 0 : j < count;
  }
};

// Merges two numbers of each of a thread's columns, taken over num_rows of its rows, over all
// threads of the block.
template <class Merger, class T, int kVec>
__device__ __forceinline__ auto merge_threads(const ThreadRows<T, kVec>& rows, int num_rows,
                                              WarpPartials& partials, float (&first)[kVec],
                                              float (&second)[kVec]) {
  float count = static_cast<float>(num_rows);
#pragma unroll
  for (int offset = kWarpSize / 2; offset >= Tiling<T, kVec>::kLanes; offset /= 2) {
    Merger::add_lane(offset, count, first, second);
  }
  if (threadIdx.x % kWarpSize < Tiling<T, kVec>::kLanes) {
    auto& mine = partials[threadIdx.x / kWarpSize];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      mine[0][rows.column + i] = count;
      mine[1][rows.column + i] = first[i];
      mine[2][rows.column + i] = second[i];
    }
  }
  return merge_warps<Merger>(partials);
}

// Merges the blocks' partials over all parts: writes this block's to the workspace, waits for the
// grid, and merges those of the panel's columns. Blocks without a panel (in_use false) wait too.
// Only with a mask must a block say how many tokens it has: behind the partials of all blocks.
template <class Merger, bool kMasked, class Partial>
__device__ __forceinline__ auto merge_grid(const BatchNormGrid& grid, const Tile& tile, bool in_use,
                                           const Partial& own, WarpPartials& warp_partials,
                                           void* workspace) {
  const int column = threadIdx.x % kPanelColumns;
  const int warp = threadIdx.x / kPanelColumns;
  float2* partials = static_cast<float2*>(workspace) +
                     int64_t{tile.panel} * grid.num_parts * kPanelColumns + column;
  float* counts =
      reinterpret_cast<float*>(static_cast<float2*>(workspace) +
                               int64_t{grid.num_panels} * grid.num_parts * kPanelColumns) +
      int64_t{tile.panel} * grid.num_parts;
  if (in_use && threadIdx.x < kPanelColumns) {
    const auto [count, first, second] = own;
    partials[tile.part * kPanelColumns] = make_float2(first, second);
    if (kMasked && threadIdx.x == 0) counts[tile.part] = count;
  }
  cooperative_groups::this_grid().sync();
  let_next_kernel_start();
  Merger merger;
  const int num_parts = in_use ? grid.num_parts : 0;
#pragma unroll 4
  for (int i = warp; i < num_parts; i += kWarps) {
    const int64_t rest = tile.num_tokens - i * grid.tokens_per_part;
    const float2 partial = __ldcg(partials + i * kPanelColumns);  // from L2: of other blocks
    const float count =
        kMasked ? __ldcg(counts + i) : static_cast<float>(min(rest, grid.tokens_per_part));
    merger.add(count, partial.x, partial.y);
  }
  const auto [count, first, second] = merger.get();
  warp_partials[warp][0][column] = count;
  warp_partials[warp][1][column] = first;
  warp_partials[warp][2][column] = second;
  return merge_warps<Merger>(warp_partials);
}

// ---- Running statistics -------------------------------------------------------------------------

// Running statistics of an axis, stored in T or fp32.
template <class T>
struct RunningStatistics {
  BatchNormBuffers buffers;
  bool is_float;

  __device__ RunningStatistics(const BatchNormForwardParams& params, bool is_y)
      : buffers(is_y ? params.y : params.x), is_float(params.stats_dtype == DType::kFloat32) {}

  __device__ float load(const void* running, int64_t i) const {
    return is_float ? static_cast<const float*>(running)[i]
                    : to_float(static_cast<const T*>(running)[i]);
  }
  __device__ void update(void* running, int64_t i, float momentum, float value) const {
    if (running == nullptr) return;
    const float updated = momentum * value + (1.0f - momentum) * load(running, i);
    if (is_float) {
      static_cast<float*>(running)[i] = updated;
    } else {
      static_cast<T*>(running)[i] = from_float<T>(updated);
    }
  }
};

// ---- Host ---------------------------------------------------------------------------------------

// A barrier of the grid needs all its blocks on the device at once, which a cooperative launch sees
// to. Where the stream has only some of the device's SMs (a green context, a share of MPS), fewer
// blocks are tried until they fit.
template <class Params>
cudaError_t launch(void (*kernel)(Params, BatchNormGrid), const Params& params,
                   const BatchNormPlan& plan, int vec, int rows, cudaStream_t stream) {
  if (params.training && !plan.device.has_cooperative_launch) return cudaErrorNotSupported;
  BatchNormGrid grid = plan.grid;
  for (int num_sms = plan.device.num_sms;;) {
    LaunchOptions options{dim3(static_cast<unsigned>(grid.panels_per_round * grid.num_parts)),
                          kThreads};
    options.is_cooperative = params.training;
    const cudaError_t status = launch_kernel(kernel, options, stream, params, grid);
    if (status != cudaErrorCooperativeLaunchTooLarge || num_sms <= 1) return status;
    num_sms /= 2;
    grid = plan_batch_norm_grid(params.num_tokens, params.num_rows, params.num_cols, vec, rows,
                                num_sms);
  }
}

}  // namespace omni_moe::cuda::batch_norm
