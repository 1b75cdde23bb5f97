// Cartesian-product router, forward, for few experts per token: one warp per token, everything in
// registers, shuffles and a little shared memory.
//
// The K best of the R × C sums x[row] + y[col]. Sort the best K + 1 logits of each axis; with
// 1-based ranks i and j, i * j - 1 pairs are at least as good as pair (i, j), so the K largest sums
// lie within i * j <= K: about K ln K candidates. Two different logits can round to one sum,
// though, and then a pair beyond that border may equal the K-th sum and have the smaller id; the
// pairs just past the border tell, and those ties are taken from a scan of the rows that hold them.
//
// Selection bisects the integer key of the values: a count over the warp's registers per probe,
// until between K and the sort's width are left. Bytes moved: T (R + C) logits in, T K (weight, id)
// out.
//
// Shapes beyond kMaxExpertsPerToken or kMaxAxis go to router_forward_block.cu.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/router/router_axis.cuh"
#include "cuda/router/router_forward.h"
#include "cuda/router/router_keys.cuh"
#include "cuda/router/router_weights.cuh"
#include "cuda/router/warp_sort.cuh"
#include "omni_moe/router.h"

namespace omni_moe::cuda {

namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kThreads = kWarpsPerBlock * kWarpSize;
constexpr int kMaxExpertsPerToken = 128;
constexpr int kMaxAxis = 1024;

// ---- Candidates ---------------------------------------------------------------------------------

// The rank pairs with i * j <= kMaxExpertsPerToken are in order of their products, so that those of
// a smaller K are a prefix.

constexpr int num_rank_pairs(int k) {
  int count = 0;
  for (int i = 1; i <= k; ++i) count += k / i;
  return count;
}

template <int k>
inline constexpr int kNumRankPairs = num_rank_pairs(k);

struct RankPairs {
  uint8_t x[kNumRankPairs<kMaxExpertsPerToken>];  // 0-based ranks
  uint8_t y[kNumRankPairs<kMaxExpertsPerToken>];
};

constexpr RankPairs make_rank_pairs() {
  RankPairs pairs{};
  int n = 0;
  for (int product = 1; product <= kMaxExpertsPerToken; ++product) {
    for (int i = 1; i <= product; ++i) {
      if (product % i != 0) continue;
      pairs.x[n] = static_cast<uint8_t>(i - 1);
      pairs.y[n] = static_cast<uint8_t>(product / i - 1);
      ++n;
    }
  }
  return pairs;
}

__device__ constexpr RankPairs kRankPairs = make_rank_pairs();

// ---- One warp's state ---------------------------------------------------------------------------

// kCapacity: the width of the sorts, more than K.
template <int kCapacity>
struct WarpStorage {
  // Also the scratch of the axis sorts, with a spare slot per lane.
  alignas(16) uint64_t entries[kCapacity + kWarpSize];
  TopOfAxis<kCapacity> axis[2];
};

template <class T>
struct Token {
  const T* logits_x;  // [num_rows]
  const T* logits_y;  // [num_cols]
  int num_rows;
  int num_cols;
  int k;

  __device__ uint32_t key_at(int row, int col) const {
    return ordered_key(to_float(logits_x[row]) + to_float(logits_y[col]));
  }
};

// ---- Scans of the grid --------------------------------------------------------------------------

// For tokens with infinities, and for more ties than the sorted tops show; both are rare.

// entries[filled … k) = the pairs of key `key` with the smallest ids. Rows whose best sum is
// smaller are skipped; max_y = NaN skips none.
template <class T>
__device__ __noinline__ void warp_fill_ties(Token<T> token, uint32_t key, float max_y, int filled,
                                            uint64_t* entries) {
  const int lane = threadIdx.x % kWarpSize;
  for (int row_begin = 0; row_begin < token.num_rows; row_begin += kWarpSize) {
    const int row = row_begin + lane;
    unsigned rows =
        __ballot_sync(kFullWarp, row < token.num_rows &&
                                     ordered_key(to_float(token.logits_x[row]) + max_y) >= key);
    for (; rows != 0; rows &= rows - 1) {
      const int tied_row = row_begin + __ffs(rows) - 1;
      for (int col_begin = 0; col_begin < token.num_cols; col_begin += kWarpSize) {
        const int col = col_begin + lane;
        const bool tied = col < token.num_cols && token.key_at(tied_row, col) == key;
        const unsigned ties = __ballot_sync(kFullWarp, tied);
        const int slot = filled + __popc(ties & ((1u << lane) - 1));
        if (tied && slot < token.k) {
          entries[slot] = make_entry(key, static_cast<uint32_t>(tied_row) * token.num_cols + col);
        }
        filled += __popc(ties);
        if (filled >= token.k) {
          __syncwarp();
          return;
        }
      }
    }
  }
}

// Sorts entries[0 … count), count <= kCapacity.
template <int kCapacity>
__device__ __forceinline__ void warp_sort_entries(uint64_t* entries, int count) {
  constexpr int kPerLane = kCapacity / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  __syncwarp();
  if constexpr (kPerLane == 1) {
    const uint64_t mine = lane < count ? entries[lane] : 0;
    entries[lane] = mine;
    __syncwarp();
    const int rank = lane < count ? warp_rank(entries, count, mine) : lane;
    __syncwarp();
    entries[rank] = mine;
    __syncwarp();
    return;
  }
  uint64_t sorted[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int rank = lane * kPerLane + i;
    sorted[i] = rank < count ? entries[rank] : 0;
  }
  warp_sort_descending(sorted);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) entries[lane * kPerLane + i] = sorted[i];
  __syncwarp();
}

