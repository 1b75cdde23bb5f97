// What the router kernels share: order-preserving integer keys, the warp sort, and the weights of
// chosen pairs.
//
// A pair is an entry: its sum's key in the upper 32 bits, the complement of its id in the lower, so
// that one unsigned comparison means "larger sum, then smaller id". Axis elements are packed the
// same way, 16-bit logits into 32 bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "omni_moe/router.h"

namespace omni_moe::cuda {

// ---- keys of fp32 values: unsigned integers in the order of torch.topk, NaN greatest ----

inline constexpr uint32_t kKeyOfNegativeInf = 0x007fffffu;
inline constexpr uint32_t kKeyOfNaN = 0xffc00000u;  // the quiet NaN; no key exceeds it

__device__ __forceinline__ uint32_t ordered_key(float value) {
  // Adding +0 turns -0 into +0, so that the two compare equal.
  const uint32_t bits = __float_as_uint(value + 0.0f);
  const uint32_t key =
      bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return value != value ? kKeyOfNaN : key;
}

__device__ __forceinline__ float value_of_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// ---- entries: a pair's sum and id ----

__device__ __forceinline__ uint64_t make_entry(uint32_t key, uint32_t id) {
  return static_cast<uint64_t>(key) << 32 | ~id;
}
__device__ __forceinline__ uint32_t key_of_entry(uint64_t entry) {
  return static_cast<uint32_t>(entry >> 32);
}
__device__ __forceinline__ uint32_t id_of_entry(uint64_t entry) {
  return ~static_cast<uint32_t>(entry);
}

// ---- axis elements: a logit and its position. 0 is no element. ----

// Of T in Packed. Equal logits rank by ascending position. (-0 ranks below +0 where Packed is 32
// bits; any order that is consistent with the sums serves.)
template <class T, class Packed>
struct AxisElement {
  static_assert(sizeof(Packed) == 8);
  __device__ static Packed pack(T logit, uint32_t position) {
    return make_entry(ordered_key(to_float(logit)), position);
  }
  __device__ static float value(Packed packed) { return value_of_key(key_of_entry(packed)); }
  __device__ static uint32_t position(Packed packed) { return id_of_entry(packed); }
};

template <class T>
struct AxisElement<T, uint32_t> {
  static_assert(sizeof(T) == 2);
  static constexpr uint32_t kMaxPosition = 0xffff;

  __device__ static uint32_t pack(T logit, uint32_t position) {
    uint16_t bits;
    __builtin_memcpy(&bits, &logit, sizeof(bits));
    return key_of_upper_half(static_cast<uint32_t>(bits) << 16) | (kMaxPosition - position);
  }
  // The upper half of the packed element, of the logit's bits in the upper half.
  __device__ static uint32_t key_of_upper_half(uint32_t upper) {
    const uint32_t sign = static_cast<uint32_t>(static_cast<int32_t>(upper) >> 31);
    const uint32_t key = upper ^ ((sign & 0x7fff0000u) | 0x80000000u);
    bool nan;
    if constexpr (std::is_same_v<T, __half>) {
      nan = (upper & 0x7fff0000u) > 0x7c000000u;
    } else {
      nan = __uint_as_float(upper) != __uint_as_float(upper);
    }
    return nan ? 0xffff0000u : key;
  }
  __device__ static float value(uint32_t packed) {
    const uint32_t key = packed >> 16;
    const auto bits = static_cast<uint16_t>(key & 0x8000u ? key ^ 0x8000u : ~key);
    T logit;
    __builtin_memcpy(&logit, &bits, sizeof(bits));
    return to_float(logit);
  }
  __device__ static uint32_t position(uint32_t packed) {
    return kMaxPosition - (packed & kMaxPosition);
  }
};

// ---- the warp's sort ----

// Sorts 32 * kItems keys, descending; key number lane * kItems + i is keys[i] of that lane, before
// and after. Every run of `size` keys is merged from two sorted halves, the first step against the
// reversed other half, so that the lower index always keeps the larger key.
//
// Loops over lanes stay loops from two keys a lane on: straight-line code of that length runs at
// the speed at which instructions are fetched.
template <int kItems, class Key>
__device__ __forceinline__ void lane_step_descending(Key (&keys)[kItems], int stride) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if ((i & stride) != 0) continue;
    const Key a = keys[i];
    const Key b = keys[i ^ stride];
    keys[i] = a > b ? a : b;
    keys[i ^ stride] = a > b ? b : a;
  }
}

