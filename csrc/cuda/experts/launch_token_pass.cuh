// Launches a token pass by its plan.
#pragma once

#include "cuda/common/check.h"
#include "cuda/experts/bands/band_pass.cuh"
#include "cuda/experts/expert_plan.h"
#include "cuda/experts/expert_tuning.h"
#include "cuda/experts/fused.cuh"
#include "cuda/experts/l2_tiled.cuh"
#include "cuda/experts/token_pass.cuh"
#include "cuda/experts/two_phase.cuh"

namespace omni_moe::cuda {

// `workspace` holds token_pass_workspace_floats(shape, plan); `beside_previous`: see
// launch_l2_tiled.
template <class T, class Pairs>
cudaError_t launch_token_pass(const TokenPassArgs& args, const Pairs& pairs,
                              const TokenPassPlan& plan, bool is_aligned, float* workspace,
                              bool beside_previous, const DeviceInfo& device, cudaStream_t stream) {
  switch (plan.strategy) {
    case TokenPassStrategy::kTwoPhase:
      return launch_two_phase<T>(args, pairs, plan, is_aligned, workspace, stream);
    case TokenPassStrategy::kFused:
      return args.hidden_size * sizeof(T) <= 2048
                 ? launch_fused<T, FusedTuning<2048>>(args, pairs, device, stream)
                 : launch_fused<T, FusedTuning<4096>>(args, pairs, device, stream);
    case TokenPassStrategy::kL2Tiled:
      return plan.tile_bytes == 512 ? launch_l2_tiled<T, L2TileTuning<512>>(
                                          args, pairs, workspace, beside_previous, device, stream)
                                    : launch_l2_tiled<T, L2TileTuning<256>>(
                                          args, pairs, workspace, beside_previous, device, stream);
    case TokenPassStrategy::kBands:
      return device.has_hopper_kernels
                 ? launch_bands<T>(args, pairs, plan.bands, workspace, device, stream)
                 : cudaErrorNotSupported;
  }
  return cudaErrorInvalidValue;
}

}  // namespace omni_moe::cuda
