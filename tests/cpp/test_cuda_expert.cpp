// The CUDA expert forward and backward against a double-precision host oracle over awkward shapes.
// Outputs and workspace are poisoned with NaN bytes before each run, every element is checked, and
// a second run must repeat the first bit for bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "cuda/experts/expert_plan.h"
#include "cuda/experts/schedule.h"
#include "device_poison.h"
#include "omni_moe/cuda.h"

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

struct Tolerance {
  double relative, absolute;
};

Tolerance tolerance(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return {2e-5, 2e-5};
    case DType::kFloat16:
      return {1.0 / 1024, 2e-4};
    case DType::kBFloat16:
      return {1.0 / 128, 2e-4};
    default:
      ADD_FAILURE() << "no tolerance for this dtype";
      return {0, 0};
  }
}

size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void encode(DType dtype, float value, char* to) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, &value, 4);
  } else if (dtype == DType::kFloat16) {
    const __half half = __float2half(value);
    std::memcpy(to, &half, 2);
  } else {
    const __nv_bfloat16 bfloat = __float2bfloat16(value);
    std::memcpy(to, &bfloat, 2);
  }
}

double decode(DType dtype, const char* from) {
  if (dtype == DType::kFloat32) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
  }
  if (dtype == DType::kFloat16) {
    __half half;
    std::memcpy(&half, from, 2);
    return __half2float(half);
  }
  __nv_bfloat16 bfloat;
  std::memcpy(&bfloat, from, 2);
  return __bfloat162float(bfloat);
}

#define CHECK_CUDA(call) ASSERT_EQ(call, cudaSuccess) << cudaGetErrorString(cudaGetLastError())

// Device memory with a guard on both sides that must stay untouched.
class DeviceBytes {
 public:
  DeviceBytes(size_t bytes, size_t offset) : bytes_(bytes), offset_(kGuard + offset) {
    EXPECT_EQ(cudaMalloc(&base_, bytes_ + offset_ + kGuard), cudaSuccess);
    poison();
  }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
  ~DeviceBytes() { cudaFree(base_); }

  // All bytes 0xff: a NaN in every floating-point type.
  void poison() { EXPECT_EQ(poison_device_memory(base_, offset_, bytes_, kGuard), cudaSuccess); }
  void* data() const { return static_cast<char*>(base_) + offset_; }

  void upload(const std::vector<char>& host) {
    ASSERT_EQ(host.size(), bytes_);
    CHECK_CUDA(cudaMemcpy(data(), host.data(), bytes_, cudaMemcpyHostToDevice));
  }

  std::vector<char> download() const {
    std::vector<char> all(bytes_ + offset_ + kGuard);
    EXPECT_EQ(cudaMemcpy(all.data(), base_, all.size(), cudaMemcpyDeviceToHost), cudaSuccess);
    const auto untouched = [](char byte) { return byte == char(0xff); };
    EXPECT_TRUE(std::all_of(all.begin(), all.begin() + offset_, untouched)) << "write before";
    EXPECT_TRUE(std::all_of(all.begin() + offset_ + bytes_, all.end(), untouched)) << "write past";
    return {all.begin() + offset_, all.begin() + offset_ + bytes_};
  }

 private:
  static constexpr size_t kGuard = 256;
  void* base_ = nullptr;
  size_t bytes_;
  size_t offset_;
};

// A floating-point operand: rounded to its dtype, on both sides.
struct Tensor {
  Tensor(const Case& c, int64_t count)
      : dtype(c.dtype),
        values(count),
        device(count * size_of(c.dtype), c.offset * size_of(c.dtype)) {}

  void fill_random(std::mt19937_64& random, double scale) {
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    std::vector<char> bytes(values.size() * size_of(dtype));
    for (size_t i = 0; i < values.size(); ++i) {
      char* at = bytes.data() + i * size_of(dtype);
      encode(dtype, static_cast<float>(uniform(random) * scale), at);
      values[i] = decode(dtype, at);
    }
    device.upload(bytes);
  }

  void upload_values() {
    std::vector<char> bytes(values.size() * size_of(dtype));
    for (size_t i = 0; i < values.size(); ++i) {
      encode(dtype, static_cast<float>(values[i]), bytes.data() + i * size_of(dtype));
    }
    device.upload(bytes);
  }

