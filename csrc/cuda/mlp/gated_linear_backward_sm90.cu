// The gradient through the shared MLP's down product and gated activation in one Hopper GEMM:
//   grad_activated = grad_output down_weight                       (in shared memory only)
//   grad_gate = grad_activated * up * act'(gate),  grad_up = grad_activated * act(gate)
// and, where the down weight's gradient wants it, activated = act(gate) * up again.
//
// The work is 2 T H I FLOP and, besides the operands, 2 T I elements read and 2 or 3 T I written.
// Tensor cores and memory have about the same to do, so that they must work at the same time: three
// warps take a tile through the activation while the next one is multiplied. On an H200, T4096
// H1024 I4096 in bf16 takes 77 µs, where the products alone take 45, the 160 MB alone 38, and two
// kernels one after the other 93. The stages and the epilogue share the way from L2 to the SMs, 430
// MB in all; prefetching gate and up of the next tile into L2 made it 84 µs.
//
// A block computes tiles of 128 tokens by 256 columns. One warp keeps a ring of 64-deep stages
// filled by TMA; two warpgroups multiply, 64 tokens each. A row of down_weight runs along the
// columns of the result, so that wgmma reads its tiles column-major. Each multiplying warp leaves
// its 16 rows of grad_activated, rounded to the element type as a separate product would, in shared
// memory for one of the epilogue warps and turns to the next tile; rows of the block's last tile,
// which nothing could hide, it finishes itself.
//
// The epilogue takes whole rows, 512 contiguous bytes of each matrix, a lane 16 of them. A lane has
// read gate and up of a position when it writes there, and no one else touches them, so that the
// outputs may take the memory of gate and up.
//
// The blocks of a cluster take neighbouring tokens. Each loads its own rows of grad_output and a
// part of the down_weight tile, which TMA writes to all of them.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/activation.cuh"
#include "cuda/common/check.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/vec.cuh"
#include "cuda/hopper/stmatrix.cuh"
#include "cuda/mlp/gated_tile_sm90.cuh"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

namespace {

constexpr int kTileCols = GatedLinearTuning::kBackwardTileCols;
static_assert(kTileCols == kWgmmaCols);
constexpr int kGradBytes = kTileTokens * kSwizzleRowBytes;  // of grad_output in one stage
// A stage has panels of 64 columns of down_weight.
constexpr int kPanelCols = kSwizzleRowBytes / 2;
constexpr int kPanelBytes = kStageDepth * kSwizzleRowBytes;
constexpr int kPanels = kTileCols / kPanelCols;
constexpr int kStageBytes = kGradBytes + kPanels * kPanelBytes;

// Columns of a row that a lane has in the epilogue.
constexpr int kLaneCols = kVecWidth<__half>;
static_assert(kWarpSize * kLaneCols == kTileCols);
// Bytes of a row of grad_activated in shared memory: 16 more than its elements take, so that eight
// rows of one column meet no bank twice.
constexpr int kStashRowBytes = kTileCols * 2 + 16;

struct Sm90Tuning {
  static constexpr int kStages = 3;  // 144 KB
  // Rows of gate and up that an epilogue warp works at while as many are under way: 16 registers
  // each.
  static constexpr int kBatchRows = 4;
  static constexpr int kConsumerRegisters = 168;
  static constexpr int kOtherRegisters = 168;
};

struct GatedLinearBackwardArguments {
  CUtensorMap grad_output, down_weight;
  const void* gate;
  const void* up;
  void* grad_gate;
  void* grad_up;
  void* activated;  // or null
  int num_tokens;
  int intermediate_size;
  int num_stages_per_tile;  // ceil(H / 64)
  TileGrid tiles;
};

// grad_activated of 16 rows of a tile, from a consumer warp to an epilogue warp.
struct Stash {
  char rows[kWarpRows][kStashRowBytes];
};

template <class Tuning>
struct SharedStorage {
  char grad_output[Tuning::kStages][kGradBytes];
  char down_weight[Tuning::kStages][kPanels][kPanelBytes];
  Stash stash[kConsumerWarps];
  uint64_t full[Tuning::kStages];   // the stage's tiles have landed here
  uint64_t empty[Tuning::kStages];  // all consumers of the cluster have read it
  uint64_t stash_full[kConsumerWarps];
  uint64_t stash_empty[kConsumerWarps];
};

// ---- Kernel: tiles of the product ---------------------------------------------------------------

template <class Tuning>
__device__ __forceinline__ void load_tiles(const GatedLinearBackwardArguments& args,
                                           SharedStorage<Tuning>& shared,
                                           const ClusterPosition& position) {
  constexpr int kOwnPanels = kPanels / kCluster;
  static_assert(kOwnPanels * kCluster == kPanels);
  const int num_tiles = args.tiles.num_token_tiles * args.tiles.num_col_tiles;
  RingCursor<Tuning::kStages> ring;
  for (int tile = position.cluster; tile < num_tiles; tile += position.num_clusters) {
    const TilePosition at = tile_position(tile, args.tiles);
    const int token = position.first_token(at);
    const int col = at.col_tile * kTileCols;
    for (int k = 0; k < args.num_stages_per_tile; ++k, ring.advance()) {
      const int stage = ring.stage;
      const int depth = k * kStageDepth;
      uint64_t* full = &shared.full[stage];
      mbarrier_wait(&shared.empty[stage], ring.parity ^ 1);
      // Another block's multicast may have come already; it counts once these bytes are expected.
      mbarrier_arrive_expect(full, kStageBytes);
      tma_load(args.grad_output, shared.grad_output[stage], full, token, depth);
#pragma unroll
      for (int i = 0; i < kOwnPanels; ++i) {
        const int panel = position.rank * kOwnPanels + i;
        tma_load_multicast(args.down_weight, shared.down_weight[stage][panel], full, depth,
                           col + panel * kPanelCols, (1 << kCluster) - 1);
      }
    }
  }
}

// ---- Kernel: epilogue ---------------------------------------------------------------------------

// First row and column of what a consumer warp makes of a tile.
struct WarpPlace {
  int row;
  int col;
};

// Past the last tile there are no tokens.
__device__ __forceinline__ WarpPlace warp_place(const GatedLinearBackwardArguments& args,
                                                const ClusterPosition& position, int tile,
                                                int consumer_warp) {
  if (tile >= args.tiles.num_token_tiles * args.tiles.num_col_tiles) return {args.num_tokens, 0};
  const TilePosition at = tile_position(tile, args.tiles);
  return {position.first_token(at) + consumer_warp * kWarpRows, at.col_tile * kTileCols};
}

// One warp's way through rows of gate and up: a batch of them at work, the next one under way.
template <class T, Activation kActivation, int kBatchRows>
struct RowEpilogue {
  using LaneVec = Vec<T, kLaneCols>;
  static_assert(kWarpRows % kBatchRows == 0);

