// Token pass in two phases, for any H and any alignment, and for few tokens of many pairs. A block
// has a token, or a part of a token's pairs. First its warps compute the dot products of the keys,
// row by row; then its threads add the rows of the values, column by column.
#pragma once

#include "cuda/common/check.h"
#include "cuda/common/expert_id.cuh"
#include "cuda/experts/expert_plan.h"
#include "cuda/experts/expert_tuning.h"
#include "cuda/experts/row_gather.cuh"
#include "cuda/experts/split_k_reduce.cuh"
#include "cuda/experts/token_pass.cuh"

namespace omni_moe::cuda {

template <class T, int kVec, int kThreads>
using PassColumnSum = ColumnSum<T, kVec, kThreads, TwoPhaseTuning::kValueRows>;

template <class T, int kVec, int kThreads>
size_t two_phase_shared_bytes(int64_t pairs_per_split) {
  const size_t pairs = static_cast<size_t>(round_up<int64_t>(pairs_per_split, 4));
  return pairs * (sizeof(int32_t) + sizeof(float)) +
         PassColumnSum<T, kVec, kThreads>::kScratchFloats * sizeof(float);
}

// Rounds a token's sum of kVec columns and stores it. `addend` is a row where has_addend.
template <class T, int kVec>
__device__ __forceinline__ void store_columns(const T* addend, bool has_addend, T* out,
                                              int64_t column, float (&sum)[kVec]) {
  if (has_addend) {
    float more[kVec];
    unpack(load_vec_readonly<Vec<T, kVec>>(addend + column), more);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum[i] += more[i];
  }
  Vec<T, kVec> packed;
  pack(sum, packed);
  store_vec(out + column, packed);
}

// Grid (T, num_splits). With num_splits > 1 the sums go to `partial` [T, num_splits, H].
template <class T, int kVec, int kThreads, int kBlocksPerSm, class Pairs>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    expert_two_phase_kernel(const __grid_constant__ TokenPassArgs args,
                            const __grid_constant__ Pairs pairs, int pairs_per_split,
                            float* partial) {
  constexpr int kWarps = kThreads / kWarpSize;
  constexpr int kRows = TwoPhaseTuning::kKeyRows;
  constexpr int kChunks =
      kVec == 1 ? TwoPhaseTuning::kScalarChunksPerLane : TwoPhaseTuning::kChunksPerLane;
  extern __shared__ __align__(128) char shared[];
  const int padded_pairs = round_up(pairs_per_split, 4);
  int32_t* ids = reinterpret_cast<int32_t*>(shared);
  float* coefficients = reinterpret_cast<float*>(ids + padded_pairs);
  float* scratch = coefficients + padded_pairs;

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = blockIdx.x;
  const int64_t hidden_size = args.hidden_size;
  const int64_t first_k = static_cast<int64_t>(blockIdx.y) * pairs_per_split;
  const int64_t left = args.num_experts_per_token - first_k;
  const int num_pairs = static_cast<int>(left < pairs_per_split ? left : pairs_per_split);
  const int64_t first_pair = token * args.num_experts_per_token + first_k;

  // 1. Ids of the block's pairs.
  for (int j = threadIdx.x; j < num_pairs; j += kThreads) {
    ids[j] = load_expert_id(args.indices, args.index_type, first_pair + j, args.num_experts);
  }
  __syncthreads();

  // 2. Dots and coefficients, kRows pairs at a time per warp.
  PassColumnSum<T, kVec, kThreads> columns(static_cast<const T*>(args.values), ids, num_pairs,
                                           hidden_size);
  // With few tokens latency is all that counts, and there are registers enough to load the first
  // values together with the keys.
  constexpr bool kPrefetchEarly = kThreads > TwoPhaseTuning::kThreads;
  if constexpr (kPrefetchEarly) columns.prefetch();
  LaneRow<T, kVec, kChunks> query;
  int64_t query_tile = -1;
  for (int first = warp; first < num_pairs; first += kWarps * kRows) {
    int32_t rows[kRows];
    float dots[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // past the last pair the first row is read again
      const int j = first + r * kWarps;
      rows[r] = ids[j < num_pairs ? j : first];
    }
    warp_dot_rows(static_cast<const T*>(args.queries) + token * hidden_size,
                  static_cast<const T*>(args.keys), rows, hidden_size, lane, &query, &query_tile,
                  dots);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int j = first + r * kWarps;
      if (lane == 0 && j < num_pairs) {
        const int64_t pair = first_pair + j;
        const auto inputs = pairs.load(pair, /*stores=*/true);
        coefficients[j] = pairs.finish(inputs, pair, token, dots[r], /*stores=*/true);
      }
    }
  }
  if (args.out == nullptr) return;  // uniform
  if constexpr (!kPrefetchEarly) columns.prefetch();
  __syncthreads();

