// The gradient through the shared MLP's down product and gated activation in one Hopper GEMM:
//   grad_activated = grad_output down_weight                       (in registers only)
//   grad_gate = grad_activated * up * act'(gate),  grad_up = grad_activated * act(gate)
// and, where the down weight's gradient wants it, activated = act(gate) * up again.
//
// 2 T H I FLOP and, besides the operands, 2 T I elements read and 2 or 3 T I written: tensor cores
// and memory have about the same to do (43 and 38 µs on an H200 at T4096 H1024 I4096), so that they
// must work at the same time. A block computes tiles of 128 tokens by 256 columns. One warp keeps a
// ring of 64-deep stages filled by TMA; two warpgroups multiply, 64 tokens each. A row of
// down_weight runs along the columns of the result, so that wgmma reads its tiles column-major.
//
// A warp handles its 16 rows of a tile in pieces of 8 rows by 64 columns. TMA brings gate and up of
// the first four pieces to shared memory, and of the others to L2, while the tensor cores are at
// the tile; the gradients take their places there and leave by TMA while the next pieces, or the
// next tile, are under way. No other warp reads or writes a piece, so that the outputs may take the
// memory of gate and up.
//
// The blocks of a cluster take neighbouring tokens. Each loads its own rows of grad_output and a
// part of the down_weight tile, which TMA writes to all of them.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/activation.cuh"
#include "cuda/common/check.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/fragment.cuh"
#include "cuda/gated_tile.cuh"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

namespace {

constexpr int kTileCols = kWgmmaCols;
constexpr int kGradBytes = kTileTokens * kSwizzleRowBytes;  // of grad_output in one stage
// Of down_weight in one stage, a slab of 64 columns.
constexpr int kSlabCols = kSwizzleRowBytes / 2;
constexpr int kSlabBytes = kStageDepth * kSwizzleRowBytes;
constexpr int kSlabs = kTileCols / kSlabCols;
constexpr int kStageBytes = kGradBytes + kSlabs * kSlabBytes;

// What a warp loads, differentiates and stores at once. Pieces 2 n and 2 n + 1 are the upper and
// the lower 8 rows of its 16 in slab n.
constexpr int kPieceRows = 8;
constexpr int kPieceBytes = kPieceRows * kSwizzleRowBytes;
constexpr int kPieces = kSlabs * kWarpRows / kPieceRows;  // of a warp and tile
// Pieces of a warp in shared memory: two whose gradients are leaving, one at work, one to come.
// With two places for `activated` 80 KB for all warps.
constexpr int kSlots = 4;
constexpr int kLeaving = 2;
static_assert(kPieces % (2 * kSlots) == 0, "a slot's barrier starts every tile in one phase");

struct Sm90Tuning {
  static constexpr int kStages = 3;   // 144 KB
  static constexpr int kCluster = 2;  // blocks that share down_weight tiles
  // Clusters that run together take 8 tiles of tokens (of 256) by about 8 of columns: the fewest
  // bytes from memory for 66 clusters.
  static constexpr int kGroup = 8;
  // The second warpgroup starts late, so that one multiplies while the other differentiates.
  static constexpr bool kStaggered = true;
  // Pieces that have no slot yet wait in L2 instead of memory.
  static constexpr bool kPrefetch = true;
};

struct GatedLinearBackwardArguments {
  CUtensorMap grad_output, down_weight;       // tiles of the product
  CUtensorMap gate, up;                       // pieces loaded
  CUtensorMap grad_gate, grad_up, activated;  // pieces stored; activated is unset if not wanted
  bool store_activated;
  int num_tokens;
  int intermediate_size;
  int num_stages_per_tile;  // ceil(H / 64)
  TileGrid tiles;
};

// A warp's own shared memory for pieces, so that no warp waits for another.
struct PieceStorage {
  struct Slot {
    char gate[kPieceBytes];  // then grad_gate
    char up[kPieceBytes];    // then grad_up
  } slots[kSlots];
  char activated[kLeaving][kPieceBytes];
};

template <class Tuning>
struct SharedStorage {
  char grad_output[Tuning::kStages][kGradBytes];
  char down_weight[Tuning::kStages][kSlabs][kSlabBytes];
  PieceStorage pieces[kConsumerWarps];
  uint64_t full[Tuning::kStages];           // the stage's tiles have landed here
  uint64_t empty[Tuning::kStages];          // all consumers of the cluster have read it
  uint64_t landed[kConsumerWarps][kSlots];  // gate and up have landed in the slot
};

// ---- kernel: tiles of the product ----

template <class Tuning>
__device__ __forceinline__ void load_tiles(const GatedLinearBackwardArguments& args,
                                           SharedStorage<Tuning>& shared,
                                           const ClusterPosition& position) {
  constexpr int kCluster = Tuning::kCluster;
  constexpr int kOwnSlabs = kSlabs / kCluster;
  static_assert(kOwnSlabs * kCluster == kSlabs);
  const int num_tiles = args.tiles.num_token_tiles * args.tiles.num_col_tiles;
  RingCursor<Tuning::kStages> ring;
  for (int tile = position.cluster; tile < num_tiles; tile += position.num_clusters) {
    const TilePosition at = tile_position<Tuning::kGroup>(tile, args.tiles);
    const int token = (at.token_tile * kCluster + position.rank) * kTileTokens;
    const int col = at.col_tile * kTileCols;
    for (int k = 0; k < args.num_stages_per_tile; ++k, ring.advance()) {
      const int stage = ring.stage;
      const int depth = k * kStageDepth;
      uint64_t* full = &shared.full[stage];
      mbarrier_wait(&shared.empty[stage], ring.parity ^ 1);
      // Another block's multicast may have come already: it counts once these are expected.
      mbarrier_arrive_expect(full, kStageBytes);
      tma_load(args.grad_output, shared.grad_output[stage], full, token, depth);
#pragma unroll
      for (int i = 0; i < kOwnSlabs; ++i) {
        const int slab = position.rank * kOwnSlabs + i;
        char* tile_at = shared.down_weight[stage][slab];
        if constexpr (kCluster == 1) {
          tma_load(args.down_weight, tile_at, full, depth, col + slab * kSlabCols);
        } else {
          tma_load_multicast(args.down_weight, tile_at, full, depth, col + slab * kSlabCols,
                             (1 << kCluster) - 1);
        }
      }
    }
  }
}

// ---- kernel: a warp's pieces ----

// The pieces of one warp, `landed` its slots' barriers; row and col are of its part of a tile.
template <class T, Activation kActivation, class Tuning>
struct WarpPieces {
  const GatedLinearBackwardArguments& args;
  PieceStorage& storage;
  uint64_t* landed;
  int lane;

