// A table of experts as its bands lie in memory: one TMA descriptor for grid rows, where the
// experts of a band follow each other, and one for grid columns, where they are C apart. A copy
// moves some experts of one band by 64 of their elements; places past the band's end come as zeros.
#pragma once

#include "cuda/experts/bands/bands.h"
#include "cuda/hopper/tma.cuh"

namespace omni_moe::cuda {

struct BandTable {
  CUtensorMap rows;
  CUtensorMap cols;

  __device__ __forceinline__ void load(const BandPlan& plan, int band, int place, int element,
                                       void* tile, uint64_t* barrier) const {
    const bool is_row = band < plan.num_rows;
    const int row = is_row ? band : place;
    const int col = is_row ? place : band - plan.num_rows;
    tma_load_grid(is_row ? rows : cols, tile, barrier, row, col, element);
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

inline constexpr int kBandConsumers = BandTuning::kTileTasks / 64;  // warpgroups
inline constexpr int kBandConsumerWarps = kBandConsumers * 4;
inline constexpr int kBandWarpRows = 16;  // tasks whose results one warp has in its registers

}  // namespace omni_moe::cuda
