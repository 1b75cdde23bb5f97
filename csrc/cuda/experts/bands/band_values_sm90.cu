// Second product of the bands: for each tile of up to 128 tasks of one band
//   partial[task] = P · values[band],  P[task, place] = the coefficient of the task's pair there.
//
// A block lays out P once, 128 tasks by the whole band in shared memory (80 KB at L 320), and then
// streams the band's values through a ring, 64 experts by 256 elements a stage, for one 256-element
// piece of the outputs after the other. Its cluster's other block has 128 more tasks and loads half
// of every stage. A tile of 256 tasks reads 2 L H bytes of the table and writes 2 H for each task
// (L 320, H 1024: 0.66 and 0.5 MB) for 2 · 256 · L · H FLOP, 20,500 cycles of the tensor cores of
// two SMs. Memory bounds it: at 320 x 320, T 4096 and K 512 there are 430 MB of reads and 170 MB of
// writes, 230 µs at 2.6 TB/s; it takes 249 on an H100.
//
// Two warpgroups multiply (m64n256k16), 64 tasks each; a thread of a third starts TMA. Each warp
// lays out the rows of P for its own 16 tasks, whose lists it loads while it multiplies the tile
// before.
#include <algorithm>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/common/warp_scan.cuh"
#include "cuda/experts/bands/band_grid_sm90.cuh"
#include "cuda/experts/bands/band_layout.cuh"
#include "cuda/experts/bands/bands.h"
#include "cuda/hopper/mbarrier.cuh"
#include "cuda/hopper/stmatrix.cuh"
#include "cuda/hopper/wgmma.cuh"

namespace omni_moe::cuda {
namespace {

constexpr int kRows = kBandBlockTasks;
constexpr int kThreads = (kBandConsumers + 1) * 128;
constexpr int kConsumerRegisters = 216;
constexpr int kLoaderRegisters = 72;
constexpr int kBlockPlaces = 64;  // places in a row of a swizzled tile, and in a stage
constexpr int kPieceCols = 64;    // elements in a row of a swizzled tile
constexpr int kPieces = kWgmmaCols / kPieceCols;
constexpr int kPieceBytes64 = kBlockPlaces * kSwizzleRowBytes;

// Blocks of places that P holds at most, and stages beside it.
template <int kMaxBlocks, int kNumStages>
struct ValuesTile {
  static constexpr int kBlocks = kMaxBlocks;
  static constexpr int kStages = kNumStages;
};

template <class Tile>
struct ValuesShared {
  char coefficients[Tile::kBlocks][kRows * kSwizzleRowBytes];  // P
  char values[Tile::kStages][kPieces][kPieceBytes64];
  char outputs[kBandConsumerWarps][kBandWarpRows * kSwizzleRowBytes];
  uint64_t full[Tile::kStages];
  uint64_t empty[Tile::kStages];
};

struct ValuesArgs {
  BandTable values;
  BandPlan plan;
  const BandTask* tasks;
  const BandTile* tiles;
  const int* num_tiles;
  const BandPair* coefficients;
  char* partial;
  int hidden_size;
  int row_bytes;
  int num_col_pieces;  // ceil(H / 256)
};

__device__ __forceinline__ int num_blocks(const BandPlan& plan, int band) {
  return ceil_div(band_length(plan, band), kBlockPlaces);
}

// For one thread.
template <class Tile>
__device__ __forceinline__ void load_tiles(const ValuesArgs& args, ValuesShared<Tile>& shared,
                                           int num_tiles) {
  const int rank = cluster_rank();
  RingCursor<Tile::kStages> ring;
  for (int i = first_tile(); i < num_tiles; i += tile_step()) {
    const int band = args.tiles[i].band;
    const int blocks = num_blocks(args.plan, band);
    for (int col_piece = 0; col_piece < args.num_col_pieces; ++col_piece) {
      for (int block = 0; block < blocks; ++block, ring.advance()) {
        const int stage = ring.stage;
        uint64_t* full = &shared.full[stage];
        mbarrier_wait(&shared.empty[stage], ring.parity ^ 1);
        mbarrier_arrive_expect(full, kPieces * kPieceBytes64);
        constexpr int kLoadPieces = kPieces / kCluster;  // that one block loads
#pragma unroll
        for (int p = 0; p < kLoadPieces; ++p) {
          const int piece = rank * kLoadPieces + p;
          args.values.load(args.plan, band, block * kBlockPlaces,
                           col_piece * kWgmmaCols + piece * kPieceCols, shared.values[stage][piece],
                           full);
        }
      }
    }
  }
}

// Units of a warp's lists whose pairs are in registers when P is laid out. At 320 x 320 a warp has
// about 22 units with K 512 and 38 with K 4096.
constexpr int kEarlyUnits = 40;

template <class T, class Tile>
class ValuesConsumer {
 public:
  __device__ __forceinline__ ValuesConsumer(const ValuesArgs& args, ValuesShared<Tile>& shared)
      : args_(args),
        shared_(shared),
        lane_(threadIdx.x % kWarpSize),
        warp_(__shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0)),
        consumer_(warp_ / 4),
        rank_(cluster_rank()) {}

