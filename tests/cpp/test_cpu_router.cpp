// The routers of every set of CPU kernels against a sort of the whole grid and the chain rule in
// double, serially and on two threads.
#include <numeric>

#include "cpu_kernel_testing.h"

namespace omni_moe::cpu {
namespace {

struct RouterShape {
  int64_t num_tokens, num_rows, num_cols, k;
};
constexpr RouterShape kRouterShapes[] = {{0, 4, 4, 2},    {1, 1, 1, 1},      {37, 7, 11, 0},
                                         {37, 7, 11, 1},  {37, 7, 11, 77},   {37, 3, 100, 17},
                                         {37, 100, 3, 4}, {199, 64, 64, 16}, {2, 320, 320, 512}};
constexpr RouterScore kScores[] = {RouterScore::kLogit, RouterScore::kSoftmax,
                                   RouterScore::kSoftmaxTopK};

double log_sum_exp(const Buffer& logits, int64_t begin, int64_t n) {
  double largest = -kInf, total = 0;
  for (int64_t i = begin; i < begin + n; ++i) largest = std::max(largest, logits[i]);
  for (int64_t i = begin; i < begin + n; ++i) total += std::exp(logits[i] - largest);
  return largest + std::log(total);
}

struct RouterOracle {
  std::vector<int32_t> indices;
  std::vector<double> weights;
};

// The whole grid, sorted: descending sums (in the accumulator's type), NaN first, ascending ids.
// Infinite sums are told apart by their halves.
template <typename Acc>
RouterOracle route(const Buffer& x, const Buffer& y, const RouterShape& shape, RouterScore score) {
  RouterOracle oracle;
  const auto [num_tokens, num_rows, num_cols, k] = shape;
  for (int64_t t = 0; t < num_tokens; ++t) {
    std::vector<Acc> sums, beyond;
    for (int64_t r = 0; r < num_rows; ++r) {
      for (int64_t c = 0; c < num_cols; ++c) {
        const Acc row = x[t * num_rows + r], col = y[t * num_cols + c], half = 0.5;
        sums.push_back(row + col);
        beyond.push_back(std::isinf(sums.back()) ? half * row + half * col : Acc(0));
      }
    }
    std::vector<int32_t> ids(sums.size());
    std::iota(ids.begin(), ids.end(), 0);
    std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
      if (std::isnan(sums[a]) || std::isnan(sums[b])) return !std::isnan(sums[b]);
      return sums[a] != sums[b] ? sums[a] > sums[b] : beyond[a] > beyond[b];
    });
    const double log_sum =
        log_sum_exp(x, t * num_rows, num_rows) + log_sum_exp(y, t * num_cols, num_cols);
    const bool undefined = score != RouterScore::kLogit && std::isnan(log_sum);
    double chosen_sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      const int32_t id = undefined ? static_cast<int32_t>(i) : ids[i];
      const double sum = score == RouterScore::kLogit
                             ? double(sums[id])
                             : x[t * num_rows + id / num_cols] + y[t * num_cols + id % num_cols];
      oracle.indices.push_back(id);
      oracle.weights.push_back(score == RouterScore::kLogit ? sum : std::exp(sum - log_sum));
      chosen_sum += oracle.weights.back();
    }
    if (score == RouterScore::kSoftmaxTopK) {
      for (int64_t i = 0; i < k; ++i) oracle.weights[t * k + i] /= chosen_sum;
    }
  }
  return oracle;
}

void check_router(const KernelTable& table, const Executor& executor, DType dtype, Buffer x,
                  Buffer y, const RouterShape& shape, RouterScore score) {
  const auto [num_tokens, num_rows, num_cols, k] = shape;
  Buffer weights(dtype, num_tokens * k);
  std::vector<int32_t> indices(num_tokens * k + 1, -1);
  table.router_forward({x.data(), y.data(), weights.data(), indices.data(), num_tokens, num_rows,
                        num_cols, k, dtype, score, /*workspace=*/nullptr},
                       executor);
  EXPECT_EQ(indices.back(), -1) << "written past the end";
  indices.pop_back();
  const RouterOracle want = dtype == DType::kFloat64 ? route<double>(x, y, shape, score)
                                                     : route<float>(x, y, shape, score);
  ASSERT_EQ(indices, want.indices);
  // exp turns the rounding of logits of about 10 into a relative error.
  expect_close(dtype, weights, want.weights, k, 0, score == RouterScore::kLogit ? 1 : 10);
}

