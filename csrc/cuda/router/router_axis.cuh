// One axis of one token in the registers of a warp: its best logits, sorted, and its log-sum-exp.
//
// The threshold is bisected on integer keys. The search starts from a bound that the maxima of
// buckets of keys give, and each probe counts over the registers. The keys that pass are compacted
// through shared memory and sorted across the lanes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/common/warp_scan.cuh"
#include "cuda/router/router_keys.cuh"
#include "cuda/router/warp_sort.cuh"

namespace omni_moe::cuda {

// kCapacity: the width of the sorts, more than K.
template <int kCapacity>
struct TopOfAxis {
  float value[kCapacity];        // descending
  uint16_t position[kCapacity];  // of the value in the logits
};

template <class T>
using PackedElement = std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>;

// Neither CUDA nor cuda::ptx has a function for a prefetch into L2.
template <class T>
__device__ __forceinline__ void prefetch_axis(const T* logits, int n, int lane) {
  constexpr int kLine = 128 / sizeof(T);
  for (int i = lane * kLine; i < n; i += kWarpSize * kLine) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(logits + i));
  }
}

// The logits of one axis as they were loaded, kItems per lane.
template <class T, int kItems>
struct AxisLogits {
  static constexpr int kVec = kItems < kVecWidth<T> ? kItems : kVecWidth<T>;
  Vec<T, kVec> chunks[kItems / kVec];

  __device__ static int position(int item, int lane) {
    return (item / kVec * kWarpSize + lane) * kVec + item % kVec;
  }

  __device__ __forceinline__ void load(const T* logits, int n, int lane, bool use_vectors) {
#pragma unroll
    for (int chunk = 0; chunk < kItems / kVec; ++chunk) {
      const int begin = position(chunk * kVec, lane);
      chunks[chunk] = {};
      if (use_vectors) {
        if (begin < n) chunks[chunk] = load_vec<Vec<T, kVec>>(logits + begin);
      } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          if (begin + i < n) chunks[chunk].data[i] = logits[begin + i];
        }
      }
    }
  }
};

// One axis in registers, kItems per lane, as 32-bit keys; 0 where there is no logit. Those of
// 16-bit logits hold the position too and so are distinct.
template <class T, int kItems>
struct AxisKeys {
  static constexpr bool kDistinct = sizeof(T) == 2;
  static constexpr int kVec = AxisLogits<T, kItems>::kVec;
  using Element = AxisElement<T, PackedElement<T>>;

  uint32_t keys[kItems];
  int lane;

  __device__ int position(int item) const { return AxisLogits<T, kItems>::position(item, lane); }

  __device__ __forceinline__ AxisKeys(const AxisLogits<T, kItems>& logits, int n, int lane)
      : lane(lane) {
#pragma unroll
    for (int chunk = 0; chunk < kItems / kVec; ++chunk) {
      const auto& vec = logits.chunks[chunk];
      uint32_t* chunk_keys = keys + chunk * kVec;
      if constexpr (kDistinct) {
        static_assert(kVec % 2 == 0);
        // The position begins at a multiple of kVec, so that subtracting i is an exclusive or.
        const uint32_t last = Element::kMaxPosition - position(chunk * kVec);
        uint32_t words[kVec / 2];
        __builtin_memcpy(words, &vec, sizeof(words));
#pragma unroll
        for (int i = 0; i < kVec; i += 2) {
          chunk_keys[i] = Element::key_of_upper_half(words[i / 2] << 16) | (last ^ i);
          chunk_keys[i + 1] =
              Element::key_of_upper_half(words[i / 2] & 0xffff0000u) | (last ^ (i + 1));
        }
      } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) chunk_keys[i] = ordered_key(vec.data[i]);
      }
      const int num_here = n - position(chunk * kVec);
#pragma unroll
      for (int i = 0; i < kVec; ++i) chunk_keys[i] = i < num_here ? chunk_keys[i] : 0;
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
  __device__ int lane_count(Pred pred) const {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) count += pred(i) ? 1 : 0;
    return count;
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

  __device__ uint32_t warp_min_key() const {
    uint32_t least = 0xffffffffu;
#pragma unroll
    for (int i = 0; i < kItems; ++i) least = min(least, keys[i] - 1);
    return __reduce_min_sync(kFullWarp, least) + 1;
  }

  // log Σ exp(logit - max)
  __device__ float warp_log_sum_exp_below(float max) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      sum += __expf((keys[i] != 0 ? value(keys[i]) : -INFINITY) - max);
    }
    return logf(warp_sum(sum));
  }
};

