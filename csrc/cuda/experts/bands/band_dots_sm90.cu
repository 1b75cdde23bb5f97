// First product of the bands: for each tile of up to 128 tasks of one band
//   S = query[tokens of the tasks] · keys[band]ᵀ,
// of which the dot products of the tasks' own pairs are kept: dots[pair] = S[task, place].
//
// A tile of 256 tasks reads 2 H bytes for each of them, out of L2, and 2 H for each expert of the
// band, and multiplies 2 · 256 · L · H FLOP (L 320, H 1024: 0.5 and 0.66 MB, and 20,500 cycles of
// the tensor cores of two SMs). It is memory that bounds it: at 320 x 320 a table read for rows and
// once more for columns is 420 MB, 170 µs at the 2.5 TB/s that TMA streams bands of it on an H100
// (rows 2.55, columns 2.2 to 2.4 TB/s, whatever the order of the boxes). With tiles of one block,
// 128 tasks, 650 MB came from memory, because blocks with the same band drift apart; a cluster
// keeps together and reads 490, lists and tokens included.
//
// Two warpgroups of each block multiply, 64 tasks each by the whole band (m64n160k16, twice, at
// L 320). A third fills the ring: it gathers the tokens' rows by 16-byte copies, and one of its
// threads starts TMA for the block's half of the experts. S goes through shared memory by columns,
// kChunk of them at a time and each warp with its own 16 tasks, whose lists it then walks for the
// places of the chunk.
#include <algorithm>

#include "cuda/common/check.h"
#include "cuda/common/cp_async.cuh"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/warp_scan.cuh"
#include "cuda/experts/bands/band_grid_sm90.cuh"
#include "cuda/experts/bands/bands.h"
#include "cuda/hopper/mbarrier.cuh"
#include "cuda/hopper/wgmma.cuh"

