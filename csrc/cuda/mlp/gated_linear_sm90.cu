// The gate and up products of the shared MLP and their activation in one Hopper GEMM:
//   activated = act(x gate_weightᵀ) * (x up_weightᵀ)
// and, where the backward wants them, the two products.
//
// The tensor cores are the bound, with 4 T I H FLOP. A block computes tiles of 128 tokens by 128
// columns of both products: the rows of the two weights lie one behind the other in shared memory,
// so that one m64n256k16 wgmma makes 128 gate columns and the same 128 up columns, and a thread
// holds both factors of each of its outputs in registers. One warp keeps a ring of 64-deep stages
// filled by TMA; two warpgroups multiply, 64 tokens each. Blocks stay for many tiles, and the ring
// fills for the next tile while the last one is activated and stored.
//
// The two blocks of a cluster take neighbouring tokens. Each loads its own rows of x and one of the
// two weight tiles, which TMA writes to both: 32 KB from L2 per stage and block instead of 48, for
// 1024 cycles of tensor core work (L2 gives an SM about 36 bytes a cycle).
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/activation.cuh"
#include "cuda/common/check.h"
#include "cuda/common/dispatch.h"
#include "cuda/hopper/stmatrix.cuh"
#include "cuda/mlp/gated_tile_sm90.cuh"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

namespace {

constexpr int kTileCols = GatedLinearTuning::kForwardTileCols;  // of gate and, again, of up
constexpr int kTileBytes = 128 * kStageDepth * 2;  // of x, gate_weight or up_weight in one stage
static_assert(kTileTokens == kTileCols && 2 * kTileCols == kWgmmaCols);

// A warp stores its 16 rows of an output 64 columns at a time.
constexpr int kStoreRows = kWarpRows;
constexpr int kStoreCols = kSwizzleRowBytes / 2;
constexpr int kStoreBytes = kStoreRows * kSwizzleRowBytes;

struct Sm90Tuning {
  static constexpr int kStages = 4;  // 192 KB
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kOtherRegisters = 40;
};

struct GatedLinearArguments {
  CUtensorMap x, gate_weight, up_weight;  // loads
  CUtensorMap activated, gate, up;        // stores; unset where not wanted
  bool store_activated, store_gate, store_up;
  int num_tokens;
  int intermediate_size;
  int num_stages_per_tile;  // ceil(H / 64)
  TileGrid tiles;
};

template <int kStages>
struct SharedStorage {
  char x[kStages][kTileBytes];
  char weights[kStages][2][kTileBytes];  // gate, up
  char stores[kConsumerWarps][2][kStoreBytes];
  uint64_t full[kStages];   // the stage's tiles have landed here
  uint64_t empty[kStages];  // all consumers of the cluster have read the stage
};

// ---- Device helpers -----------------------------------------------------------------------------

// Writes the warp's 16 rows by 128 columns of one output, value(i) at accumulator i of a 128-column
// half of D. `halves` is this warp's alone, so that no warp waits for another.
template <class T, class Value>
__device__ __forceinline__ void store_output(const CUtensorMap& map, char (*halves)[kStoreBytes],
                                             int row, int col, const GatedLinearArguments& args,
                                             Value value) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (lane == 0) tma_store_wait_read<1>();  // the store before last read this half
    __syncwarp();
    store_rows(halves[half], [&](int i) {
      return pack_pair(value(half * 32 + i), value(half * 32 + i + 1), T());
    });
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) {
      const int half_col = col + half * kStoreCols;
      if (row < args.num_tokens && half_col < args.intermediate_size) {
        tma_store(map, halves[half], row, half_col);
      }
      tma_store_commit();
    }
  }
}

// ---- Kernel -------------------------------------------------------------------------------------

template <class Tuning>
__device__ __forceinline__ void load_tiles(const GatedLinearArguments& args,
                                           SharedStorage<Tuning::kStages>& shared,
                                           const ClusterPosition& position) {
  static_assert(kCluster == 2, "a block for each of the two weights");
  const int num_tiles = args.tiles.num_token_tiles * args.tiles.num_col_tiles;
  RingCursor<Tuning::kStages> ring;
  for (int tile = position.cluster; tile < num_tiles; tile += position.num_clusters) {
    const TilePosition at = tile_position(tile, args.tiles);
    const int token = position.first_token(at);
    const int col = at.col_tile * kTileCols;
    for (int k = 0; k < args.num_stages_per_tile; ++k, ring.advance()) {
      const int stage = ring.stage;
      mbarrier_wait(&shared.empty[stage], ring.parity ^ 1);
      // The other block's multicast may have come already; it counts once these bytes are expected.
      mbarrier_arrive_expect(&shared.full[stage], 3 * kTileBytes);
      uint64_t* full = &shared.full[stage];
      const int depth = k * kStageDepth;
      tma_load(args.x, shared.x[stage], full, token, depth);
      tma_load_multicast(position.rank == 0 ? args.gate_weight : args.up_weight,
                         shared.weights[stage][position.rank], full, col, depth, 0b11);
    }
  }
}

