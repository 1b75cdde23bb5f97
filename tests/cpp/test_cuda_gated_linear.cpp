// The fused gate-up product of the CUDA shared MLP against an fp64 oracle on inputs rounded to the
// dtype: plain products, and the CPU backend's activation of them. Outputs are poisoned with NaN
// bytes before each run and lie between guards; every element is checked (on big sizes every column
// of a sample of rows), and a second run must repeat the first bit for bit.
#include <algorithm>
#include <cmath>
#include <ostream>
#include <random>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "cuda_kernel_testing.h"

namespace omni_moe {
namespace {

struct Case {
  int64_t num_tokens, hidden_size, intermediate_size;
  DType dtype = DType::kBFloat16;
  Activation activation = Activation::kSilu;
  bool activated = true, products = true;  // which outputs are wanted
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << "T" << c.num_tokens << "_H" << c.hidden_size << "_I" << c.intermediate_size
             << "_dtype" << int(c.dtype) << "_act" << int(c.activation)
             << (c.activated ? "_activated" : "") << (c.products ? "_products" : "");
}

GatedLinearForwardParams params_of(const Case& c) {
  return {nullptr,      nullptr,       nullptr,
          nullptr,      nullptr,       nullptr,
          c.num_tokens, c.hidden_size, c.intermediate_size,
          c.dtype,      c.activation};
}

class GatedLinearSupport : public CudaKernelTest {
 protected:
  void SetUp() override {
    CudaKernelTest::SetUp();
    if (IsSkipped()) return;
    if (!cuda::current_device().has_hopper_kernels) GTEST_SKIP() << "no kernel for this device";
    ASSERT_TRUE(cuda::plan_gated_linear_forward(params_of({128, 64, 128})).has_value());
  }
};

class GatedLinear : public GatedLinearSupport, public testing::WithParamInterface<Case> {};

struct Inputs {
  explicit Inputs(const Case& c)
      : x(c.dtype, c.num_tokens * c.hidden_size),
        gate_weight(c.dtype, c.intermediate_size * c.hidden_size),
        up_weight(c.dtype, c.intermediate_size * c.hidden_size) {
    std::mt19937 random(7);
    fill_normal(x, random);
    // Products with a deviation of 2, so that the activations' tails take part.
    fill_normal(gate_weight, random, 2 / std::sqrt(double(c.hidden_size)));
    fill_normal(up_weight, random, 2 / std::sqrt(double(c.hidden_size)));
  }
  Operand x, gate_weight, up_weight;
};

// [T, I] each; NaN where not wanted.
struct Outputs {
  Values activated, gate, up;
};

// Within one rounding of the output, plus what fp32 sums of H terms and the activation lose.
void check_rows(const Case& c, const Inputs& in, const Outputs& out) {
  const int64_t hidden = c.hidden_size, width = c.intermediate_size;
  const Values gate_weight = transposed(in.gate_weight.values, width, hidden);
  const Values up_weight = transposed(in.up_weight.values, width, hidden);
  const double error = product_error(hidden);
  Values gate(width), up(width), gate_size(width), up_size(width), activated(width);
  for (const int64_t row : sampled_rows(c.num_tokens, 2.0 * hidden * width)) {
    const double* x = &in.x.values[row * hidden];
    multiply_row(x, gate_weight, hidden, width, gate.data(), gate_size.data());
    multiply_row(x, up_weight, hidden, width, up.data(), up_size.data());
    const Values act = activate(c.activation, gate).value;
    for (int64_t col = 0; col < width; ++col) {
      gate_size[col] = std::sqrt(gate_size[col]);
      up_size[col] = std::sqrt(up_size[col]);
      activated[col] = act[col] * up[col];
    }
    const auto check = [&](const char* name, const Values& got, const Values& want,
                           auto magnitude) {
      expect_close(
          name + (" in row " + std::to_string(row)), std::span(got).subspan(row * width, width),
          want, [&](size_t i) { return rounding_error(c.dtype, want[i]) + error * magnitude(i); });
    };
    if (c.products) {
      check("gate", out.gate, gate, [&](size_t i) { return gate_size[i]; });
      check("up", out.up, up, [&](size_t i) { return up_size[i]; });
    }
    if (c.activated) {
      // |act'| < 1.2; the sum's error in either factor times the other.
      check("activated", out.activated, activated, [&](size_t i) {
        return 1.2 * gate_size[i] * std::abs(up[i]) + std::abs(gate[i]) * up_size[i];
      });
    }
    if (testing::Test::HasFailure()) return;
  }
}

// Activated agrees with the products even in the rows that the oracle leaves out.
void check_agreement(const Case& c, const Outputs& out) {
  const double rounding = unit_roundoff(c.dtype);
  int64_t mismatches = 0;
  for (int64_t row = 0; row < c.num_tokens; ++row) {
    const int64_t first = row * c.intermediate_size;
    const Values act =
        activate(c.activation, std::span(out.gate).subspan(first, c.intermediate_size)).value;
    for (int64_t i = 0; i < c.intermediate_size; ++i) {
      const double gate = out.gate[first + i], up = out.up[first + i];
      const double error = std::abs(out.activated[first + i] - act[i] * up);
      // Three roundings: of both factors and of the result.
      mismatches += !(error <= 4 * rounding * (std::abs(gate) + 0.01) * (std::abs(up) + 0.01));
    }
  }
  EXPECT_EQ(mismatches, 0);
}

TEST_P(GatedLinear, MatchesOracle) {
  const Case c = GetParam();
  Inputs in(c);
  const size_t count = c.num_tokens * c.intermediate_size, bytes = count * size_of(c.dtype);
  const DeviceArray activated(bytes), gate(bytes), up(bytes);
  GatedLinearForwardParams p = params_of(c);
  p.x = in.x.at(Side::kDevice);
  p.gate_weight = in.gate_weight.at(Side::kDevice);
  p.up_weight = in.up_weight.at(Side::kDevice);
  p.activated = c.activated ? activated.data() : nullptr;
  p.gate = c.products ? gate.data() : nullptr;
  p.up = c.products ? up.data() : nullptr;
  ASSERT_TRUE(cuda::plan_gated_linear_forward(p).has_value());
  const auto got = run_twice({&activated, &gate, &up}, 0, [&](void*) {
    return cuda::gated_linear_forward(p, *cuda::plan_gated_linear_forward(p), nullptr);
  });

  const Outputs out{decode(c.dtype, got[0]), decode(c.dtype, got[1]), decode(c.dtype, got[2])};
  check_rows(c, in, out);
  // All elements written where wanted, none elsewhere.
  const auto expect_written = [&](bool wanted, const Values& values, const Bytes& bytes) {
    if (wanted) {
      EXPECT_TRUE(std::none_of(values.begin(), values.end(), [](double v) { return v != v; }));
    } else {
      EXPECT_TRUE(bytes == Bytes(bytes.size(), kPoison));
    }
  };
  expect_written(c.activated, out.activated, got[0]);
  expect_written(c.products, out.gate, got[1]);
  expect_written(c.products, out.up, got[2]);
  if (c.activated && c.products) check_agreement(c, out);
}

std::vector<Case> cases() {
  std::vector<Case> all;
  // Tails in every dimension, fewer and more tiles than blocks.
  for (const int64_t tokens : {1, 37, 128, 199, 257}) {
    for (const int64_t hidden : {8, 64, 200, 1000, 1024}) {
      for (const int64_t width : {8, 128, 136, 1000}) all.push_back({tokens, hidden, width});
    }
  }
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const Activation activation : kActivations) {
      all.push_back({199, 200, 264, dtype, activation});
      all.push_back({199, 200, 264, dtype, activation, true, false});
    }
    all.push_back({199, 1000, 136, dtype, Activation::kSilu, false, true});
    all.push_back({4096, 64, 136, dtype});
    all.push_back({37, 1024, 4096, dtype});
    all.push_back({4096, 1024, 4096, dtype});
    all.push_back({4096, 1024, 4096, dtype, Activation::kSilu, true, false});
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Shapes, GatedLinear, testing::ValuesIn(cases()), [](const auto& info) {
  std::ostringstream name;
  name << info.param;
  return name.str();
});

TEST_F(GatedLinearSupport, SaysWhatItDoesNotSupport) {
  const auto supported = [&](auto change) {
    GatedLinearForwardParams p = params_of({128, 64, 128});
    change(p);
    return cuda::plan_gated_linear_forward(p).has_value();
  };
  using P = GatedLinearForwardParams;
  EXPECT_TRUE(supported([](P&) {}));
  EXPECT_TRUE(supported([](P& p) { p.num_tokens = 0; }));
  EXPECT_FALSE(supported([](P& p) { p.hidden_size = 100; }));
  EXPECT_FALSE(supported([](P& p) { p.hidden_size = 0; }));
  EXPECT_FALSE(supported([](P& p) { p.intermediate_size = 100; }));
  EXPECT_FALSE(supported([](P& p) { p.dtype = DType::kFloat32; }));
  EXPECT_FALSE(supported([](P& p) { p.x = reinterpret_cast<void*>(0x1008); }));
  EXPECT_FALSE(supported([](P& p) { p.gate = reinterpret_cast<void*>(0x1002); }));
}

TEST_F(GatedLinearSupport, NothingToDo) {
  for (const auto& empty : {params_of({0, 64, 128}), params_of({128, 64, 0})}) {
    const auto plan = cuda::plan_gated_linear_forward(empty);
    ASSERT_TRUE(plan.has_value());
    EXPECT_EQ(cuda::gated_linear_forward(empty, *plan, nullptr), cudaSuccess);
  }
}

}  // namespace
}  // namespace omni_moe
