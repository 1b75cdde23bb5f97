// Gradients of both tables by bands: for each band, with P as in band_values_sm90.cu,
//   grad_up[band]   = P_upᵀ · hidden[tokens of the tasks]
//   grad_down[band] = P_downᵀ · grad[tokens of the tasks].
// An expert lies in a grid row and a grid column, and a pair in one of their tasks: the columns'
// sums are stored first, also where they are zero, so that the tables need no fill, and the rows'
// are added to them. Pairs of tails are tasks of one pair in their column. So every element gets
// one store and at most one addition, in a fixed order, and is rounded by both.
//
// A block takes a band, a table and a slab of 128 elements of its rows. One warpgroup fills a ring
// with 64 tasks a stage: their rows' slab by 16-byte copies, and P from its cells (band_cells.cu).
// With bf16 at T 4096, K 512, H 1024 and 320 x 320 there are 50,000 tasks in rows and 45,000 in
// columns, 124 GFLOP (190 µs at 650 TFLOP/s). The tables are written once, 420 MB in 230 µs on an
// H100, and once more read and written, 840 MB in 344 µs: memory moves 2.0 and 2.6 TB/s. Where the
// multiplying warps laid out P themselves, once for all slabs, the two took 655 µs, and 3,800 µs at
// K 4096, whose P did not fit. Searching the tasks' lists for every slab took 1,330 µs.
//
// Two warpgroups multiply, each 64 elements by the whole band: D = rowsᵀ P, whose columns are the
// places, since those come in any number and the instruction's rows do not. Transposed back in
// shared memory, 64 experts by 64 elements leave by TMA.
#include <algorithm>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/experts/bands/band_grid_sm90.cuh"
#include "cuda/experts/bands/band_weight_grad_items.cuh"
#include "cuda/experts/bands/bands.h"
#include "cuda/hopper/mbarrier.cuh"
#include "cuda/hopper/stmatrix.cuh"
#include "cuda/hopper/wgmma.cuh"

namespace omni_moe::cuda {
namespace {

using namespace band_grad;

// ---- Multiplying warpgroups ---------------------------------------------------------------------

template <class T, class Tile>
class WeightGradConsumer {
 public:
  __device__ __forceinline__ WeightGradConsumer(const WeightGradArgs& args,
                                                WeightGradShared<Tile>& shared)
      : args_(args),
        shared_(shared),
        lane_(threadIdx.x % kWarpSize),
        warp_(__shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0)),
        consumer_(warp_ / 4) {}

  __device__ __forceinline__ void run() {
    const int items = num_items(args_);
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
      const WeightGradItem item = item_at<Tile>(args_, i);
      const int rows = args_.groups[item.band].num_tasks;
      if (rows == 0) {
        if (args_.adds) continue;
        clear();
        store(item);
        continue;
      }
      if (args_.adds) prefetch(item);
      for (int first = 0; first < rows; first += kChunkTasks) {
        multiply(min(rows - first, kChunkTasks), first > 0);
      }
      store(item);
    }
    if (threadIdx.x % 128 == 0) tma_store_wait_all();
  }

