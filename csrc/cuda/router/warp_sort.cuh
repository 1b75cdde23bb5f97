// A warp's sort of keys in registers, and the rank of each of a few keys in shared memory. CUB
// sorts within a lane (cub::StableOddEvenSort) or by merging in shared memory (cub::WarpMergeSort);
// the router's keys stay in registers.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"

namespace omni_moe::cuda {

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

}  // namespace omni_moe::cuda
