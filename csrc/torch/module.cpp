// omni_moe._C: build facts, the kernels' plans and debug switches for Python. Ops do not pass
// through here.
#include <pybind11/pybind11.h>

#include "backend.h"
#include "build_info.h"
#include "checks.h"
#include "module_plans.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.doc() = "Build facts of omni_moe. The ops live in torch.ops.omni_moe.";
  m.def("build_info", &build_info,
        "What the library was built with: versions of omni_moe, torch and CUDA (empty without "
        "CUDA), compiled GPU architectures, compiler, and the CPU kernels in use.");
  omni_moe::torch_api::add_plans(m);
  m.def("begin_index_checks", &omni_moe::torch_api::begin_index_checks,
        "Begins a scope of omni_moe.check_indices.");
  m.def("end_index_checks", &omni_moe::torch_api::end_index_checks,
        "Ends one; the checks stay on until every scope has ended.");
  m.def("index_checks_are_on", &omni_moe::torch_api::index_checks_are_on,
        "Whether expert ids on the GPU are checked on the host.");
  m.def("set_early_launch", &omni_moe::torch_api::set_early_launch, py::arg("allowed"),
        "For tests: whether CUDA kernels may start before the kernel in front of them has ended; "
        "returns what was set before.");
}
