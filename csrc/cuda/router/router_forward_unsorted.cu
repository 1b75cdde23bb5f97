// Cartesian-product router, forward, for many experts per token in no particular order: one warp
// per token.
//
// The columns' logits are sorted in registers; rows stay in their order. The exact K-th sum is
// found by a few guesses, each counted along the staircase of sums (threshold_search.h): a binary
// search over the columns for each row that may still have sums between the bounds. Each row's
// chosen columns are then the first of the sorted ones, and a scan over rows says where they go. Of
// the pairs that equal the K-th sum the smallest ids are chosen: rows come in ascending order, so
// that the same scan says how many a row keeps, and only the row at which they end has to look for
// the columns. Work per token: O(C log² C + guesses * rows that matter * log C + K), without a sort
// of the K pairs. Bytes moved: T (R + C) logits in, T K (weight, id) out.
//
// Order of a token's pairs: by row, each row's best first; behind them the ties of the row at which
// ties end.
#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/common/warp_scan.cuh"
#include "cuda/router/router_forward.h"
#include "cuda/router/router_grid_scan.cuh"
#include "cuda/router/router_keys.cuh"
#include "cuda/router/router_staircase.cuh"
#include "cuda/router/router_ties.cuh"
#include "cuda/router/router_tuning.h"
#include "cuda/router/router_weights.cuh"
#include "cuda/router/threshold_search.h"
#include "omni_moe/router.h"

namespace omni_moe::cuda {

namespace {

using Tuning = RouterUnsortedTuning;
constexpr int kWarpsPerBlock = Tuning::kWarpsPerBlock;
constexpr int kThreads = kWarpsPerBlock * kWarpSize;

// ---- The chosen pairs ---------------------------------------------------------------------------

struct Choice {
  int num_rows;   // lists.chosen
  int num_pairs;  // of these rows
  int tied_row;   // the row at which ties end, if that is in the middle of its ties
  int num_ties;   // its chosen ties, which come behind the pairs of the rows; 0 if there is none
  float mass;     // Σ exp(x - max_x + y - max_y) over pairs, without those ties
};

// lists.mass
__device__ __forceinline__ void warp_sum_mass(const TokenLists& lists, int num_cols) {
  float before = 0.0f;
#pragma unroll 1
  for (int first = 0; first < num_cols; first += kWarpSize) {
    const int i = first + lane_id();
    float sum = i < num_cols ? expf(lists.y[i] - lists.y[0]) : 0.0f;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const float lower = __shfl_up_sync(kFullWarp, sum, offset);
      if (lane_id() >= offset) sum += lower;
    }
    if (i < num_cols) lists.mass[i] = before + sum;
    before += __shfl_sync(kFullWarp, sum, kWarpSize - 1);
  }
  __syncwarp();
}

// lists.chosen
__device__ __forceinline__ Choice warp_choose_rows(const ThresholdSearch& search,
                                                   const TokenLists& lists, int num_rows,
                                                   int num_cols, int k, bool has_mass,
                                                   float max_x) {
  const float threshold = search.low();
  const float next_sum = value_of_key(ordered_key(threshold) + 1);
  const int num_listed = warp_list_rows(lists, num_rows, threshold, lists.chosen, [](int row) {
    return ChosenRow{row, 0};
  });
  Choice choice{};
  int room = k - search.count_above();  // for ties
#pragma unroll 1
  for (int first = 0; first < num_listed; first += kWarpSize) {
    const int i = first + lane_id();
    const bool is_listed = i < num_listed;
    const int row = is_listed ? lists.chosen[i].row : 0;
    const float x = lists.x[row];
    const int reaching = is_listed ? count_reaching(x, lists.y, 0, num_cols, threshold) : 0;
    int count = reaching;
    if (search.has_surplus()) {
      const int above = is_listed ? count_reaching(x, lists.y, 0, reaching, next_sum) : 0;
      const int ties = reaching - above;
      const int ties_up_to = static_cast<int>(warp_inclusive_scan(ties));
      const int chosen = max(0, min(ties, room - (ties_up_to - ties)));
      if (chosen < ties) count = above;
      const unsigned ends = __ballot_sync(kFullWarp, 0 < chosen && chosen < ties);
      if (ends != 0) {
        choice.tied_row = __shfl_sync(kFullWarp, row, __ffs(ends) - 1);
        choice.num_ties = __shfl_sync(kFullWarp, chosen, __ffs(ends) - 1);
      }
      room = max(0, room - __shfl_sync(kFullWarp, ties_up_to, kWarpSize - 1));
    }
    if (has_mass && count > 0) choice.mass += expf(x - max_x) * lists.mass[count - 1];
    const int pairs_up_to = static_cast<int>(warp_inclusive_scan(count));
    const unsigned lanes = __ballot_sync(kFullWarp, count > 0);
    __syncwarp();  // all have read their rows
    if (count > 0) {
      const int target = choice.num_rows + count_lanes_below(lanes);
      lists.chosen[target] = {row, choice.num_pairs + pairs_up_to - count};
    }
    choice.num_rows += __popc(lanes);
    choice.num_pairs += __shfl_sync(kFullWarp, pairs_up_to, kWarpSize - 1);
  }
  choice.mass = warp_sum(choice.mass);
  __syncwarp();
  return choice;
}

// use(i, column, y): tie number i of choice.tied_row, in ascending order of columns.
template <class T, class Use>
__device__ __forceinline__ void warp_for_each_tie(const Token<T>& token, const Choice& choice,
                                                  float x, float threshold, Use use) {
  int seen = 0;
#pragma unroll 1
  for (int first = 0; seen < choice.num_ties; first += kWarpSize) {
    const int column = first + lane_id();
    const float y = column < token.num_cols ? to_float(token.logits_y[column]) : 0.0f;
    const bool is_tied = column < token.num_cols && x + y == threshold;
    const unsigned lanes = __ballot_sync(kFullWarp, is_tied);
    const int i = seen + count_lanes_below(lanes);
    if (is_tied && i < choice.num_ties) use(i, column, y);
    seen += __popc(lanes);
  }
}

// What is written for a pair.
struct PairWeight {
  bool is_logit;
  float max_x;
  float max_y;
  float log_total;
  float scale;

