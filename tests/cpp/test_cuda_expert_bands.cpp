// The expert passes by bands against the CPU backend's in fp64, for ids of a router and for ids
// that no router would choose. Outputs and workspace are poisoned before each run, every element is
// checked, and a second run must repeat the first bit for bit.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/experts/expert_plan.h"
#include "cuda/experts/schedule.h"
#include "cuda_expert_bands_testing.h"

namespace omni_moe {
namespace {

ExpertShape shape_of(const BandCase& c) {
  return {.num_tokens = c.num_tokens,
          .hidden_size = c.hidden_size,
          .num_experts = c.grid.size(),
          .num_experts_per_token = c.num_experts_per_token,
          .dtype = c.dtype,
          .index_type = c.index_type,
          .activation = c.activation,
          .num_cols = c.grid.cols};
}

struct Problem : ExpertOperands {
  explicit Problem(const BandCase& c)
      : ExpertOperands(shape_of(c), /*has_addend=*/c.num_tokens % 2 == 1), ids(ids_of(c)) {
    std::mt19937 random(7);
    fill_normal(hidden, random);
    fill_normal(grad, random);
    fill_normal(up, random, 1.5 / std::sqrt(double(c.hidden_size)));
    fill_normal(down, random, 1.5 / std::sqrt(double(c.hidden_size)));
    fill_normal(routing, random);
    fill_normal(addend, random);
    upload_ids(ids);
    solve_forward();
  }

  // The root of the sum of the squares of what is added up to each element of a pass's output:
  // coefficients times rows of `table`. Coefficients and partial outputs are rounded.
  Values sizes_of_sums(const Values& coefficients, const Values& table) const {
    const int64_t k = shape.num_experts_per_token, width = shape.hidden_size;
    Values sums(shape.num_tokens * width);
    for (int64_t pair = 0; pair < num_pairs(); ++pair) {
      const double* row = table.data() + ids[pair] * width;
      double* sum = sums.data() + pair / k * width;
      const double square = coefficients[pair] * coefficients[pair];
      for (int64_t h = 0; h < width; ++h) sum[h] += square * row[h] * row[h];
    }
    for (double& sum : sums) sum = std::sqrt(sum);
    return sums;
  }

  // The same of the tables' gradients: coefficients times rows of `states`, a token's.
  Values sizes_of_table_sums(const Values& coefficients, const Values& states) const {
    const int64_t k = shape.num_experts_per_token, width = shape.hidden_size;
    Values sums(shape.num_experts * width);
    for (int64_t pair = 0; pair < num_pairs(); ++pair) {
      const double* row = states.data() + pair / k * width;
      double* sum = sums.data() + ids[pair] * width;
      const double square = coefficients[pair] * coefficients[pair];
      for (int64_t h = 0; h < width; ++h) sum[h] += square * row[h] * row[h];
    }
    for (double& sum : sums) sum = std::sqrt(sum);
    return sums;
  }

