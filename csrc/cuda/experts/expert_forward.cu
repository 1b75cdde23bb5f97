// Forward of the atomic experts, token by token:
//   out[t] = addend[t] + Σ_k act(hidden[t] · up[i]) * routing[t,k] * down[i],  i = indices[t,k].
// It reads 2 T K rows of H elements (from L2 or HBM) and little else, so every strategy
// (expert_plan.h) aims at bytes in flight: fused.cuh keeps rows in registers, l2_tiled.cuh does the
// same tile by tile where rows are used again, and two_phase.cuh takes any shape and alignment, and
// few tokens.
#include <algorithm>

#include "cuda/common/check.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/workspace.h"
#include "cuda/experts/launch_token_pass.cuh"
#include "cuda/experts/planned_passes.h"

namespace omni_moe::cuda {
namespace {

bool is_supported(const ExpertForwardParams& params) {
  constexpr int64_t kMax = INT32_MAX;  // grid size; ids and k are 32-bit in registers
  return params.num_tokens >= 0 && params.num_tokens <= kMax && params.hidden_size > 0 &&
         params.num_experts >= 0 && params.num_experts <= kMax &&
         params.num_experts_per_token >= 0 && params.num_experts_per_token <= kMax &&
         element_size(params.dtype) != 0 && is_valid(params.activation) &&
         is_valid(params.index_type);
}

}  // namespace

TokenPassShape token_pass_shape(const ExpertForwardParams& params) {
  const size_t element = element_size(params.dtype);
  return {params.num_tokens,
          params.hidden_size,
          params.num_experts,
          params.num_experts_per_token,
          element,
          params.hidden_size * element % 16 == 0 && is_aligned(params.hidden_states, 16) &&
              is_aligned(params.up_weights, 16) && is_aligned(params.down_weights, 16) &&
              is_aligned(params.expert_states, 16) && is_aligned(params.addend, 16),
          params.num_cols};
}

cudaError_t expert_forward(const ExpertForwardParams& params, const TokenPassPlan& plan,
                           cudaStream_t stream) {
  if (!is_supported(params)) return cudaErrorInvalidValue;
  if (params.num_tokens == 0) return cudaSuccess;
  const TokenPassShape shape = token_pass_shape(params);
  if (!supports(plan.strategy, shape)) return cudaErrorInvalidValue;
  DeviceInfo device;
  const cudaError_t status = current_device_info(&device);
  if (status != cudaSuccess) return status;
  const TokenPassArgs args{params.hidden_states, params.up_weights,
                           params.down_weights,  params.indices,
                           params.addend,        params.expert_states,
                           params.num_tokens,    params.hidden_size,
                           params.num_experts,   params.num_experts_per_token,
                           params.index_type};
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ForwardPairs<T> pairs{static_cast<const T*>(params.routing_weights),
                                static_cast<float*>(params.pre_activations), params.activation};
    return launch_token_pass<T>(args, pairs, plan, shape.is_aligned,
                                static_cast<float*>(params.workspace), /*beside_previous=*/false,
                                device, stream);
  });
}

cudaError_t expert_forward(const ExpertForwardParams& params, cudaStream_t stream) {
  if (!is_supported(params)) return cudaErrorInvalidValue;
  ExpertDeviceInfo device;
  const cudaError_t status = current_expert_device_info(&device);
  if (status != cudaSuccess) return status;
  return expert_forward(params, plan_token_pass(token_pass_shape(params), device), stream);
}

size_t expert_forward_workspace_size(const ExpertForwardParams& params, const TokenPassPlan& plan) {
  const size_t floats = token_pass_workspace_floats(token_pass_shape(params), plan);
  return round_up<size_t>(floats * sizeof(float), WorkspaceCutter::kAlignment);
}

// Enough for this shape with any alignment.
size_t expert_forward_workspace_size(const ExpertForwardParams& params) {
  ExpertDeviceInfo device;
  if (!is_supported(params) || current_expert_device_info(&device) != cudaSuccess) return 0;
  TokenPassShape shape = token_pass_shape(params);
  size_t bytes = 0;
  for (const bool aligned : {false, true}) {
    shape.is_aligned = aligned && params.hidden_size * shape.element_size % 16 == 0;
    bytes = std::max(bytes, expert_forward_workspace_size(params, plan_token_pass(shape, device)));
  }
  return bytes;
}

}  // namespace omni_moe::cuda
