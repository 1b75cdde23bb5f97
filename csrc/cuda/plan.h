// Which kernel an expert pass runs, as a pure function of shape and device. Host code that needs no
// CUDA toolkit: a CPU-only build can be asked too.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/device_info.h"

namespace omni_moe::cuda {

enum class TokenPassStrategy : int8_t {
  kPhased,   // a block per token (or part of one): scores by warp, then sums by column
  kColumns,  // a block per token, 16 bytes of the row per thread
  kRing,     // a warp per token; row pairs stream through a ring in shared memory
  kSlabs,    // a slab of columns of all tokens after the other: tables past L2
};

// How the ring's rows reach shared memory.
enum class RowCopy : int8_t {
  kAsync,  // cp.async, 16 bytes per lane (sm_80)
  kBulk,   // cp.async.bulk, a row per instruction (sm_90)
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
  bool is_aligned;        // every row of every operand starts at a multiple of 16 bytes
  int num_scored_tables;  // 1 in the forward (up), 2 in the backward (up and down)
};

struct TokenPassPlan {
  TokenPassStrategy strategy;
  RowCopy copy;             // kRing
  int chunks_per_lane;      // kRing: 16-byte loads per row and lane
  int slab_bytes;           // kSlabs: 256 or 512
  int threads;              // kPhased: per block
  int num_splits;           // kPhased: blocks per token; above 1 a second stage adds their sums
  int64_t pairs_per_split;  // kPhased
};

TokenPassPlan plan_token_pass(const TokenPassShape& shape, const ExpertDeviceInfo& device);

// The same with the strategy given, for tests and measurements. `supported` says whether it takes
// this shape at all.
TokenPassPlan plan_token_pass(const TokenPassShape& shape, const ExpertDeviceInfo& device,
                              TokenPassStrategy strategy);
bool supports(TokenPassStrategy strategy, const TokenPassShape& shape);

const char* name(TokenPassStrategy strategy);
const char* name(RowCopy copy);

// fp32 words that a pass of this plan keeps in the workspace: the partial sums [T, num_splits, H]
// of kPhased, or the partial scores [num_tables * slabs, T * K] and coefficients [T * K] of kSlabs.
size_t token_pass_workspace_floats(const TokenPassShape& shape, const TokenPassPlan& plan);

}  // namespace omni_moe::cuda
