// What the gradients of the tables by bands are cut into (band_weight_grad_sm90.cu): the shared
// memory of a block, the items it sums, and the warpgroup that fills its ring with the tokens' rows
// and their coefficients.
#pragma once

#include <algorithm>

#include "cuda/common/cp_async.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/common/warp_scan.cuh"
#include "cuda/experts/bands/band_grid_sm90.cuh"
#include "cuda/experts/bands/band_layout.cuh"
#include "cuda/experts/bands/bands.h"
#include "cuda/hopper/mbarrier.cuh"
#include "cuda/hopper/tma.cuh"

namespace omni_moe::cuda::band_grad {

inline constexpr int kChunkTasks = 64;  // of a stage
inline constexpr int kSlab = 128;       // elements of a row in a stage
inline constexpr int kSlabTiles = 2;    // of 64 elements, one a warpgroup
inline constexpr int kOutputs = 2;      // tiles of results that leave one after the other
inline constexpr int kConsumers = kSlabTiles;
inline constexpr int kConsumerWarps = kConsumers * 4;
inline constexpr int kLoaderThreads = 128;
inline constexpr int kThreads = kConsumers * 128 + kLoaderThreads;
inline constexpr int kConsumerRegisters = 208;
inline constexpr int kLoaderRegisters = 88;
inline constexpr int kBlockPlaces = 64;
// 64 tasks by 64 elements or places.
inline constexpr int kTileBytes = kChunkTasks * kSwizzleRowBytes;

// The places of a band that a block sums at once: one product of at most 256 columns, and one of 64
// where a band has up to 320.
template <int kNumPlaces>
struct WeightGradTile {
  static constexpr int kPlaces = kNumPlaces;
  static constexpr int kBlocks = kPlaces / kBlockPlaces;
  // As many as fit: each has 64 tasks' coefficients and a slab of their rows.
  static constexpr int kStageBytes = (kBlocks + kSlabTiles) * kTileBytes;
  static constexpr int kStages = std::min(5, 190 * 1024 / kStageBytes);
  static constexpr int kCols = kPlaces > 256 ? 256 : kPlaces;
  static constexpr int kMoreCols = kPlaces - kCols;
  static_assert(kMoreCols == 0 || kMoreCols == 64);
};

template <class Tile>
struct WeightGradShared {
  char coefficients[Tile::kStages][Tile::kBlocks][kTileBytes];  // P
  char states[Tile::kStages][kSlabTiles][kTileBytes];
  char outputs[kConsumers][kOutputs][kTileBytes];
  uint64_t full[Tile::kStages];
  uint64_t empty[Tile::kStages];
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
  bool is_rows;    // whether this pass is that of the grid's rows
  bool adds;       // whether it adds to what the other has stored
};

// What a block sums at once: a slab of some places of one band.
struct WeightGradItem {
  int table;
  int band;  // as all bands are numbered
  int first_place;
  int slab;
};

__device__ __forceinline__ int num_items(const WeightGradArgs& args) {
  const int bands = args.is_rows ? args.plan.num_rows : args.plan.num_cols;
  return bands * args.num_tables * args.num_pieces * args.num_slabs;
}

// Blocks that run together have the slabs of the same bands: they read the same lists and write
// whole rows of the gradients.
template <class Tile>
__device__ __forceinline__ WeightGradItem item_at(const WeightGradArgs& args, int i) {
  const int bands = args.is_rows ? args.plan.num_rows : args.plan.num_cols;
  WeightGradItem item;
  item.slab = i % args.num_slabs;
  i /= args.num_slabs;
  item.band = i % bands + (args.is_rows ? 0 : args.plan.num_rows);
  i /= bands;
  item.first_place = i % args.num_pieces * Tile::kPlaces;
  item.table = i / args.num_pieces;
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

// A chunk's tasks are those of the four warps, 16 each: as many as the tensor cores take in a step,
// so that a warp without tasks has nothing to do. Lane l knows the warp's task l.
inline constexpr int kWarpTasks = 16;
static_assert(kLoaderThreads / kWarpSize * kWarpTasks == kChunkTasks);

template <class T, class Tile>
class WeightGradLoader {
 public:
  __device__ __forceinline__ WeightGradLoader(const WeightGradArgs& args,
                                              WeightGradShared<Tile>& shared)
      : args_(args),
        shared_(shared),
        lane_(threadIdx.x % kWarpSize),
        first_row_((threadIdx.x - kConsumers * 128) / kWarpSize * kWarpTasks),
        num_items_(num_items(args)) {}

  __device__ __forceinline__ void run() {
    RingCursor<Tile::kStages> ring;
    Chunk next{static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x), {}, {}, 0, 0};
    bool has_next = advance(next);
    BandTask next_task = task_of(next, has_next);
    open_lists(next.item, next_task);
    while (has_next) {
      const Chunk chunk = next;
      const BandTask task = next_task;
      has_next = advance(next);
      next_task = task_of(next, has_next);
      mbarrier_wait(&shared_.empty[ring.stage], ring.parity ^ 1);
      if (chunk.first + first_row_ < chunk.rows) {
        copy_rows(chunk.item, task, ring.stage);
        lay_out(chunk.item, task, ring.stage);
      }
      open_lists(next.item, next_task);
      // Copies are complete for the tensor cores once the thread that started them has waited,
      // fenced and arrived. They have come while P was laid out.
      cp_async_wait<0>();
      fence_async_proxy();
      mbarrier_arrive(&shared_.full[ring.stage]);
      ring.advance();
    }
  }

 private:
  struct Chunk {
    int item_index;
    WeightGradItem item;
    BandRange range;
    int rows;  // of the band
    int first;
  };

  // Goes to the next chunk; false behind the last.
  __device__ __forceinline__ bool advance(Chunk& chunk) const {
    chunk.first += kChunkTasks;
    while (chunk.first >= chunk.rows) {
      chunk.item_index += static_cast<int>(gridDim.x);
      if (chunk.item_index >= num_items_) return false;
      chunk.item = item_at<Tile>(args_, chunk.item_index);
      chunk.range = args_.ranges[chunk.item.band];
      chunk.rows = num_rows_of(chunk.range);
      chunk.first = 0;
    }
    return true;
  }

  __device__ __forceinline__ BandTask task_of(const Chunk& chunk, bool exists) const {
    if (!exists || lane_ >= kWarpTasks) return {-1, 0, 0, 0};
    return row_at(args_, chunk.range, chunk.first + first_row_ + lane_);
  }

  // Sixteen lanes copy the 256 bytes that a stage takes of a row.
  __device__ __forceinline__ void copy_rows(const WeightGradItem& item, const BandTask& task,
                                            int stage) const {
    constexpr int kRowLanes = kSlab * 2 / 16;
    constexpr int kRowsAtOnce = kWarpSize / kRowLanes;
    const char* states = args_.tables[item.table].states;
    const int piece = lane_ % kRowLanes;
    const int byte = item.slab * kSlab * 2 + piece * 16;
    const bool in_row = byte < args_.row_bytes;
    char* tile = shared_.states[stage][piece / 8];
#pragma unroll
    for (int i = 0; i < kWarpTasks / kRowsAtOnce; ++i) {
      const int row = i * kRowsAtOnce + lane_ / kRowLanes;
      const int token = __shfl_sync(kFullWarp, task.token, row);
      // Rows without a task become zeros, since P's zeros would not hide a NaN.
      const bool exists = in_row && token >= 0;
      const char* from = states + static_cast<int64_t>(token) * args_.row_bytes + byte;
      cp_async_16(tile + swizzle128(first_row_ + row, piece % 8), exists ? from : states, exists);
    }
    cp_async_commit();
  }

  // The lists of the warp's tasks in units of 32 pairs of one task, and the first units' pairs.
  __device__ __forceinline__ void open_lists(const WeightGradItem& item, const BandTask& task) {
    const int units = ceil_div(task.num_pairs, kWarpSize);
    last_unit_ = static_cast<int>(warp_inclusive_scan(static_cast<unsigned>(units)));
    num_units_ = __shfl_sync(kFullWarp, last_unit_, kWarpSize - 1);
    unit_pair_ = task.first - (last_unit_ - units) * kWarpSize;  // that of unit 0
    load_units(item, task, 0);
  }
  __device__ __forceinline__ int row_of(int unit) const {
    return __popc(__ballot_sync(kFullWarp, last_unit_ <= unit));
  }
  __device__ __forceinline__ void load_units(const WeightGradItem& item, const BandTask& task,
                                             int first_unit) {
    const BandPair* coefficients = args_.tables[item.table].coefficients;
#pragma unroll
    for (int u = 0; u < kEarlyUnits; ++u) {
      const int unit = first_unit + u;
      pairs_[u] = kNoPair;
      if (unit >= num_units_) continue;
      const int row = row_of(unit);
      const int at = __shfl_sync(kFullWarp, unit_pair_, row) + unit * kWarpSize + lane_;
      if (at < __shfl_sync(kFullWarp, task.first + task.num_pairs, row)) {
        pairs_[u] = coefficients[at];
      }
    }
  }

  // P of the warp's tasks.
  __device__ __forceinline__ void lay_out(const WeightGradItem& item, const BandTask& task,
                                          int stage) {
    // 1. Zeros.
    constexpr int kRowBytes = kWarpTasks * kSwizzleRowBytes;
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block) {
      char* rows = shared_.coefficients[stage][block] + first_row_ * kSwizzleRowBytes;
#pragma unroll
      for (int byte = 0; byte < kRowBytes; byte += kWarpSize * 16) {
        *reinterpret_cast<uint4*>(rows + byte + lane_ * 16) = make_uint4(0, 0, 0, 0);
      }
    }
    __syncwarp();
    // 2. Rows whose pairs have places of their own.
    unsigned repeated_rows = __ballot_sync(kFullWarp, task.has_repeats);
    for (int first_unit = 0; first_unit < num_units_; first_unit += kEarlyUnits) {
      if (first_unit > 0) load_units(item, task, first_unit);
#pragma unroll
      for (int u = 0; u < kEarlyUnits; ++u) {
        if (first_unit + u >= num_units_) break;
        const int row = row_of(first_unit + u);
        if (pairs_[u] != kNoPair && (repeated_rows >> row & 1) == 0) {
          lay_out_pair(pairs_[u], cell_of(item, stage, row));
        }
      }
    }
    // 3. Rows in which pairs share places.
    for (; repeated_rows != 0; repeated_rows &= repeated_rows - 1) {
      const int row = __ffs(repeated_rows) - 1;
      const int begin = __shfl_sync(kFullWarp, task.first, row);
      const int end = begin + __shfl_sync(kFullWarp, task.num_pairs, row);
      add_up_pairs<T>(args_.tables[item.table].coefficients, begin, end, lane_,
                      cell_of(item, stage, row));
    }
  }

  // Where the coefficients of the warp's row go; null for places of other pieces.
  __device__ __forceinline__ auto cell_of(const WeightGradItem& item, int stage, int row) const {
    auto& blocks = shared_.coefficients[stage];
    const int at = first_row_ + row;
    const unsigned first_place = item.first_place;
    return [&blocks, at, first_place](unsigned band_place) -> uint16_t* {
      const unsigned place = band_place - first_place;
      if (place >= static_cast<unsigned>(Tile::kPlaces)) return nullptr;
      const int piece = static_cast<int>(place % kBlockPlaces / 8);
      char* row_piece = blocks[place / kBlockPlaces] + swizzle128(at, piece);
      return reinterpret_cast<uint16_t*>(row_piece) + place % 8;
    };
  }

  static constexpr int kEarlyUnits = 16;

  const WeightGradArgs& args_;
  WeightGradShared<Tile>& shared_;
  const int lane_;
  const int first_row_;  // of the warp in a chunk
  const int num_items_;
  // Of lane l: where the units of task l end among the warp's, and the pair that unit 0 would begin
  // with if they were all of this task.
  int last_unit_, unit_pair_;
  int num_units_;
  BandPair pairs_[kEarlyUnits];
};

}  // namespace omni_moe::cuda::band_grad
