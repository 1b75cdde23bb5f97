// Top-k router, forward, for up to 1024 experts and 32 per token: a warp per token, its logits in
// registers.
//
// The choice is K rounds: the greatest key of all lanes, then the smallest id that has it, two
// reductions in hardware, after which the lane that held it looks for its next one. For K = 8 that
// is less work than a sort. Groups are compared by a few lanes each, through shared memory.
// Bytes moved: T E logits in, T K (weight, id) out, E counts a block.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/router/router_axis.cuh"
#include "cuda/router/router_keys.cuh"
#include "cuda/topk_router/topk_router_forward.cuh"
#include "cuda/topk_router/topk_router_tuning.h"
#include "cuda/topk_router/topk_scores.cuh"

namespace omni_moe::cuda {

namespace {

constexpr int kWarps = TopKWarpTuning::kWarpsPerBlock;
constexpr int kThreads = kWarps * kWarpSize;

// ---- One token in registers ---------------------------------------------------------------------

// kItems logits a lane; -inf where there is none.
template <class T, int kItems>
struct TokenLogits {
  float values[kItems];

  __device__ static int position(int item) {
    return AxisLogits<T, kItems>::position(item, threadIdx.x % kWarpSize);
  }

  __device__ __forceinline__ void load(const T* logits, int n, bool use_vectors) {
    constexpr int kVec = AxisLogits<T, kItems>::kVec;
    AxisLogits<T, kItems> loaded;
    loaded.load(logits, n, threadIdx.x % kWarpSize, use_vectors);
#pragma unroll
    for (int chunk = 0; chunk < kItems / kVec; ++chunk) {
      float part[kVec];
      unpack(loaded.chunks[chunk], part);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const int item = chunk * kVec + i;
        values[item] = position(item) < n ? part[i] : -INFINITY;
      }
    }
  }

  __device__ __forceinline__ SoftmaxOfToken warp_softmax() const {
    SoftmaxOfToken softmax;
    softmax.max = -INFINITY;
    bool is_odd = false;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      is_odd |= !(values[i] < INFINITY);
      softmax.max = fmaxf(softmax.max, values[i]);
    }
    softmax.max = warp_reduce(softmax.max, [](float a, float b) { return fmaxf(a, b); });
    softmax.is_nan = __any_sync(kFullWarp, is_odd) || softmax.max == -INFINITY;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) sum += expf(values[i] - softmax.max);
    softmax.sum = warp_sum(sum);
    return softmax;
  }
};

// ---- Choice -------------------------------------------------------------------------------------

// Says which groups are among the best: bit g * lanes_per_group of the result for group g.
// `values` [E] of the token, in shared memory.
__device__ __forceinline__ unsigned warp_choose_groups(const float* values, int n_group,
                                                       int topk_group, int group_size,
                                                       GroupScore score, int lanes_per_group) {
  const int lane = threadIdx.x % kWarpSize;
  const int group = lane / lanes_per_group;
  const int sub = lane % lanes_per_group;
  TopTwo top;
  if (group < n_group) {
    const int steps = (group_size + lanes_per_group - 1) / lanes_per_group;
    const float* group_values = values + group * group_size;
    // Each group begins at another step: groups of 32 experts would all read from one bank.
    int step = group % steps;
    for (int i = 0; i < steps; ++i) {
      const int e = step * lanes_per_group + sub;
      if (e < group_size) top.add(ordered_key(group_values[e]));
      step = step + 1 == steps ? 0 : step + 1;
    }
  }
  for (int offset = 1; offset < lanes_per_group; offset *= 2) {
    const uint32_t best = __shfl_xor_sync(kFullWarp, top.best, offset);
    const uint32_t second = __shfl_xor_sync(kFullWarp, top.second, offset);
    top.add(best);
    top.second = max(top.second, second);
  }
  const uint32_t key = top.group_key(score);
  int rank = 0;
  for (int other = 0; other < n_group; ++other) {
    const uint32_t other_key = __shfl_sync(kFullWarp, key, other * lanes_per_group);
    rank += other_key > key || (other_key == key && other < group) ? 1 : 0;
  }
  return __ballot_sync(kFullWarp, group < n_group && rank < topk_group);
}

