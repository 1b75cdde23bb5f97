// Second product of the bands: for each tile of up to 128 tasks of one band
//   partial[task] = P · values[band],  P[task, place] = the coefficient of the task's pair there.
//
// A block lays out P once, 128 tasks by the whole band in shared memory (80 KB at L 320), and then
// streams the band's values through a ring, 64 experts by 256 elements a stage, for one 256-element
// piece of the outputs after the other. A tile reads 2 L H bytes of the table and writes 2 H for
// each task (L 320, H 1024: 0.66 and 0.26 MB) for 2 · 128 · L · H FLOP, 20,500 cycles of an SM's
// tensor cores: 32 and 13 bytes a cycle. At 320 x 320, T 4096 and K 512 it is memory that bounds
// it: 420 MB of table and 164 MB of outputs are 195 µs at 3 TB/s.
//
// Two warpgroups multiply (m64n256k16), 64 tasks each; a thread of a third starts TMA. Each warp
// lays out the rows of P for its own 16 tasks. A token may have chosen an expert more than once:
// where two pairs of a task meet in one place, the row is laid out again with their sums.
#include <algorithm>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/experts/bands/band_grid_sm90.cuh"
#include "cuda/experts/bands/bands.h"
#include "cuda/hopper/mbarrier.cuh"
#include "cuda/hopper/stmatrix.cuh"
#include "cuda/hopper/wgmma.cuh"

namespace omni_moe::cuda {
namespace {

constexpr int kTileTasks = BandTuning::kTileTasks;
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
  char coefficients[Tile::kBlocks][kTileTasks * kSwizzleRowBytes];  // P
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
  RingCursor<Tile::kStages> ring;
  for (int i = blockIdx.x; i < num_tiles; i += gridDim.x) {
    const int band = args.tiles[i].band;
    const int blocks = num_blocks(args.plan, band);
    for (int col_piece = 0; col_piece < args.num_col_pieces; ++col_piece) {
      for (int block = 0; block < blocks; ++block, ring.advance()) {
        const int stage = ring.stage;
        uint64_t* full = &shared.full[stage];
        mbarrier_wait(&shared.empty[stage], ring.parity ^ 1);
        mbarrier_arrive_expect(full, kPieces * kPieceBytes64);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          args.values.load(args.plan, band, block * kBlockPlaces,
                           col_piece * kWgmmaCols + piece * kPieceCols, shared.values[stage][piece],
                           full);
        }
      }
    }
  }
}

// Two warpgroups' barriers; barrier 0 is __syncthreads'.
__device__ __forceinline__ void sync_warpgroup(int consumer) {
  if (consumer == 0) {
    asm volatile("bar.sync 1, 128;" ::: "memory");
  } else {
    asm volatile("bar.sync 2, 128;" ::: "memory");
  }
}

