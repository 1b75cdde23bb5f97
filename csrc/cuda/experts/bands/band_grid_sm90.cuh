// A table of experts as its bands lie in memory: one TMA descriptor for grid rows, where the
// experts of a band follow each other, and one for grid columns, where they are C apart. A copy
// moves some experts of one band by 64 of their elements; places past the band's end come as zeros.
#pragma once

#include "cuda/experts/bands/bands.h"
#include "cuda/hopper/mainloop.cuh"
#include "cuda/hopper/tma.cuh"

namespace omni_moe::cuda {

struct BandTable {
  CUtensorMap rows;
  CUtensorMap cols;

  // Calls use(map, row, col) with the map of the band's direction and the expert at one of its
  // places.
  template <class Use>
  __device__ __forceinline__ void at(const BandPlan& plan, int band, int place, Use use) const {
    const bool is_row = band < plan.num_rows;
    const int row = is_row ? band : place;
    const int col = is_row ? place : band - plan.num_rows;
    use(is_row ? rows : cols, row, col);
  }

  // Into both blocks of the cluster.
  __device__ __forceinline__ void load(const BandPlan& plan, int band, int place, int element,
                                       void* tile, uint64_t* barrier) const {
    constexpr uint16_t kBoth = 0b11;
    at(plan, band, place, [&](const CUtensorMap& map, int row, int col) {
      tma_load_grid_multicast(map, tile, barrier, row, col, element, kBoth);
    });
  }
  __device__ __forceinline__ void store(const BandPlan& plan, int band, int place, int element,
                                        const void* tile) const {
    at(plan, band, place, [&](const CUtensorMap& map, int row, int col) {
      tma_store_grid(map, tile, row, col, element);
    });
  }
  __device__ __forceinline__ void add(const BandPlan& plan, int band, int place, int element,
                                      const void* tile) const {
    at(plan, band, place, [&](const CUtensorMap& map, int row, int col) {
      tma_add_grid(map, tile, row, col, element);
    });
  }
  __device__ __forceinline__ void prefetch(const BandPlan& plan, int band, int place,
                                           int element) const {
    at(plan, band, place, [&](const CUtensorMap& map, int row, int col) {
      tma_prefetch_grid(map, row, col, element);
    });
  }
};

template <class T>
cudaError_t encode_band_table(const void* table, const BandPlan& plan, int64_t hidden_size,
                              int tile_experts, BandTable* out) {
  return run_steps(
      [&] {
        return encode_grid_map<T>(table, plan.num_rows, plan.num_cols, hidden_size, 1, tile_experts,
                                  &out->rows);
      },
      [&] {
        return encode_grid_map<T>(table, plan.num_rows, plan.num_cols, hidden_size, tile_experts, 1,
                                  &out->cols);
      });
}

inline constexpr int kBandBlockTasks = BandTuning::kTileTasks / kCluster;
inline constexpr int kBandConsumers = kBandBlockTasks / kWgmmaRows;  // warpgroups
inline constexpr int kBandConsumerWarps = kBandConsumers * 4;
inline constexpr int kBandWarpRows = 16;  // tasks whose results one warp has in its registers

// The task of a tile that has row `row` of the 128 of block `rank`.
__device__ __forceinline__ int task_of_row(int row, int rank) {
  return (row / kWgmmaRows * kCluster + rank) * kWgmmaRows + row % kWgmmaRows;
}

__device__ __forceinline__ int cluster_rank() { return static_cast<int>(blockIdx.x % kCluster); }
__device__ __forceinline__ int first_tile() { return static_cast<int>(blockIdx.x / kCluster); }
__device__ __forceinline__ int tile_step() { return static_cast<int>(gridDim.x / kCluster); }

// Of one of the two multiplying warpgroups; barrier 0 is __syncthreads'.
__device__ __forceinline__ void sync_warpgroup(int consumer) {
  if (consumer == 0) {
    asm volatile("bar.sync 1, 128;" ::: "memory");
  } else {
    asm volatile("bar.sync 2, 128;" ::: "memory");
  }
}

// Gives a stage back to the loaders of both blocks, which write to both.
__device__ __forceinline__ void release_stage(uint64_t* empty, int lane) {
  if (lane < kCluster) mbarrier_arrive_remote(empty, lane);
}

}  // namespace omni_moe::cuda
