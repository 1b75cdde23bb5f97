// The router's logits, both gates' products and the BatchNorm behind them in one CUDA kernel,
// against an fp64 oracle on inputs rounded to the dtype: a plain product, and the CPU backend's
// BatchNorm. Outputs and the workspace start as NaN bytes and lie between guards; every element is
// checked, and a second run must repeat the first bit for bit.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <iterator>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cuda_router_logits_testing.h"

namespace omni_moe {
namespace {

// BatchNorm of all columns as one axis, by the CPU backend.
struct Oracle {
  Values normed, inv_std, running_mean, running_var;

  Oracle(const Problem& p, const Mode& mode)
      : normed(p.logits.size()),
        inv_std(p.shape.width()),
        running_mean(rounded(mode.stats_dtype, p.running_mean)),
        running_var(rounded(mode.stats_dtype, p.running_var)) {
    BatchNormForwardParams params{};
    params.logits = p.logits.data();
    params.normed_x = normed.data();
    params.inv_std = inv_std.data();
    params.x = {running_mean.data(), running_var.data(), nullptr};
    params.num_tokens = p.shape.num_tokens;
    params.num_rows = params.logits_stride = p.shape.width();
    params.dtype = params.stats_dtype = DType::kFloat64;
    params.training = mode.training;
    params.momentum = kMomentum;
    params.eps = kEps;
    cpu::batch_norm_forward(params, kSerial);
  }
};

// Both axes' values, [rows, R] and [rows, C], as [rows, R + C].
Values side_by_side(const Shape& s, const Values& x, const Values& y) {
  Values both;
  for (size_t row = 0; row * s.num_rows < x.size(); ++row) {
    both.insert(both.end(), &x[row * s.num_rows], &x[row * s.num_rows] + s.num_rows);
    both.insert(both.end(), &y[row * s.num_cols], &y[row * s.num_cols] + s.num_cols);
  }
  return both;
}

void check(const Problem& p, const Mode& mode, const Outputs& got) {
  const Outputs before = outputs_before(p, mode.stats_dtype);
  const Oracle want(p, mode);
  const int64_t width = p.shape.width();
  const auto n = static_cast<double>(p.shape.num_tokens);
  const double loss = sum_error(p.shape.num_tokens);
  const auto both_of = [&](const Outputs& outputs, Output first, DType dtype) {
    return side_by_side(p.shape, decode(dtype, outputs[first]), decode(dtype, outputs[first + 1]));
  };
  const Values old_mean = both_of(before, kMeanX, mode.stats_dtype);
  const Values old_var = both_of(before, kVarX, mode.stats_dtype);
  // Of what is left of a logit without its mean; and of inv_std, relative.
  Values error(width), scale_error(width);
  for (int64_t i = 0; i < width; ++i) {
    const double mean = mode.training ? 0 : std::abs(old_mean[i]);  // that of a batch is no larger
    error[i] = p.error[i] + loss * std::max(p.largest[i], mean);
    scale_error[i] = loss + (mode.training ? error[i] * want.inv_std[i] : 0);
  }
  const auto near = [&](const char* name, const Values& got, const Values& want, DType dtype,
                        auto slack) {
    expect_close(
        name, got, want, [&](size_t i) { return rounding_error(dtype, want[i]) + slack(i); },
        NaNs::kMatch);
  };
  near("inv_std", decode(DType::kFloat32, got[kInvStd]), want.inv_std, DType::kFloat32,
       [&](size_t i) { return want.inv_std[i] * scale_error[i]; });
  near("normed", both_of(got, kNormedX, p.dtype), want.normed, p.dtype, [&](size_t at) {
    const size_t i = at % width;
    return 2 * error[i] * want.inv_std[i] + scale_error[i] * std::abs(want.normed[at]);
  });
  if (!mode.training) {
    for (const int i : {kMeanX, kMeanY, kVarX, kVarY, kCountX, kCountY}) {
      EXPECT_TRUE(before[i] == got[i]) << kOutputNames[i] << " written in eval";
    }
    return;
  }
  for (const int i : {kCountX, kCountY}) {
    EXPECT_EQ(decode_count(before[i]) + 1, decode_count(got[i])) << kOutputNames[i];
  }
  near("running_mean", both_of(got, kMeanX, mode.stats_dtype), want.running_mean, mode.stats_dtype,
       [&](size_t i) { return error[i] + loss * std::abs(old_mean[i]); });
  near("running_var", both_of(got, kVarX, mode.stats_dtype), want.running_var, mode.stats_dtype,
       [&](size_t i) {
         const double var = std::max(0.0, 1 / (want.inv_std[i] * want.inv_std[i]) - kEps);
         const double var_error = 2 * error[i] * (std::sqrt(var) + error[i]) + loss * var;
         return n / (n - 1) * var_error + loss * old_var[i];
       });
}

// Running statistics in fp32 and in the dtype of the logits, training and eval.
std::vector<Mode> modes_of(const LogitsCase& c) {
  std::vector<Mode> modes;
  for (const DType stats_dtype : {DType::kFloat32, c.dtype}) {
    if (c.shape.num_tokens > 1) modes.push_back({stats_dtype, true});
    modes.push_back({stats_dtype, false});
  }
  return modes;
}

std::string describe(const Mode& mode) {
  return std::string(mode.training ? "training" : "eval") + ", stats " + name_of(mode.stats_dtype);
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

class CudaRouterLogitsOf : public CudaRouterLogits,
                           public testing::WithParamInterface<LogitsCase> {};

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

std::vector<LogitsCase> cases() {
  std::vector<LogitsCase> all;
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
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
      all.push_back({shape, dtype});
    }
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaRouterLogitsOf, testing::ValuesIn(cases()),
                         [](const auto& info) { return name_of(info.param); });

TEST_F(CudaRouterLogits, ConstantColumns) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const int64_t num_tokens : {2, 37, 1000}) {
      const LogitsCase c{{num_tokens, 72, 8, 16}, dtype};
      const Problem p(c, [&](Problem& p) {
        std::fill_n(&p.gate(3, 0), 72, 0);
        std::fill_n(&p.gate(11, 0), 72, 0);  // one term is left, the same for all tokens
        p.gate(11, 0) = 0.7f;
        for (int64_t t = 0; t < num_tokens; ++t) p.token(t, 0) = 1.3f;
      });
      SCOPED_TRACE(name_of(c));
      const Mode mode{DType::kFloat32, true};
      const Outputs got = run(p, mode);
      check(p, mode, got);
      const auto normed_x = decode(dtype, got[kNormedX]), normed_y = decode(dtype, got[kNormedY]);
      for (int64_t t = 0; t < num_tokens; ++t) {
        ASSERT_EQ(0, normed_x[t * 8 + 3]) << t;
        ASSERT_EQ(0, normed_y[t * 16 + 3]) << t;
      }
    }
  }
}

