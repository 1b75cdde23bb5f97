// Token pass over tables whose rows are used several times: the hidden dimension is cut into slabs
// so narrow that one slab of all rows lives in L2, and blocks run slab by slab, all tokens in each.
// A table then leaves HBM once per pass, in pieces, and the gathers run at the rate of L2. Three
// launches:
//   dots: partial[slab][pair] = vector[t, slab] · scored[i, slab]
//   coefficients: per pair, from the sum over slabs in order
//   sum: out[t, slab] = Σ_k coefficient[pair] added[i, slab]
// A warp owns a (token, slab). Beside the rows, 4 bytes per pair and slab are written and read.
#pragma once

#include <algorithm>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/experts/row_pieces.cuh"
#include "cuda/experts/token_pass.cuh"

namespace omni_moe::cuda {

// Loads at a time in what is left of a token after its full batches.
inline constexpr int kSlabTailLoads = 2;

// Which (token, slab) a warp has: slabs in order of blockIdx, so that blocks resident together
// share a slab or two.
struct SlabTask {
  int slab;
  int64_t token;
  bool exists;  // false past the last token: the warp repeats that one and stores nothing
};

template <class Slab>
__device__ __forceinline__ SlabTask slab_task(int64_t num_tokens) {
  const uint32_t token_blocks =
      static_cast<uint32_t>((num_tokens + Slab::kWarps - 1) / Slab::kWarps);
  const uint32_t slab = blockIdx.x / token_blocks;
  const int64_t token = static_cast<int64_t>(blockIdx.x - slab * token_blocks) * Slab::kWarps +
                        threadIdx.x / kWarpSize;
  return {static_cast<int>(slab), min(token, num_tokens - 1), token < num_tokens};
}

// Where a lane stands: kLanes lanes cover a slab of one row, a warp-wide load kRows rows.
template <class T, class Slab>
struct SlabLane {
  static constexpr int kLanes = Slab::kBytes / kPieceBytes;
  static constexpr int kRows = kWarpSize / kLanes;
  int lane;
  int row_in_load;
  bool in_row;
  int byte;  // of the row; past its end: column 0 again
  int row_bytes;

  __device__ __forceinline__ SlabLane(int slab, int row_bytes_of_table)
      : lane(threadIdx.x % kWarpSize),
        row_in_load(lane / kLanes),
        in_row(slab * Slab::kBytes + lane % kLanes * kPieceBytes < row_bytes_of_table),
        byte(in_row ? slab * Slab::kBytes + lane % kLanes * kPieceBytes : 0),
        row_bytes(row_bytes_of_table) {}

  // Loads rows first, first + 1, … of the window.
  template <int kLoads>
  __device__ __forceinline__ void load_rows(const char* table, const IdWindow& ids, int first,
                                            RowPiece (&pieces)[kLoads]) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      pieces[i] = load_piece(table, ids[first + i * kRows + row_in_load], row_bytes);
    }
  }
};

// Calls body(first, tag) for batches of tag.value loads: full ones, then a few at a time.
template <class Slab, int kRows, class Body>
__device__ __forceinline__ void for_each_batch(int num_pairs, Body&& body) {
  constexpr int kBatch = kRows * Slab::kLoads;
  static_assert(kBatch <= kWarpSize);
  int first = 0;
  for (; num_pairs - first >= kBatch; first += kBatch) body(first, ValueTag<Slab::kLoads>{});
  for (; first < num_pairs; first += kRows * kSlabTailLoads)
    body(first, ValueTag<kSlabTailLoads>{});
}