// The selection without any assumption on the order of sums, for tokens with both infinities: every
// probe counts over the whole grid.
template <int kCapacity, class T>
__device__ __noinline__ void warp_choose_from_grid(Token<T> token, uint64_t* entries) {
  const int lane = threadIdx.x % kWarpSize;
  const auto count = [&](uint32_t threshold) {
    int n = 0;
    for (int row = 0; row < token.num_rows; ++row) {
      for (int col = lane; col < token.num_cols; col += kWarpSize) {
        n += token.key_at(row, col) >= threshold ? 1 : 0;
      }
    }
    return __reduce_add_sync(kFullWarp, n);
  };
  int count_low = token.num_rows * token.num_cols;
  const uint32_t low =
      bisect_threshold(kKeyOfNegativeInf, kKeyOfNaN, token.k, kCapacity, count_low, count);
  const bool tied = count_low > kCapacity;

  int filled = 0;
  const uint32_t threshold = tied ? low + 1 : low;
  for (int row = 0; row < token.num_rows; ++row) {
    for (int col_begin = 0; col_begin < token.num_cols; col_begin += kWarpSize) {
      const int col = col_begin + lane;
      const uint32_t key = col < token.num_cols ? token.key_at(row, col) : 0;
      const unsigned chosen = __ballot_sync(kFullWarp, key >= threshold);
      if (key >= threshold) {
        entries[filled + __popc(chosen & ((1u << lane) - 1))] =
            make_entry(key, static_cast<uint32_t>(row) * token.num_cols + col);
      }
      filled += __popc(chosen);
    }
  }
  warp_sort_entries<kCapacity>(entries, filled);
  if (tied) warp_fill_ties(token, low, __uint_as_float(0x7fc00000u), filled, entries);
}

template <class T>
__device__ __forceinline__ bool warp_any_negative_inf(const T* logits, int n) {
  bool found = false;
#pragma unroll 1
  for (int i = threadIdx.x % kWarpSize; i < n; i += kWarpSize) {
    found |= to_float(logits[i]) == -INFINITY;
  }
  return __any_sync(kFullWarp, found);
}

// ---- Selection ----------------------------------------------------------------------------------

// The K best pairs come from the two sorted tops.

