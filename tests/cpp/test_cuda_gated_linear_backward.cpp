// The gradient through the down product and the activation of the CUDA shared MLP against an fp64
// oracle on inputs rounded to the dtype: a plain product, and the CPU backend's activation. Outputs
// are poisoned with NaN bytes before each run and lie between guards; every element is checked (on
// big sizes every column of a sample of rows, the others for agreement among the outputs). A second
// run and runs whose outputs take the memory of their inputs must repeat the first bit for bit.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
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
  bool activated = true;  // whether it is wanted
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << "T" << c.num_tokens << "_H" << c.hidden_size << "_I" << c.intermediate_size
             << "_dtype" << int(c.dtype) << "_act" << int(c.activation)
             << (c.activated ? "_activated" : "");
}

// What the fast activations lose, of the value and of the derivative.
double activation_error(double x) { return 4e-6 * (1 + std::abs(x)); }

GatedLinearBackwardParams params_of(const Case& c) {
  return {nullptr, nullptr,     nullptr,      nullptr,       nullptr,
          nullptr, nullptr,     c.num_tokens, c.hidden_size, c.intermediate_size,
          c.dtype, c.activation};
}

// Gradients of deviation 2, and products too, so that the activations' tails take part.
struct Inputs {
  explicit Inputs(const Case& c)
      : grad_output(c.dtype, c.num_tokens * c.hidden_size),
        down_weight(c.dtype, c.hidden_size * c.intermediate_size),
        gate(c.dtype, c.num_tokens * c.intermediate_size),
        up(c.dtype, c.num_tokens * c.intermediate_size) {
    std::mt19937 random(11);
    fill_normal(grad_output, random);
    fill_normal(down_weight, random, 2 / std::sqrt(double(c.hidden_size)));
    fill_normal(gate, random, 2);
    fill_normal(up, random, 2);
  }
  std::array<Operand*, 4> all() { return {&grad_output, &down_weight, &gate, &up}; }
  Operand grad_output, down_weight, gate, up;
};

struct Outputs {
  Bytes grad_gate, grad_up, activated;
  bool operator==(const Outputs&) const = default;
};

// The same as numbers.
struct OutputValues {
  Values grad_gate, grad_up, activated;
  OutputValues(const Case& c, const Outputs& out)
      : grad_gate(decode(c.dtype, out.grad_gate)),
        grad_up(decode(c.dtype, out.grad_up)),
        activated(decode(c.dtype, out.activated)) {}
};

// Which input's memory each output takes.
enum class Place { kOwn, kGate, kUp };
struct Places {
  Place grad_gate = Place::kOwn, grad_up = Place::kOwn, activated = Place::kOwn;
};

void run(const Case& c, Inputs& in, const Places& places, Outputs* out) {
  for (Operand* input : in.all()) input->device.upload(input->bytes);
  const size_t bytes = c.num_tokens * c.intermediate_size * size_of(c.dtype);
  const DeviceArray grad_gate(bytes), grad_up(bytes), activated(bytes);
  const auto placed = [&](Place place, const DeviceArray& own) -> const DeviceArray& {
    return place == Place::kGate ? in.gate.device : place == Place::kUp ? in.up.device : own;
  };
  const DeviceArray& to_grad_gate = placed(places.grad_gate, grad_gate);
  const DeviceArray& to_grad_up = placed(places.grad_up, grad_up);
  const DeviceArray& to_activated = placed(places.activated, activated);
  GatedLinearBackwardParams p = params_of(c);
  p.grad_output = in.grad_output.at(Side::kDevice);
  p.down_weight = in.down_weight.at(Side::kDevice);
  p.gate = in.gate.at(Side::kDevice);
  p.up = in.up.at(Side::kDevice);
  p.grad_gate = to_grad_gate.data();
  p.grad_up = to_grad_up.data();
  p.activated = c.activated ? to_activated.data() : nullptr;
  ASSERT_TRUE(cuda::plan_gated_linear_backward(p).has_value());
  expect_success(cuda::gated_linear_backward(p, *cuda::plan_gated_linear_backward(p), nullptr));
  *out = {to_grad_gate.read(), to_grad_up.read(), to_activated.read()};
  // What is no output stays as it was.
  for (const Operand* input : in.all()) {
    const DeviceArray* device = &input->device;
    if (device == &to_grad_gate || device == &to_grad_up || device == &to_activated) continue;
    EXPECT_TRUE(device->read() == input->bytes);
  }
}

