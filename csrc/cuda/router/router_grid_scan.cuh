// The unsorted router without any assumption on the order of sums: every count goes over the whole
// grid. For tokens with NaN or +inf, and where sums of finite logits overflow and an infinite one
// may be chosen.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/router/router_keys.cuh"
#include "cuda/router/router_ties.cuh"

namespace omni_moe::cuda {

// use(i, row, col, key): the k best pairs in ascending order of ids. Those of key `threshold` are
// the first `num_ties`, the others greater.
template <class T, class Use>
__device__ __forceinline__ void warp_scan_chosen(const Token<T>& token, float unit,
                                                 uint32_t threshold, int num_ties, Use use) {
  const int lane = threadIdx.x % kWarpSize;
  const unsigned lanes_below = (1u << lane) - 1;
  int filled = 0;
  for (int row = 0; row < token.num_rows && filled < token.k; ++row) {
    for (int first = 0; first < token.num_cols; first += kWarpSize) {
      const int col = first + lane;
      const uint32_t key = col < token.num_cols ? token.key_at(row, col, unit) : 0;
      const unsigned ties = __ballot_sync(kFullWarp, key == threshold);
      const bool chosen =
          key > threshold || (key == threshold && __popc(ties & lanes_below) < num_ties);
      const unsigned mask = __ballot_sync(kFullWarp, chosen);
      if (chosen) use(filled + __popc(mask & lanes_below), row, col, key);
      filled += __popc(mask);
      num_ties -= min(num_ties, __popc(ties));
    }
  }
}

// weight_of(x, y): what is written for a pair, without the division by the sum over the chosen that
// `normalises` asks for.
template <class T, class WeightOf>
__device__ __noinline__ void warp_route_by_grid_scan(Token<T> token, WeightOf weight_of,
                                                     bool normalises, T* weights,
                                                     int32_t* indices) {
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
  const uint32_t threshold =
      bisect_threshold(kKeyOfNegativeInf, kKeyOfNaN, token.k, token.k, count_low, count);
  const int num_ties = count_low == token.k ? token.k : token.k - count(threshold + 1);

  const auto weight_at = [&](int row, int col) {
    return weight_of(to_float(token.logits_x[row]), to_float(token.logits_y[col]));
  };
  if (normalises) {
    float sum = 0.0f;
    warp_scan_chosen(token, unit, threshold, num_ties,
                     [&](int, int row, int col, uint32_t) { sum += weight_at(row, col); });
    weight_of.scale = 1.0f / warp_sum(sum);
  }
  warp_scan_chosen(token, unit, threshold, num_ties, [&](int i, int row, int col, uint32_t) {
    weights[i] = from_float<T>(weight_at(row, col));
    indices[i] = row * token.num_cols + col;
  });
}

}  // namespace omni_moe::cuda
