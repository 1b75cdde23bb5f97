// Token pass in one sweep over a token's pairs, with a block per token and 16 bytes of the row per
// thread. Every thread multiplies its columns of kPairs keys with those of the query, one exchange
// through shared memory completes the dot products, and the same threads add the rows of the
// values. The keys and values of the next kPairs pairs are in flight meanwhile.
#pragma once

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/experts/expert_tuning.h"
#include "cuda/experts/row_pieces.cuh"
#include "cuda/experts/token_pass.cuh"

namespace omni_moe::cuda {

// A token's last pairs, after its full batches, are handled so many at a time.
inline constexpr int kFusedTailPairs = 4;

// The warps' shares of kCount dot products. There are two buffers, because faster warps already
// write the next batch while slower ones read this one.
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
struct FusedThread {
  int warp;
  int lane;
  int num_warps;
  int64_t token;
  int num_pairs;
  int row_bytes;
  int64_t first_pair;
  bool in_row;
  int byte;  // the thread's first one in the row; a thread past the row's end reads column 0 again

  __device__ __forceinline__ explicit FusedThread(const TokenPassArgs& args)
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
  __device__ __forceinline__ void dot_rows(const RowPiece& query_piece,
                                           const RowPiece (&pieces)[kCount],
                                           float (&dots)[kCount]) const {
    float query[kVecWidth<T>];
    unpack_piece<T>(query_piece, query);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float dot = dot_piece<T>(query, pieces[i]);
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

template <class T, class Tuning, class Pairs>
__global__ void __launch_bounds__(Tuning::kThreads, Tuning::kBlocksPerSm)
    expert_fused_kernel(const __grid_constant__ TokenPassArgs args,
                        const __grid_constant__ Pairs pairs) {
  constexpr int kPairs = Tuning::kPairs;
  constexpr int kTailPairs = kFusedTailPairs;
  __shared__ BlockDots<kPairs, Tuning::kThreads / kWarpSize> block_dots;
  wait_for_previous_kernel();
  const FusedThread<T> thread(args);
  const int num_pairs = thread.num_pairs;
  IdWindow ids(args.indices, args.index_type, thread.first_pair, num_pairs, args.num_experts,
               thread.lane);
  ids.open(0);
  RowPiece query = thread.load_own(args.queries);
  float sum[kVecWidth<T>] = {};
  if (args.addend != nullptr) unpack_piece<T>(thread.load_own(args.addend), sum);
  int parity = 0;

  // Returns the coefficients of the pairs from `first` on, in lane l that of pair first + l %
  // count. next_rows() starts further loads once the registers of the keys are free.
  const auto coefficients_of = [&](int first, auto& key_rows, auto&& next_rows) {
    constexpr int kCount = sizeof(key_rows) / sizeof(key_rows[0]);
    const int k = first + thread.lane % kCount;
    const int64_t pair = thread.first_pair + min(k, num_pairs - 1);
    const bool stores = thread.warp == 0 && thread.lane < kCount && k < num_pairs;
    const auto inputs = pairs.load(pair, stores);
    float dots[kCount];
    keep_packed(query);
    thread.dot_rows(query, key_rows, dots);
    const float share = warp_transpose_sum<kWarpSize>(dots, thread.lane);
    if (thread.lane < kCount) block_dots.write(parity, thread.warp, thread.lane, share);
    next_rows();
    __syncthreads();
    const float dot = block_dots.read(parity, thread.num_warps, thread.lane % kCount);
    parity ^= 1;
    return pairs.finish(inputs, pair, thread.token, dot, stores);
  };

  // 1. Full batches of kPairs pairs; the rows of the next batch are loaded meanwhile.
  int first = 0;
  if (num_pairs >= kPairs) {
    RowPiece key_rows[kPairs];
    RowPiece value_rows[kPairs];
    thread.load_rows(args.keys, ids, 0, key_rows);
    thread.load_rows(args.values, ids, 0, value_rows);
    for (; num_pairs - first >= 2 * kPairs; first += kPairs) {
      const int next = first + kPairs;
      const float coefficients = coefficients_of(first, key_rows, [&] {
        if (next % kWarpSize == 0) ids.open(next);
        thread.load_rows(args.keys, ids, next % kWarpSize, key_rows);
      });
      add_rows<T>(coefficients, kPairs, value_rows, sum);
      thread.load_rows(args.values, ids, next % kWarpSize, value_rows);
    }
    const float coefficients = coefficients_of(first, key_rows, [] {});
    add_rows<T>(coefficients, kPairs, value_rows, sum);
    first += kPairs;
  }
  // 2. The rest, a few pairs at a time.
  for (; first < num_pairs; first += kTailPairs) {
    if (first > 0 && first % kWarpSize == 0) ids.open(first);
    RowPiece key_rows[kTailPairs];
    RowPiece value_rows[kTailPairs];
    thread.load_rows(args.keys, ids, first % kWarpSize, key_rows);
    thread.load_rows(args.values, ids, first % kWarpSize, value_rows);
    const float coefficients = coefficients_of(first, key_rows, [] {});
    add_rows<T>(coefficients, num_pairs - first, value_rows, sum);
  }
  // 3. Round once and store.
  ids.check();
  if (args.out != nullptr) thread.store_own(sum, args.out);
}

// A block has one thread per piece of a row, in whole warps.
template <class T, class Tuning, class Pairs>
cudaError_t launch_fused(const TokenPassArgs& args, const Pairs& pairs, const DeviceInfo& device,
                         cudaStream_t stream) {
  const int64_t pieces = args.hidden_size * static_cast<int64_t>(sizeof(T)) / kPieceBytes;
  const int64_t threads = round_up<int64_t>(pieces, kWarpSize);
  if (threads > Tuning::kThreads) return cudaErrorInvalidValue;
  return launch_early(expert_fused_kernel<T, Tuning, Pairs>, static_cast<unsigned>(args.num_tokens),
                      static_cast<unsigned>(threads), device, stream, args, pairs);
}

}  // namespace omni_moe::cuda
