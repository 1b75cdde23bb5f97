// Cartesian-product router, backward: grad_x[row] = Σ over the chosen pairs in that row of the
// gradient of their sum, grad_y[col] likewise.
//
//   kLogit         the gradient of a sum is that of its weight
//   kSoftmax       u = grad * w, w = exp(x + y - lse_x - lse_y); each axis subtracts softmax * Σ u
//   kSoftmaxTopK   w (grad - Σ grad w), w the softmax over the K chosen sums (the lse cancel)
//
// One warp or one block per token. Every warp adds a contiguous stretch of the K pairs, in order of
// k, to accumulators of its own, which are then added in order of the warps: no atomics, the same
// bits every run. Bytes moved: T K (grad, id) and T (R + C) logits in, T (R + C) gradients out.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/expert_id.cuh"
#include "cuda/common/ordered_add.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/router/router_keys.cuh"
#include "cuda/router/router_tuning.h"
#include "cuda/router/router_weights.cuh"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

namespace {

constexpr int kManyWarps = RouterBackwardTuning::kManyWarps;
constexpr int kTokensPerBlock = RouterBackwardTuning::kTokensPerBlock;

// ---- Device helpers -----------------------------------------------------------------------------

// The threads of one token: kWarps warps, the whole block if more than one.
template <int kWarps>
struct TokenGroup {
  static constexpr int kSize = kWarps * kWarpSize;
  float* scratch;  // [4][kWarps], shared; unused by one warp

  __device__ static int thread() { return threadIdx.x % kSize; }
  __device__ static void sync() {
    if constexpr (kWarps == 1)
      __syncwarp();
    else
      __syncthreads();
  }
  // Reductions between two calls of sync() need a row of the scratch each.
  __device__ float sum(float value, int row) const {
    return block_sum<kWarps>(value, scratch + row * kWarps);
  }
  __device__ float max(float value, int row) const {
    return block_max<kWarps>(value, scratch + row * kWarps);
  }
};

// One axis of one token: softmax(logits)[i] = exp(logits[i] - max) / sum.
struct SoftmaxOfAxis {
  float max;
  float sum;
};

// body(i, logits[i]) for this thread's share of the axis, 16 bytes a load where the axis is
// aligned.
template <int kWarps, class T, class Body>
__device__ __forceinline__ void group_for_each(const TokenGroup<kWarps>& group, const T* logits,
                                               int n, Body body) {
  constexpr int kVec = kVecWidth<T>;
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  const int num_vec = aligned ? n / kVec : 0;
#pragma unroll 2
  for (int v = group.thread(); v < num_vec; v += group.kSize) {
    float values[kVec];
    unpack(load_vec_readonly<Vec<T, kVec>>(logits + v * kVec), values);
#pragma unroll
    for (int i = 0; i < kVec; ++i) body(v * kVec + i, values[i]);
  }
#pragma unroll 1
  for (int i = num_vec * kVec + group.thread(); i < n; i += group.kSize) {
    body(i, to_float(logits[i]));
  }
}

template <int kWarps, class T>
__device__ __forceinline__ SoftmaxOfAxis group_softmax(const TokenGroup<kWarps>& group,
                                                       const T* logits, int n, int row) {
  SoftmaxOfAxis softmax{-INFINITY, 0.0f};
  bool any_nan = false;
  group_for_each(group, logits, n, [&](int, float logit) {
    any_nan |= logit != logit;
    softmax.max = fmaxf(softmax.max, logit);
  });
  // fmaxf ignores NaN, but the +inf put in its place makes the token undefined just as well.
  softmax.max = group.max(any_nan ? INFINITY : softmax.max, row);
  float sum = 0.0f;
  group_for_each(group, logits, n, [&](int, float logit) { sum += expf(logit - softmax.max); });
  softmax.sum = group.sum(sum, row + 1);
  return softmax;
}

// grad[i] = the sums[i] of all warps, less factor * softmax(logits)[i], or less nothing where
// logits is null.
template <int kWarps, class T>
__device__ __forceinline__ void group_write_gradient(const TokenGroup<kWarps>& group,
                                                     const float* sums, int num_sums,
                                                     const T* logits, int n,
                                                     const SoftmaxOfAxis& softmax, float factor,
                                                     T* grad) {
  constexpr int kVec = kVecWidth<T>;
  const auto total = [&](int i) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[static_cast<int64_t>(w) * num_sums + i];
    return sum;
  };
  const float scale = factor / softmax.sum;
  const bool subtracts = logits != nullptr;
  const bool aligned =
      (reinterpret_cast<uintptr_t>(grad) | reinterpret_cast<uintptr_t>(logits)) % 16 == 0;
  const int num_vec = aligned ? n / kVec : 0;
#pragma unroll 1
  for (int v = group.thread(); v < num_vec; v += group.kSize) {
    float values[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) values[i] = total(v * kVec + i);
    if (subtracts) {
      float axis[kVec];
      unpack(load_vec_readonly<Vec<T, kVec>>(logits + v * kVec), axis);
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[i] -= scale * expf(axis[i] - softmax.max);
    }
    Vec<T, kVec> out;
    pack(values, out);
    store_vec_streaming(grad + v * kVec, out);
  }
#pragma unroll 1
  for (int i = num_vec * kVec + group.thread(); i < n; i += group.kSize) {
    float value = total(i);
    if (subtracts) value -= scale * expf(to_float(logits[i]) - softmax.max);
    store_vec_streaming(grad + i, from_float<T>(value));
  }
}