  static __device__ __forceinline__ int row_of(int piece) { return piece % 2 * kPieceRows; }
  static __device__ __forceinline__ int col_of(int piece) { return piece / 2 * kSlabCols; }

  // Lane 0: gate and up of a piece into its slot, which must be free.
  __device__ __forceinline__ void load(int piece, int row, int col) const {
    PieceStorage::Slot& slot = storage.slots[piece % kSlots];
    uint64_t* barrier = &landed[piece % kSlots];
    mbarrier_arrive_expect(barrier, 2 * kPieceBytes);
    tma_load(args.gate, slot.gate, barrier, row + row_of(piece), col + col_of(piece));
    tma_load(args.up, slot.up, barrier, row + row_of(piece), col + col_of(piece));
  }

  // While the tile's products are under way: what the epilogue will need first. The last tile's
  // stores have long been read.
  __device__ __forceinline__ void load_first(int row, int col) const {
    if (lane == 0) {
      tma_store_wait_read<0>();
      for (int piece = 0; piece < kSlots; ++piece) load(piece, row, col);
      for (int piece = kSlots; Tuning::kPrefetch && piece < kPieces; ++piece) {
        tma_prefetch(args.gate, row + row_of(piece), col + col_of(piece));
        tma_prefetch(args.up, row + row_of(piece), col + col_of(piece));
      }
    }
    __syncwarp();
  }

