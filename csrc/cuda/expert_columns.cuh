// Token passes with a block per token and 16 bytes of the row per thread: every thread scores its
// columns of kPairs rows at once, one exchange through shared memory completes the scores, and the
// same threads add the rows up. The pieces of kPairs pairs of rows are in flight while the pairs
// before are worked on; no row is read twice. Forward: out[t] = Σ act(s) routing down; backward,
// with g = grad[t] · down: grad_hidden[t] = Σ routing act'(s) g up and the per-pair results.
#pragma once

#include "common/activation.cuh"
#include "common/row_columns.cuh"
#include "expert_pair_grads.cuh"
#include "omni_moe/expert.h"

namespace omni_moe::cuda {

// Pairs at a time in what is left of a token after its full batches.
inline constexpr int kColumnsTailPairs = 4;

// The warps' shares of kCount dot products. Two buffers: a batch is read while faster warps already
// write the next.
template <int kCount, int kMaxWarps>
struct BlockDots {
  float warp_dots[2][kMaxWarps][kCount];

  __device__ __forceinline__ void write(int parity, int warp, int value, float dot) {
    warp_dots[parity][warp][value] = dot;
  }
  // The sum over the block, in the order of the warps.
  __device__ __forceinline__ float read(int parity, int num_warps, int value) const {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kMaxWarps; ++warp) {
      if (warp < num_warps) sum += warp_dots[parity][warp][value];
    }
    return sum;
  }
};

// What a thread of a block keeps about its token and its columns.
template <class T>
struct ColumnsThread {
  int warp;
  int lane;
  int num_warps;
  int64_t token;
  int num_pairs;
  int row_bytes;
  int64_t first_pair;
  bool in_row;
  int byte;  // of the row; past its end: column 0 again

  template <class Params>
  __device__ __forceinline__ explicit ColumnsThread(const Params& params)
      : warp(threadIdx.x / kWarpSize),
        lane(threadIdx.x % kWarpSize),
        num_warps(blockDim.x / kWarpSize),
        token(blockIdx.x),
        num_pairs(static_cast<int>(params.num_experts_per_token)),
        row_bytes(static_cast<int>(params.hidden_size * sizeof(T))),
        first_pair(token * num_pairs),
        in_row(static_cast<int>(threadIdx.x) * kPieceBytes < row_bytes),
        byte(in_row ? threadIdx.x * kPieceBytes : 0) {}

  __device__ __forceinline__ RowPiece load_own(const void* rows) const {
    return load_piece(static_cast<const char*>(rows) + byte, static_cast<int32_t>(token),
                      row_bytes);
  }

  // `first` is the first pair's place in the window.
  template <int kCount>
  __device__ __forceinline__ void load_rows(const void* table, const IdWindow& ids, int first,
                                            RowPiece (&pieces)[kCount]) const {
    const char* base = static_cast<const char*>(table) + byte;
#pragma unroll
    for (int i = 0; i < kCount; ++i) pieces[i] = load_piece(base, ids[first + i], row_bytes);
  }

  template <int kCount, int kDots>
  __device__ __forceinline__ void dot_rows(const RowPiece& vector_piece,
                                           const RowPiece (&pieces)[kCount], int to,
                                           float (&dots)[kDots]) const {
    float vector[kVecWidth<T>];
    unpack_piece<T>(vector_piece, vector);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float dot = dot_piece<T>(vector, pieces[i]);
      dots[to + i] = in_row ? dot : 0.0f;
    }
  }

  __device__ __forceinline__ void store_own(const float (&sum)[kVecWidth<T>], void* rows) const {
    if (!in_row) return;
    char* to = static_cast<char*>(rows) + token * row_bytes + byte;
    store_vec(to, pack_piece<T>(sum));
  }
};

