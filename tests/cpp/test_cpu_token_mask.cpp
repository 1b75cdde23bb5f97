// Token masks of the CPU backend, for every set of kernels: tokens that count get the bits that
// they get without the others.
#include <memory>
#include <tuple>

#include "cpu_kernel_testing.h"

namespace omni_moe::cpu {
namespace {

// Storage for as many bool as the kernels ask of a mask.
struct TokenMask {
  std::unique_ptr<bool[]> values;
  std::vector<int64_t> counted;

  TokenMask(Random& random, int64_t num_tokens, int64_t share_of_ten)
      : values(new bool[num_tokens]) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      values[t] = random.below(10) < share_of_ten;
      if (values[t]) counted.push_back(t);
    }
  }
};

// The rows of the tokens that count.
Buffer rows_of(const Buffer& all, DType dtype, const std::vector<int64_t>& tokens, int64_t width) {
  Buffer rows(dtype, static_cast<int64_t>(tokens.size()) * width);
  for (size_t t = 0; t < tokens.size(); ++t) {
    for (int64_t i = 0; i < width; ++i) {
      rows.set(static_cast<int64_t>(t) * width + i, all[tokens[t] * width + i]);
    }
  }
  return rows;
}

// Every other row holds this value.
void expect_others(const Buffer& all, const TokenMask& mask, int64_t num_tokens, int64_t width,
                   double value) {
  EXPECT_TRUE(all.guard_is_whole());
  for (int64_t i = 0; i < num_tokens * width; ++i) {
    if (mask.values[i / width]) continue;
    ASSERT_EQ(value, all[i]) << "element " << i;
  }
}

constexpr int64_t kShares[] = {0, 1, 6, 10};
constexpr int64_t kTokens[] = {1, 37, 199, 5000};
constexpr int64_t kRows = 5, kCols = 18, kWidth = kRows + kCols;

class CpuTokenMask : public CpuKernels {};

struct NormRun {
  Buffer x, y, inv_std, mean_x, var_x, mean_y, var_y, grad;
  int64_t count_x = 3, count_y = 4;
};

NormRun run_norm(const KernelTable& kernels, const Executor& executor, DType dtype,
                 int64_t num_tokens, Buffer& logits, Buffer& grad_x, Buffer& grad_y,
                 const Buffer& statistics, const bool* token_mask) {
  const DType acc = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  NormRun out{Buffer(dtype, num_tokens * kRows),
              Buffer(dtype, num_tokens * kCols),
              Buffer(acc, kWidth),
              rows_of(statistics, acc, {0}, kRows),
              rows_of(statistics, acc, {1}, kRows),
              rows_of(statistics, acc, {0}, kCols),
              rows_of(statistics, acc, {1}, kCols),
              Buffer(dtype, num_tokens * kWidth)};
  kernels.batch_norm_forward({.logits = logits.data(),
                              .normed_x = out.x.data(),
                              .normed_y = out.y.data(),
                              .inv_std = out.inv_std.data(),
                              .x = {out.mean_x.data(), out.var_x.data(), &out.count_x},
                              .y = {out.mean_y.data(), out.var_y.data(), &out.count_y},
                              .num_tokens = num_tokens,
                              .num_rows = kRows,
                              .num_cols = kCols,
                              .logits_stride = kWidth,
                              .dtype = dtype,
                              .stats_dtype = acc,
                              .training = true,
                              .momentum = 0.3,
                              .eps = 1e-5,
                              .token_mask = token_mask},
                             executor);
  kernels.batch_norm_backward({.grad_x = grad_x.data(),
                               .grad_y = grad_y.data(),
                               .normed_x = out.x.data(),
                               .normed_y = out.y.data(),
                               .inv_std = out.inv_std.data(),
                               .grad_logits = out.grad.data(),
                               .num_tokens = num_tokens,
                               .num_rows = kRows,
                               .num_cols = kCols,
                               .dtype = dtype,
                               .training = true,
                               .token_mask = token_mask},
                              executor);
  return out;
}

