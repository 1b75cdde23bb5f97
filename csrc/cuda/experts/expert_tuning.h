// Constants of the expert and schedule kernels: the numbers a port to another chip would revisit.
#pragma once

namespace omni_moe::cuda {

// Token pass in two phases (scores by warp, then columns by thread): any shape, any alignment.
struct PhasedTuning {
  static constexpr int kThreads = 128;          // one token per block, several blocks per SM
  static constexpr int kBlocksPerSm = 5;        // 96 registers per thread; 64 spill
  static constexpr int kDecodeThreads = 512;    // few tokens: one block has an SM to itself
  static constexpr int kDecodeBlocksPerSm = 1;  // 128 registers per thread
  static constexpr int kDecodeTokensPerSm = 1;  // no more blocks than this per SM: decode blocks
  static constexpr int kChunksPerLane = 4;      // 16-byte loads per row and lane in phase one
  static constexpr int kScalarChunksPerLane = 8;
  static constexpr int kScoreRows = 2;         // rows in flight per warp, phase one
  static constexpr int kColumnRows = 8;        // rows in flight per thread, phase two
  static constexpr int kMaxPairs = 4096;       // pairs of one block: 8 bytes of shared memory each
  static constexpr int kMinSplitPairs = 32;    // a token's pairs are split no finer than this
  static constexpr int kSplitBlocksPerSm = 1;  // a token is split while there are SMs to spare
};

// Token pass with a block per token and 16 bytes of the row per thread. kPairs pairs of rows are in
// flight per block, in 8 registers per thread and pair.
template <int kMaxRowBytes>
struct ColumnsTuning;
template <>
struct ColumnsTuning<2048> {
  static constexpr int kThreads = 128;
  static constexpr int kPairs = 16;
  static constexpr int kBlocksPerSm = 3;  // 168 registers per thread
};
template <>
struct ColumnsTuning<4096> {
  static constexpr int kThreads = 256;
  static constexpr int kPairs = 8;
  static constexpr int kBlocksPerSm = 2;  // 128 registers per thread
};
// Token pass slab by slab, for rows that are used again. A warp-wide load covers
// 512 bytes, of one row or of two.
template <int kSlabBytes>
struct SlabTuning;
template <>
struct SlabTuning<256> {
  static constexpr int kBytes = 256;
  static constexpr int kLoads = 8;  // per lane in flight: 16 pairs per warp
  static constexpr int kWarps = 4;
  static constexpr int kBlocksPerSm = 7;  // 72 registers per thread; 64 spill
};
template <>
struct SlabTuning<512> {
  static constexpr int kBytes = 512;
  static constexpr int kLoads = 8;
  static constexpr int kWarps = 4;
  static constexpr int kBlocksPerSm = 8;
};
struct SlabPlanTuning {
  static constexpr int kMinTokensPerSm = 6;  // fewer, and all slabs are in work at once
  static constexpr int kMinSlabs = 2;
  // Slabs are 512 bytes wide, not 256, where one of all rows fits this share of L2 and so many
  // waves of blocks are left. Wide / narrow in µs, H 1024: T4096 E4096 K16 39.4 / 41.5, but T1024
  // E4096 K32 (one wave) 26.4 / 24.9, H 2048 T4096 E16384 K16 86.5 / 82.6 (H200).
  static constexpr double kWideL2Share = 1.0 / 16;
  static constexpr int kMinWideWaves = 2;
};

struct ScheduleTuning {
  static constexpr int kThreads = 256;
  static constexpr int kMaxCountingPairs = 1
                                           << 20;  // beyond: radix sort, lost in the gather's time
  static constexpr int kMaxCountingMean = 64;      // mean pairs per expert; beyond: radix sort
  static constexpr int kHugeSegment = 1024;        // counted by comparison up to here
  static constexpr int kHugeBlocksPerSm = 4;
};

struct WeightGradTuning {
  static constexpr int kThreads = 128;
  static constexpr int kRows = 4;            // pairs in flight per warp
  static constexpr int kTargetPairs = 32;    // pairs per warp, where experts are short
  static constexpr int kMaxExperts = 16;     // experts per warp, where most are idle
  static constexpr int kMinPartPairs = 128;  // longer segments are cut into parts
  static constexpr int kMaxParts = 4096;     // bounds the workspace: parts of H fp32, two tables
  static constexpr int kPartBlocksPerSm = 2;
  static constexpr int kCombineThreads = 1024;
};

}  // namespace omni_moe::cuda