  __device__ __forceinline__ void run(int num_tiles) {
    int i = first_tile();
    if (i >= num_tiles) return;
    BandTile tile = args_.tiles[i];
    open_lists(tile);
    load_early();
    while (true) {
      const int next_i = i + tile_step();
      const bool has_next = next_i < num_tiles;
      const BandTile next = args_.tiles[has_next ? next_i : i];
      const int blocks = num_blocks(args_.plan, tile.band);
      const bool has_tasks = task_of_row(consumer_ * kWgmmaRows, rank_) < tile.num_tasks;
      if (has_tasks) {
        sync_warpgroup(consumer_);  // all its warps have multiplied with the P of the tile before
        lay_out(blocks);
        fence_async_proxy();
        sync_warpgroup(consumer_);
      }
      // The next tile's lists come while this one is multiplied.
      open_lists(next);
      for (int col_piece = 0; col_piece < args_.num_col_pieces; ++col_piece) {
        if (col_piece == args_.num_col_pieces - 1) load_early();
        if (has_tasks) {
          multiply(blocks);
          store(tile, col_piece * kWgmmaCols);
        } else {
          pass_stages(blocks);
        }
      }
      if (!has_next) return;
      tile = next;
      i = next_i;
    }
  }

 private:
  __device__ __forceinline__ void release(int stage) {
    release_stage(&shared_.empty[stage], lane_);
  }

  __device__ __forceinline__ uint16_t* cell(int row, int place) {
    char* block = shared_.coefficients[place / kBlockPlaces];
    return reinterpret_cast<uint16_t*>(
               block + swizzle128(warp_ * kBandWarpRows + row, place % kBlockPlaces / 8)) +
           place % 8;
  }

  // The ring's stages of a piece without tasks for this warpgroup.
  __device__ __forceinline__ void pass_stages(int blocks) {
    for (int k = 0; k < blocks; ++k, ring_.advance()) {
      mbarrier_wait(&shared_.full[ring_.stage], ring_.parity);
      release(ring_.stage);
    }
  }

  // Lane r takes the list of the warp's task r.
  __device__ __forceinline__ void open_lists(const BandTile& tile) {
    const int own_row = task_of_row(warp_ * kBandWarpRows + lane_ % kBandWarpRows, rank_);
    BandTask task{};
    if (lane_ < kBandWarpRows && own_row < tile.num_tasks) {
      task = args_.tasks[tile.first_task + own_row];
    }
    first_ = task.first;
    end_ = task.first + task.num_pairs;
    repeated_rows_ = __ballot_sync(kFullWarp, task.has_repeats);
  }

  // The lists in units of 32 pairs, and the first units' pairs.
  __device__ __forceinline__ void load_early() {
    const int units = (end_ - first_ + kWarpSize - 1) / kWarpSize;
    last_unit_ = static_cast<int>(warp_inclusive_scan(static_cast<unsigned>(units)));
    first_pair_ = first_ - (last_unit_ - units) * kWarpSize;
    num_units_ = __shfl_sync(kFullWarp, last_unit_, kWarpSize - 1);
#pragma unroll
    for (int u = 0; u < kEarlyUnits; ++u) {
      if (u < num_units_) early_[u] = load_pair(u);
    }
  }
  __device__ __forceinline__ int row_of(int unit) const {
    return __popc(__ballot_sync(kFullWarp, last_unit_ <= unit));
  }
  // Places end below kNoPair's; the lane has no pair in a list's last unit.
  __device__ __forceinline__ BandPair load_pair(int unit) const {
    const int row = row_of(unit);
    const int pair = __shfl_sync(kFullWarp, first_pair_, row) + unit * kWarpSize + lane_;
    const int end = __shfl_sync(kFullWarp, end_, row);
    return pair < end ? args_.coefficients[pair] : kNoPair;
  }

