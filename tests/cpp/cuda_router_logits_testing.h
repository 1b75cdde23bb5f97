// What the tests of the router's logits on CUDA share: a problem with the logits that it makes, in
// fp64 from inputs rounded to the dtype, and its run on the device. Outputs and the workspace start
// as NaN bytes and lie between guards.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <optional>
#include <ostream>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cuda_kernel_testing.h"

namespace omni_moe {

inline constexpr double kMomentum = 0.3;
inline constexpr double kEps = 1e-5;

struct Shape {
  int64_t num_tokens, hidden_size, num_rows, num_cols;
  int64_t width() const { return num_rows + num_cols; }
};

struct LogitsCase {
  Shape shape;
  DType dtype;
};

inline std::string name_of(const LogitsCase& c) {
  return "T" + std::to_string(c.shape.num_tokens) + "_H" + std::to_string(c.shape.hidden_size) +
         "_R" + std::to_string(c.shape.num_rows) + "_C" + std::to_string(c.shape.num_cols) + "_" +
         name_of(c.dtype);
}

inline void PrintTo(const LogitsCase& c, std::ostream* out) { *out << name_of(c); }

struct Mode {
  DType stats_dtype;
  bool training;
};

// Each element as the dtype holds it.
inline Values rounded(DType dtype, const Values& values) {
  return decode(dtype, encode(dtype, values));
}

// What the runs read, rounded, and the logits that it makes.
struct Problem {
  Shape shape;
  DType dtype;
  Values x, gates;                   // [T, H], [R + C, H]
  Values running_mean, running_var;  // [R + C], not rounded
  Values logits;                     // [T, R + C]
  Values largest;                    // [R + C] the logits' sizes
  Values error;                      // [R + C] of a logit as the tensor cores sum it

  explicit Problem(const LogitsCase& c, const std::function<void(Problem&)>& edit = {})
      : shape(c.shape),
        dtype(c.dtype),
        x(c.shape.num_tokens * c.shape.hidden_size),
        gates(c.shape.width() * c.shape.hidden_size),
        logits(c.shape.num_tokens * c.shape.width()),
        largest(c.shape.width()),
        error(c.shape.width()) {
    std::mt19937 random(1);
    // A mean of 1, so that the columns' means are of the size of their deviations.
    std::normal_distribution<float> of_x(0.0f, 1.0f);
    for (double& value : x) value = rounded(dtype, of_x(random)) + 1;
    std::normal_distribution<float> of_gates(
        0.0f, static_cast<float>(1 / std::sqrt(double(shape.hidden_size))));
    for (double& value : gates) value = of_gates(random);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < shape.width(); ++i) {
      running_mean.push_back(normal(random));
      running_var.push_back(0.5f + std::abs(normal(random)));
    }
    if (edit) edit(*this);
    x = rounded(dtype, x);
    gates = rounded(dtype, gates);
    multiply();
  }

  double& gate(int64_t column, int64_t k) { return gates[column * shape.hidden_size + k]; }
  double& token(int64_t t, int64_t k) { return x[t * shape.hidden_size + k]; }

 private:
  void multiply() {
    const int64_t hidden = shape.hidden_size, width = shape.width();
    const Values columns = transposed(gates, width, hidden);
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      double* row = &logits[t * width];
      multiply_row(&x[t * hidden], columns, hidden, width, row);
      for (int64_t i = 0; i < width; ++i) largest[i] = std::max(largest[i], std::abs(row[i]));
    }
    constexpr double kSizeOfX = 2;  // mean and deviation are 1
    for (int64_t i = 0; i < width; ++i) {
      double squares = 0;
      for (int64_t k = 0; k < hidden; ++k) squares += gate(i, k) * gate(i, k);
      error[i] = product_error(hidden) * kSizeOfX * std::sqrt(squares);
    }
  }
};

// What a run writes. Those of the y axis follow those of the x axis.
enum Output { kNormedX, kNormedY, kMeanX, kMeanY, kVarX, kVarY, kCountX, kCountY, kInvStd };
inline constexpr int kNumOutputs = kInvStd + 1;
inline constexpr const char* kOutputNames[] = {
    "normed_x",      "normed_y",      "running_mean_x",        "running_mean_y",
    "running_var_x", "running_var_y", "num_batches_tracked_x", "num_batches_tracked_y",
    "inv_std"};

using Outputs = std::array<Bytes, kNumOutputs>;

inline Bytes encode_count(int64_t count) { return bytes_of(std::vector<int64_t>{count}); }
inline int64_t decode_count(const Bytes& bytes) { return integers_of<int64_t>(bytes)[0]; }

inline Outputs outputs_before(const Problem& p, DType stats_dtype) {
  const Shape& s = p.shape;
  Outputs outputs;
  outputs[kInvStd] = Bytes(s.width() * sizeof(float), kPoison);
  for (const int axis : {0, 1}) {
    const int64_t begin = axis == 0 ? 0 : s.num_rows, end = axis == 0 ? s.num_rows : s.width();
    const auto part = [&](const Values& both) {
      return encode(stats_dtype, Values(both.begin() + begin, both.begin() + end));
    };
    outputs[kNormedX + axis] = Bytes(s.num_tokens * (end - begin) * size_of(p.dtype), kPoison);
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
      : x_(encode(p.dtype, p.x)),
        gate_x_(gate_rows(p, 0, p.shape.num_rows)),
        gate_y_(gate_rows(p, p.shape.num_rows, p.shape.width())) {
    const Outputs before = outputs_before(p, mode.stats_dtype);
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
    params_.dtype = p.dtype;
    params_.stats_dtype = mode.stats_dtype;
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
    workspace_->read();  // its guards
    return outputs;
  }

 private:
  static Bytes gate_rows(const Problem& p, int64_t begin, int64_t end) {
    const auto first = p.gates.begin();
    return encode(p.dtype,
                  Values(first + begin * p.shape.hidden_size, first + end * p.shape.hidden_size));
  }
  void* data(Output i) const { return outputs_[i] ? outputs_[i]->data() : nullptr; }

  DeviceArray x_, gate_x_, gate_y_;
  std::array<std::optional<DeviceArray>, kNumOutputs> outputs_;
  std::optional<DeviceArray> workspace_;
  RouterLogitsForwardParams params_{};
  std::optional<cuda::RouterLogitsForwardPlan> plan_;
};

inline Outputs run(const Problem& p, const Mode& mode, const std::set<int>& absent = {},
                   int workspace_byte = kPoison) {
  const DeviceRun device(p, mode, absent, workspace_byte);
  device.launch();
  return device.read();
}

inline void expect_same(const Outputs& want, const Outputs& got, const std::set<int>& absent = {}) {
  for (int i = 0; i < kNumOutputs; ++i) {
    if (absent.count(i) != 0) continue;
    EXPECT_TRUE(want[i] == got[i]) << kOutputNames[i];
  }
}

}  // namespace omni_moe