  // Puts the gradients of a piece in the places of gate and up, and activated into its own.
  // grad(i): of element i of this thread's 16, two in each of the piece's eight 8x8 matrices.
  template <class Grad>
  __device__ __forceinline__ void differentiate(PieceStorage::Slot& slot, char* activated,
                                                Grad grad) const {
    // Four matrices lie side by side in each half; this lane's row in them.
    const int offsets[] = {swizzle128(lane % 8, lane / 8), swizzle128(lane % 8, 4 + lane / 8)};
    uint32_t gate[2][4], up[2][4], act_up[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      load_matrices(slot.gate + offsets[half], gate[half]);
      load_matrices(slot.up + offsets[half], up[half]);
    }
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      uint32_t& gate_pair = gate[i / 8][i / 2 % 4];
      uint32_t& up_pair = up[i / 8][i / 2 % 4];
      const float2 g = unpack_pair(gate_pair, T()), u = unpack_pair(up_pair, T());
      const ActivationResult act0 = fast_activate_with_derivative<kActivation>(g.x);
      const ActivationResult act1 = fast_activate_with_derivative<kActivation>(g.y);
      const float grad0 = grad(i), grad1 = grad(i + 1);
      gate_pair = pack_pair(through_derivative(kActivation, act0, grad0 * u.x),
                            through_derivative(kActivation, act1, grad1 * u.y), T());
      up_pair = pack_pair(grad0 * act0.value, grad1 * act1.value, T());
      act_up[i / 8][i / 2 % 4] = pack_pair(act0.value * u.x, act1.value * u.y, T());
    }
    // All lanes have read the piece: loads and stores of matrices are the whole warp's.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      store_matrices(slot.gate + offsets[half], gate[half]);
      store_matrices(slot.up + offsets[half], up[half]);
      if (args.store_activated) store_matrices(activated + offsets[half], act_up[half]);
    }
  }

  // The whole warp, with the accumulators of its rows of the tile.
  __device__ __forceinline__ void finish(const float (&d)[kWgmmaRegisters], int row,
                                         int col) const {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      // 1. The stores of the piece before the last have been read: its places are free.
      if (piece >= kLeaving && lane == 0) {
        tma_store_wait_read<kLeaving - 1>();
        const int next = piece - kLeaving + kSlots;
        if (next < kPieces) load(next, row, col);
      }

      // 2. Differentiate.
      PieceStorage::Slot& slot = storage.slots[piece % kSlots];
      char* activated = storage.activated[piece % kLeaving];
      mbarrier_wait(&landed[piece % kSlots], piece / kSlots % 2);
      __syncwarp();
      differentiate(slot, activated, [&](int i) {
        return d[piece / 2 * (kWgmmaRegisters / kSlabs) + i / 2 * 4 + piece % 2 * 2 + i % 2];
      });
      fence_async_proxy();
      __syncwarp();

      // 3. Store.
      if (lane == 0) {
        const int piece_row = row + row_of(piece), piece_col = col + col_of(piece);
        if (piece_row < args.num_tokens && piece_col < args.intermediate_size) {
          tma_store(args.grad_gate, slot.gate, piece_row, piece_col);
          tma_store(args.grad_up, slot.up, piece_row, piece_col);
          if (args.store_activated) tma_store(args.activated, activated, piece_row, piece_col);
        }
        tma_store_commit();
      }
    }
  }
};

// ---- kernel ----

template <class T, Activation kActivation, class Tuning>
__device__ __forceinline__ void multiply_tiles(const GatedLinearBackwardArguments& args,
                                               SharedStorage<Tuning>& shared,
                                               const ClusterPosition& position, int consumer) {
  constexpr int kCluster = Tuning::kCluster;
  const int num_tiles = args.tiles.num_token_tiles * args.tiles.num_col_tiles;
  const int num_stages = args.num_stages_per_tile;
  const int lane = threadIdx.x % kWarpSize;
  // The same in all lanes, and known to be.
  const int warp =
      __shfl_sync(kFullWarp, threadIdx.x / kWarpSize % (kWarpgroupThreads / kWarpSize), 0);
  const int consumer_warp = consumer * (kWarpgroupThreads / kWarpSize) + warp;
  const WarpPieces<T, kActivation, Tuning> pieces{args, shared.pieces[consumer_warp],
                                                  shared.landed[consumer_warp], lane};
  // Once the tensor cores have work and the last tile's pieces have had time to leave.
  const int load_stage = min(1, num_stages - 1);
  const auto release = [&](int stage) {
    if (lane < kCluster) mbarrier_arrive_remote(&shared.empty[stage], lane);
  };

  RingCursor<Tuning::kStages> ring;
  if (Tuning::kStaggered && consumer == 1 && num_stages >= Tuning::kStages) {
    mbarrier_wait(&shared.full[Tuning::kStages - 1], 0);
  }
  float d[kWgmmaRegisters];
#pragma unroll
  for (int i = 0; i < kWgmmaRegisters; ++i) d[i] = 0.0f;

  for (int tile = position.cluster; tile < num_tiles; tile += position.num_clusters) {
    const TilePosition at = tile_position<Tuning::kGroup>(tile, args.tiles);
    const int row = (at.token_tile * kCluster + position.rank) * kTileTokens +
                    consumer * kWgmmaRows + warp * kWarpRows;
    const int col = at.col_tile * kTileCols;

    // 1. D = grad_output down_weight. A stage goes back once the next one's products have been
    // issued, so that the tensor cores always have work.
    int last_stage = 0;
    for (int k = 0; k < num_stages; ++k, ring.advance()) {
      mbarrier_wait(&shared.full[ring.stage], ring.parity);
      const uint64_t a = wgmma_descriptor<WgmmaMajor::kDepth, kTileTokens>(
          shared.grad_output[ring.stage] + consumer * kWgmmaRows * kSwizzleRowBytes);
      const uint64_t b =
          wgmma_descriptor<WgmmaMajor::kCols, kStageDepth>(shared.down_weight[ring.stage]);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kStageDepth / kWgmmaDepth; ++step) {
        wgmma<T, WgmmaMajor::kCols>(d, a + step * kWgmmaDepthStep<WgmmaMajor::kDepth, kTileTokens>,
                                    b + step * kWgmmaDepthStep<WgmmaMajor::kCols, kStageDepth>,
                                    k > 0 || step > 0);
      }
      wgmma_commit();
      if (k == load_stage) pieces.load_first(row, col);
      wgmma_wait<1>();
      if (k > 0) release(last_stage);
      last_stage = ring.stage;
    }
    wgmma_wait<0>();
    wgmma_use(d);
    release(last_stage);

    // 2. Through the activation.
    pieces.finish(d, row, col);
  }
  if (lane == 0) tma_store_wait_all();
}

