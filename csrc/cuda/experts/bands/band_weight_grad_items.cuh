// What the gradients of the tables by bands are cut into (band_weight_grad_sm90.cu): the shared
// memory of a block, the items it sums, and the warpgroup that gathers tokens' rows for them.
#pragma once

#include "cuda/common/cp_async.cuh"
#include "cuda/experts/bands/band_grid_sm90.cuh"
#include "cuda/experts/bands/bands.h"
#include "cuda/hopper/mbarrier.cuh"
#include "cuda/hopper/tma.cuh"

namespace omni_moe::cuda::band_grad {

inline constexpr int kChunkTasks = 64;  // of a stage
inline constexpr int kMaxBlocks = 15;   // of 64 tasks by 64 places, that P has room for
inline constexpr int kLaidChunks = 4;   // whose rows the lanes of the warps know at once
inline constexpr int kSlab = 128;       // elements of a row in a stage
inline constexpr int kSlabTiles = 2;    // of 64 elements, one a warpgroup
inline constexpr int kStages = 4;
inline constexpr int kOutputs = 2;  // tiles of results that leave one after the other
inline constexpr int kConsumers = kSlabTiles;
inline constexpr int kConsumerWarps = kConsumers * 4;
inline constexpr int kLoaderThreads = 128;
inline constexpr int kThreads = kConsumers * 128 + kLoaderThreads;
inline constexpr int kConsumerRegisters = 224;
inline constexpr int kLoaderRegisters = 56;
inline constexpr int kBlockPlaces = 64;
// 64 tasks by 64 elements or places.
inline constexpr int kTileBytes = kChunkTasks * kSwizzleRowBytes;

// The places of a band that a block sums at once: one product of at most 256 columns, and one of 64
// where a band has up to 320.
template <int kNumPlaces>
struct WeightGradTile {
  static constexpr int kPlaces = kNumPlaces;
  static constexpr int kBlocks = kPlaces / kBlockPlaces;
  static constexpr int kMaxChunks = kMaxBlocks / kBlocks;  // of tasks
  static constexpr int kCols = kPlaces > 256 ? 256 : kPlaces;
  static constexpr int kMoreCols = kPlaces - kCols;
  static_assert(kMoreCols == 0 || kMoreCols == 64);
};

template <class Tile>
struct WeightGradShared {
  char coefficients[Tile::kMaxChunks][Tile::kBlocks][kTileBytes];  // P
  char states[kStages][kSlabTiles][kTileBytes];
  char outputs[kConsumers][kOutputs][kTileBytes];
  uint64_t full[kStages];
  uint64_t empty[kStages];
};

struct WeightGradTable {
  BandTable grad;
  const char* states;  // [T, H]
  const BandPair* coefficients;
};

struct WeightGradArgs {
  WeightGradTable tables[2];
  BandPlan plan;
  const BandTask* tasks;
  const BandRange* ranges;
  const int* tails;
  int num_pairs;  // K
  int row_bytes;
  int num_slabs;
  int num_tables;
  int num_pieces;  // of a band's places
  int num_groups;  // of slabs
  int group_slabs;
  bool is_rows;  // whether this pass is that of the grid's rows
  bool adds;     // whether it adds to what the other has stored
};

// What a block sums: some slabs of some places of one band.
struct WeightGradItem {
  int table;
  int band;  // as all bands are numbered
  int first_place;
  int first_slab;
  int last_slab;
};

__device__ __forceinline__ int num_items(const WeightGradArgs& args) {
  const int bands = args.is_rows ? args.plan.num_rows : args.plan.num_cols;
  return bands * args.num_tables * args.num_pieces * args.num_groups;
}

template <class Tile>
__device__ __forceinline__ WeightGradItem item_at(const WeightGradArgs& args, int i) {
  const int bands = args.is_rows ? args.plan.num_rows : args.plan.num_cols;
  WeightGradItem item;
  item.band = i % bands + (args.is_rows ? 0 : args.plan.num_rows);
  i /= bands;
  item.first_place = i % args.num_pieces * Tile::kPlaces;
  i /= args.num_pieces;
  item.table = i % args.num_tables;
  item.first_slab = i / args.num_tables * args.group_slabs;
  item.last_slab = min(item.first_slab + args.group_slabs, args.num_slabs);
  return item;
}

__device__ __forceinline__ int num_rows_of(const BandRange& range) {
  return range.num_tasks + range.num_tails;
}

// Row i of a band, whose pairs are num_pairs from `first` on; past the last one it has none.
__device__ __forceinline__ BandTask row_at(const WeightGradArgs& args, const BandRange& range,
                                           int i) {
  if (i < range.num_tasks) return args.tasks[range.first_task + i];
  if (i >= num_rows_of(range)) return {-1, 0, 0, 0};
  const int pair = args.tails[range.first_tail + i - range.num_tasks];
  return {pair / args.num_pairs, pair, 1, 0};
}

// ---- Loading warpgroup --------------------------------------------------------------------------

// Sixteen threads copy the 256 bytes that a stage takes of a row; a thread has every eighth row.
inline constexpr int kRowThreads = kSlab * 2 / 16;
inline constexpr int kRowStep = kLoaderThreads / kRowThreads;
inline constexpr int kRowsPerThread = kChunkTasks / kRowStep;
inline constexpr int kCopying = 2;  // stages whose copies are under way while one more is started

template <class Tile>
__device__ __forceinline__ void load_items(const WeightGradArgs& args,
                                           WeightGradShared<Tile>& shared) {
  const int thread = threadIdx.x - kConsumers * 128;
  const int first_row = thread / kRowThreads;
  const int piece = thread % kRowThreads;  // of 16 bytes
  RingCursor<kStages> ring;
  RingCursor<kStages> landed;
  int copying = 0;
  // Copies into a stage are complete for the tensor cores once the thread that started them has
  // waited, fenced and arrived.
  const auto finish_oldest = [&] {
    fence_async_proxy();
    mbarrier_arrive(&shared.full[landed.stage]);
    landed.advance();
    --copying;
  };
  const int items = num_items(args);
  for (int i = blockIdx.x; i < items; i += gridDim.x) {
    const WeightGradItem item = item_at<Tile>(args, i);
    const BandRange range = args.ranges[item.band];
    const char* states = args.tables[item.table].states;
    const int rows = num_rows_of(range);
    for (int slab = item.first_slab; slab < item.last_slab; ++slab) {
      const int byte = slab * kSlab * 2 + piece * 16;
      const bool in_row = byte < args.row_bytes;
      for (int first = 0; first < rows; first += kChunkTasks, ring.advance()) {
        int tokens[kRowsPerThread];
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
          tokens[r] = row_at(args, range, first + first_row + r * kRowStep).token;
        }
        mbarrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
        char* tile = shared.states[ring.stage][piece / 8];
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
          // Rows without a task become zeros, since P's zeros would not hide a NaN.
          const bool exists = in_row && tokens[r] >= 0;
          const char* from = states + static_cast<int64_t>(tokens[r]) * args.row_bytes + byte;
          cp_async_16(tile + swizzle128(first_row + r * kRowStep, piece % 8),
                      exists ? from : states, exists);
        }
        cp_async_commit();
        if (++copying > kCopying) {
          cp_async_wait<kCopying>();
          finish_oldest();
        }
      }
    }
  }
  cp_async_wait<0>();
  while (copying > 0) finish_oldest();
}

}  // namespace omni_moe::cuda::band_grad
