// omni_moe._C: build facts and debug switches for Python. Ops do not pass through here.
#include <pybind11/pybind11.h>

#include "build_info.h"
#include "checks.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of omni_moe. The ops live in torch.ops.omni_moe.";
  m.def(
      "build_info",
      [] {
        const auto info = omni_moe::torch_api::build_info();
        pybind11::dict facts;
        facts["version"] = info.version;
        facts["torch_version"] = info.torch_version;
        facts["cuda_version"] = info.cuda_version;
        facts["cuda_architectures"] = info.cuda_architectures;
        facts["compiler"] = info.compiler;
        facts["cpu_capability"] = info.cpu_capability;
        return facts;
      },
      "What the library was built with: versions of omni_moe, torch and CUDA (empty without CUDA), "
      "compiled GPU architectures, compiler, and the CPU kernels in use.");
  m.def("set_check_indices", &omni_moe::torch_api::set_check_indices, pybind11::arg("enabled"));
}