  struct Batch {
    LaneVec gate[kBatchRows], up[kBatchRows];
  };

  const GatedLinearBackwardArguments& args;
  const int lane = threadIdx.x % kWarpSize;
  Batch batch;

  __device__ __forceinline__ bool exists(int row, int col) const {
    return row < args.num_tokens && col < args.intermediate_size;
  }

  __device__ __forceinline__ int64_t index_of(int row, int col) const {
    return static_cast<int64_t>(row) * args.intermediate_size + col;
  }

  // Lanes that have nothing to do load something that exists and do not use it.
  __device__ __forceinline__ Batch load(const WarpPlace& at) const {
    const int col = min(at.col + lane * kLaneCols, args.intermediate_size - kLaneCols);
    Batch loaded;
#pragma unroll
    for (int i = 0; i < kBatchRows; ++i) {
      const int64_t index = index_of(min(at.row + i, args.num_tokens - 1), col);
      loaded.gate[i] = load_vec_once<LaneVec>(static_cast<const T*>(args.gate) + index);
      loaded.up[i] = load_vec_once<LaneVec>(static_cast<const T*>(args.up) + index);
    }
    return loaded;
  }

  __device__ __forceinline__ void store(void* matrix, int64_t index,
                                        const float (&values)[kLaneCols]) const {
    LaneVec packed;
    pack(values, packed);
    store_vec(static_cast<T*>(matrix) + index, packed);
  }

  // The first batch of a place, before its products are there.
  __device__ __forceinline__ void start(const WarpPlace& at) { batch = load(at); }