// Adds the first `count` pieces; lane l holds the coefficient of piece l.
template <class T, int kCount>
__device__ __forceinline__ void add_rows(float coefficients, int count,
                                         const RowPiece (&pieces)[kCount],
                                         float (&sum)[kVecWidth<T>]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float coefficient = __shfl_sync(kFullWarp, coefficients, i);
    if (i < count) add_piece<T>(coefficient, pieces[i], sum);
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    expert_forward_columns_kernel(const __grid_constant__ ExpertForwardParams params) {
  constexpr int kPairs = Shape::kPairs;
  constexpr int kTailPairs = kColumnsTailPairs;
  __shared__ BlockDots<kPairs, Shape::kThreads / kWarpSize> block_dots;
  const ColumnsThread<T> thread(params);
  const int num_pairs = thread.num_pairs;
  const T* routing = static_cast<const T*>(params.routing_weights) + thread.first_pair;
  IdWindow ids(params.indices, params.index_type, thread.first_pair, num_pairs, params.num_experts,
               thread.lane);
  ids.open(0);
  RowPiece hidden = thread.load_own(params.hidden_states);
  float sum[kVecWidth<T>] = {};
  int parity = 0;

  // Coefficients of the pairs from `first`, lane l that of pair first + l % count; next_rows()
  // starts further loads once the up rows are spent.
  const auto score = [&](int first, auto& up_rows, auto&& next_rows) {
    constexpr int kCount = sizeof(up_rows) / sizeof(up_rows[0]);
    const int pair = min(first + thread.lane % kCount, num_pairs - 1);
    const float weight = to_float(routing[pair]);
    float dots[kCount];
    keep_packed(hidden);
    thread.dot_rows(hidden, up_rows, 0, dots);
    const float dot = warp_transpose_sum<kWarpSize>(dots, thread.lane);
    if (thread.lane < kCount) block_dots.write(parity, thread.warp, thread.lane, dot);
    next_rows();
    __syncthreads();
    const float score = block_dots.read(parity, thread.num_warps, thread.lane % kCount);
    parity ^= 1;
    return activate(params.activation, score) * weight;
  };

  // 1. Batches of kPairs; the rows of the batch after are loaded meanwhile.
  int first = 0;
  if (num_pairs >= kPairs) {
    RowPiece up_rows[kPairs];
    RowPiece down_rows[kPairs];
    thread.load_rows(params.up_weights, ids, 0, up_rows);
    thread.load_rows(params.down_weights, ids, 0, down_rows);
    for (; num_pairs - first >= 2 * kPairs; first += kPairs) {
      const int next = first + kPairs;
      const float coefficients = score(first, up_rows, [&] {
        if (next % kWarpSize == 0) ids.open(next);
        thread.load_rows(params.up_weights, ids, next % kWarpSize, up_rows);
      });
      add_rows<T>(coefficients, kPairs, down_rows, sum);
      thread.load_rows(params.down_weights, ids, next % kWarpSize, down_rows);
    }
    const float coefficients = score(first, up_rows, [] {});
    add_rows<T>(coefficients, kPairs, down_rows, sum);
    first += kPairs;
  }
  // 2. What is left, a few at a time.
  for (; first < num_pairs; first += kTailPairs) {
    if (first > 0 && first % kWarpSize == 0) ids.open(first);
    RowPiece up_rows[kTailPairs];
    RowPiece down_rows[kTailPairs];
    thread.load_rows(params.up_weights, ids, first % kWarpSize, up_rows);
    thread.load_rows(params.down_weights, ids, first % kWarpSize, down_rows);
    const float coefficients = score(first, up_rows, [] {});
    add_rows<T>(coefficients, num_pairs - first, down_rows, sum);
  }
  // 3. One rounding.
  ids.check();
  thread.store_own(sum, params.expert_states);
}

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    expert_backward_columns_kernel(const __grid_constant__ ExpertBackwardParams params,
                                   PairOutputs outputs) {
  constexpr int kPairs = Shape::kPairs;
  constexpr int kTailPairs = kColumnsTailPairs;
  __shared__ BlockDots<2 * kPairs, Shape::kThreads / kWarpSize> block_dots;
  const ColumnsThread<T> thread(params);
  const int num_pairs = thread.num_pairs;
  const T* routing = static_cast<const T*>(params.routing_weights) + thread.first_pair;
  IdWindow ids(params.indices, params.index_type, thread.first_pair, num_pairs, params.num_experts,
               thread.lane);
  ids.open(0);
  RowPiece hidden = thread.load_own(params.hidden_states);
  RowPiece grad = thread.load_own(params.grad_expert_states);
  float sum[kVecWidth<T>] = {};
  int parity = 0;

  // Stores the results of the pairs from `first`; returns their coefficients of the up rows, like
  // the forward. next_rows() starts further loads once the down rows are spent.
  const auto score = [&](int first, auto& up_rows, auto& down_rows, auto&& next_rows) {
    constexpr int kCount = sizeof(up_rows) / sizeof(up_rows[0]);
    const int k = first + thread.lane % kCount;
    const bool stores = thread.warp == 0 && thread.lane < kCount && k < num_pairs;
    const float weight = to_float(routing[min(k, num_pairs - 1)]);
    const uint32_t position = stores ? outputs.position(thread.first_pair + k) : 0;
    float dots[2 * kCount];  // s, then g
    keep_packed(grad);
    thread.dot_rows(grad, down_rows, kCount, dots);
    keep_packed(hidden);
    thread.dot_rows(hidden, up_rows, 0, dots);
    const float dot = warp_transpose_sum<kWarpSize>(dots, thread.lane);
    if (thread.lane < 2 * kCount) block_dots.write(parity, thread.warp, thread.lane, dot);
    next_rows();
    __syncthreads();
    const float score = block_dots.read(parity, thread.num_warps, thread.lane % kCount);
    const float grad_score =
        block_dots.read(parity, thread.num_warps, kCount + thread.lane % kCount);
    parity ^= 1;
    const PairGrads result = pair_grads(params.activation, score, grad_score, weight);
    if (stores) {
      store_pair<T>(params, outputs, thread.first_pair + k, position, thread.token, result);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) keep_packed(up_rows[i]);
    return result.up_coefficient;
  };

  // 1. Batches of kPairs; the rows of the batch after are loaded meanwhile.
  int first = 0;
  if (num_pairs >= kPairs) {
    RowPiece up_rows[kPairs];
    RowPiece down_rows[kPairs];
    thread.load_rows(params.down_weights, ids, 0, down_rows);
    thread.load_rows(params.up_weights, ids, 0, up_rows);
    for (; num_pairs - first >= 2 * kPairs; first += kPairs) {
      const int next = first + kPairs;
      const float coefficients = score(first, up_rows, down_rows, [&] {
        if (next % kWarpSize == 0) ids.open(next);
        thread.load_rows(params.down_weights, ids, next % kWarpSize, down_rows);
      });
      add_rows<T>(coefficients, kPairs, up_rows, sum);
      thread.load_rows(params.up_weights, ids, next % kWarpSize, up_rows);
    }
    const float coefficients = score(first, up_rows, down_rows, [] {});
    add_rows<T>(coefficients, kPairs, up_rows, sum);
    first += kPairs;
  }
  // 2. What is left, a few at a time.
  for (; first < num_pairs; first += kTailPairs) {
    if (first > 0 && first % kWarpSize == 0) ids.open(first);
    RowPiece up_rows[kTailPairs];
    RowPiece down_rows[kTailPairs];
    thread.load_rows(params.down_weights, ids, first % kWarpSize, down_rows);
    thread.load_rows(params.up_weights, ids, first % kWarpSize, up_rows);
    const float coefficients = score(first, up_rows, down_rows, [] {});
    add_rows<T>(coefficients, num_pairs - first, up_rows, sum);
  }
  // 3. One rounding.
  ids.check();
  if (params.grad_hidden_states != nullptr) thread.store_own(sum, params.grad_hidden_states);
}

// A block has one thread per piece of a row, in whole warps.
template <class Shape, class Kernel, class... Args>
cudaError_t launch_columns(Kernel* kernel, int64_t num_tokens, int64_t row_bytes,
                           cudaStream_t stream, const Args&... args) {
  const int64_t threads = round_up<int64_t>(ceil_div<int64_t>(row_bytes, kPieceBytes), kWarpSize);
  if (threads > Shape::kThreads) return cudaErrorInvalidValue;
  kernel<<<static_cast<unsigned>(num_tokens), static_cast<unsigned>(threads), 0, stream>>>(args...);
  return launch_status();
}

}  // namespace omni_moe::cuda
