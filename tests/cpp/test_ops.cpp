// The ops as a libtorch program sees them: at::Tensor in and out, gradients by autograd and checked
// against compositions of ATen ops, errors as exceptions. No Python in this process.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <string>
#include <vector>

#include "torch/ops.h"

namespace omni_moe::torch_api {
namespace {

using TensorList = std::vector<Tensor>;
using TensorFunction = std::function<Tensor(const TensorList&)>;

const auto kDouble = at::TensorOptions().dtype(at::kDouble);

// out and the gradients of `inputs` for d loss / d out = grad.
TensorList run(const TensorFunction& function, const TensorList& inputs, const Tensor& grad) {
  TensorList leaves;
  for (const Tensor& input : inputs) leaves.push_back(input.detach().requires_grad_());
  const Tensor out = function(leaves);
  TensorList results = torch::autograd::grad({out}, leaves, {grad});
  results.insert(results.begin(), out.detach());
  return results;
}

void expect_same(const TensorFunction& op, const TensorFunction& composition,
                 const TensorList& inputs) {
  const Tensor grad = at::randn_like(composition(inputs));
  const TensorList got = run(op, inputs, grad), want = run(composition, inputs, grad);
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i].sizes(), want[i].sizes());
    EXPECT_TRUE(at::allclose(got[i], want[i], /*rtol=*/1e-11, /*atol=*/1e-12))
        << (i == 0 ? "output" : "gradient " + std::to_string(i - 1)) << "\n"
        << got[i] << "\n"
        << want[i];
  }
}

// The op alone, with the options that most tests leave as they are.
Tensor experts(const TensorList& t, const Tensor& indices, std::string_view activation = "silu") {
  return std::get<0>(omni_expert(t[0], t[1], t[2], t[3], indices, activation,
                                 /*addend=*/std::nullopt, /*save_for_backward=*/false,
                                 /*num_cols=*/0));
}

Tensor mlp(const TensorList& t) {
  return std::get<0>(omni_mlp(t[0], t[1], t[2], t[3], "silu", /*save_for_backward=*/false));
}

// Σ over k of act(hidden · up) * routing * down, by gathers.
Tensor compose_experts(const TensorList& t, const Tensor& indices,
                       const std::function<Tensor(const Tensor&)>& activation) {
  const Tensor up = t[1].index({indices.to(at::kLong)});
  const Tensor down = t[2].index({indices.to(at::kLong)});
  const Tensor scores = (t[0].unsqueeze(1) * up).sum(-1);
  return ((activation(scores) * t[3]).unsqueeze(-1) * down).sum(1);
}

TensorList expert_inputs(int64_t num_tokens, int64_t k) {
  return {at::randn({num_tokens, 20}, kDouble), at::randn({12, 20}, kDouble),
          at::randn({12, 20}, kDouble), at::randn({num_tokens, k}, kDouble)};
}

class Ops : public testing::Test {
 protected:
  void SetUp() override { at::manual_seed(0); }
};

TEST_F(Ops, Experts) {
  for (const int64_t num_tokens : {0, 1, 37}) {
    for (const auto index_type : {at::kInt, at::kLong}) {
      const Tensor indices = at::randint(12, {num_tokens, 5}, index_type);
      expect_same([&](const TensorList& t) { return experts(t, indices); },
                  [&](const TensorList& t) {
                    return compose_experts(t, indices, [](const Tensor& x) { return at::silu(x); });
                  },
                  expert_inputs(num_tokens, 5));
    }
  }
}

TEST_F(Ops, ExpertActivations) {
  const Tensor indices = at::randint(12, {37, 5}, at::kLong);
  const std::pair<const char*, std::function<Tensor(const Tensor&)>> activations[] = {
      {"silu", [](const Tensor& x) { return at::silu(x); }},
      {"gelu", [](const Tensor& x) { return at::gelu(x); }},
      {"gelu_tanh", [](const Tensor& x) { return at::gelu(x, "tanh"); }},
      {"relu", [](const Tensor& x) { return at::relu(x); }},
      {"identity", [](const Tensor& x) { return x; }}};
  for (const auto& [name, activation] : activations) {
    SCOPED_TRACE(name);
    expect_same([&, name = name](const TensorList& t) { return experts(t, indices, name); },
                [&, activation = activation](const TensorList& t) {
                  return compose_experts(t, indices, activation);
                },
                expert_inputs(37, 5));
  }
}

