// Launches, and the order of memory between kernels that overlap, which on sm_90 and later
// programmatic dependent launch allows.
//
// A kernel that is launched early may start before the kernel in front of it has ended, which hides
// the launch: that saves 1.5 to 2 µs where kernels are short. Three rules keep the numbers right:
//
// 1. In a kernel launched early at least one thread waits before the grid ends, and every thread
//    waits before it reads what earlier kernels wrote or writes what they use. Then "this grid has
//    ended" implies "all earlier grids have ended", back to the last plain launch, memset or event.
// 2. It reads with coherent loads. ld.global.nc is for data that nothing writes while the kernel
//    runs, and compilers may move it up across the wait.
// 3. The attribute is set only where the code that runs on the device has the wait
//    (DeviceInfo::has_early_launch): a kernel launched early without one reads what the kernel in
//    front of it has not written yet.
//
// tests/python/test_early_launch.py holds the machine code against this table:
//
//   kernel                        launched  trigger        global memory before the wait
//   router_logits_forward         early     after barrier  -
//   router_forward_warp           early     first          -
//   router_forward_unsorted       early     first          -
//   topk_router_forward_warp      early     first          -
//   topk_router_forward_block     early     first          -
//   topk_router_backward          early     first          -
//   scan_block_counts             early     first          -
//   expert_slots_count            early     first          -
//   expert_slots_place            early     first          -
//   expert_rows_count             early     first          -
//   expert_rows_place             early     first          -
//   permute                       early     first          -
//   unpermute                     early     first          -
//   unpermute_backward            early     first          -
//   expert_l2_tiled_dots          early     after wait     - (beside_previous, below: ids, rows,
//                                                            partial dots)
//   expert_l2_tiled_coefficients  early     first          -
//   expert_l2_tiled_sum           early     first          ids, first rows
//   expert_fused                  early     -              -
//   allocate_segments             early     first          -
//   place_pairs                   early     first          -
//   order_segments                early     first          -
//   weight_grad                   early     first          -
//   weight_grad_combine           early     -              -
//   gated_linear_forward          early     -              -
//   gated_linear_backward         early     -              -
//   count_pairs                   plain     first
//   batch_norm_*                  plain     after barrier
//   all others                    plain     -
//
// expert_l2_tiled_sum reads ids and rows before it waits. They are complete: expert_l2_tiled_dots,
// which is launched two kernels before, triggers only after it has waited for the kernels that
// wrote them. The backward's expert_l2_tiled_dots runs beside the kernels of the schedule, waits at
// its end, and writes its partial dots before: the memset in front of the schedule is a full
// barrier, so all that it reads, and the earlier users of the memory that it writes, are complete.
#pragma once

#include <cuda_runtime.h>

#include <array>

#include "cuda/common/check.h"

namespace omni_moe::cuda {

// Returns when the earlier kernels have ended. In a kernel launched early, every thread calls this
// that reads what earlier kernels wrote or writes what they read.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Lets the blocks of the next kernel start, if it is launched early, as soon as all blocks of this
// one have called this or ended; they take the room that those leave free.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#ifdef OMNI_MOE_WIDE_EARLY_LAUNCH
  // For tests: blocks end up to 150 µs after they have let the next kernel start.
  for (unsigned i = 0; i < blockIdx.x % 4 * 50; ++i) __nanosleep(1000);
#endif
#endif
}

struct LaunchOptions {
  dim3 blocks;
  unsigned threads;
  size_t shared_bytes = 0;
  unsigned cluster_blocks = 1;
  bool is_cooperative = false;
  bool is_early = false;
};

template <class... Params, class... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), const LaunchOptions& options,
                          cudaStream_t stream, const Args&... args) {
  std::array<cudaLaunchAttribute, 3> attributes{};
  cudaLaunchConfig_t config{};
  config.gridDim = options.blocks;
  config.blockDim = dim3(options.threads);
  config.dynamicSmemBytes = options.shared_bytes;
  config.stream = stream;
  config.attrs = attributes.data();
  if (options.cluster_blocks > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {options.cluster_blocks, 1, 1};
  }
  if (options.is_early) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (options.is_cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  return clear_failure(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

// For kernels of the table above.
template <class... Params, class... Args>
cudaError_t launch_early(void (*kernel)(Params...), LaunchOptions options, const DeviceInfo& device,
                         cudaStream_t stream, const Args&... args) {
  options.is_early = device.has_early_launch;
  return launch_kernel(kernel, options, stream, args...);
}
template <class... Params, class... Args>
cudaError_t launch_early(void (*kernel)(Params...), unsigned blocks, unsigned threads,
                         const DeviceInfo& device, cudaStream_t stream, const Args&... args) {
  return launch_early(kernel, LaunchOptions{dim3(blocks), threads}, device, stream, args...);
}

}  // namespace omni_moe::cuda
