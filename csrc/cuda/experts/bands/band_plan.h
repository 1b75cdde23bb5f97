// Token pass by bands: what it takes, and how large its lists may become, from shapes alone. Host
// code that needs no CUDA toolkit; bands.h says what a band is.
#pragma once

#include <cstddef>
#include <cstdint>

#include "omni_moe/cuda_plan.h"

namespace omni_moe::cuda {

struct TokenPassShape;

// Constants of the band kernels that plans, launchers and tests share.
struct BandTuning {
  static constexpr int kTileTasks = 256;   // tasks of one band that a cluster multiplies at once
  static constexpr int kGroupTasks = 16;   // of P that the tensor cores take in one step
  static constexpr int kMaxLength = 512;   // of a band: its coefficients stay in shared memory
  static constexpr int kMaxHidden = 8192;  // 16-byte pieces of a row that a thread of the sum has
  static constexpr int kMaxPairs = 16384;  // K: a token's ids stay in shared memory
  // Bands with fewer pairs make no task, since a task costs 4 H FLOP for each expert of the band
  // and a partial output of 2 H bytes written and read, and a pair in the tail 4 H bytes read. Of 1
  // to 4 this is the best or within 2 % of it in all but one of the measured shapes (H100, µs at 1,
  // 2, 3 and 4: 710, 710, 714 and 725 at T 4096, 320 x 320, K 512; 662, 615, 545 and 544 at T
  // 16384, 256 x 256, K 32).
  static constexpr int kMinPairs = 3;
};

// Whether the kernels take this shape: a grid, 16-bit elements, rows of whole 16-byte pieces.
bool bands_support(const TokenPassShape& shape);

// Of a shape that bands_support.
BandPlan plan_bands(const TokenPassShape& shape);

// Predicted µs of a pass of a router's ids, by bands and by gathering every pair.
double predicted_band_us(const TokenPassShape& shape, const DeviceInfo& device);
double predicted_gather_us(const TokenPassShape& shape, const DeviceInfo& device);

// Whether bands are expected to be faster by a margin that the prediction's errors do not reach.
bool bands_pay(const TokenPassShape& shape, const DeviceInfo& device);

size_t band_workspace_bytes(const TokenPassShape& shape, const BandPlan& plan);

}  // namespace omni_moe::cuda