template <class T, class Slab>
__global__ void __launch_bounds__(Slab::kWarps* kWarpSize, Slab::kBlocksPerSm)
    expert_slab_dots_kernel(const __grid_constant__ TokenPassArgs args, bool beside_previous,
                            float* partial) {  // [num_slabs, T * K]
  using Lane = SlabLane<T, Slab>;
  // In this order: the sum reads indices before it waits.
  if (!beside_previous) wait_for_previous_kernel();
  let_next_kernel_start();
  const SlabTask task = slab_task<Slab>(args.num_tokens);
  const Lane lane(task.slab, static_cast<int>(args.hidden_size * sizeof(T)));
  const char* table = static_cast<const char*>(args.scored) + lane.byte;
  const int num_pairs = static_cast<int>(args.num_experts_per_token);
  const int64_t first_pair = task.token * num_pairs;
  partial += task.slab * (args.num_tokens * num_pairs) + first_pair;

  IdWindow ids(args.indices, args.index_type, first_pair, num_pairs, args.num_experts, lane.lane);
  const RowPiece vector_piece = load_piece(static_cast<const char*>(args.vectors) + lane.byte,
                                           static_cast<int32_t>(task.token), lane.row_bytes);
  for_each_batch<Slab, Lane::kRows>(num_pairs, [&](int first, auto tag) {
    constexpr int kLoads = decltype(tag)::value;
    if (first % kWarpSize == 0) ids.open(first);
    // 1. All rows of a batch.
    RowPiece pieces[kLoads];
    lane.load_rows(table, ids, first % kWarpSize, pieces);
    // 2. Their dot products, then one lane per pair.
    float vector[kVecWidth<T>];
    unpack_piece<T>(vector_piece, vector);
    float dots[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float dot = dot_piece<T>(vector, pieces[i]);
      dots[i] = lane.in_row ? dot : 0.0f;
    }
    const float dot = warp_transpose_sum<Lane::kLanes>(dots, lane.lane);
    const int pair = first + lane.lane % kLoads * Lane::kRows + lane.row_in_load;
    const bool is_first = lane.lane % Lane::kLanes < kLoads;
    if (is_first && pair < num_pairs && task.exists) partial[pair] = dot;
  });
  wait_for_previous_kernel();  // for those that wait for this one
  ids.check();
}

inline constexpr int kSlabCoefficientThreads = 256;

// A kernel of its own: with the sum over 8 slabs repeated by the warps of each, T16384 E65536 K32
// took 360 µs instead of 325, and T4096 E4096 K16 gained less than 1.
template <class Pairs>
__global__ void __launch_bounds__(kSlabCoefficientThreads)
    expert_slab_coefficients_kernel(const __grid_constant__ Pairs pairs,
                                    const float* partial,  // [num_slabs, T * K]
                                    int num_slabs, int64_t all_pairs, int num_pairs,
                                    float* coefficients) {  // [T * K]
  let_next_kernel_start();
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kSlabCoefficientThreads + threadIdx.x;
  if (pair >= all_pairs) return;
  wait_for_previous_kernel();
  const auto inputs = pairs.load(pair, /*stores=*/true);
  float dot = 0.0f;
#pragma unroll 8
  for (int slab = 0; slab < num_slabs; ++slab) dot += partial[slab * all_pairs + pair];
  coefficients[pair] = pairs.finish(inputs, pair, pair / num_pairs, dot, /*stores=*/true);
}

