// Which kernel an expert pass runs, as a pure function of shape and device; forward and backward
// are the same pass (token_pass.cuh). Host code that needs no CUDA toolkit: a CPU-only build can be
// asked too.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/common/device_info.h"
#include "cuda/experts/bands/band_plan.h"

namespace omni_moe::cuda {

enum class TokenPassStrategy : int8_t {
  kTwoPhase,  // a block per token or part of one: dot products by warp, then sums by column
  kFused,     // a block per token, 16 bytes of the row per thread
  kL2Tiled,   // one tile of columns after the other, all tokens in each: for rows used again
  kBands,     // whole rows and columns of the grid on tensor cores: for many experts per token
};

struct ExpertDeviceInfo : DeviceInfo {
  int l2_bytes = 0;
};

struct TokenPassShape {
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t num_experts;
  int64_t num_experts_per_token;
  size_t element_size;
  bool is_aligned;       // every row of every operand starts at a multiple of 16 bytes
  int64_t num_cols = 0;  // C of the grid of experts, E = R * C; 0: ids have no grid
};

struct TokenPassPlan {
  TokenPassStrategy strategy;
  int tile_bytes;           // kL2Tiled: 256 or 512
  int threads;              // kTwoPhase: per block
  int num_splits;           // kTwoPhase: blocks per token; above 1 a second stage adds their sums
  int64_t pairs_per_split;  // kTwoPhase
  BandPlan bands;           // kBands
};

TokenPassPlan plan_token_pass(const TokenPassShape& shape, const ExpertDeviceInfo& device);

// The same with the strategy given, for tests and measurements. supports() says whether the
// strategy takes this shape at all.
TokenPassPlan plan_token_pass(const TokenPassShape& shape, const ExpertDeviceInfo& device,
                              TokenPassStrategy strategy);
bool supports(TokenPassStrategy strategy, const TokenPassShape& shape);

const char* name(TokenPassStrategy strategy);

// fp32 words that a pass of this plan keeps in the workspace: the partial sums [T, num_splits, H]
// of kTwoPhase, the partial dots [tiles, T * K] and coefficients [T * K] of kL2Tiled, or the lists
// and partial outputs of kBands.
size_t token_pass_workspace_floats(const TokenPassShape& shape, const TokenPassPlan& plan);

}  // namespace omni_moe::cuda
