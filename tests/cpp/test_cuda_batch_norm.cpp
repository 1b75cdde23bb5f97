// The CUDA BatchNorm of the router's logits, forward and backward, against the CPU backend's in
// fp64.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda_kernel_testing.h"

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
  DType dtype;
  DType stats_dtype;
  bool training;

  std::string name() const {
    return std::string(name_of(dtype)) + " T" + std::to_string(shape.num_tokens) + " R" +
           std::to_string(shape.num_rows) + " C" + std::to_string(shape.num_cols) + " padding " +
           std::to_string(shape.padding) + (training ? " training" : " eval") + " stats " +
           name_of(stats_dtype);
  }
};

// The operands of one axis, its columns from `first` on among those of both.
struct Axis {
  const char* name;
  int64_t first, width;
  Operand normed, grad, running_mean, running_var;
  int64_t count_before, count;  // batches tracked, on the host
  DeviceArray device_count;

  Axis(const Case& c, const char* name, int64_t first, int64_t width, int64_t count)
      : name(name),
        first(first),
        width(width),
        normed(c.dtype, c.shape.num_tokens * width),
        grad(c.dtype, c.shape.num_tokens * width),
        running_mean(c.stats_dtype, width),
        running_var(c.stats_dtype, width),
        count_before(count),
        count(count),
        device_count(sizeof(int64_t)) {}

  BatchNormBuffers buffers(Side side) {
    return {running_mean.at(side), running_var.at(side),
            side == Side::kDevice ? static_cast<int64_t*>(device_count.data()) : &count};
  }
  // The device's buffers as they were before any batch.
  void reset() const {
    running_mean.device.upload(running_mean.bytes);
    running_var.device.upload(running_var.bytes);
    device_count.upload(bytes_of(std::vector<int64_t>{count_before}));
  }
};

struct Problem {
  explicit Problem(const Case& c)
      : c(c),
        logits(c.dtype, c.shape.num_tokens * c.shape.stride()),
        x(c, "x", 0, c.shape.num_rows, 5),
        y(c, "y", c.shape.num_rows, c.shape.num_cols, 7),
        inv_std(DType::kFloat32, c.shape.width()),
        grad_logits(c.dtype, c.shape.num_tokens * c.shape.width()) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    const int64_t width = c.shape.width(), count = c.shape.num_tokens * width;
    std::fill(logits.values.begin(), logits.values.end(), kNaN);  // the padding
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = i / width, column = i % width;
      const double scale = 0.5 + 2.0 * static_cast<double>(column) / static_cast<double>(width);
      logits.values[t * c.shape.stride() + column] =
          normal(random) * scale + c.shape.offset + static_cast<double>(i % 3);
      Axis& axis = axis_of(column);
      axis.grad.values[t * axis.width + column - axis.first] = normal(random);
    }
    for (int64_t column = 0; column < width; ++column) {
      Axis& axis = axis_of(column);
      axis.running_mean.values[column - axis.first] = normal(random);
      axis.running_var.values[column - axis.first] = 0.5f + std::abs(normal(random));
    }
    for (Operand* input : {&logits, &x.grad, &y.grad, &x.running_mean, &y.running_mean,
                           &x.running_var, &y.running_var}) {
      input->upload();
    }
  }

  Axis& axis_of(int64_t column) { return column < c.shape.num_rows ? x : y; }
  double logit(int64_t t, int64_t column) const {
    return logits.values[t * c.shape.stride() + column];
  }

  // Of either pass, for either side; without the workspace.
  template <typename Params>
  Params params_of(Side side) {
    Params params{};
    params.normed_x = x.normed.at(side);
    params.normed_y = y.normed.at(side);
    params.inv_std = inv_std.at(side);
    params.num_tokens = c.shape.num_tokens;
    params.num_rows = c.shape.num_rows;
    params.num_cols = c.shape.num_cols;
    params.dtype = dtype_on(side, c.dtype);
    params.training = c.training;
    if constexpr (std::is_same_v<Params, BatchNormForwardParams>) {
      params.logits = logits.at(side);
      params.x = x.buffers(side);
      params.y = y.buffers(side);
      params.logits_stride = c.shape.stride();
      params.stats_dtype = dtype_on(side, c.stats_dtype);
      params.momentum = kMomentum;
      params.eps = kEps;
    } else {
      params.grad_x = x.grad.at(side);
      params.grad_y = y.grad.at(side);
      params.grad_logits = grad_logits.at(side);
    }
    return params;
  }

  std::vector<const DeviceArray*> outputs() const {
    return {&x.normed.device,      &y.normed.device,       &inv_std.device,
            &grad_logits.device,   &x.running_mean.device, &y.running_mean.device,
            &x.running_var.device, &y.running_var.device,  &x.device_count,
            &y.device_count};
  }

  // Both passes on the device, from the running statistics before any batch; the outputs' bytes.
  std::vector<Bytes> run() {
    SCOPED_TRACE(c.name());
    for (const DeviceArray* output : outputs()) output->poison();
    x.reset();
    y.reset();
    auto forward = params_of<BatchNormForwardParams>(Side::kDevice);
    const auto forward_plan = cuda::plan_batch_norm_forward(forward);
    const DeviceArray forward_workspace(forward_plan.workspace_bytes);
    forward.workspace = forward_workspace.data();
    expect_success(cuda::batch_norm_forward(forward, forward_plan, nullptr));
    auto backward = params_of<BatchNormBackwardParams>(Side::kDevice);
    const auto backward_plan = cuda::plan_batch_norm_backward(backward);
    const DeviceArray backward_workspace(backward_plan.workspace_bytes);
    backward.workspace = backward_workspace.data();
    expect_success(cuda::batch_norm_backward(backward, backward_plan, nullptr));
    forward_workspace.read();  // its guards
    backward_workspace.read();
    std::vector<Bytes> bytes;
    for (const DeviceArray* output : outputs()) bytes.push_back(output->read());
    return bytes;
  }

  void solve_forward() {
    cpu::batch_norm_forward(params_of<BatchNormForwardParams>(Side::kHost), kSerial);
  }

  // On the normed logits as the device has rounded them.
  void solve_backward() {
    x.normed.values = x.normed.read();
    y.normed.values = y.normed.read();
    cpu::batch_norm_backward(params_of<BatchNormBackwardParams>(Side::kHost), kSerial);
  }

  Case c;
  Operand logits;  // [T, R + C], rows apart, NaN between them
  Axis x, y;
  Operand inv_std, grad_logits;
};