namespace omni_moe::cuda {
namespace {

constexpr int kDepth = 64;  // elements of a row in one stage
constexpr int kRows = kBandBlockTasks;
constexpr int kLoaderThreads = 128;
constexpr int kThreads = kBandConsumers * 128 + kLoaderThreads;
constexpr int kConsumerRegisters = 224;
constexpr int kLoaderRegisters = 56;
static_assert(kBandConsumers * kConsumerRegisters + kLoaderRegisters <= 3 * 168);

// The experts of a band that a tile multiplies: kParts instructions of kCols columns each.
template <int kColsOfPart, int kNumParts, int kNumStages>
struct DotsTile {
  static constexpr int kCols = kColsOfPart;
  static constexpr int kParts = kNumParts;
  static constexpr int kPlaces = kCols * kParts;
  static constexpr int kLoadPlaces = kPlaces / kCluster;  // that one block loads
  static constexpr int kStages = kNumStages;
  static constexpr int kChunk = kCols == 160 ? 80 : 64;
  static constexpr int kChunks = kCols / kChunk;
  // Rows of S in shared memory are 8 floats more than they hold: the eight rows that a warp writes
  // at once then lie in different banks.
  static constexpr int kStride = kChunk + 8;
  static constexpr int kKeyBytes = kPlaces * kSwizzleRowBytes;
};

template <class Tile>
struct DotsShared {
  char queries[Tile::kStages][kRows * kSwizzleRowBytes];
  char keys[Tile::kStages][Tile::kKeyBytes];
  float products[kBandConsumerWarps][kBandWarpRows][Tile::kStride];
  uint64_t full[Tile::kStages];   // its rows and experts have landed
  uint64_t empty[Tile::kStages];  // the multiplying warps have read it
};

struct DotsArgs {
  BandTable keys;
  BandPlan plan;
  const char* queries;
  const BandTask* tasks;
  const BandTile* tiles;
  const int* num_tiles;
  const uint16_t* places;
  float* dots;
  int num_pairs;  // T * K
  int row_bytes;
  int num_stages;  // of a tile: ceil(H / 64)
};

template <class Tile>
__device__ __forceinline__ int num_pieces(const BandPlan& plan, int band) {
  return ceil_div(band_length(plan, band), Tile::kPlaces);
}

// ---- Loading warpgroup --------------------------------------------------------------------------

// Eight threads copy the 128 bytes that a stage takes of a row; a thread has every 16th row.
constexpr int kRowThreads = kSwizzleRowBytes / 16;
constexpr int kRowsPerThread = kRows * kRowThreads / kLoaderThreads;

template <class Tile>
__device__ __forceinline__ void load_tiles(const DotsArgs& args, DotsShared<Tile>& shared,
                                           int num_tiles) {
  const int thread = threadIdx.x - kBandConsumers * 128;
  const int rank = cluster_rank();
  const int piece = thread % kRowThreads;
  const int first_row = thread / kRowThreads;
  constexpr int kRowStep = kLoaderThreads / kRowThreads;
  RingCursor<Tile::kStages> ring;
  int copying = -1;  // the stage whose copies may still be under way

  // Copies into a stage are complete for the tensor cores once the thread that started them has
  // waited, fenced and arrived.
  const auto finish_copies = [&] {
    fence_async_proxy();
    mbarrier_arrive(&shared.full[copying]);
  };
  for (int i = first_tile(); i < num_tiles; i += tile_step()) {
    const BandTile tile = args.tiles[i];
    int tokens[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int row = task_of_row(first_row + r * kRowStep, rank);
      tokens[r] = row < tile.num_tasks ? args.tasks[tile.first_task + row].token : -1;
    }
    if (copying >= 0) {
      cp_async_wait<0>();
      finish_copies();
      copying = -1;
    }
    for (int part = 0; part < num_pieces<Tile>(args.plan, tile.band); ++part) {
      for (int k = 0; k < args.num_stages; ++k, ring.advance()) {
        const int stage = ring.stage;
        mbarrier_wait(&shared.empty[stage], ring.parity ^ 1);
        if (thread == 0) {
          uint64_t* full = &shared.full[stage];
          mbarrier_arrive_expect(full, Tile::kKeyBytes);
          const int place = rank * Tile::kLoadPlaces;
          args.keys.load(args.plan, tile.band, part * Tile::kPlaces + place, k * kDepth,
                         shared.keys[stage] + place * kSwizzleRowBytes, full);
        }
        const int byte = k * kSwizzleRowBytes + piece * 16;
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
          // Rows without a task keep what they hold: each row of S depends on its own row only.
          if (tokens[r] < 0) continue;
          const bool exists = byte < args.row_bytes;
          const char* from = args.queries + static_cast<int64_t>(tokens[r]) * args.row_bytes;
          cp_async_16(shared.queries[stage] + swizzle128(first_row + r * kRowStep, piece),
                      from + (exists ? byte : 0), exists);
        }
        cp_async_commit();
        if (copying >= 0) {
          cp_async_wait<1>();
          finish_copies();
        }
        copying = stage;
      }
    }
  }
  if (copying >= 0) {
    cp_async_wait<0>();
    finish_copies();
  }
}

// ---- Multiplying warpgroups ---------------------------------------------------------------------

// Lists of a warp's 16 tasks, in units of 64 pairs of one list: a lane takes two places that follow
// each other, from an even pair on.
constexpr int kUnitPairs = 2 * kWarpSize;
// Units go in groups, whose loads and stores overlap. A lane loads so many groups before it
// multiplies, for the wait for them was a third of the kernel's time; at 320 x 320 and K 512 a warp
// has about 18 units, at K 4096 about 26.
constexpr int kGroupUnits = 6;
constexpr int kGroups = 3;
constexpr uint32_t kNoPlace = 0xffff;

template <class T, class Tile>
class DotsConsumer {
 public:
  __device__ __forceinline__ DotsConsumer(const DotsArgs& args, DotsShared<Tile>& shared)
      : args_(args),
        shared_(shared),
        lane_(threadIdx.x % kWarpSize),
        warp_(__shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0)),
        consumer_(warp_ / 4) {}

