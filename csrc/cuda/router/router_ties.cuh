// What the warp kernel of the router does for rare tokens: pairs that tie with the K-th sum beyond
// the candidates, tokens with both infinities, and sums of finite logits that overflow.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/common/warp_scan.cuh"
#include "cuda/router/router_axis.cuh"
#include "cuda/router/router_keys.cuh"
#include "cuda/router/warp_sort.cuh"

namespace omni_moe::cuda {

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

  // Of a sum in this unit: 0.5 for halves of the logits.
  __device__ uint32_t key_at(int row, int col, float unit = 1.0f) const {
    return ordered_key(in_unit(to_float(logits_x[row]), unit) +
                       in_unit(to_float(logits_y[col]), unit));
  }
};

// ---- Ties among the sorted tops -----------------------------------------------------------------

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
  if (key == kKeyOfNegativeInf) return false;  // finite logits may have overflowed to it
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
    const int inclusive = static_cast<int>(warp_inclusive_scan(end - begin));
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

// ---- Scans of the grid --------------------------------------------------------------------------

// For tokens with infinities or sums that overflow, and for more ties than the sorted tops show;
// all are rare.

// What a token's logits say about its sums.
struct Extremes {
  bool mixes_infinities;  // inf + -inf is among the sums
  bool overflows;         // a sum of finite logits may be infinite
};

template <class T>
__device__ __forceinline__ Extremes warp_extremes(const Token<T>& token) {
  const int lane = threadIdx.x % kWarpSize;
  bool exceeds[2] = {false, false};
  bool has_negative_inf[2] = {false, false};
  float largest[2] = {0.0f, 0.0f};
#pragma unroll
  for (int axis = 0; axis < 2; ++axis) {
    const T* logits = axis == 0 ? token.logits_x : token.logits_y;
    const int n = axis == 0 ? token.num_rows : token.num_cols;
#pragma unroll 1
    for (int i = lane; i < n; i += kWarpSize) {
      const float logit = to_float(logits[i]);
      exceeds[axis] |= may_exceed_finite(logit);
      has_negative_inf[axis] |= logit == -INFINITY;
      if (isfinite(logit)) largest[axis] = fmaxf(largest[axis], fabsf(logit));
    }
    exceeds[axis] = __any_sync(kFullWarp, exceeds[axis]);
    has_negative_inf[axis] = __any_sync(kFullWarp, has_negative_inf[axis]);
    largest[axis] = block_max<1>(largest[axis], nullptr);
  }
  return {(exceeds[0] && has_negative_inf[1]) || (exceeds[1] && has_negative_inf[0]),
          isinf(largest[0] + largest[1])};
}

// Whether sums do not descend along the sorted axes, or overflow to a tie.
template <class T>
__device__ __noinline__ bool warp_ranks_mislead(Token<T> token) {
  const Extremes extremes = warp_extremes(token);
  return extremes.mixes_infinities || extremes.overflows;
}

// entries[filled … k) = the pairs of key `key` with the smallest ids. Rows whose best sum is
// smaller are skipped; max_y = NaN skips none.
template <class T>
__device__ __forceinline__ void warp_scan_ties(const Token<T>& token, uint32_t key, float max_y,
                                               float unit, int filled, uint64_t* entries) {
  const int lane = threadIdx.x % kWarpSize;
  for (int row_begin = 0; row_begin < token.num_rows; row_begin += kWarpSize) {
    const int row = row_begin + lane;
    const float x = row < token.num_rows ? in_unit(to_float(token.logits_x[row]), unit) : 0.0f;
    unsigned rows = __ballot_sync(kFullWarp, row < token.num_rows && ordered_key(x + max_y) >= key);
    for (; rows != 0; rows &= rows - 1) {
      const int tied_row = row_begin + __ffs(rows) - 1;
      for (int col_begin = 0; col_begin < token.num_cols; col_begin += kWarpSize) {
        const int col = col_begin + lane;
        const bool tied = col < token.num_cols && token.key_at(tied_row, col, unit) == key;
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

// The selection without any assumption on the order of sums: every probe counts over the whole
// grid. By halves of the logits where sums of finite ones overflow.
template <int kCapacity, class T>
__device__ __noinline__ void warp_choose_from_grid(Token<T> token, uint64_t* entries) {
  const int lane = threadIdx.x % kWarpSize;
  const float unit = kSumsMayOverflow<T> && warp_extremes(token).overflows ? 0.5f : 1.0f;
  const auto count = [&](uint32_t threshold) {
    int n = 0;
    for (int row = 0; row < token.num_rows; ++row) {
      for (int col = lane; col < token.num_cols; col += kWarpSize) {
        n += token.key_at(row, col, unit) >= threshold ? 1 : 0;
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
      const uint32_t key = col < token.num_cols ? token.key_at(row, col, unit) : 0;
      const unsigned chosen = __ballot_sync(kFullWarp, key >= threshold);
      if (key >= threshold) {
        entries[filled + __popc(chosen & ((1u << lane) - 1))] =
            make_entry(key, static_cast<uint32_t>(row) * token.num_cols + col);
      }
      filled += __popc(chosen);
    }
  }
  warp_sort_entries<kCapacity>(entries, filled);
  if (tied) warp_scan_ties(token, low, __uint_as_float(0x7fc00000u), unit, filled, entries);
  if (unit == 1.0f) return;
  for (int i = lane; i < token.k; i += kWarpSize) {
    const uint32_t key = ordered_key(sum_of_key(key_of_entry(entries[i]), unit));
    entries[i] = make_entry(key, id_of_entry(entries[i]));
  }
  __syncwarp();
}

// entries[filled … k) = the pairs of key `key` with the smallest ids; all of them anew where the
// key is that of -inf, to which sums of finite logits overflow.
template <int kCapacity, class T>
__device__ __noinline__ void warp_fill_ties(Token<T> token, uint32_t key, float max_y, int filled,
                                            uint64_t* entries) {
  if (kSumsMayOverflow<T> && key == kKeyOfNegativeInf && warp_extremes(token).overflows) {
    warp_choose_from_grid<kCapacity>(token, entries);
  } else {
    warp_scan_ties(token, key, max_y, 1.0f, filled, entries);
  }
}

}  // namespace omni_moe::cuda