// One token's chosen pairs.
template <class T>
struct ChosenPairs {
  const T* grad_weights;   // [k]
  const int32_t* indices;  // [k]
  const T* logits_x;       // [num_rows], null for kLogit
  const T* logits_y;       // [num_cols]
  int num_rows;
  int num_cols;
  int k;
  float max_x = 0.0f;  // of the logits
  float max_y = 0.0f;

  struct Pair {
    int row;
    int col;
    float grad;
  };
  __device__ Pair at(int i) const {
    const int id = indices[i];
    check_expert_id(id, static_cast<int64_t>(num_rows) * num_cols);
    const int row = static_cast<int>(static_cast<unsigned>(id) / static_cast<unsigned>(num_cols));
    return {row, id - row * num_cols, to_float(grad_weights[i])};
  }
  // The sum relative to the largest one, taken axis by axis, since a sum of large logits has lost
  // digits.
  __device__ float relative_sum(const Pair& pair) const {
    return (to_float(logits_x[pair.row]) - max_x) + (to_float(logits_y[pair.col]) - max_y);
  }
};

// What turns the gradient of a weight into that of its pair's sum.
struct GradOfSum {
  float shift;  // w = exp(relative_sum - shift) * scale
  float scale;
  float mean_grad;  // kSoftmaxTopK: Σ grad w

  __device__ float operator()(float grad, float relative_sum) const {
    return expf(relative_sum - shift) * scale * (grad - mean_grad);
  }
};

template <int kWarps, class T>
__device__ __forceinline__ GradOfSum group_softmax_top_k(const TokenGroup<kWarps>& group,
                                                         const ChosenPairs<T>& pairs) {
  float max = -INFINITY;
  for (int i = group.thread(); i < pairs.k; i += group.kSize) {
    max = fmaxf(max, pairs.relative_sum(pairs.at(i)));
  }
  max = group.max(max, 0);
  float total = 0.0f;
  float total_grad = 0.0f;
  for (int i = group.thread(); i < pairs.k; i += group.kSize) {
    const auto pair = pairs.at(i);
    const float weight = expf(pairs.relative_sum(pair) - max);
    total += weight;
    total_grad += weight * pair.grad;
  }
  total = group.sum(total, 1);
  total_grad = group.sum(total_grad, 2);
  return {max, 1.0f / total, total_grad / total};
}

// ---- One token ----------------------------------------------------------------------------------

