// Token pass by bands: what it takes, and how large its lists may become, from shapes alone. Host
// code that needs no CUDA toolkit; bands.h says what a band is.
#pragma once

#include <cstddef>
#include <cstdint>

namespace omni_moe::cuda {

struct TokenPassShape;
struct ExpertDeviceInfo;

// Constants of the band kernels that plans, launchers and tests share.
struct BandTuning {
  static constexpr int kTileTasks = 256;     // tasks of one band that a cluster multiplies at once
  static constexpr int kMaxLength = 512;     // of a band: its coefficients stay in shared memory
  static constexpr int kMaxHidden = 8192;    // 16-byte pieces of a row that a thread of the sum has
  static constexpr int kMaxPairs = 16384;    // K: a token's ids stay in shared memory
  static constexpr int kLengthPerPair = 80;  // see min_pairs below
};

struct BandPlan {
  int num_rows;   // R
  int num_cols;   // C
  int max_tasks;  // of a token; the pairs of further bands go to its tail
  // Bands with fewer pairs make no task. A task costs 4 H FLOP for each expert of the band, a pair
  // in the tail 4 H bytes out of L2 or memory: at 600 TFLOP/s and 4 to 8 TB/s one pair of the tail
  // is worth 75 to 150 experts of a task.
  int min_pairs;
};

// Whether the kernels take this shape: a grid, 16-bit elements, rows of whole 16-byte pieces.
bool bands_support(const TokenPassShape& shape);

// Of a shape that bands_support.
BandPlan plan_bands(const TokenPassShape& shape);

// Predicted µs of a pass of a router's ids, by bands and by gathering every pair.
double predicted_band_us(const TokenPassShape& shape, const ExpertDeviceInfo& device);
double predicted_gather_us(const TokenPassShape& shape, const ExpertDeviceInfo& device);

// Whether bands are expected to be faster by a margin that the prediction's errors do not reach.
bool bands_pay(const TokenPassShape& shape, const ExpertDeviceInfo& device);

size_t band_workspace_bytes(const TokenPassShape& shape, const BandPlan& plan);

}  // namespace omni_moe::cuda