  // All rows of a place that has been started; starts the next one.
  __device__ __forceinline__ void finish(const Stash& stash, const WarpPlace& at,
                                         const WarpPlace& next) {
    const int col = at.col + lane * kLaneCols;
#pragma unroll 1
    for (int first = 0; first < kWarpRows; first += kBatchRows) {
      // 1. The next rows on their way.
      const int first_ahead = first + kBatchRows;
      const Batch ahead =
          load(first_ahead < kWarpRows ? WarpPlace{at.row + first_ahead, at.col} : next);

#pragma unroll
      for (int i = 0; i < kBatchRows; ++i) {
        // 2. Differentiate.
        float grad[kLaneCols], gate[kLaneCols], up[kLaneCols];
        unpack(load_shared_vec<LaneVec>(stash.rows[first + i] + lane * sizeof(LaneVec)), grad);
        unpack(batch.gate[i], gate);
        unpack(batch.up[i], up);
        float grad_gate[kLaneCols], grad_up[kLaneCols], activated[kLaneCols];
#pragma unroll
        for (int j = 0; j < kLaneCols; ++j) {
          const ActivationResult act = fast_activate_with_derivative<kActivation>(gate[j]);
          grad_gate[j] = through_derivative(kActivation, act, grad[j] * up[j]);
          grad_up[j] = grad[j] * act.value;
          activated[j] = act.value * up[j];
        }

        // 3. Store.
        const int row = at.row + first + i;
        if (exists(row, col)) {
          const int64_t index = index_of(row, col);
          store(args.grad_gate, index, grad_gate);
          store(args.grad_up, index, grad_up);
          if (args.activated != nullptr) store(args.activated, index, activated);
        }
      }
      batch = ahead;
    }
  }
};

// The work of one epilogue warp: every third of the consumer warps' results, counted through all
// tiles of the block but the last, so that the three warps have the same to do.
template <class T, Activation kActivation, class Tuning>
__device__ __forceinline__ void differentiate_tiles(const GatedLinearBackwardArguments& args,
                                                    SharedStorage<Tuning>& shared,
                                                    const ClusterPosition& position, int epilogue) {
  const int num_tiles = args.tiles.num_token_tiles * args.tiles.num_col_tiles;
  const int num_results =
      (num_tiles - 1 - position.cluster) / position.num_clusters * kConsumerWarps;
  const auto place_of = [&](int result) {
    return warp_place(args, position,
                      position.cluster + result / kConsumerWarps * position.num_clusters,
                      result % kConsumerWarps);
  };
  RowEpilogue<T, kActivation, Tuning::kBatchRows> rows{args};

  WarpPlace at = place_of(epilogue);
  if (num_results > 0) rows.start(at);
  for (int result = epilogue; result < num_results; result += kEpilogueWarps) {
    const int next_result = result + kEpilogueWarps;
    const WarpPlace next =
        next_result < num_results ? place_of(next_result) : WarpPlace{args.num_tokens, 0};
    const int consumer_warp = result % kConsumerWarps;
    mbarrier_wait(&shared.stash_full[consumer_warp], result / kConsumerWarps % 2);
    rows.finish(shared.stash[consumer_warp], at, next);
    __syncwarp();
    if (rows.lane == 0) mbarrier_arrive(&shared.stash_empty[consumer_warp]);
    at = next;
  }
}

// ---- Kernel: products ---------------------------------------------------------------------------

template <class T, Activation kActivation, class Tuning>
__device__ __forceinline__ void multiply_tiles(const GatedLinearBackwardArguments& args,
                                               SharedStorage<Tuning>& shared,
                                               const ClusterPosition& position, int consumer) {
  const int num_tiles = args.tiles.num_token_tiles * args.tiles.num_col_tiles;
  const int lane = threadIdx.x % kWarpSize;
  const int consumer_warp = threadIdx.x / kWarpSize;
  Stash& stash = shared.stash[consumer_warp];
  // This lane's row of the four matrices that the warp stores at once.
  char* const stash_lane = stash.rows[lane % kWarpRows] + lane / kWarpRows * 16;

  TileMainloop<T, WgmmaMajor::kCols, kStageDepth, Tuning, SharedStorage<Tuning>> mainloop(
      shared, args.num_stages_per_tile, consumer);
  unsigned stash_parity = 1;  // it starts empty
  float d[kWgmmaRegisters];
#pragma unroll
  for (int i = 0; i < kWgmmaRegisters; ++i) d[i] = 0.0f;

  for (int tile = position.cluster;;) {
    // 1. D = grad_output down_weight.
    mainloop.run(
        d, [&](int stage) { return shared.grad_output[stage]; },
        [&](int stage) { return shared.down_weight[stage]; });

    // 2. To shared memory. Matrices in accumulator order: rows 0-7, rows 8-15, then the same of the
    // next 8 columns.
    mbarrier_wait(&shared.stash_empty[consumer_warp], stash_parity);
    stash_parity ^= 1;
#pragma unroll
    for (int i = 0; i < kWgmmaRegisters; i += 8) {  // 16 columns
      const uint32_t fragment[] = {
          pack_pair(d[i], d[i + 1], T()), pack_pair(d[i + 2], d[i + 3], T()),
          pack_pair(d[i + 4], d[i + 5], T()), pack_pair(d[i + 6], d[i + 7], T())};
      store_matrices(stash_lane + i / 8 * 32, fragment);
    }
    __syncwarp();
    const int next_tile = tile + position.num_clusters;
    if (next_tile >= num_tiles) {
      // 3. No more to multiply: through the activation at once.
      const WarpPlace at = warp_place(args, position, tile, consumer_warp);
      RowEpilogue<T, kActivation, Tuning::kBatchRows> rows{args};
      rows.start(at);
      rows.finish(stash, at, {args.num_tokens, 0});
      return;
    }
    if (lane == 0) mbarrier_arrive(&shared.stash_full[consumer_warp]);
    tile = next_tile;
  }
}

// ---- Kernel -------------------------------------------------------------------------------------

template <class T, Activation kActivation, class Tuning>
__global__ void __launch_bounds__(kGatedThreads, 1)
    gated_linear_backward_kernel(const __grid_constant__ GatedLinearBackwardArguments args) {
  if (!kHasHopperInstructions) {
    __trap();
    return;
  }
  using Shared = SharedStorage<Tuning>;
  run_gated_block<Shared, Tuning>(
      [](Shared& shared) {
        for (int warp = 0; warp < kConsumerWarps; ++warp) {
          mbarrier_init(&shared.stash_full[warp], 1);
          mbarrier_init(&shared.stash_empty[warp], 1);
        }
      },
      [&](Shared& shared, const ClusterPosition& position) {
        load_tiles<Tuning>(args, shared, position);
      },
      [&](Shared& shared, const ClusterPosition& position, int consumer) {
        multiply_tiles<T, kActivation, Tuning>(args, shared, position, consumer);
      },
      [&](Shared& shared, const ClusterPosition& position, int epilogue) {
        differentiate_tiles<T, kActivation, Tuning>(args, shared, position, epilogue);
      });
}

// ---- Launcher -----------------------------------------------------------------------------------

template <class Tuning>
constexpr size_t kSharedBytes = sizeof(SharedStorage<Tuning>) + kSwizzleAlignment;

template <class T, Activation kActivation, class Tuning>
cudaError_t launch_gated_linear_backward(const GatedLinearBackwardParams& params,
                                         const GatedLinearBackwardPlan& plan, cudaStream_t stream) {
  static_assert(kSharedBytes<Tuning> <= GatedLinearTuning::kMaxSharedBytes);
  GatedLinearBackwardArguments args{};
  args.gate = params.gate;
  args.up = params.up;
  args.grad_gate = params.grad_gate;
  args.grad_up = params.grad_up;
  args.activated = params.activated;
  args.num_tokens = static_cast<int>(params.num_tokens);
  args.intermediate_size = static_cast<int>(params.intermediate_size);
  args.num_stages_per_tile = static_cast<int>(ceil_div<int64_t>(params.hidden_size, kStageDepth));
  args.tiles = tile_grid(plan);

  const auto kernel = gated_linear_backward_kernel<T, kActivation, Tuning>;
  return run_steps(
      [&] { return allow_shared_memory(kernel, kSharedBytes<Tuning>); },
      [&] {
        return encode_tensor_map<T>(params.grad_output, params.num_tokens, params.hidden_size,
                                    kTileTokens, &args.grad_output);
      },
      [&] {
        return encode_tensor_map<T>(params.down_weight, params.hidden_size,
                                    params.intermediate_size, kStageDepth, &args.down_weight);
      },
      [&] { return launch_gated_clusters(kernel, args, plan, kSharedBytes<Tuning>, stream); });
}

}  // namespace

cudaError_t gated_linear_backward(const GatedLinearBackwardParams& params,
                                  const GatedLinearBackwardPlan& plan, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.intermediate_size == 0) return cudaSuccess;
  return dispatch_activation(params.activation, [&](auto act) {
    constexpr Activation kActivation = decltype(act)::value;
    return params.dtype == DType::kFloat16
               ? launch_gated_linear_backward<__half, kActivation, Sm90Tuning>(params, plan, stream)
               : launch_gated_linear_backward<__nv_bfloat16, kActivation, Sm90Tuning>(params, plan,
                                                                                      stream);
  });
}

}  // namespace omni_moe::cuda