  __device__ __forceinline__ void lay_out_unit(int unit, BandPair pair) {
    const int row = row_of(unit);
    const bool is_alone = (repeated_rows_ >> row & 1) == 0;
    if (pair != kNoPair && is_alone) *cell(row, pair >> 16) = static_cast<uint16_t>(pair);
  }

  // P of the warp's tasks.
  __device__ __forceinline__ void lay_out(int blocks) {
    // 1. Zeros.
    constexpr int kRowBytes = kBandWarpRows * kSwizzleRowBytes;
    for (int block = 0; block < blocks; ++block) {
      char* rows = shared_.coefficients[block] + warp_ * kRowBytes;
#pragma unroll
      for (int byte = 0; byte < kRowBytes; byte += kWarpSize * 16) {
        *reinterpret_cast<uint4*>(rows + byte + lane_ * 16) = make_uint4(0, 0, 0, 0);
      }
    }
    __syncwarp();
    // 2. The coefficients.
#pragma unroll
    for (int u = 0; u < kEarlyUnits; ++u) {
      if (u < num_units_) lay_out_unit(u, early_[u]);
    }
    constexpr int kBatch = 8;
#pragma unroll 1
    for (int unit = kEarlyUnits; unit < num_units_; unit += kBatch) {
      BandPair pairs[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        pairs[u] = unit + u < num_units_ ? load_pair(unit + u) : kNoPair;
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (unit + u < num_units_) lay_out_unit(unit + u, pairs[u]);
      }
    }
    // 3. The rows in which pairs share places.
    if (repeated_rows_ != 0) add_up_places(repeated_rows_);
  }

  __device__ __forceinline__ void add_up_places(unsigned rows) {
    for (; rows != 0; rows &= rows - 1) {
      const int row = __ffs(rows) - 1;
      const int first = __shfl_sync(kFullWarp, first_, row);
      const int end = __shfl_sync(kFullWarp, end_, row);
      for (int at = first + lane_; at < end; at += kWarpSize) {
        float sum;
        if (!sum_at_place<T>(args_.coefficients, first, end, at, &sum)) continue;
        *reinterpret_cast<T*>(cell(row, args_.coefficients[at] >> 16)) = from_float<T>(sum);
      }
    }
  }

  // d_ = P · values of 256 elements. A stage goes back once the next one's products have been
  // issued: waiting for each stage's own products took 287 µs instead of 275.
  __device__ __forceinline__ void multiply(int blocks) {
    constexpr uint64_t kStepA = kWgmmaDepthStep<WgmmaMajor::kDepth, kWgmmaRows>;
    constexpr uint64_t kStepB = kWgmmaDepthStep<WgmmaMajor::kCols, kBlockPlaces>;
    int last_stage = 0;
    for (int block = 0; block < blocks; ++block, ring_.advance()) {
      const int stage = ring_.stage;
      mbarrier_wait(&shared_.full[stage], ring_.parity);
      const uint64_t a = wgmma_descriptor<WgmmaMajor::kDepth, kWgmmaRows>(
          shared_.coefficients[block] + consumer_ * kWgmmaRows * kSwizzleRowBytes);
      const uint64_t b = wgmma_descriptor<WgmmaMajor::kCols, kBlockPlaces>(shared_.values[stage]);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kBlockPlaces / kWgmmaDepth; ++step) {
        wgmma<T, WgmmaMajor::kCols>(d_, a + step * kStepA, b + step * kStepB,
                                    block > 0 || step > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (block > 0) release(last_stage);
      last_stage = stage;
    }
    wgmma_wait<0>();
    wgmma_use(d_);
    release(last_stage);
  }

  // Writes the warp's 16 rows by 256 elements of the partial outputs, 128 bytes of a row at once.
  __device__ __forceinline__ void store(const BandTile& tile, int col) {
    char* outputs = shared_.outputs[warp_];
    const int first_row = task_of_row(warp_ * kBandWarpRows, rank_);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      __syncwarp();
      store_rows(outputs,
                 [&](int i) { return pack_pair(d_[piece * 32 + i], d_[piece * 32 + i + 1], T()); });
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = i * 4 + lane_ / 8;
        const int at = col + piece * kPieceCols + lane_ % 8 * 8;
        using Words = Vec<T, kVecWidth<T>>;
        const Words words = load_shared_vec<Words>(outputs + swizzle128(row, lane_ % 8));
        if (first_row + row < tile.num_tasks && at < args_.hidden_size) {
          const int64_t task = tile.first_task + first_row + row;
          store_vec(args_.partial + task * args_.row_bytes + at * int{sizeof(T)}, words);
        }
      }
    }
  }

