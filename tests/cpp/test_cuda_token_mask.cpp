// Token masks of the CUDA kernels: BatchNorm against the CPU backend's in fp64 with the same mask,
// the router against itself without one.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "cuda_kernel_testing.h"

namespace omni_moe {
namespace {

using CudaTokenMask = CudaKernelTest;

constexpr double kMomentum = 0.3, kEps = 1e-5;

enum class Pattern { kRandom, kBlocks, kFew, kOne, kNone, kAll };
constexpr Pattern kPatterns[] = {Pattern::kRandom, Pattern::kBlocks, Pattern::kFew,
                                 Pattern::kOne,    Pattern::kNone,   Pattern::kAll};

// On the device, and as the bytes of bool on the host.
struct TokenMask {
  TokenMask(int64_t num_tokens, Pattern pattern)
      : host(num_tokens), device(static_cast<size_t>(num_tokens)) {
    std::mt19937 random(std::random_device{}());
    std::uniform_real_distribution<float> uniform;
    for (int64_t t = 0; t < num_tokens; ++t) {
      const float p = uniform(random);
      bool counts = pattern == Pattern::kAll;
      if (pattern == Pattern::kRandom) counts = p < 0.6f;
      if (pattern == Pattern::kBlocks)
        counts = t / 300 % 2 == 1;  // parts of blocks, and whole ones
      if (pattern == Pattern::kFew) counts = p < 0.02f;
      if (pattern == Pattern::kOne) counts = t == num_tokens / 2;
      host[static_cast<size_t>(t)] = counts ? 1 : 0;
      count += counts;
    }
    device.upload(host);
  }
  bool operator[](int64_t t) const { return host[static_cast<size_t>(t)] != 0; }
  const bool* on(Side side) const {
    return side == Side::kDevice ? static_cast<const bool*>(device.data())
                                 : reinterpret_cast<const bool*>(host.data());
  }

  Bytes host;
  DeviceArray device;
  int64_t count = 0;
};

// ---- BatchNorm ----

struct NormCase {
  int64_t num_tokens, num_rows, num_cols;
  DType dtype;
  Pattern pattern;
  double offset = 0;  // of all logits

  int64_t width() const { return num_rows + num_cols; }
  std::string name() const {
    return std::string(name_of(dtype)) + " T" + std::to_string(num_tokens) + " R" +
           std::to_string(num_rows) + " C" + std::to_string(num_cols) + " pattern " +
           std::to_string(static_cast<int>(pattern));
  }
};

struct NormProblem {
  explicit NormProblem(const NormCase& c)
      : c(c),
        mask(c.num_tokens, c.pattern),
        logits(c.dtype, c.num_tokens * c.width()),
        normed_x(c.dtype, c.num_tokens * c.num_rows),
        normed_y(c.dtype, c.num_tokens * c.num_cols),
        grad_x(c.dtype, c.num_tokens * c.num_rows),
        grad_y(c.dtype, c.num_tokens * c.num_cols),
        inv_std(DType::kFloat32, c.width()),
        grad_logits(c.dtype, c.num_tokens * c.width()),
        running_x(DType::kFloat32, 2 * c.num_rows),
        running_y(DType::kFloat32, 2 * c.num_cols),
        device_counts(2 * sizeof(int64_t)) {
    std::mt19937 random(std::random_device{}());
    std::normal_distribution<float> normal;
    const auto fill = [&](Operand& operand, int64_t width, double scale, double offset) {
      for (int64_t i = 0; i < c.num_tokens * width; ++i) {
        const double value = normal(random) * scale + offset;
        operand.values[static_cast<size_t>(i)] = mask[i / width] ? value : kNaN;  // reaches nothing
      }
      operand.upload();
    };
    fill(logits, c.width(), 2, c.offset + 0.5);
    fill(grad_x, c.num_rows, 1, 0);
    fill(grad_y, c.num_cols, 1, 0);
    fill_normal(running_x, random);
    fill_normal(running_y, random);
  }

