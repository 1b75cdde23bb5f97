// Which kernel a token pass runs, as a pure function of shape and device; forward and backward are
// the same pass (token_pass.cuh). Needs no CUDA toolkit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "omni_moe/cuda_plan.h"

namespace omni_moe::cuda {

struct TokenPassShape {
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t num_experts;
  int64_t num_experts_per_token;
  size_t element_size;
  bool is_aligned;       // every row of every operand starts at a multiple of 16 bytes
  int64_t num_cols = 0;  // C of the grid of experts, E = R * C; 0: ids have no grid
};

TokenPassShape token_pass_shape(const ExpertForwardParams& params);
TokenPassShape token_pass_shape(const ExpertBackwardParams& params);

TokenPassPlan plan_token_pass(const TokenPassShape& shape, const DeviceInfo& device);

// The same with the strategy given, for tests and measurements. supports() says whether the
// strategy takes this shape at all.
TokenPassPlan plan_token_pass(const TokenPassShape& shape, const DeviceInfo& device,
                              TokenPassStrategy strategy);
bool supports(TokenPassStrategy strategy, const TokenPassShape& shape);

const char* name(TokenPassStrategy strategy);

// fp32 words that a pass of this plan keeps in the workspace: the partial sums [T, num_splits, H]
// of kTwoPhase, the partial dots [tiles, T * K] and coefficients [T * K] of kL2Tiled, or the lists
// and partial outputs of kBands.
size_t token_pass_workspace_floats(const TokenPassShape& shape, const TokenPassPlan& plan);

SchedulePlan plan_schedule(int64_t num_pairs, int64_t num_experts);

// The plans of whole ops around a given token pass, and whether their kernels take the operands.
// With a radix sort, sort_storage_bytes is what CUB asks for.
bool is_supported(const ExpertForwardParams& params);
bool is_supported(const ExpertBackwardParams& params);
ExpertForwardPlan plan_expert_forward(const ExpertForwardParams& params, const DeviceInfo& device,
                                      const TokenPassPlan& token_pass);
ExpertBackwardPlan plan_expert_backward(const ExpertBackwardParams& params,
                                        const DeviceInfo& device, const TokenPassPlan& token_pass,
                                        size_t sort_storage_bytes);

}  // namespace omni_moe::cuda
