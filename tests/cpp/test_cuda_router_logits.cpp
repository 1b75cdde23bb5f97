// The router's logits, both gates' products and the BatchNorm behind them in one CUDA kernel,
// against a double-precision host oracle on inputs rounded to the dtype. Outputs and the workspace
// start as NaN bytes and are followed by guards; every element is checked, and a second run must
// repeat the first bit for bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <ostream>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cuda_kernel_testing.h"
#include "gated_linear_testing.h"
#include "omni_moe/cuda.h"

namespace omni_moe {
namespace {

constexpr double kMomentum = 0.3;
constexpr double kEps = 1e-5;

struct Shape {
  int64_t num_tokens, hidden_size, num_rows, num_cols;
  int64_t width() const { return num_rows + num_cols; }
};

struct Case {
  Shape shape;
  DTypeInfo type;
};

std::string name_of(const Case& c) {
  return "T" + std::to_string(c.shape.num_tokens) + "_H" + std::to_string(c.shape.hidden_size) +
         "_R" + std::to_string(c.shape.num_rows) + "_C" + std::to_string(c.shape.num_cols) + "_" +
         c.type.name;
}

void PrintTo(const Case& c, std::ostream* out) { *out << name_of(c); }

struct Mode {
  DTypeInfo stats_type;
  bool training;
};

// One column of the logits in double.
struct Column {
  double mean = 0, var = 0;
  double largest = 0;
  double error = 0;  // of a product as the tensor cores sum it
};

// What the runs read, and the logits that it makes.
struct Problem {
  Shape shape;
  DTypeInfo type;
  Matrix x, gates;  // [T, H], [R + C, H]
  std::vector<float> running_mean, running_var;
  std::vector<double> logits;  // [T, R + C]
  std::vector<Column> columns;

  explicit Problem(const Case& c, const std::function<void(Problem&)>& edit = {})
      : shape(c.shape), type(c.type), columns(c.shape.width()) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    x = random_matrix(shape.num_tokens, shape.hidden_size, 1.0, type.dtype, random);
    // So that the columns' means are of the size of their deviations.
    for (uint16_t& bits : x) bits = encode(type.dtype, decode(type.dtype, bits) + 1.0f);
    gates = random_matrix(shape.width(), shape.hidden_size,
                          1 / std::sqrt(double(shape.hidden_size)), type.dtype, random);
    for (int64_t i = 0; i < shape.width(); ++i) {
      running_mean.push_back(normal(random));
      running_var.push_back(0.5f + std::abs(normal(random)));
    }
    if (edit) edit(*this);
    multiply();
    for (int64_t i = 0; i < shape.width(); ++i) measure(i);
  }

  void set_gate(int64_t column, int64_t k, float value) {
    gates[column * shape.hidden_size + k] = encode(type.dtype, value);
  }
  void fill_gate(int64_t column, float value) {
    for (int64_t k = 0; k < shape.hidden_size; ++k) set_gate(column, k, value);
  }
  void set_x(int64_t token, int64_t k, float value) {
    x[token * shape.hidden_size + k] = encode(type.dtype, value);
  }

 private:
  void multiply() {
    const int64_t hidden = shape.hidden_size, width = shape.width();
    std::vector<float> transposed(hidden * width);  // neighbouring columns: a loop of vectors
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t k = 0; k < hidden; ++k) {
        transposed[k * width + i] = decode(type.dtype, gates[i * hidden + k]);
      }
    }
    logits.resize(shape.num_tokens * width);
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      double* row = &logits[t * width];
      for (int64_t k = 0; k < hidden; ++k) {
        const double value = decode(type.dtype, x[t * hidden + k]);
        const float* gate = &transposed[k * width];
        for (int64_t i = 0; i < width; ++i) row[i] += value * gate[i];
      }
    }
  }

  void measure(int64_t i) {
    const int64_t hidden = shape.hidden_size, width = shape.width();
    const auto n = static_cast<double>(shape.num_tokens);
    Column& column = columns[i];
    for (int64_t t = 0; t < shape.num_tokens; ++t) column.mean += logits[t * width + i] / n;
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      const double logit = logits[t * width + i], distance = logit - column.mean;
      column.var += distance * distance / n;
      column.largest = std::max(column.largest, std::abs(logit));  // without NaN
    }
    double squares = 0;
    for (int64_t k = 0; k < hidden; ++k) {
      const double value = decode(type.dtype, gates[i * hidden + k]);
      squares += value * value;
    }
    constexpr double kSizeOfX = 2;  // mean and deviation are 1
    column.error = sum_error_of(hidden) * kSizeOfX * std::sqrt(squares);
  }
};