  DType dtype;
  std::vector<double> values;  // inputs: what was uploaded; outputs: the oracle
  DeviceBytes device;
};

double act(Activation activation, double x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kGelu:
      return 0.5 * x * (1 + std::erf(x * M_SQRT1_2));
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kRelu:
      return std::max(x, 0.0);
    case Activation::kIdentity:
      return x;
  }
  return std::numeric_limits<double>::quiet_NaN();
}

// The derivative from the function itself, so that a wrong formula cannot agree with itself.
double act_derivative(Activation activation, double x) {
  if (activation == Activation::kRelu) return x > 0 ? 1 : 0;
  const double step = 1e-5;
  return (act(activation, x + step) - act(activation, x - step)) / (2 * step);
}

struct Problem {
  explicit Problem(const Case& c)
      : c(c),
        hidden(c, c.num_tokens * c.hidden_size),
        grad(c, c.num_tokens * c.hidden_size),
        up(c, c.num_experts * c.hidden_size),
        down(c, c.num_experts * c.hidden_size),
        routing(c, c.num_tokens * c.num_experts_per_token),
        addend(c, c.num_tokens * c.hidden_size),
        out(c, c.num_tokens * c.hidden_size),
        grad_hidden(c, c.num_tokens * c.hidden_size),
        grad_up(c, c.num_experts * c.hidden_size),
        grad_down(c, c.num_experts * c.hidden_size),
        grad_routing(c, c.num_tokens * c.num_experts_per_token),
        pre_activations(in_fp32(c), c.num_tokens * c.num_experts_per_token),
        ids(c.num_tokens * c.num_experts_per_token),
        device_ids(ids.size() * index_size(), 0) {
    std::mt19937_64 random(7);
    // Scores of order one: the activations bend there.
    hidden.fill_random(random, 1.0);
    grad.fill_random(random, 1.0);
    up.fill_random(random, 3.0 / std::sqrt(double(c.hidden_size)));
    down.fill_random(random, 3.0 / std::sqrt(double(c.hidden_size)));
    routing.fill_random(random, 1.0);
    addend.fill_random(random, 1.0);
    fill_ids(random);
    solve();
  }

  static Case in_fp32(Case c) {
    c.dtype = DType::kFloat32;
    return c;
  }

  size_t index_size() const { return c.index_type == IndexType::kInt32 ? 4 : 8; }

  void fill_ids(std::mt19937_64& random) {
    std::vector<char> bytes(ids.size() * index_size());
    for (size_t i = 0; i < ids.size(); ++i) {
      const int64_t uniform = static_cast<int64_t>(random() % c.num_experts);
      switch (c.routing) {
        case Routing::kUniform:
          ids[i] = uniform;
          break;
        case Routing::kOneExpert:
          ids[i] = c.num_experts - 1;
          break;
        case Routing::kDuplicates:
          ids[i] = i % 2 == 1 ? ids[i - 1] : uniform;
          break;
        case Routing::kHalfIdle:
          ids[i] = uniform / 2 * 2;
          break;
      }
      const int32_t narrow = static_cast<int32_t>(ids[i]);
      if (c.index_type == IndexType::kInt32) {
        std::memcpy(&bytes[i * 4], &narrow, 4);
      } else {
        std::memcpy(&bytes[i * 8], &ids[i], 8);
      }
    }
    device_ids.upload(bytes);
  }

  // The equations of expert.h, as they stand.
  void solve() {
    if (c.num_experts % 2 == 0) out.values = grad_hidden.values = addend.values;
    const int64_t width = c.hidden_size;
    for (int64_t pair = 0; pair < int64_t(ids.size()); ++pair) {
      const int64_t token = pair / c.num_experts_per_token * width;
      const int64_t expert = ids[pair] * width;
      double& pre_activation = pre_activations.values[pair];
      double gradient = 0;
      for (int64_t h = 0; h < width; ++h) {
        pre_activation += hidden.values[token + h] * up.values[expert + h];
        gradient += grad.values[token + h] * down.values[expert + h];
      }
      const double value = act(c.activation, pre_activation);
      const double up_coefficient =
          routing.values[pair] * act_derivative(c.activation, pre_activation) * gradient;
      grad_routing.values[pair] = value * gradient;
      for (int64_t h = 0; h < width; ++h) {
        out.values[token + h] += value * routing.values[pair] * down.values[expert + h];
        grad_hidden.values[token + h] += up_coefficient * up.values[expert + h];
        grad_up.values[expert + h] += up_coefficient * hidden.values[token + h];
        grad_down.values[expert + h] += value * routing.values[pair] * grad.values[token + h];
      }
    }
  }

