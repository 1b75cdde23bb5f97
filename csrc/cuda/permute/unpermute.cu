// Un-permute: each token is the sum of its K rows times their weights, in fp32, in order of k: a
// gather without atomics, the same bits every run. With weights of one it is the gradient of a
// permutation.
//
// Memory is the bound: N H elements in (of the rows that pairs have), T H out.
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

constexpr int kBatch = 4;        // rows on their way at once: 64 bytes a thread
constexpr int kBlocksPerSm = 3;  // 64 registers, those of four blocks, spill

// One vector of a token.
template <class T, int kVec>
__device__ __forceinline__ void sum_rows(const UnpermuteParams& params, int64_t token,
                                         int64_t col) {
  using V = Vec<T, kVec>;
  const int64_t n = params.hidden_size, k = params.num_experts_per_token;
  const T* rows = static_cast<const T*>(params.rows) + col;
  float sums[kVec] = {};
  for (int64_t base = 0; base < k; base += kBatch) {
    // 1. Load the batch.
    V vecs[kBatch];
    float weights[kBatch];
    bool has_row[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t pair = token * k + base + j;
      const int32_t row =
          base + j < k ? load_id_or_none(params.row_id_map, pair, params.num_rows) : -1;
      has_row[j] = row >= 0;
      if (!has_row[j]) continue;
      vecs[j] = load_vec<V>(rows + row * n);
      weights[j] = load_weight<T>(params, params.weights, pair);
    }
    // 2. Add it up. A row that a pair does not have is not read, whatever its weight.
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (!has_row[j]) continue;
      float values[kVec];
      unpack(vecs[j], values);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sums[i] += weights[j] * values[i];
    }
  }
  V out;
  pack(sums, out);
  store_vec(static_cast<T*>(params.tokens) + token * n + col, out);
}

template <class T, int kVec>
__global__ void __launch_bounds__(PermuteTuning::kThreads, kBlocksPerSm)
    unpermute_kernel(const UnpermuteParams params, int threads_per_row) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Place place(threads_per_row);
  if (place.index >= params.num_tokens) return;
  for (int64_t col = place.thread * kVec; col < params.hidden_size;
       col += place.num_threads * kVec) {
    sum_rows<T, kVec>(params, place.index, col);
  }
}

}  // namespace

cudaError_t unpermute(const UnpermuteParams& params, const PermutePlan& plan, cudaStream_t stream) {
  if (element_size(params.dtype) == 0) return cudaErrorInvalidValue;
  if (plan.num_blocks == 0) return cudaSuccess;
  if (plan.num_blocks > INT32_MAX) return cudaErrorInvalidValue;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto vec) {
      return launch_early(unpermute_kernel<T, decltype(vec)::value>,
                          static_cast<unsigned>(plan.num_blocks), PermuteTuning::kThreads,
                          plan.device, stream, params, plan.threads_per_row);
    };
    return plan.uses_vectors ? run(ValueTag<kVecWidth<T>>{}) : run(ValueTag<1>{});
  });
}

}  // namespace omni_moe::cuda
