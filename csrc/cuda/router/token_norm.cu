// LayerNorm and RMSNorm of each token's logits, forward and backward, both axes in one launch:
//   normed = (logits - mean) inv_std, inv_std = 1 / sqrt(mean((logits - mean)²) + eps)
//   grad_logits = inv_std (g - mean(g) - n mean(g n)), n = normed
// with means over the R or C logits of one token; RMSNorm takes no mean away.
//
// A warp has one axis of one token and holds it in registers, as far as they go: 1024 logits in 16
// bits, 512 in fp32 or where rows are not aligned. The rest it reads again, out of L1. The variance
// is Σ (x - mean)², with the mean taken relative to the first logit, so that an offset common to
// the axis costs no digits. Bytes moved: T (R + C) elements in and out, backward 2 T (R + C) in.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/router/router_tuning.h"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

namespace {

constexpr int kWarps = TokenNormTuning::kWarpsPerBlock;
constexpr int kThreads = kWarps * kWarpSize;

// ---- Device helpers -----------------------------------------------------------------------------

// One axis of one token; a warp's share of the work.
struct TokenAxis {
  bool is_y;
  int64_t token;
  int64_t width;  // R or C
  int64_t begin;  // the axis' first column among both

  template <class Params>
  __device__ explicit TokenAxis(const Params& params) {
    const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
    is_y = warp % 2 != 0;
    token = warp / 2;
    width = is_y ? params.num_cols : params.num_rows;
    begin = is_y ? params.num_rows : 0;
  }
  // The warp's row of (T, R) or (T, C).
  template <class T>
  __device__ T* row_of(void* x, void* y) const {
    return static_cast<T*>(is_y ? y : x) + token * width;
  }
  template <class T>
  __device__ const T* row_of(const void* x, const void* y) const {
    return static_cast<const T*>(is_y ? y : x) + token * width;
  }
};

// A row of vectors, of which each lane of a warp has every 32nd: the first kHeld in registers, the
// others where they lie.
template <class T, int kVec>
class WarpRow {
 public:
  static constexpr int kHeld = kVec == 1 ? 16 : 4;

  __device__ __forceinline__ WarpRow(const T* row, int64_t width)
      : row_(row), num_vectors_(width / kVec) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (at(j) < num_vectors_) held_[j] = load(at(j));
    }
  }
  // body(first column of a vector, its values)
  template <class Body>
  __device__ __forceinline__ void for_each(Body body) const {
    float values[kVec];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (at(j) >= num_vectors_) return;
      unpack(held_[j], values);
      body(at(j) * kVec, values);
    }
#pragma unroll 1
    for (int64_t i = at(kHeld); i < num_vectors_; i += kWarpSize) {
      unpack(load(i), values);
      body(i * kVec, values);
    }
  }
  // body(first column, values, those of `other`), which has the same width.
  template <class Body>
  __device__ __forceinline__ void for_each_with(const WarpRow& other, Body body) const {
    float values[kVec], others[kVec];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (at(j) >= num_vectors_) return;
      unpack(held_[j], values);
      unpack(other.held_[j], others);
      body(at(j) * kVec, values, others);
    }
#pragma unroll 1
    for (int64_t i = at(kHeld); i < num_vectors_; i += kWarpSize) {
      unpack(load(i), values);
      unpack(other.load(i), others);
      body(i * kVec, values, others);
    }
  }

 private:
  using V = Vec<T, kVec>;
  __device__ static int64_t at(int j) { return threadIdx.x % kWarpSize + int64_t{j} * kWarpSize; }
  __device__ V load(int64_t i) const { return load_vec_readonly<V>(row_ + i * kVec); }

  const T* row_;
  int64_t num_vectors_;
  V held_[kHeld];
};

template <class T, int kVec>
__device__ __forceinline__ void store_row(T* at, const float (&values)[kVec]) {
  Vec<T, kVec> out;
  pack(values, out);
  store_vec(at, out);
}

