// When the bands take a shape and when they pay; see band_plan.h.
#include "cuda/experts/bands/band_plan.h"

#include <algorithm>
#include <cmath>

#include "cuda/experts/bands/band_lists.h"
#include "cuda/experts/expert_plan.h"

namespace omni_moe::cuda {
namespace {

BandShape band_shape_of(const TokenPassShape& shape, const BandPlan& plan) {
  return {static_cast<int>(shape.num_tokens), static_cast<int>(shape.num_experts_per_token),
          static_cast<int>(shape.num_experts), plan};
}

// Tasks of a token on average, where its ids are the staircase of normal logits: with K 128, 512
// and 4096 on 320 x 320 there are 9.2, 19.6 and 66.
double expected_tasks(const TokenPassShape& shape) {
  const double bands = static_cast<double>(shape.num_cols + shape.num_experts / shape.num_cols);
  return std::min(0.9 * std::sqrt(static_cast<double>(shape.num_experts_per_token)), bands);
}

}  // namespace

bool bands_support(const TokenPassShape& shape) {
  const int64_t experts = shape.num_experts;
  const int64_t cols = shape.num_cols;
  const int64_t k = shape.num_experts_per_token;
  if (cols <= 0 || experts <= 0 || experts % cols != 0 || k <= 0 || shape.num_tokens <= 0) {
    return false;
  }
  const bool is_in_range = cols <= BandTuning::kMaxLength &&
                           experts / cols <= BandTuning::kMaxLength && k <= BandTuning::kMaxPairs &&
                           shape.hidden_size > 0 && shape.hidden_size <= BandTuning::kMaxHidden &&
                           shape.num_tokens <= INT32_MAX / (k + 64);  // pairs and tasks: 32 bits
  return is_in_range && shape.element_size == 2 && shape.is_aligned && shape.hidden_size % 8 == 0;
}

BandPlan plan_bands(const TokenPassShape& shape) {
  BandPlan plan{};
  plan.num_cols = static_cast<int>(shape.num_cols);
  plan.num_rows = static_cast<int>(shape.num_experts / shape.num_cols);
  const int length = std::max(plan.num_rows, plan.num_cols);
  plan.min_pairs = ceil_div(length, BandTuning::kLengthPerPair);
  // A quarter more than a staircase has on average, and a few for small K.
  const int64_t k = shape.num_experts_per_token;
  const auto wanted = static_cast<int64_t>(1.25 * std::sqrt(static_cast<double>(k))) + 5;
  plan.max_tasks =
      static_cast<int>(std::min({wanted, k, static_cast<int64_t>(plan.num_rows) + plan.num_cols}));
  return plan;
}

double predicted_band_us(const TokenPassShape& shape, const ExpertDeviceInfo& device) {
  constexpr double kLaunches = 40;      // µs of what does not grow with the tables
  constexpr double kFlopPerSm = 4.0e6;  // in a µs: 530 TFLOP/s of 132 SMs
  constexpr double kMemory = 2.8e6;     // bytes in a µs
  constexpr double kTileRows = 64;      // half of these are empty in a band's last tile
  const double row_bytes = static_cast<double>(shape.hidden_size) * shape.element_size;
  const double experts = static_cast<double>(shape.num_experts);
  const double cols = static_cast<double>(shape.num_cols);
  const double rows = experts / cols;
  const double tasks = static_cast<double>(shape.num_tokens) * expected_tasks(shape);
  const double multiplied = tasks + (rows + cols) * kTileRows / 2;
  const double flop = multiplied * std::max(rows, cols) * 4 * shape.hidden_size;
  const double products = flop / (kFlopPerSm * device.num_sms);
  // Both tables for rows and for columns, the partial outputs written; then read by the sum.
  const double memory = (4 * experts + tasks) * row_bytes / kMemory;
  return kLaunches + std::max(products, memory) + tasks * row_bytes / kMemory;
}

double predicted_gather_us(const TokenPassShape& shape, const ExpertDeviceInfo& device) {
  // In bytes of a µs and an SM, where 256 bytes of every expert fit L2 and where not; H200: 8.5 and
  // 5.6 TB/s measured.
  constexpr double kFromL2 = 6.0e4;
  constexpr double kFromMemory = 4.2e4;
  const double bytes = 2.0 * static_cast<double>(shape.num_tokens) * shape.num_experts_per_token *
                       shape.hidden_size * shape.element_size;
  const bool tile_fits = 256.0 * shape.num_experts <= 0.35 * device.l2_bytes;
  return bytes / ((tile_fits ? kFromL2 : kFromMemory) * device.num_sms);
}

bool bands_pay(const TokenPassShape& shape, const ExpertDeviceInfo& device) {
  constexpr double kMargin = 1.5;
  return device.has_hopper_code && bands_support(shape) &&
         kMargin * predicted_band_us(shape, device) < predicted_gather_us(shape, device);
}

size_t band_workspace_bytes(const TokenPassShape& shape, const BandPlan& plan) {
  return cut_band_workspace(band_shape_of(shape, plan), shape.hidden_size, nullptr).size;
}

}  // namespace omni_moe::cuda
