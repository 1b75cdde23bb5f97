// Constants of the gated linear kernels that their plans read. Needs no CUDA toolkit.
#pragma once

#include <cstddef>

namespace omni_moe::cuda {

struct GatedLinearTuning {
  static constexpr int kTileTokens = 128;  // of a block
  static constexpr int kCluster = 2;       // blocks that share tiles of the weights
  static constexpr int kForwardTileCols = 128;
  static constexpr int kBackwardTileCols = 256;
  static constexpr size_t kMaxSharedBytes = 227 * 1024;  // what a block of Hopper can have
};

}  // namespace omni_moe::cuda
