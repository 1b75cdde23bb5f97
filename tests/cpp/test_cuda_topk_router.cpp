// The CUDA top-k router against its definition in double, and against the CPU backend's: choices by
// logits exactly, those by scores where fp32 leaves no doubt; weights and gradients of the choice
// that was made in fp64.
#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "cuda_kernel_testing.h"
#include "topk_router_testing.h"

namespace omni_moe {
namespace {

using CudaTopKRouter = CudaKernelTest;

enum class Logits { kNormal, kTies, kMasked, kSpecial };

struct Problem {
  Problem(const TopKCase& c, const TopKOptions& options, DType dtype, Logits kind, bool has_bias,
          int64_t offset = 0)
      : c(c),
        options(options),
        has_bias(has_bias),
        logits(dtype, c.num_tokens * c.num_experts, offset),
        bias(DType::kFloat32, c.num_experts),
        grad(dtype, c.num_tokens * c.k, offset),
        weights(dtype, c.num_tokens * c.k),
        grad_logits(dtype, c.num_tokens * c.num_experts, offset),
        ids(c.num_tokens * c.k * sizeof(int32_t)),
        counts(c.num_experts * sizeof(int64_t)),
        mask(c.num_tokens) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform;
    logits.fill([&] {
      const float p = uniform(random), v = 2 * normal(random);
      switch (kind) {
        case Logits::kNormal:
          return v;
        case Logits::kTies:
          return std::round(v) / 2;
        case Logits::kMasked:
          return p < 0.5f ? static_cast<float>(-kInf) : v;
        default:
          return static_cast<float>(p < 0.01f ? kNaN : p < 0.02f ? -kNaN : v);
      }
    });
    fill_normal(bias, random, 0.1);
    fill_normal(grad, random);
    std::vector<unsigned char> bools;
    for (int64_t t = 0; t < c.num_tokens; ++t) bools.push_back(!has_bias || t % 5 != 2);
    mask.upload(bools);
    is_token = bools;
  }

  TopKRouterShape shape() const {
    return {c.num_tokens,
            c.num_experts,
            c.k,
            logits.dtype,
            options.scoring_func,
            options.norm_topk_prob,
            options.routed_scaling_factor};
  }
  std::span<const double> token_logits(int64_t t) const {
    return {logits.values.data() + t * c.num_experts, static_cast<size_t>(c.num_experts)};
  }