  __device__ __forceinline__ void run(int num_tiles) {
    int i = first_tile();
    if (i >= num_tiles) return;
    const int rank = cluster_rank();
    const int first_task = task_of_row(warp_ * kBandWarpRows, rank);
    BandTile tile = args_.tiles[i];
    BandTask task = load_task(tile, first_task);
    while (true) {
      // The tile after this one and its tasks come while this one is multiplied.
      const int next_i = i + tile_step();
      const bool has_next = next_i < num_tiles;
      const BandTile next = args_.tiles[has_next ? next_i : i];
      const bool has_tasks = task_of_row(consumer_ * kWgmmaRows, rank) < tile.num_tasks;
      if (has_tasks) open_lists(task);
      const int pieces = num_pieces<Tile>(args_.plan, tile.band);
      for (int piece = 0; piece < pieces; ++piece) {
        if (has_tasks) {
          multiply();
        } else {
          pass_stages();
        }
        if (piece == pieces - 1) task = load_task(next, first_task);
        if (has_tasks) keep_pairs(piece * Tile::kPlaces);
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

  // The ring's stages of a tile without tasks for this warpgroup.
  __device__ __forceinline__ void pass_stages() {
    for (int k = 0; k < args_.num_stages; ++k, ring_.advance()) {
      mbarrier_wait(&shared_.full[ring_.stage], ring_.parity);
      release(ring_.stage);
    }
  }

  // d_ = S of 64 tasks. A stage goes back as soon as it is multiplied, not behind the wait for the
  // next one: memory bounds this kernel, so that the stages on their way matter more than a gap
  // between two products, which the other warpgroup fills.
  __device__ __forceinline__ void multiply() {
    constexpr uint64_t kStep = kWgmmaDepthStep<WgmmaMajor::kDepth, kWgmmaRows>;
    for (int k = 0; k < args_.num_stages; ++k, ring_.advance()) {
      const int stage = ring_.stage;
      mbarrier_wait(&shared_.full[stage], ring_.parity);
      const uint64_t a = wgmma_descriptor<WgmmaMajor::kDepth, kWgmmaRows>(
          shared_.queries[stage] + consumer_ * kWgmmaRows * kSwizzleRowBytes);
      const uint64_t b = wgmma_descriptor<WgmmaMajor::kDepth, kWgmmaRows>(shared_.keys[stage]);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kDepth / kWgmmaDepth; ++step) {
#pragma unroll
        for (int p = 0; p < Tile::kParts; ++p) {
          constexpr uint64_t kPart = Tile::kCols * kSwizzleRowBytes >> 4;
          wgmma<T>(d_[p], a + step * kStep, b + p * kPart + step * kStep, k > 0 || step > 0);
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
      release(stage);
    }
#pragma unroll
    for (int p = 0; p < Tile::kParts; ++p) wgmma_use(d_[p]);
  }

  // Lane r gets the warp's task r.
  __device__ __forceinline__ BandTask load_task(const BandTile& tile, int first_task) const {
    const bool exists = lane_ < kBandWarpRows && first_task + lane_ < tile.num_tasks;
    return exists ? args_.tasks[tile.first_task + first_task + lane_] : BandTask{};
  }

  // The tasks' lists, of which every lane loads its places of the first units.
  __device__ __forceinline__ void open_lists(const BandTask& task) {
    begin_ = task.first;
    end_ = task.first + task.num_pairs;
    const int even = begin_ & ~1;
    const int units = (end_ - even + kUnitPairs - 1) / kUnitPairs;
    last_unit_ = static_cast<int>(warp_inclusive_scan(static_cast<unsigned>(units)));
    first_pair_ = even - (last_unit_ - units) * kUnitPairs;
    num_units_ = __shfl_sync(kFullWarp, last_unit_, kWarpSize - 1);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int u = 0; u < kGroupUnits; ++u) {
        places_[group][u] = load_places(group * kGroupUnits + u);
      }
    }
  }

  __device__ __forceinline__ int row_of(int unit) const {
    return __popc(__ballot_sync(kFullWarp, last_unit_ <= unit));
  }
  // The first of the lane's two pairs in the list of all tokens; the list's last one may be the
  // other.
  __device__ __forceinline__ int pair_of(int unit, int row) const {
    return __shfl_sync(kFullWarp, first_pair_, row) + unit * kUnitPairs + 2 * lane_;
  }
  __device__ __forceinline__ uint32_t load_places(int unit) const {
    const int pair = pair_of(unit, row_of(unit));
    const bool exists = unit < num_units_ && pair < args_.num_pairs;
    return exists ? *reinterpret_cast<const uint32_t*>(args_.places + pair) : ~0u;
  }
  // With kNoPlace instead of what belongs to other lists.
  __device__ __forceinline__ uint32_t own_places(uint32_t places, int pair, int row) const {
    const int begin = __shfl_sync(kFullWarp, begin_, row);
    const int end = __shfl_sync(kFullWarp, end_, row);
    if (pair < begin || pair >= end) places |= kNoPlace;
    if (pair + 1 < begin || pair + 1 >= end) places |= kNoPlace << 16;
    return places;
  }

  // Stores what the chunk's rows have at the places of kCount units from `first` on.
  template <int kCount>
  __device__ __forceinline__ void store_units(const float (*products)[Tile::kStride], int begin,
                                              int first, const uint32_t (&places)[kCount]) {
    float dots[kCount][2];
    bool has[kCount][2];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const float* row = products[row_of(first + u)];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t place = half == 0 ? places[u] & 0xffff : places[u] >> 16;
        const unsigned at = place - static_cast<unsigned>(begin);
        has[u][half] = at < static_cast<unsigned>(Tile::kChunk);
        if (has[u][half]) dots[u][half] = row[at];
      }
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      float* to = args_.dots + pair_of(first + u, row_of(first + u));
      if (has[u][0]) to[0] = dots[u][0];
      if (has[u][1]) to[1] = dots[u][1];
    }
  }