  __device__ float operator()(float x, float y) const {
    return is_logit ? x + y : expf((x - max_x) + (y - max_y) - log_total) * scale;
  }
};

template <class T>
__device__ __forceinline__ void warp_write_pairs(const Token<T>& token, const TokenLists& lists,
                                                 const Choice& choice, const PairWeight& weight_of,
                                                 T* weights, int32_t* indices) {
  int row_of_first = 0;  // in which the pair in front of the lanes' pairs lies
#pragma unroll 2
  for (int first = 0; first < choice.num_pairs; first += kWarpSize) {
    // Every chosen row has a pair: of the next 32 rows those that begin here are a bit each.
    const int later = row_of_first + 1 + lane_id();
    const unsigned distance = later < choice.num_rows ? lists.chosen[later].begin - first : INT_MAX;
    const unsigned begins = __reduce_or_sync(kFullWarp, distance < kWarpSize ? 1u << distance : 0u);
    const int i = row_of_first + __popc(begins & (0xffffffffu >> (kWarpSize - 1 - lane_id())));
    row_of_first += __popc(begins);
    const int target = first + lane_id();
    if (target < choice.num_pairs) {
      const ChosenRow chosen = lists.chosen[i];
      const int rank = target - chosen.begin;
      weights[target] = from_float<T>(weight_of(lists.x[chosen.row], lists.y[rank]));
      indices[target] = chosen.row * token.num_cols + lists.column[rank];
    }
  }
}

// ---- The kernel ---------------------------------------------------------------------------------

// Registers for 32 warps on an SM where 16-bit logits of up to 512 columns are sorted: 4096 tokens
// on 132 SMs are one wave. Longer axes are bounded by shared memory.
template <class T, int kItems>
inline constexpr int kMinBlocksPerSm = kItems == 32     ? 2
                                       : sizeof(T) == 2 ? 8
                                       : kItems == 16   ? 4
                                                        : 6;

template <class T, int kItems>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm<T, kItems>)
    router_forward_unsorted_kernel(const RouterForwardParams params, bool vectors_y,
                                   unsigned token_bytes) {
  extern __shared__ __align__(16) unsigned char block_lists[];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int warp = threadIdx.x / kWarpSize;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp;
  if (t >= params.num_tokens) return;
  const int num_rows = static_cast<int>(params.num_rows);
  const int num_cols = static_cast<int>(params.num_cols);
  const int k = static_cast<int>(params.num_experts_per_token);
  const RouterScore score = params.score;
  const bool has_mass = score == RouterScore::kSoftmaxTopK;
  const Token<T> token{static_cast<const T*>(params.logits_x) + t * num_rows,
                       static_cast<const T*>(params.logits_y) + t * num_cols, num_rows, num_cols,
                       k};
  T* weights = static_cast<T*>(params.weights) + t * k;
  int32_t* indices = params.indices + t * k;
  const TokenLists lists(block_lists + warp * token_bytes, num_rows, num_cols, has_mass);

  // 1. Both axes.
  AxisLogits<T, kItems> logits_y;
  logits_y.load(token.logits_y, num_cols, lane_id(), vectors_y);
  uint32_t lane_max_key;
  const AxisSummary x = warp_load_rows(token.logits_x, num_rows, score, lists, lane_max_key);
  const AxisSummary y = warp_sort_columns(logits_y, num_cols, score, lists);
  if (score != RouterScore::kLogit && log_softmax_is_nan(x.max, y.max)) {
    for (int i = lane_id(); i < k; i += kWarpSize) {
      weights[i] = from_float<T>(value_of_key(kKeyOfNaN));
      indices[i] = i;
    }
    return;
  }
  PairWeight weight_of{score == RouterScore::kLogit, x.max, y.max, x.log_total + y.log_total, 1.0f};
  if (may_exceed_finite(x.max + y.max)) {
    warp_route_by_grid_scan(token, weight_of, has_mass, weights, indices);
    return;
  }

  // 2. The K-th sum.
  const float corner = warp_corner(lane_max_key, lists.y, num_cols, k);
  const float least = x.min + y.min;
  ThresholdSearch search(k, num_rows * num_cols, fmaxf(corner, least),
                         corner > least ? ThresholdSearch::kUnknown : num_rows * num_cols,
                         x.max + y.max);
  int num_open = warp_list_rows(lists, num_rows, search.low(), lists.open, [&](int row) {
    return OpenRow{static_cast<uint16_t>(row), 0, static_cast<uint16_t>(num_cols), 0};
  });
  int lane_settled = 0;
#pragma unroll 1
  while (!search.is_found()) warp_probe(search, lists, num_open, lane_settled);
  if (kSumsMayOverflow<T> && search.low() == -INFINITY && warp_ranks_mislead(token)) {
    warp_route_by_grid_scan(token, weight_of, has_mass, weights, indices);
    return;
  }

  // 3. The chosen pairs.
  if (has_mass) warp_sum_mass(lists, num_cols);
  const Choice choice = warp_choose_rows(search, lists, num_rows, num_cols, k, has_mass, x.max);
  const float tied_x = lists.x[choice.tied_row];
  if (has_mass) {
    float mass = 0.0f;
    warp_for_each_tie(token, choice, tied_x, search.low(),
                      [&](int, int, float tied_y) { mass += weight_of(tied_x, tied_y); });
    weight_of.scale = 1.0f / (choice.mass + warp_sum(mass));
  }
  warp_write_pairs(token, lists, choice, weight_of, weights, indices);
  warp_for_each_tie(token, choice, tied_x, search.low(), [&](int i, int column, float tied_y) {
    weights[choice.num_pairs + i] = from_float<T>(weight_of(tied_x, tied_y));
    indices[choice.num_pairs + i] = choice.tied_row * num_cols + column;
  });
}

