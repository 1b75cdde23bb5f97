// A token pass by bands (bands.h): the steps that depend on the pass, and the launches in order.
//
// The coefficients have a kernel of their own, as those of l2_tiled: T K dots, weights and results
// of a few bytes, about 10 µs at T 4096 and K 512, where the multiplying warps would repeat the
// activation's instructions for lanes that have no pair.
// The sum reads a token's partial outputs (2 H bytes each), then gathers its tail, kTailPairs pairs
// at a time.
#pragma once

#include "cuda/common/check.h"
#include "cuda/common/reduce.cuh"
#include "cuda/experts/bands/band_layout.cuh"
#include "cuda/experts/bands/bands.h"
#include "cuda/experts/expert_plan.h"
#include "cuda/experts/row_pieces.cuh"
#include "cuda/experts/token_pass.cuh"

namespace omni_moe::cuda {

inline constexpr int kBandCoefficientThreads = 256;

// Where the coefficients of the lists' pairs go.
struct BandCoefficients {
  BandPair* values;  // of the pass's values; in a backward those are the rows of `up`
  BandPair* down;    // of grad_down, or null without weight gradients
};

template <class T, class Pairs>
__device__ __forceinline__ void store_coefficients(const BandCoefficients& to, int64_t at,
                                                   BandPair entry, float coefficient,
                                                   const Pairs& pairs,
                                                   const typename Pairs::Inputs& inputs) {
  to.values[at] = with_coefficient<T>(entry, coefficient);
  if constexpr (Pairs::kHasWeightGradients) {
    if (to.down != nullptr) {
      to.down[at] = with_coefficient<T>(entry, pairs.down_coefficient(inputs));
    }
  }
}

template <class T, class Pairs>
__global__ void __launch_bounds__(kBandCoefficientThreads)
    band_coefficients_kernel(const __grid_constant__ Pairs pairs, int num_pairs, unsigned all_pairs,
                             const BandPair* list, const TokenCover* covers, const float* dots,
                             const __grid_constant__ BandCoefficients coefficients) {
  const unsigned at = blockIdx.x * kBandCoefficientThreads + threadIdx.x;
  if (at >= all_pairs) return;
  const unsigned token = at / num_pairs;
  const unsigned first = token * num_pairs;
  if (static_cast<int>(at - first) >= covers[token].tail) return;
  const BandPair entry = list[at];
  const int64_t pair = first + (entry & 0xffff);
  const auto inputs = pairs.load(pair, /*stores=*/true);
  const float coefficient = pairs.finish(inputs, pair, token, dots[at], /*stores=*/true);
  store_coefficients<T>(coefficients, at, entry, coefficient, pairs, inputs);
}

struct BandSumArgs {
  const BandPair* list;
  BandCoefficients coefficients;  // those of the tail are written where there are weight gradients
  const TokenCover* covers;
  const int* positions;
  const void* partial;
  int max_tasks;
};

// A block for each token; a thread has kPieces pieces of 16 bytes of every row.
template <class T, int kThreads, int kPieces, class Pairs>
__global__ void __launch_bounds__(kThreads)
    band_sum_kernel(const __grid_constant__ TokenPassArgs args,
                    const __grid_constant__ BandSumArgs bands,
                    const __grid_constant__ Pairs pairs) {
  constexpr int kWarps = kThreads / kWarpSize;
  constexpr int kTailPairs = 4;
  constexpr int kRows = kPieces <= 2 ? 8 / kPieces : 2;  // partial outputs in flight
  __shared__ float warp_dots[2][kWarps][kTailPairs];
  const int token = blockIdx.x;
  const int num_pairs = static_cast<int>(args.num_experts_per_token);
  const int64_t first_pair = static_cast<int64_t>(token) * num_pairs;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int row_bytes = static_cast<int>(args.hidden_size * sizeof(T));
  const auto byte_of = [&](int piece) {
    return static_cast<int>(piece * kThreads + threadIdx.x) * kPieceBytes;
  };
  // A thread past the row's end reads column 0 again.
  const auto in_row = [&](int piece) { return byte_of(piece) < row_bytes; };
  const auto load = [&](const void* rows, int32_t row, int piece) {
    return load_piece(static_cast<const char*>(rows) + (in_row(piece) ? byte_of(piece) : 0), row,
                      row_bytes);
  };
  const TokenCover cover = bands.covers[token];

  // 1. The addend and the partial outputs.
  float sum[kPieces][kVecWidth<T>] = {};
  if (args.out != nullptr) {
    if (args.addend != nullptr) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) unpack_piece<T>(load(args.addend, token, p), sum[p]);
    }
    const int* positions = bands.positions + static_cast<int64_t>(token) * bands.max_tasks;
    for (int first = 0; first < cover.num_tasks; first += kRows) {
      RowPiece rows[kRows][kPieces];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int position = positions[min(first + i, cover.num_tasks - 1)];
#pragma unroll
        for (int p = 0; p < kPieces; ++p) rows[i][p] = load(bands.partial, position, p);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (first + i >= cover.num_tasks) break;
#pragma unroll
        for (int p = 0; p < kPieces; ++p) add_piece<T>(1.0f, rows[i][p], sum[p]);
      }
    }
  }

  // 2. The tail.
  if (cover.tail < num_pairs) {
    RowPiece query[kPieces];
#pragma unroll
    for (int p = 0; p < kPieces; ++p) query[p] = load(args.queries, token, p);
    int parity = 0;
    for (int first = cover.tail; first < num_pairs; first += kTailPairs, parity ^= 1) {
      int64_t pair[kTailPairs];
      int32_t id[kTailPairs];
#pragma unroll
      for (int i = 0; i < kTailPairs; ++i) {
        pair[i] = first_pair + (bands.list[first_pair + min(first + i, num_pairs - 1)] & 0xffff);
        id[i] = static_cast<int32_t>(load_index(args.indices, args.index_type, pair[i]));
      }
      // Lane l finishes pair l % kTailPairs.
      const int own = lane % kTailPairs;
      const int64_t own_pair =
          own < 2 ? (own == 0 ? pair[0] : pair[1]) : (own == 2 ? pair[2] : pair[3]);
      const bool stores = warp == 0 && lane < kTailPairs && first + own < num_pairs;
      const auto inputs = pairs.load(own_pair, stores);
      float dots[kTailPairs] = {};
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        RowPiece keys[kTailPairs];
#pragma unroll
        for (int i = 0; i < kTailPairs; ++i) keys[i] = load(args.keys, id[i], p);
        float values[kVecWidth<T>];
        unpack_piece<T>(query[p], values);
#pragma unroll
        for (int i = 0; i < kTailPairs; ++i) {
          const float dot = dot_piece<T>(values, keys[i]);
          dots[i] += in_row(p) ? dot : 0.0f;
        }
      }
      const float share = warp_transpose_sum<kWarpSize>(dots, lane);
      if (lane < kTailPairs) warp_dots[parity][warp][lane] = share;
      __syncthreads();
      float dot = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) dot += warp_dots[parity][w][own];
      const float coefficient = pairs.finish(inputs, own_pair, token, dot, stores);
      if (stores && bands.coefficients.down != nullptr) {
        const int64_t at = first_pair + first + own;
        store_coefficients<T>(bands.coefficients, at, bands.list[at], coefficient, pairs, inputs);
      }
      if (args.out == nullptr) continue;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        RowPiece values[kTailPairs];
