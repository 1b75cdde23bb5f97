// The CUDA norms of each token's logits, forward and backward, against the CPU backend's in fp64.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "cuda_kernel_testing.h"

namespace omni_moe {
namespace {

using CudaTokenNorm = CudaKernelTest;

constexpr double kEps = 1e-5;

struct Case {
  int64_t num_tokens, num_rows, num_cols;
  DType dtype;
  TokenNorm norm;
  int64_t padding = 0;  // elements between the rows of the logits
  int64_t offset = 0;   // elements by which all operands miss their alignment
  double mean = 0;      // of all logits

  int64_t width() const { return num_rows + num_cols; }
  int64_t stride() const { return width() + padding; }
  std::string name() const {
    return std::string(name_of(dtype)) + " T" + std::to_string(num_tokens) + " R" +
           std::to_string(num_rows) + " C" + std::to_string(num_cols) + " padding " +
           std::to_string(padding) + " offset " + std::to_string(offset) +
           (norm == TokenNorm::kLayerNorm ? " layer_norm" : " rms_norm");
  }
};

struct Problem {
  explicit Problem(const Case& c)
      : c(c),
        logits(c.dtype, c.num_tokens * c.stride(), c.offset),
        normed_x(c.dtype, c.num_tokens * c.num_rows, c.offset),
        normed_y(c.dtype, c.num_tokens * c.num_cols, c.offset),
        grad_x(c.dtype, c.num_tokens * c.num_rows, c.offset),
        grad_y(c.dtype, c.num_tokens * c.num_cols, c.offset),
        inv_std(DType::kFloat32, c.num_tokens * 2),
        grad_logits(c.dtype, c.num_tokens * c.width(), c.offset) {
    std::mt19937 random(std::random_device{}());
    std::normal_distribution<float> normal;
    std::fill(logits.values.begin(), logits.values.end(), kNaN);  // the padding
    for (int64_t t = 0; t < c.num_tokens; ++t) {
      const double scale = 0.25 + static_cast<double>(t % 7);
      for (int64_t i = 0; i < c.width(); ++i) {
        logits.values[t * c.stride() + i] = normal(random) * scale + c.mean;
      }
    }
    logits.upload();
    fill_normal(grad_x, random);
    fill_normal(grad_y, random);
  }

  TokenNormForwardParams forward(Side side) {
    return {.logits = logits.at(side),
            .normed_x = normed_x.at(side),
            .normed_y = normed_y.at(side),
            .inv_std = inv_std.at(side),
            .num_tokens = c.num_tokens,
            .num_rows = c.num_rows,
            .num_cols = c.num_cols,
            .logits_stride = c.stride(),
            .dtype = dtype_on(side, c.dtype),
            .norm = c.norm,
            .eps = kEps};
  }
  TokenNormBackwardParams backward(Side side) {
    return {.grad_x = grad_x.at(side),
            .grad_y = grad_y.at(side),
            .normed_x = normed_x.at(side),
            .normed_y = normed_y.at(side),
            .inv_std = inv_std.at(side),
            .grad_logits = grad_logits.at(side),
            .num_tokens = c.num_tokens,
            .num_rows = c.num_rows,
            .num_cols = c.num_cols,
            .dtype = dtype_on(side, c.dtype),
            .norm = c.norm};
  }

  void run_forward() {
    const auto params = forward(Side::kDevice);
    run_twice({&normed_x.device, &normed_y.device, &inv_std.device}, 0, [&](void*) {
      return cuda::token_norm_forward(params, cuda::plan_token_norm_forward(params), nullptr);
    });
  }
  void run_backward() {
    const auto params = backward(Side::kDevice);
    run_twice({&grad_logits.device}, 0, [&](void*) {
      return cuda::token_norm_backward(params, cuda::plan_token_norm_backward(params), nullptr);
    });
  }

  // The largest logit of a token's axis in standard deviations: what cancels in the mean.
  double relative(int64_t t, int axis) const {
    const int64_t first = axis == 0 ? 0 : c.num_rows, n = axis == 0 ? c.num_rows : c.num_cols;
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      largest = std::max(largest, std::abs(logits.values[t * c.stride() + first + i]));
    }
    return largest * inv_std.values[2 * t + axis];
  }

