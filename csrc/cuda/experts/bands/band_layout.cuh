// Coefficients in the lists of pairs. A token may have chosen an expert more than once: then pairs
// of a task share a place (BandTask::has_repeats), and P has their sum there.
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

// The sum of the coefficients that share the place of pair `at` of a task's list [first, end), in
// the list's order; returns whether `at` is the first of them.
template <class T>
__device__ __forceinline__ bool sum_at_place(const BandPair* coefficients, int first, int end,
                                             int at, float* sum) {
  const BandPair place = coefficients[at] >> 16;
  bool is_first = true;
  *sum = 0.0f;
  for (int other = first; other < end; ++other) {
    const BandPair pair = coefficients[other];
    if (pair >> 16 != place) continue;
    *sum += coefficient_of<T>(pair);
    is_first = is_first && other >= at;
  }
  return is_first;
}

// Where P has a place of row `row` of a group of 16 tasks, in units of 2 bytes: tiles of 64 tasks
// by 64 places, 128 bytes a task and swizzled (swizzle128), one behind the other. Rows of the
// tile's other groups are a multiple of 2 KB away.
inline constexpr BandCell kNoCell = 0xffffffff;  // past all places
__device__ __forceinline__ int cell_index(int place, int row) {
  constexpr int kTilePlaces = 64;
  constexpr int kTileCells = 64 * kTilePlaces;
  const int piece = (place % kTilePlaces / 8) ^ (row & 7);
  return place / kTilePlaces * kTileCells + row * kTilePlaces + piece * 8 + place % 8;
}

}  // namespace omni_moe::cuda