template <class T, class Slab>
__global__ void __launch_bounds__(Slab::kWarps* kWarpSize, Slab::kBlocksPerSm)
    expert_slab_sum_kernel(const __grid_constant__ TokenPassArgs args,  // indices checked before
                           const float* coefficients_of_pairs) {        // [T * K]
  using Lane = SlabLane<T, Slab>;
  let_next_kernel_start();
  const SlabTask task = slab_task<Slab>(args.num_tokens);
  const Lane lane(task.slab, static_cast<int>(args.hidden_size * sizeof(T)));
  const char* table = static_cast<const char*>(args.added) + lane.byte;
  const int num_pairs = static_cast<int>(args.num_experts_per_token);
  const int64_t first_pair = task.token * num_pairs;

  IdWindow ids(args.indices, args.index_type, first_pair, num_pairs, args.num_experts, lane.lane);
  float sum[kVecWidth<T>] = {};
  float coefficients = 0.0f;  // lane l: that of pair (first rounded down to 32) + l
  for_each_batch<Slab, Lane::kRows>(num_pairs, [&](int first, auto tag) {
    constexpr int kLoads = decltype(tag)::value;
    const int window = first % kWarpSize;
    if (window == 0) ids.open(first);
    RowPiece pieces[kLoads];
    lane.load_rows(table, ids, window, pieces);
    if (first == 0) wait_for_previous_kernel();  // the rows need no coefficients
    if (window == 0) {
      const int64_t pair = first_pair + min(first + lane.lane, num_pairs - 1);
      coefficients = coefficients_of_pairs[pair];
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int j = i * Lane::kRows + lane.row_in_load;
      const float coefficient = __shfl_sync(kFullWarp, coefficients, window + j);
      if (kLoads == Slab::kLoads || first + j < num_pairs) {
        add_piece<T>(coefficient, pieces[i], sum);
      }
    }
  });
  // The rows of a load, in the order of the butterfly.
#pragma unroll
  for (int offset = Lane::kLanes; offset < kWarpSize; offset *= 2) {
#pragma unroll
    for (int i = 0; i < kVecWidth<T>; ++i) sum[i] += __shfl_xor_sync(kFullWarp, sum[i], offset);
  }
  if (lane.in_row && lane.row_in_load == 0 && task.exists) {
    const int64_t at = task.token * lane.row_bytes + lane.byte;
    if (args.addend != nullptr) {
      add_piece<T>(1.0f, load_vec<RowPiece>(static_cast<const char*>(args.addend) + at), sum);
    }
    store_vec_streaming(static_cast<char*>(args.out) + at, pack_piece<T>(sum));
  }
}

// ---- Launcher -----------------------------------------------------------------------------------

// `beside_previous`: the dots may run beside the kernels just launched, which must have been
// started after everything that this pass reads, but for what BackwardPairs reads, was written.
// `workspace` holds the partial dots [num_slabs, T * K], then the coefficients [T * K].
template <class T, class Slab, class Pairs>
cudaError_t launch_slabs(const TokenPassArgs& args, const Pairs& pairs, float* workspace,
                         bool beside_previous, const DeviceInfo& device, cudaStream_t stream) {
  constexpr unsigned kThreads = Slab::kWarps * kWarpSize;
  const int64_t row_bytes = args.hidden_size * static_cast<int64_t>(sizeof(T));
  const int64_t num_slabs = ceil_div<int64_t>(row_bytes, Slab::kBytes);
  const int64_t num_blocks = ceil_div<int64_t>(args.num_tokens, Slab::kWarps) * num_slabs;
  const int64_t all_pairs = args.num_tokens * args.num_experts_per_token;
  const int64_t pair_blocks = ceil_div<int64_t>(all_pairs, kSlabCoefficientThreads);
  if (std::max(num_blocks, pair_blocks) > INT32_MAX) return cudaErrorInvalidValue;
  float* coefficients = workspace + num_slabs * all_pairs;
  return run_steps(
      [&] {
        return launch_early(expert_slab_dots_kernel<T, Slab>, static_cast<unsigned>(num_blocks),
                            kThreads, device, stream, args, beside_previous, workspace);
      },
      [&] {
        return launch_early(expert_slab_coefficients_kernel<Pairs>,
                            static_cast<unsigned>(pair_blocks), kSlabCoefficientThreads, device,
                            stream, pairs, workspace, static_cast<int>(num_slabs), all_pairs,
                            static_cast<int>(args.num_experts_per_token), coefficients);
      },
      [&] {
        if (args.out == nullptr) return cudaSuccess;
        return launch_early(expert_slab_sum_kernel<T, Slab>, static_cast<unsigned>(num_blocks),
                            kThreads, device, stream, args, coefficients);
      });
}

}  // namespace omni_moe::cuda