template <int kWarps, class T>
__device__ __forceinline__ void route_backward(const RouterBackwardParams& params, int64_t t,
                                               const TokenGroup<kWarps>& group, float* sums) {
  const int num_rows = static_cast<int>(params.num_rows);
  const int num_cols = static_cast<int>(params.num_cols);
  const int num_sums = num_rows + num_cols;
  const int k = static_cast<int>(params.num_experts_per_token);
  const int thread = group.thread();
  const bool is_logit = params.score == RouterScore::kLogit;
  ChosenPairs<T> pairs{static_cast<const T*>(params.grad_weights) + t * k,
                       params.indices + t * k,
                       is_logit ? nullptr : static_cast<const T*>(params.logits_x) + t * num_rows,
                       is_logit ? nullptr : static_cast<const T*>(params.logits_y) + t * num_cols,
                       num_rows,
                       num_cols,
                       k};
  T* grad_x = static_cast<T*>(params.grad_logits_x) + t * num_rows;
  T* grad_y = static_cast<T*>(params.grad_logits_y) + t * num_cols;

  if (k > 0 && pairs.indices[0] < 0) {  // a masked token has chosen nothing
    const T zero = from_float<T>(0.0f);
    for (int i = thread; i < num_rows; i += group.kSize) grad_x[i] = zero;
    for (int i = thread; i < num_cols; i += group.kSize) grad_y[i] = zero;
    return;
  }

  // 1. Softmaxes.
  for (int i = thread; i < kWarps * num_sums; i += group.kSize) sums[i] = 0.0f;
  SoftmaxOfAxis softmax_x{0.0f, 1.0f};
  SoftmaxOfAxis softmax_y{0.0f, 1.0f};
  GradOfSum grad_of_sum{0.0f, 1.0f, 0.0f};
  if (!is_logit) {
    softmax_x = group_softmax(group, pairs.logits_x, num_rows, 0);
    softmax_y = group_softmax(group, pairs.logits_y, num_cols, 2);
    if (log_softmax_is_nan(softmax_x.max, softmax_y.max)) {
      const T nan = from_float<T>(value_of_key(kKeyOfNaN));
      for (int i = thread; i < num_rows; i += group.kSize) grad_x[i] = nan;
      for (int i = thread; i < num_cols; i += group.kSize) grad_y[i] = nan;
      return;
    }
    pairs.max_x = softmax_x.max;
    pairs.max_y = softmax_y.max;
    group.sync();
    if (params.score == RouterScore::kSoftmaxTopK) {
      grad_of_sum = group_softmax_top_k(group, pairs);
    } else {
      grad_of_sum.shift = logf(softmax_x.sum) + logf(softmax_y.sum);
    }
  }
  group.sync();

  // 2. Each warp's stretch of the pairs.
  const int stretch = round_up(ceil_div(k, kWarps), kWarpSize);
  const int warp = thread / kWarpSize;
  float* warp_sums = sums + static_cast<int64_t>(warp) * num_sums;
  float grad_total = 0.0f;
  const int end = min((warp + 1) * stretch, k);
  for (int begin = warp * stretch; begin < end; begin += kWarpSize) {
    const int i = begin + thread % kWarpSize;
    typename ChosenPairs<T>::Pair pair{-1, -1, 0.0f};
    float grad = 0.0f;
    if (i < end) {
      pair = pairs.at(i);
      grad = is_logit ? pair.grad : grad_of_sum(pair.grad, pairs.relative_sum(pair));
    }
    grad_total += grad;
    warp_add_in_order(warp_sums, pair.row, grad);
    warp_add_in_order(warp_sums + num_rows, pair.col, grad);
  }

  // 3. All warps' sums, less what the softmax takes.
  const bool subtracts = params.score == RouterScore::kSoftmax;
  const float factor = subtracts ? group.sum(grad_total, 3) : 0.0f;
  group.sync();
  group_write_gradient(group, sums, num_sums, subtracts ? pairs.logits_x : nullptr, num_rows,
                       softmax_x, factor, grad_x);
  group_write_gradient(group, sums + num_rows, num_sums, subtracts ? pairs.logits_y : nullptr,
                       num_cols, softmax_y, factor, grad_y);
}

// ---- The kernel ---------------------------------------------------------------------------------

// kShared: accumulators in dynamic shared memory, else in slice blockIdx.x of the workspace.
template <class T, int kWarps, bool kShared>
__global__ void __launch_bounds__(kWarps == 1 ? kTokensPerBlock * kWarpSize : kWarps * kWarpSize,
                                  kWarps == 1 ? 6 : 3)  // 80 registers
    router_backward_kernel(const RouterBackwardParams params) {
  extern __shared__ float shared_sums[];
  __shared__ float scratch[4 * kWarps];
  constexpr int kTokens = kWarps == 1 ? kTokensPerBlock : 1;
  const int slot = kWarps == 1 ? threadIdx.x / kWarpSize : 0;  // of the token in the block
  const int64_t num_sums = kWarps * (params.num_rows + params.num_cols);
  float* sums;
  if constexpr (kShared) {
    sums = shared_sums + slot * num_sums;
  } else {
    sums =
        static_cast<float*>(params.workspace) + (int64_t{blockIdx.x} * kTokens + slot) * num_sums;
  }
  const TokenGroup<kWarps> group{scratch};
  for (int64_t t = int64_t{blockIdx.x} * kTokens + slot; t < params.num_tokens;
       t += int64_t{gridDim.x} * kTokens) {
    route_backward<kWarps, T>(params, t, group, sums);
    group.sync();
  }
}

// ---- Launcher -----------------------------------------------------------------------------------

template <class T, int kWarps, bool kShared>
cudaError_t launch_backward_kernel(const RouterBackwardParams& params,
                                   const RouterBackwardPlan& plan, cudaStream_t stream) {
  const auto kernel = router_backward_kernel<T, kWarps, kShared>;
  const int threads = kWarps == 1 ? kTokensPerBlock * kWarpSize : kWarps * kWarpSize;
  const size_t shared_bytes = kShared ? plan.sum_bytes : 0;
  return run_steps(
      [&] { return allow_shared_memory(kernel, shared_bytes); },
      [&] {
        kernel<<<static_cast<unsigned>(plan.num_blocks), threads, shared_bytes, stream>>>(params);
        return launch_status();
      });
}

}  // namespace

cudaError_t router_backward(const RouterBackwardParams& params, const RouterBackwardPlan& plan,
                            cudaStream_t stream) {
  if (element_size(params.dtype) == 0) return cudaErrorInvalidValue;
  if (params.num_tokens == 0) return cudaSuccess;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!plan.sums_in_shared) {
      return launch_backward_kernel<T, kManyWarps, false>(params, plan, stream);
    }
    return plan.warps_per_token == 1
               ? launch_backward_kernel<T, 1, true>(params, plan, stream)
               : launch_backward_kernel<T, kManyWarps, true>(params, plan, stream);
  });
}

}  // namespace omni_moe::cuda