class GatedLinearBackwardSupport : public CudaKernelTest {
 protected:
  void SetUp() override {
    CudaKernelTest::SetUp();
    if (IsSkipped()) return;
    if (!cuda::current_device().has_hopper_kernels) GTEST_SKIP() << "no kernel for this device";
    ASSERT_TRUE(cuda::plan_gated_linear_backward(params_of({128, 64, 128})).has_value());
  }
};

class GatedLinearBackward : public GatedLinearBackwardSupport,
                            public testing::WithParamInterface<Case> {};

// Every column of as many rows as there is time for.
void check_rows(const Case& c, const Inputs& in, const OutputValues& out) {
  const int64_t hidden = c.hidden_size, width = c.intermediate_size;
  Values grad(width), grad_error(width), want(width), error(width);
  for (const int64_t row : sampled_rows(c.num_tokens, 2.0 * hidden * width)) {
    multiply_row(&in.grad_output.values[row * hidden], in.down_weight.values, hidden, width,
                 grad.data(), grad_error.data());
    // grad_activated is rounded to the dtype, like the outputs that it is a factor of.
    for (int64_t i = 0; i < width; ++i) {
      grad_error[i] =
          std::sqrt(grad_error[i]) * product_error(hidden) + rounding_error(c.dtype, grad[i]);
    }
    const auto row_of = [&](const Values& values) {
      return std::span(values).subspan(row * width, width);
    };
    const auto gate = row_of(in.gate.values), up = row_of(in.up.values);
    const auto [act, slope] = activate(c.activation, gate);
    const auto check = [&](const char* name, const Values& got) {
      expect_close(name + (" in row " + std::to_string(row)), row_of(got), want,
                   [&](size_t i) { return rounding_error(c.dtype, want[i]) + error[i]; });
    };
    for (int64_t i = 0; i < width; ++i) {
      want[i] = grad[i] * up[i] * slope[i];
      error[i] = std::abs(up[i]) * (std::abs(slope[i]) * grad_error[i] +
                                    std::abs(grad[i]) * activation_error(gate[i]));
    }
    check("grad_gate", out.grad_gate);
    for (int64_t i = 0; i < width; ++i) {
      want[i] = grad[i] * act[i];
      error[i] = std::abs(act[i]) * grad_error[i] + std::abs(grad[i]) * activation_error(gate[i]);
    }
    check("grad_up", out.grad_up);
    if (testing::Test::HasFailure()) return;
  }
}

// What holds among the outputs at every element, even in rows that the oracle leaves out:
// grad_gate * act = grad_up * up * act', each side with one rounding besides the common one of
// grad_activated, and activated in full.
void check_agreement(const Case& c, const Inputs& in, const OutputValues& out) {
  const int64_t width = c.intermediate_size;
  int64_t mismatches = 0, mismatches_activated = 0;
  for (int64_t first = 0; first < c.num_tokens * width; first += width) {
    const auto [acts, slopes] =
        activate(c.activation, std::span(in.gate.values).subspan(first, width));
    for (int64_t i = 0; i < width; ++i) {
      const double gate = in.gate.values[first + i], up = in.up.values[first + i];
      const double grad_gate = out.grad_gate[first + i], grad_up = out.grad_up[first + i];
      const double act = acts[i], slope = slopes[i], act_error = activation_error(gate);
      const double left = grad_gate * act, right = grad_up * up * slope;
      const double tolerance = 1.5 * std::abs(act) * rounding_error(c.dtype, grad_gate) +
                               1.5 * std::abs(up * slope) * rounding_error(c.dtype, grad_up) +
                               4 * act_error * std::abs(up) * (std::abs(grad_up) + 1);
      mismatches += !(std::abs(left - right) <= tolerance);
      if (!c.activated) continue;
      const double error = std::abs(out.activated[first + i] - act * up);
      mismatches_activated +=
          !(error <= rounding_error(c.dtype, act * up) + std::abs(up) * act_error);
    }
  }
  EXPECT_EQ(mismatches, 0);
  EXPECT_EQ(mismatches_activated, 0);
}

TEST_P(GatedLinearBackward, MatchesOracle) {
  const Case c = GetParam();
  Inputs in(c);
  Outputs out;
  ASSERT_NO_FATAL_FAILURE(run(c, in, {}, &out));

  // 1. Against the oracle, and all elements written where wanted, none elsewhere.
  const OutputValues values(c, out);
  check_rows(c, in, values);
  check_agreement(c, in, values);
  const auto is_written = [](const Values& values) {
    return std::none_of(values.begin(), values.end(), [](double v) { return std::isnan(v); });
  };
  EXPECT_TRUE(is_written(values.grad_gate));
  EXPECT_TRUE(is_written(values.grad_up));
  if (c.activated) {
    EXPECT_TRUE(is_written(values.activated));
  } else {
    EXPECT_TRUE(out.activated == Bytes(out.activated.size(), kPoison));
  }

  // 2. Again, bit for bit.
  Outputs again;
  ASSERT_NO_FATAL_FAILURE(run(c, in, {}, &again));
  EXPECT_TRUE(again == out);

  // 3. The same where outputs take the memory of inputs.
  std::vector<Places> all = {{Place::kGate, Place::kUp}, {Place::kUp, Place::kGate}};
  if (c.activated) all.push_back({Place::kOwn, Place::kUp, Place::kGate});
  for (const Places& places : all) {
    Outputs aliased;
    ASSERT_NO_FATAL_FAILURE(run(c, in, places, &aliased));
    EXPECT_TRUE(aliased == out) << "grad_gate at " << int(places.grad_gate) << ", grad_up at "
                                << int(places.grad_up);
  }
}

std::vector<Case> cases() {
  std::vector<Case> all;
  // Tails in every dimension, fewer and more tiles than blocks, fewer and more stages than the
  // ring.
  for (const int64_t tokens : {1, 37, 199, 257}) {
    for (const int64_t hidden : {8, 64, 104, 200, 1000, 1024}) {
      for (const int64_t width : {8, 136, 256, 1000}) all.push_back({tokens, hidden, width});
    }
  }
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const Activation activation : kActivations) {
      all.push_back({199, 200, 264, dtype, activation});
      all.push_back({199, 200, 264, dtype, activation, false});
    }
    all.push_back({4096, 8, 136, dtype});
    all.push_back({4096, 104, 1000, dtype});
    all.push_back({37, 1024, 4096, dtype});
    all.push_back({4096, 1024, 4096, dtype});
    all.push_back({4096, 1024, 4096, dtype, Activation::kSilu, false});
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Shapes, GatedLinearBackward, testing::ValuesIn(cases()),
                         [](const auto& info) {
                           std::ostringstream name;
                           name << info.param;
                           return name.str();
                         });