// entries[filled … k) = the pairs of key `key` with the smallest ids, from the sorted tops; false
// where a logit beyond them can tie too, or more pairs tie than fit. Coarse logits tie often: a
// scan of the grid for one token in 40 took longer than all the rest (bf16, 1024 per axis, K 64).
template <int kCapacity>
__device__ __noinline__ bool warp_fill_ties_from_tops(WarpStorage<kCapacity>& storage, int num_rows,
                                                      int num_cols, int num_x, int num_y,
                                                      uint32_t key, int filled) {
  const TopOfAxis<kCapacity>& x = storage.axis[0];
  const TopOfAxis<kCapacity>& y = storage.axis[1];
  const int lane = threadIdx.x % kWarpSize;
  if (num_x < num_rows && ordered_key(x.value[num_x - 1] + y.value[0]) >= key) return false;
  if (num_y < num_cols && ordered_key(x.value[0] + y.value[num_y - 1]) >= key) return false;
  // How many of a row's sums, which descend, reach a key.
  const auto count_reaching = [&](float x_value, uint32_t threshold) {
    int low = 0;
    int high = num_y;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (ordered_key(x_value + y.value[middle]) >= threshold)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  for (int first = 0; first < num_x; first += kWarpSize) {
    const int i = first + lane;
    int begin = 0;
    int end = 0;
    if (i < num_x) {
      end = count_reaching(x.value[i], key);
      begin = count_reaching(x.value[i], key + 1);
    }
    const int inclusive = static_cast<int>(warp_inclusive_scan(end - begin, lane));
    int slot = filled + inclusive - (end - begin);
    filled += __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
    if (filled > kCapacity) return false;
    for (int j = begin; j < end; ++j) {
      storage.entries[slot++] =
          make_entry(key, static_cast<uint32_t>(x.position[i]) * num_cols + y.position[j]);
    }
  }
  warp_sort_entries<kCapacity>(storage.entries, filled);
  return true;
}

// What the ranks alone tell about the k-th sum.
template <int kCapacity>
struct Border {
  uint32_t lower_bound;                     // the k-th sum's key is no smaller
  uint32_t outside[kCapacity / kWarpSize];  // keys one rank past the candidates of a row, 0: none
};

template <int kCapacity>
__device__ __forceinline__ Border<kCapacity> warp_border(const TopOfAxis<kCapacity>& x, int num_x,
                                                         const TopOfAxis<kCapacity>& y, int num_y,
                                                         int k) {
  Border<kCapacity> border;
  uint32_t bound = 0;
#pragma unroll
  for (int i = 0; i < kCapacity / kWarpSize; ++i) {
    const int rank = i * kWarpSize + threadIdx.x % kWarpSize + 1;  // 1-based
    border.outside[i] = 0;
    if (rank > num_x) continue;
    const float value = x.value[rank - 1];
    // 1-based rank of this row's last candidate; the approximate quotient lies far from the
    // next integer.
    const int last = static_cast<int>(__fdividef(k + 0.5f, static_cast<float>(rank)));
    // The corner of any rectangle of k or more ranks bounds the k-th sum.
    const int corner = last * rank < k ? last + 1 : last;
    if (corner <= num_y) bound = max(bound, ordered_key(value + y.value[corner - 1]));
    if (last < num_y && rank <= k + 1) border.outside[i] = ordered_key(value + y.value[last]);
  }
  border.lower_bound = __reduce_max_sync(kFullWarp, bound);
  return border;
}

// entries[0 … k) = the chosen pairs, sorted.
template <int kCapacity, class T>
__device__ __forceinline__ void warp_choose(const Token<T>& token, int num_x, int num_y,
                                            int num_candidates, WarpStorage<kCapacity>& storage) {
  constexpr int kMaxK = kCapacity - 1 < kMaxExpertsPerToken ? kCapacity - 1 : kMaxExpertsPerToken;
  constexpr int kSlots = (kNumRankPairs<kMaxK> + kWarpSize - 1) / kWarpSize;
  const TopOfAxis<kCapacity>& x = storage.axis[0];
  const TopOfAxis<kCapacity>& y = storage.axis[1];
  const int lane = threadIdx.x % kWarpSize;

  // 1. Keys of the candidates.
  uint32_t keys[kSlots];
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    keys[slot] = 0;
    const int candidate = slot * kWarpSize + lane;
    if (slot * kWarpSize < num_candidates && candidate < num_candidates) {
      const int i = kRankPairs.x[candidate];
      const int j = kRankPairs.y[candidate];
      if (i < num_x && j < num_y) keys[slot] = ordered_key(x.value[i] + y.value[j]);
    }
  }

  // 2. Threshold.
  const Border<kCapacity> border = warp_border(x, num_x, y, num_y, token.k);
  const auto count = [&](uint32_t threshold) {
    int n = 0;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (slot * kWarpSize < num_candidates) n += keys[slot] >= threshold ? 1 : 0;
    }
    return __reduce_add_sync(kFullWarp, n);
  };
  int count_low = count(border.lower_bound);
  const uint32_t low = bisect_threshold(border.lower_bound, ordered_key(x.value[0] + y.value[0]),
                                        token.k, kCapacity, count_low, count);
  const bool overfull = count_low > kCapacity;  // more ties than fit: keep what is above them
  const uint32_t threshold = overfull ? low + 1 : low;

  // 3. Compact and sort.
  int filled = 0;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    if (slot * kWarpSize >= num_candidates) continue;
    const bool chosen = keys[slot] >= threshold;
    const unsigned mask = __ballot_sync(kFullWarp, chosen);
    if (chosen) {
      const int candidate = slot * kWarpSize + lane;
      const uint32_t row = x.position[kRankPairs.x[candidate]];
      const uint32_t col = y.position[kRankPairs.y[candidate]];
      storage.entries[filled + __popc(mask & ((1u << lane) - 1))] =
          make_entry(keys[slot], row * token.num_cols + col);
    }
    filled += __popc(mask);
  }
  warp_sort_entries<kCapacity>(storage.entries, filled);

  // 4. Ties with the k-th sum outside the candidates.
  const uint32_t kth_key = overfull ? low : key_of_entry(storage.entries[token.k - 1]);
  bool outside = overfull;
  int above = 0;
