// What the backward's token pass computes once per (token, k) pair, from s = hidden[t] · up[i] and
// g = grad[t] · down[i], and where it goes.
#pragma once

#include "common/activation.cuh"
#include "common/vec.cuh"
#include "omni_moe/expert.h"
#include "weight_grad.h"

namespace omni_moe::cuda {

// Where a pair's results go, beside the caller's tensors.
struct PairOutputs {
  PairRecord* records;            // null: no weight gradient wanted
  const uint32_t* pair_position;  // [T * K], null likewise

  __device__ __forceinline__ uint32_t position(int64_t pair) const {
    return records != nullptr ? pair_position[pair] : 0;
  }
};

struct PairGrads {
  float routing;           // act(s) g
  float up_coefficient;    // routing act'(s) g
  float down_coefficient;  // routing act(s)
};

__device__ __forceinline__ PairGrads pair_grads(Activation activation, float score, float grad,
                                                float weight) {
  const ActivationResult act = activate_with_derivative(activation, score);
  return {act.value * grad, weight * act.derivative * grad, weight * act.value};
}

template <class T>
__device__ __forceinline__ void store_pair(const ExpertBackwardParams& params,
                                           const PairOutputs& outputs, int64_t pair,
                                           uint32_t position, int64_t token,
                                           const PairGrads& grads) {
  if (params.grad_routing_weights != nullptr) {
    static_cast<T*>(params.grad_routing_weights)[pair] = from_float<T>(grads.routing);
  }
  if (outputs.records != nullptr) {
    const int4 record = {static_cast<int>(token), __float_as_int(grads.up_coefficient),
                         __float_as_int(grads.down_coefficient), 0};
    *reinterpret_cast<int4*>(outputs.records + position) = record;
  }
}

}  // namespace omni_moe::cuda
