// The fused gate-up product of the CUDA shared MLP against a double-precision host oracle on inputs
// rounded to the dtype. Outputs are poisoned with NaN bytes before each run and lie between guards;
// every element is checked (on big sizes every column of a sample of rows), and a second run must
// repeat the first bit for bit.
#include <algorithm>
#include <cmath>
#include <ostream>
#include <random>
#include <sstream>
#include <vector>

#include "gated_linear_testing.h"
#include "omni_moe/cuda.h"

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

class GatedLinearSupport : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "no CUDA device";
    }
    if (!cuda::current_device().has_hopper_kernels) GTEST_SKIP() << "no kernel for this device";
    ASSERT_TRUE(cuda::plan_gated_linear_forward(params_of({128, 64, 128})).has_value());
  }
};

class GatedLinear : public GatedLinearSupport, public ::testing::WithParamInterface<Case> {};

// want within one rounding of the output, plus what fp32 sums of H terms (which the tensor cores
// truncate) and the activation lose.
struct Check {
  DType dtype;
  int64_t hidden_size;
  int failures = 0;

  void operator()(const char* name, int64_t row, int64_t col, uint16_t bits, double want,
                  double magnitude) {
    const double sum_error = magnitude * sum_error_of(hidden_size);
    const double error = std::abs(decode(dtype, bits) - want);
    const double tolerance = rounding_error(dtype, want) + sum_error;
    if (!(error <= tolerance) && ++failures <= 10) {  // NaN fails
      ADD_FAILURE() << name << "[" << row << ", " << col << "] = " << decode(dtype, bits)
                    << ", want " << want << " +- " << tolerance;
    }
  }
};

TEST_P(GatedLinear, MatchesOracle) {
  const Case c = GetParam();
  const int64_t tokens = c.num_tokens, hidden = c.hidden_size, width = c.intermediate_size;
  std::mt19937 rng(7);
  const Matrix x = random_matrix(tokens, hidden, 1.0, c.dtype, rng);
  // Products with a deviation of 2, so that the activations' tails take part.
  const Matrix gate_weight =
      random_matrix(width, hidden, 2 / std::sqrt(double(hidden)), c.dtype, rng);
  const Matrix up_weight =
      random_matrix(width, hidden, 2 / std::sqrt(double(hidden)), c.dtype, rng);
  const DeviceMatrix device_x(x), device_gate_weight(gate_weight), device_up_weight(up_weight);
  DeviceMatrix activated(tokens * width), gate(tokens * width), up(tokens * width);
  GatedLinearForwardParams p = params_of(c);
  p.x = device_x.data();
  p.gate_weight = device_gate_weight.data();
  p.up_weight = device_up_weight.data();
  p.activated = c.activated ? activated.data() : nullptr;
  p.gate = c.products ? gate.data() : nullptr;
  p.up = c.products ? up.data() : nullptr;

  const auto plan = cuda::plan_gated_linear_forward(p);
  ASSERT_TRUE(plan.has_value());
  CHECK_CUDA(cuda::gated_linear_forward(p, *plan, nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
  const Matrix got_activated = activated.download(), got_gate = gate.download(),
               got_up = up.download();

  // 1. Against the oracle.
  const int64_t rows = std::clamp<int64_t>(kMaxOracleWork / (2.0 * hidden * width), 1, tokens);
  std::vector<double> x_row(hidden);
  std::vector<float> gate_values(width * hidden), up_values(width * hidden);
  const auto decoded = [&](uint16_t bits) { return decode(c.dtype, bits); };
  std::transform(gate_weight.begin(), gate_weight.end(), gate_values.begin(), decoded);
  std::transform(up_weight.begin(), up_weight.end(), up_values.begin(), decoded);
  Check check{c.dtype, hidden};
  for (int64_t sample = 0; sample < rows; ++sample) {
    // Spread over all tiles and all places in them; first and last row included.
    const int64_t row = rows == 1 ? tokens - 1 : sample * (tokens - 1) / (rows - 1);
    std::transform(&x[row * hidden], &x[row * hidden] + hidden, x_row.begin(), decoded);
    for (int64_t col = 0; col < width; ++col) {
      double want_gate = 0, want_up = 0, size_gate = 0, size_up = 0;
      for (int64_t k = 0; k < hidden; ++k) {
        const double g = x_row[k] * gate_values[col * hidden + k];
        const double u = x_row[k] * up_values[col * hidden + k];
        want_gate += g;
        want_up += u;
        size_gate += g * g;
        size_up += u * u;
      }
      size_gate = std::sqrt(size_gate);
      size_up = std::sqrt(size_up);
      const int64_t at = row * width + col;
      if (c.products) {
        check("gate", row, col, got_gate[at], want_gate, size_gate);
        check("up", row, col, got_up[at], want_up, size_up);
      }
      if (c.activated) {
        // |act'| < 1.2; the sum's error in either factor times the other.
        check("activated", row, col, got_activated[at], activate(c.activation, want_gate) * want_up,
              1.2 * size_gate * std::abs(want_up) + std::abs(want_gate) * size_up);
      }
    }
  }
  EXPECT_EQ(check.failures, 0) << "of " << rows << " rows";

  // 2. All elements written where wanted, none elsewhere; activated agrees with the products even
  // in the rows the oracle left out.
  const auto written = [](uint16_t bits) { return bits != 0xffff; };
  const auto count = [&](const Matrix& m) { return std::count_if(m.begin(), m.end(), written); };
  EXPECT_EQ(count(got_activated), c.activated ? tokens * width : 0);
  EXPECT_EQ(count(got_gate), c.products ? tokens * width : 0);
  EXPECT_EQ(count(got_up), c.products ? tokens * width : 0);
  if (c.activated && c.products) {
    const double rounding = rounding_of(c.dtype);
    int64_t mismatches = 0;
    for (size_t i = 0; i < got_gate.size(); ++i) {
      const double g = decoded(got_gate[i]), u = decoded(got_up[i]);
      const double error = std::abs(decoded(got_activated[i]) - activate(c.activation, g) * u);
      // Three roundings: of both factors and of the result.
      mismatches += !(error <= 4 * rounding * (std::abs(g) + 0.01) * (std::abs(u) + 0.01));
    }
    EXPECT_EQ(mismatches, 0);
  }

  // 3. Again, bit for bit.
  for (DeviceMatrix* output : {&activated, &gate, &up}) output->poison();
  CHECK_CUDA(cuda::gated_linear_forward(p, *cuda::plan_gated_linear_forward(p), nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
  EXPECT_TRUE(got_activated == activated.download());
  EXPECT_TRUE(got_gate == gate.download());
  EXPECT_TRUE(got_up == up.download());
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
    for (const auto activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh,
                                  Activation::kRelu, Activation::kIdentity}) {
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

INSTANTIATE_TEST_SUITE_P(Shapes, GatedLinear, ::testing::ValuesIn(cases()), [](const auto& info) {
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
