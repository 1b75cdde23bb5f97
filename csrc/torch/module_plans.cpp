#include "module_plans.h"

#include <optional>
#include <string>

#include "backend.h"
#include "omni_moe/cuda_plan.h"

namespace omni_moe::torch_api {

namespace {

namespace py = pybind11;
using namespace cuda;

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  throw py::value_error("plan: expected float32, float16 or bfloat16, but got " + name);
}

// ---- GpuProperties -----------------------------------------------------------------------------

DeviceInfo device_of(const py::dict& gpu) {
  return {.num_sms = gpu["num_sms"].cast<int>(),
          .l2_bytes = gpu["l2_bytes"].cast<int>(),
          .shared_bytes_per_block = gpu["shared_bytes_per_block"].cast<int>(),
          .has_cooperative_launch = gpu["has_cooperative_launch"].cast<bool>(),
          .has_early_launch = gpu["has_early_launch"].cast<bool>(),
          .has_hopper_kernels = gpu["has_hopper_kernels"].cast<bool>()};
}

py::dict gpu_properties(int index) {
  const DeviceInfo device = device_info(at::Device(at::kCUDA, static_cast<int8_t>(index)));
  py::dict gpu;
  gpu["num_sms"] = device.num_sms;
  gpu["l2_bytes"] = device.l2_bytes;
  gpu["shared_bytes_per_block"] = device.shared_bytes_per_block;
  gpu["has_cooperative_launch"] = device.has_cooperative_launch;
  gpu["has_early_launch"] = device.has_early_launch;
  gpu["has_hopper_kernels"] = device.has_hopper_kernels;
  return gpu;
}

// ---- What a plan says, in the numbers that its kernel uses -------------------------------------

template <typename Plan>
py::dict with_workspace(py::dict facts, const Plan& plan) {
  facts["workspace_bytes"] = plan.workspace_bytes;
  return facts;
}

py::dict facts_of(const RouterForwardPlan& plan) {
  py::dict facts;
  const bool is_warp = plan.kernel == RouterForwardKernel::kWarp;
  facts["kernel"] = is_warp ? "warp" : "block";
  if (is_warp) {
    facts["items_per_lane"] = plan.items_per_lane;
    facts["sort_width"] = plan.sort_width;
  } else {
    facts["lists_in_shared"] = plan.lists_in_shared;
  }
  facts["num_blocks"] = plan.num_blocks;
  return with_workspace(facts, plan);
}

py::dict facts_of(const RouterBackwardPlan& plan) {
  py::dict facts;
  facts["warps_per_token"] = plan.warps_per_token;
  facts["sums_in_shared"] = plan.sums_in_shared;
  facts["num_blocks"] = plan.num_blocks;
  return with_workspace(facts, plan);
}

py::dict facts_of(const RouterLogitsForwardPlan& plan) {
  py::dict facts;
  facts["token_tiles"] = plan.token_tiles;
  facts["panels"] = plan.panels;
  return with_workspace(facts, plan);
}

py::dict facts_of(const TopKRouterForwardPlan& plan) {
  py::dict facts;
  const bool is_warp = plan.kernel == TopKRouterForwardKernel::kWarp;
  facts["kernel"] = is_warp ? "warp" : "block";
  if (is_warp) facts["items_per_lane"] = plan.items_per_lane;
  facts["num_blocks"] = plan.num_blocks;
  return with_workspace(facts, plan);
}

py::dict facts_of(const TopKRouterBackwardPlan& plan) {
  py::dict facts;
  facts["warps_per_block"] = plan.warps_per_block;
  facts["num_blocks"] = plan.num_blocks;
  return with_workspace(facts, plan);
}

py::dict facts_of(const ExpertSlotsPlan& plan) {
  py::dict facts;
  facts["pairs_per_block"] = plan.pairs_per_block;
  facts["num_blocks"] = plan.num_blocks;
  return with_workspace(facts, plan);
}

py::dict facts_of(const BatchNormPlan& plan) {
  py::dict facts;
  facts["uses_vectors"] = plan.uses_vectors;
  facts["num_panels"] = plan.grid.num_panels;
  facts["num_rounds"] = plan.grid.num_rounds;
  facts["num_parts"] = plan.grid.num_parts;
  return with_workspace(facts, plan);
}

py::dict facts_of(const TokenPassPlan& plan) {
  py::dict facts;
  switch (plan.strategy) {
    case TokenPassStrategy::kTwoPhase:
      facts["strategy"] = "two_phase";
      facts["threads"] = plan.threads;
      facts["num_splits"] = plan.num_splits;
      facts["pairs_per_split"] = plan.pairs_per_split;
      break;
    case TokenPassStrategy::kFused:
      facts["strategy"] = "fused";
      break;
    case TokenPassStrategy::kL2Tiled:
      facts["strategy"] = "l2_tiled";
      facts["tile_bytes"] = plan.tile_bytes;
      break;
    case TokenPassStrategy::kBands:
      facts["strategy"] = "bands";
      facts["max_tasks"] = plan.bands.max_tasks;
      facts["min_pairs"] = plan.bands.min_pairs;
      break;
  }
  return facts;
}

py::dict facts_of(const ExpertForwardPlan& plan) {
  return with_workspace(facts_of(plan.token_pass), plan);
}

py::dict facts_of(const ExpertBackwardPlan& plan) {
  py::dict facts = facts_of(plan.token_pass);
  if (plan.token_pass.strategy == TokenPassStrategy::kBands) {
    facts["schedule"] = "bands";
  } else {
    facts["schedule"] = plan.schedule.by_counting ? "counting" : "radix_sort";
  }
  return with_workspace(facts, plan);
}

py::dict facts_of(const GatedActivationPlan& plan) {
  py::dict facts;
  facts["uses_vectors"] = plan.uses_vectors;
  facts["is_one_row"] = plan.is_one_row;
  return with_workspace(facts, plan);
}

py::dict facts_of(const GatedLinearPlan& plan) {
  py::dict facts;
  facts["num_token_tiles"] = plan.num_token_tiles;
  facts["num_col_tiles"] = plan.num_col_tiles;
  facts["num_clusters"] = plan.num_clusters;
  return with_workspace(facts, plan);
}

// None: the kernel does not take these operands, or not on this device.
template <typename Plan>
py::object facts_of(const std::optional<Plan>& plan) {
  if (!plan) return py::none();
  return facts_of(*plan);
}

// ---- Plans of the ops --------------------------------------------------------------------------

// Operands are taken to start at multiples of 16 bytes and to be dense, as PyTorch allocates them;
// a null pointer counts as aligned.

py::dict plan_router(int64_t num_tokens, int64_t num_rows, int64_t num_cols,
                     int64_t num_experts_per_token, const std::string& dtype, const py::dict& gpu) {
  const DeviceInfo device = device_of(gpu);
  RouterForwardParams forward{};
  forward.num_tokens = num_tokens;
  forward.num_rows = num_rows;
  forward.num_cols = num_cols;
  forward.num_experts_per_token = num_experts_per_token;
  forward.dtype = dtype_of(dtype);
  forward.score = RouterScore::kSoftmax;
  RouterBackwardParams backward{};
  backward.num_tokens = num_tokens;
  backward.num_rows = num_rows;
  backward.num_cols = num_cols;
  backward.num_experts_per_token = num_experts_per_token;
  backward.dtype = forward.dtype;
  backward.score = forward.score;
  py::dict plans;
  plans["router_forward"] = facts_of(plan_router_forward(forward, device));
  plans["router_backward"] = facts_of(plan_router_backward(backward, device));
  return plans;
}

py::dict plan_router_logits(int64_t num_tokens, int64_t hidden_size, int64_t num_rows,
                            int64_t num_cols, const std::string& dtype, const py::dict& gpu) {
  const DeviceInfo device = device_of(gpu);
  RouterLogitsForwardParams forward{};
  forward.num_tokens = num_tokens;
  forward.num_rows = num_rows;
  forward.num_cols = num_cols;
  forward.hidden_size = hidden_size;
  forward.logits_stride = num_rows + num_cols;
  forward.dtype = dtype_of(dtype);
  forward.stats_dtype = DType::kFloat32;
  forward.training = true;
  BatchNormBackwardParams backward{};
  backward.num_tokens = num_tokens;
  backward.num_rows = num_rows;
  backward.num_cols = num_cols;
  backward.dtype = forward.dtype;
  backward.training = true;
  py::dict plans;
  plans["router_logits_forward"] = facts_of(plan_router_logits_forward(forward, device));
  plans["batch_norm_forward"] = facts_of(plan_batch_norm_forward(forward, device));
  plans["batch_norm_backward"] = facts_of(plan_batch_norm_backward(backward, device));
  return plans;
}

py::dict plan_topk_router(int64_t num_tokens, int64_t num_experts, int64_t num_experts_per_token,
                          const std::string& dtype, const py::dict& gpu) {
  const DeviceInfo device = device_of(gpu);
  TopKRouterForwardParams forward{};
  TopKRouterBackwardParams backward{};
  const auto set_sizes = [&](auto&... params) {
    ((params.num_tokens = num_tokens), ...);
    ((params.num_experts = num_experts), ...);
    ((params.num_experts_per_token = num_experts_per_token), ...);
    ((params.dtype = dtype_of(dtype)), ...);
  };
  set_sizes(forward, backward);
  ExpertSlotsParams slots{};
  slots.num_pairs = num_tokens * num_experts_per_token;
  slots.num_experts = num_experts;
  py::dict plans;
  plans["topk_router_forward"] = facts_of(plan_topk_router_forward(forward, device));
  plans["topk_router_backward"] = facts_of(plan_topk_router_backward(backward, device));
  plans["expert_slots"] = facts_of(plan_expert_slots(slots, device));
  return plans;
}

py::dict plan_expert(int64_t num_tokens, int64_t hidden_size, int64_t num_experts,
                     int64_t num_experts_per_token, int64_t num_cols, const std::string& dtype,
                     const py::dict& gpu) {
  const DeviceInfo device = device_of(gpu);
  const ExpertShape shape{.num_tokens = num_tokens,
                          .hidden_size = hidden_size,
                          .num_experts = num_experts,
                          .num_experts_per_token = num_experts_per_token,
                          .dtype = dtype_of(dtype),
                          .index_type = IndexType::kInt32,
                          .activation = Activation::kSilu,
                          .num_cols = num_cols};
  py::dict plans;
  plans["expert_forward"] = facts_of(plan_expert_forward(ExpertForwardParams{shape}, device));
  plans["expert_backward"] = facts_of(plan_expert_backward(ExpertBackwardParams{shape}, device));
  return plans;
}

py::dict plan_mlp(int64_t num_tokens, int64_t hidden_size, int64_t intermediate_size,
                  const std::string& dtype, const py::dict& gpu) {
  const DeviceInfo device = device_of(gpu);
  GatedLinearForwardParams forward{};
  GatedLinearBackwardParams backward{};
  GatedActivationForwardParams activation{};
  GatedActivationBackwardParams activation_backward{};
  const auto set_sizes = [&](auto&... params) {
    ((params.num_tokens = num_tokens), ...);
    ((params.intermediate_size = intermediate_size), ...);
    ((params.dtype = dtype_of(dtype)), ...);
  };
  set_sizes(forward, backward, activation, activation_backward);
  forward.hidden_size = backward.hidden_size = hidden_size;
  activation.gate_stride = activation.up_stride = intermediate_size;
  activation_backward.gate_stride = activation_backward.up_stride = intermediate_size;
  activation_backward.grad_gate_stride = activation_backward.grad_up_stride = intermediate_size;
  py::dict plans;
  plans["gated_linear_forward"] = facts_of(plan_gated_linear_forward(forward, device));
  plans["gated_linear_backward"] = facts_of(plan_gated_linear_backward(backward, device));
  plans["gated_activation_forward"] = facts_of(plan_gated_activation_forward(activation));
  plans["gated_activation_backward"] =
      facts_of(plan_gated_activation_backward(activation_backward));
  return plans;
}

}  // namespace

void add_plans(py::module_& m) {
  m.def("gpu_properties", &gpu_properties, py::arg("index"),
        "What plans read of a CUDA device, as the fields of omni_moe.GpuProperties.");
  const auto define = [&](const char* name, auto* function, auto... arguments) {
    m.def(name, function, py::kw_only(), arguments..., py::arg("dtype"), py::arg("gpu"),
          "The kernels of an op by name, and the numbers of their plans; see omni_moe.plan.");
  };
  const py::arg tokens("num_tokens"), hidden("hidden_size"), rows("num_rows"), cols("num_cols"),
      k("num_experts_per_token");
  define("plan_router", plan_router, tokens, rows, cols, k);
  define("plan_router_logits", plan_router_logits, tokens, hidden, rows, cols);
  define("plan_topk_router", plan_topk_router, tokens, py::arg("num_experts"), k);
  define("plan_expert", plan_expert, tokens, hidden, py::arg("num_experts"), k,
         py::arg("num_cols"));
  define("plan_mlp", plan_mlp, tokens, hidden, py::arg("intermediate_size"));
}

}  // namespace omni_moe::torch_api