TEST_F(Ops, Router) {
  const Tensor x = at::randn({37, 7}, kDouble), y = at::randn({37, 11}, kDouble);
  for (const int64_t k : {1, 16, 77}) {
    const auto [scores, indices] = omni_router(x, y, k, true);
    const auto [want, order] = (x.unsqueeze(2) + y.unsqueeze(1))
                                   .flatten(1)
                                   .sort(/*stable=*/true, /*dim=*/1, /*descending=*/true);
    EXPECT_EQ(indices.scalar_type(), at::kInt);
    EXPECT_TRUE(at::equal(indices.to(at::kLong), order.narrow(1, 0, k)));
    EXPECT_TRUE(at::equal(scores, want.narrow(1, 0, k)));
    EXPECT_FALSE(std::get<1>(omni_router(x.detach().requires_grad_(), y, k, true)).requires_grad());
    const auto chosen = order.narrow(1, 0, k);
    expect_same(
        [k = k](const TensorList& t) { return std::get<0>(omni_router(t[0], t[1], k, true)); },
        [&](const TensorList& t) {
          return (t[0].unsqueeze(2) + t[1].unsqueeze(1)).flatten(1).gather(1, chosen);
        },
        {x, y});
  }
}

TEST_F(Ops, SoftmaxRouter) {
  const Tensor x = at::randn({37, 7}, kDouble), y = at::randn({37, 11}, kDouble);
  for (const int64_t k : {1, 16, 77}) {
    for (const bool norm_topk_prob : {false, true}) {
      const Tensor chosen =
          std::get<1>(omni_softmax_router(x, y, k, norm_topk_prob, std::nullopt, true))
              .to(at::kLong);
      EXPECT_TRUE(at::equal(chosen, std::get<1>(omni_router(x, y, k, true)).to(at::kLong)));
      expect_same(
          [k = k, norm_topk_prob](const TensorList& t) {
            return std::get<0>(
                omni_softmax_router(t[0], t[1], k, norm_topk_prob, std::nullopt, true));
          },
          [&](const TensorList& t) {
            const Tensor sums =
                t[0].log_softmax(-1).unsqueeze(2) + t[1].log_softmax(-1).unsqueeze(1);
            const Tensor weights = sums.flatten(1).gather(1, chosen).exp();
            return norm_topk_prob ? weights / weights.sum(-1, /*keepdim=*/true) : weights;
          },
          {x, y});
    }
  }
}

TEST_F(Ops, Mlp) {
  expect_same(mlp,
              [](const TensorList& t) {
                return at::linear(at::silu(at::linear(t[0], t[1])) * at::linear(t[0], t[2]), t[3]);
              },
              {at::randn({3, 9, 20}, kDouble), at::randn({14, 20}, kDouble),
               at::randn({14, 20}, kDouble), at::randn({20, 14}, kDouble)});
}

// d <grad, out> along a random direction of all inputs, by a central difference.
TEST_F(Ops, GradientsAreFiniteDifferences) {
  const Tensor indices = at::randint(12, {9, 5}, at::kLong);
  const TensorFunction op = [&](const TensorList& t) { return experts(t, indices, "gelu"); };
  const TensorList inputs = expert_inputs(9, 5);
  const Tensor grad = at::randn({9, 20}, kDouble);
  const TensorList results = run(op, inputs, grad);
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Tensor direction = at::randn_like(inputs[i]);
    const auto loss_at = [&](double step) {
      TensorList moved = inputs;
      moved[i] = moved[i] + step * direction;
      return (op(moved) * grad).sum().item<double>();
    };
    const double want = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5;
    const double got = (results[i + 1] * direction).sum().item<double>();
    EXPECT_NEAR(got, want, 1e-7 * std::abs(want)) << "input " << i;
  }
}

TEST_F(Ops, OnlyTheWantedGradientsAreComputed) {
  const TensorList t = expert_inputs(9, 5);
  const Tensor indices = at::randint(12, {9, 5}, at::kLong), grad = at::randn({9, 20}, kDouble);
  const Tensor pre_activations =
      std::get<1>(omni_expert(t[0], t[1], t[2], t[3], indices, "silu", std::nullopt,
                              /*save_for_backward=*/true, /*num_cols=*/0));
  const auto backward = [&](Mask<4> mask) {
    return omni_expert_backward(grad, t[0], t[1], t[2], t[3], indices, pre_activations, "silu",
                                /*addend=*/std::nullopt, mask, /*num_cols=*/0);
  };
  const auto all = backward({true, true, true, true});
  const auto some = backward({false, true, false, true});
  EXPECT_EQ(std::get<0>(some).numel(), 0);
  EXPECT_TRUE(at::equal(std::get<1>(some), std::get<1>(all)));
  EXPECT_EQ(std::get<2>(some).numel(), 0);
  EXPECT_TRUE(at::equal(std::get<3>(some), std::get<3>(all)));
}