template <class T, class Tile>
class ValuesConsumer {
 public:
  __device__ __forceinline__ ValuesConsumer(const ValuesArgs& args, ValuesShared<Tile>& shared)
      : args_(args),
        shared_(shared),
        lane_(threadIdx.x % kWarpSize),
        warp_(__shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0)),
        consumer_(warp_ / 4) {}

  __device__ __forceinline__ void run(int num_tiles) {
    for (int i = blockIdx.x; i < num_tiles; i += gridDim.x) {
      const BandTile tile = args_.tiles[i];
      const int blocks = num_blocks(args_.plan, tile.band);
      if (consumer_ * kWgmmaRows >= tile.num_tasks) {
        for (int k = 0; k < args_.num_col_pieces * blocks; ++k, ring_.advance()) {
          mbarrier_wait(&shared_.full[ring_.stage], ring_.parity);
          release(ring_.stage);
        }
        continue;
      }
      sync_warpgroup(consumer_);  // all its warps have multiplied with the P of the tile before
      lay_out(tile, blocks);
      fence_async_proxy();
      sync_warpgroup(consumer_);
      for (int col_piece = 0; col_piece < args_.num_col_pieces; ++col_piece) {
        multiply(blocks);
        store(tile, col_piece * kWgmmaCols);
      }
    }
  }

 private:
  __device__ __forceinline__ void release(int stage) {
    if (lane_ == 0) mbarrier_arrive(&shared_.empty[stage]);
  }

  __device__ __forceinline__ uint16_t* cell(int row, int place) {
    char* block = shared_.coefficients[place / kBlockPlaces];
    return reinterpret_cast<uint16_t*>(
               block + swizzle128(warp_ * kBandWarpRows + row, place % kBlockPlaces / 8)) +
           place % 8;
  }

  // Calls body(row, at, list, pair) for the pairs of the warp's tasks, 32 pairs of 4 lists at a
  // time.
  struct List {
    int first;
    int count;
  };
  template <class Body>
  __device__ __forceinline__ void for_each_pair(Body&& body) {
    constexpr int kLists = 4;
#pragma unroll 1
    for (int row = 0; row < kBandWarpRows; row += kLists) {
      List lists[kLists];
      int longest = 0;
#pragma unroll
      for (int i = 0; i < kLists; ++i) {
        lists[i] = {__shfl_sync(kFullWarp, first_, row + i),
                    __shfl_sync(kFullWarp, count_, row + i)};
        longest = max(longest, lists[i].count);
      }
#pragma unroll 1
      for (int base = 0; base < longest; base += kWarpSize) {
        const int at = base + lane_;
        BandPair pairs[kLists];
#pragma unroll
        for (int i = 0; i < kLists; ++i) {
          pairs[i] = at < lists[i].count ? args_.coefficients[lists[i].first + at] : 0;
        }
#pragma unroll
        for (int i = 0; i < kLists; ++i) {
          if (at < lists[i].count) body(row + i, at, pairs[i]);
        }
      }
    }
  }

  // P of the warp's tasks.
  __device__ __forceinline__ void lay_out(const BandTile& tile, int blocks) {
    // 1. Zeros; lane r takes the list of task r.
    const int own_row = warp_ * kBandWarpRows + lane_;
    first_ = count_ = 0;
    if (lane_ < kBandWarpRows && own_row < tile.num_tasks) {
      const BandTask task = args_.tasks[tile.first_task + own_row];
      first_ = task.first;
      count_ = task.num_pairs;
    }
    constexpr int kRowBytes = kBandWarpRows * kSwizzleRowBytes;
    for (int block = 0; block < blocks; ++block) {
      char* rows = shared_.coefficients[block] + warp_ * kRowBytes;
#pragma unroll
      for (int byte = 0; byte < kRowBytes; byte += kWarpSize * 16) {
        *reinterpret_cast<uint4*>(rows + byte + lane_ * 16) = make_uint4(0, 0, 0, 0);
      }
    }
    __syncwarp();
    // 2. Each pair marks its place. A pair that does not find its mark again shares its place.
    for_each_pair([&](int row, int at, BandPair pair) {
      *cell(row, pair >> 16) = static_cast<uint16_t>(at);
    });
    __syncwarp();
    unsigned shared_rows = 0;
    for_each_pair([&](int row, int at, BandPair pair) {
      if (*cell(row, pair >> 16) != at) shared_rows |= 1u << row;
    });
    shared_rows = __reduce_or_sync(kFullWarp, shared_rows);
    // 3. The coefficients.
    for_each_pair(
        [&](int row, int, BandPair pair) { *cell(row, pair >> 16) = static_cast<uint16_t>(pair); });
    if (shared_rows != 0) add_up_places(shared_rows);
  }

  // For rows in which pairs share places: in order of k, whatever the order of the stores above.
  __device__ __forceinline__ void add_up_places(unsigned rows) {
    __syncwarp();
    for (; rows != 0; rows &= rows - 1) {
      const int row = __ffs(rows) - 1;
      const int count = __shfl_sync(kFullWarp, count_, row);
      const BandPair* list = args_.coefficients + __shfl_sync(kFullWarp, first_, row);
      for (int at = lane_; at < count; at += kWarpSize) {
        const int place = list[at] >> 16;
        float sum = 0.0f;
        for (int other = 0; other < count; ++other) {
          const BandPair pair = list[other];
          if (static_cast<int>(pair >> 16) == place) sum += coefficient(pair);
        }
        *reinterpret_cast<T*>(cell(row, place)) = from_float<T>(sum);
      }
    }
  }

  static __device__ __forceinline__ float coefficient(BandPair pair) {
    const auto bits = static_cast<uint16_t>(pair);
    return to_float(reinterpret_cast<const T&>(bits));
  }

  // d_ = P · values of 256 elements.
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
    const int first_row = warp_ * kBandWarpRows;
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
  int first_;
  int count_;
  RingCursor<Tile::kStages> ring_;
  float d_[kWgmmaRegisters];
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
      mbarrier_init(&shared.empty[stage], kBandConsumerWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  const int num_tiles = *args.num_tiles;
  if (threadIdx.x < kBandConsumers * 128) {
    take_registers<kConsumerRegisters>();
    ValuesConsumer<T, Tile>(args, shared).run(num_tiles);
  } else {
    give_registers<kLoaderRegisters>();
    if (threadIdx.x == kBandConsumers * 128) load_tiles<Tile>(args, shared, num_tiles);
  }
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
  const int64_t blocks = std::min<int64_t>(device.num_sms, shape.max_tiles());
  return run_steps(
      [&] { return allow_shared_memory(kernel, kSharedBytes); },
      [&] {
        return encode_band_table<T>(values, shape.plan, hidden_size, kBlockPlaces, &args.values);
      },
      [&] {
        return launch_kernel(kernel, {dim3(static_cast<unsigned>(blocks)), kThreads, kSharedBytes},
                             stream, args);
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
