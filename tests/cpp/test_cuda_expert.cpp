// The CUDA expert forward and backward against the CPU backend's in fp64 over awkward shapes.
// Outputs and workspace are poisoned with NaN bytes before each run, every element is checked, and
// a second run must repeat the first bit for bit.
#include <cmath>
#include <cstdint>
#include <ostream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/experts/expert_plan.h"
#include "cuda/experts/schedule.h"
#include "cuda_expert_testing.h"

namespace omni_moe {
namespace {

enum class Routing { kUniform, kOneExpert, kDuplicates, kHalfIdle };

struct Case {
  int64_t num_tokens, hidden_size, num_experts_per_token, num_experts;
  DType dtype;
  IndexType index_type = IndexType::kInt32;
  Routing routing = Routing::kUniform;
  Activation activation = Activation::kSilu;
  int64_t offset = 0;  // elements by which every operand misses its alignment
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << "T" << c.num_tokens << "_H" << c.hidden_size << "_K" << c.num_experts_per_token
             << "_E" << c.num_experts << "_dtype" << int(c.dtype) << "_index" << int(c.index_type)
             << "_routing" << int(c.routing) << "_act" << int(c.activation) << "_offset"
             << c.offset;
}

ExpertShape shape_of(const Case& c) {
  return {.num_tokens = c.num_tokens,
          .hidden_size = c.hidden_size,
          .num_experts = c.num_experts,
          .num_experts_per_token = c.num_experts_per_token,
          .dtype = c.dtype,
          .index_type = c.index_type,
          .activation = c.activation};
}

struct Problem : ExpertOperands {
  explicit Problem(const Case& c)
      : ExpertOperands(shape_of(c), /*has_addend=*/c.num_experts % 2 == 0, c.offset) {
    std::mt19937_64 random(7);
    // Scores of order one: the activations bend there.
    fill_uniform(hidden, random, 1.0);
    fill_uniform(grad, random, 1.0);
    fill_uniform(up, random, 3.0 / std::sqrt(double(c.hidden_size)));
    fill_uniform(down, random, 3.0 / std::sqrt(double(c.hidden_size)));
    fill_uniform(routing, random, 1.0);
    fill_uniform(addend, random, 1.0);
    upload_ids(ids_of(c.routing, random));
    solve_forward();
  }

  static void fill_uniform(Operand& operand, std::mt19937_64& random, double scale) {
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    operand.fill([&] { return static_cast<float>(uniform(random) * scale); });
  }

