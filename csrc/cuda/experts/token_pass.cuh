// The token pass, which forward and backward share. It is attention over a token's K experts, with
// a coefficient of its own in place of the softmax:
//   out[t] = addend[t] + Σ_k coefficient(query[t] · key[i]) value[i],  i = indices[t,k]
// The forward passes hidden, up and down as queries, keys and values; the backward passes grad,
// down and up, and the pre-activations that the forward saved. Each strategy (expert_plan.h) is one
// kernel template. ForwardPairs and BackwardPairs turn dot products into coefficients and store
// what is wanted of each pair.
#pragma once

#include "cuda/common/activation.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/experts/weight_grad.h"
#include "omni_moe/expert.h"

namespace omni_moe::cuda {

struct TokenPassArgs {
  const void* queries;  // [T, H]
  const void* keys;     // [E, H]
  const void* values;   // [E, H]
  const void* indices;  // [T, K], of index_type
  const void* addend;   // [T, H], or null: none
  void* out;            // [T, H], or null: not wanted
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t num_experts;
  int64_t num_experts_per_token;
  IndexType index_type;
};

// The dot product is the pre-activation s = hidden[t] · up[i]; the coefficient is act(s) routing.
template <class T>
struct ForwardPairs {
  const T* routing_weights;  // [T, K]
  float* pre_activations;    // [T, K], or null: not wanted
  Activation activation;

  static constexpr bool kHasWeightGradients = false;

  // What is read of a pair, long before its dot product is known.
  struct Inputs {
    float weight;
  };
  __device__ __forceinline__ Inputs load(int64_t pair, bool /*stores*/) const {
    return {to_float(routing_weights[pair])};
  }
  __device__ __forceinline__ float finish(const Inputs& inputs, int64_t pair, int64_t /*token*/,
                                          float dot, bool stores) const {
    if (stores && pre_activations != nullptr) pre_activations[pair] = dot;
    return activate(activation, dot) * inputs.weight;
  }
};

// The dot product is g = grad[t] · down[i]; the coefficient is routing act'(s) g, with s as the
// forward saved it.
template <class T>
struct BackwardPairs {
  const T* routing_weights;       // [T, K]
  const float* pre_activations;   // [T, K]
  T* grad_routing_weights;        // [T, K], or null: not wanted
  PairRecord* records;            // [T * K], or null: no weight gradient is wanted
  const uint32_t* pair_position;  // [T * K], or null likewise
  Activation activation;

  static constexpr bool kHasWeightGradients = true;

  struct Inputs {
    float weight;
    float pre_activation;
    uint32_t position;
  };
  __device__ __forceinline__ Inputs load(int64_t pair, bool stores) const {
    return {to_float(routing_weights[pair]), pre_activations[pair],
            stores && records != nullptr ? pair_position[pair] : 0};
  }
  __device__ __forceinline__ float finish(const Inputs& inputs, int64_t pair, int64_t token,
                                          float dot, bool stores) const {
    const ActivationResult act = activate_with_derivative(activation, inputs.pre_activation);
    const float up_coefficient = through_derivative(activation, act, inputs.weight * dot);
    if (stores) {
      if (grad_routing_weights != nullptr) {
        grad_routing_weights[pair] = from_float<T>(act.value * dot);
      }
      if (records != nullptr) {
        const int4 record = {static_cast<int>(token), __float_as_int(up_coefficient),
                             __float_as_int(inputs.weight * act.value), 0};
        *reinterpret_cast<int4*>(records + inputs.position) = record;
      }
    }
    return up_coefficient;
  }
  // Of grad[t] in grad_down, where it does not go into a record; finish's result is that of
  // hidden[t] in grad_up.
  __device__ __forceinline__ float down_coefficient(const Inputs& inputs) const {
    return inputs.weight * activate(activation, inputs.pre_activation);
  }
};

}  // namespace omni_moe::cuda