// For each column, the size of what is added up or cancels, which bounds the errors.
struct Terms {
  Values logits;       // the largest logit, or the running mean
  Values relative;     // the same in standard deviations
  Values grad_logits;  // the largest gradient, scaled as the backward scales it

  explicit Terms(const Problem& p) {
    const auto& s = p.c.shape;
    Values largest_grad(s.width());
    logits.resize(s.width());
    for (const Axis* axis : {&p.x, &p.y}) {
      for (int64_t i = 0; i < axis->width; ++i) {
        double& largest = logits[axis->first + i];
        double& grad = largest_grad[axis->first + i];
        if (!p.c.training) largest = std::abs(axis->running_mean.values[i]);
        for (int64_t t = 0; t < s.num_tokens; ++t) {
          largest = std::max(largest, std::abs(p.logit(t, axis->first + i)));
          grad = std::max(grad, std::abs(axis->grad.values[t * axis->width + i]));
        }
      }
    }
    for (int64_t i = 0; i < s.width(); ++i) {
      const double inv_std = p.inv_std.values[i];
      relative.push_back(logits[i] * inv_std);
      grad_logits.push_back(inv_std * largest_grad[i] * (1 + relative[i]) * (1 + relative[i]));
    }
  }
};

void check_running(const Case& c, const Axis& axis, const Operand& inv_std, const Terms& terms,
                   double loss) {
  const Values old_mean = decode(c.stats_dtype, axis.running_mean.bytes);
  const Values old_var = decode(c.stats_dtype, axis.running_var.bytes);
  if (!c.training || c.shape.num_tokens == 0) {
    EXPECT_EQ(old_mean, axis.running_mean.read());
    EXPECT_EQ(old_var, axis.running_var.read());
    return;
  }
  const Values& mean = axis.running_mean.values;
  expect_close("running_mean", axis.running_mean.read(), mean, [&](size_t i) {
    const double size = terms.logits[axis.first + i] + std::abs(old_mean[i]);
    return rounding_error(c.stats_dtype, mean[i]) + loss * size;
  });
  const Values& var = axis.running_var.values;
  const double n = static_cast<double>(c.shape.num_tokens);
  expect_close("running_var", axis.running_var.read(), var, [&](size_t i) {
    const double std = 1 / inv_std.values[axis.first + i];
    const double unbiased_var = std::max(0.0, std * std - kEps) * n / (n - 1);
    const double size = unbiased_var * (1 + terms.relative[axis.first + i]) + old_var[i];
    return rounding_error(c.stats_dtype, var[i]) + loss * size;
  });
}

