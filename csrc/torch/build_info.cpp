#include "build_info.h"

#include <torch/headeronly/version.h>

#include "omni_moe/cpu.h"

namespace omni_moe::torch_api {

BuildInfo build_info() {
  return {OMNI_MOE_VERSION,         TORCH_VERSION,
          OMNI_MOE_CUDA_VERSION,    OMNI_MOE_CUDA_ARCHITECTURES,
          OMNI_MOE_HOPPER_KERNELS,  "g++ " __VERSION__,
          cpu::kernels().capability};
}

}  // namespace omni_moe::torch_api
