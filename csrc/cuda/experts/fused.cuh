// Token pass with a block per token and 16 bytes of the row per thread: every thread scores its
// columns of kPairs rows at once, one exchange through shared memory completes the dot products,
// and the same threads add the rows of the other table. The pieces of kPairs pairs of rows are in
// flight while the pairs before are worked on.
#pragma once

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/experts/expert_tuning.h"
#include "cuda/experts/row_pieces.cuh"
#include "cuda/experts/token_pass.cuh"

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

  __device__ __forceinline__ explicit ColumnsThread(const TokenPassArgs& args)
      : warp(threadIdx.x / kWarpSize),
        lane(threadIdx.x % kWarpSize),
        num_warps(blockDim.x / kWarpSize),
        token(blockIdx.x),
        num_pairs(static_cast<int>(args.num_experts_per_token)),
        row_bytes(static_cast<int>(args.hidden_size * sizeof(T))),
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

  template <int kCount>
  __device__ __forceinline__ void dot_rows(const RowPiece& vector_piece,
                                           const RowPiece (&pieces)[kCount],
                                           float (&dots)[kCount]) const {
    float vector[kVecWidth<T>];
    unpack_piece<T>(vector_piece, vector);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float dot = dot_piece<T>(vector, pieces[i]);
      dots[i] = in_row ? dot : 0.0f;
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

template <class T, class Shape, class Pairs>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    expert_columns_kernel(const __grid_constant__ TokenPassArgs args,
                          const __grid_constant__ Pairs pairs) {
  constexpr int kPairs = Shape::kPairs;
  constexpr int kTailPairs = kColumnsTailPairs;
  __shared__ BlockDots<kPairs, Shape::kThreads / kWarpSize> block_dots;
  wait_for_previous_kernel();
  const ColumnsThread<T> thread(args);
  const int num_pairs = thread.num_pairs;
  IdWindow ids(args.indices, args.index_type, thread.first_pair, num_pairs, args.num_experts,
               thread.lane);
  ids.open(0);
  RowPiece vector = thread.load_own(args.vectors);
  float sum[kVecWidth<T>] = {};
  if (args.addend != nullptr) unpack_piece<T>(thread.load_own(args.addend), sum);
  int parity = 0;

  // Coefficients of the pairs from `first`, lane l that of pair first + l % count; next_rows()
  // starts further loads once the scored rows are spent.
  const auto score = [&](int first, auto& scored_rows, auto&& next_rows) {
    constexpr int kCount = sizeof(scored_rows) / sizeof(scored_rows[0]);
    const int k = first + thread.lane % kCount;
    const int64_t pair = thread.first_pair + min(k, num_pairs - 1);
    const bool stores = thread.warp == 0 && thread.lane < kCount && k < num_pairs;
    const auto inputs = pairs.load(pair, stores);
    float dots[kCount];
    keep_packed(vector);
    thread.dot_rows(vector, scored_rows, dots);
    const float share = warp_transpose_sum<kWarpSize>(dots, thread.lane);
    if (thread.lane < kCount) block_dots.write(parity, thread.warp, thread.lane, share);
    next_rows();
    __syncthreads();
    const float dot = block_dots.read(parity, thread.num_warps, thread.lane % kCount);
    parity ^= 1;
    return pairs.finish(inputs, pair, thread.token, dot, stores);
  };

  // 1. Batches of kPairs; the rows of the batch after are loaded meanwhile.
  int first = 0;
  if (num_pairs >= kPairs) {
    RowPiece scored_rows[kPairs];
    RowPiece added_rows[kPairs];
    thread.load_rows(args.scored, ids, 0, scored_rows);
    thread.load_rows(args.added, ids, 0, added_rows);
    for (; num_pairs - first >= 2 * kPairs; first += kPairs) {
      const int next = first + kPairs;
      const float coefficients = score(first, scored_rows, [&] {
        if (next % kWarpSize == 0) ids.open(next);
        thread.load_rows(args.scored, ids, next % kWarpSize, scored_rows);
      });
      add_rows<T>(coefficients, kPairs, added_rows, sum);
      thread.load_rows(args.added, ids, next % kWarpSize, added_rows);
    }
    const float coefficients = score(first, scored_rows, [] {});
    add_rows<T>(coefficients, kPairs, added_rows, sum);
    first += kPairs;
  }
  // 2. What is left, a few at a time.
  for (; first < num_pairs; first += kTailPairs) {
    if (first > 0 && first % kWarpSize == 0) ids.open(first);
    RowPiece scored_rows[kTailPairs];
    RowPiece added_rows[kTailPairs];
    thread.load_rows(args.scored, ids, first % kWarpSize, scored_rows);
    thread.load_rows(args.added, ids, first % kWarpSize, added_rows);
    const float coefficients = score(first, scored_rows, [] {});
    add_rows<T>(coefficients, num_pairs - first, added_rows, sum);
  }
  // 3. One rounding.
  ids.check();
  if (args.out != nullptr) thread.store_own(sum, args.out);
}

// A block has one thread per piece of a row, in whole warps.
template <class T, class Shape, class Pairs>
cudaError_t launch_columns(const TokenPassArgs& args, const Pairs& pairs, const DeviceInfo& device,
                           cudaStream_t stream) {
  const int64_t pieces = args.hidden_size * static_cast<int64_t>(sizeof(T)) / kPieceBytes;
  const int64_t threads = round_up<int64_t>(pieces, kWarpSize);
  if (threads > Shape::kThreads) return cudaErrorInvalidValue;
  return launch_early(expert_columns_kernel<T, Shape, Pairs>,
                      static_cast<unsigned>(args.num_tokens), static_cast<unsigned>(threads),
                      device, stream, args, pairs);
}

}  // namespace omni_moe::cuda
