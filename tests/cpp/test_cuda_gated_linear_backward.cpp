// The gradient through the down product and the activation of the CUDA shared MLP against a
// double-precision host oracle on inputs rounded to the dtype. Outputs are poisoned with NaN bytes
// before each run and lie between guards; every element is checked (on big sizes every column of a
// sample of rows, the others for agreement among the outputs). A second run and runs whose outputs
// take the memory of their inputs must repeat the first bit for bit.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
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
  bool activated = true;  // whether it is wanted
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << "T" << c.num_tokens << "_H" << c.hidden_size << "_I" << c.intermediate_size
             << "_dtype" << int(c.dtype) << "_act" << int(c.activation)
             << (c.activated ? "_activated" : "");
}

double derivative(Activation activation, double x) {
  constexpr double kPi = 3.14159265358979323846;
  switch (activation) {
    case Activation::kSilu: {
      const double sigmoid = 1 / (1 + std::exp(-x));
      return sigmoid * (1 + x * (1 - sigmoid));
    }
    case Activation::kGelu:
      return 0.5 * (1 + std::erf(x * std::sqrt(0.5))) +
             x * std::exp(-x * x / 2) / std::sqrt(2 * kPi);
    case Activation::kGeluTanh: {
      const double tanh_inner = std::tanh(std::sqrt(2 / kPi) * (x + 0.044715 * x * x * x));
      return 0.5 * (1 + tanh_inner) + 0.5 * x * (1 - tanh_inner * tanh_inner) * std::sqrt(2 / kPi) *
                                          (1 + 3 * 0.044715 * x * x);
    }
    case Activation::kRelu:
      return x > 0 ? 1 : 0;
    case Activation::kIdentity:
      return 1;
  }
  return NAN;
}

// What the fast activations lose, of the value and of the derivative.
double activation_error(double x) { return 4e-6 * (1 + std::abs(x)); }

GatedLinearBackwardParams params_of(const Case& c) {
  return {nullptr, nullptr,     nullptr,      nullptr,       nullptr,
          nullptr, nullptr,     c.num_tokens, c.hidden_size, c.intermediate_size,
          c.dtype, c.activation};
}

struct Inputs {
  Matrix grad_output, down_weight, gate, up;
};

// Gradients of deviation 2, and products too, so that the activations' tails take part.
Inputs random_inputs(const Case& c) {
  std::mt19937 rng(11);
  const auto random = [&](int64_t rows, int64_t cols, double deviation) {
    return random_matrix(rows, cols, deviation, c.dtype, rng);
  };
  Inputs in;
  in.grad_output = random(c.num_tokens, c.hidden_size, 1.0);
  in.down_weight = random(c.hidden_size, c.intermediate_size, 2 / std::sqrt(double(c.hidden_size)));
  in.gate = random(c.num_tokens, c.intermediate_size, 2.0);
  in.up = random(c.num_tokens, c.intermediate_size, 2.0);
  return in;
}

struct Outputs {
  Matrix grad_gate, grad_up, activated;
};

bool operator==(const Outputs& a, const Outputs& b) {
  return a.grad_gate == b.grad_gate && a.grad_up == b.grad_up && a.activated == b.activated;
}

// Which input's memory each output takes.
enum class Place { kOwn, kGate, kUp };
struct Places {
  Place grad_gate = Place::kOwn, grad_up = Place::kOwn, activated = Place::kOwn;
};

void run(const Case& c, const Inputs& in, const Places& places, Outputs* out) {
  const DeviceMatrix grad_output(in.grad_output), down_weight(in.down_weight);
  const DeviceMatrix gate(in.gate), up(in.up);
  const size_t count = in.gate.size();
  const DeviceMatrix grad_gate(count), grad_up(count), activated(count);
  const auto placed = [&](Place place, const DeviceMatrix& own) -> const DeviceMatrix& {
    return place == Place::kGate ? gate : place == Place::kUp ? up : own;
  };
  const DeviceMatrix& to_grad_gate = placed(places.grad_gate, grad_gate);
  const DeviceMatrix& to_grad_up = placed(places.grad_up, grad_up);
  const DeviceMatrix& to_activated = placed(places.activated, activated);
  GatedLinearBackwardParams p = params_of(c);
  p.grad_output = grad_output.data();
  p.down_weight = down_weight.data();
  p.gate = gate.data();
  p.up = up.data();
  p.grad_gate = to_grad_gate.data();
  p.grad_up = to_grad_up.data();
  p.activated = c.activated ? to_activated.data() : nullptr;
  const auto plan = cuda::plan_gated_linear_backward(p);
  ASSERT_TRUE(plan.has_value());
  CHECK_CUDA(cuda::gated_linear_backward(p, *plan, nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
  *out = {to_grad_gate.download(), to_grad_up.download(), to_activated.download()};
  // What is no output stays as it was.
  EXPECT_TRUE(grad_output.download() == in.grad_output);
  EXPECT_TRUE(down_weight.download() == in.down_weight);
  for (const DeviceMatrix* input : {&gate, &up}) {
    if (input != &to_grad_gate && input != &to_grad_up && input != &to_activated) {
      EXPECT_TRUE(input->download() == (input == &gate ? in.gate : in.up));
    }
  }
}

class GatedLinearBackwardSupport : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "no CUDA device";
    }
    if (!cuda::current_device().has_hopper_kernels) GTEST_SKIP() << "no kernel for this device";
    ASSERT_TRUE(cuda::plan_gated_linear_backward(params_of({128, 64, 128})).has_value());
  }
};

