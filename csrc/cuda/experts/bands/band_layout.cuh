// P, the coefficients of tasks by the places of their band, laid out in shared memory from lists of
// pairs. A warp lays out a task's row, which is zero before. A token may have chosen an expert more
// than once: then pairs of a task share a place (BandTask::has_repeats), and the row is laid out
// with their sums.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/experts/bands/band_lists.h"

namespace omni_moe::cuda {

inline constexpr BandPair kNoPair = 0xffffffff;  // places end below it

template <class T>
__device__ __forceinline__ BandPair with_coefficient(BandPair pair, float value) {
  const T rounded = from_float<T>(value);
  return (pair & 0xffff0000) | reinterpret_cast<const uint16_t&>(rounded);
}
template <class T>
__device__ __forceinline__ float coefficient_of(BandPair pair) {
  const auto bits = static_cast<uint16_t>(pair);
  return to_float(reinterpret_cast<const T&>(bits));
}

// cell(place) is where a coefficient goes, or null where it is not wanted.
template <class Cell>
__device__ __forceinline__ void lay_out_pair(BandPair pair, Cell cell) {
  if (uint16_t* to = cell(pair >> 16); to != nullptr) *to = static_cast<uint16_t>(pair);
}

// For a row in which pairs share places: their sums in order of the list [first, end).
template <class T, class Cell>
__device__ __forceinline__ void add_up_pairs(const BandPair* coefficients, int first, int end,
                                             int lane, Cell cell) {
  for (int at = first + lane; at < end; at += kWarpSize) {
    const BandPair place = coefficients[at] >> 16;
    float sum = 0.0f;
    bool is_first = true;  // of the pairs with this place
    for (int other = first; other < end; ++other) {
      const BandPair pair = coefficients[other];
      if (pair >> 16 != place) continue;
      sum += coefficient_of<T>(pair);
      is_first = is_first && other >= at;
    }
    if (!is_first) continue;
    if (uint16_t* to = cell(place); to != nullptr) *reinterpret_cast<T*>(to) = from_float<T>(sum);
  }
}

}  // namespace omni_moe::cuda
