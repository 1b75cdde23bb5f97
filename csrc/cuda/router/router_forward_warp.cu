// Cartesian-product router, forward, for few experts per token: one warp per token, everything in
// registers, shuffles and a little shared memory.
//
// The K best of the R × C sums x[row] + y[col]: the warp sorts the best K + 1 logits of each axis
// (router_axis.cuh), then selects among the pairs that their ranks allow (router_candidates.cuh).
// Selection bisects the integer key of the values: each probe is a count over the warp's registers,
// until between K and the sort's width are left. Bytes moved: T (R + C) logits in, T K (weight, id)
// out.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/router/router_axis.cuh"
#include "cuda/router/router_candidates.cuh"
#include "cuda/router/router_forward.h"
#include "cuda/router/router_keys.cuh"
#include "cuda/router/router_ties.cuh"
#include "cuda/router/router_tuning.h"
#include "cuda/router/router_weights.cuh"
#include "omni_moe/router.h"

namespace omni_moe::cuda {

namespace {

constexpr int kWarpsPerBlock = RouterWarpTuning::kWarpsPerBlock;
constexpr int kThreads = kWarpsPerBlock * kWarpSize;

// ---- The kernel ---------------------------------------------------------------------------------

// 8 blocks, 64 registers: 4096 tokens on 132 SMs are one wave. fp32 logits need more registers, and
// on sm_80 so do long axes of any type.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kMinBlocksOfLongAxis = 6;
#else
constexpr int kMinBlocksOfLongAxis = 8;
#endif
template <class T, int kItems, int kCapacity>
inline constexpr int kMinBlocksPerSm = sizeof(T) != 2                     ? (kItems <= 8 ? 6 : 4)
                                       : kItems == 32 && kCapacity == 256 ? 6
                                       : kItems <= 8                      ? 8
                                                                          : kMinBlocksOfLongAxis;

// Sorts the best k + 1 logits of each axis into `storage`; num_top says how many those are, and
// log_total is, for kSoftmax, log Σ exp(logit - max), summed over the axes. One loop body serves
// both axes: half the code, half the registers. Short axes are both loaded before the first is
// used; of long axes the second comes to L2 while the first is sorted.
template <class T, int kItems, int kCapacity>
__device__ __forceinline__ void warp_sort_axes(const Token<T>& token, RouterScore score,
                                               bool vectors_x, bool vectors_y,
                                               WarpStorage<kCapacity>& storage, int (&num_top)[2],
                                               float& log_total) {
  constexpr bool kPrefetch = kItems * sizeof(T) <= 16;
  const int lane = threadIdx.x % kWarpSize;
  AxisLogits<T, kItems> logits;
  AxisLogits<T, kItems> logits_y;
  if constexpr (kPrefetch) {
    logits.load(token.logits_x, token.num_rows, lane, vectors_x);
    logits_y.load(token.logits_y, token.num_cols, lane, vectors_y);
  } else {
    prefetch_axis(token.logits_y, token.num_cols, lane);
  }
#pragma unroll 1
  for (int which = 0; which < 2; ++which) {
    const int n = which == 0 ? token.num_rows : token.num_cols;
    if constexpr (!kPrefetch) {
      logits.load(which == 0 ? token.logits_x : token.logits_y, n, lane,
                  which == 0 ? vectors_x : vectors_y);
    }
    const AxisKeys<T, kItems> axis(logits, n, lane);
    const uint32_t max_key = axis.warp_max_key();
    if (score == RouterScore::kSoftmax) {
      log_total += axis.warp_log_sum_exp_below(axis.value(max_key));
    }
    const int count =
        warp_sort_top(axis, min(token.k + 1, n), max_key, storage.axis[which], storage.entries);
    // A store at a runtime index would put the state into local memory.
    if (which == 0) {
      num_top[0] = count;
      if constexpr (kPrefetch) logits = logits_y;
    } else {
      num_top[1] = count;
    }
  }
}

// Writes the weights and ids of the chosen entries.
template <class T>
__device__ __forceinline__ void warp_write_choice(const uint64_t* entries, int k, RouterScore score,
                                                  const SoftmaxWeights<T>& weight_of, T* weights,
                                                  int32_t* indices) {
  const int lane = threadIdx.x % kWarpSize;
  float scale = 1.0f;
  if (score == RouterScore::kSoftmaxTopK) {
    float sum = 0.0f;
    for (int i = lane; i < k; i += kWarpSize) sum += weight_of(id_of_entry(entries[i]));
    scale = warp_sum(sum);
  }
  for (int i = lane; i < k; i += kWarpSize) {
    const uint64_t entry = entries[i];
    const uint32_t id = id_of_entry(entry);
    const float weight =
        score == RouterScore::kLogit ? value_of_key(key_of_entry(entry)) : weight_of(id) / scale;
    weights[i] = from_float<T>(weight);
    indices[i] = static_cast<int32_t>(id);
  }
}

template <class T, int kItems, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm<T, kItems, kCapacity>)
    router_forward_warp_kernel(const RouterForwardParams params, int num_candidates, bool vectors_x,
                               bool vectors_y) {
  __shared__ WarpStorage<kCapacity> block_storage[kWarpsPerBlock];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp;
  if (t >= params.num_tokens) return;
  WarpStorage<kCapacity>& storage = block_storage[warp];
  const int k = static_cast<int>(params.num_experts_per_token);
  const Token<T> token{static_cast<const T*>(params.logits_x) + t * params.num_rows,
                       static_cast<const T*>(params.logits_y) + t * params.num_cols,
                       static_cast<int>(params.num_rows), static_cast<int>(params.num_cols), k};
  const RouterScore score = params.score;

  // 1. The best k + 1 logits of each axis.
  int num_top[2];
  float log_total = 0.0f;
  warp_sort_axes<T, kItems>(token, score, vectors_x, vectors_y, storage, num_top, log_total);
  const float max_x = storage.axis[0].value[0];
  const float max_y = storage.axis[1].value[0];

  T* weights = static_cast<T*>(params.weights) + t * k;
  int32_t* indices = params.indices + t * k;
  if (score != RouterScore::kLogit && log_softmax_is_nan(max_x, max_y)) {
    for (int i = lane; i < k; i += kWarpSize) {
      weights[i] = from_float<T>(value_of_key(kKeyOfNaN));
      indices[i] = i;
    }
    return;
  }

  // 2. The k best pairs.
  const bool both_infinities =
      (may_exceed_finite(max_x) && warp_any_negative_inf(token.logits_y, token.num_cols)) ||
      (may_exceed_finite(max_y) && warp_any_negative_inf(token.logits_x, token.num_rows));
  if (both_infinities) {
    warp_choose_from_grid<kCapacity>(token, storage.entries);
  } else {
    warp_choose(token, num_top[0], num_top[1], num_candidates, storage);
  }

  // 3. Weights and ids.
  const SoftmaxWeights<T> weight_of{
      token.logits_x, token.logits_y, static_cast<uint32_t>(token.num_cols),
      max_x,          max_y,          log_total};
  warp_write_choice(storage.entries, k, score, weight_of, weights, indices);
}

// ---- Launcher -----------------------------------------------------------------------------------

template <class T, int kItems, int kCapacity>
cudaError_t launch_warp_kernel(const RouterForwardParams& params, const RouterForwardPlan& plan,
                               cudaStream_t stream) {
  constexpr int kVec = AxisKeys<T, kItems>::kVec;
  const auto allows_vectors = [](const void* logits, int64_t n) {
    return n % kVec == 0 && is_aligned(logits, kVec * sizeof(T));
  };
  return launch_early(router_forward_warp_kernel<T, kItems, kCapacity>,
                      static_cast<unsigned>(plan.num_blocks), kThreads, plan.device, stream, params,
                      num_rank_pairs(static_cast<int>(params.num_experts_per_token)),
                      allows_vectors(params.logits_x, params.num_rows),
                      allows_vectors(params.logits_y, params.num_cols));
}

template <class T, int kItems>
cudaError_t launch_for_width(const RouterForwardParams& params, const RouterForwardPlan& plan,
                             cudaStream_t stream) {
  switch (plan.sort_width) {
    case 32:
      return launch_warp_kernel<T, kItems, 32>(params, plan, stream);
    case 64:
      return launch_warp_kernel<T, kItems, 64>(params, plan, stream);
    case 128:
      return launch_warp_kernel<T, kItems, 128>(params, plan, stream);
    default:
      return launch_warp_kernel<T, kItems, 256>(params, plan, stream);
  }
}

}  // namespace

cudaError_t router_forward_warp(const RouterForwardParams& params, const RouterForwardPlan& plan,
                                cudaStream_t stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (plan.items_per_lane) {
      case 2:
        return launch_for_width<T, 2>(params, plan, stream);
      case 8:
        return launch_for_width<T, 8>(params, plan, stream);
      case 16:
        return launch_for_width<T, 16>(params, plan, stream);
      default:
        return launch_for_width<T, 32>(params, plan, stream);
    }
  });
}

}  // namespace omni_moe::cuda
