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

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/common/workspace.h"
#include "omni_moe/batch_norm.h"

namespace omni_moe::cuda::batch_norm {

inline constexpr int kThreads = 256;
inline constexpr int kBlocksPerSm = 2;  // 128 registers; the device must hold a grid at once
inline constexpr int kPanelColumns = 32;
inline constexpr int kWarps = kThreads / kWarpSize;
static_assert(kPanelColumns == kWarpSize, "a warp reads one partial of each column");

// How the threads of a block lie over its columns: kLanes side by side, each a vector of columns,
// kSlots rows at once.
template <class T, int kVec>
struct Tiling {
  static constexpr int kLanes = kPanelColumns / kVec;
  static constexpr int kSlots = kThreads / kLanes;
  // Rows of a thread in flight, or in registers: 128 bytes of vectors.
  static constexpr int kForwardRows = kVec == 1 ? 16 : 8;
  static constexpr int kBackwardRows = kVec == 1 ? 8 : 4;  // of two operands each
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

struct Plan {
  int panels_x;  // panels of the x axis, then those of the y axis
  int num_panels;
  int panels_per_round;
  int num_rounds;
  int num_parts;
  int64_t tokens_per_part;
};

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

  __device__ Tile(const Plan& plan, int round, int64_t num_tokens, int64_t num_rows,
                  int64_t num_cols)
      : num_tokens(num_tokens) {
    panel = round * plan.panels_per_round + blockIdx.x % plan.panels_per_round;
    part = blockIdx.x / plan.panels_per_round;
    begin = part * plan.tokens_per_part;
    end = min(num_tokens, begin + plan.tokens_per_part);
    is_y = panel >= plan.panels_x;
    axis_width = is_y ? num_cols : num_rows;
    axis_begin = is_y ? num_rows : 0;
    first_column = int64_t{is_y ? panel - plan.panels_x : panel} * kPanelColumns;
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

// Merges two numbers of each of a thread's columns, taken over its rows.count rows, over all
// threads of the block.
template <class Merger, class T, int kVec>
__device__ __forceinline__ auto merge_threads(const ThreadRows<T, kVec>& rows,
                                              WarpPartials& partials, float (&first)[kVec],
                                              float (&second)[kVec]) {
  float count = static_cast<float>(rows.count);
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
template <class Merger, class Partial>
__device__ __forceinline__ auto merge_grid(const Plan& plan, const Tile& tile, bool in_use,
                                           const Partial& own, WarpPartials& warp_partials,
                                           void* workspace) {
  const int column = threadIdx.x % kPanelColumns;
  const int warp = threadIdx.x / kPanelColumns;
  float2* partials = static_cast<float2*>(workspace) +
                     int64_t{tile.panel} * plan.num_parts * kPanelColumns + column;
  if (in_use && threadIdx.x < kPanelColumns) {
    const auto [count, first, second] = own;
    partials[tile.part * kPanelColumns] = make_float2(first, second);
  }
  cooperative_groups::this_grid().sync();
  let_next_kernel_start();
  Merger merger;
  const int num_parts = in_use ? plan.num_parts : 0;
#pragma unroll 4
  for (int i = warp; i < num_parts; i += kWarps) {
    const int64_t rest = tile.num_tokens - i * plan.tokens_per_part;
    const float2 partial = __ldcg(partials + i * kPanelColumns);  // from L2: of other blocks
    merger.add(static_cast<float>(min(rest, plan.tokens_per_part)), partial.x, partial.y);
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

inline int64_t panels_of(int64_t columns) { return ceil_div<int64_t>(columns, kPanelColumns); }

// held_tokens: what the registers of one block hold; slots: rows that a block reads at once.
inline Plan make_plan(int64_t num_tokens, int64_t num_rows, int64_t num_cols, int64_t slots,
                      int64_t held_tokens, int num_sms) {
  const int64_t max_blocks = int64_t{kBlocksPerSm} * num_sms;
  const int64_t panels_x = panels_of(num_rows), num_panels = panels_x + panels_of(num_cols);
  const int64_t panels_per_round = std::min(num_panels, max_blocks);
  // One block per SM where their registers hold everything, which makes the barrier cheaper.
  int64_t parts = std::max<int64_t>(1, num_sms / panels_per_round);
  if (ceil_div(num_tokens, parts) > held_tokens) parts = max_blocks / panels_per_round;
  parts = std::clamp<int64_t>(parts, 1, std::max<int64_t>(1, ceil_div(num_tokens, slots)));
  const int64_t tokens_per_part = std::max<int64_t>(1, ceil_div(num_tokens, parts));
  return {static_cast<int>(panels_x),
          static_cast<int>(num_panels),
          static_cast<int>(panels_per_round),
          static_cast<int>(ceil_div(num_panels, panels_per_round)),
          static_cast<int>(std::max<int64_t>(1, ceil_div(num_tokens, tokens_per_part))),
          tokens_per_part};
}

inline size_t workspace_size(bool training, int64_t num_rows, int64_t num_cols) {
  DeviceInfo device;
  if (!training || current_device_info(&device) != cudaSuccess) return 0;
  // A panel has at most as many parts as the grid has blocks for it.
  const int64_t partials = std::max<int64_t>(panels_of(num_rows) + panels_of(num_cols),
                                             int64_t{kBlocksPerSm} * device.num_sms);
  return round_up<size_t>(partials * kPanelColumns * sizeof(float2), WorkspaceCutter::kAlignment);
}

// Vectors lie within one axis and are aligned in every operand.
template <class T>
bool allows_vectors(int64_t num_rows, int64_t num_cols, int64_t logits_stride,
                    std::initializer_list<const void*> pointers) {
  constexpr int kVec = kVecWidth<T>;
  return num_rows % kVec == 0 && num_cols % kVec == 0 && logits_stride % kVec == 0 &&
         std::all_of(pointers.begin(), pointers.end(),
                     [](const void* pointer) { return is_aligned(pointer, 16); });
}

// A barrier of the grid needs all its blocks on the device at once: a cooperative launch sees to
// it. make_plan(num_sms): where the stream has only some of the device's SMs (a green context, a
// share of MPS), fewer blocks are tried until they fit.
template <class Params, class MakePlan>
cudaError_t launch(void (*kernel)(Params, Plan), const Params& params, MakePlan&& make_plan,
                   bool cooperative, const DeviceInfo& device, cudaStream_t stream) {
  if (cooperative) {
    int id = 0, supported = 0;
    const cudaError_t status = run_steps(
        [&] { return cudaGetDevice(&id); },
        [&] { return cudaDeviceGetAttribute(&supported, cudaDevAttrCooperativeLaunch, id); });
    if (status != cudaSuccess) return status;
    if (supported == 0) return cudaErrorNotSupported;
  }
  for (int num_sms = device.num_sms;; num_sms /= 2) {
    const Plan plan = make_plan(num_sms);
    LaunchOptions options{dim3(static_cast<unsigned>(plan.panels_per_round * plan.num_parts)),
                          kThreads};
    options.is_cooperative = cooperative;
    const cudaError_t status = launch_kernel(kernel, options, stream, params, plan);
    if (status != cudaErrorCooperativeLaunchTooLarge || num_sms <= 1) return status;
  }
}

}  // namespace omni_moe::cuda::batch_norm
