// What the token passes of forward and backward have in common: for each token, rows of one table
// scored against the token's vector, a coefficient per pair from that, rows of another table added.
//   out[t] = addend[t] + Σ_k coefficient(vector[t] · scored[i]) added[i],  i = indices[t,k]
// forward: hidden, up, down; backward: grad, down, up, with the scores that the forward saved. Each
// strategy (expert_plan.h) is one kernel template; ForwardPairs and BackwardPairs turn dots into
// coefficients and store what is wanted of each pair.
#pragma once

#include "cuda/common/activation.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/experts/weight_grad.h"
#include "omni_moe/expert.h"

namespace omni_moe::cuda {

struct TokenPassArgs {
  const void* vectors;  // [T, H]
  const void* scored;   // [E, H]
  const void* added;    // [E, H]
  const void* indices;  // [T, K], of index_type
  const void* addend;   // [T, H], or null: none
  void* out;            // [T, H], or null: not wanted
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t num_experts;
  int64_t num_experts_per_token;
  IndexType index_type;
};

// s = dot = hidden[t] · up[i]: coefficient act(s) routing.
template <class T>
struct ForwardPairs {
  const T* routing_weights;  // [T, K]
  float* scores;             // [T, K], or null: not wanted
  Activation activation;

  // What is read of a pair, long before its dot is known.
  struct Inputs {
    float weight;
  };
  __device__ __forceinline__ Inputs load(int64_t pair, bool /*stores*/) const {
    return {to_float(routing_weights[pair])};
  }
  __device__ __forceinline__ float finish(const Inputs& inputs, int64_t pair, int64_t /*token*/,
                                          float dot, bool stores) const {
    if (stores && scores != nullptr) scores[pair] = dot;
    return activate(activation, dot) * inputs.weight;
  }
};

// g = dot = grad[t] · down[i], s as the forward saved it: coefficient routing act'(s) g.
template <class T>
struct BackwardPairs {
  const T* routing_weights;       // [T, K]
  const float* scores;            // [T, K]
  T* grad_routing_weights;        // [T, K], or null: not wanted
  PairRecord* records;            // null: no weight gradient wanted
  const uint32_t* pair_position;  // [T * K], null likewise
  Activation activation;

  struct Inputs {
    float weight;
    float score;
    uint32_t position;
  };
  __device__ __forceinline__ Inputs load(int64_t pair, bool stores) const {
    return {to_float(routing_weights[pair]), scores[pair],
            stores && records != nullptr ? pair_position[pair] : 0};
  }
  __device__ __forceinline__ float finish(const Inputs& inputs, int64_t pair, int64_t token,
                                          float dot, bool stores) const {
    const ActivationResult act = activate_with_derivative(activation, inputs.score);
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
};

}  // namespace omni_moe::cuda
