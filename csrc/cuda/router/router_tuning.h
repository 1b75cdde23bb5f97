// Constants of the router's kernels that their plans read. Needs no CUDA toolkit.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/common/operands.h"

namespace omni_moe::cuda {

struct RouterWarpTuning {
  static constexpr int kWarpsPerBlock = 4;
  static constexpr int kMaxExperts = 128;  // per token
  static constexpr int kMaxAxis = 1024;
};

struct RouterUnsortedTuning {
  static constexpr int kWarpsPerBlock = 4;
  static constexpr int kMaxAxis = 1024;
  // A block per token answers sooner while an SM has only a token or two.
  static constexpr int kMinTokensPerSm = 2;
  // Of a token's lists in shared memory.
  static constexpr size_t token_bytes(int64_t num_rows, int64_t num_cols, bool has_mass) {
    return round_up<size_t>(num_rows * 12 + num_cols * (has_mass ? 10 : 6), 16);
  }
};

struct RouterBlockTuning {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;         // at 64 registers; the workspace serves as many
  static constexpr size_t kScratchBytes = 1280;  // of a block, beside its lists
  static constexpr int64_t kMaxWorkspace = int64_t{256} << 20;
  // How many entries are listed before they are sorted. Slack above K saves the last probes of the
  // bisection.
  OMNI_MOE_HOST_DEVICE static constexpr int64_t entry_capacity(int64_t k) {
    return k + k / 32 + 64;
  }
};

struct RouterBackwardTuning {
  static constexpr int kManyWarps = 8;  // per token, from kManyPairs pairs on
  static constexpr int64_t kManyPairs = 129;
  static constexpr int kTokensPerBlock = 4;      // of one warp each
  static constexpr int kBlocksPerSm = 4;         // with the accumulators in the workspace
  static constexpr size_t kScratchBytes = 1024;  // of a block, beside its accumulators
  static constexpr int64_t kMaxWorkspace = int64_t{64} << 20;
};

struct BatchNormTuning {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 2;  // 128 registers; the device must hold a grid at once
  static constexpr int kPanelColumns = 32;
  // Rows that a block reads at once, with vectors of `vec` columns.
  static constexpr int slots(int vec) { return kThreads / (kPanelColumns / vec); }
  // Rows of a thread in flight, or in registers: 128 bytes of vectors.
  static constexpr int forward_rows(int vec) { return vec == 1 ? 16 : 8; }
  static constexpr int backward_rows(int vec) { return vec == 1 ? 8 : 4; }  // of two operands each
};

struct TokenNormTuning {
  static constexpr int kWarpsPerBlock = 8;  // a warp for each axis of a token
};

struct RouterLogitsTuning {
  static constexpr int kTileTokens = 64;
  static constexpr int kPanelCols = 64;
  static constexpr int kCluster = 2;
  static constexpr size_t kMaxSharedBytes = 227 * 1024;  // what a block of Hopper can have
  // Blocks of token tiles by panels, the smallest first.
  struct Block {
    int token_tiles;
    int panels;
  };
  static constexpr Block kBlocks[] = {{1, 1}, {1, 2}, {2, 2}, {2, 3}};

  static constexpr int64_t panels_of(int64_t num_rows, int64_t num_cols) {
    return ceil_div<int64_t>(num_rows, kPanelCols) + ceil_div<int64_t>(num_cols, kPanelCols);
  }
  static constexpr int64_t token_blocks(int64_t num_tokens, int token_tiles) {
    return ceil_div<int64_t>(num_tokens, int64_t{kCluster} * token_tiles * kTileTokens) * kCluster;
  }
};

}  // namespace omni_moe::cuda
