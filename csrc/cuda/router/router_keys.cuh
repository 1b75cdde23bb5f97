// Order-preserving integer keys of the router's logits and sums.
//
// A pair is an entry: its sum's key in the upper 32 bits, the complement of its id in the lower, so
// that one unsigned comparison means "larger sum, then smaller id". Axis elements are packed the
// same way, 16-bit logits into 32 bits.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/vec.cuh"
#include "cuda/router/ordered_key.h"

namespace omni_moe::cuda {

// ---- Entries ------------------------------------------------------------------------------------

// An entry holds a pair's sum and id.

__device__ __forceinline__ uint64_t make_entry(uint32_t key, uint32_t id) {
  return static_cast<uint64_t>(key) << 32 | ~id;
}
__device__ __forceinline__ uint32_t key_of_entry(uint64_t entry) {
  return static_cast<uint32_t>(entry >> 32);
}
__device__ __forceinline__ uint32_t id_of_entry(uint64_t entry) {
  return ~static_cast<uint32_t>(entry);
}

// ---- Axis elements ------------------------------------------------------------------------------

// An axis element holds a logit and its position; 0 stands for no element.

// A logit of T in Packed. Equal logits rank by ascending position. (-0 ranks below +0 where Packed
// has 32 bits; any order that is consistent with the sums will do.)
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
  // The upper half of the packed element; `upper` has the logit's bits in its upper half.
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

// Sums descend along a sorted axis but for one case: inf + -inf = NaN sorts first, though its terms
// do not. `max` is the greatest logit of an axis (NaN greatest).
__device__ __forceinline__ bool may_exceed_finite(float max) { return !(max < INFINITY); }

// ---- Sums that overflow -------------------------------------------------------------------------

// Sums of finite logits past the largest fp32 number would tie at infinity. Where an infinite sum
// may be chosen, and finite logits are so large, halves of the logits are summed. These are exact
// unless smaller than the smallest normal number.
template <class T>
inline constexpr bool kSumsMayOverflow = !std::is_same_v<T, __half>;

// Not contracted with a sum that follows: keys of one pair are the same wherever they are computed.
__device__ __forceinline__ float in_unit(float logit, float unit) { return __fmul_rn(logit, unit); }

// The sum that a key made in this unit stands for.
__device__ __forceinline__ float sum_of_key(uint32_t key, float unit) {
  const float value = value_of_key(key);
  return unit == 1.0f ? value : 2.0f * value;
}

// ---- Thresholds ---------------------------------------------------------------------------------

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

}  // namespace omni_moe::cuda
