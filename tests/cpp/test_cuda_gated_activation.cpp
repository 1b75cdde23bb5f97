// The CUDA gated activation, forward and backward, against the CPU backend's in fp64.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <type_traits>

#include "cuda_kernel_testing.h"

namespace omni_moe {
namespace {

using CudaGatedActivation = CudaKernelTest;

// How the operands lie: apart and dense, as halves of one [T, 2I] matrix, or one element off 16
// bytes.
enum class Layout { kDense, kHalves, kMisaligned };

struct Case {
  int64_t num_tokens, size;
  DType dtype;
  Layout layout;
  Activation activation;

  std::string name() const {
    return std::string(name_of(dtype)) + " T" + std::to_string(num_tokens) + " I" +
           std::to_string(size) + " layout " + std::to_string(static_cast<int>(layout)) + " act " +
           std::to_string(static_cast<int>(activation));
  }
};

struct Problem {
  explicit Problem(const Case& c)
      : c(c),
        both(c.dtype, 2 * count(), offset()),
        grad(c.dtype, count(), offset()),
        activated(c.dtype, count(), offset()),
        grads(c.dtype, 2 * count(), offset()) {
    for (const int64_t first : {int64_t{0}, up_offset()}) {
      std::mt19937 random(first == 0 ? 1 : 2);
      std::normal_distribution<float> normal;
      for (int64_t i = 0; i < count(); ++i) both.values[first + row_position(i)] = normal(random);
    }
    both.upload();
    std::mt19937 random(3);
    fill_normal(grad, random);
  }

  int64_t count() const { return c.num_tokens * c.size; }
  int64_t offset() const { return c.layout == Layout::kMisaligned ? 1 : 0; }
  int64_t stride() const { return c.layout == Layout::kHalves ? 2 * c.size : c.size; }
  // gate | up as [T, 2I], or gate then up; the gradients likewise.
  int64_t up_offset() const { return c.layout == Layout::kHalves ? c.size : count(); }
  int64_t row_position(int64_t i) const { return i / c.size * stride() + i % c.size; }

  // Of either pass, for either side. The backward writes the product again: on the device over the
  // gradient that it came from.
  template <typename Params>
  Params params_of(Side side) {
    Params params{};
    params.gate = both.at(side);
    params.up = both.at(side, up_offset());
    params.num_tokens = c.num_tokens;
    params.intermediate_size = c.size;
    params.gate_stride = params.up_stride = stride();
    params.dtype = dtype_on(side, c.dtype);
    params.activation = c.activation;
    if constexpr (std::is_same_v<Params, GatedActivationForwardParams>) {
      params.activated = activated.at(side);
    } else {
      params.grad_activated = grad.at(side);
      params.grad_gate = grads.at(side);
      params.grad_up = grads.at(side, up_offset());
      params.grad_gate_stride = params.grad_up_stride = stride();
      params.activated = side == Side::kDevice ? grad.at(side) : nullptr;
    }
    return params;
  }

  Case c;
  Operand both, grad, activated, grads;
};

void check(const Case& c) {
  SCOPED_TRACE(c.name());
  Problem p(c);
  const auto tolerance = [&](double want, double magnitude) {
    return rounding_error(c.dtype, want) + 2e-6 * magnitude;
  };

  // 1. Forward.
  const auto forward = p.params_of<GatedActivationForwardParams>(Side::kDevice);
  expect_success(cuda::gated_activation_forward(
      forward, cuda::plan_gated_activation_forward(forward), nullptr));
  cpu::gated_activation_forward(p.params_of<GatedActivationForwardParams>(Side::kHost), kSerial);
  const Values activated = p.activated.read();
  expect_close("activated", activated, p.activated.values, [&](size_t i) {
    const double gate = p.both.values[p.row_position(i)];
    const double up = p.both.values[p.up_offset() + p.row_position(i)];
    return tolerance(p.activated.values[i], std::abs(gate * up));
  });

  // 2. Backward.
  const auto backward = p.params_of<GatedActivationBackwardParams>(Side::kDevice);
  expect_success(cuda::gated_activation_backward(
      backward, cuda::plan_gated_activation_backward(backward), nullptr));
  cpu::gated_activation_backward(p.params_of<GatedActivationBackwardParams>(Side::kHost), kSerial);
  Values magnitudes(p.grads.values.size());
  for (int64_t i = 0; i < p.count(); ++i) {
    const int64_t gate_at = p.row_position(i), up_at = p.up_offset() + gate_at;
    const double scale = (1 + std::abs(p.both.values[gate_at])) * std::abs(p.grad.values[i]);
    magnitudes[gate_at] = scale * std::abs(p.both.values[up_at]);
    magnitudes[up_at] = scale;
  }
  expect_close("grads of gate and up", p.grads.read(), p.grads.values,
               [&](size_t i) { return tolerance(p.grads.values[i], magnitudes[i]); });
  EXPECT_TRUE(activated == p.grad.read()) << "activated again";
}

TEST_F(CudaGatedActivation, ForwardAndBackward) {
  for (const DType dtype : kDTypes) {
    for (const Activation activation : kActivations) {
      for (const Layout layout : {Layout::kDense, Layout::kHalves, Layout::kMisaligned}) {
        for (const int64_t size : {1, 8, 100, 1000}) {
          for (const int64_t num_tokens : {1, 37}) {
            check({num_tokens, size, dtype, layout, activation});
            if (HasFailure()) return;
          }
        }
      }
    }
  }
}

TEST_F(CudaGatedActivation, MoreRowsThanTheGrid) {
  // Strided operands of one element a row: rows beyond 65535 blocks of 256.
  constexpr int64_t kRows = 65535 * 256 + 3;
  constexpr DType kType = DType::kBFloat16;
  const size_t bytes = kRows * size_of(kType);
  const DeviceArray both(Bytes(2 * bytes, 0x3f)), out(bytes);
  GatedActivationForwardParams params{};
  params.gate = both.data();
  params.up = static_cast<unsigned char*>(both.data()) + size_of(kType);
  params.activated = out.data();
  params.num_tokens = kRows;
  params.intermediate_size = 1;
  params.gate_stride = params.up_stride = 2;
  params.dtype = kType;
  params.activation = Activation::kIdentity;
  expect_success(
      cuda::gated_activation_forward(params, cuda::plan_gated_activation_forward(params), nullptr));
  const Values got = decode(kType, out.read());
  const double half = 0.74609375;  // 0x3f3f
  EXPECT_TRUE(std::all_of(got.begin(), got.end(),
                          [&](double v) { return v == rounded(kType, half * half); }));
}

}  // namespace
}  // namespace omni_moe