void check(const Case& c) {
  SCOPED_TRACE(c.name());
  Problem p(c);
  p.run();
  p.solve_forward();
  const Terms terms(p);
  const double loss = sum_error(c.shape.num_tokens);
  const Values& inv_std = p.inv_std.values;
  expect_close("inv_std", p.inv_std.read(), inv_std, [&](size_t i) {
    return rounding_error(DType::kFloat32, inv_std[i]) +
           loss * inv_std[i] * (1 + terms.relative[i]);
  });
  for (Axis* axis : {&p.x, &p.y}) {
    SCOPED_TRACE(axis->name);
    EXPECT_EQ(axis->count_before + c.training, axis->count);
    EXPECT_EQ(axis->count, integers_of<int64_t>(axis->device_count.read())[0]);
    check_running(c, *axis, p.inv_std, terms, loss);
    const Values& normed = axis->normed.values;
    expect_close("normed", axis->normed.read(), normed, [&](size_t i) {
      const double relative = terms.relative[axis->first + i % axis->width];
      return rounding_error(c.dtype, normed[i]) + loss * relative * (1 + relative);
    });
  }
  p.solve_backward();
  const Values& grad_logits = p.grad_logits.values;
  expect_close("grad_logits", p.grad_logits.read(), grad_logits, [&](size_t i) {
    return rounding_error(c.dtype, grad_logits[i]) + loss * terms.grad_logits[i % c.shape.width()];
  });
}