  ExpertForwardParams forward_params() {
    ExpertForwardParams params{};
    params.hidden_states = hidden.device.data();
    params.up_weights = up.device.data();
    params.down_weights = down.device.data();
    params.routing_weights = routing.device.data();
    params.indices = device_ids.data();
    params.addend = c.num_experts % 2 == 0 ? addend.device.data() : nullptr;
    params.expert_states = out.device.data();
    params.pre_activations = pre_activations.device.data();
    fill_shape(&params);
    return params;
  }

  ExpertBackwardParams backward_params() {
    ExpertBackwardParams params{};
    params.grad_expert_states = grad.device.data();
    params.hidden_states = hidden.device.data();
    params.up_weights = up.device.data();
    params.down_weights = down.device.data();
    params.routing_weights = routing.device.data();
    params.indices = device_ids.data();
    pre_activations.upload_values();
    params.pre_activations = pre_activations.device.data();
    params.addend = c.num_experts % 2 == 0 ? addend.device.data() : nullptr;
    params.grad_hidden_states = grad_hidden.device.data();
    params.grad_up_weights = grad_up.device.data();
    params.grad_down_weights = grad_down.device.data();
    params.grad_routing_weights = grad_routing.device.data();
    fill_shape(&params);
    return params;
  }

  template <class Params>
  void fill_shape(Params* params) const {
    params->num_tokens = c.num_tokens;
    params->hidden_size = c.hidden_size;
    params->num_experts = c.num_experts;
    params->num_experts_per_token = c.num_experts_per_token;
    params->dtype = c.dtype;
    params->index_type = c.index_type;
    params->activation = c.activation;
  }

  Case c;
  Tensor hidden, grad, up, down, routing, addend;
  Tensor out, grad_hidden, grad_up, grad_down, grad_routing;
  Tensor pre_activations;  // output of the forward, input of the backward
  std::vector<int64_t> ids;
  DeviceBytes device_ids;
};

void expect_close(const Tensor& tensor, const std::vector<char>& bytes, const char* name) {
  const Tolerance allowed = tolerance(tensor.dtype);
  // Sums over many pairs: errors grow with the sum of what was added, not with the result.
  double largest = 1;
  for (const double value : tensor.values) largest = std::max(largest, std::abs(value));
  int failures = 0;
  for (size_t i = 0; i < tensor.values.size() && failures < 5; ++i) {
    const double got = decode(tensor.dtype, bytes.data() + i * size_of(tensor.dtype));
    const double want = tensor.values[i];
    const double limit = allowed.relative * std::abs(want) + allowed.absolute * largest;
    if (!(std::abs(got - want) <= limit)) {
      ADD_FAILURE() << name << "[" << i << "] is " << got << ", expected " << want;
      ++failures;
    }
  }
}

// Runs `launch` twice on poisoned outputs and compares with the oracle and with itself.
template <class Launch>
void check(const std::vector<std::pair<const char*, Tensor*>>& outputs, size_t workspace_bytes,
           Launch&& launch) {
  DeviceBytes workspace(workspace_bytes, 0);
  std::vector<std::vector<char>> first;
  for (int run = 0; run < 2; ++run) {
    workspace.poison();
    for (const auto& [name, tensor] : outputs) tensor->device.poison();
    CHECK_CUDA(launch(workspace_bytes > 0 ? workspace.data() : nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
    workspace.download();  // checks its guards
    for (size_t i = 0; i < outputs.size(); ++i) {
      const std::vector<char> bytes = outputs[i].second->device.download();
      if (run == 0) {
        expect_close(*outputs[i].second, bytes, outputs[i].first);
        first.push_back(bytes);
      } else {
        EXPECT_TRUE(bytes == first[i]) << outputs[i].first << " differs between runs";
      }
    }
  }
}

void check_forward(Problem& problem) {
  ExpertForwardParams params = problem.forward_params();
  const cuda::ExpertForwardPlan plan = cuda::plan_expert_forward(params);
  check({{"expert_states", &problem.out}, {"pre_activations", &problem.pre_activations}},
        plan.workspace_bytes, [&](void* workspace) {
          params.workspace = workspace;
          return cuda::expert_forward(params, plan, nullptr);
        });
}

void check_backward(Problem& problem) {
  ExpertBackwardParams params = problem.backward_params();
  const cuda::ExpertBackwardPlan plan = cuda::plan_expert_backward(params);
  check({{"grad_hidden", &problem.grad_hidden},
         {"grad_up", &problem.grad_up},
         {"grad_down", &problem.grad_down},
         {"grad_routing", &problem.grad_routing}},
        plan.workspace_bytes, [&](void* workspace) {
          params.workspace = workspace;
          return cuda::expert_backward(params, plan, nullptr);
        });
}

class CudaExpert : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      (void)cudaGetLastError();
      GTEST_SKIP() << "no CUDA device";
    }
  }
};