 private:
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& d : d_) d = 0.0f;
#pragma unroll
    for (float& d : more_) d = 0.0f;
  }

  // What the sums will be added to comes out of memory while they are made.
  __device__ __forceinline__ void prefetch(const WeightGradItem& item) const {
    if (threadIdx.x % 128 != 0) return;
    const int end = min(item.first_place + Tile::kPlaces, band_length(args_.plan, item.band));
    for (int place = item.first_place; place < end; place += kBlockPlaces) {
      args_.tables[item.table].grad.prefetch(args_.plan, item.band, place,
                                             item.slab * kSlab + consumer_ * 64);
    }
  }

  // d_, more_ (+)= states[64 elements of the slab]ᵀ · P over the tasks of one chunk.
  __device__ __forceinline__ void multiply(int tasks, bool accumulate) {
    constexpr WgmmaMajor kCols = WgmmaMajor::kCols;
    constexpr uint64_t kStep = kWgmmaDepthStep<kCols, kChunkTasks>;
    const int stage = ring_.stage;
    mbarrier_wait(&shared_.full[stage], ring_.parity);
    const uint64_t a = wgmma_descriptor<kCols, kChunkTasks>(shared_.states[stage][consumer_]);
    const uint64_t b = wgmma_descriptor<kCols, kChunkTasks>(shared_.coefficients[stage]);
    const uint64_t more_b = wgmma_descriptor<kCols, kChunkTasks>(
        shared_.coefficients[stage][Tile::kCols / kBlockPlaces % Tile::kBlocks]);
    // A band's last chunk takes as many steps as it has tasks for.
    int step = 0;
#pragma unroll 1
    do {
      wgmma_fence();
      const bool adds = accumulate || step > 0;
      wgmma<T, kCols, kCols>(d_, a + step * kStep, b + step * kStep, adds);
      if constexpr (Tile::kMoreCols > 0) {
        wgmma<T, kCols, kCols>(more_, a + step * kStep, more_b + step * kStep, adds);
      }
    } while (++step * kWgmmaDepth < tasks);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_use(d_);
    if constexpr (Tile::kMoreCols > 0) wgmma_use(more_);
    if (lane_ == 0) mbarrier_arrive(&shared_.empty[stage]);
    ring_.advance();
  }

  // Stores or adds 64 elements of the band's places, 64 places at a time.
  __device__ __forceinline__ void store(const WeightGradItem& item) {
    const int element = item.slab * kSlab + consumer_ * 64;
    const int length = band_length(args_.plan, item.band);
    if (element * 2 >= args_.row_bytes) return;
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block) {
      const int place = item.first_place + block * kBlockPlaces;
      if (place >= length) break;
      const bool is_first_thread = threadIdx.x % 128 == 0;
      char* outputs = shared_.outputs[consumer_][output_];
      output_ = (output_ + 1) % kOutputs;
      if (is_first_thread) tma_store_wait_read<kOutputs - 1>();
      sync_warpgroup(consumer_);
      // Four matrices: 16 elements by 16 places. Lane l has the address of a place.
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        uint32_t fragment[4];
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const int at = block * 32 + quarter * 8 + p * 2;
          fragment[p] = at < Tile::kCols / 2 ? pack_pair(d_[at % (Tile::kCols / 2)],
                                                         d_[(at + 1) % (Tile::kCols / 2)], T())
                                             : pack_pair(more_[at % 32], more_[at % 32 + 1], T());
        }
        const int row = quarter * 16 + lane_ / 16 * 8 + lane_ % 8;
        const int piece = warp_ % 4 * 2 + lane_ / 8 % 2;
        store_transposed_matrices(outputs + swizzle128(row, piece), fragment);
      }
      fence_async_proxy();
      sync_warpgroup(consumer_);
      if (is_first_thread) {
        const BandTable& grad = args_.tables[item.table].grad;
        if (args_.adds) {
          grad.add(args_.plan, item.band, place, element, outputs);
        } else {
          grad.store(args_.plan, item.band, place, element, outputs);
        }
        tma_store_commit();
      }
    }
  }

  const WeightGradArgs& args_;
  WeightGradShared<Tile>& shared_;
  const int lane_;
  const int warp_;
  const int consumer_;
  RingCursor<Tile::kStages> ring_;
  int output_ = 0;  // the tile that the next results take
  float d_[Tile::kCols / 2];
  float more_[32];  // of kMoreCols
};

// ---- Kernel and launcher ------------------------------------------------------------------------

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, 1)
    band_weight_grad_kernel(const __grid_constant__ WeightGradArgs args) {
  if (!kHasHopperInstructions) {
    __trap();
    return;
  }
  extern __shared__ char dynamic_shared[];
  const uint32_t misaligned = shared_address(dynamic_shared) % kSwizzleAlignment;
  auto& shared = *reinterpret_cast<WeightGradShared<Tile>*>(
      dynamic_shared + (kSwizzleAlignment - misaligned) % kSwizzleAlignment);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(&shared.full[stage], kLoaderThreads);
      mbarrier_init(&shared.empty[stage], kConsumerWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kConsumers * 128) {
    take_registers<kConsumerRegisters>();
    WeightGradConsumer<T, Tile>(args, shared).run();
  } else {
    give_registers<kLoaderRegisters>();
    WeightGradLoader<Tile>(args, shared).run();
  }
}