#pragma unroll
  for (int i = 0; i < kCapacity / kWarpSize; ++i) {
    outside |= border.outside[i] == kth_key;
    above += key_of_entry(storage.entries[i * kWarpSize + lane]) > kth_key ? 1 : 0;
  }
  if (__any_sync(kFullWarp, outside)) {
    above = __reduce_add_sync(kFullWarp, above);
    __syncwarp();  // all have read the entries that the ties overwrite
    if (!warp_fill_ties_from_tops(storage, token.num_rows, token.num_cols, num_x, num_y, kth_key,
                                  above)) {
      warp_fill_ties(token, kth_key, y.value[0], above, storage.entries);
    }
  }
}

// ---- The kernel ---------------------------------------------------------------------------------

// 8 blocks, 64 registers: 4096 tokens on 132 SMs are one wave. fp32 logits need more registers, and
// on sm_80 so do long axes of any type.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kMinBlocksOfLongAxis = 6;
#else
constexpr int kMinBlocksOfLongAxis = 8;
#endif
template <class T, int kItems, int kCapacity>
inline constexpr int kMinBlocksPerSm = sizeof(T) != 2                     ? (kItems <= 8 ? 6 : 4)
                                       : kItems == 32 && kCapacity == 256 ? 6
                                       : kItems <= 8                      ? 8
                                                                          : kMinBlocksOfLongAxis;

template <class T, int kItems, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm<T, kItems, kCapacity>)
    router_forward_warp_kernel(const RouterForwardParams params, int num_candidates, bool vectors_x,
                               bool vectors_y) {
  __shared__ WarpStorage<kCapacity> block_storage[kWarpsPerBlock];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp;
  if (t >= params.num_tokens) return;
  WarpStorage<kCapacity>& storage = block_storage[warp];
  const int k = static_cast<int>(params.num_experts_per_token);
  const Token<T> token{static_cast<const T*>(params.logits_x) + t * params.num_rows,
                       static_cast<const T*>(params.logits_y) + t * params.num_cols,
                       static_cast<int>(params.num_rows), static_cast<int>(params.num_cols), k};
  const RouterScore score = params.score;

  // 1. The best k + 1 of each axis. One loop body for both: half the code, half the registers.
  // Short axes are both loaded before the first is used, of long ones
  // the second comes to L2 meanwhile.
  constexpr bool kPrefetch = kItems * sizeof(T) <= 16;
  AxisLogits<T, kItems> logits;
  AxisLogits<T, kItems> logits_y;
  if constexpr (kPrefetch) {
    logits.load(token.logits_x, token.num_rows, lane, vectors_x);
    logits_y.load(token.logits_y, token.num_cols, lane, vectors_y);
  } else {
    prefetch_axis(token.logits_y, token.num_cols, lane);
  }
  int num_top[2];
  float log_total = 0.0f;
#pragma unroll 1
  for (int which = 0; which < 2; ++which) {
    const int n = which == 0 ? token.num_rows : token.num_cols;
    if constexpr (!kPrefetch) {
      logits.load(which == 0 ? token.logits_x : token.logits_y, n, lane,
                  which == 0 ? vectors_x : vectors_y);
    }
    const AxisKeys<T, kItems> axis(logits, n, lane);
    const uint32_t max_key = axis.warp_max_key();
    if (score == RouterScore::kSoftmax) {
      log_total += axis.warp_log_sum_exp_below(axis.value(max_key));
    }
    const int count =
        warp_sort_top(axis, min(k + 1, n), max_key, storage.axis[which], storage.entries);
    // Selects, not stores at a runtime index: the arrays stay in registers.
    if (which == 0) {
      num_top[0] = count;
      if constexpr (kPrefetch) logits = logits_y;
    } else {
      num_top[1] = count;
    }
  }
  const float max_x = storage.axis[0].value[0];
  const float max_y = storage.axis[1].value[0];

  T* weights = static_cast<T*>(params.weights) + t * k;
  int32_t* indices = params.indices + t * k;
  if (score != RouterScore::kLogit && log_softmax_is_nan(max_x, max_y)) {
    for (int i = lane; i < k; i += kWarpSize) {
      weights[i] = from_float<T>(value_of_key(kKeyOfNaN));
      indices[i] = i;
    }
    return;
  }

  // 2. The k best pairs.
  const bool both_infinities =
      (may_exceed_finite(max_x) && warp_any_negative_inf(token.logits_y, token.num_cols)) ||
      (may_exceed_finite(max_y) && warp_any_negative_inf(token.logits_x, token.num_rows));
  if (both_infinities) {
    warp_choose_from_grid<kCapacity>(token, storage.entries);
  } else {
    warp_choose(token, num_top[0], num_top[1], num_candidates, storage);
  }

  // 3. Weights and ids.
  const SoftmaxWeights<T> weight_of{
      token.logits_x, token.logits_y, static_cast<uint32_t>(token.num_cols),
      max_x,          max_y,          log_total};
  float scale = 1.0f;
  if (score == RouterScore::kSoftmaxTopK) {
    float sum = 0.0f;
    for (int i = lane; i < k; i += kWarpSize) sum += weight_of(id_of_entry(storage.entries[i]));
    scale = warp_sum(sum);
  }
  for (int i = lane; i < k; i += kWarpSize) {
    const uint64_t entry = storage.entries[i];
    const uint32_t id = id_of_entry(entry);
    const float weight =
        score == RouterScore::kLogit ? value_of_key(key_of_entry(entry)) : weight_of(id) / scale;
    weights[i] = from_float<T>(weight);
    indices[i] = static_cast<int32_t>(id);
  }
}

