// The exact K-th sum of a token, by one warp: the first half of the router's unsorted kernel,
// behind which the token's lists are in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/operands.h"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/router/router_axis.cuh"
#include "cuda/router/router_keys.cuh"
#include "cuda/router/threshold_search.h"
#include "cuda/router/warp_sort.cuh"
#include "omni_moe/router.h"

namespace omni_moe::cuda {

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ int count_lanes_below(unsigned lanes) {
  return __popc(lanes & ((1u << lane_id()) - 1));
}

// ---- Lists of a token, in shared memory ---------------------------------------------------------

// A row with chosen pairs; rows ascend.
struct alignas(8) ChosenRow {
  int row;
  int begin;  // where its pairs go
};
static_assert(sizeof(ChosenRow) == sizeof(OpenRow));

struct TokenLists {
  OpenRow* open;      // [num_rows] while the threshold is searched; then in its place:
  ChosenRow* chosen;  // [num_rows]
  float* x;           // [num_rows]
  float* y;           // [num_cols] descending
  float* mass;        // [num_cols] of the y up to each, kSoftmaxTopK only
  uint16_t* column;   // [num_cols] of each y

  __device__ TokenLists(unsigned char* storage, int num_rows, int num_cols, bool has_mass) {
    open = reinterpret_cast<OpenRow*>(storage);
    chosen = reinterpret_cast<ChosenRow*>(storage);
    x = reinterpret_cast<float*>(open + num_rows);
    y = x + num_rows;
    mass = y + num_cols;
    column = reinterpret_cast<uint16_t*>(mass + (has_mass ? num_cols : 0));
  }
};

// What the logits of an axis say.
struct AxisSummary {
  float max;
  float min;
  float log_total;  // log Σ exp(logit - max); kSoftmax only
};

// 1. lists.y and lists.column: the columns' logits, sorted.
template <class T, int kItems>
__device__ __forceinline__ AxisSummary warp_sort_columns(const AxisLogits<T, kItems>& logits,
                                                         int num_cols, RouterScore score,
                                                         const TokenLists& lists) {
  using Element = typename AxisKeys<T, kItems>::Element;
  const int lane = lane_id();
  const AxisKeys<T, kItems> axis(logits, num_cols, lane);
  AxisSummary summary{};
  if (score == RouterScore::kSoftmax) {
    summary.log_total = axis.warp_log_sum_exp_below(axis.value(axis.warp_max_key()));
  }
  PackedElement<T> sorted[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) sorted[i] = axis.packed(i);
  warp_sort_descending(sorted);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int rank = lane * kItems + i;
    if (rank < num_cols) {
      lists.y[rank] = Element::value(sorted[i]);
      lists.column[rank] = static_cast<uint16_t>(Element::position(sorted[i]));
    }
  }
  __syncwarp();
  summary.max = lists.y[0];
  summary.min = lists.y[num_cols - 1];
  return summary;
}

// 2. lists.x: the rows' logits. lane_max_key is that of the lane's rows, 0 where it has none.
template <class T>
__device__ __forceinline__ AxisSummary warp_load_rows(const T* logits, int num_rows,
                                                      RouterScore score, const TokenLists& lists,
                                                      uint32_t& lane_max_key) {
  lane_max_key = 0;
  uint32_t min_key = kKeyOfNaN;
#pragma unroll 4
  for (int row = lane_id(); row < num_rows; row += kWarpSize) {
    const float x = to_float(logits[row]);
    lists.x[row] = x;
    lane_max_key = max(lane_max_key, ordered_key(x));
    min_key = min(min_key, ordered_key(x));
  }
  AxisSummary summary{};
  summary.max = value_of_key(__reduce_max_sync(kFullWarp, lane_max_key));
  summary.min = value_of_key(__reduce_min_sync(kFullWarp, min_key));
  if (score == RouterScore::kSoftmax) {
    float sum = 0.0f;
    for (int row = lane_id(); row < num_rows; row += kWarpSize) {
      sum += __expf(lists.x[row] - summary.max);
    }
    summary.log_total = logf(warp_sum(sum));
  }
  return summary;
}

// ---- The K-th sum -------------------------------------------------------------------------------

// A sum that at least k pairs reach, -inf where this finds none: that of the corner of any
// rectangle of k ranks. The i-th largest of the lanes' maxima serves as a row's logit of rank i.
__device__ __forceinline__ float warp_corner(uint32_t lane_max_key, const float* y, int num_cols,
                                             int k) {
  uint32_t sorted[1] = {lane_max_key};
  warp_sort_descending(sorted);
  const int rank = ceil_div(k, lane_id() + 1);
  const bool is_corner = sorted[0] != 0 && rank <= num_cols;
  const uint32_t key =
      is_corner ? ordered_key(value_of_key(sorted[0]) + y[rank - 1]) : kKeyOfNegativeInf;
  return value_of_key(__reduce_max_sync(kFullWarp, key));
}

// rows_out[0 …) = the rows whose best sum reaches `sum`, as what make(row) makes of them; returns
// how many.
template <class Row, class Make>
__device__ __forceinline__ int warp_list_rows(const TokenLists& lists, int num_rows, float sum,
                                              Row* rows_out, Make make) {
  int listed = 0;
#pragma unroll 1
  for (int first = 0; first < num_rows; first += kWarpSize) {
    const int row = first + lane_id();
    const bool reaches = row < num_rows && lists.x[row] + lists.y[0] >= sum;
    const unsigned lanes = __ballot_sync(kFullWarp, reaches);
    if (reaches) rows_out[listed + count_lanes_below(lanes)] = make(row);
    listed += __popc(lanes);
  }
  __syncwarp();
  return listed;
}

// Counts the sums that reach the guess and moves a bound.
__device__ __forceinline__ void warp_probe(ThresholdSearch& search, const TokenLists& lists,
                                           int& num_open, int& lane_settled) {
  const float guess = search.guess();
  // 1. Count; rows that are no longer open have settled numbers of sums above.
  int count = lane_settled;
  float least_reaching = INFINITY;
  float greatest_below = -INFINITY;
#pragma unroll 1
  for (int i = lane_id(); i < num_open; i += kWarpSize) {
    OpenRow row = lists.open[i];
    row.count_sums(lists.x[row.row], lists.y, guess, least_reaching, greatest_below);
    lists.open[i].count = row.count;
    count += row.count;
  }
  count = __reduce_add_sync(kFullWarp, count);
  const uint32_t least = __reduce_min_sync(kFullWarp, ordered_key(least_reaching));
  const uint32_t greatest = __reduce_max_sync(kFullWarp, ordered_key(greatest_below));
  const bool lower_bound_moved =
      search.narrow(guess, count, value_of_key(least), value_of_key(greatest));

  // 2. Keep the rows that are still open. A lane reads its row before any lane writes.
  int kept = 0;
#pragma unroll 1
  for (int first = 0; first < num_open; first += kWarpSize) {
    const int i = first + lane_id();
    OpenRow row{};
    if (i < num_open) row = lists.open[i];
    row.narrow(lower_bound_moved);
    if (!row.is_open()) lane_settled += row.first;
    const unsigned open_lanes = __ballot_sync(kFullWarp, row.is_open());
    __syncwarp();
    if (row.is_open()) lists.open[kept + count_lanes_below(open_lanes)] = row;
    kept += __popc(open_lanes);
  }
  __syncwarp();
  num_open = kept;
}

}  // namespace omni_moe::cuda
