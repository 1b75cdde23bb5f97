// CUDA BatchNorm of the router's logits, forward and backward, against a double-precision host
// oracle.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_kernel_testing.h"
#include "omni_moe/cuda.h"

namespace omni_moe {
namespace {

using CudaBatchNorm = CudaKernelTest;

constexpr double kMomentum = 0.3;
constexpr double kEps = 1e-5;

struct Shape {
  int64_t num_tokens, num_rows, num_cols;
  int64_t padding = 0;  // elements between the rows of the logits
  double offset = 0;    // of all logits
  int64_t width() const { return num_rows + num_cols; }
  int64_t stride() const { return width() + padding; }
};

struct Case {
  Shape shape;
  DTypeInfo type;
  DTypeInfo stats_type;
  bool training;

  std::string name() const {
    return std::string(type.name) + " T" + std::to_string(shape.num_tokens) + " R" +
           std::to_string(shape.num_rows) + " C" + std::to_string(shape.num_cols) + " padding " +
           std::to_string(shape.padding) + (training ? " training" : " eval") + " stats " +
           stats_type.name;
  }
};

// Everything a run reads, [T, R + C] each but for the running statistics.
struct Inputs {
  std::vector<float> logits, grad, running_mean, running_var;

  explicit Inputs(const Case& c) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    const int64_t width = c.shape.width(), count = c.shape.num_tokens * width;
    for (int64_t i = 0; i < count; ++i) {
      const double scale = 0.5 + 2.0 * static_cast<double>(i % width) / static_cast<double>(width);
      const double x = normal(random) * scale + c.shape.offset + static_cast<double>(i % 3);
      logits.push_back(round_to(c.type.dtype, static_cast<float>(x)));
      grad.push_back(round_to(c.type.dtype, normal(random)));
    }
    for (int64_t i = 0; i < width; ++i) {
      running_mean.push_back(round_to(c.stats_type.dtype, normal(random)));
      running_var.push_back(round_to(c.stats_type.dtype, 0.5f + std::abs(normal(random))));
    }
  }
};

// One column in double.
struct Column {
  double mean = 0, var = 0, unbiased_var = 0, inv_std = 0;
  double mean_grad = 0, mean_product = 0;  // of g and g n, zeros in eval
  double largest = 0, largest_grad = 0;

