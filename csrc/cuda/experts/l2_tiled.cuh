// Token pass over tables whose rows are used several times. The hidden dimension is cut into tiles
// so narrow that one tile of all rows stays in L2, and blocks run tile by tile, all tokens in each:
// a table then leaves HBM once per pass, in pieces, and the gathers run at the rate of L2. A pass
// takes three launches:
//   dots: partial[tile][pair] = query[t, tile] · key[i, tile]
//   coefficients: one of each pair, from the sum over its tiles in order
//   sum: out[t, tile] = Σ_k coefficient[pair] value[i, tile]
// A warp owns a (token, tile). Beside the rows, the pass writes and reads 4 bytes per pair and
// tile.
#pragma once

#include <algorithm>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/experts/row_pieces.cuh"
#include "cuda/experts/token_pass.cuh"

namespace omni_moe::cuda {

// A token's last pairs, after its full batches, are loaded so many at a time.
inline constexpr int kTileTailLoads = 2;

// The (token, tile) of a warp. Tiles are in order of blockIdx, so that the blocks that are resident
// together share a tile or two.
struct TileTask {
  int tile;
  int64_t token;
  bool exists;  // false past the last token: the warp then repeats that token and stores nothing
};

template <class Tuning>
__device__ __forceinline__ TileTask tile_task(int64_t num_tokens) {
  const uint32_t token_blocks =
      static_cast<uint32_t>((num_tokens + Tuning::kWarps - 1) / Tuning::kWarps);
  const uint32_t tile = blockIdx.x / token_blocks;
  const int64_t token = static_cast<int64_t>(blockIdx.x - tile * token_blocks) * Tuning::kWarps +
                        threadIdx.x / kWarpSize;
  return {static_cast<int>(tile), min(token, num_tokens - 1), token < num_tokens};
}

// A lane's place in the tile: kLanes lanes cover the tile of one row, and a load of the whole warp
// covers kRows rows.
template <class T, class Tuning>
struct TileLane {
  static constexpr int kLanes = Tuning::kBytes / kPieceBytes;
  static constexpr int kRows = kWarpSize / kLanes;
  int lane;
  int row_in_load;
  bool in_row;
  int byte;  // the lane's first one in the row; a lane past the row's end reads column 0 again
  int row_bytes;

  __device__ __forceinline__ TileLane(int tile, int row_bytes_of_table)
      : lane(threadIdx.x % kWarpSize),
        row_in_load(lane / kLanes),
        in_row(tile * Tuning::kBytes + lane % kLanes * kPieceBytes < row_bytes_of_table),
        byte(in_row ? tile * Tuning::kBytes + lane % kLanes * kPieceBytes : 0),
        row_bytes(row_bytes_of_table) {}

  // Loads rows first, first + 1, … of the window of ids.
  template <int kLoads>
  __device__ __forceinline__ void load_rows(const char* table, const IdWindow& ids, int first,
                                            RowPiece (&pieces)[kLoads]) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      pieces[i] = load_piece(table, ids[first + i * kRows + row_in_load], row_bytes);
    }
  }
};

// Calls body(first, tag) for batches of tag.value loads: first the full batches, then the rest in
// small ones.
template <class Tuning, int kRows, class Body>
__device__ __forceinline__ void for_each_batch(int num_pairs, Body&& body) {
  constexpr int kBatch = kRows * Tuning::kLoads;
  static_assert(kBatch <= kWarpSize);
  int first = 0;
  for (; num_pairs - first >= kBatch; first += kBatch) body(first, ValueTag<Tuning::kLoads>{});
  for (; first < num_pairs; first += kRows * kTileTailLoads)
    body(first, ValueTag<kTileTailLoads>{});
}