template <class T, Activation kActivation, class Tuning>
__global__ void __launch_bounds__(kGatedThreads, 1)
    gated_linear_backward_kernel(const __grid_constant__ GatedLinearBackwardArguments args) {
  if (!kHasHopperInstructions) return;  // never launched there
  using Shared = SharedStorage<Tuning>;
  run_gated_block<Shared, Tuning::kStages, Tuning::kCluster>(
      [](Shared& shared) {
        for (auto& warp : shared.landed) {
          for (uint64_t& barrier : warp) mbarrier_init(&barrier, 1);
        }
      },
      [&](Shared& shared, const ClusterPosition& position) {
        load_tiles<Tuning>(args, shared, position);
      },
      [&](Shared& shared, const ClusterPosition& position, int consumer) {
        multiply_tiles<T, kActivation, Tuning>(args, shared, position, consumer);
      });
}

// ---- launcher ----

template <class Tuning>
constexpr size_t kSharedBytes = sizeof(SharedStorage<Tuning>) + kSwizzleAlignment;

template <class T, Activation kActivation, class Tuning>
cudaError_t launch_gated_linear_backward(const GatedLinearBackwardParams& params, int num_sms,
                                         cudaStream_t stream) {
  GatedLinearBackwardArguments args{};
  args.store_activated = params.activated != nullptr;
  args.num_tokens = static_cast<int>(params.num_tokens);
  args.intermediate_size = static_cast<int>(params.intermediate_size);
  args.num_stages_per_tile = static_cast<int>(ceil_div<int64_t>(params.hidden_size, kStageDepth));
  args.tiles = tile_grid(params.num_tokens, params.intermediate_size, Tuning::kCluster, kTileCols);

  const auto piece = [&](const void* matrix, CUtensorMap* map) {
    return [=, &params] {
      if (matrix == nullptr) return cudaSuccess;
      return encode_tensor_map<T>(matrix, params.num_tokens, params.intermediate_size, kPieceRows,
                                  map);
    };
  };
  const auto kernel = gated_linear_backward_kernel<T, kActivation, Tuning>;
  return run_steps(
      [&] {
        return encode_tensor_map<T>(params.grad_output, params.num_tokens, params.hidden_size,
                                    kTileTokens, &args.grad_output);
      },
      [&] {
        return encode_tensor_map<T>(params.down_weight, params.hidden_size,
                                    params.intermediate_size, kStageDepth, &args.down_weight);
      },
      piece(params.gate, &args.gate), piece(params.up, &args.up),
      piece(params.grad_gate, &args.grad_gate), piece(params.grad_up, &args.grad_up),
      piece(params.activated, &args.activated),
      [&] { return allow_shared_memory(kernel, kSharedBytes<Tuning>); },
      [&] {
        return launch_gated_clusters(kernel, args, Tuning::kCluster, num_sms, kSharedBytes<Tuning>,
                                     stream);
      });
}

}  // namespace

bool gated_linear_backward_supported(const GatedLinearBackwardParams& params) {
  return gated_tiles_supported(params,
                               {params.grad_output, params.down_weight, params.gate, params.up,
                                params.grad_gate, params.grad_up, params.activated},
                               kTileCols, kSharedBytes<Sm90Tuning>);
}

cudaError_t gated_linear_backward(const GatedLinearBackwardParams& params, cudaStream_t stream) {
  if (!gated_linear_backward_supported(params)) return cudaErrorNotSupported;
  if (params.num_tokens == 0 || params.intermediate_size == 0) return cudaSuccess;
  DeviceInfo device;
  const cudaError_t status = current_device_info(&device);
  if (status != cudaSuccess) return status;
  return dispatch_activation(params.activation, [&](auto act) {
    constexpr Activation kActivation = decltype(act)::value;
    return params.dtype == DType::kFloat16
               ? launch_gated_linear_backward<__half, kActivation, Sm90Tuning>(
                     params, device.num_sms, stream)
               : launch_gated_linear_backward<__nv_bfloat16, kActivation, Sm90Tuning>(
                     params, device.num_sms, stream);
  });
}

}  // namespace omni_moe::cuda
