// The top-k router of every set of CPU kernels against its definition in double, serially and on
// two threads.
#include <optional>

#include "cpu_kernel_testing.h"
#include "topk_router_testing.h"

namespace omni_moe::cpu {
namespace {

std::vector<double> values_of(const Buffer& buffer, int64_t begin, int64_t n) {
  std::vector<double> values;
  for (int64_t i = begin; i < begin + n; ++i) values.push_back(buffer[i]);
  return values;
}

struct Problem {
  TopKCase c;
  TopKOptions options;
  DType dtype;
  Buffer logits, grad;
  std::optional<Buffer> bias = {};
  std::vector<char> mask = {};  // as bools; empty: none

  DType wide() const { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
  TopKRouterShape shape() const {
    return {c.num_tokens,
            c.num_experts,
            c.k,
            dtype,
            options.scoring_func,
            options.norm_topk_prob,
            options.routed_scaling_factor};
  }
};

void check(const KernelTable& table, const Executor& executor, Problem& p) {
  const TopKCase& c = p.c;
  const int64_t num_pairs = c.num_tokens * c.k;
  Buffer weights(p.dtype, num_pairs), grad_logits(p.dtype, c.num_tokens * c.num_experts);
  std::vector<int32_t> ids(num_pairs + 1, -7);
  std::vector<int64_t> counts(c.num_experts + 1, -7);
  TopKRouterForwardParams forward{p.shape()};
  forward.logits = p.logits.data();
  if (p.bias) forward.bias = p.bias->data();
  if (!p.mask.empty()) forward.token_mask = reinterpret_cast<const bool*>(p.mask.data());
  forward.weights = weights.data();
  forward.indices = ids.data();
  forward.expert_counts = counts.data();
  forward.n_group = c.n_group;
  forward.topk_group = c.topk_group;
  forward.group_score = c.group_score;
  table.topk_router_forward(forward, executor);
  TopKRouterBackwardParams backward{p.shape()};
  backward.grad_weights = p.grad.data();
  backward.logits = p.logits.data();
  backward.indices = ids.data();
  backward.grad_logits = grad_logits.data();
  table.topk_router_backward(backward, executor);
  EXPECT_EQ(ids.back(), -7) << "written past the end";
  EXPECT_EQ(counts.back(), -7) << "written past the end";

  std::vector<int64_t> want_counts(c.num_experts, 0);
  std::vector<double> want_weights, want_grads;
  const std::vector<double> bias =
      p.bias ? values_of(*p.bias, 0, c.num_experts) : std::vector<double>();
  for (int64_t t = 0; t < c.num_tokens; ++t) {
    const auto logits = values_of(p.logits, t * c.num_experts, c.num_experts);
    const auto grad = values_of(p.grad, t * c.k, c.k);
    const std::vector<int32_t> chosen(ids.begin() + t * c.k, ids.begin() + (t + 1) * c.k);
    if (!p.mask.empty() && !p.mask[t]) {
      ASSERT_EQ(chosen, std::vector<int32_t>(c.k, -1));
    } else {
      const TopKChoice want = choose_experts(c, p.options.scoring_func, logits, bias);
      if (want.is_clear) {
        ASSERT_EQ(chosen, want.ids) << "token " << t;
      }
    }
    for (const int32_t id : chosen) {
      if (id >= 0) ++want_counts[id];
    }
    const TopKToken token = weigh_experts(p.options, logits, chosen, grad);
    want_weights.insert(want_weights.end(), token.weights.begin(), token.weights.end());
    want_grads.insert(want_grads.end(), token.grad_logits.begin(), token.grad_logits.end());
  }
  counts.pop_back();
  EXPECT_EQ(counts, want_counts);
  // exp turns the rounding of logits of about 10 into a relative error.
  expect_close(p.dtype, weights, want_weights, c.k, 0, 10);
  expect_close(p.dtype, grad_logits, want_grads, c.k,
               4 * p.options.routed_scaling_factor * std::sqrt(c.k), 10);
}

TEST_P(CpuKernels, TopKRouter) {
  for (const DType dtype : kDTypes) {
    for (const TopKCase& c : kTopKCases) {
      for (const ScoringFunction function : kScoringFunctions) {
        for (const bool has_bias : {false, true}) {
          const TopKOptions options = {function, /*norm_topk_prob=*/has_bias, 1.5};
          Problem p{c, options, dtype, random_.normal(dtype, c.num_tokens * c.num_experts, 2),
                    random_.normal(dtype, c.num_tokens * c.k)};
          if (has_bias) {
            p.bias = random_.normal(p.wide(), c.num_experts, 0.1);
            for (int64_t t = 0; t < c.num_tokens; ++t) p.mask.push_back(t % 5 != 2);
          }
          SCOPED_TRACE(testing::Message()
                       << "dtype " << int(dtype) << ", E " << c.num_experts << ", K " << c.k
                       << ", function " << int(function) << ", bias " << has_bias);
          check(GetParam(), serial_, p);
          check(GetParam(), two_threads_, p);
        }
      }
    }
  }
}

TEST_P(CpuKernels, TopKRouterTies) {
  for (const DType dtype : kDTypes) {
    for (const int64_t k : {1, 5, 16, 24}) {
      const TopKCase c = {60, 48, k, 8, 4, GroupScore::kMax};
      Problem p{c,
                {ScoringFunction::kSoftmax, true, 1},
                dtype,
                Buffer(dtype, 60 * 48),
                random_.normal(dtype, 60 * k)};
      for (int64_t i = 0; i < p.logits.size(); ++i) {
        p.logits.set(i, i < 48 ? 0.5 : double(random_.below(5)) / 4 - 0.5);
      }
      check(GetParam(), serial_, p);
    }
  }
}

TEST_P(CpuKernels, TopKRouterNonFiniteLogits) {
  const double values[] = {kNaN, kInf, -kInf, -kInf, 0, 1, -0.5, 2};
  for (const int64_t k : {1, 3, 9}) {
    const TopKCase c = {60, 9, k};
    Problem p{c,
              {ScoringFunction::kSoftmax, false, 1},
              DType::kFloat32,
              Buffer(DType::kFloat32, 60 * 9),
              random_.normal(DType::kFloat32, 60 * k)};
    for (int64_t t = 0; t < 60; ++t) {
      const int64_t first = t < 16 ? t % 8 : random_.below(8), choices = t < 8 ? 1 : 8 - first;
      for (int64_t e = 0; e < 9; ++e)
        p.logits.set(t * 9 + e, values[first + random_.below(choices)]);
    }
    check(GetParam(), serial_, p);
  }
}

TEST(ExpertSlots, QueuesInOrder) {
  const std::vector<int32_t> ids = {2, 0, 2, -1, 2, 0, 1, 2};
  std::vector<int32_t> slots(ids.size() + 1, -7);
  const auto run = [&](int64_t capacity) {
    expert_slots({ids.data(), slots.data(), 8, 3, capacity}, SerialExecutor());
    return std::vector<int32_t>(slots.begin(), slots.begin() + 8);
  };
  EXPECT_EQ(run(9), (std::vector<int32_t>{0, 0, 1, -1, 2, 1, 0, 3}));
  EXPECT_EQ(run(2), (std::vector<int32_t>{0, 0, 1, -1, -1, 1, 0, -1}));
  EXPECT_EQ(run(0), std::vector<int32_t>(8, -1));
  EXPECT_EQ(slots.back(), -7);
}

INSTANTIATE_TEST_SUITE_P(TopKRouter, CpuKernels, testing::ValuesIn(kernel_tables()), capability_of);

}  // namespace
}  // namespace omni_moe::cpu
