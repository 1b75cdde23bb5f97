// Top-k router, backward: the gradient of a token's logits through the scores of its chosen
// experts.
//
// With c the scaling factor, s the scores of the chosen experts and g the gradient of the weights:
//   w = c s            grad_s = c g
//   w = c s / Σ s      grad_s = c (g - Σ g s / Σ s) / Σ s
// and the gradient of a logit is grad_s times the slope of its score. That of a softmax over all
// experts is c (g p - p Σ g p) for every expert, g being 0 where it is not chosen; that of one over
// the chosen is c q (g - Σ g q) for these alone.
//
// A warp per token adds up in shared memory, in order of k: no atomics, the same bits every run.
// Bytes moved: T K (grad, id) and, for a softmax, T E logits in, T E gradients out.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/common/ordered_add.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/topk_router/topk_router_tuning.h"
#include "cuda/topk_router/topk_scores.cuh"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

namespace {

constexpr int kMaxThreads = TopKBackwardTuning::kMaxWarps * kWarpSize;

// ---- Device helpers -----------------------------------------------------------------------------

__device__ __forceinline__ float warp_max(float value) {
  return warp_reduce(value, [](float a, float b) { return fmaxf(a, b); });
}

// Rows are read and written by vectors in all tokens or in none: a sum must not depend on where its
// token lies in the batch.

// body(e, logits[e]) for this lane's share of a token.
template <class T, class Body>
__device__ __forceinline__ void warp_for_each(const T* logits, int n, bool use_vectors, Body body) {
  constexpr int kVec = kVecWidth<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int num_vec = use_vectors ? n / kVec : 0;
#pragma unroll 2
  for (int v = lane; v < num_vec; v += kWarpSize) {
    float values[kVec];
    unpack(load_vec<Vec<T, kVec>>(logits + v * kVec), values);
#pragma unroll
    for (int i = 0; i < kVec; ++i) body(v * kVec + i, values[i]);
  }
  for (int e = num_vec * kVec + lane; e < n; e += kWarpSize) body(e, to_float(logits[e]));
}

template <class T>
__device__ __forceinline__ SoftmaxOfToken warp_softmax(const T* logits, int n, bool use_vectors) {
  SoftmaxOfToken softmax;
  float max = -INFINITY;
  bool is_odd = false;
  warp_for_each(logits, n, use_vectors, [&](int, float logit) {
    is_odd |= !(logit < INFINITY);
    max = fmaxf(max, logit);
  });
  softmax.max = warp_max(max);
  softmax.is_nan = __any_sync(kFullWarp, is_odd) || softmax.max == -INFINITY;
  float sum = 0.0f;
  warp_for_each(logits, n, use_vectors,
                [&](int, float logit) { sum += expf(logit - softmax.max); });
  softmax.sum = warp_sum(sum);
  return softmax;
}

// grad[e] = value(e, logits[e]); logits are read only where `reads_logits`.
template <class T, class Value>
__device__ __forceinline__ void warp_write_row(T* grad, const T* logits, int n, bool reads_logits,
                                               bool use_vectors, Value value) {
  constexpr int kVec = kVecWidth<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int num_vec = use_vectors ? n / kVec : 0;
  for (int v = lane; v < num_vec; v += kWarpSize) {
    float row[kVec] = {};
    if (reads_logits) unpack(load_vec<Vec<T, kVec>>(logits + v * kVec), row);
#pragma unroll
    for (int i = 0; i < kVec; ++i) row[i] = value(v * kVec + i, row[i]);
    Vec<T, kVec> out;
    pack(row, out);
    store_vec(grad + v * kVec, out);
  }
  for (int e = num_vec * kVec + lane; e < n; e += kWarpSize) {
    grad[e] = from_float<T>(value(e, reads_logits ? to_float(logits[e]) : 0.0f));
  }
}

// ---- One token ----------------------------------------------------------------------------------

// A token's chosen experts.
template <class T>
struct ChosenExperts {
  const TopKRouterBackwardParams& params;
  const T* logits;  // [E]
  const T* grads;   // [K]
  const int32_t* ids;