  // Writes the dot products of the warp's pairs, from the piece's places on. S goes through shared
  // memory chunk by chunk.
  __device__ __forceinline__ void keep_pairs(int first_place) {
    float(*products)[Tile::kStride] = shared_.products[warp_];
#pragma unroll
    for (int p = 0; p < Tile::kParts; ++p) {
#pragma unroll
      for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
        const int begin = first_place + p * Tile::kCols + chunk * Tile::kChunk;
        __syncwarp();  // all lanes have read the chunk before
#pragma unroll
        for (int j = 0; j < Tile::kChunk / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int at = (chunk * Tile::kChunk / 8 + j) * 4 + i * 2;
            *reinterpret_cast<float2*>(&products[lane_ / 4 + i * 8][j * 8 + lane_ % 4 * 2]) =
                make_float2(d_[p][at], d_[p][at + 1]);
          }
        }
        __syncwarp();
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          const int first = group * kGroupUnits;
          if (first >= num_units_) continue;
          if (p == 0 && chunk == 0) {
#pragma unroll
            for (int u = 0; u < kGroupUnits; ++u) {
              const int row = row_of(first + u);
              places_[group][u] = own_places(places_[group][u], pair_of(first + u, row), row);
            }
          }
          store_units(products, begin, first, places_[group]);
        }
#pragma unroll 1
        for (int first = kGroups * kGroupUnits; first < num_units_; first += kGroupUnits) {
          uint32_t places[kGroupUnits];
#pragma unroll
          for (int u = 0; u < kGroupUnits; ++u) places[u] = load_places(first + u);
#pragma unroll
          for (int u = 0; u < kGroupUnits; ++u) {
            const int row = row_of(first + u);
            places[u] = own_places(places[u], pair_of(first + u, row), row);
          }
          store_units(products, begin, first, places);
        }
      }
    }
  }

  const DotsArgs& args_;
  DotsShared<Tile>& shared_;
  const int lane_;
  const int warp_;
  const int consumer_;
  RingCursor<Tile::kStages> ring_;
  float d_[Tile::kParts][Tile::kCols / 2];
  // Of lane r: the list of the warp's task r, where its units end among the warp's, and the pair
  // from which unit u of all is at first_pair_ + 64 u.
  int begin_, end_, last_unit_, first_pair_;
  int num_units_;
  uint32_t places_[kGroups][kGroupUnits];
};

