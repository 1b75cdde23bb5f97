// Sums by a warp into slots of memory, in an order that does not change from run to run.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/reduce.cuh"

namespace omni_moe::cuda {

// Does sums[slot] += value for the lanes with slot >= 0; lanes of one slot add in lane order.
__device__ __forceinline__ void warp_add_in_order(float* sums, int slot, float value) {
  const int lane = threadIdx.x % kWarpSize;
  const unsigned peers = __match_any_sync(kFullWarp, slot);
  const int turn = slot < 0 ? -1 : __popc(peers & ((1u << lane) - 1));
  const int last_turn = __reduce_max_sync(kFullWarp, turn);
  for (int now = 0; now <= last_turn; ++now) {
    if (turn == now) sums[slot] += value;
    __syncwarp();
  }
}

}  // namespace omni_moe::cuda
