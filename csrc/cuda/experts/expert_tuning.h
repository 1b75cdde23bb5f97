// Constants of the expert and schedule kernels: the numbers a port to another chip would revisit.
#pragma once

namespace omni_moe::cuda {

// Token pass in two phases, for any shape and alignment: dot products by warp, then sums by column.
struct TwoPhaseTuning {
  static constexpr int kThreads = 128;          // one token per block, several blocks per SM
  static constexpr int kBlocksPerSm = 5;        // 96 registers per thread; 64 spill
  static constexpr int kDecodeThreads = 512;    // few tokens: one block has an SM to itself
  static constexpr int kDecodeBlocksPerSm = 1;  // 128 registers per thread
  static constexpr int kDecodeTokensPerSm = 1;  // no more blocks than this per SM: decode blocks
  static constexpr int kChunksPerLane = 4;      // 16-byte loads per row and lane in phase one
  static constexpr int kScalarChunksPerLane = 8;
  static constexpr int kKeyRows = 2;           // rows in flight per warp, phase one
  static constexpr int kValueRows = 8;         // rows in flight per thread, phase two
  static constexpr int kMaxPairs = 4096;       // pairs of one block: 8 bytes of shared memory each
  static constexpr int kMinSplitPairs = 32;    // a token's pairs are split no finer than this
  static constexpr int kSplitBlocksPerSm = 1;  // a token is split while there are SMs to spare
};

// Token pass with a block per token and 16 bytes of the row per thread. kPairs pairs of rows are in
// flight per block, in 8 registers per thread and pair.
template <int kMaxRowBytes>
struct FusedTuning;
template <>
struct FusedTuning<2048> {
  static constexpr int kThreads = 128;
  static constexpr int kPairs = 16;
  static constexpr int kBlocksPerSm = 3;  // 168 registers per thread
};
template <>
struct FusedTuning<4096> {
  static constexpr int kThreads = 256;
  static constexpr int kPairs = 8;
  static constexpr int kBlocksPerSm = 2;  // 128 registers per thread
};

// Token pass tile by tile, for rows that are used again. A load of the whole warp covers 512 bytes,
// of one row or of two.
template <int kTileBytes>
struct L2TileTuning;
template <>
struct L2TileTuning<256> {
  static constexpr int kBytes = 256;
  static constexpr int kLoads = 8;  // per lane in flight: 16 pairs per warp
  static constexpr int kWarps = 4;
  static constexpr int kBlocksPerSm = 7;  // 72 registers per thread; 64 spill
};
template <>
struct L2TileTuning<512> {
  static constexpr int kBytes = 512;
  static constexpr int kLoads = 8;
  static constexpr int kWarps = 4;
  static constexpr int kBlocksPerSm = 8;
};
struct L2TilePlanTuning {
  static constexpr int kMinTokensPerSm = 6;  // with fewer, all tiles are in work at once
  static constexpr int kMinTiles = 2;
  // Tiles are 512 bytes wide, not 256, where one tile of all rows fits this share of L2 and so many
  // waves of blocks are left. Wide against narrow tiles took, in µs on an H200 with H 1024, 39.4
  // and 41.5 for T4096 E4096 K16, but 26.4 and 24.9 for T1024 E4096 K32 (one wave), and with H
  // 2048 86.5 and 82.6 for T4096 E16384 K16.
  static constexpr double kWideL2Share = 1.0 / 16;
  static constexpr int kMinWideWaves = 2;
};

struct ScheduleTuning {
  static constexpr int kThreads = 256;
  // More pairs, or more pairs per expert on average, are sorted by radix: the sort then takes
  // little beside the gather.
  static constexpr int kMaxCountingPairs = 1 << 20;
  static constexpr int kMaxCountingMean = 64;
  static constexpr int kHugeSegment = 1024;  // segments up to here are ordered by comparison
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