template <bool kReversed, int kItems, class Key>
__device__ __forceinline__ void warp_step_descending(Key (&keys)[kItems], int lane_mask,
                                                     bool keep_larger) {
  Key others[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    others[i] = __shfl_xor_sync(kFullWarp, keys[kReversed ? kItems - 1 - i : i], lane_mask);
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (keep_larger == (others[i] > keys[i])) keys[i] = others[i];
  }
}

template <int kItems, class Key>
__device__ __forceinline__ void warp_sort_descending(Key (&keys)[kItems]) {
  constexpr int kUnroll = kItems == 1 ? kWarpSize : 1;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int size = 2; size <= kItems; size *= 2) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int other = i ^ (size - 1);
      if (other < i) continue;
      const Key a = keys[i];
      const Key b = keys[other];
      keys[i] = a > b ? a : b;
      keys[other] = a > b ? b : a;
    }
#pragma unroll
    for (int stride = size / 4; stride > 0; stride /= 2) lane_step_descending(keys, stride);
  }
#pragma unroll kUnroll
  for (int lanes = 2; lanes <= kWarpSize; lanes *= 2) {
    warp_step_descending<true>(keys, lanes - 1, (lane & (lanes / 2)) == 0);
#pragma unroll kUnroll
    for (int stride = lanes / 4; stride > 0; stride /= 2) {
      warp_step_descending<false>(keys, stride, (lane & stride) == 0);
    }
#pragma unroll
    for (int stride = kItems / 2; stride > 0; stride /= 2) lane_step_descending(keys, stride);
  }
}

// How many of keys[0 … kWarpSize) are larger than `mine`; keys from `count` on are 0, the array is
// aligned to 16 bytes. For a few keys per lane and up to 32 in all this beats the sort: no step
// waits for a shuffle of the one before.
template <class Key>
__device__ __forceinline__ int warp_rank(const Key* keys, int count, Key mine) {
  constexpr int kVec = 16 / sizeof(Key);
  int rank = 0;
  // 8 keys at a time: more need registers that the kernels do not have.
#pragma unroll(8 / kVec)
  for (int first = 0; first < count; first += kVec) {
    const auto chunk = *reinterpret_cast<const Vec<Key, kVec>*>(keys + first);  // shared memory
#pragma unroll
    for (int i = 0; i < kVec; ++i) rank += chunk.data[i] > mine ? 1 : 0;
  }
  return rank;
}

// ---- thresholds ----

// The largest threshold found with k <= count(threshold) <= limit, where count(t) is the number of
// keys >= t: `low`, with `count_low` = count(low) >= k, moves up while its count passes the limit.
// Where ties forbid such a count it ends at the k-th largest key, with count_low > limit.
template <class Count>
__device__ __forceinline__ uint32_t bisect_threshold(uint32_t low, uint32_t high, int k, int limit,
                                                     int& count_low, Count count) {
  while (count_low > limit && low < high) {
    const uint32_t middle = high - (high - low) / 2;
    const int count_middle = count(middle);
    if (count_middle >= k) {
      low = middle;
      count_low = count_middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// ---- outputs ----

// log_softmax of an axis is NaN exactly where its greatest logit (NaN greatest) is not finite.
__device__ __forceinline__ bool log_softmax_is_nan(float max_x, float max_y) {
  return !isfinite(max_x) || !isfinite(max_y);
}

// inf + -inf = NaN sorts first though its terms do not: the one case in which sums do not descend
// along a sorted axis. `max` is the greatest logit of an axis (NaN greatest).
__device__ __forceinline__ bool may_exceed_finite(float max) { return !(max < INFINITY); }

// The softmax weights of chosen pairs, from their ids: a chosen sum less the largest, axis by axis.
// The difference of two large sums has lost digits that log_softmax keeps.
template <class T>
struct SoftmaxWeights {
  const T* logits_x;  // [num_rows]
  const T* logits_y;  // [num_cols]
  uint32_t num_cols;
  float max_x;
  float max_y;
  float log_total;  // log Σ exp(logit - max), summed over the axes

  __device__ __forceinline__ float operator()(uint32_t id) const {
    const uint32_t row = id / num_cols;
    const float x = to_float(logits_x[row]) - max_x;
    const float y = to_float(logits_y[id - row * num_cols]) - max_y;
    return expf(x + y - log_total);
  }
};

// ---- the second kernel family (router_large_k.cu): any shape, one block per token ----

cudaError_t router_forward_block(const RouterForwardParams& params, cudaStream_t stream);
size_t router_forward_block_workspace_size(const RouterForwardParams& params);

}  // namespace omni_moe::cuda