  __device__ int id(int i) const { return load_id_or_none(ids, i, params.num_experts); }
  __device__ float logit(int id) const { return to_float(logits[id]); }
  __device__ float grad(int i) const {
    return to_float(grads[i]) * static_cast<float>(params.routed_scaling_factor);
  }
};

template <class T>
__device__ __forceinline__ void warp_token_gradient(const ChosenExperts<T>& chosen, T* grad_logits,
                                                    bool use_vectors, float* sums) {
  const TopKRouterBackwardParams& params = chosen.params;
  const int n = static_cast<int>(params.num_experts);
  const int k = static_cast<int>(params.num_experts_per_token);
  const int lane = threadIdx.x % kWarpSize;
  const bool is_softmax = params.scoring_func == ScoringFunction::kSoftmax;

  // 1. The scores and their sums. A token that chose nothing has no gradient, whatever its logits.
  for (int e = lane; e < n; e += kWarpSize) sums[e] = 0.0f;
  bool any = false;
  float max_chosen = -INFINITY;
  for (int i = lane; i < k; i += kWarpSize) {
    const int id = chosen.id(i);
    any |= id >= 0;
    if (id >= 0) max_chosen = fmaxf(max_chosen, chosen.logit(id));
  }
  any = __any_sync(kFullWarp, any);
  max_chosen = warp_max(max_chosen);
  const SoftmaxOfToken softmax =
      any && is_softmax ? warp_softmax(chosen.logits, n, use_vectors) : SoftmaxOfToken{};
  float totals[2] = {};  // Σ s, Σ g s
  for (int i = lane; i < k; i += kWarpSize) {
    const int id = chosen.id(i);
    if (id < 0) continue;
    const float score = raw_weight(params, softmax, chosen.logit(id), max_chosen);
    totals[0] += score;
    totals[1] += chosen.grad(i) * score;
  }
  warp_sum(totals);
  const float sum = totals[0] + (is_softmax ? 0.0f : static_cast<float>(kNormEpsilon));
  const float weighted = totals[1];
  const float mean = params.norm_topk_prob ? weighted / sum : 0.0f;
  const float scale = params.norm_topk_prob ? 1.0f / sum : 1.0f;
  __syncwarp();

  // 2. What each chosen expert adds to its logit.
  for (int begin = 0; begin < k; begin += kWarpSize) {
    const int i = begin + lane;
    const int id = i < k ? chosen.id(i) : -1;
    float grad = 0.0f;
    if (id >= 0) {
      const float logit = chosen.logit(id);
      const float slope = is_softmax ? raw_weight(params, softmax, logit, max_chosen)
                                     : score_slope(params.scoring_func, logit);
      grad = (chosen.grad(i) - mean) * scale * slope;
    }
    warp_add_in_order(sums, id, grad);
  }

  // 3. The row, less what a softmax over all experts takes from each.
  const bool subtracts = any && is_softmax && !params.norm_topk_prob && !softmax.is_nan;
  warp_write_row(grad_logits, chosen.logits, n, subtracts, use_vectors, [&](int e, float logit) {
    if (softmax.is_nan) return value_of_key(kKeyOfNaN);
    return subtracts ? sums[e] - softmax(logit) * weighted : sums[e];
  });
}

// ---- The kernel ---------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    topk_router_backward_kernel(const TopKRouterBackwardParams params, bool use_vectors) {
  extern __shared__ float shared_sums[];  // [warps][E]
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t n = params.num_experts;
  const int64_t k = params.num_experts_per_token;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  for (int64_t t = int64_t{blockIdx.x} * warps + warp; t < params.num_tokens;
       t += int64_t{gridDim.x} * warps) {
    const ChosenExperts<T> chosen{params, static_cast<const T*>(params.logits) + t * n,
                                  static_cast<const T*>(params.grad_weights) + t * k,
                                  params.indices + t * k};
    warp_token_gradient(chosen, static_cast<T*>(params.grad_logits) + t * n, use_vectors,
                        shared_sums + warp * n);
    __syncwarp();  // before the next token's zeros
  }
}

}  // namespace

cudaError_t topk_router_backward(const TopKRouterBackwardParams& params,
                                 const TopKRouterBackwardPlan& plan, cudaStream_t stream) {
  if (element_size(params.dtype) == 0) return cudaErrorInvalidValue;
  if (params.num_experts > TopKRouterTuning::kMaxExperts) return cudaErrorInvalidValue;
  if (params.num_tokens == 0 || params.num_experts == 0) return cudaSuccess;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const LaunchOptions options{dim3(static_cast<unsigned>(plan.num_blocks)),
                                static_cast<unsigned>(plan.warps_per_block * kWarpSize),
                                plan.shared_bytes};
    const bool use_vectors = params.num_experts % kVecWidth<T> == 0 &&
                             is_aligned(params.logits, 16) && is_aligned(params.grad_logits, 16);
    return launch_early(topk_router_backward_kernel<T>, options, plan.device, stream, params,
                        use_vectors);
  });
}

}  // namespace omni_moe::cuda
