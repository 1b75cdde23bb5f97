// CUDA router against host oracles: brute force over the whole grid for the choice (exact), double
// precision for weights and gradients.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_kernel_testing.h"
#include "omni_moe/cuda.h"

namespace omni_moe {
namespace {

using CudaRouter = CudaKernelTest;

// ---- cases ----

enum class Logits { kNormal, kTies, kZeros, kCollapse, kMasked, kSpecial, kBothInfinities };
constexpr Logits kFiniteLogits[] = {Logits::kNormal, Logits::kTies, Logits::kZeros,
                                    Logits::kCollapse};
constexpr Logits kOddLogits[] = {Logits::kMasked, Logits::kSpecial, Logits::kBothInfinities};
constexpr RouterScore kScores[] = {RouterScore::kLogit, RouterScore::kSoftmax,
                                   RouterScore::kSoftmaxTopK};

std::vector<float> make_logits(Logits kind, DType dtype, int64_t count, bool is_y, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  std::vector<float> values(count);
  for (float& v : values) {
    const float p = uniform(random);
    v = normal(random);
    switch (kind) {
      case Logits::kNormal:
        break;
      case Logits::kTies:
        v = std::round(2 * v) / 2;
        break;
      case Logits::kZeros:
        v = p < 0.5f ? 0.0f : -0.0f;
        break;
      // Gaps below the ulp of the sums.
      case Logits::kCollapse:
        v = is_y ? std::round(v) * 1e-9f : 1.0f + std::round(v) * 2e-8f;
        break;
      case Logits::kMasked:
        v = p < 0.7f ? -kInf : v;
        break;
      case Logits::kSpecial:
        v = p < 0.03f ? kNan : p < 0.06f ? kInf : p < 0.09f ? -kNan : v;
        break;
      case Logits::kBothInfinities:
        v = p < 0.1f ? kInf : p < 0.3f ? -kInf : p < 0.32f ? kNan : v;
    }
    v = round_to(dtype, v);
  }
  return values;
}

struct Case {
  int64_t num_tokens, num_rows, num_cols, k;
  DTypeInfo type;
  RouterScore score;
  Logits logits;

  std::string name() const {
    return std::string(type.name) + " T" + std::to_string(num_tokens) + " " +
           std::to_string(num_rows) + "x" + std::to_string(num_cols) + " K" + std::to_string(k) +
           " score " + std::to_string(static_cast<int>(score)) + " logits " +
           std::to_string(static_cast<int>(logits));
  }
};

struct Routed {
  std::vector<float> x, y;  // [T, R], [T, C], as stored
  std::vector<unsigned char> weights;
  std::vector<int32_t> indices;
};

Routed route(const Case& c, unsigned seed = 1) {
  Routed routed;
  routed.x = make_logits(c.logits, c.type.dtype, c.num_tokens * c.num_rows, false, seed);
  routed.y = make_logits(c.logits, c.type.dtype, c.num_tokens * c.num_cols, true, seed + 1000);
  const DeviceBuffer x(encode(c.type, routed.x)), y(encode(c.type, routed.y));
  const DeviceBuffer weights(c.num_tokens * c.k * c.type.bytes);
  const DeviceBuffer indices(c.num_tokens * c.k * sizeof(int32_t));
  RouterForwardParams params{
      x.data(),     y.data(),   weights.data(), static_cast<int32_t*>(indices.data()),
      c.num_tokens, c.num_rows, c.num_cols,     c.k,
      c.type.dtype, c.score,    nullptr};
  const auto plan = cuda::plan_router_forward(params);
  const DeviceBuffer workspace(plan.workspace_bytes);
  params.workspace = workspace.data();
  EXPECT_EQ(cudaSuccess, cuda::router_forward(params, plan, nullptr)) << c.name();
  EXPECT_EQ(cudaSuccess, cudaDeviceSynchronize()) << c.name();
  workspace.read();
  routed.weights = weights.read();
  const auto bytes = indices.read();
  routed.indices.resize(bytes.size() / sizeof(int32_t));
  if (!bytes.empty()) std::memcpy(routed.indices.data(), bytes.data(), bytes.size());
  return routed;
}

// ---- forward oracle ----

double log_sum_exp(const float* logits, int64_t n) {
  double max = -kInf, sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(logits[i])) return kNan;
    max = std::max<double>(max, logits[i]);
  }
  if (!std::isfinite(max)) return kNan;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(logits[i] - max);
  return max + std::log(sum);
}