TEST_F(CudaRouterLogits, NonFiniteGateStaysInItsColumn) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const Shape& shape : {Shape{37, 72, 8, 16}, Shape{700, 200, 128, 72}}) {
      const LogitsCase c{shape, dtype};
      const Problem p(c, [&](Problem& p) {
        p.gate(2, 70) = kNaN;
        p.gate(shape.num_rows + 9, 5) = kNaN;
      });
      for (const Mode& mode : modes_of(c)) {
        SCOPED_TRACE(name_of(c) + ", " + describe(mode));
        const Outputs got = run(p, mode);
        check(p, mode, got);  // NaN where the oracle has it, and only there
        const auto normed_x = decode(dtype, got[kNormedX]);
        for (size_t i = 0; i < normed_x.size(); ++i) {
          ASSERT_EQ(static_cast<int64_t>(i) % shape.num_rows == 2, std::isnan(normed_x[i])) << i;
        }
      }
    }
  }
}

TEST_F(CudaRouterLogits, NonFiniteTokenStaysInItsRowInEval) {
  const LogitsCase c{{199, 72, 40, 64}, DType::kBFloat16};
  const Problem p(c, [](Problem& p) { p.token(70, 3) = kNaN; });
  const Mode mode{DType::kFloat32, false};
  check(p, mode, run(p, mode));
}

// E[x²] - E[x]² in fp32 would leave few digits of it.
TEST_F(CudaRouterLogits, VarianceOfLargeMean) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    const LogitsCase c{{1000, 16, 8, 8}, dtype};
    // Integers, which fp32 sums exactly: what is lost is lost by the statistics.
    const Problem p(c, [](Problem& p) {
      std::mt19937 random(1);
      const auto small = [&] { return static_cast<int>(random() % 3) - 1; };
      for (double& value : p.x) value = small();
      for (double& value : p.gates) value = small();
      for (int64_t t = 0; t < 1000; ++t) p.token(t, 0) = 1;
      for (int64_t i = 0; i < 16; ++i) p.gate(i, 0) = 1024;
    });
    const Mode mode{DType::kFloat32, true};
    const Values want = Oracle(p, mode).inv_std;
    expect_close("inv_std", decode(DType::kFloat32, run(p, mode)[kInvStd]), want,
                 [&](size_t i) { return 1e-4 * want[i]; });
  }
}

TEST_F(CudaRouterLogits, WithoutBuffers) {
  const LogitsCase c{{257, 72, 40, 72}, DType::kBFloat16};
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
      const Mode mode{DType::kFloat32, training};
      const Problem p({shape, DType::kBFloat16});
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
  const Mode mode{DType::kFloat32, true};
  const Problem p({{4096, 64, 256, 256}, DType::kBFloat16});
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