// All dtypes, running statistics in fp32 and in the dtype of the logits, training and eval.
void check_all(const Shape& shape) {
  for (const DType type : kDTypes) {
    for (const DType stats_type : {DType::kFloat32, type}) {
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
  constexpr DType kType = DType::kBFloat16;
  check({{37, 4096, 4096}, kType, DType::kFloat32, true});
  check({{37, 8200, 10001}, kType, DType::kFloat32, true});
  check({{37, 8200, 10001}, kType, DType::kFloat32, false});
}

// More than the registers of all blocks hold.
TEST_F(CudaBatchNorm, ManyTokens) {
  for (const DType type : kDTypes) {
    check({{(1 << 17) + 5, 8, 24}, type, DType::kFloat32, true});
    check({{(1 << 15) + 5, 3, 4}, type, DType::kFloat32, true});
    check({{(1 << 17) + 5, 8, 24}, type, DType::kFloat32, false});
  }
}

TEST_F(CudaBatchNorm, LargeMean) {
  for (const int64_t num_tokens : {2, 37, 4096, 30000}) {
    check({{num_tokens, 8, 5, 0, 1e4}, DType::kFloat32, DType::kFloat32, true});
  }
}

// E[x²] - E[x]² in fp32 would leave no digit of it.
TEST_F(CudaBatchNorm, VarianceOfLargeMean) {
  Problem p({{4096, 8, 8, 0, 1e4}, DType::kFloat32, DType::kFloat32, true});
  p.run();
  p.solve_forward();
  const Values& want = p.inv_std.values;
  expect_close("inv_std", p.inv_std.read(), want, [&](size_t i) { return 1e-4 * want[i]; });
}

TEST_F(CudaBatchNorm, ConstantColumns) {
  for (const DType type : kDTypes) {
    Problem p({{1000, 8, 9}, type, DType::kFloat32, true});
    p.logits.fill([] { return 3.14159f; });
    p.run();
    for (const Axis* axis : {&p.x, &p.y}) {
      const Values normed = axis->normed.read();
      EXPECT_TRUE(std::all_of(normed.begin(), normed.end(), [](double v) { return v == 0; }));
    }
    const Values grad = p.grad_logits.read();
    EXPECT_TRUE(std::all_of(grad.begin(), grad.end(), [](double v) { return std::isfinite(v); }));
  }
}

TEST_F(CudaBatchNorm, NonFiniteColumns) {
  Problem p({{199, 8, 8}, DType::kFloat16, DType::kFloat32, true});
  p.logits.values[0] = kNaN;
  p.logits.values[3 * 16 + 5] = kInf;
  p.logits.values[70 * 16 + 12] = -kInf;
  p.logits.upload();
  p.run();
  for (const Axis* axis : {&p.x, &p.y}) {
    const Values normed = axis->normed.read();
    for (size_t i = 0; i < normed.size(); ++i) {
      const int64_t column = axis->first + static_cast<int64_t>(i % 8);
      const bool is_bad = column == 0 || column == 5 || column == 12;
      ASSERT_EQ(is_bad, std::isnan(normed[i])) << axis->name << " " << i;
    }
  }
}

TEST_F(CudaBatchNorm, RepeatsBitwise) {
  for (const Shape& shape : {Shape{4096, 256, 256}, Shape{4099, 7, 30}, Shape{70000, 8, 8}}) {
    Problem p({shape, DType::kBFloat16, DType::kFloat32, true});
    const std::vector<Bytes> first = p.run();
    for (int turn = 0; turn < 3; ++turn) EXPECT_TRUE(first == p.run());
  }
}

TEST_F(CudaBatchNorm, WithoutBuffers) {
  Problem p({{37, 8, 16}, DType::kBFloat16, DType::kBFloat16, true});
  const std::vector<Bytes> with_buffers = p.run();
  auto params = p.params_of<BatchNormForwardParams>(Side::kDevice);
  params.inv_std = nullptr;
  params.x = params.y = {};
  for (const Axis* axis : {&p.x, &p.y}) axis->normed.device.poison();
  const auto plan = cuda::plan_batch_norm_forward(params);
  const DeviceArray workspace(plan.workspace_bytes);
  params.workspace = workspace.data();
  expect_success(cuda::batch_norm_forward(params, plan, nullptr));
  EXPECT_TRUE(with_buffers[0] == p.x.normed.device.read());
  EXPECT_TRUE(with_buffers[1] == p.y.normed.device.read());
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
  Problem p({{4096, 256, 256}, DType::kBFloat16, DType::kBFloat16, true});
  auto params = p.params_of<BatchNormForwardParams>(Side::kDevice);
  params.inv_std = nullptr;
  params.x = params.y = {};
  struct Stream {
    explicit Stream(size_t output_bytes, size_t workspace_bytes)
        : normed_x(output_bytes), normed_y(output_bytes), workspace(workspace_bytes) {
      EXPECT_EQ(cudaSuccess, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    }
    ~Stream() { cudaStreamDestroy(stream); }
    DeviceArray normed_x, normed_y, workspace;
    cudaStream_t stream = nullptr;
  };
  constexpr int kStreams = 4;
  std::vector<std::unique_ptr<Stream>> streams;
  for (int i = 0; i < kStreams; ++i) {
    streams.push_back(std::make_unique<Stream>(
        4096 * 256 * size_of(p.c.dtype), cuda::plan_batch_norm_forward(params).workspace_bytes));
  }
  ASSERT_EQ(cudaSuccess, cudaDeviceSynchronize());
  for (int turn = 0; turn < 20 * kStreams; ++turn) {
    const Stream& on = *streams[turn % kStreams];
    params.normed_x = on.normed_x.data();
    params.normed_y = on.normed_y.data();
    params.workspace = on.workspace.data();
    ASSERT_EQ(cudaSuccess,
              cuda::batch_norm_forward(params, cuda::plan_batch_norm_forward(params), on.stream));
  }
  ASSERT_EQ(cudaSuccess, cudaDeviceSynchronize());
  for (int i = 1; i < kStreams; ++i) {
    EXPECT_TRUE(streams[0]->normed_x.read() == streams[i]->normed_x.read());
    EXPECT_TRUE(streams[0]->normed_y.read() == streams[i]->normed_y.read());
  }
}

}  // namespace
}  // namespace omni_moe