struct Oracle {
  std::vector<int32_t> ids;     // [k]
  std::vector<double> weights;  // [k]
};

Oracle route_token(const Case& c, const float* x, const float* y) {
  std::vector<float> sums(c.num_rows * c.num_cols);
  for (int64_t i = 0; i < c.num_rows * c.num_cols; ++i) {
    sums[i] = x[i / c.num_cols] + y[i % c.num_cols];
  }
  Oracle oracle;
  std::vector<int32_t> order(sums.size());
  std::iota(order.begin(), order.end(), 0);
  const double lse = log_sum_exp(x, c.num_rows) + log_sum_exp(y, c.num_cols);
  const bool undefined = c.score != RouterScore::kLogit && std::isnan(lse);
  if (!undefined) {
    std::partial_sort(order.begin(), order.begin() + c.k, order.end(), [&](int32_t a, int32_t b) {
      const bool nan_a = std::isnan(sums[a]), nan_b = std::isnan(sums[b]);
      if (nan_a != nan_b) return nan_a;
      if (!nan_a && sums[a] != sums[b]) return sums[a] > sums[b];
      return a < b;
    });
  }
  oracle.ids.assign(order.begin(), order.begin() + c.k);
  double total = 0;
  for (const int32_t id : oracle.ids) {
    const double sum = c.score == RouterScore::kLogit
                           ? sums[id]
                           : static_cast<double>(x[id / c.num_cols]) + y[id % c.num_cols];
    const double weight = c.score == RouterScore::kLogit ? sum : std::exp(sum - lse);
    oracle.weights.push_back(weight);
    total += weight;
  }
  if (c.score == RouterScore::kSoftmaxTopK) {
    for (double& weight : oracle.weights) weight /= total;
  }
  return oracle;
}

void check_forward(const Case& c, unsigned seed = 1) {
  const Routed routed = route(c, seed);
  const std::vector<float> weights = decode(c.type, routed.weights);
  for (int64_t t = 0; t < c.num_tokens; ++t) {
    const Oracle oracle =
        route_token(c, routed.x.data() + t * c.num_rows, routed.y.data() + t * c.num_cols);
    for (int64_t i = 0; i < c.k; ++i) {
      const std::string what = c.name() + " token " + std::to_string(t) + " k " + std::to_string(i);
      ASSERT_EQ(oracle.ids[i], routed.indices[t * c.k + i]) << what;
      const double want = oracle.weights[i];
      // A logit is one rounding of the fp32 sum; a softmax weight carries errors of its exponent.
      if (c.score == RouterScore::kLogit) {
        expect_close(weights[t * c.k + i], round_to(c.type.dtype, static_cast<float>(want)), 0,
                     what);
      } else {
        expect_close(weights[t * c.k + i], want,
                     (c.type.epsilon + 5e-6) * std::abs(want) + c.type.smallest, what);
      }
    }
    if (testing::Test::HasFailure()) return;
  }
  const Routed again = route(c, seed);
  EXPECT_EQ(routed.indices, again.indices) << c.name();
  EXPECT_EQ(routed.weights, again.weights) << c.name();
}

struct Grid {
  int64_t num_rows, num_cols;
};
constexpr int64_t kTopKs[] = {1, 3, 16, 31, 32, 33, 63, 64, 127, 128, 500};

template <class Body>
void for_each_k(const Grid& grid, Body body) {
  const int64_t pairs = grid.num_rows * grid.num_cols;
  for (const int64_t k : kTopKs) {
    if (k < pairs) body(k);
  }
  if (pairs <= 4096) body(pairs);
}

void check_forward_grid(const Grid& grid, int64_t num_tokens) {
  for (const DTypeInfo& type : kDTypes) {
    for_each_k(grid, [&](int64_t k) {
      for (const RouterScore score : kScores) {
        for (const Logits logits : kFiniteLogits) {
          check_forward({num_tokens, grid.num_rows, grid.num_cols, k, type, score, logits});
        }
        for (const Logits logits : kOddLogits) {
          check_forward({num_tokens, grid.num_rows, grid.num_cols, k, type, score, logits});
        }
        if (testing::Test::HasFailure()) return;
      }
    });
  }
}