class GatedLinearBackward : public GatedLinearBackwardSupport,
                            public ::testing::WithParamInterface<Case> {};

struct Check {
  DType dtype;
  int failures = 0;

  void operator()(const char* name, int64_t row, int64_t col, uint16_t bits, double want,
                  double error) {
    const double tolerance = rounding_error(dtype, want) + error;
    if (!(std::abs(decode(dtype, bits) - want) <= tolerance) && ++failures <= 10) {  // NaN fails
      ADD_FAILURE() << name << "[" << row << ", " << col << "] = " << decode(dtype, bits)
                    << ", want " << want << " +- " << tolerance;
    }
  }
};

// Every column of as many rows as there is time for.
void check_rows(const Case& c, const Inputs& in, const Outputs& out) {
  const int64_t tokens = c.num_tokens, hidden = c.hidden_size, width = c.intermediate_size;
  const auto decoded = [&](uint16_t bits) { return decode(c.dtype, bits); };
  std::vector<float> weights(in.down_weight.size());
  std::transform(in.down_weight.begin(), in.down_weight.end(), weights.begin(), decoded);
  const int64_t rows = std::clamp<int64_t>(kMaxOracleWork / (2.0 * hidden * width), 1, tokens);
  std::vector<double> sums(width), squares(width);
  Check check{c.dtype};
  for (int64_t sample = 0; sample < rows; ++sample) {
    // Spread over all tiles and all places in them; first and last row included.
    const int64_t row = rows == 1 ? tokens - 1 : sample * (tokens - 1) / (rows - 1);
    std::fill(sums.begin(), sums.end(), 0.0);
    std::fill(squares.begin(), squares.end(), 0.0);
    for (int64_t k = 0; k < hidden; ++k) {
      const double g = decoded(in.grad_output[row * hidden + k]);
      for (int64_t col = 0; col < width; ++col) {
        const double term = g * weights[k * width + col];
        sums[col] += term;
        squares[col] += term * term;
      }
    }
    for (int64_t col = 0; col < width; ++col) {
      const int64_t at = row * width + col;
      const double gate = decoded(in.gate[at]), up = decoded(in.up[at]), grad = sums[col];
      const double act = activate(c.activation, gate), slope = derivative(c.activation, gate);
      // grad_activated is rounded to the dtype, like the outputs that it is a factor of.
      const double grad_error =
          std::sqrt(squares[col]) * sum_error_of(hidden) + rounding_error(c.dtype, grad);
      const double act_error = activation_error(gate);
      check("grad_gate", row, col, out.grad_gate[at], grad * up * slope,
            std::abs(up) * (std::abs(slope) * grad_error + std::abs(grad) * act_error));
      check("grad_up", row, col, out.grad_up[at], grad * act,
            std::abs(act) * grad_error + std::abs(grad) * act_error);
      if (c.activated) {
        check("activated", row, col, out.activated[at], act * up, std::abs(up) * act_error);
      }
    }
  }
  EXPECT_EQ(check.failures, 0) << "of " << rows << " rows";
}

// What holds among the outputs at every element, even in rows that the oracle leaves out:
// grad_gate * act = grad_up * up * act', each side with one rounding besides the common one of
// grad_activated, and activated in full.
void check_agreement(const Case& c, const Inputs& in, const Outputs& out) {
  const auto decoded = [&](uint16_t bits) -> double { return decode(c.dtype, bits); };
  int64_t mismatches = 0, mismatches_activated = 0;
  for (size_t i = 0; i < in.gate.size(); ++i) {
    const double gate = decoded(in.gate[i]), up = decoded(in.up[i]);
    const double grad_gate = decoded(out.grad_gate[i]), grad_up = decoded(out.grad_up[i]);
    const double act = activate(c.activation, gate), slope = derivative(c.activation, gate);
    const double act_error = activation_error(gate);
    const double left = grad_gate * act, right = grad_up * up * slope;
    const double tolerance = 1.5 * std::abs(act) * rounding_error(c.dtype, grad_gate) +
                             1.5 * std::abs(up * slope) * rounding_error(c.dtype, grad_up) +
                             4 * act_error * std::abs(up) * (std::abs(grad_up) + 1);
    mismatches += !(std::abs(left - right) <= tolerance);
    if (c.activated) {
      const double error = std::abs(decoded(out.activated[i]) - act * up);
      mismatches_activated +=
          !(error <= rounding_error(c.dtype, act * up) + std::abs(up) * act_error);
    }
  }
  EXPECT_EQ(mismatches, 0);
  EXPECT_EQ(mismatches_activated, 0);
}

