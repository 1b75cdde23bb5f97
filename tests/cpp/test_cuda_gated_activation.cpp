// CUDA gated activation, forward and backward, against a double-precision host oracle.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_kernel_testing.h"
#include "omni_moe/cuda.h"

namespace omni_moe {
namespace {

using CudaGatedActivation = CudaKernelTest;

struct ActivationValue {
  double value, derivative;
};

ActivationValue activate(Activation activation, double x) {
  switch (activation) {
    case Activation::kSilu: {
      const double s = 1 / (1 + std::exp(-x));
      return {x * s, s * (1 + x * (1 - s))};
    }
    case Activation::kGelu: {
      const double cdf = 0.5 * (1 + std::erf(x * std::sqrt(0.5)));
      return {x * cdf, cdf + x * std::exp(-0.5 * x * x) / std::sqrt(2 * M_PI)};
    }
    case Activation::kGeluTanh: {
      const double a = std::sqrt(2 / M_PI);
      const double th = std::tanh(a * (x + 0.044715 * x * x * x));
      return {0.5 * x * (1 + th),
              0.5 * (1 + th) + 0.5 * x * (1 - th * th) * a * (1 + 3 * 0.044715 * x * x)};
    }
    case Activation::kRelu:
      return {x > 0 ? x : 0, x > 0 ? 1.0 : 0.0};
    case Activation::kIdentity:
      return {x, 1};
  }
  return {kNan, kNan};
}

constexpr Activation kActivations[] = {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh,
                                       Activation::kRelu, Activation::kIdentity};

std::vector<float> normal_values(DType dtype, int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& v : values) v = round_to(dtype, normal(random));
  return values;
}

// How the operands lie: apart and dense, as halves of one [T, 2I] matrix, or one element off 16
// bytes.
enum class Layout { kDense, kHalves, kMisaligned };

struct GatedOperands {
  std::vector<float> gate, up, grad;  // [T, I]
  int64_t num_tokens, size;
  const DTypeInfo& type;
  Layout layout;

  int64_t stride() const { return layout == Layout::kHalves ? 2 * size : size; }
  size_t offset() const { return layout == Layout::kMisaligned ? type.bytes : 0; }

  // gate | up as [T, 2I], or gate then up.
  std::unique_ptr<DeviceBuffer> upload() const {
    std::vector<float> both(2 * num_tokens * size);
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int64_t i = 0; i < size; ++i) {
        both[t * stride() + i] = gate[t * size + i];
        both[up_offset() + t * stride() + i] = up[t * size + i];
      }
    }
    return std::make_unique<DeviceBuffer>(encode(type, both), offset());
  }
  int64_t up_offset() const { return layout == Layout::kHalves ? size : num_tokens * size; }
  void* up_of(void* both) const {
    return static_cast<unsigned char*>(both) + up_offset() * type.bytes;
  }
};