TEST_F(CudaRouter, ForwardGrid1x1) { check_forward_grid({1, 1}, 37); }
TEST_F(CudaRouter, ForwardGrid8x8) { check_forward_grid({8, 8}, 199); }
TEST_F(CudaRouter, ForwardGrid5x7) { check_forward_grid({5, 7}, 37); }
TEST_F(CudaRouter, ForwardGrid64x64) { check_forward_grid({64, 64}, 37); }
TEST_F(CudaRouter, ForwardGrid37x100) { check_forward_grid({37, 100}, 37); }
TEST_F(CudaRouter, ForwardGrid256x256) { check_forward_grid({256, 256}, 5); }
TEST_F(CudaRouter, ForwardGrid1x300) { check_forward_grid({1, 300}, 5); }
TEST_F(CudaRouter, ForwardGrid1100x3) { check_forward_grid({1100, 3}, 3); }

TEST_F(CudaRouter, ForwardManyExpertsPerToken) {
  for (const int64_t k : {512, 4096}) {
    for (const DTypeInfo& type : kDTypes) {
      for (const Logits logits : kFiniteLogits) {
        check_forward({3, 320, 320, k, type, RouterScore::kSoftmax, logits});
      }
    }
  }
}

TEST_F(CudaRouter, ForwardLongAxes) {
  for (const DTypeInfo& type : kDTypes) {
    check_forward({3, 1024, 1024, 64, type, RouterScore::kLogit, Logits::kNormal});
    check_forward({3, 700, 1024, 16, type, RouterScore::kSoftmax, Logits::kTies});
    check_forward({2, 2000, 300, 48, type, RouterScore::kSoftmaxTopK, Logits::kNormal});
    check_forward({2, 3, 40000, 200, type, RouterScore::kSoftmax, Logits::kTies});
    check_forward({2, 3, 40000, 70, type, RouterScore::kLogit, Logits::kBothInfinities});
    check_forward({2, 1, 70000, 9, type, RouterScore::kLogit, Logits::kNormal});
  }
}

// The widest warp path: 128 experts per token from axes that fill more than 8 registers a lane.
TEST_F(CudaRouter, ForwardMostExpertsOfAWarp) {
  for (const DTypeInfo& type : kDTypes) {
    for (const Grid& grid : {Grid{257, 320}, Grid{512, 300}, Grid{1024, 1024}}) {
      for (const int64_t k : {127, 128, 129}) {
        for (const Logits logits : kFiniteLogits) {
          check_forward({3, grid.num_rows, grid.num_cols, k, type, RouterScore::kSoftmax, logits});
        }
        for (const Logits logits : kOddLogits) {
          check_forward({3, grid.num_rows, grid.num_cols, k, type, RouterScore::kLogit, logits});
        }
        if (testing::Test::HasFailure()) return;
      }
    }
  }
}

TEST_F(CudaRouter, ForwardEmpty) {
  for (const DTypeInfo& type : kDTypes) {
    EXPECT_TRUE(route({0, 8, 8, 4, type, RouterScore::kSoftmax, Logits::kNormal}).indices.empty());
    EXPECT_TRUE(route({5, 8, 8, 0, type, RouterScore::kSoftmax, Logits::kNormal}).indices.empty());
  }
}

TEST_F(CudaRouter, Float64HasNoKernel) {
  RouterForwardParams forward{};
  forward.num_tokens = forward.num_rows = forward.num_cols = forward.num_experts_per_token = 1;
  forward.dtype = DType::kFloat64;
  EXPECT_EQ(cudaErrorInvalidValue,
            cuda::router_forward(forward, cuda::plan_router_forward(forward), nullptr));
  RouterBackwardParams backward{};
  backward.num_tokens = backward.num_rows = backward.num_cols = 1;
  backward.dtype = DType::kFloat64;
  EXPECT_EQ(cudaErrorInvalidValue,
            cuda::router_backward(backward, cuda::plan_router_backward(backward), nullptr));
}