// A lower bound of the k-th largest key: the k-th largest maximum of kBuckets buckets per lane. It
// is so near that the search over all keys rarely needs more than a probe or two. Where fewer than
// k buckets hold a key the bound is 1.
template <int kBuckets, class T, int kItems>
__device__ __forceinline__ uint32_t kth_key_lower_bound(const AxisKeys<T, kItems>& axis, int k,
                                                        uint32_t max_key, uint32_t* scratch) {
  constexpr int kBucketSize = kItems / kBuckets;
  uint32_t bucket_max[kBuckets];
  uint32_t min_of_max = 0xffffffffu;
#pragma unroll
  for (int bucket = 0; bucket < kBuckets; ++bucket) {
    bucket_max[bucket] = axis.keys[bucket * kBucketSize];
#pragma unroll
    for (int i = 1; i < kBucketSize; ++i) {
      bucket_max[bucket] = max(bucket_max[bucket], axis.keys[bucket * kBucketSize + i]);
    }
    // The 0 of a bucket without a key wraps to the largest number.
    min_of_max = min(min_of_max, bucket_max[bucket] - 1);
  }
  if constexpr (kBuckets == 1) {
    if (k > kWarpSize) return 1;
    scratch[axis.lane] = bucket_max[0];
    __syncwarp();
    const int rank = warp_rank(scratch, kWarpSize, bucket_max[0]);
    __syncwarp();  // before the scratch is written again
    return max(1u, __reduce_min_sync(kFullWarp, rank < k ? bucket_max[0] : 0xffffffffu));
  }
  const auto count = [&](uint32_t threshold) {
    if constexpr (kBuckets <= 2) {
      int n = 0;
#pragma unroll
      for (int bucket = 0; bucket < kBuckets; ++bucket) {
        n += __popc(__ballot_sync(kFullWarp, bucket_max[bucket] >= threshold));
      }
      return n;
    }
    int n = 0;
#pragma unroll
    for (int bucket = 0; bucket < kBuckets; ++bucket) n += bucket_max[bucket] >= threshold ? 1 : 0;
    return __reduce_add_sync(kFullWarp, n);
  };
  // The least maximum starts the search: the range of all keys is mostly tiny logits.
  const uint32_t low = __reduce_min_sync(kFullWarp, min_of_max) + 1;
  int count_low = count(low);
  if (count_low < k) return 1;
  return bisect_threshold(low, max_key, k, k + k / 8, count_low, count);
}

// Says which items to keep where more of them equal the threshold than fit: those above it and, up
// to k in all, the first ties in order of position. Bit i of each mask is item i.
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
    const int inclusive = static_cast<int>(warp_inclusive_scan(count));
    const int room_here = max(room - (inclusive - count), 0);
    while (__popc(bits) > room_here) bits &= ~(0x80000000u >> __clz(bits));
    keep |= bits;
    room -= __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
  }
  return keep;
}

// Writes the kept items of all lanes next to each other, in order of the lanes; returns how many.
// `compact` has a spare slot per lane behind its kCapacity.
template <int kCapacity, class T, int kItems, class Keep>
__device__ __forceinline__ int warp_compact(const AxisKeys<T, kItems>& axis, unsigned kept,
                                            PackedElement<T>* compact, Keep keep) {
  const int lane = axis.lane;
  const unsigned spare = kCapacity + lane;
  const unsigned inclusive = warp_inclusive_scan(kept);
  const int num_kept = __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
  unsigned slot = inclusive - kept;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if constexpr (kItems <= 16) {
      // The other items go to a spare slot: a select is cheaper than a predicated address.
      const bool kept_item = keep(i);
      compact[kept_item ? slot : spare] = axis.packed(i);
      slot += kept_item ? 1 : 0;
    } else if (keep(i)) {
      compact[slot++] = axis.packed(i);
    }
  }
  __syncwarp();
  return num_kept;
}

// Writes at least the best `k` of the axis to `top`, sorted, and returns how many.
template <class T, int kItems, int kCapacity>
__device__ __forceinline__ int warp_sort_top(const AxisKeys<T, kItems>& axis, int k,
                                             uint32_t max_key, TopOfAxis<kCapacity>& top,
                                             uint64_t* scratch) {
  using Element = typename AxisKeys<T, kItems>::Element;
  using Packed = PackedElement<T>;
  const int lane = axis.lane;

  // Threshold that keeps k … kCapacity of them.
  constexpr int kBuckets = kCapacity / kWarpSize < kItems / 2 ? kCapacity / kWarpSize
                           : kItems >= 2                      ? kItems / 2
                                                              : 1;
  uint32_t low =
      kth_key_lower_bound<kBuckets>(axis, k, max_key, reinterpret_cast<uint32_t*>(scratch));
  if (low == 1) low = axis.warp_min_key();
  unsigned kept = 0;
  const auto count = [&](uint32_t threshold) {
    kept = axis.lane_count([&](int i) { return axis.keys[i] >= threshold; });
    return __reduce_add_sync(kFullWarp, static_cast<int>(kept));
  };
  int count_low = count(low);
  if (count_low > kCapacity) {
    low = bisect_threshold(low, max_key, k, kCapacity, count_low, count);
    kept = axis.lane_count([&](int i) { return axis.keys[i] >= low; });
  }

  // Of fp32 logits that equal the threshold the first in position are kept, by a mask of items.
  uint32_t kept_items = 0;
  if constexpr (!AxisKeys<T, kItems>::kDistinct) {
    kept_items = axis.mask([&](int i) { return axis.keys[i] >= low; });
    if (count_low > kCapacity) {
      const uint32_t above = axis.mask([&](int i) { return axis.keys[i] > low; });
      kept_items = warp_keep_first_ties<T, kItems>(above, kept_items ^ above, k, lane);
      kept = __popc(kept_items);
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
  const int num_top = warp_compact<kCapacity>(axis, kept, compact, keep);
  constexpr int kPerLane = kCapacity / kWarpSize;
  const auto put = [&](int rank, Packed packed) {
    top.value[rank] = Element::value(packed);
    top.position[rank] = static_cast<uint16_t>(Element::position(packed));
  };
  if constexpr (kPerLane == 1) {
    const Packed mine = lane < num_top ? compact[lane] : 0;
    if (lane >= num_top) compact[lane] = 0;
    __syncwarp();
    put(lane < num_top ? warp_rank(compact, num_top, mine) : lane, mine);
    __syncwarp();
    return num_top;
  }
  Packed sorted[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int rank = lane * kPerLane + i;
    sorted[i] = rank < num_top ? compact[rank] : 0;
  }
  warp_sort_descending(sorted);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    put(lane * kPerLane + i, sorted[i]);
  }
  __syncwarp();
  return num_top;
}

}  // namespace omni_moe::cuda