TEST_P(CudaExpert, Forward) {
  Problem problem(GetParam());
  check_forward(problem);
}

TEST_P(CudaExpert, Backward) {
  Problem problem(GetParam());
  check_backward(problem);
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
  ExpertForwardParams params = problem.forward_params();
  for (const auto& [name, token_pass] : every_plan(params)) {
    SCOPED_TRACE(name);
    const cuda::ExpertForwardPlan plan =
        cuda::plan_expert_forward(params, cuda::current_device(), token_pass);
    check({{"expert_states", &problem.out}, {"pre_activations", &problem.pre_activations}},
          plan.workspace_bytes, [&](void* workspace) {
            params.workspace = workspace;
            return cuda::expert_forward(params, plan, nullptr);
          });
  }
}

TEST_P(CudaExpert, BackwardOfEveryStrategy) {
  Problem problem(GetParam());
  ExpertBackwardParams params = problem.backward_params();
  for (const auto& [name, token_pass] : every_plan(params)) {
    SCOPED_TRACE(name);
    const cuda::ExpertBackwardPlan plan = cuda::plan_expert_backward(
        params, cuda::current_device(), token_pass,
        cuda::sort_storage_bytes(
            {params.num_tokens * params.num_experts_per_token, params.num_experts}));
    check({{"grad_hidden", &problem.grad_hidden},
           {"grad_up", &problem.grad_up},
           {"grad_down", &problem.grad_down},
           {"grad_routing", &problem.grad_routing}},
          plan.workspace_bytes, [&](void* workspace) {
            params.workspace = workspace;
            return cuda::expert_backward(params, plan, nullptr);
          });
  }
}

// What is not wanted may be null, and the rest stays right.
TEST_P(CudaExpert, BackwardOfEachGradientAlone) {
  Problem problem(GetParam());
  const ExpertBackwardParams all = problem.backward_params();
  const struct {
    const char* name;
    Tensor* tensor;
    void* ExpertBackwardParams::*field;
  } outputs[] = {
      {"grad_hidden", &problem.grad_hidden, &ExpertBackwardParams::grad_hidden_states},
      {"grad_up", &problem.grad_up, &ExpertBackwardParams::grad_up_weights},
      {"grad_down", &problem.grad_down, &ExpertBackwardParams::grad_down_weights},
      {"grad_routing", &problem.grad_routing, &ExpertBackwardParams::grad_routing_weights}};
  for (const auto& wanted : outputs) {
    ExpertBackwardParams params = all;
    for (const auto& other : outputs) {
      if (other.field != wanted.field) params.*other.field = nullptr;
    }
    const cuda::ExpertBackwardPlan plan = cuda::plan_expert_backward(params);
    check({{wanted.name, wanted.tensor}}, plan.workspace_bytes, [&](void* workspace) {
      params.workspace = workspace;
      return cuda::expert_backward(params, plan, nullptr);
    });
  }
}

std::string name_of(const ::testing::TestParamInfo<Case>& info) {
  return ::testing::PrintToString(info.param);
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

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

// One shape per path: splits and their second stage, many tokens (both row widths of the fused
// one), long and huge segments, both schedules, rows past a tile, rows without alignment.
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
    cases.push_back({203, 520, 64, 100, dtype, i64, Routing::kDuplicates});  // ragged last tile
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

INSTANTIATE_TEST_SUITE_P(AwkwardShapes, CudaExpert, ::testing::ValuesIn(awkward_shapes()), name_of);
INSTANTIATE_TEST_SUITE_P(Paths, CudaExpert, ::testing::ValuesIn(paths()), name_of);

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
