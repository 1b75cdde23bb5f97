// Cartesian-product router, forward, for any shape: one block per token.
//
// Both axes are sorted. The threshold of the K best sums x[row] + y[col] is bisected on their
// integer keys until between K and a little more pairs pass it; each probe counts along the
// staircase of the two sorted axes, by a binary search over y per row of x. The pairs that pass are
// listed and sorted. Work per token: O((R + C) log + probes * R log C + K log K), never R * C.
// Counting looks at every row, so sums that round to the same fp32 value are all seen; where more
// than fit equal the K-th sum, the pairs above it are sorted and the ties follow by ascending id.
//
// Lists live in shared memory where they fit, else in the workspace, one slice per resident block.
// Bytes moved: T (R + C) logits in, T K (weight, id) out.
#include <cuda_runtime.h>

#include <cstdint>
#include <cub/block/block_scan.cuh>
#include <type_traits>

#include "cuda/common/check.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/router/router_block_sort.cuh"
#include "cuda/router/router_forward.h"
#include "cuda/router/router_keys.cuh"
#include "cuda/router/router_tuning.h"
#include "cuda/router/router_weights.cuh"
#include "omni_moe/router.h"

namespace omni_moe::cuda {

namespace {

using namespace router_block;

constexpr int kBlocksPerSm = RouterBlockTuning::kBlocksPerSm;

using RowScan = cub::BlockScan<int, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;

// Small per-block state.
struct BlockScratch {
  typename RowScan::TempStorage scan;
  float sums[2][kWarps];
  int counts[2][kWarps];
  uint32_t keys[kWarps];
  int row_begin[kThreads + 1];  // where each row of the tile puts its entries
};

static_assert(sizeof(BlockScratch) <= RouterBlockTuning::kScratchBytes);

// ---- Counting -----------------------------------------------------------------------------------

// The two sorted axes.
struct SortedGrid {
  const float* x;  // [num_rows] descending, NaN first
  const float* y;  // [num_cols]
  int num_rows;
  int num_cols;
  bool monotone;  // sums descend along both axes; false only where inf - inf makes a NaN

  // Pairs of a row with a key >= threshold; where monotone, they are the first of the row.
  __device__ int count_in_row(float x_value, uint32_t threshold) const {
    if (!monotone) {
      int count = 0;
      for (int col = 0; col < num_cols; ++col) {
        count += ordered_key(x_value + y[col]) >= threshold ? 1 : 0;
      }
      return count;
    }
    int low = 0;
    int high = num_cols;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (ordered_key(x_value + y[middle]) >= threshold)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  // Whether sorted rows from `row` on have no key >= threshold.
  __device__ bool ends_at(int row, uint32_t threshold) const {
    return row >= num_rows || (monotone && ordered_key(x[row] + y[0]) < threshold);
  }
};

// Pairs of the grid with a key >= threshold.
__device__ __forceinline__ int block_count(const SortedGrid& grid, uint32_t threshold,
                                           int* scratch) {
  int count = 0;
  for (int row = threadIdx.x; !grid.ends_at(row, threshold); row += kThreads) {
    count += grid.count_in_row(grid.x[row], threshold);
  }
  return block_reduce<kWarps>(count, scratch, [](int a, int b) { return a + b; });
}

// A key that at least k pairs reach: the corner of any rectangle of k ranks has one.
__device__ __forceinline__ uint32_t block_lower_bound(const SortedGrid& grid, int k,
                                                      uint32_t* scratch) {
  if (!grid.monotone) return kKeyOfNegativeInf;
  uint32_t bound = 0;
  for (int i = threadIdx.x + 1; i <= min(k, grid.num_rows); i += kThreads) {
    const int j = ceil_div(k, i);
    if (j <= grid.num_cols) bound = max(bound, ordered_key(grid.x[i - 1] + grid.y[j - 1]));
  }
  return block_reduce<kWarps>(bound, scratch, [](uint32_t a, uint32_t b) { return max(a, b); });
}

// row_begin[thread] = sum of the `count` of the threads before; row_begin[kThreads] = all.
__device__ __forceinline__ void block_exclusive_scan(int count, BlockScratch& scratch) {
  int before = 0;
  int total = 0;
  __syncthreads();  // earlier readers of both arrays are done
  RowScan(scratch.scan).ExclusiveSum(count, before, total);
  scratch.row_begin[threadIdx.x] = before;
  if (threadIdx.x == 0) scratch.row_begin[kThreads] = total;
  __syncthreads();
}

// ---- One token ----------------------------------------------------------------------------------

template <class T, class Key>
struct BlockRouter {
  using Element = AxisElement<T, Key>;