  Column(const Case& c, const Inputs& in, const std::vector<float>& normed, int64_t i) {
    const int64_t tokens = c.shape.num_tokens, width = c.shape.width();
    const auto n = static_cast<double>(std::max<int64_t>(tokens, 1));
    for (int64_t t = 0; t < tokens; ++t) mean += in.logits[t * width + i] / n;
    for (int64_t t = 0; t < tokens; ++t) {
      const double distance = in.logits[t * width + i] - mean;
      var += distance * distance / n;
      largest = std::max(largest, std::abs(double{in.logits[t * width + i]}));
      largest_grad = std::max(largest_grad, std::abs(double{in.grad[t * width + i]}));
    }
    unbiased_var = var * n / (n - 1);
    if (!c.training) {
      mean = in.running_mean[i];
      var = in.running_var[i];
    }
    largest = std::max(largest, std::abs(mean));
    inv_std = 1 / std::sqrt(var + kEps);
    for (int64_t t = 0; c.training && t < tokens; ++t) {
      const double g = in.grad[t * width + i];
      mean_grad += g / n;
      mean_product += g * normed[t * width + i] / n;
    }
  }
};

// Results on the host, [T, R + C] for what has tokens.
struct Outputs {
  std::vector<float> normed, inv_std, grad, running_mean, running_var;
  int64_t counts[2];
};

std::vector<float> columns_of(const std::vector<float>& both, int64_t width, int64_t begin,
                              int64_t end) {
  std::vector<float> part;
  for (size_t row = 0; row < both.size(); row += width) {
    part.insert(part.end(), both.begin() + row + begin, both.begin() + row + end);
  }
  return part;
}

std::vector<float> side_by_side(const std::vector<float>& x, const std::vector<float>& y,
                                int64_t num_rows, int64_t num_cols, int64_t num_tokens) {
  std::vector<float> both;
  for (int64_t t = 0; t < num_tokens; ++t) {
    both.insert(both.end(), x.begin() + t * num_rows, x.begin() + (t + 1) * num_rows);
    both.insert(both.end(), y.begin() + t * num_cols, y.begin() + (t + 1) * num_cols);
  }
  return both;
}

std::vector<float> padded(const std::vector<float>& rows, int64_t width, int64_t stride) {
  std::vector<float> wide;
  for (size_t row = 0; row < rows.size(); row += width) {
    wide.insert(wide.end(), rows.begin() + row, rows.begin() + row + width);
    wide.resize(wide.size() + stride - width, kNan);
  }
  return wide;
}

// Buffers of one axis.
struct AxisBuffers {
  DeviceBuffer mean, var, count;
  AxisBuffers(const Case& c, const Inputs& in, int64_t begin, int64_t end, int64_t count_before)
      : mean(encode(c.stats_type, columns_of(in.running_mean, c.shape.width(), begin, end))),
        var(encode(c.stats_type, columns_of(in.running_var, c.shape.width(), begin, end))),
        count(std::vector<unsigned char>(
            reinterpret_cast<unsigned char*>(&count_before),
            reinterpret_cast<unsigned char*>(&count_before) + sizeof(count_before))) {}
  BatchNormBuffers pointers() const {
    return {mean.data(), var.data(), static_cast<int64_t*>(count.data())};
  }
  int64_t read_count() const {
    int64_t value = 0;
    std::memcpy(&value, count.read().data(), sizeof(value));
    return value;
  }
};

Outputs run(const Case& c, const Inputs& in) {
  const Shape& s = c.shape;
  const DeviceBuffer logits(encode(c.type, padded(in.logits, s.width(), s.stride())));
  const DeviceBuffer normed_x(s.num_tokens * s.num_rows * c.type.bytes);
  const DeviceBuffer normed_y(s.num_tokens * s.num_cols * c.type.bytes);
  const DeviceBuffer inv_std(s.width() * sizeof(float));
  const AxisBuffers x(c, in, 0, s.num_rows, 5), y(c, in, s.num_rows, s.width(), 7);
  BatchNormForwardParams forward{
      logits.data(), normed_x.data(),    normed_y.data(), inv_std.data(), x.pointers(),
      y.pointers(),  s.num_tokens,       s.num_rows,      s.num_cols,     s.stride(),
      c.type.dtype,  c.stats_type.dtype, c.training,      kMomentum,      kEps,
      nullptr};
  const auto forward_plan = cuda::plan_batch_norm_forward(forward);
  const DeviceBuffer forward_workspace(forward_plan.workspace_bytes);
  forward.workspace = forward_workspace.data();
  EXPECT_EQ(cudaSuccess, cuda::batch_norm_forward(forward, forward_plan, nullptr)) << c.name();
  EXPECT_EQ(cudaSuccess, cudaDeviceSynchronize()) << c.name();

  const DeviceBuffer grad_x(encode(c.type, columns_of(in.grad, s.width(), 0, s.num_rows)));
  const DeviceBuffer grad_y(encode(c.type, columns_of(in.grad, s.width(), s.num_rows, s.width())));
  const DeviceBuffer grad_logits(s.num_tokens * s.width() * c.type.bytes);
  BatchNormBackwardParams backward{grad_x.data(),   grad_y.data(),  normed_x.data(),
                                   normed_y.data(), inv_std.data(), grad_logits.data(),
                                   s.num_tokens,    s.num_rows,     s.num_cols,
                                   c.type.dtype,    c.training,     nullptr};
  const auto backward_plan = cuda::plan_batch_norm_backward(backward);
  const DeviceBuffer backward_workspace(backward_plan.workspace_bytes);
  backward.workspace = backward_workspace.data();
  EXPECT_EQ(cudaSuccess, cuda::batch_norm_backward(backward, backward_plan, nullptr)) << c.name();
  EXPECT_EQ(cudaSuccess, cudaDeviceSynchronize()) << c.name();
  forward_workspace.read();  // its guard
  backward_workspace.read();

  const auto both = [&](const DeviceBuffer& a, const DeviceBuffer& b, const DTypeInfo& type,
                        int64_t rows) {
    return side_by_side(decode(type, a.read()), decode(type, b.read()), s.num_rows, s.num_cols,
                        rows);
  };
  return {both(normed_x, normed_y, c.type, s.num_tokens),
          decode(kDTypes[0], inv_std.read()),
          decode(c.type, grad_logits.read()),
          both(x.mean, y.mean, c.stats_type, 1),
          both(x.var, y.var, c.stats_type, 1),
          {x.read_count(), y.read_count()}};
}

void check(const Case& c) {
  const Inputs in(c);
  const Outputs got = run(c, in);
  const int64_t width = c.shape.width();
  EXPECT_EQ(5 + c.training, got.counts[0]) << c.name();
  EXPECT_EQ(7 + c.training, got.counts[1]) << c.name();
  const double loss = 6e-8 * (8 + std::sqrt(static_cast<double>(c.shape.num_tokens)));
  for (int64_t i = 0; i < width && !testing::Test::HasFailure(); ++i) {
    const Column want(c, in, got.normed, i);
    const auto near = [&](float value, double wanted, double terms, const DTypeInfo& type,
                          const char* what, int64_t t) {
      expect_close(value, wanted, type.epsilon * std::abs(wanted) + loss * terms + type.smallest,
                   c.name() + " " + what + " of column " + std::to_string(i) + ", token " +
                       std::to_string(t));
    };
    // What cancels is as large as the logits; a step of theirs decides where T is small.
    const double terms = want.largest * want.inv_std;
    near(got.inv_std[i], want.inv_std, want.inv_std * (1 + terms), kDTypes[0], "inv_std", 0);
    const double share = c.training && c.shape.num_tokens > 0 ? kMomentum : 0;
    const double old_mean = in.running_mean[i], old_var = in.running_var[i];
    near(got.running_mean[i], (1 - share) * old_mean + (share > 0 ? share * want.mean : 0),
         want.largest + std::abs(old_mean), c.stats_type, "running_mean", 0);
    near(got.running_var[i], (1 - share) * old_var + (share > 0 ? share * want.unbiased_var : 0),
         want.unbiased_var * (1 + terms) + old_var, c.stats_type, "running_var", 0);
    const double grad_terms = want.inv_std * want.largest_grad * (1 + terms) * (1 + terms);
    for (int64_t t = 0; t < c.shape.num_tokens && !testing::Test::HasFailure(); ++t) {
      const int64_t at = t * width + i;
      near(got.normed[at], (in.logits[at] - want.mean) * want.inv_std, terms * (1 + terms), c.type,
           "normed", t);
      const double grad = in.grad[at] - want.mean_grad - double{got.normed[at]} * want.mean_product;
      near(got.grad[at], grad * want.inv_std, grad_terms, c.type, "grad", t);
    }
  }
}

// All dtypes, running statistics in fp32 and in the dtype of the logits, training and eval.
void check_all(const Shape& shape) {
  for (const DTypeInfo& type : kDTypes) {
    for (const DTypeInfo& stats_type : {kDTypes[0], type}) {
      for (const bool training : {true, false}) {
        check({shape, type, stats_type, training});
        if (testing::Test::HasFailure()) return;
      }
    }
  }
}

TEST_F(CudaBatchNorm, Small) {
  for (const int64_t num_tokens : {2, 3, 37, 199}) {
    for (const Shape axes : {Shape{0, 1, 1}, Shape{0, 7, 1}, Shape{0, 8, 40}, Shape{0, 64, 100}}) {
      for (const int64_t padding : {0, 8, 3}) {
        check_all({num_tokens, axes.num_rows, axes.num_cols, padding});
        if (testing::Test::HasFailure()) return;
      }
    }
  }
}

TEST_F(CudaBatchNorm, NoTokens) { check_all({0, 8, 5}); }

TEST_F(CudaBatchNorm, RouterShapes) {
  check_all({4096, 64, 64});
  check_all({4096, 256, 256});
  check_all({4095, 100, 257});
}

// More groups of columns than there are blocks, so several rounds.
TEST_F(CudaBatchNorm, ManyColumns) {
  const DTypeInfo& type = kDTypes[2];
  check({{37, 4096, 4096}, type, kDTypes[0], true});
  check({{37, 8200, 10001}, type, kDTypes[0], true});
  check({{37, 8200, 10001}, type, kDTypes[0], false});
}

// More than the registers of all blocks hold.
TEST_F(CudaBatchNorm, ManyTokens) {
  for (const DTypeInfo& type : kDTypes) {
    check({{(1 << 17) + 5, 8, 24}, type, kDTypes[0], true});
    check({{(1 << 15) + 5, 3, 4}, type, kDTypes[0], true});
    check({{(1 << 17) + 5, 8, 24}, type, kDTypes[0], false});
  }
}

TEST_F(CudaBatchNorm, LargeMean) {
  for (const int64_t num_tokens : {2, 37, 4096, 30000}) {
    check({{num_tokens, 8, 5, 0, 1e4}, kDTypes[0], kDTypes[0], true});
  }
}

// E[x²] - E[x]² in fp32 would leave no digit of it.
TEST_F(CudaBatchNorm, VarianceOfLargeMean) {
  const Case c{{4096, 8, 8, 0, 1e4}, kDTypes[0], kDTypes[0], true};
  const Inputs in(c);
  const Outputs got = run(c, in);
  for (int64_t i = 0; i < 16; ++i) {
    const Column want(c, in, got.normed, i);
    EXPECT_NEAR(1, got.inv_std[i] / want.inv_std, 1e-4) << i;
  }
}

TEST_F(CudaBatchNorm, ConstantColumns) {
  for (const DTypeInfo& type : kDTypes) {
    const Case c{{1000, 8, 9}, type, kDTypes[0], true};
    Inputs in(c);
    std::fill(in.logits.begin(), in.logits.end(), round_to(type.dtype, 3.14159f));
    const Outputs got = run(c, in);
    EXPECT_TRUE(std::all_of(got.normed.begin(), got.normed.end(), [](float v) { return v == 0; }));
    EXPECT_TRUE(
        std::all_of(got.grad.begin(), got.grad.end(), [](float v) { return std::isfinite(v); }));
  }
}

TEST_F(CudaBatchNorm, NonFiniteColumns) {
  const Case c{{199, 8, 8}, kDTypes[1], kDTypes[0], true};
  Inputs in(c);
  in.logits[0] = kNan;
  in.logits[3 * 16 + 5] = kInf;
  in.logits[70 * 16 + 12] = -kInf;
  const Outputs got = run(c, in);
  for (size_t i = 0; i < got.normed.size(); ++i) {
    const bool bad = i % 16 == 0 || i % 16 == 5 || i % 16 == 12;
    EXPECT_EQ(bad, std::isnan(got.normed[i])) << i;
    if (testing::Test::HasFailure()) return;
  }
}

TEST_F(CudaBatchNorm, RepeatsBitwise) {
  for (const Shape& shape : {Shape{4096, 256, 256}, Shape{4099, 7, 30}, Shape{70000, 8, 8}}) {
    const Case c{shape, kDTypes[2], kDTypes[0], true};
    const Inputs in(c);
    const Outputs first = run(c, in);
    for (int turn = 0; turn < 3; ++turn) {
      const Outputs again = run(c, in);
      EXPECT_EQ(first.normed, again.normed);
      EXPECT_EQ(first.inv_std, again.inv_std);
      EXPECT_EQ(first.grad, again.grad);
      EXPECT_EQ(first.running_mean, again.running_mean);
      EXPECT_EQ(first.running_var, again.running_var);
    }
  }
}

TEST_F(CudaBatchNorm, WithoutBuffers) {
  const DTypeInfo& type = kDTypes[2];
  const Shape s{37, 8, 16};
  const Case c{s, type, type, true};
  const Inputs in(c);
  const DeviceBuffer logits(encode(type, in.logits));
  const DeviceBuffer x(37 * 8 * type.bytes), y(37 * 16 * type.bytes);
  BatchNormForwardParams params{
      logits.data(), x.data(),   y.data(),          nullptr,   {},   {},     37, 8, 16, 24,
      type.dtype,    type.dtype, /*training=*/true, kMomentum, kEps, nullptr};
  const auto plan = cuda::plan_batch_norm_forward(params);
  const DeviceBuffer workspace(plan.workspace_bytes);
  params.workspace = workspace.data();
  ASSERT_EQ(cudaSuccess, cuda::batch_norm_forward(params, plan, nullptr));
  ASSERT_EQ(cudaSuccess, cudaDeviceSynchronize());
  const auto got = side_by_side(decode(type, x.read()), decode(type, y.read()), 8, 16, 37);
  EXPECT_EQ(run(c, in).normed, got);
}

TEST_F(CudaBatchNorm, RefusesWhatItHasNoKernelFor) {
  BatchNormForwardParams params{};
  params.dtype = params.stats_dtype = DType::kFloat64;
  EXPECT_EQ(cudaErrorInvalidValue,
            cuda::batch_norm_forward(params, cuda::plan_batch_norm_forward(params), nullptr));
  params.dtype = DType::kFloat32;
  params.stats_dtype = DType::kFloat16;
  EXPECT_EQ(cudaErrorInvalidValue,
            cuda::batch_norm_forward(params, cuda::plan_batch_norm_forward(params), nullptr));
  BatchNormBackwardParams backward{};
  backward.dtype = DType::kFloat64;
  EXPECT_EQ(cudaErrorInvalidValue,
            cuda::batch_norm_backward(backward, cuda::plan_batch_norm_backward(backward), nullptr));
}

// A grid barrier needs the whole grid on the device: launches that overlap must not wait for each
// other forever.
TEST_F(CudaBatchNorm, ConcurrentStreams) {
  const DTypeInfo& type = kDTypes[2];
  const Case c{{4096, 256, 256}, type, type, true};
  const Inputs in(c);
  const DeviceBuffer logits(encode(type, in.logits));
  constexpr int kStreams = 4;
  cudaStream_t streams[kStreams];
  std::vector<std::unique_ptr<DeviceBuffer>> outputs, workspaces;
  for (cudaStream_t& stream : streams) {
    ASSERT_EQ(cudaSuccess, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    for (int i = 0; i < 2; ++i) {
      outputs.push_back(std::make_unique<DeviceBuffer>(4096 * 256 * type.bytes));
    }
  }
  ASSERT_EQ(cudaSuccess, cudaDeviceSynchronize());
  BatchNormForwardParams params{logits.data(), nullptr,   nullptr, nullptr, {},         {},
                                4096,          256,       256,     512,     type.dtype, type.dtype,
                                true,          kMomentum, kEps,    nullptr};
  const auto plan = cuda::plan_batch_norm_forward(params);
  for (int i = 0; i < kStreams; ++i) {
    workspaces.push_back(std::make_unique<DeviceBuffer>(plan.workspace_bytes));
  }
  ASSERT_EQ(cudaSuccess, cudaDeviceSynchronize());
  for (int turn = 0; turn < 20 * kStreams; ++turn) {
    const int i = turn % kStreams;
    params.normed_x = outputs[2 * i]->data();
    params.normed_y = outputs[2 * i + 1]->data();
    params.workspace = workspaces[i]->data();
    ASSERT_EQ(cudaSuccess, cuda::batch_norm_forward(params, plan, streams[i]));
  }
  ASSERT_EQ(cudaSuccess, cudaDeviceSynchronize());
  for (int i = 1; i < kStreams; ++i) {
    EXPECT_EQ(outputs[0]->read(), outputs[2 * i]->read());
    EXPECT_EQ(outputs[1]->read(), outputs[2 * i + 1]->read());
  }
  for (const cudaStream_t stream : streams) cudaStreamDestroy(stream);
}

}  // namespace
}  // namespace omni_moe
