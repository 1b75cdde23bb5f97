// CUB's scan over a warp, which finds the lanes below in the shuffle's own predicate: a comparison
// of lane numbers at each step costs 8 to 88 instructions more in the kernels that use it.
#pragma once

#include <cub/warp/warp_scan.cuh>

namespace omni_moe::cuda {

// Sum over lanes 0 … the caller's. All lanes call it.
__device__ __forceinline__ unsigned warp_inclusive_scan(unsigned value) {
  using Scan = cub::WarpScan<unsigned>;
  typename Scan::TempStorage unused;  // a scan over 32 lanes needs no memory
  Scan(unused).InclusiveSum(value, value);
  return value;
}

}  // namespace omni_moe::cuda
