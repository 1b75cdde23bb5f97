// Top-k router, forward, for any shape up to 4096 experts: a block per token, which sorts the
// token's experts by key and id in shared memory.
//
// Bytes moved: T E logits in (again from cache where scores are computed twice), T K (weight, id)
// out, E counts a block.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/router/router_block_sort.cuh"
#include "cuda/router/router_keys.cuh"
#include "cuda/topk_router/topk_router_forward.cuh"
#include "cuda/topk_router/topk_scores.cuh"

namespace omni_moe::cuda {

namespace {

using router_block::kThreads;
using router_block::kWarps;

struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Rows of the scratch of reductions: each is used once between two barriers.
using Scratch = float[4][kWarps];

// ---- One token ----------------------------------------------------------------------------------

template <class T>
struct Token {
  const TopKRouterForwardParams& params;
  const T* logits;
  SoftmaxOfToken softmax;

  __device__ float logit(int e) const { return to_float(logits[e]); }
  // The score, with the bias.
  __device__ float score(int e) const {
    if (softmax.is_nan) return value_of_key(kKeyOfNaN);
    const auto* bias = static_cast<const float*>(params.bias);
    const float own = params.scoring_func == ScoringFunction::kSoftmax
                          ? softmax(logit(e))
                          : score_of(params.scoring_func, logit(e));
    return bias == nullptr ? own : own + bias[e];
  }
  // What experts are chosen by: without a bias, scores are in the order of the logits.
  __device__ float value(int e) const {
    return params.bias == nullptr && !softmax.is_nan ? logit(e) : score(e);
  }
};

template <class T>
__device__ __forceinline__ SoftmaxOfToken block_softmax(const T* logits, int n, Scratch& scratch) {
  SoftmaxOfToken softmax;
  float max = -INFINITY;
  bool is_odd = false;
  for (int e = threadIdx.x; e < n; e += kThreads) {
    const float logit = to_float(logits[e]);
    is_odd |= !(logit < INFINITY);
    max = fmaxf(max, logit);
  }
  // fmaxf ignores NaN, but the +inf put in its place makes the token undefined just as well.
  softmax.max = block_reduce<kWarps>(is_odd ? INFINITY : max, scratch[0], Max{});
  softmax.is_nan = isinf(softmax.max);
  float sum = 0.0f;
  for (int e = threadIdx.x; e < n; e += kThreads) sum += expf(to_float(logits[e]) - softmax.max);
  softmax.sum = block_sum<kWarps>(sum, scratch[1]);
  return softmax;
}

// flags[g * size] = 1 for the groups that are kept, else 0; `flags` [E].
template <class T>
__device__ __forceinline__ void block_choose_groups(const Token<T>& token, uint32_t* flags) {
  const TopKRouterForwardParams& params = token.params;
  const int n_group = static_cast<int>(params.n_group);
  const int size = static_cast<int>(params.num_experts / params.n_group);
  for (int g = threadIdx.x; g < n_group; g += kThreads) {
    TopTwo top;
    for (int e = g * size; e < (g + 1) * size; ++e) {
      top.add(ordered_key(params.group_score == GroupScore::kTop2Sum ? token.score(e)
                                                                     : token.value(e)));
    }
    flags[g * size] = top.group_key(params.group_score);
  }
  __syncthreads();
  // Flags replace the keys when all ranks are known. Of up to 4096 groups a thread has 16.
  uint32_t kept = 0;
  int turn = 0;
  for (int g = threadIdx.x; g < n_group; g += kThreads, ++turn) {
    const uint32_t key = flags[g * size];
    int rank = 0;
    for (int other = 0; other < n_group; ++other) {
      const uint32_t other_key = flags[other * size];
      rank += other_key > key || (other_key == key && other < g) ? 1 : 0;
    }
    kept |= rank < params.topk_group ? 1u << turn : 0u;
  }
  __syncthreads();
  turn = 0;
  for (int g = threadIdx.x; g < n_group; g += kThreads, ++turn) flags[g * size] = kept >> turn & 1;
  __syncthreads();
}

// The token's experts in order, those of groups that are not kept at the end. `lists` [2][E].
template <class T>
__device__ __forceinline__ const uint64_t* block_sort_experts(const Token<T>& token,
                                                              uint64_t* lists) {
  const TopKRouterForwardParams& params = token.params;
  const int n = static_cast<int>(params.num_experts);
  const int size = static_cast<int>(params.num_experts / params.n_group);
  auto* flags = reinterpret_cast<uint32_t*>(lists + n);  // before the second list is
  const bool chooses_groups = params.topk_group < params.n_group;
  if (chooses_groups) block_choose_groups(token, flags);
  router_block::block_sort_chunks(n, lists, 0, [&](int e) {
    const bool is_kept = !chooses_groups || flags[e / size * size] != 0;
    // Entries stay distinct, as the merge asks: the id is in their lower half.
    return make_entry(is_kept ? ordered_key(token.value(e)) : 0, e);
  });
  return router_block::block_merge_chunks(lists, lists + n, n);
}

// Writes the weights and ids of a token and counts its experts. id_at(i): the i-th id, or -1.
template <class T, class IdAt>
__device__ __forceinline__ void block_write_token(const Token<T>& token, int64_t t, IdAt id_at,
                                                  int32_t* counts, Scratch& scratch) {
  const TopKRouterForwardParams& params = token.params;
  const int k = static_cast<int>(params.num_experts_per_token);
  float max_chosen = -INFINITY;
  for (int i = threadIdx.x; i < k; i += kThreads) {
    const int id = id_at(i);
    if (id >= 0) max_chosen = fmaxf(max_chosen, token.logit(id));
  }
  max_chosen = block_reduce<kWarps>(max_chosen, scratch[2], Max{});
  const auto weight_of = [&](int id) {
    return id < 0 ? 0.0f : raw_weight(params, token.softmax, token.logit(id), max_chosen);
  };
  float sum = 0.0f;
  for (int i = threadIdx.x; i < k; i += kThreads) sum += weight_of(id_at(i));
  const float scale = weight_scale(params, block_sum<kWarps>(sum, scratch[3]));
  for (int i = threadIdx.x; i < k; i += kThreads) {
    const int id = id_at(i);
    static_cast<T*>(params.weights)[t * k + i] =
        from_float<T>(id < 0 ? 0.0f : weight_of(id) * scale);
    params.indices[t * k + i] = id;
    if (id >= 0) atomicAdd(&counts[id], 1);
  }
}

// ---- The kernel ---------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads)
    topk_router_forward_block_kernel(const TopKRouterForwardParams params) {
  extern __shared__ uint64_t lists[];  // [2][E], then counts [E]
  __shared__ Scratch scratch;
  let_next_kernel_start();
  const int n = static_cast<int>(params.num_experts);
  const int k = static_cast<int>(params.num_experts_per_token);
  auto* counts = reinterpret_cast<int32_t*>(lists + 2 * n);
  for (int e = threadIdx.x; e < n; e += kThreads) counts[e] = 0;
  wait_for_previous_kernel();

  for (int64_t t = blockIdx.x; t < params.num_tokens; t += gridDim.x) {
    __syncthreads();  // the counts are zero, and the last token's lists and scratch were read
    if (params.token_mask != nullptr && !params.token_mask[t]) {
      for (int i = threadIdx.x; i < k; i += kThreads) {
        static_cast<T*>(params.weights)[t * k + i] = from_float<T>(0.0f);
        params.indices[t * k + i] = -1;
      }
      continue;
    }
    Token<T> token{params, static_cast<const T*>(params.logits) + t * n, {}};
    if (params.scoring_func == ScoringFunction::kSoftmax) {
      token.softmax = block_softmax(token.logits, n, scratch);
    }
    if (params.replay_ids != nullptr) {
      const auto replayed = [&](int i) { return load_id_or_none(params.replay_ids, t * k + i, n); };
      block_write_token(token, t, replayed, counts, scratch);
    } else {
      const uint64_t* sorted = block_sort_experts(token, lists);
      const auto sorted_id = [&](int i) { return static_cast<int>(id_of_entry(sorted[i])); };
      block_write_token(token, t, sorted_id, counts, scratch);
    }
  }
  write_block_counts(params, counts);
}

}  // namespace

cudaError_t topk_router_forward_block(const TopKRouterForwardParams& params,
                                      const TopKRouterForwardPlan& plan, cudaStream_t stream) {
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const LaunchOptions options{dim3(static_cast<unsigned>(plan.num_blocks)), kThreads,
                                plan.shared_bytes};
    return run_steps(
        [&] { return allow_shared_memory(topk_router_forward_block_kernel<T>, plan.shared_bytes); },
        [&] {
          return launch_early(topk_router_forward_block_kernel<T>, options, plan.device, stream,
                              params);
        });
  });
}

}  // namespace omni_moe::cuda
