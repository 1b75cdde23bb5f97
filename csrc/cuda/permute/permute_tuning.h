// Constants of the permutation's kernels that their plans read. Needs no CUDA toolkit.
#pragma once

#include <cstdint>

namespace omni_moe::cuda {

struct ExpertRowsTuning {
  static constexpr int kMaxExperts = 4096;  // counts of a block lie in shared memory
  // A block is a warp, which takes its pairs in order. The workspace is E words a block; with as
  // many pairs as experts it is never larger than the ids.
  static constexpr int64_t kMinPairsPerBlock = 256;
};

struct PermuteTuning {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;  // of 64 registers
  // Rows that a place in the grid looks at for zeros, at least: a grid over few tokens still fills
  // the device where capacity leaves many rows empty.
  static constexpr int64_t kRowsPerPlace = 16;
};

}  // namespace omni_moe::cuda
