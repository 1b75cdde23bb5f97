// Constants of the top-k router's kernels that their plans read. Needs no CUDA toolkit.
#pragma once

#include <cstdint>

namespace omni_moe::cuda {

struct TopKRouterTuning {
  static constexpr int kMaxExperts = 4096;
};

struct TopKWarpTuning {
  static constexpr int kWarpsPerBlock = 8;
  static constexpr int kBlocksPerSm = 4;    // of 64 registers: 4096 tokens on 132 SMs are one wave
  static constexpr int kMaxExperts = 1024;  // 32 logits a lane
  static constexpr int kMaxExpertsPerToken = 32;  // a lane holds one
  static constexpr int kMaxGroups = 32;           // a lane holds one
};

// Threads are those of the block sort, RouterBlockTuning::kThreads.
struct TopKBlockTuning {
  static constexpr int kBlocksPerSm = 2;  // at 4096 experts, 81 KB of shared memory each
};

struct TopKBackwardTuning {
  static constexpr int kMaxWarps = 4;
  static constexpr int kMaxSharedBytes = 32 * 1024;  // the gradients of a token in fp32, per warp
};

struct ExpertSlotsTuning {
  // A block is a warp, which takes its pairs in order. The workspace is E words a block; with as
  // many pairs as experts it is never larger than the ids.
  static constexpr int64_t kMinPairsPerBlock = 256;
};

}  // namespace omni_moe::cuda