// ---- Launcher -----------------------------------------------------------------------------------

template <class T, int kItems>
cudaError_t launch_unsorted_kernel(const RouterForwardParams& params, const RouterForwardPlan& plan,
                                   cudaStream_t stream) {
  constexpr int kVec = AxisLogits<T, kItems>::kVec;
  const bool vectors_y =
      params.num_cols % kVec == 0 && is_aligned(params.logits_y, kVec * sizeof(T));
  const auto kernel = router_forward_unsorted_kernel<T, kItems>;
  return run_steps([&] { return allow_shared_memory(kernel, plan.list_bytes); },
                   [&] {
                     return launch_early(router_forward_unsorted_kernel<T, kItems>,
                                         {.blocks = dim3(static_cast<unsigned>(plan.num_blocks)),
                                          .threads = kThreads,
                                          .shared_bytes = plan.list_bytes},
                                         plan.device, stream, params, vectors_y,
                                         static_cast<unsigned>(plan.list_bytes / kWarpsPerBlock));
                   });
}

}  // namespace

cudaError_t router_forward_unsorted(const RouterForwardParams& params,
                                    const RouterForwardPlan& plan, cudaStream_t stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (plan.items_per_lane) {
      case 2:
        return launch_unsorted_kernel<T, 2>(params, plan, stream);
      case 8:
        return launch_unsorted_kernel<T, 8>(params, plan, stream);
      case 16:
        return launch_unsorted_kernel<T, 16>(params, plan, stream);
      default:
        return launch_unsorted_kernel<T, 32>(params, plan, stream);
    }
  });
}

}  // namespace omni_moe::cuda