// ---- Launcher -----------------------------------------------------------------------------------

template <class T, int kItems, int kCapacity>
cudaError_t launch_warp_kernel(const RouterForwardParams& params, cudaStream_t stream) {
  DeviceInfo device;
  const cudaError_t status = current_device_info(&device);
  if (status != cudaSuccess) return status;
  constexpr int kVec = AxisKeys<T, kItems>::kVec;
  const auto allows_vectors = [](const void* logits, int64_t n) {
    return n % kVec == 0 && is_aligned(logits, kVec * sizeof(T));
  };
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(params.num_tokens, kWarpsPerBlock));
  return launch_early(router_forward_warp_kernel<T, kItems, kCapacity>, blocks, kThreads, device,
                      stream, params,
                      num_rank_pairs(static_cast<int>(params.num_experts_per_token)),
                      allows_vectors(params.logits_x, params.num_rows),
                      allows_vectors(params.logits_y, params.num_cols));
}

template <class T, int kItems>
cudaError_t launch_for_capacity(const RouterForwardParams& params, cudaStream_t stream) {
  // The border check needs rank K + 1 of each axis, hence K < capacity.
  const int64_t k = params.num_experts_per_token;
  if (k < 32) return launch_warp_kernel<T, kItems, 32>(params, stream);
  if (k < 64) return launch_warp_kernel<T, kItems, 64>(params, stream);
  if (k < 128) return launch_warp_kernel<T, kItems, 128>(params, stream);
  return launch_warp_kernel<T, kItems, 256>(params, stream);
}

}  // namespace

bool fits_router_forward_warp(const RouterForwardParams& params) {
  return params.num_experts_per_token <= kMaxExpertsPerToken &&
         std::max(params.num_rows, params.num_cols) <= kMaxAxis;
}

cudaError_t router_forward_warp(const RouterForwardParams& params, cudaStream_t stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t axis = std::max(params.num_rows, params.num_cols);
    if (axis <= 2 * kWarpSize) return launch_for_capacity<T, 2>(params, stream);
    if (axis <= 8 * kWarpSize) return launch_for_capacity<T, 8>(params, stream);
    if (axis <= 16 * kWarpSize) return launch_for_capacity<T, 16>(params, stream);
    return launch_for_capacity<T, 32>(params, stream);
  });
}

}  // namespace omni_moe::cuda