TEST_P(CpuKernels, RouterForward) {
  for (const DType dtype : kDTypes) {
    for (const RouterShape& shape : kRouterShapes) {
      const Buffer x = random_.normal(dtype, shape.num_tokens * shape.num_rows);
      const Buffer y = random_.normal(dtype, shape.num_tokens * shape.num_cols);
      for (const RouterScore score : kScores) {
        SCOPED_TRACE(testing::Message()
                     << "dtype " << int(dtype) << ", " << shape.num_rows << " x " << shape.num_cols
                     << ", K " << shape.k << ", score " << int(score));
        check_router(GetParam(), serial_, dtype, x, y, shape, score);
        check_router(GetParam(), two_threads_, dtype, x, y, shape, score);
      }
    }
  }
}

TEST_P(CpuKernels, RouterTies) {
  const double ulp = 0x1p-23;
  const std::vector<double> values[] = {
      {0.5}, {-0.0, 0.0}, {1, 1 + ulp, 1 + 2 * ulp}, {1024, ulp, 2 * ulp, -ulp, 0}, {-1, 0, 0.25}};
  for (const auto& choices : values) {
    for (const DType dtype : kDTypes) {
      for (const int64_t k : {1, 5, 16, 100, 323}) {
        const RouterShape shape = {9, 17, 19, k};
        Buffer x(dtype, 9 * 17), y(dtype, 9 * 19);
        for (int64_t i = 0; i < x.size(); ++i) x.set(i, choices[random_.below(choices.size())]);
        for (int64_t i = 0; i < y.size(); ++i) y.set(i, choices[random_.below(choices.size())]);
        SCOPED_TRACE(testing::Message() << "dtype " << int(dtype) << ", K " << k);
        check_router(GetParam(), serial_, dtype, x, y, shape, RouterScore::kLogit);
      }
    }
  }
}

TEST_P(CpuKernels, RouterNonFiniteLogits) {
  const double values[] = {kNaN, kInf, -kInf, -kInf, 0, 1, -0.5, 2};
  for (const DType dtype : kDTypes) {
    for (const int64_t k : {1, 3, 8, 40, 63}) {
      for (const RouterScore score : kScores) {
        const RouterShape shape = {60, 7, 9, k};
        Buffer x(dtype, 60 * 7), y(dtype, 60 * 9);
        for (int64_t t = 0; t < 60; ++t) {
          // Whole tokens of one value too: all NaN, all +inf, all masked.
          const int64_t first = t < 16 ? t % 8 : random_.below(8), choices = t < 8 ? 1 : 8 - first;
          for (int64_t r = 0; r < 7; ++r) x.set(t * 7 + r, values[first + random_.below(choices)]);
          for (int64_t c = 0; c < 9; ++c) y.set(t * 9 + c, values[random_.below(8)]);
        }
        SCOPED_TRACE(testing::Message() << "dtype " << int(dtype) << ", K " << k);
        check_router(GetParam(), serial_, dtype, x, y, shape, score);
      }
    }
  }
}

TEST_P(CpuKernels, RouterSumsThatOverflow) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    const double largest = dtype == DType::kFloat64 ? std::numeric_limits<double>::max()
                                                    : std::numeric_limits<float>::max();
    const double shares[] = {1, 0.75, 0.5, -1, -0.5, 0.625, 1e-30, -kInf, kInf};
    for (const int64_t k : {1, 2, 5, 40, 63}) {
      // The oracle of softmax weights subtracts sums, which have lost all digits here.
      const RouterShape shape = {60, 7, 9, k};
      Buffer x(dtype, 60 * 7), y(dtype, 60 * 9);
      const auto fill = [&](Buffer& logits, int64_t n) {
        for (int64_t t = 0; t < 60; ++t) {
          // Finite at first, then with one or both infinities.
          const int64_t choices = t < 30 ? 7 : t < 50 ? 8 : 9;
          for (int64_t i = 0; i < n; ++i) {
            logits.set(t * n + i, largest * shares[random_.below(choices)]);
          }
        }
      };
      fill(x, 7);
      fill(y, 9);
      SCOPED_TRACE(testing::Message() << "dtype " << int(dtype) << ", K " << k);
      check_router(GetParam(), serial_, dtype, x, y, shape, RouterScore::kLogit);
    }
  }
}