template <class T, Activation kActivation, class Tuning>
__device__ __forceinline__ void multiply_tiles(const GatedLinearArguments& args,
                                               SharedStorage<Tuning::kStages>& shared,
                                               const ClusterPosition& position, int consumer) {
  const int num_tiles = args.tiles.num_token_tiles * args.tiles.num_col_tiles;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize % (kWarpgroupThreads / kWarpSize);
  char(*halves)[kStoreBytes] = shared.stores[consumer * 4 + warp];

  TileMainloop<T, WgmmaMajor::kDepth, kWgmmaCols, Tuning, SharedStorage<Tuning::kStages>> mainloop(
      shared, args.num_stages_per_tile, consumer);
  float d[kWgmmaRegisters];
#pragma unroll
  for (int i = 0; i < kWgmmaRegisters; ++i) d[i] = 0.0f;

  for (int tile = position.cluster; tile < num_tiles; tile += position.num_clusters) {
    // 1. D = x [gate_weight; up_weight]ᵀ.
    mainloop.run(
        d, [&](int stage) { return shared.x[stage]; },
        [&](int stage) { return shared.weights[stage][0]; });

    // 2. Activate and store: accumulator i is of gate, 64 + i of the same column of up.
    const TilePosition at = tile_position(tile, args.tiles);
    const int row = position.first_token(at) + consumer * kWgmmaRows + warp * kWarpRows;
    const int col = at.col_tile * kTileCols;
    constexpr int kUp = kWgmmaRegisters / 2;
    if (args.store_gate) {
      store_output<T>(args.gate, halves, row, col, args, [&](int i) { return d[i]; });
    }
    if (args.store_up) {
      store_output<T>(args.up, halves, row, col, args, [&](int i) { return d[kUp + i]; });
    }
    if (args.store_activated) {
      store_output<T>(args.activated, halves, row, col, args,
                      [&](int i) { return fast_activate<kActivation>(d[i]) * d[kUp + i]; });
    }
  }
  if (lane == 0) tma_store_wait_all();
}

template <class T, Activation kActivation, class Tuning>
__global__ void __launch_bounds__(kGatedThreads, 1)
    gated_linear_forward_kernel(const __grid_constant__ GatedLinearArguments args) {
  if (!kHasHopperInstructions) {
    __trap();
    return;
  }
  using Shared = SharedStorage<Tuning::kStages>;
  run_gated_block<Shared, Tuning>(
      [](Shared&) {},
      [&](Shared& shared, const ClusterPosition& position) {
        load_tiles<Tuning>(args, shared, position);
      },
      [&](Shared& shared, const ClusterPosition& position, int consumer) {
        multiply_tiles<T, kActivation, Tuning>(args, shared, position, consumer);
      },
      [](Shared&, const ClusterPosition&, int) {});
}

// ---- Launcher -----------------------------------------------------------------------------------

template <class Tuning>
constexpr size_t kSharedBytes = sizeof(SharedStorage<Tuning::kStages>) + kSwizzleAlignment;

template <class T, Activation kActivation, class Tuning>
cudaError_t launch_gated_linear(const GatedLinearForwardParams& params,
                                const GatedLinearForwardPlan& plan, cudaStream_t stream) {
  static_assert(kSharedBytes<Tuning> <= GatedLinearTuning::kMaxSharedBytes);
  GatedLinearArguments args{};
  args.store_activated = params.activated != nullptr;
  args.store_gate = params.gate != nullptr;
  args.store_up = params.up != nullptr;
  args.num_tokens = static_cast<int>(params.num_tokens);
  args.intermediate_size = static_cast<int>(params.intermediate_size);
  args.num_stages_per_tile = static_cast<int>(ceil_div<int64_t>(params.hidden_size, kStageDepth));
  args.tiles = tile_grid(plan);

  const auto operand = [&](const void* matrix, int64_t rows, CUtensorMap* map) {
    return
        [=, &params] { return encode_tensor_map<T>(matrix, rows, params.hidden_size, 128, map); };
  };
  const auto output = [&](const void* matrix, CUtensorMap* map) {
    return [=, &params] {
      if (matrix == nullptr) return cudaSuccess;
      return encode_tensor_map<T>(matrix, params.num_tokens, params.intermediate_size, kStoreRows,
                                  map);
    };
  };
  const auto kernel = gated_linear_forward_kernel<T, kActivation, Tuning>;
  return run_steps(
      [&] { return allow_shared_memory(kernel, kSharedBytes<Tuning>); },
      operand(params.x, params.num_tokens, &args.x),
      operand(params.gate_weight, params.intermediate_size, &args.gate_weight),
      operand(params.up_weight, params.intermediate_size, &args.up_weight),
      output(params.activated, &args.activated), output(params.gate, &args.gate),
      output(params.up, &args.up),
      [&] { return launch_gated_clusters(kernel, args, plan, kSharedBytes<Tuning>, stream); });
}

bool is_empty(const GatedLinearForwardParams& params) {
  return params.num_tokens == 0 || params.intermediate_size == 0 ||
         (params.activated == nullptr && params.gate == nullptr && params.up == nullptr);
}

}  // namespace

cudaError_t gated_linear_forward(const GatedLinearForwardParams& params,
                                 const GatedLinearForwardPlan& plan, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  return dispatch_activation(params.activation, [&](auto act) {
    constexpr Activation kActivation = decltype(act)::value;
    return params.dtype == DType::kFloat16
               ? launch_gated_linear<__half, kActivation, Sm90Tuning>(params, plan, stream)
               : launch_gated_linear<__nv_bfloat16, kActivation, Sm90Tuning>(params, plan, stream);
  });
}

}  // namespace omni_moe::cuda
