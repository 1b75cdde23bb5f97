// Elementwise half of the shared MLP on the CPU: act(gate) * up and its gradient. Memory-bound;
// each operand is read once, each result written once.
#include <algorithm>

#include "activation.h"
#include "omni_moe/cpu.h"

namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY {

namespace {

constexpr int64_t kTaskElements = 1 << 13;

int64_t row_grain(int64_t num_columns) {
  return std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, num_columns));
}

}  // namespace

void gated_activation_forward(const GatedActivationForwardParams& params,
                              const Executor& executor) {
  const auto& p = params;
  dispatch_dtype(p.dtype, [&](auto value) {
    using T = typename decltype(value)::type;
    executor.parallel_for(
        0, p.num_tokens, row_grain(p.intermediate_size), [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) {
            const T* gate = static_cast<const T*>(p.gate) + t * p.gate_stride;
            const T* up = static_cast<const T*>(p.up) + t * p.up_stride;
            T* out = static_cast<T*>(p.activated) + t * p.intermediate_size;
            for_each_vector<acc_t<T>>(p.intermediate_size, [&](int64_t i, int64_t lanes) {
              const auto a = activate(p.activation, load_lanes(gate + i, lanes));
              store_lanes(out + i, a * load_lanes(up + i, lanes), lanes);
            });
          }
        });
  });
}

void gated_activation_backward(const GatedActivationBackwardParams& params,
                               const Executor& executor) {
  const auto& p = params;
  dispatch_dtype(p.dtype, [&](auto value) {
    using T = typename decltype(value)::type;
    executor.parallel_for(
        0, p.num_tokens, row_grain(p.intermediate_size), [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) {
            const int64_t row = t * p.intermediate_size;
            const T* grad = static_cast<const T*>(p.grad_activated) + row;
            const T* gate = static_cast<const T*>(p.gate) + t * p.gate_stride;
            const T* up = static_cast<const T*>(p.up) + t * p.up_stride;
            T* grad_gate = static_cast<T*>(p.grad_gate) + t * p.grad_gate_stride;
            T* grad_up = static_cast<T*>(p.grad_up) + t * p.grad_up_stride;
            T* activated = p.activated ? static_cast<T*>(p.activated) + row : nullptr;
            for_each_vector<acc_t<T>>(p.intermediate_size, [&](int64_t i, int64_t lanes) {
              const auto g = load_lanes(grad + i, lanes);
              const auto z = load_lanes(gate + i, lanes);
              const auto u = load_lanes(up + i, lanes);
              const auto a = activate(p.activation, z);
              store_lanes(grad_gate + i, activate_backward(p.activation, z, g * u), lanes);
              store_lanes(grad_up + i, g * a, lanes);
              if (activated) store_lanes(activated + i, a * u, lanes);
            });
          }
        });
  });
}

}  // namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY
