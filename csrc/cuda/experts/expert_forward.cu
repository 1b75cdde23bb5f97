// Forward of the atomic experts, token by token:
//   out[t] = addend[t] + Σ_k act(hidden[t] · up[i]) * routing[t,k] * down[i],  i = indices[t,k].
// It reads 2 T K rows of H elements (from L2 or HBM) and little else, so every strategy
// (expert_plan.h) aims at bytes in flight: fused.cuh keeps rows in registers, l2_tiled.cuh does the
// same tile by tile where rows are used again, and two_phase.cuh takes any shape and alignment, and
// few tokens.
#include "cuda/common/check.h"
#include "cuda/common/dispatch.h"
#include "cuda/experts/expert_plan.h"
#include "cuda/experts/launch_token_pass.cuh"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

cudaError_t expert_forward(const ExpertForwardParams& params, const ExpertForwardPlan& plan,
                           cudaStream_t stream) {
  if (!is_supported(params)) return cudaErrorInvalidValue;
  if (params.num_tokens == 0) return cudaSuccess;
  const TokenPassShape shape = token_pass_shape(params);
  if (!supports(plan.token_pass.strategy, shape)) return cudaErrorInvalidValue;
  TokenPassArgs args{};
  args.queries = params.hidden_states;
  args.keys = params.up_weights;
  args.values = params.down_weights;
  args.indices = params.indices;
  args.addend = params.addend;
  args.out = params.expert_states;
  args.num_tokens = params.num_tokens;
  args.hidden_size = params.hidden_size;
  args.num_experts = params.num_experts;
  args.num_experts_per_token = params.num_experts_per_token;
  args.index_type = params.index_type;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ForwardPairs<T> pairs{static_cast<const T*>(params.routing_weights),
                                static_cast<float*>(params.pre_activations), params.activation};
    return launch_token_pass<T>(args, pairs, plan.token_pass, shape.is_aligned,
                                static_cast<float*>(params.workspace), /*beside_previous=*/false,
                                plan.device, stream);
  });
}

}  // namespace omni_moe::cuda