// What a run writes. Those of the y axis follow those of the x axis.
enum Output { kNormedX, kNormedY, kMeanX, kMeanY, kVarX, kVarY, kCountX, kCountY, kInvStd };
constexpr int kNumOutputs = kInvStd + 1;
constexpr const char* kOutputNames[] = {
    "normed_x",      "normed_y",      "running_mean_x",        "running_mean_y",
    "running_var_x", "running_var_y", "num_batches_tracked_x", "num_batches_tracked_y",
    "inv_std"};

using Bytes = std::vector<unsigned char>;
using Outputs = std::array<Bytes, kNumOutputs>;

Bytes encode_count(int64_t count) {
  Bytes bytes(sizeof(count));
  std::memcpy(bytes.data(), &count, sizeof(count));
  return bytes;
}

int64_t decode_count(const Bytes& bytes) {
  int64_t count = 0;
  std::memcpy(&count, bytes.data(), sizeof(count));
  return count;
}

Outputs outputs_before(const Problem& p, const DTypeInfo& stats_type) {
  const Shape& s = p.shape;
  Outputs outputs;
  outputs[kInvStd] = Bytes(s.width() * sizeof(float), kPoison);
  for (const int axis : {0, 1}) {
    const int64_t begin = axis == 0 ? 0 : s.num_rows, end = axis == 0 ? s.num_rows : s.width();
    const auto part = [&](const std::vector<float>& both) {
      return encode(stats_type, std::vector<float>(both.begin() + begin, both.begin() + end));
    };
    outputs[kNormedX + axis] = Bytes(s.num_tokens * (end - begin) * p.type.bytes, kPoison);
    outputs[kMeanX + axis] = part(p.running_mean);
    outputs[kVarX + axis] = part(p.running_var);
    outputs[kCountX + axis] = encode_count(5 + 2 * axis);
  }
  return outputs;
}

// A problem on the device, with outputs and a workspace of its own. Of `absent` it passes null.
class DeviceRun {
 public:
  DeviceRun(const Problem& p, const Mode& mode, const std::set<int>& absent = {},
            int workspace_byte = kPoison)
      : x_(p.x),
        gate_x_(rows_of(p.gates, 0, p.shape.num_rows, p.shape.hidden_size)),
        gate_y_(rows_of(p.gates, p.shape.num_rows, p.shape.width(), p.shape.hidden_size)) {
    const Outputs before = outputs_before(p, mode.stats_type);
    for (int i = 0; i < kNumOutputs; ++i) {
      if (absent.count(i) == 0) outputs_[i].emplace(before[i]);
    }
    params_.hidden_states = x_.data();
    params_.gate_x = gate_x_.data();
    params_.gate_y = gate_y_.data();
    params_.hidden_size = p.shape.hidden_size;
    params_.normed_x = data(kNormedX);
    params_.normed_y = data(kNormedY);
    params_.inv_std = data(kInvStd);
    params_.x = {data(kMeanX), data(kVarX), static_cast<int64_t*>(data(kCountX))};
    params_.y = {data(kMeanY), data(kVarY), static_cast<int64_t*>(data(kCountY))};
    params_.num_tokens = p.shape.num_tokens;
    params_.num_rows = p.shape.num_rows;
    params_.num_cols = p.shape.num_cols;
    params_.dtype = p.type.dtype;
    params_.stats_dtype = mode.stats_type.dtype;
    params_.training = mode.training;
    params_.momentum = kMomentum;
    params_.eps = kEps;
    plan_ = cuda::plan_router_logits_forward(params_);
    EXPECT_TRUE(plan_.has_value()) << "these fit on 132 SMs";
    const size_t bytes = plan_->workspace_bytes;
    workspace_.emplace(bytes);
    params_.workspace = workspace_->data();
    EXPECT_EQ(cudaSuccess, cudaMemset(params_.workspace, workspace_byte, bytes));
    EXPECT_EQ(cudaSuccess, cudaDeviceSynchronize());
  }