  const T* logits_x;  // [num_rows]
  const T* logits_y;  // [num_cols]
  int num_rows;
  int num_cols;
  int k;
  Key* axes;          // [num_rows + num_cols]
  Key* axes_other;    // [num_rows + num_cols]
  uint64_t* entries;  // [RouterBlockTuning::entry_capacity(k)]
  uint64_t* entries_other;
  BlockScratch& scratch;

  const Key* elements;  // the sorted axes, x then y: one of the two above
  SortedGrid grid;      // their values: the other

  // 1. Both axes sorted.
  __device__ void sort_axes() {
    const int thread = threadIdx.x;
    block_sort_chunks(num_rows, axes, 0, [&](int i) { return Element::pack(logits_x[i], i); });
    const int idle_warp = ceil_div(num_rows, kChunk) % kWarps;
    block_sort_chunks(num_cols, axes + num_rows, kWarps - idle_warp,
                      [&](int i) { return Element::pack(logits_y[i], i); });
    Key* from = axes;
    Key* to = axes_other;
    for (int width = kChunk; width < max(num_rows, num_cols); width *= 2) {
      __syncthreads();
      // The threads take the two lists from opposite ends, because short lists leave threads idle.
      block_merge_runs(from, to, num_rows, width, thread);
      block_merge_runs(from + num_rows, to + num_rows, num_cols, width, kThreads - 1 - thread);
      Key* merged = to;
      to = from;
      from = merged;
    }
    __syncthreads();
    auto* values = reinterpret_cast<float*>(to);
    for (int i = thread; i < num_rows + num_cols; i += kThreads)
      values[i] = Element::value(from[i]);
    __syncthreads();
    elements = from;
    const float* y = values + num_rows;
    const bool both_infinities = (may_exceed_finite(values[0]) && y[num_cols - 1] == -INFINITY) ||
                                 (may_exceed_finite(y[0]) && values[num_rows - 1] == -INFINITY);
    grid = SortedGrid{values, y, num_rows, num_cols, !both_infinities};
  }

  // 2. Returns the threshold. Where more pairs than fit equal the K-th sum, `tied` is set and the
  // threshold is the key of that sum.
  __device__ uint32_t find_threshold(bool& tied) {
    const uint32_t bound = block_lower_bound(grid, k, scratch.keys);
    const uint32_t top = grid.monotone ? ordered_key(grid.x[0] + grid.y[0]) : kKeyOfNaN;
    int parity = 0;
    const auto count = [&](uint32_t threshold) {
      parity ^= 1;  // two scratch rows: one barrier per probe
      return block_count(grid, threshold, scratch.counts[parity]);
    };
    // Counts stay below 2^31, as R * C does.
    const int limit =
        static_cast<int>(min(RouterBlockTuning::entry_capacity(k), int64_t{0x7fffffff}));
    int count_low = count(bound);
    const uint32_t low = bisect_threshold(bound, top, k, limit, count_low, count);
    tied = count_low > limit;
    return low;
  }

  // 3. entries[0 …) = the pairs with a key >= threshold, a warp per row; returns how many.
  __device__ int list_entries(uint32_t threshold) {
    const int lane = threadIdx.x % kWarpSize;
    int listed = 0;
    for (int tile = 0; !grid.ends_at(tile, threshold); tile += kThreads) {
      const int row = tile + threadIdx.x;
      block_exclusive_scan(row < num_rows ? grid.count_in_row(grid.x[row], threshold) : 0, scratch);
      const int tile_rows = min(kThreads, num_rows - tile);
      for (int i = threadIdx.x / kWarpSize; i < tile_rows; i += kWarps) {
        const int begin = scratch.row_begin[i];
        const int end = scratch.row_begin[i + 1];
        if (begin == end) continue;
        list_row(tile + i, end - begin, threshold, entries + listed + begin, lane);
      }
      listed += scratch.row_begin[kThreads];
    }
    return listed;
  }

