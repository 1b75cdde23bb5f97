// How the kernel of router_logits_sm90.cu lies over tokens and columns: the shape of its blocks,
// what they keep in shared memory, and the panels of columns that its warpgroups own.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/common/reduce.cuh"
#include "cuda/hopper/mainloop.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/hopper/wgmma.cuh"
#include "cuda/router/router_tuning.h"
#include "omni_moe/batch_norm.h"

namespace omni_moe::cuda::router_logits {

inline constexpr int kTileTokens = RouterLogitsTuning::kTileTokens;
static_assert(kTileTokens == kWgmmaRows && kCluster == RouterLogitsTuning::kCluster);
inline constexpr int kPanelCols = RouterLogitsTuning::kPanelCols;
inline constexpr int kTileThreads = 128;  // a warpgroup
inline constexpr int kTileWarps = kTileThreads / kWarpSize;
inline constexpr int kRegisters = kTileTokens * kPanelCols / kTileThreads;
inline constexpr int kWarpRows = kTileTokens / kTileWarps;
inline constexpr int kTileBytes = kTileTokens * kSwizzleRowBytes;  // of x or a gate in one stage
static_assert(kTileTokens == kPanelCols);

// kTokenTiles by kPanels warpgroups.
template <int kTokenTiles_, int kPanels_>
struct Block {
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kPanels = kPanels_;
  static constexpr int kTokens = kTokenTiles * kTileTokens;
  static constexpr int kConsumerWarps = kTokenTiles * kPanels * kTileWarps;
  static constexpr int kThreads = (kConsumerWarps + 1) * kWarpSize;  // the last warp loads
  static constexpr int kStageBytes = (kTokenTiles + kPanels) * kTileBytes;
  static constexpr int kStages = std::min(16, 200 * 1024 / kStageBytes);
  // Pairs of columns whose moments over the batch one warp merges; 32 / kColumnPairs lanes share
  // each.
  static constexpr int kColumnPairs = kPanelCols / 2 / (kTokenTiles * kTileWarps);
};

struct Arguments {
  CUtensorMap x;
  CUtensorMap gates[2];   // x, y
  CUtensorMap normed[2];  // stores
  BatchNormForwardParams norm;
  int num_tokens;
  float token_share;  // 1 / T
  int num_stages;     // ceil(H / 64)
  int num_panels_x;   // of gate_x; those of gate_y come next
  int num_panels;
};

// Moments of a panel's columns in the block, then what they are over the batch.
template <class B>
struct PanelStatistics {
  float2 moments[B::kTokenTiles * kTileWarps][kPanelCols];  // mean, Σ (x - mean)² of a warp's rows
  float2 scales[kPanelCols];                                // mean, 1 / sqrt(var + eps)
};

template <class B>
struct SharedStorage {
  char x[B::kStages][B::kTokenTiles][kTileBytes];
  char gates[B::kStages][B::kPanels][kTileBytes];
  PanelStatistics<B> statistics[B::kPanels];
  uint64_t full[B::kStages];   // the stage's tiles have landed here
  uint64_t empty[B::kStages];  // all consumers of the cluster have read the stage
};

// 64 columns of one axis.
struct Panel {
  int index;
  bool is_y;
  int col;    // the first in its axis
  int width;  // of the axis

  __device__ __forceinline__ Panel(const Arguments& args, int index)
      : index(index),
        is_y(index >= args.num_panels_x),
        col((is_y ? index - args.num_panels_x : index) * kPanelCols),
        width(static_cast<int>(is_y ? args.norm.num_cols : args.norm.num_rows)) {}
};

}  // namespace omni_moe::cuda::router_logits
