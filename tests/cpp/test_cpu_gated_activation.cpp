// The gated activation of the CPU backend against an oracle in double, for every set of kernels,
// serially and on two threads.
#include <utility>
#include <vector>

#include "cpu_kernel_testing.h"

namespace omni_moe::cpu {
namespace {

TEST_P(CpuKernels, GatedActivation) {
  // gate and up are the halves of rows of 2I + 3 elements; so are the gradients.
  for (const int64_t size : {1, 15, 64, 333}) {
    const int64_t num_tokens = 19, stride = 2 * size + 3;
    for (const DType dtype : kDTypes) {
      for (const Activation activation : kActivations) {
        SCOPED_TRACE(testing::Message() << "I " << size << ", dtype " << int(dtype)
                                        << ", activation " << int(activation));
        Buffer both = random_.normal(dtype, num_tokens * stride, 2);
        Buffer grad = random_.normal(dtype, num_tokens * size);
        char* gate = static_cast<char*>(both.data());
        char* up = gate + size * size_of(dtype);
        std::vector<double> want, want_grads(num_tokens * stride, kNaN);
        for (int64_t t = 0; t < num_tokens; ++t) {
          for (int64_t i = 0; i < size; ++i) {
            const double z = both[t * stride + i], u = both[t * stride + size + i];
            const double g = grad[t * size + i];
            want.push_back(activate(activation, z) * u);
            want_grads[t * stride + i] = g * u * activate_grad(activation, z);
            want_grads[t * stride + size + i] = g * activate(activation, z);
          }
        }
        const auto forward = [&](const Executor& executor) {
          Buffer activated(dtype, num_tokens * size);
          GetParam().gated_activation_forward(
              {gate, up, activated.data(), num_tokens, size, stride, stride, dtype, activation},
              executor);
          return activated;
        };
        const auto backward = [&](const Executor& executor, bool again) {
          Buffer grads(dtype, num_tokens * stride), activated(dtype, num_tokens * size);
          char* grad_gate = static_cast<char*>(grads.data());
          GetParam().gated_activation_backward(
              {grad.data(), gate, up, grad_gate, grad_gate + size * size_of(dtype),
               again ? activated.data() : nullptr, num_tokens, size, stride, stride, stride, stride,
               dtype, activation},
              executor);
          return std::make_pair(grads, activated);
        };
        const Buffer activated = forward(serial_);
        expect_close(dtype, activated, want, 1);
        const double terms = dtype == DType::kFloat64 ? kDifferenceTerms : 0;
        expect_close(dtype, backward(serial_, false).first, want_grads, 1, terms);
        EXPECT_EQ(forward(two_threads_), activated);
        EXPECT_EQ(backward(two_threads_, true),
                  std::make_pair(backward(serial_, false).first, activated));
        EXPECT_EQ(backward(serial_, false).second, Buffer(dtype, num_tokens * size));
      }
    }
  }
}

TEST_P(CpuKernels, GatedActivationInPlace) {
  const int64_t num_tokens = 19, size = 45, n = num_tokens * size;
  Buffer gate = random_.normal(DType::kFloat32, n), up = random_.normal(DType::kFloat32, n);
  Buffer grad = random_.normal(DType::kFloat32, n);
  Buffer grad_gate(DType::kFloat32, n), grad_up(DType::kFloat32, n);
  const auto run = [&](Buffer& grad, Buffer& grad_gate, Buffer& grad_up) {
    GetParam().gated_activation_backward(
        {grad.data(), gate.data(), up.data(), grad_gate.data(), grad_up.data(), nullptr, num_tokens,
         size, size, size, size, size, DType::kFloat32, Activation::kGelu},
        serial_);
  };
  run(grad, grad_gate, grad_up);
  Buffer over_gate = grad, over_up = grad, other(DType::kFloat32, n);
  run(over_gate, over_gate, other);
  EXPECT_EQ(over_gate, grad_gate);
  EXPECT_EQ(other, grad_up);
  run(over_up, other, over_up);
  EXPECT_EQ(over_up, grad_up);

  // Every output over an input, as for products that are computed again.
  Buffer activated(DType::kFloat32, n);
  GetParam().gated_activation_forward({gate.data(), up.data(), activated.data(), num_tokens, size,
                                       size, size, DType::kFloat32, Activation::kGelu},
                                      serial_);
  GetParam().gated_activation_backward(
      {grad.data(), gate.data(), up.data(), gate.data(), up.data(), grad.data(), num_tokens, size,
       size, size, size, size, DType::kFloat32, Activation::kGelu},
      serial_);
  EXPECT_EQ(gate, grad_gate);
  EXPECT_EQ(up, grad_up);
  EXPECT_EQ(grad, activated);
}

INSTANTIATE_TEST_SUITE_P(Kernels, CpuKernels, testing::ValuesIn(kernel_tables()), capability_of);

}  // namespace
}  // namespace omni_moe::cpu
