// Which kernel an expert pass runs, as a pure function of shape and device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/check.h"

namespace omni_moe::cuda {

enum class TokenPassStrategy : int8_t {
  kPhased,  // a block per token (or part of one): scores by warp, then sums by column
  kRing,    // a warp per token; row pairs stream through a ring in shared memory
};

// How the ring's rows reach shared memory.
enum class RowCopy : int8_t {
  kAsync,  // cp.async, 16 bytes per lane (sm_80)
  kBulk,   // cp.async.bulk, a row per instruction (sm_90)
};

struct TokenPassShape {
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t num_experts_per_token;
  size_t element_size;
  bool is_aligned;  // every row of every operand starts at a multiple of 16 bytes
};

struct TokenPassPlan {
  TokenPassStrategy strategy;
  RowCopy copy;            // kRing
  int chunks_per_lane;     // kRing: 16-byte loads per row and lane
  int threads;             // kPhased: per block
  int num_splits;          // kPhased: blocks per token; above 1 a second stage adds their sums
  int64_t pairs_per_split; // kPhased
};

TokenPassPlan plan_token_pass(const TokenPassShape& shape, const DeviceInfo& device);

// Bytes of the fp32 partial sums [T, num_splits, H] that a pass of this shape may need, whatever
// the alignment.
size_t token_pass_workspace_size(const TokenPassShape& shape, const DeviceInfo& device);

}  // namespace omni_moe::cuda
