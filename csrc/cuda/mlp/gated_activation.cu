// The elementwise half of the shared MLP: activated = act(gate) * up, and its gradients
//   grad_gate = grad * up * act'(gate),  grad_up = grad * act(gate).
//
// Memory is the bound: the forward reads 2 T I elements and writes T I, the backward reads 3 T I
// and writes 2 T I, or 3 T I with `activated` again. A thread handles 16 bytes of each operand
// where every pointer and row stride allows it, else one element.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "cuda/common/activation.cuh"
#include "cuda/common/check.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/vec.cuh"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 4;  // 64 registers; 1024 threads with 48 bytes each hide the latency
constexpr int64_t kMaxGridRows = 65535;

// ---- Kernels ------------------------------------------------------------------------------------

// The grid's x dimension covers the vectors of a row, its y dimension the rows.

// Calls body(row, first column of the vector) for the vectors of this thread.
template <int kVec, class Body>
__device__ __forceinline__ void for_each_vector(int64_t num_rows, int64_t num_cols, Body body) {
  const int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kVec;
  if (col >= num_cols) return;
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < num_rows;
       row += int64_t{gridDim.y} * blockDim.y) {
    body(row, col);
  }
}

// A plain load and not __ldg, because an output may be the same memory as grad_activated.
template <class V, class T>
__device__ __forceinline__ V load_mutable(const T* pointer) {
  return *reinterpret_cast<const V*>(pointer);
}

template <class T, int kVec, Activation kActivation>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    gated_activation_forward_kernel(const GatedActivationForwardParams params) {
  using V = Vec<T, kVec>;
  for_each_vector<kVec>(params.num_tokens, params.intermediate_size, [&](int64_t row, int64_t col) {
    const T* gate_at = static_cast<const T*>(params.gate) + row * params.gate_stride + col;
    const T* up_at = static_cast<const T*>(params.up) + row * params.up_stride + col;
    float gate[kVec], up[kVec], activated[kVec];
    unpack(load_mutable<V>(gate_at), gate);
    unpack(load_mutable<V>(up_at), up);
#pragma unroll
    for (int i = 0; i < kVec; ++i) activated[i] = activate<kActivation>(gate[i]) * up[i];
    V out;
    pack(activated, out);
    store_vec(static_cast<T*>(params.activated) + row * params.intermediate_size + col, out);
  });
}

template <class T, int kVec, Activation kActivation>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    gated_activation_backward_kernel(const GatedActivationBackwardParams params) {
  using V = Vec<T, kVec>;
  for_each_vector<kVec>(params.num_tokens, params.intermediate_size, [&](int64_t row, int64_t col) {
    const int64_t dense = row * params.intermediate_size + col;
    float grad[kVec], gate[kVec], up[kVec];
    unpack(load_mutable<V>(static_cast<const T*>(params.grad_activated) + dense), grad);
    unpack(load_mutable<V>(static_cast<const T*>(params.gate) + row * params.gate_stride + col),
           gate);
    unpack(load_mutable<V>(static_cast<const T*>(params.up) + row * params.up_stride + col), up);
    float grad_gate[kVec], grad_up[kVec], activated[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const ActivationResult act = activate_with_derivative<kActivation>(gate[i]);
      grad_gate[i] = through_derivative(kActivation, act, grad[i] * up[i]);
      grad_up[i] = grad[i] * act.value;
      activated[i] = act.value * up[i];
    }
    V out;
    pack(grad_gate, out);
    store_vec(static_cast<T*>(params.grad_gate) + row * params.grad_gate_stride + col, out);
    pack(grad_up, out);
    store_vec(static_cast<T*>(params.grad_up) + row * params.grad_up_stride + col, out);
    if (params.activated != nullptr) {
      pack(activated, out);
      store_vec(static_cast<T*>(params.activated) + dense, out);
    }
  });
}

// ---- Launchers ----------------------------------------------------------------------------------

struct LaunchShape {
  dim3 grid;
  dim3 block;
};

// A block is as wide as a row needs; the rest of its threads take further rows.
LaunchShape launch_shape(int64_t num_rows, int64_t num_cols, int vec) {
  const int64_t vectors = ceil_div<int64_t>(num_cols, vec);
  unsigned width = kThreads;
  while (width > 1 && width / 2 >= vectors) width /= 2;
  const unsigned height = kThreads / width;
  return {dim3(static_cast<unsigned>(ceil_div<int64_t>(vectors, width)),
               static_cast<unsigned>(std::min(ceil_div<int64_t>(num_rows, height), kMaxGridRows))),
          dim3(width, height)};
}

// Dense operands as one long row, which leaves no remainder per row.
template <class Params>
void merge_rows(Params& params, std::initializer_list<int64_t*> strides) {
  params.intermediate_size *= params.num_tokens;
  params.num_tokens = 1;
  for (int64_t* stride : strides) *stride = params.intermediate_size;
}

// launch(T, vector width, activation), each as a tag.
template <class Launch>
cudaError_t dispatch_gated(DType dtype, Activation activation, bool uses_vectors, Launch launch) {
  return dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_activation(activation, [&](auto act) {
      return uses_vectors ? launch(type, ValueTag<kVecWidth<T>>{}, act)
                          : launch(type, ValueTag<1>{}, act);
    });
  });
}

}  // namespace

cudaError_t gated_activation_forward(const GatedActivationForwardParams& given,
                                     const GatedActivationForwardPlan& plan, cudaStream_t stream) {
  if (element_size(given.dtype) == 0 || !is_valid(given.activation)) return cudaErrorInvalidValue;
  if (given.num_tokens == 0 || given.intermediate_size == 0) return cudaSuccess;
  GatedActivationForwardParams params = given;
  if (plan.is_one_row) merge_rows(params, {&params.gate_stride, &params.up_stride});
  return dispatch_gated(
      params.dtype, params.activation, plan.uses_vectors, [&](auto type, auto vec, auto act) {
        using T = typename decltype(type)::type;
        const LaunchShape shape =
            launch_shape(params.num_tokens, params.intermediate_size, decltype(vec)::value);
        const auto kernel =
            gated_activation_forward_kernel<T, decltype(vec)::value, decltype(act)::value>;
        kernel<<<shape.grid, shape.block, 0, stream>>>(params);
        return launch_status();
      });
}

cudaError_t gated_activation_backward(const GatedActivationBackwardParams& given,
                                      const GatedActivationBackwardPlan& plan,
                                      cudaStream_t stream) {
  if (element_size(given.dtype) == 0 || !is_valid(given.activation)) return cudaErrorInvalidValue;
  if (given.num_tokens == 0 || given.intermediate_size == 0) return cudaSuccess;
  GatedActivationBackwardParams params = given;
  if (plan.is_one_row)
    merge_rows(params, {&params.gate_stride, &params.up_stride, &params.grad_gate_stride,
                        &params.grad_up_stride});
  return dispatch_gated(
      params.dtype, params.activation, plan.uses_vectors, [&](auto type, auto vec, auto act) {
        using T = typename decltype(type)::type;
        const LaunchShape shape =
            launch_shape(params.num_tokens, params.intermediate_size, decltype(vec)::value);
        const auto kernel =
            gated_activation_backward_kernel<T, decltype(vec)::value, decltype(act)::value>;
        kernel<<<shape.grid, shape.block, 0, stream>>>(params);
        return launch_status();
      });
}

}  // namespace omni_moe::cuda
