// The CUDA router against the CPU backend's: the choice, which both make by sums in fp32, exactly;
// weights and gradients in fp64.
#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda_router_testing.h"

namespace omni_moe {
namespace {

using CudaRouter = CudaKernelTest;

// ---- forward ----

void check_forward(Problem& p) {
  const Case& c = p.c;
  SCOPED_TRACE(c.name());
  auto params = p.params_of<RouterForwardParams>(Side::kDevice);
  const auto plan = cuda::plan_router_forward(params);
  const auto got =
      run_twice({&p.weights.device, &p.device_ids}, plan.workspace_bytes, [&](void* workspace) {
        params.workspace = workspace;
        return cuda::router_forward(params, plan, nullptr);
      });
  ASSERT_EQ(p.ids, integers_of<int32_t>(got[1]));
  // A logit is one rounding of the fp32 sum; a softmax weight carries errors of its exponent.
  const Values& want = p.weights.values;
  expect_close(
      "weights", decode(c.dtype, got[0]), want,
      [&](size_t i) {
        return p.is_softmax() ? rounding_error(c.dtype, want[i]) + 5e-6 * std::abs(want[i]) : 0;
      },
      NaNs::kMatch);
}

void check_forward(const Case& c) {
  Problem p(c);
  check_forward(p);
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
  for (const DType type : kDTypes) {
    for_each_k(grid, [&](int64_t k) {
      for (const RouterScore score : kScores) {
        for (const Logits logits : kAllLogits) {
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
    for (const DType type : kDTypes) {
      for (const Logits logits : kFiniteLogits) {
        check_forward({3, 320, 320, k, type, RouterScore::kSoftmax, logits});
      }
    }
  }
}

TEST_F(CudaRouter, ForwardLongAxes) {
  for (const DType type : kDTypes) {
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
  for (const DType type : kDTypes) {
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
  for (const DType type : kDTypes) {
    check_forward({0, 8, 8, 4, type, RouterScore::kSoftmax, Logits::kNormal});
    check_forward({5, 8, 8, 0, type, RouterScore::kSoftmax, Logits::kNormal});
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

// Of each element of an axis' gradient, the magnitudes of what is added: they bound its error.
struct Magnitudes {
  Values x, y;

  explicit Magnitudes(const Problem& p) : x(p.x.values.size()), y(p.y.values.size()) {
    for (int64_t t = 0; t < p.c.num_tokens; ++t) add_token(p, t);
  }

 private:
  void add_token(const Problem& p, int64_t t) {
    const int64_t begin = t * p.c.k, end = begin + p.c.k;
    const auto weight_of = [&](int64_t i) { return p.is_softmax() ? p.softmax_of_pair(i) : 1; };
    double total = 0, mean_grad = 0, sum = 0;
    for (int64_t i = begin; i < end; ++i) total += weight_of(i);
    for (int64_t i = begin; i < end; ++i) {
      mean_grad += weight_of(i) / total * p.grad_weights.values[i];
    }
    for (int64_t i = begin; i < end; ++i) {
      const double grad = p.grad_weights.values[i], weight = weight_of(i);
      double magnitude = weight * std::abs(grad), value = magnitude;
      if (p.c.score == RouterScore::kSoftmaxTopK) {
        magnitude = weight / total * (std::abs(grad) + std::abs(mean_grad));
        value = weight / total * std::abs(grad - mean_grad);
      }
      x[p.x_of(i)] += value + magnitude;
      y[p.y_of(i)] += value + magnitude;
      sum += magnitude;
    }
    if (p.c.score != RouterScore::kSoftmax) return;
    const int64_t rows = p.c.num_rows, cols = p.c.num_cols;
    for (int64_t i = t * rows; i < (t + 1) * rows; ++i) x[i] += p.softmax_x[i] * sum;
    for (int64_t i = t * cols; i < (t + 1) * cols; ++i) y[i] += p.softmax_y[i] * sum;
  }
};

void check_backward(const Case& c) {
  SCOPED_TRACE(c.name());
  Problem p(c);
  check_forward(p);
  fill_logits(p.grad_weights, Logits::kNormal, false, 77);
  p.device_ids.upload(bytes_of(p.ids));
  cpu::router_backward(p.params_of<RouterBackwardParams>(Side::kHost), kSerial);
  auto params = p.params_of<RouterBackwardParams>(Side::kDevice);
  const auto plan = cuda::plan_router_backward(params);
  const auto got =
      run_twice({&p.grad_x.device, &p.grad_y.device}, plan.workspace_bytes, [&](void* workspace) {
        params.workspace = workspace;
        return cuda::router_backward(params, plan, nullptr);
      });
  const Magnitudes magnitudes(p);
  const auto check_axis = [&](const char* name, const Bytes& got, const Values& want,
                              const Values& magnitude) {
    expect_close(
        name, decode(c.dtype, got), want,
        [&](size_t i) { return rounding_error(c.dtype, want[i]) + 1e-5 * magnitude[i]; },
        NaNs::kMatch);
  };
  check_axis("grad_x", got[0], p.grad_x.values, magnitudes.x);
  check_axis("grad_y", got[1], p.grad_y.values, magnitudes.y);
}

TEST_F(CudaRouter, Backward) {
  constexpr Grid kGrids[] = {{1, 1}, {5, 7}, {8, 8}, {37, 100}, {256, 256}};
  for (const Grid& grid : kGrids) {
    for (const DType type : kDTypes) {
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
  for (const DType type : kDTypes) {
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
  for (const DType type : kDTypes) {
    for (const RouterScore score : kScores) {
      check_backward({3, 320, 320, 4096, type, score, Logits::kNormal});
    }
  }
}

TEST_F(CudaRouter, BackwardLongAxes) {
  for (const DType type : kDTypes) {
    check_backward({3, 2, 9000, 20, type, RouterScore::kSoftmax, Logits::kNormal});
    check_backward({3, 2, 60000, 300, type, RouterScore::kSoftmax, Logits::kNormal});
  }
}

TEST_F(CudaRouter, BackwardMostExpertsOfAWarp) {
  for (const DType type : kDTypes) {
    for (const RouterScore score : kScores) {
      check_backward({3, 512, 300, 128, type, score, Logits::kNormal});
    }
  }
}

TEST_F(CudaRouter, BackwardEmpty) {
  for (const DType type : kDTypes) {
    for (const RouterScore score : kScores) {
      check_backward({0, 8, 8, 4, type, score, Logits::kNormal});
      check_backward({5, 8, 8, 0, type, score, Logits::kNormal});
    }
  }
}

}  // namespace
}  // namespace omni_moe
