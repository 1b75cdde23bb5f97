// Permute: the rows of tokens in expert order. Each token is read once and written to its K rows,
// times their weights where there are any (the gradient of an un-permutation).
//
// Memory is the bound: T H elements in, N H out.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/permute/permute_rows.cuh"
#include "cuda/permute/permute_tuning.h"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

namespace {

// Writes one vector of a token to its rows.
template <class T, int kVec, bool kHasWeights>
__device__ __forceinline__ void write_to_rows(const PermuteParams& params, int64_t token,
                                              int64_t col) {
  const int64_t n = params.hidden_size, k = params.num_experts_per_token;
  const auto vec = load_vec<Vec<T, kVec>>(static_cast<const T*>(params.tokens) + token * n + col);
  float values[kVec];
  if constexpr (kHasWeights) unpack(vec, values);
#pragma unroll 4
  for (int64_t pair = token * k; pair < (token + 1) * k; ++pair) {
    const int32_t row = load_id_or_none(params.row_id_map, pair, params.num_rows);
    if (row < 0) continue;
    T* out = static_cast<T*>(params.rows) + row * n + col;
    if constexpr (kHasWeights) {
      const float weight = load_weight<T>(params, params.weights, pair);
      float scaled[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) scaled[i] = weight * values[i];
      Vec<T, kVec> scaled_vec;
      pack(scaled, scaled_vec);
      store_vec(out, scaled_vec);
    } else {
      store_vec(out, vec);
    }
  }
}

template <class T, int kVec, bool kHasWeights>
__global__ void __launch_bounds__(PermuteTuning::kThreads, PermuteTuning::kBlocksPerSm)
    permute_kernel(const PermuteParams params, int threads_per_row) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Place place(threads_per_row);
  if (place.index < params.num_tokens) {
    for (int64_t col = place.thread * kVec; col < params.hidden_size;
         col += place.num_threads * kVec) {
      write_to_rows<T, kVec, kHasWeights>(params, place.index, col);
    }
  }
  clear_empty_rows<T, kVec>(params, params.expert_ends, static_cast<T*>(params.rows), place);
}

}  // namespace

cudaError_t permute(const PermuteParams& params, const PermutePlan& plan, cudaStream_t stream) {
  if (element_size(params.dtype) == 0) return cudaErrorInvalidValue;
  if (plan.num_blocks == 0) return cudaSuccess;
  if (plan.num_blocks > INT32_MAX) return cudaErrorInvalidValue;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto vec, auto has_weights) {
      return launch_early(permute_kernel<T, decltype(vec)::value, decltype(has_weights)::value>,
                          static_cast<unsigned>(plan.num_blocks), PermuteTuning::kThreads,
                          plan.device, stream, params, plan.threads_per_row);
    };
    const auto run_with = [&](auto has_weights) {
      return plan.uses_vectors ? run(ValueTag<kVecWidth<T>>{}, has_weights)
                               : run(ValueTag<1>{}, has_weights);
    };
    return params.weights != nullptr ? run_with(ValueTag<true>{}) : run_with(ValueTag<false>{});
  });
}

}  // namespace omni_moe::cuda
