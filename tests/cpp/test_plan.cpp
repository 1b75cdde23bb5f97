// The plans of the CUDA kernels as data: pure functions, so that no GPU is needed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/experts/expert_plan.h"
#include "omni_moe/cuda_plan.h"

namespace omni_moe::cuda {
namespace {

DeviceInfo h200() {
  DeviceInfo device;
  device.num_sms = 132;
  device.shared_bytes_per_block = 232448;
  device.l2_bytes = 62914560;
  device.has_cooperative_launch = device.has_early_launch = device.has_hopper_kernels = true;
  return device;
}

DeviceInfo a100() {
  DeviceInfo device;
  device.num_sms = 108;
  device.shared_bytes_per_block = 166912;
  device.l2_bytes = 41943040;
  return device;
}

TokenPassShape bf16(int64_t num_tokens, int64_t hidden_size, int64_t num_experts, int64_t k) {
  return {num_tokens, hidden_size, num_experts, k, 2, hidden_size % 8 == 0};
}

std::string plan_text(const TokenPassShape& shape, const DeviceInfo& device = h200()) {
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

TokenPassShape on_grid(int64_t num_tokens, int64_t rows, int64_t cols, int64_t k) {
  TokenPassShape shape = bf16(num_tokens, 1024, rows * cols, k);
  shape.num_cols = cols;
  return shape;
}

TEST(Plan, BandsPayForManyExpertsOfAToken) {
  EXPECT_EQ(plan_text(on_grid(4096, 320, 320, 512)), "bands");
  EXPECT_EQ(plan_text(on_grid(1024, 320, 320, 4096)), "bands");
  EXPECT_EQ(plan_text(on_grid(4096, 320, 320, 4096)), "bands");
  EXPECT_EQ(plan_text(on_grid(4096, 64, 64, 16)), "l2_tiled 512");
  EXPECT_EQ(plan_text(on_grid(16384, 64, 64, 16)), "l2_tiled 512");
  EXPECT_EQ(plan_text(on_grid(1, 320, 320, 512)), "two_phase 512 x16");
  EXPECT_EQ(plan_text(on_grid(4096, 1024, 1024, 64)), "fused");
  // Neither without a grid nor without the kernels.
  EXPECT_EQ(plan_text(bf16(4096, 1024, 102400, 512)), "l2_tiled 256");
  EXPECT_EQ(plan_text(on_grid(4096, 320, 320, 512), a100()), "l2_tiled 256");
}

TEST(Plan, BandsTakeGridsOfWholeRows) {
  TokenPassShape shape = on_grid(4096, 40, 60, 64);
  EXPECT_TRUE(supports(TokenPassStrategy::kBands, shape));
  shape.num_cols = 70;  // 2400 experts are no rows of 70
  EXPECT_FALSE(supports(TokenPassStrategy::kBands, shape));
  shape.num_cols = 0;
  EXPECT_FALSE(supports(TokenPassStrategy::kBands, shape));
  shape = on_grid(4096, 40, 60, 64);
  shape.element_size = 4;
  EXPECT_FALSE(supports(TokenPassStrategy::kBands, shape));
  EXPECT_FALSE(supports(TokenPassStrategy::kBands, on_grid(16, 2, 600, 64)));
}

TEST(Plan, BandsBoundTheTasksOfAToken) {
  for (const int64_t k : {1, 7, 64, 512, 4096}) {
    const TokenPassShape shape = on_grid(4096, 320, 320, k);
    const BandPlan plan = plan_token_pass(shape, h200(), TokenPassStrategy::kBands).bands;
    EXPECT_EQ(plan.num_rows, 320);
    EXPECT_EQ(plan.num_cols, 320);
    EXPECT_GE(plan.max_tasks, 1);
    EXPECT_LE(plan.max_tasks, std::min<int64_t>(k, 640));
    // Partial outputs are most of the workspace.
    TokenPassPlan pass = plan_token_pass(shape, h200(), TokenPassStrategy::kBands);
    const double bytes = 4.0 * static_cast<double>(token_pass_workspace_floats(shape, pass));
    const double partial = 4096.0 * plan.max_tasks * 2048;
    EXPECT_GE(bytes, partial);
    EXPECT_LE(bytes, partial * 1.4 + 4096 * (18.0 * k + 64) + (1 << 20));
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

// ---- Experts' ops -------------------------------------------------------------------------------

ExpertBackwardParams expert_backward(int64_t num_tokens, int64_t num_experts, int64_t k) {
  ExpertBackwardParams params{};
  params.num_tokens = num_tokens;
  params.hidden_size = 1024;
  params.num_experts = num_experts;
  params.num_experts_per_token = k;
  params.dtype = DType::kBFloat16;
  return params;
}

TEST(Plan, PairsAreCountedUnlessThereAreTooMany) {
  EXPECT_TRUE(plan_expert_backward(expert_backward(4096, 4096, 16), h200()).schedule.by_counting);
  // More than 64 pairs per expert, and more than a million pairs.
  EXPECT_FALSE(plan_expert_backward(expert_backward(4096, 512, 16), h200()).schedule.by_counting);
  EXPECT_FALSE(
      plan_expert_backward(expert_backward(1 << 17, 1 << 16, 16), h200()).schedule.by_counting);
}

TEST(Plan, WorkspaceOfTheBackwardGrowsByWhatTheSortNeeds) {
  const ExpertBackwardParams params = expert_backward(4096, 512, 16);
  const ExpertBackwardPlan plan = plan_expert_backward(params, h200());
  const ExpertBackwardPlan with_sort =
      plan_expert_backward(params, h200(), plan.token_pass, /*sort_storage_bytes=*/1000);
  EXPECT_EQ(with_sort.workspace_bytes, plan.workspace_bytes + 1024);
}

TEST(Plan, OperandsWithoutAKernelHaveAnEmptyPlan) {
  ExpertBackwardParams params = expert_backward(4, 8, 2);
  params.dtype = DType::kFloat64;
  EXPECT_EQ(plan_expert_backward(params, h200()).workspace_bytes, 0u);
}

// ---- Router -------------------------------------------------------------------------------------

RouterForwardParams router(int64_t num_tokens, int64_t num_rows, int64_t num_cols, int64_t k) {
  RouterForwardParams params{};
  params.num_tokens = num_tokens;
  params.num_rows = num_rows;
  params.num_cols = num_cols;
  params.num_experts_per_token = k;
  params.dtype = DType::kBFloat16;
  return params;
}

TEST(Plan, RouterForwardByAWarpOrABlock) {
  const RouterForwardPlan warp = plan_router_forward(router(4096, 256, 256, 16), h200());
  EXPECT_EQ(warp.kernel, RouterForwardKernel::kWarp);
  EXPECT_EQ(warp.items_per_lane, 8);
  EXPECT_EQ(warp.sort_width, 32);
  EXPECT_EQ(warp.num_blocks, 1024);
  // The sorts are wider than K.
  EXPECT_EQ(plan_router_forward(router(1, 65, 20, 32), h200()).sort_width, 64);
  EXPECT_EQ(plan_router_forward(router(1, 65, 20, 128), h200()).sort_width, 256);

  const RouterForwardPlan block = plan_router_forward(router(37, 300, 300, 129), h200());
  EXPECT_EQ(block.kernel, RouterForwardKernel::kBlock);
  EXPECT_TRUE(block.lists_in_shared);
  EXPECT_EQ(block.num_blocks, 37);
  EXPECT_EQ(block.workspace_bytes, 0u);
  const RouterForwardPlan long_axis = plan_router_forward(router(37, 100000, 8, 4), h200());
  EXPECT_FALSE(long_axis.lists_in_shared);
  EXPECT_EQ(long_axis.workspace_bytes, long_axis.list_bytes * 37);
  // The workspace serves the blocks that the device holds at once.
  RouterForwardParams many_tokens = router(4096, 20000, 100, 4);
  many_tokens.dtype = DType::kFloat32;
  EXPECT_EQ(plan_router_forward(many_tokens, h200()).num_blocks, 4 * 132);
}

TEST(Plan, RouterForwardWithoutAnOrder) {
  RouterForwardParams params = router(4096, 320, 320, 512);
  params.sorted = false;
  const RouterForwardPlan plan = plan_router_forward(params, h200());
  EXPECT_EQ(plan.kernel, RouterForwardKernel::kUnsorted);
  EXPECT_EQ(plan.items_per_lane, 16);
  EXPECT_EQ(plan.num_blocks, 1024);
  EXPECT_EQ(plan.workspace_bytes, 0u);
  // Eight blocks of 4 tokens, 1 KB of the system's in each, fill the 228 KB of an SM.
  EXPECT_EQ(plan.list_bytes, 4u * 320 * 18);
  params.score = RouterScore::kSoftmaxTopK;
  EXPECT_EQ(plan_router_forward(params, h200()).list_bytes, 4u * 320 * 22);
  EXPECT_LE(8 * (plan_router_forward(params, h200()).list_bytes + 1024), size_t{228} << 10);
  // The registers of a warp hold the columns alone.
  params.num_rows = 1024;
  params.num_cols = 64;
  EXPECT_EQ(plan_router_forward(params, h200()).items_per_lane, 2);

  params.num_experts_per_token = 128;
  EXPECT_EQ(plan_router_forward(params, h200()).kernel, RouterForwardKernel::kWarp);
  params.num_experts_per_token = 129;
  params.num_rows = 1025;
  EXPECT_EQ(plan_router_forward(params, h200()).kernel, RouterForwardKernel::kBlock);
  params.num_rows = 1024;
  params.num_tokens = 2 * 132 - 1;
  EXPECT_EQ(plan_router_forward(params, h200()).kernel, RouterForwardKernel::kBlock);
  params.num_tokens = 2 * 132;
  EXPECT_EQ(plan_router_forward(params, h200()).kernel, RouterForwardKernel::kUnsorted);
  DeviceInfo small = h200();
  small.shared_bytes_per_block = 48 << 10;
  EXPECT_EQ(plan_router_forward(params, small).kernel, RouterForwardKernel::kBlock);
}

TEST(Plan, RouterBackwardByAWarpOrABlock) {
  RouterBackwardParams params{};
  params.num_tokens = 37;
  params.num_rows = params.num_cols = 256;
  params.num_experts_per_token = 16;
  params.dtype = DType::kBFloat16;
  const RouterBackwardPlan few = plan_router_backward(params, h200());
  EXPECT_EQ(few.warps_per_token, 1);
  EXPECT_EQ(few.num_blocks, 10);
  params.num_experts_per_token = 200;
  const RouterBackwardPlan many = plan_router_backward(params, h200());
  EXPECT_EQ(many.warps_per_token, 8);
  EXPECT_EQ(many.num_blocks, 37);
  EXPECT_TRUE(many.sums_in_shared);
  params.num_rows = 100000;
  const RouterBackwardPlan wide = plan_router_backward(params, h200());
  EXPECT_FALSE(wide.sums_in_shared);
  EXPECT_GE(wide.workspace_bytes, wide.sum_bytes * wide.num_blocks);
}

TEST(Plan, NothingToDoNeedsNoWorkspace) {
  EXPECT_EQ(plan_router_forward(router(0, 100000, 8, 4), h200()).workspace_bytes, 0u);
  EXPECT_EQ(plan_router_forward(router(37, 100000, 8, 0), h200()).workspace_bytes, 0u);
  EXPECT_EQ(plan_router_backward({}, h200()).workspace_bytes, 0u);
  EXPECT_EQ(plan_batch_norm_backward({}, h200()).workspace_bytes, 0u);
}

RouterLogitsForwardParams logits(int64_t num_tokens, int64_t num_rows, int64_t num_cols) {
  RouterLogitsForwardParams params{};
  params.num_tokens = num_tokens;
  params.num_rows = num_rows;
  params.num_cols = num_cols;
  params.hidden_size = 1024;
  params.logits_stride = num_rows + num_cols;
  params.dtype = params.stats_dtype = DType::kBFloat16;
  params.training = true;
  return params;
}

// All blocks of a grid are on the device at once, every token is in one part, and every partial has
// its place.
TEST(Plan, GridsOfBatchNormFitTheDevice) {
  for (const int64_t num_tokens : {0, 1, 37, 199, 4096, 100000}) {
    for (const int64_t width : {1, 8, 100, 256, 20000}) {
      const RouterLogitsForwardParams params = logits(num_tokens, width, width);
      const BatchNormForwardPlan plan = plan_batch_norm_forward(params, h200());
      const BatchNormGrid& grid = plan.grid;
      EXPECT_LE(grid.panels_per_round * grid.num_parts, 2 * 132) << num_tokens << ", " << width;
      EXPECT_GE(grid.num_rounds * grid.panels_per_round, grid.num_panels);
      EXPECT_GE(grid.num_parts * grid.tokens_per_part, num_tokens);
      EXPECT_GE(plan.workspace_bytes,
                size_t{32} * grid.num_panels * grid.num_parts * 2 * sizeof(float));
      EXPECT_EQ(plan.uses_vectors, width % 8 == 0);
    }
  }
}

TEST(Plan, RouterLogitsTakeTheSmallestBlocksThatFit) {
  const auto blocks_of = [](const RouterLogitsForwardParams& params) {
    const auto plan = plan_router_logits_forward(params, h200());
    return plan ? std::to_string(plan->token_tiles) + "x" + std::to_string(plan->panels) : "none";
  };
  EXPECT_EQ(blocks_of(logits(1024, 64, 64)), "1x1");
  EXPECT_EQ(blocks_of(logits(4096, 128, 128)), "1x2");
  EXPECT_EQ(blocks_of(logits(4096, 256, 256)), "2x2");
  EXPECT_EQ(blocks_of(logits(4096, 384, 384)), "2x3");
  EXPECT_EQ(blocks_of(logits(8192, 384, 384)), "none");
  EXPECT_EQ(blocks_of(logits(1024, 60, 64)), "none");
  EXPECT_FALSE(plan_router_logits_forward(logits(1024, 64, 64), a100()).has_value());
  RouterLogitsForwardParams evaluation = logits(1024, 64, 64);
  evaluation.training = false;
  EXPECT_EQ(plan_router_logits_forward(evaluation, h200())->workspace_bytes, 0u);
}

// ---- MLP ----------------------------------------------------------------------------------------

TEST(Plan, GatedLinearTilesAndClusters) {
  GatedLinearForwardParams params{};
  params.num_tokens = 4096;
  params.hidden_size = 1024;
  params.intermediate_size = 4096;
  params.dtype = DType::kBFloat16;
  const auto plan = plan_gated_linear_forward(params, h200());
  ASSERT_TRUE(plan.has_value());
  EXPECT_EQ(plan->num_token_tiles, 16);
  EXPECT_EQ(plan->num_col_tiles, 32);
  EXPECT_EQ(plan->num_clusters, 66);
  params.num_tokens = 1;
  params.intermediate_size = 128;
  EXPECT_EQ(plan_gated_linear_forward(params, h200())->num_clusters, 1);
  EXPECT_FALSE(plan_gated_linear_forward(params, a100()).has_value());
  params.hidden_size = 1001;
  EXPECT_FALSE(plan_gated_linear_forward(params, h200()).has_value());
  params.hidden_size = 1024;
  params.gate = reinterpret_cast<void*>(0x1008);
  EXPECT_FALSE(plan_gated_linear_forward(params, h200()).has_value());
}

TEST(Plan, GatedActivationVectors) {
  GatedActivationForwardParams params{};
  params.num_tokens = 16;
  params.intermediate_size = params.gate_stride = params.up_stride = 100;
  params.dtype = DType::kBFloat16;
  // One long row of 1600 elements has vectors, rows of 100 do not.
  EXPECT_TRUE(plan_gated_activation_forward(params).is_one_row);
  EXPECT_TRUE(plan_gated_activation_forward(params).uses_vectors);
  params.gate_stride = params.up_stride = 200;
  EXPECT_FALSE(plan_gated_activation_forward(params).is_one_row);
  EXPECT_FALSE(plan_gated_activation_forward(params).uses_vectors);
}

TopKRouterForwardPlan topk_plan(int64_t num_tokens, int64_t num_experts, int64_t k,
                                int64_t n_group = 1, int64_t topk_group = 1) {
  TopKRouterForwardParams params{};
  params.num_tokens = num_tokens;
  params.num_experts = num_experts;
  params.num_experts_per_token = k;
  params.n_group = n_group;
  params.topk_group = topk_group;
  return plan_topk_router_forward(params, h200());
}

TEST(Plan, TopKRouterKernels) {
  using Kernel = TopKRouterForwardKernel;
  EXPECT_EQ(topk_plan(4096, 256, 8).kernel, Kernel::kWarp);
  EXPECT_EQ(topk_plan(4096, 256, 8, 8, 4).kernel, Kernel::kWarp);
  EXPECT_EQ(topk_plan(4096, 1024, 32).kernel, Kernel::kWarp);
  EXPECT_EQ(topk_plan(4096, 1024, 33).kernel, Kernel::kBlock);
  EXPECT_EQ(topk_plan(4096, 1025, 8).kernel, Kernel::kBlock);
  // A lane compares a group, unless all are kept.
  EXPECT_EQ(topk_plan(4096, 64, 8, 64, 8).kernel, Kernel::kBlock);
  EXPECT_EQ(topk_plan(4096, 64, 8, 64, 64).kernel, Kernel::kWarp);
}

TEST(Plan, TopKRouterMemory) {
  for (const int64_t num_tokens : {0, 1, 9, 4096, 1000000}) {
    for (const int64_t num_experts : {1, 60, 1024, 4096}) {
      for (const int64_t n_group : {int64_t{1}, num_experts}) {
        const auto plan = topk_plan(num_tokens, num_experts, 1, n_group);
        EXPECT_LE(plan.shared_bytes, 96 * 1024u);  // two blocks an SM
        const size_t rows = plan.num_blocks > 1 ? plan.num_blocks : 0;
        EXPECT_GE(plan.workspace_bytes, rows * num_experts * sizeof(int32_t));
        EXPECT_LE(plan.workspace_bytes, 528 * 4096 * sizeof(int32_t));
        ExpertSlotsParams slots{};
        slots.num_pairs = num_tokens;
        slots.num_experts = num_experts;
        const auto slots_plan = plan_expert_slots(slots, h200());
        EXPECT_LE(slots_plan.workspace_bytes, (num_tokens + 2 * 4096) * sizeof(int32_t));
      }
    }
  }
}

}  // namespace
}  // namespace omni_moe::cuda
