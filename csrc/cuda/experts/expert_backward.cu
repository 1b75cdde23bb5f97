// Backward of the atomic experts in two orders. With s = hidden[t] · up[i] as the forward saved it
// and g = grad[t] · down[i]:
//   token order (token_pass.cuh): grad_routing[t,k] = act(s) g,
//     grad_hidden[t] = addend[t] + Σ_k routing act'(s) g up[i],
//     and per pair the two coefficients below, written to the pair's place in expert order;
//   expert order (weight_grad.cu): grad_down[i] = Σ routing act(s) grad[t],
//     grad_up[i] = Σ routing act'(s) g hidden[t].
// The token pass reads 2 T K rows like the forward and writes 16 bytes per pair.
#include <algorithm>

#include "cuda/common/check.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/workspace.h"
#include "cuda/experts/launch_token_pass.cuh"
#include "cuda/experts/planned_passes.h"
#include "cuda/experts/schedule.h"
#include "cuda/experts/weight_grad.h"

namespace omni_moe::cuda {
namespace {

bool is_supported(const ExpertBackwardParams& params) {
  constexpr int64_t kMax = INT32_MAX;  // grid size; ids, k and pair ids are 32-bit
  const bool in_range = params.num_tokens >= 0 && params.num_tokens <= kMax &&
                        params.hidden_size > 0 && params.num_experts >= 0 &&
                        params.num_experts <= kMax && params.num_experts_per_token >= 0 &&
                        params.num_experts_per_token <= kMax;
  return in_range && params.num_tokens * params.num_experts_per_token <= kMax &&
         element_size(params.dtype) != 0 && is_valid(params.activation) &&
         is_valid(params.index_type);
}

struct BackwardWorkspace {
  float* token_pass;  // token_pass_workspace_floats
  ScheduleWorkspace schedule;
  PairRecord* records;    // [T * K]
  float* weight_partial;  // parts of long segments
  size_t size;
};

// The layout does not depend on which gradients are wanted.
BackwardWorkspace cut_workspace(const ExpertBackwardParams& params, size_t token_pass_floats) {
  WorkspaceCutter cutter(params.workspace);
  BackwardWorkspace workspace{};
  const int64_t num_pairs = params.num_tokens * params.num_experts_per_token;
  workspace.token_pass = cutter.take<float>(token_pass_floats);
  workspace.schedule = take_schedule_workspace({num_pairs, params.num_experts}, &cutter);
  workspace.records = cutter.take<PairRecord>(num_pairs);
  workspace.weight_partial = cutter.take<float>(
      weight_grad_partial_count(workspace.schedule.schedule, params.hidden_size));
  workspace.size = cutter.size();
  return workspace;
}

cudaError_t token_pass(const ExpertBackwardParams& params, bool want_weights,
                       const TokenPassPlan& plan, const BackwardWorkspace& workspace,
                       const DeviceInfo& device, cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  const TokenPassArgs args{params.grad_expert_states,
                           params.down_weights,
                           params.up_weights,
                           params.indices,
                           params.addend,
                           params.grad_hidden_states,
                           params.num_tokens,
                           params.hidden_size,
                           params.num_experts,
                           params.num_experts_per_token,
                           params.index_type};
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const BackwardPairs<T> pairs{static_cast<const T*>(params.routing_weights),
                                 static_cast<const float*>(params.pre_activations),
                                 static_cast<T*>(params.grad_routing_weights),
                                 want_weights ? workspace.records : nullptr,
                                 workspace.schedule.schedule.pair_position,
                                 params.activation};
    return launch_token_pass<T>(args, pairs, plan, token_pass_shape(params).is_aligned,
                                workspace.token_pass, /*beside_previous=*/want_weights, device,
                                stream);
  });
}

}  // namespace

TokenPassShape token_pass_shape(const ExpertBackwardParams& params) {
  const size_t element = element_size(params.dtype);
  return {params.num_tokens,
          params.hidden_size,
          params.num_experts,
          params.num_experts_per_token,
          element,
          params.hidden_size * element % 16 == 0 && is_aligned(params.grad_expert_states, 16) &&
              is_aligned(params.hidden_states, 16) && is_aligned(params.up_weights, 16) &&
              is_aligned(params.down_weights, 16) && is_aligned(params.addend, 16) &&
              is_aligned(params.grad_hidden_states, 16),
          params.num_cols};
}

cudaError_t expert_backward(const ExpertBackwardParams& params, const TokenPassPlan& plan,
                            cudaStream_t stream) {
  if (!is_supported(params)) return cudaErrorInvalidValue;
  const TokenPassShape shape = token_pass_shape(params);
  if (!supports(plan.strategy, shape)) return cudaErrorInvalidValue;
  ExpertDeviceInfo device;
  const cudaError_t status = current_expert_device_info(&device);
  if (status != cudaSuccess) return status;
  const BackwardWorkspace workspace =
      cut_workspace(params, token_pass_workspace_floats(shape, plan));
  const ExpertSchedule& schedule = workspace.schedule.schedule;
  const bool want_weights =
      params.grad_up_weights != nullptr || params.grad_down_weights != nullptr;
  const ScheduleShape schedule_shape = {params.num_tokens * params.num_experts_per_token,
                                        params.num_experts};
  return run_steps(
      [&] {
        if (!want_weights) return cudaSuccess;
        return schedule_pairs(schedule_shape, params.indices, params.index_type, workspace.schedule,
                              device, stream);
      },
      [&] { return token_pass(params, want_weights, plan, workspace, device, stream); },
      [&] {
        if (!want_weights) return cudaSuccess;
        return weight_grad(params, schedule, workspace.records, workspace.weight_partial, device,
                           stream);
      });
}

cudaError_t expert_backward(const ExpertBackwardParams& params, cudaStream_t stream) {
  if (!is_supported(params)) return cudaErrorInvalidValue;
  ExpertDeviceInfo device;
  const cudaError_t status = current_expert_device_info(&device);
  if (status != cudaSuccess) return status;
  return expert_backward(params, plan_token_pass(token_pass_shape(params), device), stream);
}

size_t expert_backward_workspace_size(const ExpertBackwardParams& params,
                                      const TokenPassPlan& plan) {
  ExpertBackwardParams sizes_only = params;
  sizes_only.workspace = nullptr;
  return cut_workspace(sizes_only, token_pass_workspace_floats(token_pass_shape(params), plan))
      .size;
}

// Enough for this shape with any alignment.
size_t expert_backward_workspace_size(const ExpertBackwardParams& params) {
  ExpertDeviceInfo device;
  if (!is_supported(params) || current_expert_device_info(&device) != cudaSuccess) return 0;
  TokenPassShape shape = token_pass_shape(params);
  size_t bytes = 0;
  for (const bool aligned : {false, true}) {
    shape.is_aligned = aligned && params.hidden_size * shape.element_size % 16 == 0;
    bytes = std::max(bytes, expert_backward_workspace_size(params, plan_token_pass(shape, device)));
  }
  return bytes;
}

}  // namespace omni_moe::cuda
