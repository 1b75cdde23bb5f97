// Plans of the MLP's kernels; see omni_moe/cuda_plan.h.
#include <algorithm>
#include <initializer_list>
#include <limits>

#include "cuda/common/operands.h"
#include "cuda/mlp/gated_linear_tuning.h"
#include "omni_moe/cuda_plan.h"

namespace omni_moe::cuda {
namespace {

bool are_aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* pointer) { return is_aligned(pointer, 16); });
}

// 16 bytes of every operand lie within one row and are aligned.
template <class Params>
GatedActivationPlan plan_gated_activation(const Params& params,
                                          std::initializer_list<const void*> pointers,
                                          std::initializer_list<int64_t> strides) {
  GatedActivationPlan plan{};
  if (element_size(params.dtype) == 0) return plan;
  const auto vec = static_cast<int64_t>(16 / element_size(params.dtype));
  const int64_t cols = params.intermediate_size;
  plan.is_one_row =
      std::all_of(strides.begin(), strides.end(), [&](int64_t stride) { return stride == cols; });
  const int64_t length = plan.is_one_row ? params.num_tokens * cols : cols;
  plan.uses_vectors =
      length % vec == 0 && are_aligned(pointers) &&
      (plan.is_one_row || std::all_of(strides.begin(), strides.end(),
                                      [&](int64_t stride) { return stride % vec == 0; }));
  return plan;
}

// What the instructions, TMA and the kernels' 32-bit coordinates ask of shapes and operands.
template <class Params>
bool is_representable(const Params& params, std::initializer_list<const void*> pointers,
                      int tile_cols) {
  if (params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) return false;
  if (!is_valid(params.activation)) return false;
  constexpr int64_t kMaxSize = std::numeric_limits<int>::max() - 1024;
  const auto fits = [](int64_t size) { return size >= 0 && size <= kMaxSize; };
  return fits(params.num_tokens) && fits(params.hidden_size) && fits(params.intermediate_size) &&
         params.hidden_size != 0 && params.hidden_size % 8 == 0 &&
         params.intermediate_size % 8 == 0 &&
         fits(ceil_div<int64_t>(params.num_tokens, GatedLinearTuning::kTileTokens) *
              ceil_div<int64_t>(params.intermediate_size, tile_cols)) &&
         are_aligned(pointers);
}

template <class Params>
std::optional<GatedLinearPlan> plan_gated_linear(const Params& params, const DeviceInfo& device,
                                                 std::initializer_list<const void*> pointers,
                                                 int tile_cols) {
  using Tuning = GatedLinearTuning;
  if (!device.has_hopper_kernels || !is_representable(params, pointers, tile_cols) ||
      static_cast<size_t>(device.shared_bytes_per_block) < Tuning::kMaxSharedBytes) {
    return std::nullopt;
  }
  GatedLinearPlan plan{};
  plan.device = device;
  plan.num_token_tiles = static_cast<int>(
      ceil_div<int64_t>(params.num_tokens, int64_t{Tuning::kTileTokens} * Tuning::kCluster));
  plan.num_col_tiles = static_cast<int>(ceil_div<int64_t>(params.intermediate_size, tile_cols));
  // As many clusters as run at the same time, each for many tiles.
  plan.num_clusters = std::min(std::max(device.num_sms / Tuning::kCluster, 1),
                               plan.num_token_tiles * plan.num_col_tiles);
  return plan;
}

}  // namespace

GatedActivationForwardPlan plan_gated_activation_forward(
    const GatedActivationForwardParams& params) {
  return plan_gated_activation(params, {params.gate, params.up, params.activated},
                               {params.gate_stride, params.up_stride});
}

GatedActivationBackwardPlan plan_gated_activation_backward(
    const GatedActivationBackwardParams& params) {
  return plan_gated_activation(
      params,
      {params.grad_activated, params.gate, params.up, params.grad_gate, params.grad_up,
       params.activated},
      {params.gate_stride, params.up_stride, params.grad_gate_stride, params.grad_up_stride});
}

std::optional<GatedLinearForwardPlan> plan_gated_linear_forward(
    const GatedLinearForwardParams& params, const DeviceInfo& device) {
  return plan_gated_linear(
      params, device,
      {params.x, params.gate_weight, params.up_weight, params.activated, params.gate, params.up},
      GatedLinearTuning::kForwardTileCols);
}

std::optional<GatedLinearBackwardPlan> plan_gated_linear_backward(
    const GatedLinearBackwardParams& params, const DeviceInfo& device) {
  return plan_gated_linear(params, device,
                           {params.grad_output, params.down_weight, params.gate, params.up,
                            params.grad_gate, params.grad_up, params.activated},
                           GatedLinearTuning::kBackwardTileCols);
}

}  // namespace omni_moe::cuda