void check_gated(const GatedOperands& op, Activation activation) {
  const std::string name = std::string(op.type.name) + " T" + std::to_string(op.num_tokens) + " I" +
                           std::to_string(op.size) + " layout " +
                           std::to_string(static_cast<int>(op.layout)) + " act " +
                           std::to_string(static_cast<int>(activation));
  const int64_t count = op.num_tokens * op.size;
  const auto input = op.upload();
  const auto near = [&](float got, double want, double magnitude, const char* what, int64_t i) {
    expect_close(got, want, op.type.epsilon * std::abs(want) + 2e-6 * magnitude + op.type.smallest,
                 name + " " + what + " at " + std::to_string(i));
  };

  // Forward.
  const DeviceBuffer activated(count * op.type.bytes, op.offset());
  const GatedActivationForwardParams forward{
      input->data(), op.up_of(input->data()), activated.data(), op.num_tokens, op.size, op.stride(),
      op.stride(),   op.type.dtype,           activation};
  ASSERT_EQ(cudaSuccess, cuda::gated_activation_forward(
                             forward, cuda::plan_gated_activation_forward(forward), nullptr))
      << name;
  ASSERT_EQ(cudaSuccess, cudaDeviceSynchronize()) << name;
  const auto got = decode(op.type, activated.read());
  for (int64_t i = 0; i < count && !testing::Test::HasFailure(); ++i) {
    const ActivationValue act = activate(activation, op.gate[i]);
    near(got[i], act.value * op.up[i], std::abs(op.gate[i] * op.up[i]), "activated", i);
  }

  // Backward, with the recomputed product written over the gradient it came from.
  const DeviceBuffer grad(encode(op.type, op.grad), op.offset());
  const DeviceBuffer grads(2 * count * op.type.bytes, op.offset());
  const GatedActivationBackwardParams backward{grad.data(),
                                               input->data(),
                                               op.up_of(input->data()),
                                               grads.data(),
                                               op.up_of(grads.data()),
                                               grad.data(),
                                               op.num_tokens,
                                               op.size,
                                               op.stride(),
                                               op.stride(),
                                               op.stride(),
                                               op.stride(),
                                               op.type.dtype,
                                               activation};
  ASSERT_EQ(cudaSuccess, cuda::gated_activation_backward(
                             backward, cuda::plan_gated_activation_backward(backward), nullptr))
      << name;
  ASSERT_EQ(cudaSuccess, cudaDeviceSynchronize()) << name;
  const auto both = decode(op.type, grads.read());
  const auto again = decode(op.type, grad.read());
  for (int64_t i = 0; i < count && !testing::Test::HasFailure(); ++i) {
    const int64_t at = i / op.size * op.stride() + i % op.size;
    const ActivationValue act = activate(activation, op.gate[i]);
    const double scale = (1 + std::abs(op.gate[i])) * std::abs(op.grad[i]);
    near(both[at], op.grad[i] * op.up[i] * act.derivative, scale * std::abs(op.up[i]), "grad_gate",
         i);
    near(both[op.up_offset() + at], op.grad[i] * act.value, scale, "grad_up", i);
    EXPECT_EQ(got[i], again[i]) << name << " activated again at " << i;
  }
}

TEST_F(CudaGatedActivation, ForwardAndBackward) {
  for (const DTypeInfo& type : kDTypes) {
    for (const Activation activation : kActivations) {
      for (const Layout layout : {Layout::kDense, Layout::kHalves, Layout::kMisaligned}) {
        for (const int64_t size : {1, 8, 100, 1000}) {
          for (const int64_t num_tokens : {1, 37}) {
            const int64_t count = num_tokens * size;
            const auto make = [&](unsigned seed) { return normal_values(type.dtype, count, seed); };
            check_gated({make(1), make(2), make(3), num_tokens, size, type, layout}, activation);
            if (testing::Test::HasFailure()) return;
          }
        }
      }
    }
  }
}

TEST_F(CudaGatedActivation, MoreRowsThanTheGrid) {
  // Strided operands of one element a row: rows beyond 65535 blocks of 256.
  constexpr int64_t kRows = 65535 * 256 + 3;
  const DTypeInfo& type = kDTypes[2];
  const DeviceBuffer both(2 * kRows * type.bytes), out(kRows * type.bytes);
  ASSERT_EQ(cudaSuccess, cudaMemset(both.data(), 0x3f, 2 * kRows * type.bytes));
  const GatedActivationForwardParams params{both.data(),
                                            static_cast<unsigned char*>(both.data()) + type.bytes,
                                            out.data(),
                                            kRows,
                                            1,
                                            2,
                                            2,
                                            type.dtype,
                                            Activation::kIdentity};
  ASSERT_EQ(cudaSuccess, cuda::gated_activation_forward(
                             params, cuda::plan_gated_activation_forward(params), nullptr));
  ASSERT_EQ(cudaSuccess, cudaDeviceSynchronize());
  const auto got = decode(type, out.read());
  const float half = 0.74609375f;  // 0x3f3f
  EXPECT_TRUE(std::all_of(got.begin(), got.end(),
                          [&](float v) { return v == round_to(DType::kBFloat16, half * half); }));
}

}  // namespace
}  // namespace omni_moe