  // 3. Σ_j coefficients[j] * values[j].
  if (gridDim.y == 1) {
    T* out = static_cast<T*>(args.out) + token * hidden_size;
    const T* addend = static_cast<const T*>(args.addend) + token * hidden_size;
    columns.run(coefficients, scratch, [&](int64_t column, float(&sum)[kVec]) {
      store_columns(addend, args.addend != nullptr, out, column, sum);
    });
  } else {
    float* out = partial + (token * gridDim.y + blockIdx.y) * hidden_size;
    columns.run(coefficients, scratch, [&](int64_t column, const float(&sum)[kVec]) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) out[column + i] = sum[i];
    });
  }
}

template <class T, int kVec, int kThreads, int kBlocksPerSm, class Pairs>
cudaError_t launch_two_phase(const TokenPassArgs& args, const Pairs& pairs,
                             const TokenPassPlan& plan, float* partial, cudaStream_t stream) {
  const auto kernel = expert_two_phase_kernel<T, kVec, kThreads, kBlocksPerSm, Pairs>;
  const size_t shared_bytes = two_phase_shared_bytes<T, kVec, kThreads>(plan.pairs_per_split);
  const dim3 grid(static_cast<unsigned>(args.num_tokens), static_cast<unsigned>(plan.num_splits));
  return run_steps([&] { return allow_shared_memory(kernel, shared_bytes); },
                   [&] {
                     kernel<<<grid, kThreads, shared_bytes, stream>>>(
                         args, pairs, static_cast<int>(plan.pairs_per_split), partial);
                     return launch_status();
                   },
                   [&] {
                     if (plan.num_splits == 1 || args.out == nullptr) return cudaSuccess;
                     return launch_split_k_reduce(partial, static_cast<const T*>(args.addend),
                                                  static_cast<T*>(args.out), args.num_tokens,
                                                  plan.num_splits, args.hidden_size, stream);
                   });
}

template <class T, class Pairs>
cudaError_t launch_two_phase(const TokenPassArgs& args, const Pairs& pairs,
                             const TokenPassPlan& plan, bool is_aligned, float* partial,
                             cudaStream_t stream) {
  constexpr int kDecodeThreads = TwoPhaseTuning::kDecodeThreads;
  constexpr int kDecodeBlocks = TwoPhaseTuning::kDecodeBlocksPerSm;
  constexpr int kThreads = TwoPhaseTuning::kThreads;
  constexpr int kBlocks = TwoPhaseTuning::kBlocksPerSm;
  constexpr int kVec = kVecWidth<T>;
  if (plan.threads == kDecodeThreads) {
    return is_aligned ? launch_two_phase<T, kVec, kDecodeThreads, kDecodeBlocks>(args, pairs, plan,
                                                                                 partial, stream)
                      : launch_two_phase<T, 1, kDecodeThreads, kDecodeBlocks>(args, pairs, plan,
                                                                              partial, stream);
  }
  return is_aligned
             ? launch_two_phase<T, kVec, kThreads, kBlocks>(args, pairs, plan, partial, stream)
             : launch_two_phase<T, 1, kThreads, kBlocks>(args, pairs, plan, partial, stream);
}

}  // namespace omni_moe::cuda