// d loss / d logits of one token by the chain rule written out, K times (R + C).
void route_backward(const RouterShape& shape, RouterScore score, int64_t t, const Buffer& x,
                    const Buffer& y, const Buffer& grad, const std::vector<int32_t>& indices,
                    double* grad_x, double* grad_y) {
  const int64_t num_rows = shape.num_rows, num_cols = shape.num_cols, k = shape.k;
  const double log_sum_x = log_sum_exp(x, t * num_rows, num_rows);
  const double log_sum_y = log_sum_exp(y, t * num_cols, num_cols);
  const auto log_prob = [&](int64_t i) {
    return x[t * num_rows + indices[t * k + i] / num_cols] - log_sum_x +
           y[t * num_cols + indices[t * k + i] % num_cols] - log_sum_y;
  };
  double total = 0, mean_grad = 0;
  for (int64_t i = 0; i < k; ++i) total += std::exp(log_prob(i));
  for (int64_t i = 0; i < k; ++i) mean_grad += grad[t * k + i] * std::exp(log_prob(i)) / total;
  for (int64_t i = 0; i < k; ++i) {
    const double weight = std::exp(log_prob(i));
    const double grad_sum = score == RouterScore::kLogit ? grad[t * k + i]
                            : score == RouterScore::kSoftmax
                                ? grad[t * k + i] * weight
                                : (grad[t * k + i] - mean_grad) * weight / total;
    grad_x[indices[t * k + i] / num_cols] += grad_sum;
    grad_y[indices[t * k + i] % num_cols] += grad_sum;
    if (score == RouterScore::kLogit) continue;
    for (int64_t r = 0; r < num_rows; ++r) {
      grad_x[r] -= grad_sum * std::exp(x[t * num_rows + r] - log_sum_x);
    }
    for (int64_t c = 0; c < num_cols; ++c) {
      grad_y[c] -= grad_sum * std::exp(y[t * num_cols + c] - log_sum_y);
    }
  }
}

TEST_P(CpuKernels, RouterBackward) {
  for (const DType dtype : kDTypes) {
    for (const RouterShape& shape : kRouterShapes) {
      const int64_t num_tokens = shape.num_tokens, num_rows = shape.num_rows,
                    num_cols = shape.num_cols, k = shape.k;
      if (num_rows == 320) continue;  // the oracle is K times (R + C)
      Buffer x = random_.normal(dtype, num_tokens * num_rows);
      Buffer y = random_.normal(dtype, num_tokens * num_cols);
      Buffer grad = random_.normal(dtype, num_tokens * k);
      for (const RouterScore score : kScores) {
        SCOPED_TRACE(testing::Message() << "dtype " << int(dtype) << ", score " << int(score));
        const auto indices = dtype == DType::kFloat64 ? route<double>(x, y, shape, score).indices
                                                      : route<float>(x, y, shape, score).indices;
        std::vector<double> want_x(num_tokens * num_rows), want_y(num_tokens * num_cols);
        for (int64_t t = 0; t < num_tokens; ++t) {
          route_backward(shape, score, t, x, y, grad, indices, &want_x[t * num_rows],
                         &want_y[t * num_cols]);
        }
        const auto run = [&](const Executor& executor) {
          Buffer grad_x(dtype, num_tokens * num_rows), grad_y(dtype, num_tokens * num_cols);
          GetParam().router_backward(
              {grad.data(), x.data(), y.data(), indices.data(), grad_x.data(), grad_y.data(),
               num_tokens, num_rows, num_cols, k, dtype, score, /*workspace=*/nullptr},
              executor);
          return std::make_pair(grad_x, grad_y);
        };
        const auto [grad_x, grad_y] = run(serial_);
        expect_close(dtype, grad_x, want_x, k + num_rows, /*terms=*/4, 4);
        expect_close(dtype, grad_y, want_y, k + num_cols, /*terms=*/4, 4);
        EXPECT_EQ(run(two_threads_), run(serial_));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Router, CpuKernels, testing::ValuesIn(kernel_tables()), capability_of);

}  // namespace
}  // namespace omni_moe::cpu