TEST_P(CpuTokenMask, BatchNorm) {
  for (const int64_t num_tokens : kTokens) {
    for (const DType dtype : kDTypes) {
      for (const int64_t share : kShares) {
        SCOPED_TRACE(testing::Message() << "T " << num_tokens << ", dtype " << int(dtype)
                                        << ", counted of ten " << share);
        const TokenMask mask(random_, num_tokens, share);
        const DType acc = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
        const Buffer statistics = random_.normal(acc, 2 * kCols);
        Buffer logits = random_.normal(dtype, num_tokens * kWidth, 2);
        Buffer grad_x = random_.normal(dtype, num_tokens * kRows);
        Buffer grad_y = random_.normal(dtype, num_tokens * kCols);
        for (int64_t t = 0; t < num_tokens; ++t) {  // must reach nothing
          if (mask.values[t]) continue;
          for (int64_t i = 0; i < kWidth; ++i) logits.set(t * kWidth + i, kNaN);
          grad_x.set(t * kRows, kInf);
        }
        Buffer some_logits = rows_of(logits, dtype, mask.counted, kWidth);
        Buffer some_grad_x = rows_of(grad_x, dtype, mask.counted, kRows);
        Buffer some_grad_y = rows_of(grad_y, dtype, mask.counted, kCols);
        const auto count = static_cast<int64_t>(mask.counted.size());
        const NormRun want = run_norm(GetParam(), serial_, dtype, count, some_logits, some_grad_x,
                                      some_grad_y, statistics, nullptr);
        for (const Executor* executor : {static_cast<const Executor*>(&serial_),
                                         static_cast<const Executor*>(&two_threads_)}) {
          const NormRun got = run_norm(GetParam(), *executor, dtype, num_tokens, logits, grad_x,
                                       grad_y, statistics, mask.values.get());
          EXPECT_TRUE(rows_of(got.x, dtype, mask.counted, kRows) == want.x);
          EXPECT_TRUE(rows_of(got.y, dtype, mask.counted, kCols) == want.y);
          EXPECT_TRUE(rows_of(got.grad, dtype, mask.counted, kWidth) == want.grad);
          EXPECT_TRUE(got.inv_std == want.inv_std && got.mean_x == want.mean_x &&
                      got.var_x == want.var_x && got.mean_y == want.mean_y &&
                      got.var_y == want.var_y);
          EXPECT_TRUE(got.count_x == 4 && got.count_y == 5);
          expect_others(got.x, mask, num_tokens, kRows, 0);
          expect_others(got.y, mask, num_tokens, kCols, 0);
          expect_others(got.grad, mask, num_tokens, kWidth, 0);
        }
        if (count < 2) {
          EXPECT_TRUE(want.mean_x == rows_of(statistics, acc, {0}, kRows));
          EXPECT_TRUE(want.var_y == rows_of(statistics, acc, {1}, kCols));
        }
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(CpuTokenMask, Router) {
  constexpr int64_t kTokens = 67, kExperts = 7;
  for (const DType dtype : kDTypes) {
    for (const RouterScore score : {RouterScore::kSoftmax, RouterScore::kSoftmaxTopK}) {
      SCOPED_TRACE(testing::Message() << "dtype " << int(dtype) << ", score " << int(score));
      const TokenMask mask(random_, kTokens, 6);
      Buffer x = random_.normal(dtype, kTokens * kRows), y = random_.normal(dtype, kTokens * kCols);
      Buffer grad = random_.normal(dtype, kTokens * kExperts);
      struct Run {
        Buffer weights, grad_x, grad_y;
        std::vector<int32_t> ids;
      };
      const auto run = [&](const bool* token_mask) {
        Run out{Buffer(dtype, kTokens * kExperts), Buffer(dtype, kTokens * kRows),
                Buffer(dtype, kTokens * kCols), std::vector<int32_t>(kTokens * kExperts)};
        GetParam().router_forward({.logits_x = x.data(),
                                   .logits_y = y.data(),
                                   .weights = out.weights.data(),
                                   .indices = out.ids.data(),
                                   .num_tokens = kTokens,
                                   .num_rows = kRows,
                                   .num_cols = kCols,
                                   .num_experts_per_token = kExperts,
                                   .dtype = dtype,
                                   .score = score,
                                   .token_mask = token_mask},
                                  two_threads_);
        GetParam().router_backward({.grad_weights = grad.data(),
                                    .logits_x = x.data(),
                                    .logits_y = y.data(),
                                    .indices = out.ids.data(),
                                    .grad_logits_x = out.grad_x.data(),
                                    .grad_logits_y = out.grad_y.data(),
                                    .num_tokens = kTokens,
                                    .num_rows = kRows,
                                    .num_cols = kCols,
                                    .num_experts_per_token = kExperts,
                                    .dtype = dtype,
                                    .score = score},
                                   two_threads_);
        return out;
      };
      const Run want = run(nullptr);
      for (int64_t t = 0; t < kTokens; ++t) {  // must reach nothing
        if (!mask.values[t]) x.set(t * kRows, kNaN);
      }
      const Run got = run(mask.values.get());
      for (const auto& [all, plain, width] :
           {std::tie(got.weights, want.weights, kExperts), std::tie(got.grad_x, want.grad_x, kRows),
            std::tie(got.grad_y, want.grad_y, kCols)}) {
        EXPECT_TRUE(rows_of(all, dtype, mask.counted, width) ==
                    rows_of(plain, dtype, mask.counted, width));
        expect_others(all, mask, kTokens, width, 0);
      }
      for (int64_t i = 0; i < kTokens * kExperts; ++i) {
        ASSERT_EQ(mask.values[i / kExperts] ? want.ids[i] : -1, got.ids[i]) << "pair " << i;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, CpuTokenMask, testing::ValuesIn(kernel_tables()), capability_of);

}  // namespace
}  // namespace omni_moe::cpu