  Case c;
  Operand logits;  // [T, R + C], rows apart, NaN between them
  Operand normed_x, normed_y, grad_x, grad_y, inv_std, grad_logits;
};

void check(const Case& c) {
  SCOPED_TRACE(c.name());
  Problem p(c);
  p.run_forward();
  cpu::token_norm_forward(p.forward(Side::kHost), kSerial);
  const double loss = sum_error(std::max(c.num_rows, c.num_cols));
  const Values& inv_std = p.inv_std.values;
  expect_close("inv_std", p.inv_std.read(), inv_std, [&](size_t i) {
    const double relative = p.relative(static_cast<int64_t>(i / 2), static_cast<int>(i % 2));
    return rounding_error(DType::kFloat32, inv_std[i]) + loss * inv_std[i] * (1 + relative);
  });
  for (const int axis : {0, 1}) {
    const Operand& normed = axis == 0 ? p.normed_x : p.normed_y;
    const auto n = static_cast<size_t>(axis == 0 ? c.num_rows : c.num_cols);
    expect_close(axis == 0 ? "normed_x" : "normed_y", normed.read(), normed.values, [&](size_t i) {
      const double relative = p.relative(static_cast<int64_t>(i / n), axis);
      return rounding_error(c.dtype, normed.values[i]) + loss * (1 + relative) * (1 + relative);
    });
  }

  // On the outputs of the forward as the device has rounded them.
  p.normed_x.values = p.normed_x.read();
  p.normed_y.values = p.normed_y.read();
  p.inv_std.values = p.inv_std.read();
  p.run_backward();
  cpu::token_norm_backward(p.backward(Side::kHost), kSerial);
  const Values& grad = p.grad_logits.values;
  expect_close("grad_logits", p.grad_logits.read(), grad, [&](size_t i) {
    const auto width = static_cast<size_t>(c.width());
    const int axis = static_cast<int64_t>(i % width) >= c.num_rows;
    const double scale = p.inv_std.values[2 * (i / width) + static_cast<size_t>(axis)];
    constexpr double kLargest = 6;  // of gradients and normed logits, beside each other's mean
    return rounding_error(c.dtype, grad[i]) + loss * scale * kLargest * kLargest;
  });
}

void check_all(int64_t num_tokens, int64_t num_rows, int64_t num_cols, int64_t padding = 0,
               int64_t offset = 0) {
  for (const DType type : kDTypes) {
    for (const TokenNorm norm : {TokenNorm::kLayerNorm, TokenNorm::kRmsNorm}) {
      check({num_tokens, num_rows, num_cols, type, norm, padding, offset});
      if (testing::Test::HasFailure()) return;
    }
  }
}

TEST_F(CudaTokenNorm, Small) {
  for (const int64_t num_tokens : {1, 3, 37, 199}) {
    check_all(num_tokens, 1, 1);
    check_all(num_tokens, 7, 1);
    check_all(num_tokens, 8, 40);
    check_all(num_tokens, 64, 100);
    check_all(num_tokens, 64, 104, /*padding=*/8);
    check_all(num_tokens, 64, 104, /*padding=*/3);
    check_all(num_tokens, 64, 104, /*padding=*/0, /*offset=*/1);
    if (HasFailure()) return;
  }
}

TEST_F(CudaTokenNorm, NoTokens) { check_all(0, 8, 5); }

TEST_F(CudaTokenNorm, RouterShapes) {
  check_all(4096, 64, 64);
  check_all(4095, 320, 320);
}

// As many as the registers of a warp hold, and more, with vectors and without.
TEST_F(CudaTokenNorm, WideAxes) {
  check_all(5, 512, 1024);
  check_all(5, 520, 1032);
  check_all(5, 4096, 10000);
  check_all(5, 513, 3001);
}

TEST_F(CudaTokenNorm, LargeMean) {
  for (const int64_t width : {8, 33, 2000}) {
    check({37, width, 5, DType::kFloat32, TokenNorm::kLayerNorm, 0, 0, 1e4});
  }
}

TEST_F(CudaTokenNorm, ConstantTokens) {
  for (const DType type : kDTypes) {
    Problem p({100, 8, 9, type, TokenNorm::kLayerNorm});
    p.logits.fill([] { return 3.14159f; });
    p.run_forward();
    p.run_backward();
    for (const Operand* normed : {&p.normed_x, &p.normed_y}) {
      const Values values = normed->read();
      EXPECT_TRUE(std::all_of(values.begin(), values.end(), [](double v) { return v == 0; }));
    }
    const Values grad = p.grad_logits.read();
    EXPECT_TRUE(std::all_of(grad.begin(), grad.end(), [](double v) { return std::isfinite(v); }));
  }
}

TEST_F(CudaTokenNorm, NonFiniteLogitsStayInTheirTokenAndAxis) {
  Problem p({50, 8, 16, DType::kFloat16, TokenNorm::kLayerNorm});
  p.logits.values[0] = kNaN;               // x of token 0
  p.logits.values[3 * 24 + 8 + 5] = kInf;  // y of token 3
  p.logits.values[49 * 24 + 7] = -kInf;    // x of token 49
  p.logits.upload();
  p.run_forward();
  const Values x = p.normed_x.read(), y = p.normed_y.read();
  for (size_t i = 0; i < x.size(); ++i) {
    ASSERT_EQ(i / 8 == 0 || i / 8 == 49, std::isnan(x[i])) << "x " << i;
  }
  for (size_t i = 0; i < y.size(); ++i) ASSERT_EQ(i / 16 == 3, std::isnan(y[i])) << "y " << i;
}

TEST_F(CudaTokenNorm, RefusesWhatItHasNoKernelFor) {
  TokenNormForwardParams forward{};
  forward.dtype = DType::kFloat64;
  EXPECT_EQ(cudaErrorInvalidValue,
            cuda::token_norm_forward(forward, cuda::plan_token_norm_forward(forward), nullptr));
  TokenNormBackwardParams backward{};
  backward.dtype = DType::kFloat64;
  EXPECT_EQ(cudaErrorInvalidValue,
            cuda::token_norm_backward(backward, cuda::plan_token_norm_backward(backward), nullptr));
}

}  // namespace
}  // namespace omni_moe
