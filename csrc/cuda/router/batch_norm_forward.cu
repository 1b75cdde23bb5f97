// BatchNorm of the router's logits, both axes of the grid in one cooperative launch:
//   normed = (logits - mean) inv_std, inv_std = 1 / sqrt(var + eps), of each column.
//
// The variance is merged as Σ (x - mean)², with sums relative to a mean that is among those merged:
// an offset common to all tokens cancels before anything is squared. Bytes moved: T (R + C)
// elements in and out; what the registers do not hold is read twice.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/vec.cuh"
#include "cuda/router/batch_norm_common.cuh"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

namespace {

using namespace batch_norm;

// ---- Device helpers -----------------------------------------------------------------------------

// Moments of the rows in registers that count, column by column; no rows give zeros.
template <bool kMasked, class T, int kVec, int kRows>
__device__ __forceinline__ void chunk_moments(Vec<T, kVec> (&rows)[kRows],
                                              const CountedRows<kMasked>& counted,
                                              float (&mean)[kVec], float (&m2)[kVec]) {
  float first[kVec], sum[kVec] = {}, values[kVec];
  unpack(rows[0], first);
  if constexpr (kMasked) {  // relative to the first row that counts
#pragma unroll
    for (int j = kRows - 1; j >= 0; --j) {
      unpack(rows[j], values);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        first[i] = counted.has(j) ? values[i] : j == kRows - 1 ? 0.0f : first[i];
      }
    }
    ThreadRows<T, kVec>::keep_packed(rows);
  }
#pragma unroll
  for (int j = kMasked ? 0 : 1; j < kRows; ++j) {
    unpack(rows[j], values);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum[i] += counted.has(j) ? values[i] - first[i] : 0.0f;
  }
  const float share = 1.0f / static_cast<float>(max(counted.count, 1));
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    mean[i] = first[i] + sum[i] * share;
    m2[i] = 0.0f;
  }
  ThreadRows<T, kVec>::keep_packed(rows);
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    unpack(rows[j], values);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float distance = values[i] - mean[i];
      m2[i] += counted.has(j) ? distance * distance : 0.0f;
    }
  }
}

// Moments of all rows of the thread that count, and how many these are; `held` are the first.
template <bool kMasked, class T, int kVec, int kRows>
__device__ __forceinline__ int thread_moments(const ThreadRows<T, kVec>& rows, const T* logits,
                                              int64_t stride, const bool* token_mask,
                                              Vec<T, kVec> (&held)[kRows], float (&mean)[kVec],
                                              float (&m2)[kVec]) {
  constexpr int kMore = kRows / 2;  // kRows beside those held would spill
  const auto counted = CountedRows<kMasked>::template of<kRows>(rows, token_mask, 0);
  chunk_moments(held, counted, mean, m2);
  int total = kMasked ? counted.count : kRows;
#pragma unroll 1
  for (int first = kRows; first < rows.count; first += kMore) {
    Vec<T, kVec> more[kMore];
    rows.load(logits, stride, first, more);
    const auto chunk = CountedRows<kMasked>::template of<kMore>(rows, token_mask, first);
    float chunk_mean[kVec], chunk_m2[kVec];
    chunk_moments(more, chunk, chunk_mean, chunk_m2);
    // Chan's formula.
    const int all = total + chunk.count;
    const float share =
        static_cast<float>(chunk.count) / static_cast<float>(kMasked ? max(all, 1) : all);
    const float cross = static_cast<float>(total) * share;
    total = all;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float distance = chunk_mean[i] - mean[i];
      mean[i] += distance * share;
      m2[i] += chunk_m2[i] + distance * distance * cross;
    }
  }
  return kMasked ? total : rows.count;
}

// Mean, 1 / sqrt(var + eps) and unbiased variance of a column.
struct ColumnStatistics {
  float mean = 0.0f;
  float inv_std = 0.0f;
  float unbiased_var = 0.0f;
};

__device__ __forceinline__ ColumnStatistics statistics_of(const Moments& batch, float num_tokens,
                                                          double eps) {
  const float n = fmaxf(num_tokens, 1.0f);
  return {batch.mean, 1.0f / sqrtf(batch.m2 / n + static_cast<float>(eps)), batch.m2 / (n - 1.0f)};
}

template <class T>
__device__ __forceinline__ ColumnStatistics
running_statistics_of(const RunningStatistics<T>& running, int64_t column, double eps) {
  const float mean = running.load(running.buffers.running_mean, column);
  const float var = running.load(running.buffers.running_var, column);
  return {mean, 1.0f / sqrtf(var + static_cast<float>(eps)), 0.0f};
}

template <class T, int kVec>
__device__ __forceinline__ void pack_normed(const Vec<T, kVec>& logits, const float (&shift)[kVec],
                                            const float (&scale)[kVec], Vec<T, kVec>& packed) {
  float values[kVec];
  unpack(logits, values);
#pragma unroll
  for (int i = 0; i < kVec; ++i) values[i] = (values[i] - shift[i]) * scale[i];
  pack(values, packed);
}