  __device__ void list_row(int row, int count, uint32_t threshold, uint64_t* out, int lane) {
    const float x_value = grid.x[row];
    const uint32_t first_id = Element::position(elements[row]) * static_cast<uint32_t>(num_cols);
    const auto entry_at = [&](int col, uint32_t key) {
      return make_entry(key, first_id + Element::position(elements[num_rows + col]));
    };
    if (grid.monotone) {
      for (int col = lane; col < count; col += kWarpSize) {
        out[col] = entry_at(col, ordered_key(x_value + grid.y[col]));
      }
      return;
    }
    for (int col_begin = 0; col_begin < num_cols; col_begin += kWarpSize) {
      const int col = col_begin + lane;
      const uint32_t key = col < num_cols ? ordered_key(x_value + grid.y[col]) : 0;
      const unsigned chosen = __ballot_sync(kFullWarp, key >= threshold);
      if (key >= threshold) out[__popc(chosen & ((1u << lane) - 1))] = entry_at(col, key);
      out += __popc(chosen);
    }
  }

  // 4. indices[filled … k) = the pairs of key `key` with the smallest ids; weights[filled … k) =
  // their sum.
  __device__ void write_ties(uint32_t key, int filled, T* weights, int32_t* indices) {
    const T sum = from_float<T>(value_of_key(key));
    const int lane = threadIdx.x % kWarpSize;
    for (int tile = 0; filled < k && tile < num_rows; tile += kThreads) {
      const int row = tile + threadIdx.x;
      int ties = 0;
      if (row < num_rows) {
        const float x_value = to_float(logits_x[row]);
        ties = grid.count_in_row(x_value, key) - grid.count_in_row(x_value, key + 1);
      }
      block_exclusive_scan(ties, scratch);
      const int tile_rows = min(kThreads, num_rows - tile);
      for (int i = threadIdx.x / kWarpSize; i < tile_rows; i += kWarps) {
        int slot = filled + scratch.row_begin[i];
        const int end = min(filled + scratch.row_begin[i + 1], k);
        const float x_value = to_float(logits_x[tile + i]);
        for (int col_begin = 0; slot < end; col_begin += kWarpSize) {
          const int col = col_begin + lane;
          const bool tied = col < num_cols && ordered_key(x_value + to_float(logits_y[col])) == key;
          const unsigned mask = __ballot_sync(kFullWarp, tied);
          const int target = slot + __popc(mask & ((1u << lane) - 1));
          if (tied && target < end) {
            weights[target] = sum;
            indices[target] = (tile + i) * num_cols + col;
          }
          slot += __popc(mask);
        }
      }
      // The count saturates, because ties of a whole grid and K together may pass 2^31.
      filled = scratch.row_begin[kThreads] >= k - filled ? k : filled + scratch.row_begin[kThreads];
    }
  }

  // log Σ exp(values - values[0])
  __device__ float log_sum_exp_below(const float* values, int n, float* sums) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += kThreads) sum += __expf(values[i] - values[0]);
    return logf(block_sum<kWarps>(sum, sums));
  }

  // 5. The softmax weights of indices[0 … k).
  __device__ void write_softmax_weights(RouterScore score, T* weights, const int32_t* indices) {
    SoftmaxWeights<T> weight_of{logits_x,  logits_y,  static_cast<uint32_t>(num_cols),
                                grid.x[0], grid.y[0], 0.0f};
    float scale = 1.0f;
    if (score == RouterScore::kSoftmax) {
      weight_of.log_total = log_sum_exp_below(grid.x, num_rows, scratch.sums[0]) +
                            log_sum_exp_below(grid.y, num_cols, scratch.sums[1]);
    } else {
      float sum = 0.0f;
      for (int i = threadIdx.x; i < k; i += kThreads) sum += weight_of(indices[i]);
      scale = block_sum<kWarps>(sum, scratch.sums[0]);
    }
    for (int i = threadIdx.x; i < k; i += kThreads) {
      weights[i] = from_float<T>(weight_of(indices[i]) / scale);
    }
  }