  TopKCase c;
  TopKOptions options;
  bool has_bias;  // and a mask
  Operand logits, bias, grad, weights, grad_logits;
  DeviceArray ids, counts, mask;
  std::vector<unsigned char> is_token;
};

// exp makes the rounding of its argument a relative error.
double relative_error(const Problem& p) {
  double largest = 1;
  for (const double logit : p.logits.values) {
    if (std::isfinite(logit)) largest = std::max(largest, std::abs(logit));
  }
  return 1e-6 * largest;
}

void check_forward(Problem& p, const std::vector<int32_t>* replay, std::vector<int32_t>& ids) {
  const TopKCase& c = p.c;
  const DeviceArray replay_ids(replay ? bytes_of(*replay) : Bytes());
  TopKRouterForwardParams params{p.shape()};
  params.logits = p.logits.at(Side::kDevice);
  if (p.has_bias) {
    params.bias = p.bias.at(Side::kDevice);
    params.token_mask = static_cast<const bool*>(p.mask.data());
  }
  if (replay) params.replay_ids = static_cast<const int32_t*>(replay_ids.data());
  params.weights = p.weights.at(Side::kDevice);
  params.indices = static_cast<int32_t*>(p.ids.data());
  params.expert_counts = static_cast<int64_t*>(p.counts.data());
  params.n_group = c.n_group;
  params.topk_group = c.topk_group;
  params.group_score = c.group_score;
  const auto plan = cuda::plan_topk_router_forward(params);
  const auto got =
      run_twice({&p.weights.device, &p.ids, &p.counts}, plan.workspace_bytes, [&](void* workspace) {
        params.workspace = workspace;
        return cuda::topk_router_forward(params, plan, nullptr);
      });
  ids = integers_of<int32_t>(got[1]);

  std::vector<int64_t> counts(c.num_experts, 0);
  Values want;
  const std::span<const double> bias =
      p.has_bias ? std::span<const double>(p.bias.values) : std::span<const double>();
  for (int64_t t = 0; t < c.num_tokens; ++t) {
    const std::vector<int32_t> chosen(ids.begin() + t * c.k, ids.begin() + (t + 1) * c.k);
    if (!p.is_token[t]) {
      ASSERT_EQ(std::vector<int32_t>(c.k, -1), chosen);
    } else if (replay) {
      ASSERT_TRUE(std::equal(chosen.begin(), chosen.end(), replay->begin() + t * c.k));
    } else {
      const TopKChoice choice = choose_experts(c, p.options.scoring_func, p.token_logits(t), bias);
      if (choice.is_clear) {
        ASSERT_EQ(choice.ids, chosen) << "token " << t;
      }
    }
    for (const int32_t id : chosen) {
      if (id >= 0) ++counts[id];
    }
    const Values zeros(c.k);
    const TopKToken token = weigh_experts(p.options, p.token_logits(t), chosen, zeros);
    want.insert(want.end(), token.weights.begin(), token.weights.end());
  }
  EXPECT_EQ(counts, integers_of<int64_t>(got[2]));
  const double error = relative_error(p);
  expect_close(
      "weights", decode(p.weights.dtype, got[0]), want,
      [&](size_t i) {
        return rounding_error(p.weights.dtype, want[i]) + error * std::abs(want[i]);
      },
      NaNs::kMatch);
}

void check_backward(Problem& p, const std::vector<int32_t>& ids) {
  const TopKCase& c = p.c;
  p.ids.upload(bytes_of(ids));
  TopKRouterBackwardParams params{p.shape()};
  params.grad_weights = p.grad.at(Side::kDevice);
  params.logits = p.logits.at(Side::kDevice);
  params.indices = static_cast<const int32_t*>(p.ids.data());
  params.grad_logits = p.grad_logits.at(Side::kDevice);
  const auto plan = cuda::plan_topk_router_backward(params);
  const auto got = run_twice({&p.grad_logits.device}, plan.workspace_bytes, [&](void*) {
    return cuda::topk_router_backward(params, plan, nullptr);
  });

  // The CPU backend in fp64: a NaN softmax makes the whole row NaN.
  TopKRouterBackwardParams oracle = params;
  oracle.dtype = DType::kFloat64;
  oracle.grad_weights = p.grad.values.data();
  oracle.logits = p.logits.values.data();
  oracle.indices = ids.data();
  oracle.grad_logits = p.grad_logits.values.data();
  cpu::topk_router_backward(oracle, kSerial);
  const Values& want = p.grad_logits.values;
  const double error = relative_error(p) + sum_error(c.k);
  expect_close(
      "gradient", decode(p.grad_logits.dtype, got[0]), want,
      [&](size_t i) {
        double terms = 0;
        const int64_t t = static_cast<int64_t>(i) / c.num_experts;
        for (int64_t j = t * c.k; j < (t + 1) * c.k; ++j) terms += std::abs(p.grad.values[j]);
        return rounding_error(p.grad_logits.dtype, want[i]) +
               error * p.options.routed_scaling_factor * terms;
      },
      NaNs::kMatch);
}

void check(Problem p) {
  SCOPED_TRACE(std::string(name_of(p.logits.dtype)) + " T" + std::to_string(p.c.num_tokens) + " E" +
               std::to_string(p.c.num_experts) + " K" + std::to_string(p.c.k) + " groups " +
               std::to_string(p.c.n_group) + " function " +
               std::to_string(static_cast<int>(p.options.scoring_func)) + " bias " +
               std::to_string(p.has_bias));
  std::vector<int32_t> ids;
  check_forward(p, nullptr, ids);
  if (testing::Test::HasFailure()) return;
  check_backward(p, ids);

  // Any other ids: none, and an expert twice.
  std::mt19937 random(11);
  for (int32_t& id : ids) {
    id = static_cast<int32_t>(random() % static_cast<unsigned>(p.c.num_experts + 1)) - 1;
  }
  std::vector<int32_t> replayed;
  check_forward(p, &ids, replayed);
  check_backward(p, replayed);
}

TEST_F(CudaTopKRouter, AllCases) {
  for (const DType dtype : kDTypes) {
    for (const TopKCase& c : kTopKCases) {
      for (const ScoringFunction function : kScoringFunctions) {
        for (const bool has_bias : {false, true}) {
          for (const bool norm_topk_prob : {false, true}) {
            check({c, {function, norm_topk_prob, 1.5}, dtype, Logits::kNormal, has_bias});
          }
        }
        if (testing::Test::HasFailure()) return;
      }
    }
  }
}

TEST_F(CudaTopKRouter, TiesMaskedAndSpecialLogits) {
  for (const DType dtype : kDTypes) {
    for (const TopKCase& c : {TopKCase{60, 48, 16, 8, 4, GroupScore::kMax}, TopKCase{60, 48, 5},
                              TopKCase{60, 300, 32}, TopKCase{20, 300, 40}, TopKCase{3, 2000, 7}}) {
      for (const ScoringFunction function : kScoringFunctions) {
        check({c, {function, false, 1}, dtype, Logits::kTies, false});
        check({c, {function, false, 1}, dtype, Logits::kMasked, false});
        if (function == ScoringFunction::kSoftmax) {
          check({c, {function, true, 1}, dtype, Logits::kSpecial, false});
        }
        if (testing::Test::HasFailure()) return;
      }
    }
  }
}

// Rows that no vector load may read.
TEST_F(CudaTopKRouter, Unaligned) {
  for (const DType dtype : kDTypes) {
    for (const int64_t offset : {1, 2, 4}) {
      check({{37, 256, 8},
             {ScoringFunction::kSoftmax, false, 1},
             dtype,
             Logits::kNormal,
             false,
             offset});
      check({{37, 250, 40},
             {ScoringFunction::kSigmoid, true, 1},
             dtype,
             Logits::kNormal,
             false,
             offset});
    }
  }
}

// More tokens than the grid has warps or blocks, so that these take several.
TEST_F(CudaTopKRouter, ManyTokens) {
  check({{20000, 64, 6, 8, 3},
         {ScoringFunction::kSigmoid, true, 2.5},
         DType::kBFloat16,
         Logits::kNormal,
         true});
  check({{2000, 70, 33},
         {ScoringFunction::kSoftmax, false, 1},
         DType::kFloat32,
         Logits::kNormal,
         false});
}

TEST_F(CudaTopKRouter, Slots) {
  std::mt19937 random(3);
  for (const int64_t num_pairs : {0, 1, 31, 256, 257, 5000, 100000}) {
    for (const int64_t num_experts : {1, 8, 300, 4096}) {
      for (const int64_t capacity : {int64_t{0}, int64_t{3}, int64_t{1} << 40}) {
        for (const bool is_one_expert : {false, true}) {
          SCOPED_TRACE(std::to_string(num_pairs) + " pairs of " + std::to_string(num_experts));
          std::vector<int32_t> ids(num_pairs), want(num_pairs);
          for (int32_t& id : ids) {
            id = is_one_expert ? 0 : static_cast<int32_t>(random() % (num_experts + 1)) - 1;
          }
          cpu::expert_slots({ids.data(), want.data(), num_pairs, num_experts, capacity}, kSerial);
          const DeviceArray device_ids(bytes_of(ids)), slots(num_pairs * sizeof(int32_t));
          ExpertSlotsParams params{static_cast<const int32_t*>(device_ids.data()),
                                   static_cast<int32_t*>(slots.data()), num_pairs, num_experts,
                                   capacity};
          const auto plan = cuda::plan_expert_slots(params);
          const auto got = run_twice({&slots}, plan.workspace_bytes, [&](void* workspace) {
            params.workspace = workspace;
            return cuda::expert_slots(params, plan, nullptr);
          });
          ASSERT_EQ(want, integers_of<int32_t>(got[0]));
        }
      }
    }
  }
}

TEST_F(CudaTopKRouter, TooManyExpertsAreRefused) {
  TopKRouterForwardParams forward{};
  forward.num_tokens = 1;
  forward.num_experts = 4097;
  forward.num_experts_per_token = 1;
  EXPECT_EQ(cudaErrorInvalidValue,
            cuda::topk_router_forward(forward, cuda::plan_topk_router_forward(forward), nullptr));
  TopKRouterBackwardParams backward{};
  backward.num_tokens = 1;
  backward.num_experts = 4097;
  EXPECT_EQ(
      cudaErrorInvalidValue,
      cuda::topk_router_backward(backward, cuda::plan_topk_router_backward(backward), nullptr));
  ExpertSlotsParams slots{};
  slots.num_pairs = 1;
  slots.num_experts = 4097;
  EXPECT_EQ(cudaErrorInvalidValue,
            cuda::expert_slots(slots, cuda::plan_expert_slots(slots), nullptr));
}

}  // namespace
}  // namespace omni_moe
