// BatchNorm of the CPU backend against an oracle in double, for every set of kernels, serially and
// on two threads.
#include "cpu_kernel_testing.h"

namespace omni_moe::cpu {
namespace {

struct Shape {
  int64_t num_tokens, num_rows, num_cols;
  int64_t width() const { return num_rows + num_cols; }
  int64_t stride() const { return width() + 3; }  // of the logits
};
constexpr Shape kShapes[] = {{2, 1, 7}, {3, 16, 5}, {199, 33, 64}, {4500, 3, 2}};

constexpr double kMomentum = 0.3, kEps = 1e-5;

struct Outputs {
  Buffer normed_x, normed_y, inv_std, mean_x, var_x, mean_y, var_y, grad;
  int64_t counts[2];

  bool operator==(const Outputs& other) const {
    return normed_x == other.normed_x && normed_y == other.normed_y && inv_std == other.inv_std &&
           mean_x == other.mean_x && var_x == other.var_x && mean_y == other.mean_y &&
           var_y == other.var_y && grad == other.grad;
  }
};

struct BatchNormCase {
  Shape s;
  DType dtype, stats_dtype;
  bool training;
  Buffer logits, grad_x, grad_y, mean_x, var_x, mean_y, var_y;

  BatchNormCase(Random& random, const Shape& s, DType dtype, DType stats_dtype, bool training)
      : s(s),
        dtype(dtype),
        stats_dtype(stats_dtype),
        training(training),
        logits(random.normal(dtype, s.num_tokens * s.stride(), 2)),
        grad_x(random.normal(dtype, s.num_tokens * s.num_rows)),
        grad_y(random.normal(dtype, s.num_tokens * s.num_cols)),
        mean_x(random.normal(stats_dtype, s.num_rows)),
        var_x(positive(random, s.num_rows)),
        mean_y(random.normal(stats_dtype, s.num_cols)),
        var_y(positive(random, s.num_cols)) {}

  Buffer positive(Random& random, int64_t n) const {
    Buffer values = random.normal(stats_dtype, n);
    for (int64_t i = 0; i < n; ++i) values.set(i, 0.5 + std::abs(values[i]));
    return values;
  }

  Outputs run(const KernelTable& kernels, const Executor& executor) {
    const DType acc = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    Outputs out{Buffer(dtype, s.num_tokens * s.num_rows),
                Buffer(dtype, s.num_tokens * s.num_cols),
                Buffer(acc, s.width()),
                mean_x,
                var_x,
                mean_y,
                var_y,
                Buffer(dtype, s.num_tokens * s.width()),
                {5, 7}};
    kernels.batch_norm_forward({logits.data(),
                                out.normed_x.data(),
                                out.normed_y.data(),
                                out.inv_std.data(),
                                {out.mean_x.data(), out.var_x.data(), &out.counts[0]},
                                {out.mean_y.data(), out.var_y.data(), &out.counts[1]},
                                s.num_tokens,
                                s.num_rows,
                                s.num_cols,
                                s.stride(),
                                dtype,
                                stats_dtype,
                                training,
                                kMomentum,
                                kEps,
                                nullptr},
                               executor);
    kernels.batch_norm_backward(
        {grad_x.data(), grad_y.data(), out.normed_x.data(), out.normed_y.data(), out.inv_std.data(),
         out.grad.data(), s.num_tokens, s.num_rows, s.num_cols, dtype, training, nullptr},
        executor);
    return out;
  }

  // One axis, its columns from `first` on. The backward is checked on the outputs as rounded.
  void check(const Outputs& out, int64_t first, int64_t n, const Buffer& normed, const Buffer& grad,
             const Buffer& old_mean, const Buffer& old_var, const Buffer& mean,
             const Buffer& var) const {
    const int64_t tokens = s.num_tokens;
    std::vector<double> want_normed(tokens * n), want_mean, want_var;
    for (int64_t i = 0; i < n; ++i) {
      double m = 0, v = 0, mean_grad = 0, mean_product = 0;
      const auto logit = [&](int64_t t) { return logits[t * s.stride() + first + i]; };
      for (int64_t t = 0; t < tokens; ++t) m += logit(t) / tokens;
      for (int64_t t = 0; t < tokens; ++t) v += (logit(t) - m) * (logit(t) - m) / tokens;
      const double share = training ? kMomentum : 0;
      want_mean.push_back((1 - share) * old_mean[i] + share * m);
      want_var.push_back((1 - share) * old_var[i] + share * v * tokens / (tokens - 1));
      if (!training) m = old_mean[i], v = old_var[i];
      const double inv_std = 1 / std::sqrt(v + kEps);
      EXPECT_NEAR(out.inv_std[first + i], inv_std, inv_std * inv_std * 1e-5);
      for (int64_t t = 0; t < tokens; ++t) {
        want_normed[t * n + i] = (logit(t) - m) * inv_std;
        if (!training) continue;
        mean_grad += grad[t * n + i] / tokens;
        mean_product += grad[t * n + i] * normed[t * n + i] / tokens;
      }
      for (int64_t t = 0; t < tokens; ++t) {
        const double want = (grad[t * n + i] - mean_grad - normed[t * n + i] * mean_product);
        const double scale = inv_std * (1 + inv_std) * 16;
        ASSERT_NEAR(out.grad[t * s.width() + first + i], want * inv_std,
                    allowed_error(dtype, want * inv_std, scale, tokens));
      }
    }
    expect_close(dtype, normed, want_normed, tokens, 100);
    expect_close(stats_dtype, mean, want_mean, tokens, 10);
    expect_close(stats_dtype, var, want_var, tokens, 10);
  }
};

class CpuBatchNorm : public CpuKernels {};

TEST_P(CpuBatchNorm, ForwardAndBackward) {
  for (const Shape& s : kShapes) {
    for (const DType dtype : kDTypes) {
      for (const bool own_stats : {false, true}) {
        for (const bool training : {false, true}) {
          SCOPED_TRACE(testing::Message()
                       << "T " << s.num_tokens << " R " << s.num_rows << ", dtype " << int(dtype)
                       << ", own " << own_stats << ", training " << training);
          const bool wide = own_stats || dtype == DType::kFloat64;
          BatchNormCase c(random_, s, dtype, wide ? dtype : DType::kFloat32, training);
          const Outputs out = c.run(GetParam(), serial_);
          c.check(out, 0, s.num_rows, out.normed_x, c.grad_x, c.mean_x, c.var_x, out.mean_x,
                  out.var_x);
          c.check(out, s.num_rows, s.num_cols, out.normed_y, c.grad_y, c.mean_y, c.var_y,
                  out.mean_y, out.var_y);
          EXPECT_TRUE(out.inv_std.guard_is_whole() && out.grad.guard_is_whole());
          EXPECT_EQ(out.counts[0], 5 + training);
          EXPECT_EQ(out.counts[1], 7 + training);
          EXPECT_EQ(c.run(GetParam(), two_threads_), out);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, CpuBatchNorm, testing::ValuesIn(kernel_tables()), capability_of);

}  // namespace
}  // namespace omni_moe::cpu
