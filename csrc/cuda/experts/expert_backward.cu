// Backward of the atomic experts in two orders. With s = hidden[t] · up[i] as the forward saved it
// and g = grad[t] · down[i]:
//   token order (token_pass.cuh): grad_routing[t,k] = act(s) g,
//     grad_hidden[t] = addend[t] + Σ_k routing act'(s) g up[i],
//     and per pair the two coefficients below, written to the pair's place in expert order;
//   expert order (weight_grad.cu): grad_down[i] = Σ routing act(s) grad[t],
//     grad_up[i] = Σ routing act'(s) g hidden[t].
// The token pass reads 2 T K rows like the forward and writes 16 bytes per pair. A pass by bands
// (bands/) leaves its coefficients in lists of its own, from which the tables' gradients are summed
// by bands, too.
#include "cuda/common/check.h"
#include "cuda/common/dispatch.h"
#include "cuda/experts/bands/bands.h"
#include "cuda/experts/expert_plan.h"
#include "cuda/experts/expert_workspace.h"
#include "cuda/experts/launch_token_pass.cuh"
#include "cuda/experts/schedule.h"
#include "cuda/experts/weight_grad.h"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {
namespace {

// Whether the tables' gradients take the bands of the token pass, instead of pairs in expert order.
bool has_band_weights(const ExpertBackwardPlan& plan) {
  return plan.token_pass.strategy == TokenPassStrategy::kBands;
}

ScheduleShape schedule_shape(const ExpertBackwardParams& params) {
  return {params.num_tokens * params.num_experts_per_token, params.num_experts};
}

cudaError_t token_pass(const ExpertBackwardParams& params, bool want_weights,
                       const ExpertBackwardPlan& plan, const BackwardWorkspace& workspace,
                       cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  TokenPassArgs args{};
  args.queries = params.grad_expert_states;
  args.keys = params.down_weights;
  args.values = params.up_weights;
  args.indices = params.indices;
  args.addend = params.addend;
  args.out = params.grad_hidden_states;
  args.num_tokens = params.num_tokens;
  args.hidden_size = params.hidden_size;
  args.num_experts = params.num_experts;
  args.num_experts_per_token = params.num_experts_per_token;
  args.index_type = params.index_type;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    BackwardPairs<T> pairs{};
    pairs.routing_weights = static_cast<const T*>(params.routing_weights);
    pairs.pre_activations = static_cast<const float*>(params.pre_activations);
    pairs.grad_routing_weights = static_cast<T*>(params.grad_routing_weights);
    pairs.records = want_weights && !has_band_weights(plan) ? workspace.records : nullptr;
    pairs.pair_position = workspace.schedule.schedule.pair_position;
    pairs.activation = params.activation;
    return launch_token_pass<T>(args, pairs, plan.token_pass, token_pass_shape(params).is_aligned,
                                workspace.token_pass, /*beside_previous=*/want_weights, plan.device,
                                stream);
  });
}

cudaError_t band_weights(const ExpertBackwardParams& params, const ExpertBackwardPlan& plan,
                         const BackwardWorkspace& workspace, cudaStream_t stream) {
  const BandShape shape = band_shape(token_pass_shape(params), plan.token_pass.bands);
  const BandWorkspace lists = cut_band_workspace(shape, params.hidden_size, workspace.token_pass);
  const BandWeightGradTables tables{params.hidden_states, params.grad_expert_states,
                                    params.grad_up_weights, params.grad_down_weights};
  return run_steps([&] { return band_tails(shape, lists, stream); },
                   [&] {
                     return dispatch_dtype(params.dtype, [&](auto tag) {
                       using T = typename decltype(tag)::type;
                       if constexpr (sizeof(T) != 2) {
                         return cudaErrorInvalidValue;
                       } else {
                         return run_steps([&] { return band_cells<T>(shape, lists, stream); },
                                          [&] {
                                            return band_weight_grad<T>(shape, tables,
                                                                       params.hidden_size, lists,
                                                                       plan.device, stream);
                                          });
                       }
                     });
                   });
}

}  // namespace

ExpertBackwardPlan plan_expert_backward(const ExpertBackwardParams& params) {
  const ExpertBackwardPlan plan = plan_expert_backward(params, current_device());
  if (has_band_weights(plan) || plan.schedule.by_counting || !is_supported(params)) return plan;
  return plan_expert_backward(params, plan.device, plan.token_pass,
                              sort_storage_bytes(schedule_shape(params)));
}

cudaError_t expert_backward(const ExpertBackwardParams& params, const ExpertBackwardPlan& plan,
                            cudaStream_t stream) {
  const bool is_planned = plan.schedule.part_pairs > 0;
  if (!is_supported(params) || !is_planned ||
      !supports(plan.token_pass.strategy, token_pass_shape(params))) {
    return cudaErrorInvalidValue;
  }
  const BackwardWorkspace workspace = cut_workspace(params, plan);
  const bool want_weights =
      params.grad_up_weights != nullptr || params.grad_down_weights != nullptr;
  if (has_band_weights(plan)) {
    return run_steps([&] { return token_pass(params, want_weights, plan, workspace, stream); },
                     [&] {
                       if (!want_weights) return cudaSuccess;
                       return band_weights(params, plan, workspace, stream);
                     });
  }
  return run_steps(
      [&] {
        if (!want_weights) return cudaSuccess;
        return schedule_pairs(schedule_shape(params), params.indices, params.index_type,
                              plan.schedule, workspace.schedule, plan.device, stream);
      },
      [&] { return token_pass(params, want_weights, plan, workspace, stream); },
      [&] {
        if (!want_weights) return cudaSuccess;
        return weight_grad(params, workspace.schedule.schedule, workspace.records,
                           workspace.weight_partial, plan.device, stream);
      });
}

}  // namespace omni_moe::cuda
