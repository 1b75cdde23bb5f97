// The forward of the experts by a strategy that the caller chooses, for benchmarks/crossover.py:
// the ops run the one that the plan does. C functions, called through ctypes.
#include <cstring>
#include <optional>

#include "cuda/experts/expert_plan.h"
#include "omni_moe/cuda.h"

namespace {

using omni_moe::cuda::DeviceInfo;
using omni_moe::cuda::ExpertForwardPlan;
using omni_moe::cuda::TokenPassStrategy;

// As crossover.py declares it; elements are bf16, indices int32.
struct Call {
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t num_experts;
  int64_t num_experts_per_token;
  int64_t num_cols;
  const void* hidden_states;
  const void* up_weights;
  const void* down_weights;
  const void* routing_weights;
  const void* indices;
  void* expert_states;
  void* workspace;
};

omni_moe::ExpertForwardParams params_of(const Call& call) {
  omni_moe::ExpertForwardParams params{};
  params.num_tokens = call.num_tokens;
  params.hidden_size = call.hidden_size;
  params.num_experts = call.num_experts;
  params.num_experts_per_token = call.num_experts_per_token;
  params.num_cols = call.num_cols;
  params.dtype = omni_moe::DType::kBFloat16;
  params.index_type = omni_moe::IndexType::kInt32;
  params.activation = omni_moe::Activation::kSilu;
  params.hidden_states = call.hidden_states;
  params.up_weights = call.up_weights;
  params.down_weights = call.down_weights;
  params.routing_weights = call.routing_weights;
  params.indices = call.indices;
  params.expert_states = call.expert_states;
  params.workspace = call.workspace;
  return params;
}

// Of the strategy of this name; none where it does not take the operands on this device.
std::optional<ExpertForwardPlan> plan_of(const Call& call, const char* strategy_name) {
  const omni_moe::ExpertForwardParams params = params_of(call);
  const omni_moe::cuda::TokenPassShape shape = omni_moe::cuda::token_pass_shape(params);
  const DeviceInfo device = omni_moe::cuda::current_device();
  if (!omni_moe::cuda::is_supported(params)) return std::nullopt;
  for (const auto strategy : {TokenPassStrategy::kTwoPhase, TokenPassStrategy::kFused,
                              TokenPassStrategy::kL2Tiled, TokenPassStrategy::kBands}) {
    if (std::strcmp(omni_moe::cuda::name(strategy), strategy_name) != 0) continue;
    if (!omni_moe::cuda::supports(strategy, shape)) return std::nullopt;
    if (strategy == TokenPassStrategy::kBands && !device.has_hopper_kernels) return std::nullopt;
    return plan_expert_forward(params, device, plan_token_pass(shape, device, strategy));
  }
  return std::nullopt;
}

}  // namespace

extern "C" {

// Bytes of the workspace, or -1 where the strategy does not take the operands on this device.
int64_t strategy_workspace_bytes(const Call* call, const char* strategy_name) {
  const auto plan = plan_of(*call, strategy_name);
  return plan ? static_cast<int64_t>(plan->workspace_bytes) : -1;
}

// The CUDA error of enqueuing the forward on `stream`, 0 where there was none.
int strategy_forward(const Call* call, const char* strategy_name, void* stream) {
  const auto plan = plan_of(*call, strategy_name);
  if (!plan) return cudaErrorInvalidValue;
  return omni_moe::cuda::expert_forward(params_of(*call), *plan, static_cast<cudaStream_t>(stream));
}

}  // extern "C"