// The k greatest keys, equal ones by position: lane i gets the position of the i-th. Keys of 0
// stand for no expert; fewer than k others there are never.
template <class T, int kItems>
__device__ __forceinline__ int warp_choose(uint32_t (&keys)[kItems], int k) {
  const int lane = threadIdx.x % kWarpSize;
  uint32_t best = 0;
  unsigned best_position = 0;
  const auto find_best = [&] {
    best = keys[0];
    int item = 0;
#pragma unroll
    for (int i = 1; i < kItems; ++i) {
      const bool is_better = keys[i] > best;
      best = is_better ? keys[i] : best;
      item = is_better ? i : item;
    }
    best_position = TokenLogits<T, kItems>::position(item);
  };
  find_best();
  int chosen = -1;
  for (int round = 0; round < k; ++round) {
    const uint32_t greatest = __reduce_max_sync(kFullWarp, best);
    const unsigned position =
        __reduce_min_sync(kFullWarp, best == greatest ? best_position : 0xffffffffu);
    if (lane == round) chosen = static_cast<int>(position);
    if (best == greatest && best_position == position) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (TokenLogits<T, kItems>::position(i) == static_cast<int>(position)) keys[i] = 0;
      }
      find_best();
    }
  }
  return chosen;
}

// ---- One token ----------------------------------------------------------------------------------

// How a kernel's tokens lie in groups, the same for all.
struct Groups {
  int size;
  int lanes_per_group;
  float inverse_size;

  // The group of an expert. The half keeps the product away from where rounding could reach the
  // next integer.
  __device__ int of(int expert) const {
    return static_cast<int>((static_cast<float>(expert) + 0.5f) * inverse_size);
  }
};

// The choice of a token: lane i gets the i-th id. `shared_values` [E], of this warp.
template <class T, int kItems>
__device__ __forceinline__ int warp_choose_experts(const TopKRouterForwardParams& params,
                                                   const TokenLogits<T, kItems>& token,
                                                   const SoftmaxOfToken& softmax,
                                                   const Groups& groups, float* shared_values) {
  const int n = static_cast<int>(params.num_experts);
  const auto* bias = static_cast<const float*>(params.bias);
  const bool is_softmax = params.scoring_func == ScoringFunction::kSoftmax;
  const bool chooses_groups = params.topk_group < params.n_group;
  const bool sums_scores = chooses_groups && params.group_score == GroupScore::kTop2Sum;

  // 1. Scores with the bias where they are needed: without one, they are in the order of the
  //    logits.
  uint32_t keys[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int position = token.position(i);
    const bool is_expert = position < n;
    float value = token.values[i];
    float group_value = value;
    if (softmax.is_nan) {
      value = group_value = value_of_key(kKeyOfNaN);
    } else if (bias != nullptr || sums_scores) {
      group_value = is_softmax ? softmax(value) : score_of(params.scoring_func, value);
      if (bias != nullptr) {
        if (is_expert) group_value += bias[position];
        value = group_value;
      }
    }
    keys[i] = is_expert ? ordered_key(value) : 0;
    if (chooses_groups && is_expert) shared_values[position] = group_value;
  }

  // 2. Groups.
  if (chooses_groups) {
    __syncwarp();
    const unsigned kept = warp_choose_groups(shared_values, static_cast<int>(params.n_group),
                                             static_cast<int>(params.topk_group), groups.size,
                                             params.group_score, groups.lanes_per_group);
    __syncwarp();  // before the next token's values
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int bit = groups.of(token.position(i)) * groups.lanes_per_group;
      keys[i] = (kept >> (bit & 31) & 1) != 0 ? keys[i] : 0;
    }
  }

  // 3. Experts.
  return warp_choose<T, kItems>(keys, static_cast<int>(params.num_experts_per_token));
}

// ---- The kernel ---------------------------------------------------------------------------------

