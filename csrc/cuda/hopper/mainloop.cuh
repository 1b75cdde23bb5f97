// Matrix products of a warpgroup over a ring of stages that TMA fills: what the Hopper kernels have
// in common. sm_90a.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/reduce.cuh"
#include "cuda/hopper/mbarrier.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/hopper/wgmma.cuh"

namespace omni_moe::cuda {

inline constexpr int kStageDepth = 64;
static_assert(kStageDepth * 2 == kSwizzleRowBytes);

inline constexpr int kCluster = 2;  // blocks that share tiles of the weights

// d = a(stage) b(stage), summed over num_stages stages from `ring` on. Shared has barriers
// full[kStages], for copies into a stage, and empty[kStages], for the warps of the cluster that
// have read it: a stage goes back once the next one's products have been issued, so that the tensor
// cores always have work.
template <class T, WgmmaMajor kMajorB, int kTileRowsB, class Shared, int kStages, int kRegisters,
          class A, class B>
__device__ __forceinline__ void run_mainloop(Shared& shared, int num_stages,
                                             RingCursor<kStages>& ring, float (&d)[kRegisters],
                                             A a_tile, B b_tile) {
  constexpr WgmmaMajor kMajorA = WgmmaMajor::kDepth;
  const auto release = [&](int stage) {
    const int lane = threadIdx.x % kWarpSize;
    if (lane < kCluster) mbarrier_arrive_remote(&shared.empty[stage], lane);
  };
  int last_stage = 0;
  for (int k = 0; k < num_stages; ++k, ring.advance()) {
    const int stage = ring.stage;
    mbarrier_wait(&shared.full[stage], ring.parity);
    const uint64_t a = wgmma_descriptor<kMajorA, kWgmmaRows>(a_tile(stage));
    const uint64_t b = wgmma_descriptor<kMajorB, kTileRowsB>(b_tile(stage));
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kStageDepth / kWgmmaDepth; ++step) {
      wgmma<T, kMajorB>(d, a + step * kWgmmaDepthStep<kMajorA, kWgmmaRows>,
                        b + step * kWgmmaDepthStep<kMajorB, kTileRowsB>, k > 0 || step > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (k > 0) release(last_stage);
    last_stage = stage;
  }
  wgmma_wait<0>();
  wgmma_use(d);
  release(last_stage);
}

}  // namespace omni_moe::cuda