  void launch(cudaStream_t stream = nullptr) const {
    EXPECT_EQ(cudaSuccess, cuda::router_logits_forward(params_, *plan_, stream));
  }

  Outputs read() const {
    EXPECT_EQ(cudaSuccess, cudaDeviceSynchronize());
    Outputs outputs;
    for (int i = 0; i < kNumOutputs; ++i) {
      if (outputs_[i]) outputs[i] = outputs_[i]->read();
    }
    workspace_->read();  // its guard
    return outputs;
  }

 private:
  static Matrix rows_of(const Matrix& matrix, int64_t begin, int64_t end, int64_t width) {
    return {matrix.begin() + begin * width, matrix.begin() + end * width};
  }
  void* data(Output i) const { return outputs_[i] ? outputs_[i]->data() : nullptr; }

  DeviceMatrix x_, gate_x_, gate_y_;
  std::array<std::optional<DeviceBuffer>, kNumOutputs> outputs_;
  std::optional<DeviceBuffer> workspace_;
  RouterLogitsForwardParams params_{};
  std::optional<cuda::RouterLogitsForwardPlan> plan_;
};

Outputs run(const Problem& p, const Mode& mode, const std::set<int>& absent = {},
            int workspace_byte = kPoison) {
  const DeviceRun device(p, mode, absent, workspace_byte);
  device.launch();
  return device.read();
}

void expect_same(const Outputs& want, const Outputs& got, const std::set<int>& absent = {}) {
  for (int i = 0; i < kNumOutputs; ++i) {
    if (absent.count(i) != 0) continue;
    EXPECT_TRUE(want[i] == got[i]) << kOutputNames[i];
  }
}

void check(const Problem& p, const Mode& mode, const Outputs& got) {
  const Outputs before = outputs_before(p, mode.stats_type);
  const Shape& s = p.shape;
  const auto n = static_cast<double>(s.num_tokens);
  const double loss = 6e-8 * (8 + std::sqrt(n));  // of a sum over the tokens in fp32
  const auto inv_std = decode(kDTypes[0], got[kInvStd]);
  for (const int axis : {0, 1}) {
    const int64_t width = axis == 0 ? s.num_rows : s.num_cols;
    const int64_t first = axis == 0 ? 0 : s.num_rows;
    const int mean_at = kMeanX + axis, var_at = kVarX + axis, count_at = kCountX + axis;
    const auto normed = decode(p.type, got[kNormedX + axis]);
    const auto old_means = decode(mode.stats_type, before[mean_at]);
    const auto old_vars = decode(mode.stats_type, before[var_at]);
    const auto new_means = decode(mode.stats_type, got[mean_at]);
    const auto new_vars = decode(mode.stats_type, got[var_at]);
    if (mode.training) {
      EXPECT_EQ(decode_count(before[count_at]) + 1, decode_count(got[count_at]));
    } else {
      for (const int i : {mean_at, var_at, count_at}) {
        EXPECT_TRUE(before[i] == got[i]) << kOutputNames[i] << " written in eval";
      }
    }
    for (int64_t col = 0; col < width; ++col) {
      // Says what is wrong only where something is: there are many elements.
      const auto near = [&](float value, double want, double slack, const DTypeInfo& type, int what,
                            int64_t token) {
        const double tolerance = type.epsilon * std::abs(want) + slack + type.smallest;
        if (std::abs(value - want) <= tolerance) return;
        expect_close(value, want, tolerance,
                     std::string(kOutputNames[what]) + " of column " + std::to_string(col) +
                         ", token " + std::to_string(token));
      };
      const Column& batch = p.columns[first + col];
      const double old_mean = old_means[col], old_var = old_vars[col];
      const double mean = mode.training ? batch.mean : old_mean;
      const double var = mode.training ? batch.var : old_var;
      const double want_inv_std = 1 / std::sqrt(var + kEps);
      // Of what is left of a logit without its mean; and of inv_std, relative.
      const double error = batch.error + loss * std::max(batch.largest, std::abs(mean));
      const double scale_error = loss + (mode.training ? error * want_inv_std : 0);
      near(inv_std[first + col], want_inv_std, want_inv_std * scale_error, kDTypes[0], kInvStd, 0);
      if (mode.training) {
        const double unbiased = n / (n - 1);
        const double var_error = 2 * error * (std::sqrt(var) + error) + loss * var;
        near(new_means[col], (1 - kMomentum) * old_mean + kMomentum * mean,
             error + loss * std::abs(old_mean), mode.stats_type, mean_at, 0);
        near(new_vars[col], (1 - kMomentum) * old_var + kMomentum * var * unbiased,
             unbiased * var_error + loss * old_var, mode.stats_type, var_at, 0);
      }
      for (int64_t t = 0; t < s.num_tokens; ++t) {
        const double want = (p.logits[t * s.width() + first + col] - mean) * want_inv_std;
        near(normed[t * width + col], want, 2 * error * want_inv_std + scale_error * std::abs(want),
             p.type, kNormedX + axis, t);
      }
      if (testing::Test::HasFailure()) return;
    }
  }
}