  BatchNormBuffers buffers(Side side, Operand& running, int64_t width, size_t axis) {
    int64_t* count =
        side == Side::kDevice ? static_cast<int64_t*>(device_counts.data()) + axis : &counts[axis];
    return {running.at(side), running.at(side, width), count};
  }
  BatchNormForwardParams forward(Side side) {
    return {.logits = logits.at(side),
            .normed_x = normed_x.at(side),
            .normed_y = normed_y.at(side),
            .inv_std = inv_std.at(side),
            .x = buffers(side, running_x, c.num_rows, 0),
            .y = buffers(side, running_y, c.num_cols, 1),
            .num_tokens = c.num_tokens,
            .num_rows = c.num_rows,
            .num_cols = c.num_cols,
            .logits_stride = c.width(),
            .dtype = dtype_on(side, c.dtype),
            .stats_dtype = dtype_on(side, DType::kFloat32),
            .training = true,
            .momentum = kMomentum,
            .eps = kEps,
            .token_mask = mask.on(side)};
  }
  BatchNormBackwardParams backward(Side side) {
    return {.grad_x = grad_x.at(side),
            .grad_y = grad_y.at(side),
            .normed_x = normed_x.at(side),
            .normed_y = normed_y.at(side),
            .inv_std = inv_std.at(side),
            .grad_logits = grad_logits.at(side),
            .num_tokens = c.num_tokens,
            .num_rows = c.num_rows,
            .num_cols = c.num_cols,
            .dtype = dtype_on(side, c.dtype),
            .training = true,
            .token_mask = mask.on(side)};
  }

  // Twice, from the running statistics before the batch.
  void run_forward() {
    auto params = forward(Side::kDevice);
    const auto plan = cuda::plan_batch_norm_forward(params);
    run_twice({&normed_x.device, &normed_y.device, &inv_std.device}, plan.workspace_bytes,
              [&](void* workspace) {
                running_x.device.upload(running_x.bytes);
                running_y.device.upload(running_y.bytes);
                device_counts.upload(bytes_of(std::vector<int64_t>{5, 7}));
                params.workspace = workspace;
                return cuda::batch_norm_forward(params, plan, nullptr);
              });
  }
  void run_backward() {
    auto params = backward(Side::kDevice);
    const auto plan = cuda::plan_batch_norm_backward(params);
    run_twice({&grad_logits.device}, plan.workspace_bytes, [&](void* workspace) {
      params.workspace = workspace;
      return cuda::batch_norm_backward(params, plan, nullptr);
    });
  }

  NormCase c;
  TokenMask mask;
  Operand logits, normed_x, normed_y, grad_x, grad_y, inv_std, grad_logits;
  Operand running_x, running_y;  // mean, then variance
  int64_t counts[2] = {5, 7};    // batches tracked, on the host
  DeviceArray device_counts;
};

// For each column, of the tokens that count: what is added up or cancels.
struct Terms {
  Values logits, relative, grads;

