#include "module_plans.h"

#include <optional>
#include <string>

#include "backend.h"
#include "omni_moe/cuda_plan.h"

namespace omni_moe::torch_api {

namespace {

namespace py = pybind11;
using namespace cuda;
using namespace py::literals;

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
  return py::dict("num_sms"_a = device.num_sms, "l2_bytes"_a = device.l2_bytes,
                  "shared_bytes_per_block"_a = device.shared_bytes_per_block,
                  "has_cooperative_launch"_a = device.has_cooperative_launch,
                  "has_early_launch"_a = device.has_early_launch,
                  "has_hopper_kernels"_a = device.has_hopper_kernels);
}

// ---- What a plan says, in the numbers that its kernel uses -------------------------------------

py::dict numbers_of(const RouterForwardPlan& plan) {
  if (plan.kernel == RouterForwardKernel::kBlock) {
    return py::dict("kernel"_a = "block", "lists_in_shared"_a = plan.lists_in_shared,
                    "num_blocks"_a = plan.num_blocks);
  }
  if (plan.kernel == RouterForwardKernel::kUnsorted) {
    return py::dict("kernel"_a = "unsorted", "items_per_lane"_a = plan.items_per_lane,
                    "list_bytes"_a = plan.list_bytes, "num_blocks"_a = plan.num_blocks);
  }
  return py::dict("kernel"_a = "warp", "items_per_lane"_a = plan.items_per_lane,
                  "sort_width"_a = plan.sort_width, "num_blocks"_a = plan.num_blocks);
}

py::dict numbers_of(const RouterBackwardPlan& plan) {
  return py::dict("warps_per_token"_a = plan.warps_per_token,
                  "sums_in_shared"_a = plan.sums_in_shared, "num_blocks"_a = plan.num_blocks);
}

py::dict numbers_of(const RouterLogitsForwardPlan& plan) {
  return py::dict("token_tiles"_a = plan.token_tiles, "panels"_a = plan.panels);
}

py::dict numbers_of(const TopKRouterForwardPlan& plan) {
  if (plan.kernel == TopKRouterForwardKernel::kBlock) {
    return py::dict("kernel"_a = "block", "num_blocks"_a = plan.num_blocks);
  }
  return py::dict("kernel"_a = "warp", "items_per_lane"_a = plan.items_per_lane,
                  "num_blocks"_a = plan.num_blocks);
}

py::dict numbers_of(const TopKRouterBackwardPlan& plan) {
  return py::dict("warps_per_block"_a = plan.warps_per_block, "num_blocks"_a = plan.num_blocks);
}

py::dict numbers_of(const ExpertSlotsPlan& plan) {
  return py::dict("pairs_per_block"_a = plan.pairs_per_block, "num_blocks"_a = plan.num_blocks);
}

py::dict numbers_of(const ExpertRowsPlan& plan) {
  return py::dict("pairs_per_block"_a = plan.pairs_per_block, "num_blocks"_a = plan.num_blocks);
}

py::dict numbers_of(const PermutePlan& plan) {
  return py::dict("uses_vectors"_a = plan.uses_vectors, "threads_per_row"_a = plan.threads_per_row,
                  "num_blocks"_a = plan.num_blocks);
}

py::dict numbers_of(const BatchNormPlan& plan) {
  return py::dict("uses_vectors"_a = plan.uses_vectors, "num_panels"_a = plan.grid.num_panels,
                  "num_rounds"_a = plan.grid.num_rounds, "num_parts"_a = plan.grid.num_parts);
}

py::dict numbers_of(const TokenNormPlan& plan) {
  return py::dict("uses_vectors"_a = plan.uses_vectors);
}

py::dict numbers_of(const TokenPassPlan& plan) {
  switch (plan.strategy) {
    case TokenPassStrategy::kTwoPhase:
      return py::dict("strategy"_a = "two_phase", "threads"_a = plan.threads,
                      "num_splits"_a = plan.num_splits, "pairs_per_split"_a = plan.pairs_per_split);
    case TokenPassStrategy::kFused:
      return py::dict("strategy"_a = "fused");
    case TokenPassStrategy::kL2Tiled:
      return py::dict("strategy"_a = "l2_tiled", "tile_bytes"_a = plan.tile_bytes);
    case TokenPassStrategy::kBands:
      return py::dict("strategy"_a = "bands", "max_tasks"_a = plan.bands.max_tasks,
                      "min_pairs"_a = plan.bands.min_pairs);
  }
  return py::dict();
}

py::dict numbers_of(const ExpertForwardPlan& plan) { return numbers_of(plan.token_pass); }

py::dict numbers_of(const ExpertBackwardPlan& plan) {
  py::dict numbers = numbers_of(plan.token_pass);
  const bool is_bands = plan.token_pass.strategy == TokenPassStrategy::kBands;
  numbers["schedule"] = is_bands ? "bands" : plan.schedule.by_counting ? "counting" : "radix_sort";
  return numbers;
}

py::dict numbers_of(const GatedActivationPlan& plan) {
  return py::dict("uses_vectors"_a = plan.uses_vectors, "is_one_row"_a = plan.is_one_row);
}

py::dict numbers_of(const GatedLinearPlan& plan) {
  return py::dict("num_token_tiles"_a = plan.num_token_tiles,
                  "num_col_tiles"_a = plan.num_col_tiles, "num_clusters"_a = plan.num_clusters);
}

// The same and the size of the workspace, which every plan has.
template <typename Plan>
py::dict facts_of(const Plan& plan) {
  py::dict facts = numbers_of(plan);
  facts["workspace_bytes"] = plan.workspace_bytes;
  return facts;
}

// None: the kernel does not take these operands, or not on this device.
template <typename Plan>
py::object facts_of(const std::optional<Plan>& plan) {
  if (!plan) return py::none();
  return facts_of(*plan);
}

// ---- Plans of the ops --------------------------------------------------------------------------

// Operands are taken to start at multiples of 16 bytes and to be dense, as PyTorch allocates them;
// a null pointer counts as aligned. In each function `sized` gives Params the sizes that those of
// the op's kernels have in common.

py::dict plan_router(int64_t num_tokens, int64_t num_rows, int64_t num_cols,
                     int64_t num_experts_per_token, const std::string& dtype, const py::dict& gpu) {
  const DeviceInfo device = device_of(gpu);
  const auto sized = [&](auto params) {
    params.num_tokens = num_tokens;
    params.num_rows = num_rows;
    params.num_cols = num_cols;
    params.num_experts_per_token = num_experts_per_token;
    params.dtype = dtype_of(dtype);
    params.score = RouterScore::kSoftmax;
    return params;
  };
  const auto forward = sized(RouterForwardParams{});
  const auto backward = sized(RouterBackwardParams{});
  auto unsorted = forward;
  unsorted.sorted = false;
  return py::dict("router_forward"_a = facts_of(plan_router_forward(forward, device)),
                  "router_forward_unsorted"_a = facts_of(plan_router_forward(unsorted, device)),
                  "router_backward"_a = facts_of(plan_router_backward(backward, device)));
}

py::dict plan_router_logits(int64_t num_tokens, int64_t hidden_size, int64_t num_rows,
                            int64_t num_cols, const std::string& dtype, const py::dict& gpu) {
  const DeviceInfo device = device_of(gpu);
  const auto sized = [&](auto params) {
    params.num_tokens = num_tokens;
    params.num_rows = num_rows;
    params.num_cols = num_cols;
    params.dtype = dtype_of(dtype);
    params.training = true;
    return params;
  };
  auto forward = sized(RouterLogitsForwardParams{});
  forward.hidden_size = hidden_size;
  forward.logits_stride = num_rows + num_cols;
  forward.stats_dtype = DType::kFloat32;
  const auto backward = sized(BatchNormBackwardParams{});
  return py::dict("router_logits_forward"_a = facts_of(plan_router_logits_forward(forward, device)),
                  "batch_norm_forward"_a = facts_of(plan_batch_norm_forward(forward, device)),
                  "batch_norm_backward"_a = facts_of(plan_batch_norm_backward(backward, device)));
}

// The same on every device.
py::dict plan_router_logits_per_token(int64_t num_tokens, int64_t num_rows, int64_t num_cols,
                                      const std::string& dtype, const py::dict& /*gpu*/) {
  const auto sized = [&](auto params) {
    params.num_tokens = num_tokens;
    params.num_rows = num_rows;
    params.num_cols = num_cols;
    params.dtype = dtype_of(dtype);
    return params;
  };
  auto forward = sized(TokenNormForwardParams{});
  forward.logits_stride = num_rows + num_cols;
  const auto backward = sized(TokenNormBackwardParams{});
  return py::dict("token_norm_forward"_a = facts_of(plan_token_norm_forward(forward)),
                  "token_norm_backward"_a = facts_of(plan_token_norm_backward(backward)));
}

py::dict plan_topk_router(int64_t num_tokens, int64_t num_experts, int64_t num_experts_per_token,
                          const std::string& dtype, const py::dict& gpu) {
  const DeviceInfo device = device_of(gpu);
  const auto sized = [&](auto params) {
    params.num_tokens = num_tokens;
    params.num_experts = num_experts;
    params.num_experts_per_token = num_experts_per_token;
    params.dtype = dtype_of(dtype);
    return params;
  };
  const auto forward = sized(TopKRouterForwardParams{});
  const auto backward = sized(TopKRouterBackwardParams{});
  ExpertSlotsParams slots{};
  slots.num_pairs = num_tokens * num_experts_per_token;
  slots.num_experts = num_experts;
  return py::dict("topk_router_forward"_a = facts_of(plan_topk_router_forward(forward, device)),
                  "topk_router_backward"_a = facts_of(plan_topk_router_backward(backward, device)),
                  "expert_slots"_a = facts_of(plan_expert_slots(slots, device)));
}

// Of rows without a capacity.
py::dict plan_permutation(int64_t num_tokens, int64_t hidden_size, int64_t num_experts,
                          int64_t num_experts_per_token, const std::string& dtype,
                          const py::dict& gpu) {
  const DeviceInfo device = device_of(gpu);
  const PermuteShape shape{.num_tokens = num_tokens,
                           .num_rows = num_tokens * num_experts_per_token,
                           .hidden_size = hidden_size,
                           .num_experts_per_token = num_experts_per_token,
                           .num_experts = num_experts,
                           .is_padded = false,
                           .dtype = dtype_of(dtype),
                           .has_wide_weights = false};
  const ExpertRowsParams rows{.num_pairs = shape.num_rows, .num_experts = num_experts};
  return py::dict("expert_rows"_a = facts_of(plan_expert_rows(rows, device)),
                  "permute"_a = facts_of(plan_permute(PermuteParams{shape}, device)),
                  "unpermute"_a = facts_of(plan_unpermute(UnpermuteParams{shape}, device)),
                  "unpermute_backward"_a =
                      facts_of(plan_unpermute_backward(UnpermuteBackwardParams{shape}, device)));
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
  const ExpertForwardParams forward{shape};
  const ExpertBackwardParams backward{shape};
  return py::dict("expert_forward"_a = facts_of(plan_expert_forward(forward, device)),
                  "expert_backward"_a = facts_of(plan_expert_backward(backward, device)));
}

py::dict plan_mlp(int64_t num_tokens, int64_t hidden_size, int64_t intermediate_size,
                  const std::string& dtype, const py::dict& gpu) {
  const DeviceInfo device = device_of(gpu);
  const auto sized = [&](auto params) {
    params.num_tokens = num_tokens;
    params.intermediate_size = intermediate_size;
    params.dtype = dtype_of(dtype);
    return params;
  };
  auto linear = sized(GatedLinearForwardParams{});
  auto linear_backward = sized(GatedLinearBackwardParams{});
  linear.hidden_size = linear_backward.hidden_size = hidden_size;
  auto activation = sized(GatedActivationForwardParams{});
  activation.gate_stride = activation.up_stride = intermediate_size;
  auto activation_backward = sized(GatedActivationBackwardParams{});
  activation_backward.gate_stride = activation_backward.up_stride = intermediate_size;
  activation_backward.grad_gate_stride = activation_backward.grad_up_stride = intermediate_size;
  return py::dict(
      "gated_linear_forward"_a = facts_of(plan_gated_linear_forward(linear, device)),
      "gated_linear_backward"_a = facts_of(plan_gated_linear_backward(linear_backward, device)),
      "gated_activation_forward"_a = facts_of(plan_gated_activation_forward(activation)),
      "gated_activation_backward"_a =
          facts_of(plan_gated_activation_backward(activation_backward)));
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
  define("plan_router_logits_per_token", plan_router_logits_per_token, tokens, rows, cols);
  define("plan_topk_router", plan_topk_router, tokens, py::arg("num_experts"), k);
  define("plan_permute", plan_permutation, tokens, hidden, py::arg("num_experts"), k);
  define("plan_expert", plan_expert, tokens, hidden, py::arg("num_experts"), k,
         py::arg("num_cols"));
  define("plan_mlp", plan_mlp, tokens, hidden, py::arg("intermediate_size"));
}

}  // namespace omni_moe::torch_api