// ---- Kernel and launcher ------------------------------------------------------------------------

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, 1)
    band_dots_kernel(const __grid_constant__ DotsArgs args) {
  if (!kHasHopperInstructions) {
    __trap();
    return;
  }
  extern __shared__ char dynamic_shared[];
  const uint32_t misaligned = shared_address(dynamic_shared) % kSwizzleAlignment;
  auto& shared = *reinterpret_cast<DotsShared<Tile>*>(
      dynamic_shared + (kSwizzleAlignment - misaligned) % kSwizzleAlignment);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(&shared.full[stage], kLoaderThreads + 1);
      mbarrier_init(&shared.empty[stage], kBandConsumerWarps * kCluster);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  cluster_sync();  // the barriers of both blocks stand
  const int num_tiles = *args.num_tiles;
  if (threadIdx.x < kBandConsumers * 128) {
    take_registers<kConsumerRegisters>();
    DotsConsumer<T, Tile>(args, shared).run(num_tiles);
  } else {
    give_registers<kLoaderRegisters>();
    load_tiles<Tile>(args, shared, num_tiles);
  }
  // Shared memory stays until the other block has sent its last copies and arrivals.
  __syncwarp();
  cluster_sync();
}

template <class T, class Tile>
cudaError_t launch_dots(const BandShape& shape, const void* queries, const void* keys,
                        int64_t hidden_size, const BandWorkspace& workspace,
                        const DeviceInfo& device, cudaStream_t stream) {
  constexpr size_t kSharedBytes = sizeof(DotsShared<Tile>) + kSwizzleAlignment;
  static_assert(kSharedBytes <= 232448, "more shared memory than a block gets");
  DotsArgs args{};
  args.plan = shape.plan;
  args.queries = static_cast<const char*>(queries);
  args.tasks = workspace.tasks;
  args.tiles = workspace.tiles;
  args.num_tiles = workspace.num_tiles;
  args.places = workspace.places;
  args.num_pairs = shape.num_tokens * shape.num_pairs;
  args.dots = workspace.dots;
  args.row_bytes = static_cast<int>(hidden_size * sizeof(T));
  args.num_stages = static_cast<int>(ceil_div<int64_t>(hidden_size, kDepth));
  const auto kernel = band_dots_kernel<T, Tile>;
  const int64_t clusters = std::min<int64_t>(device.num_sms / kCluster, shape.max_tiles());
  return run_steps(
      [&] { return allow_shared_memory(kernel, kSharedBytes); },
      [&] {
        return encode_band_table<T>(keys, shape.plan, hidden_size, Tile::kLoadPlaces, &args.keys);
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
cudaError_t band_dots(const BandShape& shape, const void* queries, const void* keys,
                      int64_t hidden_size, const BandWorkspace& workspace, const DeviceInfo& device,
                      cudaStream_t stream) {
  const auto launch = [&](auto tile) {
    return launch_dots<T, decltype(tile)>(shape, queries, keys, hidden_size, workspace, device,
                                          stream);
  };
  const int length = std::max(shape.plan.num_rows, shape.plan.num_cols);
  if (length <= 64) return launch(DotsTile<64, 1, 6>{});
  if (length <= 128) return launch(DotsTile<128, 1, 5>{});
  if (length <= 160) return launch(DotsTile<160, 1, 4>{});
  if (length <= 256 || length > 320) return launch(DotsTile<128, 2, 3>{});
  return launch(DotsTile<160, 2, 3>{});
}

template cudaError_t band_dots<__half>(const BandShape&, const void*, const void*, int64_t,
                                       const BandWorkspace&, const DeviceInfo&, cudaStream_t);
template cudaError_t band_dots<__nv_bfloat16>(const BandShape&, const void*, const void*, int64_t,
                                              const BandWorkspace&, const DeviceInfo&,
                                              cudaStream_t);

}  // namespace omni_moe::cuda