// Running statistics in fp32 and in the dtype of the logits, training and eval.
std::vector<Mode> modes_of(const Case& c) {
  std::vector<Mode> modes;
  for (const DTypeInfo& stats_type : {kDTypes[0], c.type}) {
    if (c.shape.num_tokens > 1) modes.push_back({stats_type, true});
    modes.push_back({stats_type, false});
  }
  return modes;
}

std::string describe(const Mode& mode) {
  return std::string(mode.training ? "training" : "eval") + ", stats " + mode.stats_type.name;
}

// ---- tests ----

class CudaRouterLogits : public CudaKernelTest {
 protected:
  void SetUp() override {
    CudaKernelTest::SetUp();
    if (IsSkipped()) return;
    int device = 0, num_sms = 0;
    ASSERT_EQ(cudaSuccess, cudaGetDevice(&device));
    ASSERT_EQ(cudaSuccess,
              cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
    if (!cuda::current_device().has_hopper_kernels || num_sms < 132) {
      GTEST_SKIP() << "needs a Hopper GPU with 132 SMs, and code for it";
    }
  }
};

class CudaRouterLogitsOf : public CudaRouterLogits, public testing::WithParamInterface<Case> {};

TEST_P(CudaRouterLogitsOf, MatchesOracleTwice) {
  const Problem p(GetParam());
  for (const Mode& mode : modes_of(GetParam())) {
    SCOPED_TRACE(describe(mode));
    const Outputs got = run(p, mode, {}, /*workspace_byte=*/0);
    check(p, mode, got);
    expect_same(got, run(p, mode));
    if (HasFailure()) return;
  }
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DTypeInfo& type : {kDTypes[1], kDTypes[2]}) {
    for (const Shape& shape :
         {// Tails in every dimension, one block and several.
          Shape{1, 64, 64, 64}, Shape{1, 200, 40, 72}, Shape{2, 8, 8, 8}, Shape{5, 64, 64, 64},
          Shape{37, 200, 40, 72}, Shape{64, 72, 8, 136}, Shape{129, 64, 256, 8},
          Shape{199, 264, 64, 64}, Shape{257, 520, 200, 256}, Shape{1000, 104, 72, 56},
          Shape{700, 328, 128, 128}, Shape{4096, 1024, 64, 64},
          // Too many blocks of one group of columns: two groups, one of them may be of the other
          // axis or none. With few tokens, and with more stages than there are buffers.
          Shape{37, 72, 4096, 320}, Shape{4090, 64, 72, 56}, Shape{1100, 520, 136, 264},
          // Two tiles of tokens as well.
          Shape{199, 72, 4096, 328}, Shape{2100, 456, 200, 136}, Shape{4095, 64, 256, 256},
          // And three groups.
          Shape{4090, 72, 320, 328}}) {
      all.push_back({shape, type});
    }
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaRouterLogitsOf, testing::ValuesIn(cases()),
                         [](const auto& info) { return name_of(info.param); });

TEST_F(CudaRouterLogits, ConstantColumns) {
  for (const DTypeInfo& type : {kDTypes[1], kDTypes[2]}) {
    for (const int64_t num_tokens : {2, 37, 1000}) {
      const Case c{{num_tokens, 72, 8, 16}, type};
      const Problem p(c, [&](Problem& p) {
        p.fill_gate(3, 0);
        p.fill_gate(11, 0);  // one term is left, the same for all tokens
        p.set_gate(11, 0, 0.7f);
        for (int64_t t = 0; t < num_tokens; ++t) p.set_x(t, 0, 1.3f);
      });
      SCOPED_TRACE(name_of(c));
      const Mode mode{kDTypes[0], true};
      const Outputs got = run(p, mode);
      check(p, mode, got);
      const auto normed_x = decode(type, got[kNormedX]), normed_y = decode(type, got[kNormedY]);
      for (int64_t t = 0; t < num_tokens; ++t) {
        ASSERT_EQ(0, normed_x[t * 8 + 3]) << t;
        ASSERT_EQ(0, normed_y[t * 16 + 3]) << t;
      }
    }
  }
}

TEST_F(CudaRouterLogits, NonFiniteGateStaysInItsColumn) {
  for (const DTypeInfo& type : {kDTypes[1], kDTypes[2]}) {
    for (const Shape& shape : {Shape{37, 72, 8, 16}, Shape{700, 200, 128, 72}}) {
      const Case c{shape, type};
      const Problem p(c, [&](Problem& p) {
        p.set_gate(2, 70, kNan);
        p.set_gate(shape.num_rows + 9, 5, kNan);
      });
      for (const Mode& mode : modes_of(c)) {
        SCOPED_TRACE(name_of(c) + ", " + describe(mode));
        const Outputs got = run(p, mode);
        check(p, mode, got);  // NaN where the oracle has it, and only there
        const auto normed_x = decode(type, got[kNormedX]);
        for (size_t i = 0; i < normed_x.size(); ++i) {
          ASSERT_EQ(static_cast<int64_t>(i) % shape.num_rows == 2, std::isnan(normed_x[i])) << i;
        }
      }
    }
  }
}

TEST_F(CudaRouterLogits, NonFiniteTokenStaysInItsRowInEval) {
  const Case c{{199, 72, 40, 64}, kDTypes[2]};
  const Problem p(c, [](Problem& p) { p.set_x(70, 3, kNan); });
  const Mode mode{kDTypes[0], false};
  check(p, mode, run(p, mode));
}

// E[x²] - E[x]² in fp32 would leave few digits of it.
TEST_F(CudaRouterLogits, VarianceOfLargeMean) {
  for (const DTypeInfo& type : {kDTypes[1], kDTypes[2]}) {
    const Case c{{1000, 16, 8, 8}, type};
    // Integers, which fp32 sums exactly: what is lost is lost by the statistics.
    const Problem p(c, [&](Problem& p) {
      std::mt19937 random(1);
      const auto small = [&] { return static_cast<float>(static_cast<int>(random() % 3) - 1); };
      for (uint16_t& bits : p.x) bits = encode(type.dtype, small());
      for (uint16_t& bits : p.gates) bits = encode(type.dtype, small());
      for (int64_t t = 0; t < 1000; ++t) p.set_x(t, 0, 1);
      for (int64_t i = 0; i < 16; ++i) p.set_gate(i, 0, 1024);
    });
    const auto got = decode(kDTypes[0], run(p, {kDTypes[0], true})[kInvStd]);
    for (int64_t i = 0; i < 16; ++i) {
      EXPECT_NEAR(1, got[i] * std::sqrt(p.columns[i].var + kEps), 1e-4) << i;
    }
  }
}

TEST_F(CudaRouterLogits, WithoutBuffers) {
  const Case c{{257, 72, 40, 72}, kDTypes[2]};
  const Problem p(c);
  for (const Mode& mode : modes_of(c)) {
    SCOPED_TRACE(describe(mode));
    const Outputs want = run(p, mode);
    std::vector<std::set<int>> absents{{kInvStd}, {kCountX}, {kCountX, kCountY, kInvStd}};
    if (mode.training) {  // eval reads the others
      absents.push_back({kMeanX, kVarX, kCountX});
      absents.push_back({kMeanY, kVarY, kCountY});
      absents.push_back({kMeanX, kVarY});
      absents.push_back({kMeanX, kMeanY, kVarX, kVarY, kCountX, kCountY, kInvStd});
    }
    for (const auto& absent : absents) expect_same(want, run(p, mode, absent), absent);
  }
}

// The next launch may start before this one ends; it uses the same workspace and statistics.
TEST_F(CudaRouterLogits, OneAfterAnother) {
  constexpr int kTurns = 20;
  for (const Shape& shape : {Shape{37, 72, 8, 16}, Shape{4096, 64, 64, 64}}) {
    for (const bool training : {true, false}) {
      const Mode mode{kDTypes[0], training};
      const Problem p({shape, kDTypes[2]});
      const DeviceRun apart(p, mode), together(p, mode);
      for (int turn = 0; turn < kTurns; ++turn) {
        apart.launch();
        EXPECT_EQ(cudaSuccess, cudaDeviceSynchronize());
      }
      for (int turn = 0; turn < kTurns; ++turn) together.launch();
      const Outputs got = together.read();
      expect_same(apart.read(), got);
      EXPECT_EQ(5 + (training ? kTurns : 0), decode_count(got[kCountX]));
    }
  }
}

// A grid barrier needs the whole grid on the device: launches that overlap must not wait for each
// other forever.
TEST_F(CudaRouterLogits, ConcurrentStreams) {
  const Mode mode{kDTypes[0], true};
  const Problem p({{4096, 64, 256, 256}, kDTypes[2]});
  constexpr int kStreams = 4;
  cudaStream_t streams[kStreams];
  std::vector<std::unique_ptr<DeviceRun>> runs;
  for (cudaStream_t& stream : streams) {
    ASSERT_EQ(cudaSuccess, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    runs.push_back(std::make_unique<DeviceRun>(p, mode));
  }
  for (int turn = 0; turn < 20 * kStreams; ++turn) {
    runs[turn % kStreams]->launch(streams[turn % kStreams]);
  }
  const Outputs want = runs[0]->read();
  for (int i = 1; i < kStreams; ++i) expect_same(want, runs[i]->read());
  for (const cudaStream_t stream : streams) cudaStreamDestroy(stream);
}

TEST_F(CudaRouterLogits, SaysWhatItDoesNotSupport) {
  using P = RouterLogitsForwardParams;
  const auto changed = [](const std::function<void(P&)>& change) {
    P p{};
    p.num_tokens = 128;
    p.hidden_size = p.num_rows = p.num_cols = 64;
    p.dtype = DType::kBFloat16;
    p.stats_dtype = DType::kFloat32;
    p.training = true;
    p.momentum = kMomentum;
    p.eps = kEps;
    change(p);
    return p;
  };
  EXPECT_TRUE(cuda::plan_router_logits_forward(changed([](P&) {})).has_value());
  EXPECT_TRUE(
      cuda::plan_router_logits_forward(changed([](P& p) { p.training = false; })).has_value());
  void* const misaligned = reinterpret_cast<void*>(0x1008);
  const std::function<void(P&)> changes[] = {
      [](P& p) { p.dtype = DType::kFloat32; },
      [](P& p) { p.dtype = p.stats_dtype = DType::kFloat64; },
      [](P& p) { p.stats_dtype = DType::kFloat16; },
      [](P& p) { p.stats_dtype = DType::kFloat64; },
      [](P& p) { p.hidden_size = 100; },
      [](P& p) { p.hidden_size = 0; },
      [](P& p) { p.num_rows = 60; },
      [](P& p) { p.num_rows = 0; },
      [](P& p) { p.num_cols = 4; },
      [](P& p) { p.num_cols = 0; },
      [](P& p) { p.num_tokens = 0; },
      [](P& p) { p.num_tokens = 100000; },
      [](P& p) { p.num_rows = p.num_cols = 100000; },
      [=](P& p) { p.hidden_states = misaligned; },
      [=](P& p) { p.gate_x = misaligned; },
      [=](P& p) { p.gate_y = misaligned; },
      [=](P& p) { p.normed_x = misaligned; },
      [=](P& p) { p.normed_y = misaligned; },
  };
  for (size_t i = 0; i < std::size(changes); ++i) {
    for (const bool training : {true, false}) {
      P p = changed(changes[i]);
      p.training = training;
      EXPECT_FALSE(cuda::plan_router_logits_forward(p).has_value()) << i;
    }
  }
}

}  // namespace
}  // namespace omni_moe
