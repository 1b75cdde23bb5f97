// What this library was built with, for error messages and bug reports.
#pragma once

#include <string>

namespace omni_moe::torch_api {

struct BuildInfo {
  std::string version;             // of omni_moe
  std::string torch_version;       // the torch it was compiled against
  std::string cuda_version;        // of nvcc; empty without CUDA
  std::string cuda_architectures;  // as given to CMake; empty without CUDA
  std::string hopper_kernels;      // "yes" or "no": compiled for sm_90a
  std::string compiler;
  std::string cpu_capability;  // the CPU kernels this processor runs
};

BuildInfo build_info();

}  // namespace omni_moe::torch_api