template <class T, class Tile>
cudaError_t launch_pass(WeightGradArgs args, bool is_rows, bool adds, const DeviceInfo& device,
                        cudaStream_t stream) {
  constexpr size_t kSharedBytes = sizeof(WeightGradShared<Tile>) + kSwizzleAlignment;
  static_assert(kSharedBytes <= 232448, "more shared memory than a block gets");
  args.is_rows = is_rows;
  args.adds = adds;
  const int length = is_rows ? args.plan.num_cols : args.plan.num_rows;
  args.num_pieces = ceil_div(length, Tile::kPlaces);
  const int bands = is_rows ? args.plan.num_rows : args.plan.num_cols;
  const int items = bands * args.num_tables * args.num_pieces * args.num_slabs;
  const auto kernel = band_weight_grad_kernel<T, Tile>;
  return run_steps([&] { return allow_shared_memory(kernel, kSharedBytes); },
                   [&] {
                     const int blocks = std::min(items, device.num_sms);
                     LaunchOptions options{dim3(static_cast<unsigned>(blocks)), kThreads};
                     options.shared_bytes = kSharedBytes;
                     return launch_kernel(kernel, options, stream, args);
                   });
}

template <class T>
cudaError_t launch_pass(const WeightGradArgs& args, bool is_rows, bool adds,
                        const DeviceInfo& device, cudaStream_t stream) {
  const int length = is_rows ? args.plan.num_cols : args.plan.num_rows;
  if (length <= 64) return launch_pass<T, WeightGradTile<64>>(args, is_rows, adds, device, stream);
  if (length <= 128)
    return launch_pass<T, WeightGradTile<128>>(args, is_rows, adds, device, stream);
  if (length <= 256 || length > 320) {
    return launch_pass<T, WeightGradTile<256>>(args, is_rows, adds, device, stream);
  }
  return launch_pass<T, WeightGradTile<320>>(args, is_rows, adds, device, stream);
}

}  // namespace

template <class T>
cudaError_t band_weight_grad(const BandShape& shape, const BandWeightGradTables& tables,
                             int64_t hidden_size, const BandWorkspace& workspace,
                             const DeviceInfo& device, cudaStream_t stream) {
  WeightGradArgs args{};
  args.plan = shape.plan;
  args.groups = workspace.groups;
  args.group_tokens = workspace.group_tokens;
  args.group_first = workspace.group_first;
  args.row_bytes = static_cast<int>(hidden_size * sizeof(T));
  args.num_slabs = static_cast<int>(ceil_div<int64_t>(hidden_size, kSlab));
  const auto add_table = [&](const void* states, void* grad, const BandCell* cells) {
    if (grad == nullptr) return cudaSuccess;
    WeightGradTable& table = args.tables[args.num_tables++];
    table.states = static_cast<const char*>(states);
    table.cells = cells;
    return encode_band_table<T>(grad, shape.plan, hidden_size, kBlockPlaces, &table.grad);
  };
  return run_steps(
      [&] {
        // The encoder needs a context, which this thread has after a call of the runtime.
        return allow_shared_memory(band_weight_grad_kernel<T, WeightGradTile<64>>, 0);
      },
      [&] { return add_table(tables.hidden_states, tables.grad_up, workspace.up_cells); },
      [&] { return add_table(tables.grad_expert_states, tables.grad_down, workspace.down_cells); },
      [&] { return launch_pass<T>(args, /*is_rows=*/false, /*adds=*/false, device, stream); },
      [&] { return launch_pass<T>(args, /*is_rows=*/true, /*adds=*/true, device, stream); });
}

template cudaError_t band_weight_grad<__half>(const BandShape&, const BandWeightGradTables&,
                                              int64_t, const BandWorkspace&, const DeviceInfo&,
                                              cudaStream_t);
template cudaError_t band_weight_grad<__nv_bfloat16>(const BandShape&, const BandWeightGradTables&,
                                                     int64_t, const BandWorkspace&,
                                                     const DeviceInfo&, cudaStream_t);

}  // namespace omni_moe::cuda
