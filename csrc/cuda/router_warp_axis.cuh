// One axis of one token in the registers of a warp: its best logits, sorted, and its log-sum-exp.
//
// The threshold is bisected on integer keys, a count over the registers per probe, starting from a
// bound that the maxima of groups of keys give; what passes is compacted through shared memory and
// sorted across the lanes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/router_common.cuh"

namespace omni_moe::cuda {

// kCapacity: the width of the sorts, more than K.
template <int kCapacity>
struct TopOfAxis {
  float value[kCapacity];        // descending
  uint16_t position[kCapacity];  // of the value in the logits
};

template <class T>
using PackedElement = std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>;

// One axis in registers, kItems per lane, as 32-bit keys; 0 where there is no logit. Those of
// 16-bit logits hold the position too and so are distinct.
template <class T, int kItems>
struct AxisKeys {
  static constexpr bool kDistinct = sizeof(T) == 2;
  static constexpr int kVec = kItems < kVecWidth<T> ? kItems : kVecWidth<T>;
  using Element = AxisElement<T, PackedElement<T>>;

  uint32_t keys[kItems];
  int lane;

  __device__ int position(int item) const {
    return (item / kVec * kWarpSize + lane) * kVec + item % kVec;
  }

  __device__ void load(const T* logits, int n, bool use_vectors) {
#pragma unroll
    for (int chunk = 0; chunk < kItems / kVec; ++chunk) {
      const int begin = position(chunk * kVec);
      Vec<T, kVec> vec{};
      if (use_vectors) {
        if (begin < n) vec = load_vec<Vec<T, kVec>>(logits + begin);
      } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          if (begin + i < n) vec.data[i] = logits[begin + i];
        }
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        uint32_t key;
        if constexpr (kDistinct) {
          key = Element::pack(vec.data[i], begin + i);
        } else {
          key = ordered_key(vec.data[i]);
        }
        keys[chunk * kVec + i] = begin + i < n ? key : 0;
      }
    }
  }

  __device__ float value(uint32_t key) const {
    if constexpr (kDistinct)
      return Element::value(key);
    else
      return value_of_key(key);
  }

  __device__ PackedElement<T> packed(int item) const {
    if constexpr (kDistinct)
      return keys[item];
    else
      return make_entry(keys[item], position(item));
  }

  template <class Pred>
  __device__ int warp_count(Pred pred) const {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) count += pred(i) ? 1 : 0;
    return __reduce_add_sync(kFullWarp, count);
  }

  template <class Pred>
  __device__ uint32_t mask(Pred pred) const {
    static_assert(kItems <= 32);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) bits |= pred(i) ? 1u << i : 0u;
    return bits;
  }

  __device__ uint32_t warp_max_key() const {
    uint32_t max = keys[0];
#pragma unroll
    for (int i = 1; i < kItems; ++i) max = keys[i] > max ? keys[i] : max;
    return __reduce_max_sync(kFullWarp, max);
  }

  __device__ float warp_log_sum_exp(float max) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      sum += keys[i] != 0 ? __expf(value(keys[i]) - max) : 0.0f;
    }
    return max + logf(warp_sum(sum));
  }
};

// A lower bound of the k-th largest key: the k-th largest maximum of kGroups groups per lane is
// one, and near enough that the count over all keys rarely needs more than a probe or two.
template <int kGroups, class T, int kItems>
__device__ __forceinline__ uint32_t kth_key_lower_bound(const AxisKeys<T, kItems>& axis, int k,
                                                        uint32_t max_key) {
  constexpr int kGroupSize = kItems / kGroups;
  uint32_t group_max[kGroups];
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    group_max[group] = axis.keys[group * kGroupSize];
#pragma unroll
    for (int i = 1; i < kGroupSize; ++i) {
      const uint32_t key = axis.keys[group * kGroupSize + i];
      group_max[group] = key > group_max[group] ? key : group_max[group];
    }
  }
  const auto count = [&](uint32_t threshold) {
    int n = 0;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) n += group_max[group] >= threshold ? 1 : 0;
    return __reduce_add_sync(kFullWarp, n);
  };
  int count_low = count(1);
  if (count_low < k) return 1;
  return bisect_threshold(1, max_key, k, k + k / 4, count_low, count);
}

