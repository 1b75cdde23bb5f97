// A token pass by its plan.
#pragma once

#include "common/check.h"
#include "expert_columns.cuh"
#include "expert_phased.cuh"
#include "expert_slabs.cuh"
#include "plan.h"
#include "token_pass.cuh"
#include "tuning.h"

namespace omni_moe::cuda {

// `workspace` holds token_pass_workspace_floats(shape, plan); `beside_previous`: see launch_slabs.
template <class T, class Pairs>
cudaError_t launch_token_pass(const TokenPassArgs& args, const Pairs& pairs,
                              const TokenPassPlan& plan, bool is_aligned, float* workspace,
                              bool beside_previous, const DeviceInfo& device, cudaStream_t stream) {
  switch (plan.strategy) {
    case TokenPassStrategy::kPhased:
      return launch_phased<T>(args, pairs, plan, is_aligned, workspace, stream);
    case TokenPassStrategy::kColumns:
      return args.hidden_size * sizeof(T) <= 2048
                 ? launch_columns<T, ColumnsTuning<2048>>(args, pairs, device, stream)
                 : launch_columns<T, ColumnsTuning<4096>>(args, pairs, device, stream);
    case TokenPassStrategy::kSlabs:
      return plan.slab_bytes == 512 ? launch_slabs<T, SlabTuning<512>>(
                                          args, pairs, workspace, beside_previous, device, stream)
                                    : launch_slabs<T, SlabTuning<256>>(
                                          args, pairs, workspace, beside_previous, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace omni_moe::cuda
