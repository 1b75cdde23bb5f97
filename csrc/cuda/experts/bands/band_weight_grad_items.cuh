// What the gradients of the tables by bands are cut into (band_weight_grad_sm90.cu): the shared
// memory of a block, the items it sums, and the warpgroup that fills its ring with the tokens' rows
// and their coefficients.
#pragma once

#include <algorithm>

#include "cuda/common/cp_async.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/experts/bands/band_grid_sm90.cuh"
#include "cuda/experts/bands/band_layout.cuh"
#include "cuda/experts/bands/bands.h"
#include "cuda/hopper/mbarrier.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/hopper/wgmma.cuh"

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
  const BandCell* cells;
};

struct WeightGradArgs {
  WeightGradTable tables[2];
  BandPlan plan;
  const BandGroups* groups;
  const int* group_tokens;
  const int* group_first;
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

// ---- Loading warpgroup --------------------------------------------------------------------------

// A chunk's tasks are those of the four warps, a group each: a warp without tasks has nothing to
// do. Lane l knows the token of the warp's task l.
inline constexpr int kGroupTasks = BandTuning::kGroupTasks;
static_assert(kLoaderThreads / kWarpSize * kGroupTasks == kChunkTasks);
static_assert(kGroupTasks == kWgmmaDepth);

template <class Tile>
class WeightGradLoader {
 public:
  __device__ __forceinline__ WeightGradLoader(const WeightGradArgs& args,
                                              WeightGradShared<Tile>& shared)
      : args_(args),
        shared_(shared),
        lane_(threadIdx.x % kWarpSize),
        first_row_((threadIdx.x - kConsumers * 128) / kWarpSize * kGroupTasks),
        num_items_(num_items(args)),
        next_index_(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {}

  __device__ __forceinline__ void run() {
    RingCursor<Tile::kStages> ring;
    bool has_next = advance();
    load_cells();
    while (has_next) {
      const WeightGradItem item = next_;
      const Group group = next_group_;
      has_next = advance();
      mbarrier_wait(&shared_.empty[ring.stage], ring.parity ^ 1);
      if (group.exists) {
        copy_rows(item, group.token, ring.stage);
        lay_out(item, group, ring.stage);
      }
      load_cells();
      // Copies are complete for the tensor cores once the thread that started them has waited,
      // fenced and arrived. They have come while P was laid out.
      cp_async_wait<0>();
      fence_async_proxy();
      mbarrier_arrive(&shared_.full[ring.stage]);
      ring.advance();
    }
  }

 private:
  // The warp's part of a chunk.
  struct Group {
    bool exists;
    int token;       // of the lane's task, or -1
    int first, end;  // of its cells
  };

  // Goes to the next chunk, whose group is on its way then; false behind the last.
  __device__ __forceinline__ bool advance() {
    next_first_ += kChunkTasks;
    next_group_ = {false, -1, 0, 0};
    while (next_first_ >= next_tasks_) {
      next_index_ += static_cast<int>(gridDim.x);
      if (next_index_ >= num_items_) return false;
      next_ = item_at<Tile>(args_, next_index_);
      const BandGroups groups = args_.groups[next_.band];
      next_tasks_ = groups.num_tasks;
      next_band_group_ = groups.first_group;
      next_first_ = 0;
    }
    const int row = next_first_ + first_row_;
    if (row >= next_tasks_) return true;
    const int group = next_band_group_ + row / kGroupTasks;
    next_group_.exists = true;
    if (lane_ < kGroupTasks) {
      next_group_.token = args_.group_tokens[group * kGroupTasks + lane_];
    }
    next_group_.first = args_.group_first[group];
    next_group_.end = args_.group_first[group + 1];
    return true;
  }

  // Sixteen lanes copy the 256 bytes that a stage takes of a row.
  __device__ __forceinline__ void copy_rows(const WeightGradItem& item, int own_token,
                                            int stage) const {
    constexpr int kRowLanes = kSlab * 2 / 16;
    constexpr int kRowsAtOnce = kWarpSize / kRowLanes;
    const char* states = args_.tables[item.table].states;
    const int piece = lane_ % kRowLanes;
    const int byte = item.slab * kSlab * 2 + piece * 16;
    const bool in_row = byte < args_.row_bytes;
    char* tile = shared_.states[stage][piece / 8];
#pragma unroll
    for (int i = 0; i < kGroupTasks / kRowsAtOnce; ++i) {
      const int row = i * kRowsAtOnce + lane_ / kRowLanes;
      const int token = __shfl_sync(kFullWarp, own_token, row);
      // Rows without a task become zeros, since P's zeros would not hide a NaN.
      const bool exists = in_row && token >= 0;
      const char* from = states + static_cast<int64_t>(token) * args_.row_bytes + byte;
      cp_async_16(tile + swizzle128(first_row_ + row, piece % 8), exists ? from : states, exists);
    }
    cp_async_commit();
  }

  // The next group's first cells, a stage before they are laid out.
  __device__ __forceinline__ void load_cells() {
    const BandCell* cells = args_.tables[next_.table].cells;
#pragma unroll
    for (int i = 0; i < kEarlyCells; ++i) {
      const int at = next_group_.first + i * kWarpSize + lane_;
      early_[i] = at < next_group_.end ? cells[at] : kNoCell;
    }
  }

  // P of the group.
  __device__ __forceinline__ void lay_out(const WeightGradItem& item, const Group& group,
                                          int stage) {
    // 1. Zeros.
    constexpr int kRowBytes = kGroupTasks * kSwizzleRowBytes;
    char* rows = shared_.coefficients[stage][0] + first_row_ * kSwizzleRowBytes;
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block) {
#pragma unroll
      for (int byte = 0; byte < kRowBytes; byte += kWarpSize * 16) {
        *reinterpret_cast<uint4*>(rows + block * kTileBytes + byte + lane_ * 16) =
            make_uint4(0, 0, 0, 0);
      }
    }
    __syncwarp();
    // 2. The cells. Those of other pieces of the band are past the end of this one.
    constexpr unsigned kCells = Tile::kBlocks * kTileBytes / 2;
    auto* to = reinterpret_cast<uint16_t*>(rows);
    const unsigned first_cell = item.first_place / kBlockPlaces * (kTileBytes / 2);
    const auto store = [&](BandCell cell) {
      const unsigned index = (cell >> 16) - first_cell;
      if (index < kCells) to[index] = static_cast<uint16_t>(cell);
    };
#pragma unroll
    for (int i = 0; i < kEarlyCells; ++i) store(early_[i]);
    const BandCell* cells = args_.tables[item.table].cells;
    constexpr int kBatch = 8;
#pragma unroll 1
    for (int first = group.first + kEarlyCells * kWarpSize; first < group.end;
         first += kBatch * kWarpSize) {
      BandCell batch[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = first + i * kWarpSize + lane_;
        batch[i] = at < group.end ? cells[at] : kNoCell;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) store(batch[i]);
    }
  }

  static constexpr int kEarlyCells = 16;  // a lane's

  const WeightGradArgs& args_;
  WeightGradShared<Tile>& shared_;
  const int lane_;
  const int first_row_;  // of the warp in a chunk
  const int num_items_;
  // The chunk after the one that is laid out.
  int next_index_;  // of its item
  WeightGradItem next_{};
  int next_band_group_ = 0;
  int next_tasks_ = 0;  // of its band
  int next_first_ = 0;
  Group next_group_{};
  BandCell early_[kEarlyCells];  // of its group
};

}  // namespace omni_moe::cuda::band_grad