// Items to keep where more equal the threshold than fit: those above it, and the first ties in
// order of position up to k in all. Bit i of each mask is item i.
template <class T, int kItems>
__device__ __noinline__ uint32_t warp_keep_first_ties(uint32_t above, uint32_t tied, int k,
                                                      int lane) {
  constexpr int kVec = AxisKeys<T, kItems>::kVec;
  int room = k - __reduce_add_sync(kFullWarp, __popc(above));
  uint32_t keep = above;
  // Positions ascend by chunk, then lane, then element.
  for (int chunk = 0; chunk < kItems / kVec; ++chunk) {
    uint32_t bits = tied & (((1u << kVec) - 1) << (chunk * kVec));
    const int count = __popc(bits);
    const int inclusive = static_cast<int>(warp_inclusive_scan(count, lane));
    const int room_here = max(room - (inclusive - count), 0);
    while (__popc(bits) > room_here) bits &= ~(0x80000000u >> __clz(bits));
    keep |= bits;
    room -= __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
  }
  return keep;
}

// Writes the best `k` or more of the axis (as many as it returns) to `top`, sorted.
template <class T, int kItems, int kCapacity>
__device__ __forceinline__ int warp_sort_top(const AxisKeys<T, kItems>& axis, int k,
                                             uint32_t max_key, TopOfAxis<kCapacity>& top,
                                             uint64_t* scratch) {
  using Element = typename AxisKeys<T, kItems>::Element;
  using Packed = PackedElement<T>;
  const int lane = axis.lane;

  // Threshold that keeps k … kCapacity of them.
  uint32_t low = 1;
  if constexpr (kItems >= 8) {
    constexpr int kGroups = kCapacity > 64 && kItems > 8 ? 8 : kCapacity > 32 ? 4 : 2;
    low = kth_key_lower_bound<kGroups>(axis, k, max_key);
  }
  const auto count = [&](uint32_t threshold) {
    return axis.warp_count([&](int i) { return axis.keys[i] >= threshold; });
  };
  int count_low = count(low);
  low = bisect_threshold(low, max_key, k, kCapacity, count_low, count);

  // Of equal fp32 logits at the threshold, the first in position; then a mask says what to keep.
  uint32_t kept_items = 0;
  if constexpr (!AxisKeys<T, kItems>::kDistinct) {
    kept_items = axis.mask([&](int i) { return axis.keys[i] >= low; });
    if (count_low > kCapacity) {
      const uint32_t above = axis.mask([&](int i) { return axis.keys[i] > low; });
      kept_items = warp_keep_first_ties<T, kItems>(above, kept_items ^ above, k, lane);
    }
  }
  const auto keep = [&](int i) {
    if constexpr (AxisKeys<T, kItems>::kDistinct)
      return axis.keys[i] >= low;
    else
      return (kept_items >> i & 1) != 0;
  };

  // Compact them through shared memory and sort.
  Packed* compact = reinterpret_cast<Packed*>(scratch);
  unsigned kept = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) kept += keep(i) ? 1 : 0;
  const unsigned inclusive = warp_inclusive_scan(kept, lane);
  const int num_top = __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
  unsigned slot = inclusive - kept;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (keep(i)) compact[slot++] = axis.packed(i);
  }
  __syncwarp();
  constexpr int kPerLane = kCapacity / kWarpSize;
  Packed sorted[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int rank = lane * kPerLane + i;
    sorted[i] = rank < num_top ? compact[rank] : 0;
  }
  warp_sort_descending(sorted);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    top.value[lane * kPerLane + i] = Element::value(sorted[i]);
    top.position[lane * kPerLane + i] = static_cast<uint16_t>(Element::position(sorted[i]));
  }
  __syncwarp();
  return num_top;
}

}  // namespace omni_moe::cuda