  __device__ void route(RouterScore score, T* weights, int32_t* indices) {
    sort_axes();
    if (score != RouterScore::kLogit && log_softmax_is_nan(grid.x[0], grid.y[0])) {
      for (int i = threadIdx.x; i < k; i += kThreads) {
        weights[i] = from_float<T>(value_of_key(kKeyOfNaN));
        indices[i] = i;
      }
      return;
    }
    bool tied;
    const uint32_t threshold = find_threshold(tied);
    const int num_listed = list_entries(tied ? threshold + 1 : threshold);
    __syncthreads();
    block_sort_chunks(num_listed, entries, 0, [&](int i) { return entries[i]; });
    const uint64_t* sorted = block_merge_chunks(entries, entries_other, num_listed);
    const int num_sorted = min(num_listed, k);

    for (int i = threadIdx.x; i < num_sorted; i += kThreads) {
      const uint64_t entry = sorted[i];
      weights[i] = from_float<T>(value_of_key(key_of_entry(entry)));
      indices[i] = static_cast<int32_t>(id_of_entry(entry));
    }
    if (tied) write_ties(threshold, num_sorted, weights, indices);
    if (score == RouterScore::kLogit) return;
    __syncthreads();  // every thread's ids are there
    write_softmax_weights(score, weights, indices);
  }
};

// ---- The kernel ---------------------------------------------------------------------------------

// kShared: lists in dynamic shared memory, else in slice blockIdx.x of the workspace.
template <class T, class Key, bool kShared>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    router_forward_block_kernel(const RouterForwardParams params, size_t list_bytes) {
  extern __shared__ __align__(16) unsigned char shared_lists[];
  __shared__ BlockScratch scratch;
  unsigned char* lists;
  if constexpr (kShared) {
    lists = shared_lists;
  } else {
    lists = static_cast<unsigned char*>(params.workspace) + blockIdx.x * list_bytes;
  }
  const int num_rows = static_cast<int>(params.num_rows);
  const int num_cols = static_cast<int>(params.num_cols);
  const int64_t k = params.num_experts_per_token;
  auto* entries = reinterpret_cast<uint64_t*>(lists);
  auto* axes = reinterpret_cast<Key*>(entries + 2 * RouterBlockTuning::entry_capacity(k));
  for (int64_t t = blockIdx.x; t < params.num_tokens; t += gridDim.x) {
    BlockRouter<T, Key> router{static_cast<const T*>(params.logits_x) + t * num_rows,
                               static_cast<const T*>(params.logits_y) + t * num_cols,
                               num_rows,
                               num_cols,
                               static_cast<int>(k),
                               axes,
                               axes + num_rows + num_cols,
                               entries,
                               entries + RouterBlockTuning::entry_capacity(k),
                               scratch,
                               nullptr,
                               {}};
    router.route(params.score, static_cast<T*>(params.weights) + t * k, params.indices + t * k);
    __syncthreads();  // the lists are free for the next token
  }
}

// ---- Launcher -----------------------------------------------------------------------------------

template <class T, class Key, bool kShared>
cudaError_t launch_block_kernel(const RouterForwardParams& params, const RouterForwardPlan& plan,
                                cudaStream_t stream) {
  const auto kernel = router_forward_block_kernel<T, Key, kShared>;
  const size_t shared_bytes = kShared ? plan.list_bytes : 0;
  return run_steps(
      [&] { return allow_shared_memory(kernel, shared_bytes); },
      [&] {
        kernel<<<static_cast<unsigned>(plan.num_blocks), kThreads, shared_bytes, stream>>>(
            params, plan.list_bytes);
        return launch_status();
      });
}

}  // namespace

cudaError_t router_forward_block(const RouterForwardParams& params, const RouterForwardPlan& plan,
                                 cudaStream_t stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Packed = std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>;
    return plan.lists_in_shared ? launch_block_kernel<T, Packed, true>(params, plan, stream)
                                : launch_block_kernel<T, uint64_t, false>(params, plan, stream);
  });
}

}  // namespace omni_moe::cuda