#pragma unroll
        for (int i = 0; i < kTailPairs; ++i) values[i] = load(args.values, id[i], p);
#pragma unroll
        for (int i = 0; i < kTailPairs; ++i) {
          const float factor = __shfl_sync(kFullWarp, coefficient, i);
          if (first + i < num_pairs) add_piece<T>(factor, values[i], sum[p]);
        }
      }
    }
  }

  // 3. Round once and store.
  if (args.out == nullptr) return;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    if (!in_row(p)) continue;
    char* to = static_cast<char*>(args.out) + static_cast<int64_t>(token) * row_bytes + byte_of(p);
    store_vec(to, pack_piece<T>(sum[p]));
  }
}

// ---- Launcher -----------------------------------------------------------------------------------

template <class T, int kThreads, int kPieces, class Pairs>
cudaError_t launch_band_sum(const TokenPassArgs& args, const BandSumArgs& bands, const Pairs& pairs,
                            cudaStream_t stream) {
  band_sum_kernel<T, kThreads, kPieces>
      <<<static_cast<unsigned>(args.num_tokens), kThreads, 0, stream>>>(args, bands, pairs);
  return launch_status();
}
template <class T, class Pairs>
cudaError_t launch_band_sum(const TokenPassArgs& args, const BandSumArgs& bands, const Pairs& pairs,
                            cudaStream_t stream) {
  const int64_t pieces = args.hidden_size * static_cast<int64_t>(sizeof(T)) / kPieceBytes;
  if (pieces <= 128) return launch_band_sum<T, 128, 1>(args, bands, pairs, stream);
  if (pieces <= 256) return launch_band_sum<T, 128, 2>(args, bands, pairs, stream);
  if (pieces <= 512) return launch_band_sum<T, 256, 2>(args, bands, pairs, stream);
  return launch_band_sum<T, 256, 4>(args, bands, pairs, stream);
}

inline BandShape band_shape(const TokenPassArgs& args, const BandPlan& plan) {
  return {static_cast<int>(args.num_tokens), static_cast<int>(args.num_experts_per_token),
          static_cast<int>(args.num_experts), plan};
}

// `base` holds band_workspace_bytes.
template <class T, class Pairs>
cudaError_t launch_bands(const TokenPassArgs& args, const Pairs& pairs, const BandPlan& plan,
                         void* base, const DeviceInfo& device, cudaStream_t stream) {
  if constexpr (sizeof(T) != 2) {
    return cudaErrorInvalidValue;
  } else {
    const BandShape shape = band_shape(args, plan);
    const BandWorkspace workspace = cut_band_workspace(shape, args.hidden_size, base);
    const int64_t all_pairs = args.num_tokens * args.num_experts_per_token;
    const BandCoefficients coefficients{workspace.coefficients, workspace.down_coefficients};
    return run_steps(
        [&] { return band_cover(shape, args.indices, args.index_type, workspace, stream); },
        [&] { return band_schedule(shape, workspace, stream); },
        [&] {
          return band_dots<T>(shape, args.queries, args.keys, args.hidden_size, workspace, device,
                              stream);
        },
        [&] {
          const auto blocks = ceil_div<int64_t>(all_pairs, kBandCoefficientThreads);
          band_coefficients_kernel<T>
              <<<static_cast<unsigned>(blocks), kBandCoefficientThreads, 0, stream>>>(
                  pairs, shape.num_pairs, static_cast<unsigned>(all_pairs), workspace.pairs,
                  workspace.covers, workspace.dots, coefficients);
          return launch_status();
        },
        [&] {
          if (args.out == nullptr) return cudaSuccess;
          return band_values<T>(shape, args.values, args.hidden_size, workspace, device, stream);
        },
        [&] {
          const BandSumArgs bands{workspace.pairs,     coefficients,      workspace.covers,
                                  workspace.positions, workspace.partial, plan.max_tasks};
          return launch_band_sum<T>(args, bands, pairs, stream);
        });
  }
}

}  // namespace omni_moe::cuda