template <class T, int kItems>
__global__ void __launch_bounds__(kThreads, kItems <= 8 ? TopKWarpTuning::kBlocksPerSm : 2)
    topk_router_forward_warp_kernel(const TopKRouterForwardParams params, const Groups groups,
                                    bool use_vectors) {
  extern __shared__ int32_t counts[];  // [E], then values of each warp
  let_next_kernel_start();
  const int n = static_cast<int>(params.num_experts);
  const int k = static_cast<int>(params.num_experts_per_token);
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  float* shared_values = reinterpret_cast<float*>(counts + n) + warp * n;
  for (int e = threadIdx.x; e < n; e += kThreads) counts[e] = 0;
  __syncthreads();
  wait_for_previous_kernel();

  const bool is_softmax = params.scoring_func == ScoringFunction::kSoftmax;
  for (int64_t t = int64_t{blockIdx.x} * kWarps + warp; t < params.num_tokens;
       t += int64_t{gridDim.x} * kWarps) {
    int id = -1;
    float weight = 0.0f;
    if (params.token_mask == nullptr || params.token_mask[t]) {
      // 1. Logits and choice.
      const T* logits = static_cast<const T*>(params.logits) + t * n;
      TokenLogits<T, kItems> token;
      token.load(logits, n, use_vectors);
      const SoftmaxOfToken softmax = is_softmax ? token.warp_softmax() : SoftmaxOfToken{};
      if (params.replay_ids == nullptr) {
        id = warp_choose_experts(params, token, softmax, groups, shared_values);
      } else if (lane < k) {
        id = load_id_or_none(params.replay_ids, t * k + lane, n);
      }
      const bool is_chosen = id >= 0;

      // 2. Weights.
      const float logit = is_chosen ? to_float(logits[id]) : -INFINITY;
      const float max_chosen = warp_reduce(logit, [](float a, float b) { return fmaxf(a, b); });
      weight = is_chosen ? raw_weight(params, softmax, logit, max_chosen) : 0.0f;
      const float scale = weight_scale(params, warp_sum(weight));
      weight = is_chosen ? weight * scale : 0.0f;
      if (is_chosen) atomicAdd(&counts[id], 1);
    }
    if (lane < k) {
      static_cast<T*>(params.weights)[t * k + lane] = from_float<T>(weight);
      params.indices[t * k + lane] = id;
    }
  }
  write_block_counts(params, counts);
}

// ---- Launcher -----------------------------------------------------------------------------------

template <class T, int kItems>
cudaError_t launch_warp_kernel(const TopKRouterForwardParams& params,
                               const TopKRouterForwardPlan& plan, cudaStream_t stream) {
  constexpr int kVec = AxisLogits<T, kItems>::kVec;
  const bool use_vectors =
      params.num_experts % kVec == 0 && is_aligned(params.logits, kVec * sizeof(T));
  Groups groups{static_cast<int>(params.num_experts / params.n_group), kWarpSize, 1.0f};
  while (groups.lanes_per_group * params.n_group > kWarpSize && groups.lanes_per_group > 1) {
    groups.lanes_per_group /= 2;
  }
  groups.inverse_size = 1.0f / static_cast<float>(groups.size);
  const LaunchOptions options{dim3(static_cast<unsigned>(plan.num_blocks)), kThreads,
                              plan.shared_bytes};
  return launch_early(topk_router_forward_warp_kernel<T, kItems>, options, plan.device, stream,
                      params, groups, use_vectors);
}

}  // namespace

cudaError_t topk_router_forward_warp(const TopKRouterForwardParams& params,
                                     const TopKRouterForwardPlan& plan, cudaStream_t stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (plan.items_per_lane) {
      case 2:
        return launch_warp_kernel<T, 2>(params, plan, stream);
      case 8:
        return launch_warp_kernel<T, 8>(params, plan, stream);
      default:
        return launch_warp_kernel<T, 32>(params, plan, stream);
    }
  });
}

}  // namespace omni_moe::cuda