// ---- Kernels ------------------------------------------------------------------------------------

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    token_norm_forward_kernel(const TokenNormForwardParams params) {
  const TokenAxis axis(params);
  if (axis.token >= params.num_tokens) return;
  const T* logits =
      static_cast<const T*>(params.logits) + axis.token * params.logits_stride + axis.begin;
  const WarpRow<T, kVec> row(logits, axis.width);
  const float share = 1.0f / static_cast<float>(axis.width);

  // 1. Mean and variance.
  float mean = 0.0f;
  if (params.norm == TokenNorm::kLayerNorm) {
    const float first = to_float(logits[0]);
    float sum = 0.0f;
    row.for_each([&](int64_t, const float(&values)[kVec]) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum += values[i] - first;
    });
    mean = first + warp_sum(sum) * share;
  }
  float squares = 0.0f;
  row.for_each([&](int64_t, const float(&values)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) squares += (values[i] - mean) * (values[i] - mean);
  });
  const float variance = warp_sum(squares) * share;
  const float inv_std = 1.0f / sqrtf(variance + static_cast<float>(params.eps));
  if (params.inv_std != nullptr && threadIdx.x % kWarpSize == 0) {
    static_cast<float*>(params.inv_std)[2 * axis.token + axis.is_y] = inv_std;
  }

  // 2. Normalise.
  T* normed = axis.row_of<T>(params.normed_x, params.normed_y);
  row.for_each([&](int64_t column, float(&values)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) values[i] = (values[i] - mean) * inv_std;
    store_row(normed + column, values);
  });
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    token_norm_backward_kernel(const TokenNormBackwardParams params) {
  const TokenAxis axis(params);
  if (axis.token >= params.num_tokens) return;
  const WarpRow<T, kVec> grads(axis.row_of<T>(params.grad_x, params.grad_y), axis.width);
  const WarpRow<T, kVec> norms(axis.row_of<T>(params.normed_x, params.normed_y), axis.width);

  // 1. mean(g) and mean(g n).
  float sums[2] = {};
  grads.for_each_with(norms, [&](int64_t, const float(&g)[kVec], const float(&n)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      sums[0] += g[i];
      sums[1] += g[i] * n[i];
    }
  });
  warp_sum(sums);
  const float share = 1.0f / static_cast<float>(axis.width);
  const float mean_grad = params.norm == TokenNorm::kLayerNorm ? sums[0] * share : 0.0f;
  const float mean_product = sums[1] * share;

  // 2. The gradient of the logits.
  const float inv_std = static_cast<const float*>(params.inv_std)[2 * axis.token + axis.is_y];
  T* out = static_cast<T*>(params.grad_logits) + axis.token * (params.num_rows + params.num_cols) +
           axis.begin;
  grads.for_each_with(norms, [&](int64_t column, float(&g)[kVec], const float(&n)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) g[i] = (g[i] - mean_grad - n[i] * mean_product) * inv_std;
    store_row(out + column, g);
  });
}

// ---- Launchers ----------------------------------------------------------------------------------

// launch(T, vector width), each as a tag, with the number of blocks.
template <class Params, class Launch>
cudaError_t launch_token_norm(const Params& params, const TokenNormPlan& plan, Launch launch) {
  if (element_size(params.dtype) == 0) return cudaErrorInvalidValue;
  if (params.num_tokens == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(2 * params.num_tokens, kWarps));
  return dispatch_dtype(params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    plan.uses_vectors ? launch(type, ValueTag<kVecWidth<T>>{}, blocks)
                      : launch(type, ValueTag<1>{}, blocks);
    return launch_status();
  });
}

}  // namespace

cudaError_t token_norm_forward(const TokenNormForwardParams& params,
                               const TokenNormForwardPlan& plan, cudaStream_t stream) {
  return launch_token_norm(params, plan, [&](auto type, auto vec, unsigned blocks) {
    using T = typename decltype(type)::type;
    token_norm_forward_kernel<T, decltype(vec)::value><<<blocks, kThreads, 0, stream>>>(params);
  });
}

cudaError_t token_norm_backward(const TokenNormBackwardParams& params,
                                const TokenNormBackwardPlan& plan, cudaStream_t stream) {
  return launch_token_norm(params, plan, [&](auto type, auto vec, unsigned blocks) {
    using T = typename decltype(type)::type;
    token_norm_backward_kernel<T, decltype(vec)::value><<<blocks, kThreads, 0, stream>>>(params);
  });
}

}  // namespace omni_moe::cuda
