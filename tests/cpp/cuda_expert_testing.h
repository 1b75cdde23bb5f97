// What the tests of the CUDA experts share: the operands of both passes, whose oracles are the CPU
// backend's on the host side of the operands, and the comparison of sums over many pairs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cuda_kernel_testing.h"

namespace omni_moe {

inline Bytes bytes_of_ids(const std::vector<int64_t>& ids, IndexType index_type) {
  if (index_type == IndexType::kInt64) return bytes_of(ids);
  return bytes_of(std::vector<int32_t>(ids.begin(), ids.end()));
}

// `offset`: elements by which every operand but the ids misses its alignment on the device.
struct ExpertOperands {
  ExpertOperands(const ExpertShape& shape, bool has_addend, int64_t offset = 0)
      : shape(shape),
        has_addend(has_addend),
        hidden(shape.dtype, shape.num_tokens * shape.hidden_size, offset),
        grad(shape.dtype, shape.num_tokens * shape.hidden_size, offset),
        up(shape.dtype, shape.num_experts * shape.hidden_size, offset),
        down(shape.dtype, shape.num_experts * shape.hidden_size, offset),
        routing(shape.dtype, num_pairs(), offset),
        addend(shape.dtype, shape.num_tokens * shape.hidden_size, offset),
        out(shape.dtype, shape.num_tokens * shape.hidden_size, offset),
        grad_hidden(shape.dtype, shape.num_tokens * shape.hidden_size, offset),
        grad_up(shape.dtype, shape.num_experts * shape.hidden_size, offset),
        grad_down(shape.dtype, shape.num_experts * shape.hidden_size, offset),
        grad_routing(shape.dtype, num_pairs(), offset),
        pre_activations(DType::kFloat32, num_pairs(), offset),
        device_ids(num_pairs() * (shape.index_type == IndexType::kInt32 ? 4 : 8)) {}

  int64_t num_pairs() const { return shape.num_tokens * shape.num_experts_per_token; }

  void upload_ids(const std::vector<int64_t>& ids) {
    host_ids = bytes_of_ids(ids, shape.index_type);
    device_ids.upload(host_ids);
  }

  // Fills the Params of either pass, for either side; without the workspace.
  template <typename Params>
  Params params_of(Side side) {
    Params params{shape};
    params.dtype = dtype_on(side, shape.dtype);
    params.hidden_states = hidden.at(side);
    params.up_weights = up.at(side);
    params.down_weights = down.at(side);
    params.routing_weights = routing.at(side);
    params.indices = side == Side::kDevice ? device_ids.data() : host_ids.data();
    params.addend = has_addend ? addend.at(side) : nullptr;
    params.pre_activations = pre_activations.at(side);
    if constexpr (std::is_same_v<Params, ExpertForwardParams>) {
      params.expert_states = out.at(side);
    } else {
      params.grad_expert_states = grad.at(side);
      params.grad_hidden_states = grad_hidden.at(side);
      params.grad_up_weights = grad_up.at(side);
      params.grad_down_weights = grad_down.at(side);
      params.grad_routing_weights = grad_routing.at(side);
    }
    return params;
  }

  void solve_forward() {
    cpu::expert_forward(params_of<ExpertForwardParams>(Side::kHost), kSerial);
  }

  // The gradients' oracle, from pre_activations that are rounded as the device's are.
  void solve_backward() {
    pre_activations.upload();
    auto params = params_of<ExpertBackwardParams>(Side::kHost);
    struct alignas(64) Line {
      unsigned char bytes[64];
    };
    std::vector<Line> workspace(cpu::expert_backward_workspace_size(params) / sizeof(Line) + 1);
    params.workspace = workspace.data();
    cpu::expert_backward(params, kSerial);
  }

  ExpertShape shape;
  bool has_addend;
  Operand hidden, grad, up, down, routing, addend;
  Operand out, grad_hidden, grad_up, grad_down, grad_routing;
  Operand pre_activations;  // output of the forward, input of the backward
  Bytes host_ids;
  DeviceArray device_ids;
};

// Two roundings, and what sums over many pairs lose: that grows with what was added, not with the
// result. `fp32_loss`: how much that is for fp32.
inline void expect_close_to_oracle(const char* name, const Operand& output, const Bytes& got,
                                   double fp32_loss) {
  const bool is_fp32 = output.dtype == DType::kFloat32;
  const double relative = is_fp32 ? 2e-5 : 2 * unit_roundoff(output.dtype);
  double largest = 1;
  for (const double value : output.values) largest = std::max(largest, std::abs(value));
  const double absolute = (is_fp32 ? fp32_loss : 2e-4) * largest;
  expect_close(name, decode(output.dtype, got), output.values,
               [&](size_t i) { return relative * std::abs(output.values[i]) + absolute; });
}

}  // namespace omni_moe