TEST_P(GatedLinearBackward, MatchesOracle) {
  const Case c = GetParam();
  const Inputs in = random_inputs(c);
  Outputs out;
  ASSERT_NO_FATAL_FAILURE(run(c, in, {}, &out));

  // 1. Against the oracle, and all elements written where wanted, none elsewhere.
  check_rows(c, in, out);
  check_agreement(c, in, out);
  const auto written = [](const Matrix& m) {
    return std::count_if(m.begin(), m.end(), [](uint16_t bits) { return bits != 0xffff; });
  };
  const int64_t count = c.num_tokens * c.intermediate_size;
  EXPECT_EQ(written(out.grad_gate), count);
  EXPECT_EQ(written(out.grad_up), count);
  EXPECT_EQ(written(out.activated), c.activated ? count : 0);

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
    for (const auto activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh,
                                  Activation::kRelu, Activation::kIdentity}) {
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

INSTANTIATE_TEST_SUITE_P(Shapes, GatedLinearBackward, ::testing::ValuesIn(cases()),
                         [](const auto& info) {
                           std::ostringstream name;
                           name << info.param;
                           return name.str();
                         });

// One factor at a time: powers of two that name their place, so that a wrong element says where it
// came from.
TEST_F(GatedLinearBackwardSupport, TakesEveryElementFromItsPlace) {
  const Case c{130, 200, 520, DType::kFloat16, Activation::kIdentity};
  for (int64_t k = 0; k < c.hidden_size; k += 13) {
    // Row k of down_weight holds its columns, all other rows what must not be taken; grad_output
    // takes row k.
    Inputs in;
    in.grad_output.assign(c.num_tokens * c.hidden_size, encode(c.dtype, 0));
    in.down_weight.assign(c.hidden_size * c.intermediate_size, encode(c.dtype, -1));
    in.gate.assign(c.num_tokens * c.intermediate_size, encode(c.dtype, 1));
    in.up.assign(c.num_tokens * c.intermediate_size, encode(c.dtype, 2));
    for (int64_t row = 0; row < c.num_tokens; ++row) {
      in.grad_output[row * c.hidden_size + k] = encode(c.dtype, 1);
    }
    for (int64_t col = 0; col < c.intermediate_size; ++col) {
      in.down_weight[k * c.intermediate_size + col] = encode(c.dtype, float(col));
    }
    Outputs out;
    ASSERT_NO_FATAL_FAILURE(run(c, in, {}, &out));
    int failures = 0;
    for (int64_t at = 0; at < c.num_tokens * c.intermediate_size && failures < 10; ++at) {
      const float col = float(at % c.intermediate_size);
      if (decode(c.dtype, out.grad_up[at]) != col ||
          decode(c.dtype, out.grad_gate[at]) != 2 * col) {
        ++failures;
        ADD_FAILURE() << "K " << k << ", row " << at / c.intermediate_size << ", col " << col
                      << ": grad_up " << decode(c.dtype, out.grad_up[at]) << ", grad_gate "
                      << decode(c.dtype, out.grad_gate[at]);
      }
    }
    ASSERT_EQ(failures, 0);
  }
}

TEST_F(GatedLinearBackwardSupport, ClosedReluPassesNoNan) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const Case c{37, 104, 136, dtype, Activation::kRelu};
    constexpr int64_t kNanRow = 5, kNanCol = 9;
    Inputs in = random_inputs(c);
    for (int64_t k = 0; k < c.hidden_size; ++k) {
      in.grad_output[kNanRow * c.hidden_size + k] = encode(dtype, NAN);
    }
    for (int64_t row = 0; row < c.num_tokens; ++row) {
      in.up[row * c.intermediate_size + kNanCol] = encode(dtype, NAN);
    }
    Outputs out;
    ASSERT_NO_FATAL_FAILURE(run(c, in, {}, &out));
    for (int64_t row = 0; row < c.num_tokens; ++row) {
      for (int64_t col = 0; col < c.intermediate_size; ++col) {
        const int64_t at = row * c.intermediate_size + col;
        const bool is_open = decode(dtype, in.gate[at]) > 0;
        const float grad_gate = decode(dtype, out.grad_gate[at]);
        const bool takes_nan = is_open && (row == kNanRow || col == kNanCol);
        EXPECT_EQ(std::isnan(grad_gate), takes_nan) << row << ", " << col;
        if (!is_open) {
          EXPECT_EQ(grad_gate, 0.0f) << row << ", " << col;
        }
        EXPECT_EQ(std::isnan(decode(dtype, out.grad_up[at])), row == kNanRow) << row << ", " << col;
        EXPECT_EQ(std::isnan(decode(dtype, out.activated[at])), col == kNanCol)
            << row << ", " << col;
      }
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
