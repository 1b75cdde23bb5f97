// The plan of the CUDA expert passes as data: a pure function, so no GPU is needed.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/experts/expert_plan.h"

namespace omni_moe::cuda {
namespace {

ExpertDeviceInfo h200() {
  ExpertDeviceInfo device;
  device.num_sms = 132;
  device.compute_capability = 90;
  device.shared_bytes_per_sm = 233472;
  device.shared_bytes_per_block = 232448;
  device.l2_bytes = 62914560;
  return device;
}

ExpertDeviceInfo a100() {
  ExpertDeviceInfo device;
  device.num_sms = 108;
  device.compute_capability = 80;
  device.shared_bytes_per_sm = 167936;
  device.shared_bytes_per_block = 166912;
  device.l2_bytes = 41943040;
  return device;
}

TokenPassShape bf16(int64_t num_tokens, int64_t hidden_size, int64_t num_experts, int64_t k) {
  return {num_tokens, hidden_size, num_experts, k, 2, hidden_size % 8 == 0};
}

std::string plan_text(const TokenPassShape& shape, const ExpertDeviceInfo& device = h200()) {
  const TokenPassPlan plan = plan_token_pass(shape, device);
  const std::string text = name(plan.strategy);
  if (plan.strategy == TokenPassStrategy::kL2Tiled)
    return text + " " + std::to_string(plan.tile_bytes);
  if (plan.strategy == TokenPassStrategy::kTwoPhase) {
    return text + " " + std::to_string(plan.threads) + " x" + std::to_string(plan.num_splits);
  }
  return text;
}

TEST(Plan, BenchmarkedShapes) {
  EXPECT_EQ(plan_text(bf16(1024, 1024, 4096, 32)), "l2_tiled 256");
  EXPECT_EQ(plan_text(bf16(4096, 1024, 4096, 16)), "l2_tiled 512");
  EXPECT_EQ(plan_text(bf16(4096, 1024, 65536, 16)), "l2_tiled 256");
  EXPECT_EQ(plan_text(bf16(16384, 1024, 65536, 32)), "l2_tiled 256");
  EXPECT_EQ(plan_text(bf16(4096, 1024, 1048576, 64)), "fused");
  EXPECT_EQ(plan_text(bf16(4096, 1024, 102400, 128)), "l2_tiled 256");
  EXPECT_EQ(plan_text(bf16(4096, 1024, 102400, 512)), "l2_tiled 256");
  EXPECT_EQ(plan_text(bf16(1024, 1024, 102400, 4096)), "l2_tiled 256");
  EXPECT_EQ(plan_text(bf16(1, 1024, 65536, 16)), "fused");
  EXPECT_EQ(plan_text(bf16(64, 1024, 65536, 16)), "fused");
}

TEST(Plan, FewTokensOfManyPairsAreSplitOverIdleSms) {
  EXPECT_EQ(plan_text(bf16(1, 1024, 65536, 512)), "two_phase 512 x16");
  EXPECT_EQ(plan_text(bf16(2, 1024, 65536, 4096)), "two_phase 512 x66");
}

TEST(Plan, RowsWithoutAlignmentTakeTwoPhases) {
  EXPECT_EQ(plan_text(bf16(4096, 1001, 65536, 16)), "two_phase 128 x1");
  EXPECT_EQ(plan_text(bf16(37, 100, 36, 3)), "two_phase 512 x1");
}

TEST(Plan, ReadsTheDeviceItIsGiven) {
  // A smaller L2 holds no 512-byte tile of 6000 rows, fewer SMs take smaller shares of a token.
  EXPECT_EQ(plan_text(bf16(4096, 1024, 6000, 64), h200()), "l2_tiled 512");
  EXPECT_EQ(plan_text(bf16(4096, 1024, 6000, 64), a100()), "l2_tiled 256");
  EXPECT_EQ(plan_text(bf16(2, 1024, 65536, 4096), a100()), "two_phase 512 x54");
}

// Whatever the shape, the kernel that is chosen takes it, and every pair lies in some split.
TEST(Plan, IsAlwaysPossible) {
  for (const int64_t num_tokens : {0, 1, 37, 199, 4096}) {
    for (const int64_t hidden_size : {0, 1, 8, 100, 1000, 1024, 4096, 100000}) {
      for (const int64_t num_experts : {1, 50, 1048576}) {
        for (const int64_t k : {0, 1, 16, 5000}) {
          const TokenPassShape shape = bf16(num_tokens, hidden_size, num_experts, k);
          const TokenPassPlan plan = plan_token_pass(shape, h200());
          EXPECT_TRUE(supports(plan.strategy, shape)) << plan_text(shape);
          EXPECT_GE(plan.num_splits * plan.pairs_per_split, k) << plan_text(shape);
        }
      }
    }
  }
}

TEST(Plan, WorkspaceOfSplitsAndTiles) {
  const TokenPassShape split = bf16(2, 1024, 65536, 4096);
  EXPECT_EQ(token_pass_workspace_floats(split, plan_token_pass(split, h200())), 2u * 66 * 1024);
  const TokenPassShape tiled = bf16(4096, 1024, 65536, 16);
  EXPECT_EQ(token_pass_workspace_floats(tiled, plan_token_pass(tiled, h200())),
            4096u * 16 * (2048 / 256 + 1));
  const TokenPassShape fused = bf16(64, 1024, 65536, 16);
  EXPECT_EQ(token_pass_workspace_floats(fused, plan_token_pass(fused, h200())), 0u);
}

}  // namespace
}  // namespace omni_moe::cuda