  const ValuesArgs& args_;
  ValuesShared<Tile>& shared_;
  const int lane_;
  const int warp_;
  const int consumer_;
  const int rank_;
  RingCursor<Tile::kStages> ring_;
  float d_[kWgmmaRegisters];
  // Of lane r: the list of the warp's task r, where its units end among the warp's, and the pair at
  // which unit u of all is: first_pair_ + 32 u.
  int first_, end_, last_unit_, first_pair_;
  int num_units_;
  unsigned repeated_rows_;  // a bit for each row in which pairs share places
  BandPair early_[kEarlyUnits];
};

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, 1)
    band_values_kernel(const __grid_constant__ ValuesArgs args) {
  if (!kHasHopperInstructions) {
    __trap();
    return;
  }
  extern __shared__ char dynamic_shared[];
  const uint32_t misaligned = shared_address(dynamic_shared) % kSwizzleAlignment;
  auto& shared = *reinterpret_cast<ValuesShared<Tile>*>(
      dynamic_shared + (kSwizzleAlignment - misaligned) % kSwizzleAlignment);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(&shared.full[stage], 1);
      mbarrier_init(&shared.empty[stage], kBandConsumerWarps * kCluster);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  cluster_sync();  // the barriers of both blocks stand
  const int num_tiles = *args.num_tiles;
  if (threadIdx.x < kBandConsumers * 128) {
    take_registers<kConsumerRegisters>();
    ValuesConsumer<T, Tile>(args, shared).run(num_tiles);
  } else {
    give_registers<kLoaderRegisters>();
    if (threadIdx.x == kBandConsumers * 128) load_tiles<Tile>(args, shared, num_tiles);
  }
  // Shared memory stays until the other block has sent its last copies and arrivals.
  __syncwarp();
  cluster_sync();
}

template <class T, class Tile>
cudaError_t launch_values(const BandShape& shape, const void* values, int64_t hidden_size,
                          const BandWorkspace& workspace, const DeviceInfo& device,
                          cudaStream_t stream) {
  constexpr size_t kSharedBytes = sizeof(ValuesShared<Tile>) + kSwizzleAlignment;
  static_assert(kSharedBytes <= 232448, "more shared memory than a block gets");
  ValuesArgs args{};
  args.plan = shape.plan;
  args.tasks = workspace.tasks;
  args.tiles = workspace.tiles;
  args.num_tiles = workspace.num_tiles;
  args.coefficients = workspace.coefficients;
  args.partial = static_cast<char*>(workspace.partial);
  args.hidden_size = static_cast<int>(hidden_size);
  args.row_bytes = static_cast<int>(hidden_size * sizeof(T));
  args.num_col_pieces = static_cast<int>(ceil_div<int64_t>(hidden_size, kWgmmaCols));
  const auto kernel = band_values_kernel<T, Tile>;
  const int64_t clusters = std::min<int64_t>(device.num_sms / kCluster, shape.max_tiles());
  return run_steps(
      [&] { return allow_shared_memory(kernel, kSharedBytes); },
      [&] {
        return encode_band_table<T>(values, shape.plan, hidden_size, kBlockPlaces, &args.values);
      },
      [&] {
        LaunchOptions options{dim3(static_cast<unsigned>(clusters * kCluster)), kThreads};
        options.shared_bytes = kSharedBytes;
        options.cluster_blocks = kCluster;
        return launch_kernel(kernel, options, stream, args);
      });
}

}  // namespace

template <class T>
cudaError_t band_values(const BandShape& shape, const void* values, int64_t hidden_size,
                        const BandWorkspace& workspace, const DeviceInfo& device,
                        cudaStream_t stream) {
  const int length = std::max(shape.plan.num_rows, shape.plan.num_cols);
  if (length <= 320) {
    return launch_values<T, ValuesTile<5, 4>>(shape, values, hidden_size, workspace, device,
                                              stream);
  }
  return launch_values<T, ValuesTile<8, 2>>(shape, values, hidden_size, workspace, device, stream);
}

template cudaError_t band_values<__half>(const BandShape&, const void*, int64_t,
                                         const BandWorkspace&, const DeviceInfo&, cudaStream_t);
template cudaError_t band_values<__nv_bfloat16>(const BandShape&, const void*, int64_t,
                                                const BandWorkspace&, const DeviceInfo&,
                                                cudaStream_t);

}  // namespace omni_moe::cuda
