// omni_moe._C: build facts, the kernel plan and debug switches for Python. Ops do not pass through
// here.
#include <pybind11/pybind11.h>

#include "backend.h"
#include "build_info.h"
#include "checks.h"
#include "cuda/experts/expert_plan.h"

namespace {

pybind11::dict build_info() {
  const auto info = omni_moe::torch_api::build_info();
  pybind11::dict facts;
  facts["version"] = info.version;
  facts["torch_version"] = info.torch_version;
  facts["cuda_version"] = info.cuda_version;
  facts["cuda_architectures"] = info.cuda_architectures;
  facts["hopper_kernels"] = info.hopper_kernels;
  facts["compiler"] = info.compiler;
  facts["cpu_capability"] = info.cpu_capability;
  return facts;
}

// The strategy of a token pass and the numbers that it uses.
pybind11::dict expert_plan(int64_t num_tokens, int64_t hidden_size, int64_t num_experts,
                           int64_t num_experts_per_token, size_t element_size, int num_sms,
                           int compute_capability, int shared_bytes_per_sm,
                           int shared_bytes_per_block, int l2_bytes) {
  using omni_moe::cuda::TokenPassStrategy;
  const bool rows_are_aligned = hidden_size * element_size % 16 == 0;
  const omni_moe::cuda::TokenPassShape shape{
      num_tokens, hidden_size, num_experts, num_experts_per_token, element_size, rows_are_aligned};
  const omni_moe::cuda::ExpertDeviceInfo device{
      {num_sms, compute_capability, shared_bytes_per_sm, shared_bytes_per_block}, l2_bytes};
  const auto plan = plan_token_pass(shape, device);
  pybind11::dict facts;
  facts["strategy"] = name(plan.strategy);
  switch (plan.strategy) {
    case TokenPassStrategy::kTwoPhase:
      facts["threads"] = plan.threads;
      facts["num_splits"] = plan.num_splits;
      facts["pairs_per_split"] = plan.pairs_per_split;
      break;
    case TokenPassStrategy::kFused:
      break;
    case TokenPassStrategy::kL2Tiled:
      facts["tile_bytes"] = plan.tile_bytes;
      break;
    case TokenPassStrategy::kBands:
      facts["max_tasks"] = plan.bands.max_tasks;
      facts["min_pairs"] = plan.bands.min_pairs;
      break;
  }
  facts["workspace_bytes"] = sizeof(float) * token_pass_workspace_floats(shape, plan);
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.doc() = "Build facts of omni_moe. The ops live in torch.ops.omni_moe.";
  m.def("build_info", &build_info,
        "What the library was built with: versions of omni_moe, torch and CUDA (empty without "
        "CUDA), compiled GPU architectures, compiler, and the CPU kernels in use.");
  m.def("expert_plan", &expert_plan, py::kw_only(), py::arg("num_tokens"), py::arg("hidden_size"),
        py::arg("num_experts"), py::arg("num_experts_per_token"), py::arg("element_size"),
        py::arg("num_sms"), py::arg("compute_capability"), py::arg("shared_bytes_per_sm"),
        py::arg("shared_bytes_per_block"), py::arg("l2_bytes"),
        "The CUDA kernel that an expert pass runs; see omni_moe.expert_plan.");
  m.def("begin_index_checks", &omni_moe::torch_api::begin_index_checks,
        "Begins a scope of omni_moe.check_indices.");
  m.def("end_index_checks", &omni_moe::torch_api::end_index_checks,
        "Ends one; the checks stay on until every scope has ended.");
  m.def("index_checks_are_on", &omni_moe::torch_api::index_checks_are_on,
        "Whether expert ids on the GPU are checked on the host.");
  m.def("set_early_launch", &omni_moe::torch_api::set_early_launch, py::arg("allowed"),
        "For tests: whether CUDA kernels may start before the kernel in front of them has ended; "
        "returns what was set before.");
  m.def("has_early_launch", &omni_moe::torch_api::has_early_launch,
        "Whether they do, in the code that the current device runs.");
  m.def("has_hopper_kernels", &omni_moe::torch_api::has_hopper_kernels,
        "Whether that code has the kernels of Hopper's own instructions.");
}