  explicit Terms(const NormProblem& p) {
    const int64_t width = p.c.width(), rows = p.c.num_rows, cols = p.c.num_cols;
    logits.resize(width);
    grads.resize(width);
    for (int64_t t = 0; t < p.c.num_tokens; ++t) {
      if (!p.mask[t]) continue;
      for (int64_t i = 0; i < width; ++i) {
        logits[i] = std::max(logits[i], std::abs(p.logits.values[t * width + i]));
        const double grad =
            i < rows ? p.grad_x.values[t * rows + i] : p.grad_y.values[t * cols + i - rows];
        grads[i] = std::max(grads[i], std::abs(grad));
      }
    }
    for (int64_t i = 0; i < width; ++i) relative.push_back(logits[i] * p.inv_std.values[i]);
  }
};

void check_running(const NormProblem& p, const Operand& running, int64_t first, int64_t width,
                   const Terms& terms, double loss) {
  const Values before = decode(DType::kFloat32, running.bytes), got = running.read();
  if (p.mask.count < 2) {
    EXPECT_EQ(before, got);
    return;
  }
  expect_close("running statistics", got, running.values, [&](size_t i) {
    const auto column = static_cast<size_t>(first) + i % static_cast<size_t>(width);
    const double size = terms.logits[column] * (1 + terms.logits[column]) + std::abs(before[i]);
    return rounding_error(DType::kFloat32, running.values[i]) + loss * (1 + size);
  });
}

void check_norm(const NormCase& c) {
  SCOPED_TRACE(c.name());
  NormProblem p(c);
  p.run_forward();
  cpu::batch_norm_forward(p.forward(Side::kHost), kSerial);
  const Terms terms(p);
  const double loss = sum_error(p.mask.count);
  const Values& inv_std = p.inv_std.values;
  expect_close("inv_std", p.inv_std.read(), inv_std, [&](size_t i) {
    return rounding_error(DType::kFloat32, inv_std[i]) +
           loss * inv_std[i] * (1 + terms.relative[i]);
  });
  for (const bool is_y : {false, true}) {
    const Operand& normed = is_y ? p.normed_y : p.normed_x;
    const auto width = static_cast<size_t>(is_y ? c.num_cols : c.num_rows);
    const auto first = static_cast<size_t>(is_y ? c.num_rows : 0);
    expect_close(is_y ? "normed_y" : "normed_x", normed.read(), normed.values, [&](size_t i) {
      if (!p.mask[static_cast<int64_t>(i / width)]) return 0.0;  // exactly the oracle's zeros
      const double relative = terms.relative[first + i % width];
      return rounding_error(c.dtype, normed.values[i]) + loss * relative * (1 + relative);
    });
  }
  const auto counts = integers_of<int64_t>(p.device_counts.read());
  EXPECT_EQ((std::vector<int64_t>{6, 8}), counts);
  check_running(p, p.running_x, 0, c.num_rows, terms, loss);
  check_running(p, p.running_y, c.num_rows, c.num_cols, terms, loss);

  // On the normed logits as the device has rounded them.
  p.normed_x.values = p.normed_x.read();
  p.normed_y.values = p.normed_y.read();
  p.inv_std.values = p.inv_std.read();
  p.run_backward();
  cpu::batch_norm_backward(p.backward(Side::kHost), kSerial);
  const Values& grad = p.grad_logits.values;
  expect_close("grad_logits", p.grad_logits.read(), grad, [&](size_t i) {
    const auto column = i % static_cast<size_t>(c.width());
    if (!p.mask[static_cast<int64_t>(i / static_cast<size_t>(c.width()))]) return 0.0;
    const double relative = 1 + terms.relative[column];
    return rounding_error(c.dtype, grad[i]) +
           loss * p.inv_std.values[column] * terms.grads[column] * relative * relative;
  });
}

void check_norms(int64_t num_tokens, int64_t num_rows, int64_t num_cols) {
  for (const DType type : kDTypes) {
    for (const Pattern pattern : kPatterns) {
      check_norm({num_tokens, num_rows, num_cols, type, pattern});
      if (testing::Test::HasFailure()) return;
    }
  }
}

TEST_F(CudaTokenMask, SmallNorms) {
  for (const int64_t num_tokens : {1, 2, 37, 199}) {
    check_norms(num_tokens, 1, 7);
    check_norms(num_tokens, 8, 40);
    check_norms(num_tokens, 64, 100);
    if (HasFailure()) return;
  }
}

TEST_F(CudaTokenMask, NormOfNoTokens) { check_norms(0, 8, 5); }

TEST_F(CudaTokenMask, NormsOfRouterShapes) {
  check_norms(4096, 64, 64);
  check_norms(4095, 320, 328);
}

// More groups of columns than blocks, and more tokens than registers hold.
TEST_F(CudaTokenMask, LargeNorms) {
  check_norm({37, 8200, 10001, DType::kBFloat16, Pattern::kRandom});
  for (const DType type : kDTypes) {
    for (const Pattern pattern : {Pattern::kRandom, Pattern::kBlocks, Pattern::kFew}) {
      check_norm({(1 << 17) + 5, 8, 24, type, pattern});
      check_norm({(1 << 15) + 5, 3, 4, type, pattern});
    }
  }
}

TEST_F(CudaTokenMask, NormOfALargeMean) {
  for (const Pattern pattern : {Pattern::kRandom, Pattern::kBlocks, Pattern::kFew}) {
    NormProblem p({4096, 8, 8, DType::kFloat32, pattern, 1e4});
    p.run_forward();
    cpu::batch_norm_forward(p.forward(Side::kHost), kSerial);
    const Values& want = p.inv_std.values;
    expect_close("inv_std", p.inv_std.read(), want, [&](size_t i) { return 1e-4 * want[i]; });
  }
}

// ---- router ----

struct RouterRun {
  Bytes weights, ids, grad_x, grad_y;
};

// Which kernels run follows from the shape: a warp or a block per token, lists in shared memory or
// in the workspace.
void check_router(int64_t num_tokens, int64_t num_rows, int64_t num_cols, int64_t k, DType dtype,
                  RouterScore score) {
  SCOPED_TRACE(testing::Message() << name_of(dtype) << " " << num_rows << "x" << num_cols << " K"
                                  << k << " score " << static_cast<int>(score));
  std::mt19937 random(std::random_device{}());
  Operand x(dtype, num_tokens * num_rows), y(dtype, num_tokens * num_cols),
      grad(dtype, num_tokens * k), weights(dtype, num_tokens * k),
      grad_x(dtype, num_tokens * num_rows), grad_y(dtype, num_tokens * num_cols);
  const DeviceArray ids(static_cast<size_t>(num_tokens * k) * sizeof(int32_t));
  fill_normal(x, random);
  fill_normal(y, random);
  fill_normal(grad, random);
  const TokenMask mask(num_tokens, Pattern::kRandom);
  const auto run = [&](const bool* token_mask) {
    RouterForwardParams forward{.logits_x = x.at(Side::kDevice),
                                .logits_y = y.at(Side::kDevice),
                                .weights = weights.at(Side::kDevice),
                                .indices = static_cast<int32_t*>(ids.data()),
                                .num_tokens = num_tokens,
                                .num_rows = num_rows,
                                .num_cols = num_cols,
                                .num_experts_per_token = k,
                                .dtype = dtype,
                                .score = score,
                                .token_mask = token_mask};
    const auto plan = cuda::plan_router_forward(forward);
    run_twice({&weights.device, &ids}, plan.workspace_bytes, [&](void* workspace) {
      forward.workspace = workspace;
      return cuda::router_forward(forward, plan, nullptr);
    });
    RouterBackwardParams backward{.grad_weights = grad.at(Side::kDevice),
                                  .logits_x = x.at(Side::kDevice),
                                  .logits_y = y.at(Side::kDevice),
                                  .indices = static_cast<const int32_t*>(ids.data()),
                                  .grad_logits_x = grad_x.at(Side::kDevice),
                                  .grad_logits_y = grad_y.at(Side::kDevice),
                                  .num_tokens = num_tokens,
                                  .num_rows = num_rows,
                                  .num_cols = num_cols,
                                  .num_experts_per_token = k,
                                  .dtype = dtype,
                                  .score = score};
    const auto backward_plan = cuda::plan_router_backward(backward);
    run_twice({&grad_x.device, &grad_y.device}, backward_plan.workspace_bytes,
              [&](void* workspace) {
                backward.workspace = workspace;
                return cuda::router_backward(backward, backward_plan, nullptr);
              });
    return RouterRun{weights.device.read(), ids.read(), grad_x.device.read(), grad_y.device.read()};
  };
  const RouterRun want = run(nullptr);
  for (int64_t t = 0; t < num_tokens; ++t) {  // must reach nothing
    if (!mask[t]) x.values[static_cast<size_t>(t * num_rows)] = kNaN;
  }
  x.upload();
  const RouterRun got = run(mask.on(Side::kDevice));

  // Bit for bit those of the tokens that count; `nothing` in every byte of the others.
  const auto expect_rows = [&](const char* what, const Bytes& masked, const Bytes& plain,
                               unsigned char nothing) {
    const size_t row_bytes = plain.size() / static_cast<size_t>(num_tokens);
    for (size_t i = 0; i < plain.size(); ++i) {
      const bool counts = mask[static_cast<int64_t>(i / row_bytes)];
      ASSERT_EQ(counts ? plain[i] : nothing, masked[i])
          << what << ", byte " << i << " of rows of " << row_bytes;
    }
  };
  expect_rows("weights", got.weights, want.weights, 0);
  expect_rows("ids", got.ids, want.ids, 0xff);
  expect_rows("grad_x", got.grad_x, want.grad_x, 0);
  expect_rows("grad_y", got.grad_y, want.grad_y, 0);
}

// A warp per token, then a block per token.
TEST_F(CudaTokenMask, SmallRouters) {
  for (const DType type : kDTypes) {
    for (const RouterScore score : {RouterScore::kSoftmax, RouterScore::kSoftmaxTopK}) {
      check_router(37, 5, 7, 3, type, score);
      check_router(37, 64, 64, 16, type, score);
      check_router(9, 40, 20, 300, type, score);
      if (HasFailure()) return;
    }
  }
}

TEST_F(CudaTokenMask, LargeRouters) {
  for (const DType type : kDTypes) {
    for (const RouterScore score : {RouterScore::kSoftmax, RouterScore::kSoftmaxTopK}) {
      check_router(199, 1000, 320, 100, type, score);
      check_router(67, 320, 320, 512, type, score);
      check_router(37, 40, 3000, 5, type, score);
      check_router(9, 9000, 9000, 4000, type, score);  // lists and sums in the workspace
      if (HasFailure()) return;
    }
  }
}

}  // namespace
}  // namespace omni_moe