// One factor at a time: numbers that name their place, so that a wrong element says where it
// came from.
TEST_F(GatedLinearBackwardSupport, TakesEveryElementFromItsPlace) {
  const Case c{130, 200, 520, DType::kFloat16, Activation::kIdentity};
  Inputs in(c);
  std::fill(in.gate.values.begin(), in.gate.values.end(), 1);
  std::fill(in.up.values.begin(), in.up.values.end(), 2);
  for (int64_t k = 0; k < c.hidden_size; k += 13) {
    // Row k of down_weight holds its columns, all other rows what must not be taken; grad_output
    // takes row k.
    std::fill(in.grad_output.values.begin(), in.grad_output.values.end(), 0);
    std::fill(in.down_weight.values.begin(), in.down_weight.values.end(), -1);
    for (int64_t row = 0; row < c.num_tokens; ++row) {
      in.grad_output.values[row * c.hidden_size + k] = 1;
    }
    Values want_grad_up(c.num_tokens * c.intermediate_size), want_grad_gate(want_grad_up.size());
    for (size_t at = 0; at < want_grad_up.size(); ++at) {
      const auto col = static_cast<double>(at % c.intermediate_size);
      in.down_weight.values[k * c.intermediate_size + at % c.intermediate_size] = col;
      want_grad_up[at] = col;
      want_grad_gate[at] = 2 * col;
    }
    SCOPED_TRACE("K " + std::to_string(k));
    for (Operand* input : in.all()) input->upload();
    Outputs out;
    ASSERT_NO_FATAL_FAILURE(run(c, in, {}, &out));
    const OutputValues values(c, out);
    const auto exactly = [](size_t) { return 0.0; };
    expect_close("grad_up", values.grad_up, want_grad_up, exactly);
    expect_close("grad_gate", values.grad_gate, want_grad_gate, exactly);
    if (HasFailure()) return;
  }
}

TEST_F(GatedLinearBackwardSupport, ClosedReluPassesNoNan) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const Case c{37, 104, 136, dtype, Activation::kRelu};
    constexpr int64_t kNanRow = 5, kNanCol = 9;
    Inputs in(c);
    std::fill_n(&in.grad_output.values[kNanRow * c.hidden_size], c.hidden_size, kNaN);
    for (int64_t row = 0; row < c.num_tokens; ++row) {
      in.up.values[row * c.intermediate_size + kNanCol] = kNaN;
    }
    for (Operand* input : in.all()) input->upload();
    Outputs out;
    ASSERT_NO_FATAL_FAILURE(run(c, in, {}, &out));
    const OutputValues values(c, out);
    for (int64_t at = 0; at < c.num_tokens * c.intermediate_size; ++at) {
      const int64_t row = at / c.intermediate_size, col = at % c.intermediate_size;
      const bool is_open = in.gate.values[at] > 0;
      const bool takes_nan = is_open && (row == kNanRow || col == kNanCol);
      EXPECT_EQ(std::isnan(values.grad_gate[at]), takes_nan) << row << ", " << col;
      if (!is_open) {
        EXPECT_EQ(values.grad_gate[at], 0) << row << ", " << col;
      }
      EXPECT_EQ(std::isnan(values.grad_up[at]), row == kNanRow) << row << ", " << col;
      EXPECT_EQ(std::isnan(values.activated[at]), col == kNanCol) << row << ", " << col;
    }
  }
}

TEST_F(GatedLinearBackwardSupport, SaysWhatItDoesNotSupport) {
  const auto supported = [&](auto change) {
    GatedLinearBackwardParams p = params_of({128, 64, 128});
    change(p);
    return cuda::plan_gated_linear_backward(p).has_value();
  };
  using P = GatedLinearBackwardParams;
  EXPECT_TRUE(supported([](P&) {}));
  EXPECT_TRUE(supported([](P& p) { p.num_tokens = 0; }));
  EXPECT_FALSE(supported([](P& p) { p.hidden_size = 100; }));
  EXPECT_FALSE(supported([](P& p) { p.hidden_size = 0; }));
  EXPECT_FALSE(supported([](P& p) { p.intermediate_size = 100; }));
  EXPECT_FALSE(supported([](P& p) { p.dtype = DType::kFloat32; }));
  EXPECT_FALSE(supported([](P& p) { p.grad_output = reinterpret_cast<void*>(0x1008); }));
  EXPECT_FALSE(supported([](P& p) { p.grad_up = reinterpret_cast<void*>(0x1002); }));
}

TEST_F(GatedLinearBackwardSupport, NothingToDo) {
  for (const auto& empty : {params_of({0, 64, 128}), params_of({128, 64, 0})}) {
    const auto plan = cuda::plan_gated_linear_backward(empty);
    ASSERT_TRUE(plan.has_value());
    EXPECT_EQ(cuda::gated_linear_backward(empty, *plan, nullptr), cudaSuccess);
  }
}

}  // namespace
}  // namespace omni_moe