TEST_F(Ops, MetaTensorsHaveShapesOnly) {
  const auto meta = at::TensorOptions().dtype(at::kHalf).device(at::kMeta);
  const auto [weights, indices] = omni_softmax_router(
      at::empty({5, 4}, meta), at::empty({5, 6}, meta), 7, true, std::nullopt, false);
  EXPECT_EQ(weights.sizes(), at::IntArrayRef({5, 7}));
  EXPECT_EQ(weights.scalar_type(), at::kHalf);
  EXPECT_EQ(indices.scalar_type(), at::kInt);
  const Tensor table = at::empty({24, 10}, meta);
  EXPECT_EQ(experts({at::empty({5, 10}, meta), table, table, weights}, indices).sizes(),
            at::IntArrayRef({5, 10}));
}

template <typename Error, typename Call>
void expect_error(Call call, const std::string& message) {
  try {
    call();
    ADD_FAILURE() << "no error; expected: " << message;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(message), std::string::npos) << error.what();
  }
}

TEST_F(Ops, BadInput) {
  const TensorList t = expert_inputs(9, 5);
  const Tensor indices = at::randint(12, {9, 5}, at::kLong);
  expect_error<c10::ValueError>(
      [&] {
        experts({t[0], t[1], t[2], t[3].narrow(1, 0, 4)}, indices);
      },
      "omni_expert: expected routing_weights.size(1)");
  expect_error<c10::ValueError>(
      [&] {
        experts({t[0].to(at::kFloat), t[1], t[2], t[3]}, indices);
      },
      "expected up_weights in the dtype of hidden_states");
  expect_error<c10::ValueError>([&] { experts(t, indices, "swish"); }, "but got 'swish'");
  expect_error<c10::ValueError>([&] { omni_router(t[0], t[0], 401, true); },
                                "between 0 and the 400 experts of the grid, but got 401");
  expect_error<c10::ValueError>(
      [&] {
        mlp({t[0], t[1], t[2], t[1]});
      },
      "expected down_weight.size(0)");
  Tensor outside = indices.clone();
  outside[3][2] = 12;
  expect_error<c10::IndexError>([&] { experts(t, outside); },
                                "expected indices in [0, 12), but got 12 at indices[3, 2]");
}

// Says that it is on a GPU but has no memory there, for what is refused before anything is read.
Tensor without_gpu(at::IntArrayRef sizes, at::ScalarType dtype) {
  static char nothing = 0;
  const std::vector<int64_t> strides(sizes.size(), 0);
  const at::Device device(at::kCUDA, 0);
  return at::for_blob(&nothing, sizes)
      .strides(strides)
      .options(at::TensorOptions().dtype(dtype).device(device))
      .target_device(device)
      .make_tensor();
}

TEST_F(Ops, GradientOfTooManyPairsOnTheGpu) {
  constexpr int64_t kTokens = 1 << 16, kK = 1 << 15;
  const Tensor hidden = without_gpu({kTokens, 8}, at::kFloat),
               table = without_gpu({12, 8}, at::kFloat),
               weights = without_gpu({kTokens, kK}, at::kFloat),
               indices = without_gpu({kTokens, kK}, at::kInt);
  const std::string expected =
      ": expected indices to have at most 2147483647 elements for gradients on cuda:0, but got "
      "shape [65536, 32768] (2147483648)";
  expect_error<c10::ValueError>(
      [&] {
        omni_expert(hidden, table, table, weights, indices, "silu", std::nullopt,
                    /*save_for_backward=*/true, /*num_cols=*/0);
      },
      "omni_expert" + expected);
  expect_error<c10::ValueError>(
      [&] {
        omni_expert_backward(hidden, hidden, table, table, weights, indices, weights, "silu",
                             std::nullopt, {true, true, true, true}, /*num_cols=*/0);
      },
      "_omni_expert_backward" + expected);

  const auto meta = at::TensorOptions().device(at::kMeta);
  const Tensor meta_table = at::empty({12, 8}, meta);
  const auto [out, pre_activations] =
      omni_expert(at::empty({kTokens, 8}, meta), meta_table, meta_table,
                  at::empty({kTokens, kK}, meta), at::empty({kTokens, kK}, meta.dtype(at::kInt)),
                  "silu", std::nullopt, /*save_for_backward=*/true, /*num_cols=*/0);
  EXPECT_EQ(pre_activations.sizes(), indices.sizes());
}

TEST_F(Ops, NoSecondDerivative) {
  const Tensor x = at::randn({4, 20}, kDouble).requires_grad_();
  const TensorList t = expert_inputs(4, 5);
  const Tensor indices = at::randint(12, {4, 5}, at::kLong);
  const Tensor out = experts({x, t[1], t[2], t[3]}, indices).square().sum();
  const Tensor grad =
      torch::autograd::grad({out}, {x}, {}, /*retain_graph=*/true, /*create_graph=*/true)[0];
  expect_error<c10::Error>([&] { grad.sum().backward(); },
                           "derivative for omni_moe::_omni_expert_backward is not implemented");
}

}  // namespace
}  // namespace omni_moe::torch_api