  std::vector<int64_t> ids_of(Routing kind, std::mt19937_64& random) const {
    std::vector<int64_t> ids(num_pairs());
    for (size_t i = 0; i < ids.size(); ++i) {
      const int64_t uniform = static_cast<int64_t>(random() % shape.num_experts);
      switch (kind) {
        case Routing::kUniform:
          ids[i] = uniform;
          break;
        case Routing::kOneExpert:
          ids[i] = shape.num_experts - 1;
          break;
        case Routing::kDuplicates:
          ids[i] = i % 2 == 1 ? ids[i - 1] : uniform;
          break;
        case Routing::kHalfIdle:
          ids[i] = uniform / 2 * 2;
          break;
      }
    }
    return ids;
  }
};

using NamedOutputs = std::vector<std::pair<const char*, const Operand*>>;

NamedOutputs outputs_of(const Problem& p, const ExpertForwardParams&) {
  return {{"expert_states", &p.out}, {"pre_activations", &p.pre_activations}};
}
NamedOutputs outputs_of(const Problem& p, const ExpertBackwardParams&) {
  return {{"grad_hidden", &p.grad_hidden},
          {"grad_up", &p.grad_up},
          {"grad_down", &p.grad_down},
          {"grad_routing", &p.grad_routing}};
}

// Of expect_close_to_oracle.
constexpr double kFp32Loss = 2e-5;

// Runs launch(params) twice and compares the outputs with the oracle and with themselves.
template <typename Params, typename Launch>
void check(const NamedOutputs& outputs, Params params, size_t workspace_bytes, Launch&& launch) {
  std::vector<const DeviceArray*> arrays;
  for (const auto& [name, operand] : outputs) arrays.push_back(&operand->device);
  const auto got = run_twice(arrays, workspace_bytes, [&](void* workspace) {
    params.workspace = workspace;
    return launch(params);
  });
  for (size_t i = 0; i < outputs.size(); ++i) {
    expect_close_to_oracle(outputs[i].first, *outputs[i].second, got[i], kFp32Loss);
  }
}

class CudaExpert : public CudaKernelTest, public testing::WithParamInterface<Case> {};

TEST_P(CudaExpert, Forward) {
  Problem problem(GetParam());
  const auto params = problem.params_of<ExpertForwardParams>(Side::kDevice);
  const auto plan = cuda::plan_expert_forward(params);
  check(outputs_of(problem, params), params, plan.workspace_bytes,
        [&](const auto& p) { return cuda::expert_forward(p, plan, nullptr); });
}

TEST_P(CudaExpert, Backward) {
  Problem problem(GetParam());
  problem.solve_backward();
  const auto params = problem.params_of<ExpertBackwardParams>(Side::kDevice);
  const auto plan = cuda::plan_expert_backward(params);
  check(outputs_of(problem, params), params, plan.workspace_bytes,
        [&](const auto& p) { return cuda::expert_backward(p, plan, nullptr); });
}

// Every strategy that takes the shape at all, not only the one that is fastest for it.
template <class Params>
std::vector<std::pair<std::string, cuda::TokenPassPlan>> every_plan(const Params& params) {
  using cuda::TokenPassStrategy;
  const cuda::DeviceInfo device = cuda::current_device();
  const cuda::TokenPassShape shape = cuda::token_pass_shape(params);
  std::vector<std::pair<std::string, cuda::TokenPassPlan>> plans;
  const auto add = [&](const char* name, TokenPassStrategy strategy, auto&& change) {
    if (!cuda::supports(strategy, shape)) return;
    cuda::TokenPassPlan plan = cuda::plan_token_pass(shape, device, strategy);
    change(&plan);
    plans.emplace_back(name, plan);
  };
  const auto as_is = [](cuda::TokenPassPlan*) {};
  add("two_phase", TokenPassStrategy::kTwoPhase, as_is);
  add("fused", TokenPassStrategy::kFused, as_is);
  add("l2_tiled by 256 bytes", TokenPassStrategy::kL2Tiled,
      [](cuda::TokenPassPlan* plan) { plan->tile_bytes = 256; });
  add("l2_tiled by 512 bytes", TokenPassStrategy::kL2Tiled,
      [](cuda::TokenPassPlan* plan) { plan->tile_bytes = 512; });
  return plans;
}

TEST_P(CudaExpert, ForwardOfEveryStrategy) {
  Problem problem(GetParam());
  const auto params = problem.params_of<ExpertForwardParams>(Side::kDevice);
  for (const auto& [name, token_pass] : every_plan(params)) {
    SCOPED_TRACE(name);
    const auto plan = cuda::plan_expert_forward(params, cuda::current_device(), token_pass);
    check(outputs_of(problem, params), params, plan.workspace_bytes,
          [&](const auto& p) { return cuda::expert_forward(p, plan, nullptr); });
  }
}

TEST_P(CudaExpert, BackwardOfEveryStrategy) {
  Problem problem(GetParam());
  problem.solve_backward();
  const auto params = problem.params_of<ExpertBackwardParams>(Side::kDevice);
  for (const auto& [name, token_pass] : every_plan(params)) {
    SCOPED_TRACE(name);
    const auto plan = cuda::plan_expert_backward(
        params, cuda::current_device(), token_pass,
        cuda::sort_storage_bytes(
            {params.num_tokens * params.num_experts_per_token, params.num_experts}));
    check(outputs_of(problem, params), params, plan.workspace_bytes,
          [&](const auto& p) { return cuda::expert_backward(p, plan, nullptr); });
  }
}

// What is not wanted may be null, and the rest stays right.
TEST_P(CudaExpert, BackwardOfEachGradientAlone) {
  Problem problem(GetParam());
  problem.solve_backward();
  const auto all = problem.params_of<ExpertBackwardParams>(Side::kDevice);
  using Field = void* ExpertBackwardParams::*;
  constexpr Field kFields[] = {
      &ExpertBackwardParams::grad_hidden_states, &ExpertBackwardParams::grad_up_weights,
      &ExpertBackwardParams::grad_down_weights, &ExpertBackwardParams::grad_routing_weights};
  const NamedOutputs outputs = outputs_of(problem, all);
  for (size_t wanted = 0; wanted < outputs.size(); ++wanted) {
    ExpertBackwardParams params = all;
    for (size_t other = 0; other < outputs.size(); ++other) {
      if (other != wanted) params.*kFields[other] = nullptr;
    }
    const auto plan = cuda::plan_expert_backward(params);
    check({outputs[wanted]}, params, plan.workspace_bytes,
          [&](const auto& p) { return cuda::expert_backward(p, plan, nullptr); });
  }
}

std::string name_of_case(const testing::TestParamInfo<Case>& info) {
  return testing::PrintToString(info.param);
}

std::vector<Case> awkward_shapes() {
  std::vector<Case> cases;
  for (const DType dtype : kDTypes) {
    for (const int64_t tokens : {0, 1, 37, 199}) {
      for (const int64_t width : {8, 100, 1000, 1024}) {
        for (const int64_t k : {1, 3, 16}) {
          const bool wide = (tokens + width + k) % 2 == 1;
          cases.push_back(
              {tokens, width, k, 50, dtype, wide ? IndexType::kInt64 : IndexType::kInt32});
        }
      }
    }
  }
  return cases;
}

// One shape per path: splits and their second stage, many tokens (both row widths of the columns),
// long and huge segments, both schedules, rows past a tile, rows without alignment.
std::vector<Case> paths() {
  std::vector<Case> cases;
  const IndexType i32 = IndexType::kInt32;
  const IndexType i64 = IndexType::kInt64;
  for (const DType dtype : kDTypes) {
    cases.push_back({2, 256, 5000, 300, dtype, i32});                        // splits
    cases.push_back({1, 100, 200, 64, dtype, i64});                          // splits, scalar
    cases.push_back({5, 64, 0, 10, dtype, i32});                             // no experts per token
    cases.push_back({5, 1024, 3, 70001, dtype, i64, Routing::kHalfIdle});    // many idle experts
    cases.push_back({37, 4096, 5, 20, dtype, i32});                          // rows past one tile
    cases.push_back({37, 5000, 3, 20, dtype, i64});                          // the same, ragged
    cases.push_back({1200, 1024, 5, 97, dtype, i32, Routing::kDuplicates});  // radix sort
    cases.push_back({1200, 40, 37, 2000, dtype, i64, Routing::kHalfIdle});   // ids past a window
    cases.push_back({50, 1024, 70, 300, dtype, i32});                        // two windows, a tail
    cases.push_back({203, 520, 64, 100, dtype, i64, Routing::kDuplicates});  // ragged last slab
    cases.push_back({1200, 1000, 4, 500, dtype, i32, Routing::kOneExpert});  // huge segment
    cases.push_back({1200, 64, 40, 3, dtype, i32, Routing::kOneExpert});     // the same, sorted
    cases.push_back({3000, 16, 8, 1000, dtype, i64, Routing::kOneExpert});   // many parts
    cases.push_back({199, 128, 16, 500, dtype, i64, Routing::kOneExpert});   // not quite as many
    cases.push_back({37, 128, 3, 50, dtype, i32, Routing::kUniform, Activation::kSilu, 1});
    cases.push_back({1200, 128, 5, 50, dtype, i32, Routing::kUniform, Activation::kSilu, 1});
  }
  cases.push_back({1200, 2048, 5, 97, DType::kBFloat16, i32});  // wide rows
  for (const Activation activation :
       {Activation::kGelu, Activation::kGeluTanh, Activation::kRelu, Activation::kIdentity}) {
    cases.push_back({37, 100, 3, 50, DType::kFloat32, i32, Routing::kUniform, activation});
    cases.push_back({1200, 64, 4, 50, DType::kFloat32, i32, Routing::kUniform, activation});
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(AwkwardShapes, CudaExpert, testing::ValuesIn(awkward_shapes()),
                         name_of_case);
INSTANTIATE_TEST_SUITE_P(Paths, CudaExpert, testing::ValuesIn(paths()), name_of_case);

TEST(CudaExpertErrors, RejectsWhatHasNoKernel) {
  ExpertForwardParams forward{};
  forward.hidden_size = 8;
  forward.dtype = DType::kFloat64;
  EXPECT_EQ(cuda::expert_forward(forward, cuda::plan_expert_forward(forward), nullptr),
            cudaErrorInvalidValue);
  forward.hidden_size = 0;
  forward.dtype = DType::kBFloat16;
  EXPECT_EQ(cuda::expert_forward(forward, cuda::plan_expert_forward(forward), nullptr),
            cudaErrorInvalidValue);
  ExpertBackwardParams backward{};
  backward.dtype = DType::kBFloat16;
  EXPECT_EQ(cuda::expert_backward(backward, cuda::plan_expert_backward(backward), nullptr),
            cudaErrorInvalidValue);
  backward.hidden_size = 8;
  backward.num_tokens = int64_t{1} << 30;
  backward.num_experts_per_token = 4;  // 2^32 pairs
  EXPECT_EQ(cuda::expert_backward(backward, cuda::plan_expert_backward(backward), nullptr),
            cudaErrorInvalidValue);
}

}  // namespace
}  // namespace omni_moe
