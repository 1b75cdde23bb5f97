// Gradient of the router's BatchNorm, both axes in one cooperative launch:
//   grad_logits = inv_std (g - mean(g) - n mean(g n)), n = normed, means over the tokens of a
//   batch; grad_logits = inv_std g where the forward used running statistics.
//
// The kernel moves 2 T (R + C) elements in and T (R + C) out; what the registers do not hold is
// read twice.
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

// Adds g and g n of the rows that count, column by column; rows past the last are zeros.
template <bool kMasked, class T, int kVec, int kRows>
__device__ __forceinline__ void add_rows(const Vec<T, kVec> (&grads)[kRows],
                                         const Vec<T, kVec> (&norms)[kRows],
                                         const CountedRows<kMasked>& counted, float (&sum)[kVec],
                                         float (&product)[kVec]) {
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    float g[kVec], n[kVec];
    unpack(grads[j], g);
    unpack(norms[j], n);
    if (kMasked && !counted.has(j)) continue;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      sum[i] += g[i];
      product[i] += g[i] * n[i];
    }
  }
}

// What the gradient of a logit needs to know of its column; the means are zeros in evaluation.
template <int kVec>
struct ColumnScales {
  float inv_std[kVec] = {};
  float mean_grad[kVec] = {};
  float mean_product[kVec] = {};
};

template <int kVec, bool kTraining>
__device__ __forceinline__ ColumnScales<kVec> load_scales(const BatchNormBackwardParams& params,
                                                          const Tile& tile, int column,
                                                          bool has_rows, const float* mean_grads,
                                                          const float* mean_products) {
  ColumnScales<kVec> scales;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (has_rows) {
      scales.inv_std[i] = static_cast<const float*>(
          params.inv_std)[tile.axis_begin + tile.first_column + column + i];
    }
    if (kTraining) {
      scales.mean_grad[i] = mean_grads[column + i];
      scales.mean_product[i] = mean_products[column + i];
    }
  }
  return scales;
}

// inv_std (g - mean(g) - n mean(g n)), or inv_std g in evaluation, which does not read `norms`.
template <bool kTraining, class T, int kVec>
__device__ __forceinline__ void pack_gradient(const Vec<T, kVec>& grads, const Vec<T, kVec>& norms,
                                              const ColumnScales<kVec>& scales,
                                              Vec<T, kVec>& packed) {
  float g[kVec], n[kVec];
  unpack(grads, g);
  if (kTraining) unpack(norms, n);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (kTraining) g[i] = g[i] - scales.mean_grad[i] - n[i] * scales.mean_product[i];
    g[i] *= scales.inv_std[i];
  }
  pack(g, packed);
}

template <class T, int kVec, bool kTraining, bool kMasked>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    batch_norm_backward_kernel(const BatchNormBackwardParams params, const BatchNormGrid grid) {
  constexpr int kRows = Tiling<T, kVec>::kBackwardRows;
  using V = Vec<T, kVec>;
  __shared__ float mean_grads[kPanelColumns], mean_products[kPanelColumns];
  __shared__ WarpPartials warp_partials;
  const int column = threadIdx.x % kPanelColumns;
  for (int round = 0; round < grid.num_rounds; ++round) {
    const Tile tile(grid, round, params.num_tokens, params.num_rows, params.num_cols);
    const ThreadRows<T, kVec> rows(tile);
    const int64_t first_column = tile.first_column + rows.column;
    const T* grads =
        static_cast<const T*>(tile.is_y ? params.grad_y : params.grad_x) + first_column;
    const T* norms =
        static_cast<const T*>(tile.is_y ? params.normed_y : params.normed_x) + first_column;

    // 1. The first rows into registers.
    V held_grads[kRows], held_norms[kRows];
    rows.load(grads, tile.axis_width, 0, held_grads);
    if constexpr (kTraining) rows.load(norms, tile.axis_width, 0, held_norms);

    // 2. Σ g and Σ g n of each column.
    if constexpr (kTraining) {
      float sum[kVec] = {}, product[kVec] = {};
      const auto counted_from = [&](int first) {
        return CountedRows<kMasked>::template of<kRows>(rows, params.token_mask, first);
      };
      auto counted = counted_from(0);
      int count = counted.count;
      add_rows(held_grads, held_norms, counted, sum, product);
#pragma unroll 1
      for (int first = kRows; first < rows.count; first += kRows) {
        V more_grads[kRows], more_norms[kRows];
        rows.load(grads, tile.axis_width, first, more_grads);
        rows.load(norms, tile.axis_width, first, more_norms);
        counted = counted_from(first);
        count += counted.count;
        add_rows(more_grads, more_norms, counted, sum, product);
      }
      rows.keep_packed(held_grads);
      rows.keep_packed(held_norms);
      if (!kMasked) count = rows.count;
      const Sums block = merge_threads<SumsMerger>(rows, count, warp_partials, sum, product);
      const Sums batch = merge_grid<SumsMerger, kMasked>(grid, tile, tile.panel < grid.num_panels,
                                                         block, warp_partials, params.workspace);
      if (threadIdx.x < kPanelColumns) {
        const float num_tokens = kMasked ? batch.count : static_cast<float>(params.num_tokens);
        mean_grads[column] = batch.first / num_tokens;
        mean_products[column] = batch.second / num_tokens;
      }
      __syncthreads();
    }

    // 3. The gradient of the logits.
    const ColumnScales<kVec> scales = load_scales<kVec, kTraining>(
        params, tile, rows.column, rows.count > 0, mean_grads, mean_products);
    const int64_t stride = params.num_rows + params.num_cols;
    T* out = static_cast<T*>(params.grad_logits) + tile.axis_begin + first_column;
    const auto write = [&](const V(&chunk_grads)[kRows], const V(&chunk_norms)[kRows], int first) {
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        if (first + j >= rows.count) break;
        V packed{};
        if (!kMasked || params.token_mask[rows.at(first + j)]) {
          pack_gradient<kTraining>(chunk_grads[j], chunk_norms[j], scales, packed);
        }
        store_vec_streaming(out + rows.at(first + j) * stride, packed);
      }
    };
    write(held_grads, held_norms, 0);
#pragma unroll 1
    for (int first = kRows; first < rows.count; first += kRows) {
      V more_grads[kRows], more_norms[kRows];
      rows.load(grads, tile.axis_width, first, more_grads);
      if constexpr (kTraining) rows.load(norms, tile.axis_width, first, more_norms);
      write(more_grads, more_norms, first);
    }
    __syncthreads();  // mean_grads and mean_products are free again
  }
}

}  // namespace

cudaError_t batch_norm_backward(const BatchNormBackwardParams& params,
                                const BatchNormBackwardPlan& plan, cudaStream_t stream) {
  if (element_size(params.dtype) == 0) return cudaErrorInvalidValue;
  if (params.num_tokens == 0) return cudaSuccess;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto with_vectors_of = [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      const auto kernel = !params.training    ? batch_norm_backward_kernel<T, kVec, false, false>
                          : params.token_mask ? batch_norm_backward_kernel<T, kVec, true, true>
                                              : batch_norm_backward_kernel<T, kVec, true, false>;
      return launch(kernel, params, plan, kVec, Tiling<T, kVec>::kBackwardRows, stream);
    };
    return plan.uses_vectors ? with_vectors_of(ValueTag<kVecWidth<T>>{})
                             : with_vectors_of(ValueTag<1>{});
  });
}

}  // namespace omni_moe::cuda
