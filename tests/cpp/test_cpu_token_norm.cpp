// The norms of each token's logits of the CPU backend against an oracle in double, for every set of
// kernels, serially and on two threads.
#include "cpu_kernel_testing.h"

namespace omni_moe::cpu {
namespace {

struct Shape {
  int64_t num_tokens, num_rows, num_cols;
  int64_t width() const { return num_rows + num_cols; }
  int64_t stride() const { return width() + 3; }  // of the logits
};
constexpr Shape kShapes[] = {{0, 4, 5}, {1, 1, 7}, {3, 16, 5}, {37, 33, 64}, {199, 3, 1025}};

constexpr double kEps = 1e-5;

struct Outputs {
  Buffer normed_x, normed_y, inv_std, grad;
  bool operator==(const Outputs& other) const {
    return normed_x == other.normed_x && normed_y == other.normed_y && inv_std == other.inv_std &&
           grad == other.grad;
  }
};

struct TokenNormCase {
  Shape s;
  DType dtype;
  TokenNorm norm;
  Buffer logits, grad_x, grad_y;

  TokenNormCase(Random& random, const Shape& s, DType dtype, TokenNorm norm)
      : s(s),
        dtype(dtype),
        norm(norm),
        logits(random.normal(dtype, s.num_tokens * s.stride(), 2)),
        grad_x(random.normal(dtype, s.num_tokens * s.num_rows)),
        grad_y(random.normal(dtype, s.num_tokens * s.num_cols)) {}

  Outputs run(const KernelTable& kernels, const Executor& executor) {
    const DType acc = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    Outputs out{Buffer(dtype, s.num_tokens * s.num_rows), Buffer(dtype, s.num_tokens * s.num_cols),
                Buffer(acc, s.num_tokens * 2), Buffer(dtype, s.num_tokens * s.width())};
    kernels.token_norm_forward({.logits = logits.data(),
                                .normed_x = out.normed_x.data(),
                                .normed_y = out.normed_y.data(),
                                .inv_std = out.inv_std.data(),
                                .num_tokens = s.num_tokens,
                                .num_rows = s.num_rows,
                                .num_cols = s.num_cols,
                                .logits_stride = s.stride(),
                                .dtype = dtype,
                                .norm = norm,
                                .eps = kEps},
                               executor);
    kernels.token_norm_backward({.grad_x = grad_x.data(),
                                 .grad_y = grad_y.data(),
                                 .normed_x = out.normed_x.data(),
                                 .normed_y = out.normed_y.data(),
                                 .inv_std = out.inv_std.data(),
                                 .grad_logits = out.grad.data(),
                                 .num_tokens = s.num_tokens,
                                 .num_rows = s.num_rows,
                                 .num_cols = s.num_cols,
                                 .dtype = dtype,
                                 .norm = norm},
                                executor);
    return out;
  }

  // One axis, its columns from `first` on. The backward is checked on the outputs as rounded.
  void check(const Outputs& out, int axis, int64_t first, int64_t n, const Buffer& normed,
             const Buffer& grad) const {
    std::vector<double> want_normed;
    for (int64_t t = 0; t < s.num_tokens; ++t) {
      double mean = 0, square = 0, mean_grad = 0, mean_product = 0;
      const auto logit = [&](int64_t i) { return logits[t * s.stride() + first + i]; };
      const bool centres = norm == TokenNorm::kLayerNorm;
      for (int64_t i = 0; i < n && centres; ++i) mean += logit(i) / n;
      for (int64_t i = 0; i < n; ++i) square += (logit(i) - mean) * (logit(i) - mean) / n;
      const double inv_std = 1 / std::sqrt(square + kEps);
      EXPECT_NEAR(out.inv_std[2 * t + axis], inv_std, inv_std * (1 + inv_std) * 1e-5);
      for (int64_t i = 0; i < n; ++i) {
        want_normed.push_back((logit(i) - mean) * inv_std);
        if (centres) mean_grad += grad[t * n + i] / n;
        mean_product += grad[t * n + i] * normed[t * n + i] / n;
      }
      for (int64_t i = 0; i < n; ++i) {
        const double want =
            (grad[t * n + i] - mean_grad - normed[t * n + i] * mean_product) * inv_std;
        ASSERT_NEAR(out.grad[t * s.width() + first + i], want,
                    allowed_error(dtype, want, inv_std * (1 + inv_std) * 16, n));
      }
    }
    expect_close(dtype, normed, want_normed, n, 100);
  }
};

class CpuTokenNorm : public CpuKernels {};

TEST_P(CpuTokenNorm, ForwardAndBackward) {
  for (const Shape& s : kShapes) {
    for (const DType dtype : kDTypes) {
      for (const TokenNorm norm : {TokenNorm::kLayerNorm, TokenNorm::kRmsNorm}) {
        SCOPED_TRACE(testing::Message()
                     << "T " << s.num_tokens << " R " << s.num_rows << " C " << s.num_cols
                     << ", dtype " << int(dtype) << ", norm " << int(norm));
        TokenNormCase c(random_, s, dtype, norm);
        const Outputs out = c.run(GetParam(), serial_);
        c.check(out, 0, 0, s.num_rows, out.normed_x, c.grad_x);
        c.check(out, 1, s.num_rows, s.num_cols, out.normed_y, c.grad_y);
        EXPECT_TRUE(out.inv_std.guard_is_whole() && out.grad.guard_is_whole());
        EXPECT_EQ(c.run(GetParam(), two_threads_), out);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// E[x²] - E[x]² in fp32 would leave no digit of the variance.
TEST_P(CpuTokenNorm, LargeOffset) {
  TokenNormCase c(random_, {37, 64, 33}, DType::kFloat32, TokenNorm::kLayerNorm);
  for (int64_t i = 0; i < c.logits.size(); ++i) c.logits.set(i, c.logits[i] + 1e4);
  const Outputs out = c.run(GetParam(), serial_);
  for (int64_t t = 0; t < c.s.num_tokens; ++t) {
    double mean = 0, square = 0;
    for (int64_t i = 0; i < 64; ++i) mean += c.logits[t * c.s.stride() + i] / 64;
    for (int64_t i = 0; i < 64; ++i) {
      square += std::pow(c.logits[t * c.s.stride() + i] - mean, 2) / 64;
    }
    const double inv_std = 1 / std::sqrt(square + kEps);
    EXPECT_NEAR(out.inv_std[2 * t], inv_std, 1e-5 * inv_std);
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, CpuTokenNorm, testing::ValuesIn(kernel_tables()), capability_of);

}  // namespace
}  // namespace omni_moe::cpu
