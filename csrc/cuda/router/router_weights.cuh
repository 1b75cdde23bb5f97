// The weights of chosen pairs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/vec.cuh"

namespace omni_moe::cuda {

// log_softmax of an axis is NaN exactly where its greatest logit (NaN greatest) is not finite.
__device__ __forceinline__ bool log_softmax_is_nan(float max_x, float max_y) {
  return !isfinite(max_x) || !isfinite(max_y);
}

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

}  // namespace omni_moe::cuda