// ---- backward ----

// Gradients of one axis in double, and per element the sum of magnitudes that bounds their error.
struct AxisGradient {
  std::vector<double> grad, magnitude;
  explicit AxisGradient(int64_t n) : grad(n), magnitude(n) {}
  void add(int64_t i, double value) {
    grad[i] += value;
    magnitude[i] += std::abs(value);
  }
  void subtract_softmax(const float* logits, double total, double total_magnitude) {
    const int64_t n = static_cast<int64_t>(grad.size());
    const double lse = log_sum_exp(logits, n);
    for (int64_t i = 0; i < n; ++i) {
      grad[i] -= std::exp(logits[i] - lse) * total;
      magnitude[i] += std::exp(logits[i] - lse) * total_magnitude;
    }
  }
};

void backward_token(const Case& c, const float* x, const float* y, const float* grad,
                    const int32_t* ids, AxisGradient& grad_x, AxisGradient& grad_y) {
  const double lse = log_sum_exp(x, c.num_rows) + log_sum_exp(y, c.num_cols);
  const bool is_logit = c.score == RouterScore::kLogit;
  std::vector<double> weights(c.k, 1.0);
  double total = 0, total_grad = 0;
  for (int64_t i = 0; i < c.k; ++i) {
    const double sum = static_cast<double>(x[ids[i] / c.num_cols]) + y[ids[i] % c.num_cols];
    if (!is_logit) weights[i] = std::exp(sum - lse);
    total += weights[i];
    total_grad += weights[i] * grad[i];
  }
  double sum = 0, magnitude = 0;
  for (int64_t i = 0; i < c.k; ++i) {
    double g = weights[i] * grad[i];
    double scale = std::abs(g);
    if (c.score == RouterScore::kSoftmaxTopK) {
      g = weights[i] / total * (grad[i] - total_grad / total);
      scale = weights[i] / total * (std::abs(grad[i]) + std::abs(total_grad / total));
    }
    grad_x.add(ids[i] / c.num_cols, g);
    grad_y.add(ids[i] % c.num_cols, g);
    grad_x.magnitude[ids[i] / c.num_cols] += scale;
    grad_y.magnitude[ids[i] % c.num_cols] += scale;
    sum += g;
    magnitude += scale;
  }
  if (c.score == RouterScore::kSoftmax) {
    grad_x.subtract_softmax(x, sum, magnitude);
    grad_y.subtract_softmax(y, sum, magnitude);
  }
  if (!is_logit && std::isnan(lse)) {
    std::fill(grad_x.grad.begin(), grad_x.grad.end(), kNan);
    std::fill(grad_y.grad.begin(), grad_y.grad.end(), kNan);
  }
}

struct Gradients {
  std::vector<unsigned char> x, y;
};

Gradients route_backward(const Case& c, const Routed& routed, const std::vector<float>& grad) {
  const DeviceBuffer x(encode(c.type, routed.x)), y(encode(c.type, routed.y));
  const DeviceBuffer grad_weights(encode(c.type, grad));
  std::vector<unsigned char> id_bytes(routed.indices.size() * sizeof(int32_t));
  if (!id_bytes.empty()) std::memcpy(id_bytes.data(), routed.indices.data(), id_bytes.size());
  const DeviceBuffer indices(id_bytes);
  const DeviceBuffer grad_x(routed.x.size() * c.type.bytes), grad_y(routed.y.size() * c.type.bytes);
  const bool is_logit = c.score == RouterScore::kLogit;
  RouterBackwardParams params{grad_weights.data(),
                              is_logit ? nullptr : x.data(),
                              is_logit ? nullptr : y.data(),
                              static_cast<const int32_t*>(indices.data()),
                              grad_x.data(),
                              grad_y.data(),
                              c.num_tokens,
                              c.num_rows,
                              c.num_cols,
                              c.k,
                              c.type.dtype,
                              c.score,
                              nullptr};
  const auto plan = cuda::plan_router_backward(params);
  const DeviceBuffer workspace(plan.workspace_bytes);
  params.workspace = workspace.data();
  EXPECT_EQ(cudaSuccess, cuda::router_backward(params, plan, nullptr)) << c.name();
  EXPECT_EQ(cudaSuccess, cudaDeviceSynchronize()) << c.name();
  workspace.read();
  return {grad_x.read(), grad_y.read()};
}