  std::vector<int64_t> ids;
};

cuda::ExpertForwardPlan plan_of(const ExpertForwardParams& params) {
  const cuda::DeviceInfo device = cuda::current_device();
  const auto bands = cuda::plan_token_pass(cuda::token_pass_shape(params), device,
                                           cuda::TokenPassStrategy::kBands);
  return cuda::plan_expert_forward(params, device, bands);
}
cuda::ExpertBackwardPlan plan_of(const ExpertBackwardParams& params) {
  const cuda::DeviceInfo device = cuda::current_device();
  const auto bands = cuda::plan_token_pass(cuda::token_pass_shape(params), device,
                                           cuda::TokenPassStrategy::kBands);
  const int64_t num_pairs = params.num_tokens * params.num_experts_per_token;
  return cuda::plan_expert_backward(params, device, bands,
                                    cuda::sort_storage_bytes({num_pairs, params.num_experts}));
}

// Each coefficient and each partial output has lost at most a rounding; of many, the root of the
// sum of their squares tells how far they go together, and six times its deviation is never seen.
void expect_close_sums(const char* name, const Operand& output, const Bytes& got,
                       const Values& sizes) {
  const double unit = unit_roundoff(output.dtype);
  expect_close(name, decode(output.dtype, got), output.values, [&](size_t i) {
    return 2 * unit * std::abs(output.values[i]) + 5 * unit * sizes[i] +
           rounding_error(output.dtype, 0) * 64 + 2e-6;
  });
}

// Of expect_close_to_oracle.
constexpr double kFp32Loss = 5e-5;

TEST_P(CudaExpertBands, Forward) {
  Problem problem(GetParam());
  auto params = problem.params_of<ExpertForwardParams>(Side::kDevice);
  if (params.num_tokens == 0) return;
  const auto plan = plan_of(params);
  const auto got = run_twice({&problem.out.device, &problem.pre_activations.device},
                             plan.workspace_bytes, [&](void* workspace) {
                               params.workspace = workspace;
                               return cuda::expert_forward(params, plan, nullptr);
                             });
  Values coefficients = activate(problem.shape.activation, problem.pre_activations.values).value;
  for (int64_t i = 0; i < problem.num_pairs(); ++i) coefficients[i] *= problem.routing.values[i];
  expect_close_sums("expert_states", problem.out, got[0],
                    problem.sizes_of_sums(coefficients, problem.down.values));
  expect_close_to_oracle("pre_activations", problem.pre_activations, got[1], kFp32Loss);
}

TEST_P(CudaExpertBands, Backward) {
  Problem problem(GetParam());
  problem.solve_backward();
  auto params = problem.params_of<ExpertBackwardParams>(Side::kDevice);
  if (params.num_tokens == 0) return;
  const auto plan = plan_of(params);
  const size_t bytes = plan.workspace_bytes;
  const std::vector<const DeviceArray*> outputs = {
      &problem.grad_hidden.device, &problem.grad_up.device, &problem.grad_down.device,
      &problem.grad_routing.device};
  const auto launch = [&](void* workspace) {
    params.workspace = workspace;
    return cuda::expert_backward(params, plan, nullptr);
  };
  const auto got = run_twice(outputs, bytes, launch);
  Values coefficients = activate(problem.shape.activation, problem.pre_activations.values).slope;
  const int64_t width = problem.shape.hidden_size;
  for (int64_t i = 0; i < problem.num_pairs(); ++i) {
    const double* grad =
        problem.grad.values.data() + i / problem.shape.num_experts_per_token * width;
    const double* down = problem.down.values.data() + problem.ids[i] * width;
    coefficients[i] *=
        problem.routing.values[i] * std::inner_product(grad, grad + width, down, 0.0);
  }
  expect_close_sums("grad_hidden", problem.grad_hidden, got[0],
                    problem.sizes_of_sums(coefficients, problem.up.values));
  expect_close_sums("grad_up", problem.grad_up, got[1],
                    problem.sizes_of_table_sums(coefficients, problem.hidden.values));
  Values down_coefficients =
      activate(problem.shape.activation, problem.pre_activations.values).value;
  for (int64_t i = 0; i < problem.num_pairs(); ++i) {
    down_coefficients[i] *= problem.routing.values[i];
  }
  expect_close_sums("grad_down", problem.grad_down, got[2],
                    problem.sizes_of_table_sums(down_coefficients, problem.grad.values));
  expect_close_to_oracle("grad_routing", problem.grad_routing, got[3], kFp32Loss);

  // The gradient of the routing weights alone takes no second product.
  params.grad_hidden_states = params.grad_up_weights = params.grad_down_weights = nullptr;
  const auto alone = run_twice({&problem.grad_routing.device}, bytes, launch);
  EXPECT_TRUE(alone[0] == got[3]);

  // One table's gradient alone is that of both.
  params.grad_routing_weights = nullptr;
  params.grad_down_weights = problem.grad_down.device.data();
  EXPECT_TRUE(run_twice({&problem.grad_down.device}, bytes, launch)[0] == got[2]);
}

// A captured pass repeats the bits of a launched one, also after the workspace has been used for
// other ids.
TEST(CudaExpertBandsGraph, Replays) {
  if (!cuda::current_device().has_hopper_kernels) GTEST_SKIP() << "needs kernels of Hopper";
  Problem problem({300, {40, 40}, 64, 256});
  auto params = problem.params_of<ExpertForwardParams>(Side::kDevice);
  const auto plan = plan_of(params);
  const DeviceArray workspace(plan.workspace_bytes);
  params.workspace = workspace.data();
  expect_success(cuda::expert_forward(params, plan, nullptr));
  const Bytes want = problem.out.device.read();

  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  ASSERT_EQ(cudaSuccess, cudaStreamCreate(&stream));
  ASSERT_EQ(cudaSuccess, cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  EXPECT_EQ(cudaSuccess, cuda::expert_forward(params, plan, stream));
  ASSERT_EQ(cudaSuccess, cudaStreamEndCapture(stream, &graph));
  ASSERT_EQ(cudaSuccess, cudaGraphInstantiate(&executable, graph, 0));
  for (const bool is_shifted : {true, false}) {
    auto ids = problem.ids;
    for (int64_t& id : ids) id = is_shifted ? (id + 41) % problem.shape.num_experts : id;
    problem.upload_ids(ids);
    problem.out.device.poison();
    ASSERT_EQ(cudaSuccess, cudaGraphLaunch(executable, stream));
    ASSERT_EQ(cudaSuccess, cudaStreamSynchronize(stream));
    EXPECT_EQ(problem.out.device.read() == want, !is_shifted);
  }
  EXPECT_EQ(cudaSuccess, cudaGraphExecDestroy(executable));
  EXPECT_EQ(cudaSuccess, cudaGraphDestroy(graph));
  EXPECT_EQ(cudaSuccess, cudaStreamDestroy(stream));
}

INSTANTIATE_TEST_SUITE_P(Cases, CudaExpertBands, testing::ValuesIn(band_cases()), name_of_case);

}  // namespace
}  // namespace omni_moe