template <class T, class Tuning>
__global__ void __launch_bounds__(Tuning::kWarps* kWarpSize, Tuning::kBlocksPerSm)
    expert_l2_tiled_dots_kernel(const __grid_constant__ TokenPassArgs args, bool beside_previous,
                                float* partial) {  // [num_tiles, T * K]
  using Lane = TileLane<T, Tuning>;
  // This kernel waits before it triggers, because the sum reads indices before it waits.
  if (!beside_previous) wait_for_previous_kernel();
  let_next_kernel_start();
  const TileTask task = tile_task<Tuning>(args.num_tokens);
  const Lane lane(task.tile, static_cast<int>(args.hidden_size * sizeof(T)));
  const char* table = static_cast<const char*>(args.keys) + lane.byte;
  const int num_pairs = static_cast<int>(args.num_experts_per_token);
  const int64_t first_pair = task.token * num_pairs;
  partial += task.tile * (args.num_tokens * num_pairs) + first_pair;

  IdWindow ids(args.indices, args.index_type, first_pair, num_pairs, args.num_experts, lane.lane);
  const RowPiece vector_piece = load_piece(static_cast<const char*>(args.queries) + lane.byte,
                                           static_cast<int32_t>(task.token), lane.row_bytes);
  for_each_batch<Tuning, Lane::kRows>(num_pairs, [&](int first, auto tag) {
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
  wait_for_previous_kernel();  // the kernels that wait for this one rely on it
  ids.check();
}

inline constexpr int kCoefficientThreads = 256;

// The coefficients have a kernel of their own: when the warps of all 8 tiles repeated the sum over
// tiles, T16384 E65536 K32 took 360 µs instead of 325, and T4096 E4096 K16 gained less than 1 µs.
template <class Pairs>
__global__ void __launch_bounds__(kCoefficientThreads)
    expert_l2_tiled_coefficients_kernel(const __grid_constant__ Pairs pairs,
                                        const float* partial,  // [num_tiles, T * K]
                                        int num_tiles, int64_t all_pairs, int num_pairs,
                                        float* coefficients) {  // [T * K]
  let_next_kernel_start();
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kCoefficientThreads + threadIdx.x;
  if (pair >= all_pairs) return;
  wait_for_previous_kernel();
  const auto inputs = pairs.load(pair, /*stores=*/true);
  float dot = 0.0f;
#pragma unroll 8
  for (int tile = 0; tile < num_tiles; ++tile) dot += partial[tile * all_pairs + pair];
  coefficients[pair] = pairs.finish(inputs, pair, pair / num_pairs, dot, /*stores=*/true);
}

template <class T, class Tuning>
__global__ void __launch_bounds__(Tuning::kWarps* kWarpSize, Tuning::kBlocksPerSm)
    expert_l2_tiled_sum_kernel(const __grid_constant__ TokenPassArgs
                                   args,                              // indices checked before
                               const float* coefficients_of_pairs) {  // [T * K]
  using Lane = TileLane<T, Tuning>;
  let_next_kernel_start();
  const TileTask task = tile_task<Tuning>(args.num_tokens);
  const Lane lane(task.tile, static_cast<int>(args.hidden_size * sizeof(T)));
  const char* table = static_cast<const char*>(args.values) + lane.byte;
  const int num_pairs = static_cast<int>(args.num_experts_per_token);
  const int64_t first_pair = task.token * num_pairs;

  IdWindow ids(args.indices, args.index_type, first_pair, num_pairs, args.num_experts, lane.lane);
  float sum[kVecWidth<T>] = {};
  float coefficients = 0.0f;  // lane l holds that of pair (first rounded down to 32) + l
  for_each_batch<Tuning, Lane::kRows>(num_pairs, [&](int first, auto tag) {
    constexpr int kLoads = decltype(tag)::value;
    const int window = first % kWarpSize;
    if (window == 0) ids.open(first);
    RowPiece pieces[kLoads];
    lane.load_rows(table, ids, window, pieces);
    if (first == 0) wait_for_previous_kernel();  // rows are loaded without coefficients
    if (window == 0) {
      const int64_t pair = first_pair + min(first + lane.lane, num_pairs - 1);
      coefficients = coefficients_of_pairs[pair];
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int j = i * Lane::kRows + lane.row_in_load;
      const float coefficient = __shfl_sync(kFullWarp, coefficients, window + j);
      if (kLoads == Tuning::kLoads || first + j < num_pairs) {
        add_piece<T>(coefficient, pieces[i], sum);
      }
    }
  });
  // Add up the rows of a load, in the order of the butterfly.
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

// With `beside_previous` the dots may run beside the kernels just launched. The first of those must
// have been started after everything that the dots read was written.
// `workspace` holds the partial dots [num_tiles, T * K], then the coefficients [T * K].
template <class T, class Tuning, class Pairs>
cudaError_t launch_l2_tiled(const TokenPassArgs& args, const Pairs& pairs, float* workspace,
                            bool beside_previous, const DeviceInfo& device, cudaStream_t stream) {
  constexpr unsigned kThreads = Tuning::kWarps * kWarpSize;
  const int64_t row_bytes = args.hidden_size * static_cast<int64_t>(sizeof(T));
  const int64_t num_tiles = ceil_div<int64_t>(row_bytes, Tuning::kBytes);
  const int64_t num_blocks = ceil_div<int64_t>(args.num_tokens, Tuning::kWarps) * num_tiles;
  const int64_t all_pairs = args.num_tokens * args.num_experts_per_token;
  const int64_t pair_blocks = ceil_div<int64_t>(all_pairs, kCoefficientThreads);
  if (std::max(num_blocks, pair_blocks) > INT32_MAX) return cudaErrorInvalidValue;
  float* coefficients = workspace + num_tiles * all_pairs;
  return run_steps(
      [&] {
        return launch_early(expert_l2_tiled_dots_kernel<T, Tuning>,
                            static_cast<unsigned>(num_blocks), kThreads, device, stream, args,
                            beside_previous, workspace);
      },
      [&] {
        return launch_early(expert_l2_tiled_coefficients_kernel<Pairs>,
                            static_cast<unsigned>(pair_blocks), kCoefficientThreads, device, stream,
                            pairs, workspace, static_cast<int>(num_tiles), all_pairs,
                            static_cast<int>(args.num_experts_per_token), coefficients);
      },
      [&] {
        if (args.out == nullptr) return cudaSuccess;
        return launch_early(expert_l2_tiled_sum_kernel<T, Tuning>,
                            static_cast<unsigned>(num_blocks), kThreads, device, stream, args,
                            coefficients);
      });
}

}  // namespace omni_moe::cuda