template <class T, int kVec, bool kTraining, bool kMasked>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    batch_norm_forward_kernel(const BatchNormForwardParams params, const BatchNormGrid grid) {
  constexpr int kRows = Tiling<T, kVec>::kForwardRows;
  using V = Vec<T, kVec>;
  __shared__ float means[kPanelColumns], inv_stds[kPanelColumns];
  __shared__ WarpPartials warp_partials;
  const int column = threadIdx.x % kPanelColumns;
  for (int round = 0; round < grid.num_rounds; ++round) {
    const Tile tile(grid, round, params.num_tokens, params.num_rows, params.num_cols);
    const ThreadRows<T, kVec> rows(tile);
    const T* logits =
        static_cast<const T*>(params.logits) + tile.axis_begin + tile.first_column + rows.column;
    const RunningStatistics<T> running(params, tile.is_y);
    const int64_t axis_column = tile.first_column + column;
    const bool owns_column = threadIdx.x < kPanelColumns && tile.has(column);

    // 1. The first rows into registers.
    V held[kRows];
    rows.load(logits, params.logits_stride, 0, held);

    // 2. Mean and variance of each column, those of the batch in three steps: thread, block, grid.
    ColumnStatistics statistics;
    float num_tokens = static_cast<float>(params.num_tokens);
    if constexpr (kTraining) {
      float thread_mean[kVec], thread_m2[kVec];
      const int count = thread_moments<kMasked>(rows, logits, params.logits_stride,
                                                params.token_mask, held, thread_mean, thread_m2);
      rows.keep_packed(held);
      const Moments block =
          merge_threads<MomentsMerger>(rows, count, warp_partials, thread_mean, thread_m2);
      const Moments batch = merge_grid<MomentsMerger, kMasked>(
          grid, tile, tile.panel < grid.num_panels, block, warp_partials, params.workspace);
      if (kMasked) num_tokens = batch.count;
      statistics = statistics_of(batch, num_tokens, params.eps);
    } else if (owns_column) {
      statistics = running_statistics_of(running, axis_column, params.eps);
    }
    if (owns_column && tile.part == 0 && params.inv_std != nullptr) {
      static_cast<float*>(params.inv_std)[tile.axis_begin + axis_column] = statistics.inv_std;
    }
    if (threadIdx.x < kPanelColumns) {
      means[column] = statistics.mean;
      inv_stds[column] = statistics.inv_std;
    }
    __syncthreads();

    // 3. Normalise what the registers hold, then the rest.
    float shift[kVec], scale[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      shift[i] = means[rows.column + i];
      scale[i] = inv_stds[rows.column + i];
    }
    T* normed = static_cast<T*>(tile.is_y ? params.normed_y : params.normed_x) + tile.first_column +
                rows.column;
    const auto normalise = [&](const V(&chunk)[kRows], int first) {
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        if (first + j >= rows.count) break;
        V out{};
        if (!kMasked || params.token_mask[rows.at(first + j)]) {
          pack_normed(chunk[j], shift, scale, out);
        }
        store_vec_streaming(normed + rows.at(first + j) * tile.axis_width, out);
      }
    };
    normalise(held, 0);
#pragma unroll 1
    for (int first = kRows; first < rows.count; first += kRows) {
      V more[kRows];
      rows.load(logits, params.logits_stride, first, more);
      normalise(more, first);
    }

    // 4. Update the buffers last, because nothing waits for what is read of them.
    if (kTraining && owns_column && tile.part == 0 && num_tokens > 1.0f) {
      const auto momentum = static_cast<float>(params.momentum);
      running.update(running.buffers.running_mean, axis_column, momentum, statistics.mean);
      running.update(running.buffers.running_var, axis_column, momentum, statistics.unbiased_var);
    }
    __syncthreads();  // means and inv_stds are free again
  }
  if (kTraining && blockIdx.x == 0 && threadIdx.x == 0) {
    for (const BatchNormBuffers& axis : {params.x, params.y}) {
      if (axis.num_batches_tracked != nullptr) ++*axis.num_batches_tracked;
    }
  }
}

}  // namespace

cudaError_t batch_norm_forward(const BatchNormForwardParams& params,
                               const BatchNormForwardPlan& plan, cudaStream_t stream) {
  if (params.stats_dtype != params.dtype && params.stats_dtype != DType::kFloat32) {
    return cudaErrorInvalidValue;
  }
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto with_vectors_of = [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      const auto kernel = !params.training    ? batch_norm_forward_kernel<T, kVec, false, false>
                          : params.token_mask ? batch_norm_forward_kernel<T, kVec, true, true>
                                              : batch_norm_forward_kernel<T, kVec, true, false>;
      return launch(kernel, params, plan, kVec, Tiling<T, kVec>::kForwardRows, stream);
    };
    return plan.uses_vectors ? with_vectors_of(ValueTag<kVecWidth<T>>{})
                             : with_vectors_of(ValueTag<1>{});
  });
}

}  // namespace omni_moe::cuda
