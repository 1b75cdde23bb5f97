// What the two Hopper GEMMs of the shared MLP have in common (gated_linear_sm90.cu
// and gated_linear_backward_sm90.cu): persistent clusters of blocks that make tiles of 128 tokens
// each, one warp that keeps a ring of stages filled by TMA, two warpgroups that multiply 64 tokens
// each, and three more warps for what may follow the product.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/hopper/mainloop.cuh"
#include "cuda/hopper/mbarrier.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/hopper/wgmma.cuh"
#include "cuda/mlp/gated_linear_tuning.h"
#include "omni_moe/cuda_plan.h"

namespace omni_moe::cuda {

inline constexpr int kTileTokens = GatedLinearTuning::kTileTokens;
static_assert(kCluster == GatedLinearTuning::kCluster);

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kConsumers = kTileTokens / kWgmmaRows;  // warpgroups
inline constexpr int kWarpgroupWarps = kWarpgroupThreads / kWarpSize;
inline constexpr int kConsumerWarps = kConsumers * kWarpgroupWarps;
// Together with the loading warp these are one warpgroup. There is no room for more: wgmma with 128
// accumulators wants at least 154 registers at launch, which a quarter of an SM has for three
// warps.
inline constexpr int kEpilogueWarps = kWarpgroupWarps - 1;
inline constexpr int kGatedThreads = (1 + kConsumers) * kWarpgroupThreads;
// Registers of a thread at launch; Tuning says how many consumers and the other warps have later.
inline constexpr int kLaunchRegisters = 168;

// Rows of D that one warp has in its registers.
inline constexpr int kWarpRows = kWgmmaRows / kWarpgroupWarps;

// Clusters that run together take 8 tiles of tokens (of 256) by about 8 of columns, which reads the
// fewest bytes from memory for 66 clusters.
inline constexpr int kStripeTiles = 8;

// ---- Device -------------------------------------------------------------------------------------

struct TileGrid {
  int num_token_tiles;  // of the tokens of all blocks of a cluster
  int num_col_tiles;
};

struct TilePosition {
  int token_tile;
  int col_tile;
};

// Tiles are taken column by column through stripes of kStripeTiles token tiles, so that what runs
// at the same time shares operands.
__device__ __forceinline__ TilePosition tile_position(int tile, const TileGrid& grid) {
  const int stripe_tiles = kStripeTiles * grid.num_col_tiles;
  const int first = tile / stripe_tiles * kStripeTiles;
  const int height = min(kStripeTiles, grid.num_token_tiles - first);
  const int within = tile % stripe_tiles;
  return {first + within % height, within / height};
}

struct ClusterPosition {
  int cluster;
  int num_clusters;
  int rank;  // of the block in its cluster

  __device__ __forceinline__ int first_token(const TilePosition& at) const {
    return (at.token_tile * kCluster + rank) * kTileTokens;
  }
};

// Every warp of a warpgroup calls this.
template <int kRegisters>
__device__ __forceinline__ void set_registers() {
  if constexpr (kRegisters > kLaunchRegisters) take_registers<kRegisters>();
  if constexpr (kRegisters < kLaunchRegisters) give_registers<kRegisters>();
}

// The multiplying warps' side of the ring, through the stages of one tile after the other.
template <class T, WgmmaMajor kMajorB, int kTileRowsB, class Tuning, class Shared>
class TileMainloop {
 public:
  // The second warpgroup starts late, so that one multiplies while the other works at its results.
  __device__ __forceinline__ TileMainloop(Shared& shared, int num_stages, int consumer)
      : shared_(shared),
        num_stages_(num_stages),
        row_byte_(consumer * kWgmmaRows * kSwizzleRowBytes) {
    if (consumer == 1 && num_stages >= Tuning::kStages) {
      mbarrier_wait(&shared.full[Tuning::kStages - 1], 0);
    }
  }

  // d = a(stage) b(stage), summed over the tile's stages.
  template <class A, class B>
  __device__ __forceinline__ void run(float (&d)[kWgmmaRegisters], A a_tile, B b_tile) {
    run_mainloop<T, kMajorB, kTileRowsB>(
        shared_, num_stages_, ring_, d, [&](int stage) { return a_tile(stage) + row_byte_; },
        b_tile);
  }

 private:
  Shared& shared_;
  const int num_stages_;
  const int row_byte_;  // of the warpgroup's rows in a tile of A
  RingCursor<Tuning::kStages> ring_;
};

// Runs a block: load(shared, position) in one thread, multiply(shared, position, consumer) in the
// consumer warpgroups, and finish(shared, position, epilogue) in kEpilogueWarps warps. Shared has
// barriers full[kStages], for copies into a stage, and empty[kStages], for the consumer warps of
// the cluster that have read it; init(shared) initialises further ones.
template <class Shared, class Tuning, class Init, class Load, class Multiply, class Finish>
__device__ __forceinline__ void run_gated_block(Init init, Load load, Multiply multiply,
                                                Finish finish) {
  static_assert(kConsumers * Tuning::kConsumerRegisters + Tuning::kOtherRegisters <=
                    (kConsumers + 1) * kLaunchRegisters,
                "more registers than the block has");
  extern __shared__ char dynamic_shared[];
  const uint32_t misaligned = shared_address(dynamic_shared) % kSwizzleAlignment;
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared +
                                            (kSwizzleAlignment - misaligned) % kSwizzleAlignment);
  const ClusterPosition position{static_cast<int>(blockIdx.x) / kCluster,
                                 static_cast<int>(gridDim.x) / kCluster,
                                 static_cast<int>(blockIdx.x) % kCluster};
  // The shuffle tells the compiler that the number is the same in all lanes.
  const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);

  // 1. Barriers of all blocks stand before one copies to another.
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tuning::kStages; ++stage) {
      mbarrier_init(&shared.full[stage], 1);
      mbarrier_init(&shared.empty[stage], kConsumerWarps * kCluster);
    }
    init(shared);
    mbarrier_init_fence();
  }
  __syncthreads();
  cluster_sync();
  wait_for_previous_kernel();

  // 2. Load, multiply, or finish.
  if (warp < kConsumerWarps) {
    set_registers<Tuning::kConsumerRegisters>();
    multiply(shared, position, warp / kWarpgroupWarps);
  } else {
    set_registers<Tuning::kOtherRegisters>();
    if (warp > kConsumerWarps) {
      finish(shared, position, warp - kConsumerWarps - 1);
    } else if (threadIdx.x % kWarpSize == 0) {
      load(shared, position);
    }
  }

  // 3. Shared memory stays until the other blocks have sent their last copies and arrivals.
  __syncwarp();
  cluster_sync();
}

// ---- Host ---------------------------------------------------------------------------------------

template <class Arguments>
cudaError_t launch_gated_clusters(void (*kernel)(Arguments), const Arguments& args,
                                  const GatedLinearPlan& plan, size_t shared_bytes,
                                  cudaStream_t stream) {
  LaunchOptions options{dim3(plan.num_clusters * kCluster), kGatedThreads};
  options.shared_bytes = shared_bytes;
  options.cluster_blocks = kCluster;
  options.is_early = plan.device.has_early_launch;
  return launch_kernel(kernel, options, stream, args);
}

inline TileGrid tile_grid(const GatedLinearPlan& plan) {
  return {plan.num_token_tiles, plan.num_col_tiles};
}

}  // namespace omni_moe::cuda