void check_axis(const Case& c, const std::vector<unsigned char>& got, int64_t t,
                const AxisGradient& want, const char* axis) {
  const std::vector<float> values = decode(c.type, got);
  const auto n = static_cast<int64_t>(want.grad.size());
  for (int64_t i = 0; i < n; ++i) {
    expect_close(
        values[t * n + i], want.grad[i],
        c.type.epsilon * std::abs(want.grad[i]) + 1e-5 * want.magnitude[i] + c.type.smallest,
        c.name() + " grad_" + axis + " token " + std::to_string(t) + " at " + std::to_string(i));
    if (testing::Test::HasFailure()) return;
  }
}

void check_backward(const Case& c) {
  const Routed routed = route(c);
  std::vector<float> grad =
      make_logits(Logits::kNormal, c.type.dtype, c.num_tokens * c.k, false, 77);
  const Gradients gradients = route_backward(c, routed, grad);
  for (int64_t t = 0; t < c.num_tokens; ++t) {
    AxisGradient grad_x(c.num_rows), grad_y(c.num_cols);
    backward_token(c, routed.x.data() + t * c.num_rows, routed.y.data() + t * c.num_cols,
                   grad.data() + t * c.k, routed.indices.data() + t * c.k, grad_x, grad_y);
    check_axis(c, gradients.x, t, grad_x, "x");
    check_axis(c, gradients.y, t, grad_y, "y");
    if (testing::Test::HasFailure()) return;
  }
  const Gradients again = route_backward(c, routed, grad);
  EXPECT_EQ(gradients.x, again.x) << c.name();
  EXPECT_EQ(gradients.y, again.y) << c.name();
}

TEST_F(CudaRouter, Backward) {
  constexpr Grid kGrids[] = {{1, 1}, {5, 7}, {8, 8}, {37, 100}, {256, 256}};
  for (const Grid& grid : kGrids) {
    for (const DTypeInfo& type : kDTypes) {
      for_each_k(grid, [&](int64_t k) {
        for (const RouterScore score : kScores) {
          for (const Logits logits : {Logits::kNormal, Logits::kTies}) {
            check_backward({7, grid.num_rows, grid.num_cols, k, type, score, logits});
          }
        }
      });
    }
  }
}

TEST_F(CudaRouter, BackwardSpecialValues) {
  for (const DTypeInfo& type : kDTypes) {
    for (const int64_t k : {5, 140}) {
      for (const RouterScore score :
           {RouterScore::kLogit, RouterScore::kSoftmax, RouterScore::kSoftmaxTopK}) {
        check_backward({37, 20, 30, k, type, score, Logits::kSpecial});
      }
      check_backward({37, 20, 30, k, type, RouterScore::kSoftmax, Logits::kMasked});
    }
  }
}

TEST_F(CudaRouter, BackwardManyExpertsPerToken) {
  for (const DTypeInfo& type : kDTypes) {
    for (const RouterScore score : kScores) {
      check_backward({3, 320, 320, 4096, type, score, Logits::kNormal});
    }
  }
}

TEST_F(CudaRouter, BackwardLongAxes) {
  for (const DTypeInfo& type : kDTypes) {
    check_backward({3, 2, 9000, 20, type, RouterScore::kSoftmax, Logits::kNormal});
    check_backward({3, 2, 60000, 300, type, RouterScore::kSoftmax, Logits::kNormal});
  }
}

TEST_F(CudaRouter, BackwardMostExpertsOfAWarp) {
  for (const DTypeInfo& type : kDTypes) {
    for (const RouterScore score : kScores) {
      check_backward({3, 512, 300, 128, type, score, Logits::kNormal});
    }
  }
}

TEST_F(CudaRouter, BackwardEmpty) {
  for (const DTypeInfo& type : kDTypes) {
    for (const RouterScore score : kScores) {
      check_backward({0, 8, 8, 4, type, score, Logits::kNormal});
      check_backward({5, 8, 8, 0, type, score, Logits::kNormal});
    }
  }
}

}  // namespace
}  // namespace omni_moe
