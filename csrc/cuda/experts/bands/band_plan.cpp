// When the bands take a shape and when they pay; see band_plan.h.
#include "cuda/experts/bands/band_plan.h"

#include <algorithm>
#include <cmath>

#include "cuda/experts/bands/band_lists.h"
#include "cuda/experts/expert_plan.h"

namespace omni_moe::cuda {
namespace {

// Tasks of a token on average, where its ids are the staircase of normal logits: with K 16 there
// are 2.7 on 64 x 64, and with K 128, 512 and 4096 on 320 x 320 there are 9.7, 20.4 and 66.7.
double expected_tasks(const TokenPassShape& shape) {
  const double bands = static_cast<double>(shape.num_cols + shape.num_experts / shape.num_cols);
  return std::min(0.95 * std::sqrt(static_cast<double>(shape.num_experts_per_token)), bands);
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
  plan.min_pairs = BandTuning::kMinPairs;
  // A quarter more than a staircase has on average, and a few for small K.
  const int64_t k = shape.num_experts_per_token;
  const auto wanted = static_cast<int64_t>(1.25 * std::sqrt(static_cast<double>(k))) + 5;
  plan.max_tasks =
      static_cast<int>(std::min({wanted, k, static_cast<int64_t>(plan.num_rows) + plan.num_cols}));
  return plan;
}

// Fitted to twelve shapes of T 256 to 16384, 64 x 64 to 320 x 320 and K 16 to 4096 at H 1024 in
// bf16 on an H100, which it meets within 16 %: 660 µs measured and 743 predicted at T 4096, 320 x
// 320, K 512, and 1970 and 1886 at K 4096.
double predicted_band_us(const TokenPassShape& shape, const DeviceInfo& device) {
  constexpr double kLaunches = 39;
  constexpr double kPerTableByte = 0.448e-6;  // both tables, for rows and for columns: 2.2 TB/s
  constexpr double kPerTaskByte = 1.06e-6;    // of a token's row: gathered, written and read
  constexpr double kPerPair = 54e-6;
  constexpr double kPerToken = 5.9e-3;
  constexpr double kSms = 132;
  const double row_bytes = static_cast<double>(shape.hidden_size) * shape.element_size;
  const double tokens = static_cast<double>(shape.num_tokens);
  const double pairs = tokens * static_cast<double>(shape.num_experts_per_token);
  const double tables = 4.0 * static_cast<double>(shape.num_experts) * row_bytes;
  const double tasks = tokens * expected_tasks(shape) * row_bytes;
  return kLaunches + kSms / device.num_sms *
                         (kPerTableByte * tables + kPerTaskByte * tasks + kPerPair * pairs +
                          kPerToken * tokens);
}

double predicted_gather_us(const TokenPassShape& shape, const DeviceInfo& device) {
  // In bytes of a µs and an SM, where 256 bytes of every expert fit L2 and where not. These are
  // rates of an H200, 8.5 and 5.6 TB/s, while an H100 reaches 8.5 and 3.7: there bands pay earlier.
  constexpr double kFromL2 = 6.0e4;
  constexpr double kFromMemory = 4.2e4;
  const double bytes = 2.0 * static_cast<double>(shape.num_tokens) * shape.num_experts_per_token *
                       shape.hidden_size * shape.element_size;
  const bool tile_fits = 256.0 * shape.num_experts <= 0.35 * device.l2_bytes;
  return bytes / ((tile_fits ? kFromL2 : kFromMemory) * device.num_sms);
}

bool bands_pay(const TokenPassShape& shape, const DeviceInfo& device) {
  constexpr double kMargin = 1.5;
  return device.has_hopper_kernels && bands_support(shape) &&
         kMargin * predicted_band_us(shape, device) < predicted_gather_us(shape, device);
}

BandShape band_shape(const TokenPassShape& shape, const BandPlan& plan) {
  return {static_cast<int>(shape.num_tokens), static_cast<int>(shape.num_experts_per_token),
          static_cast<int>(shape.num_experts), plan};
}

size_t band_workspace_bytes(const TokenPassShape& shape, const BandPlan& plan) {
  return cut_band_workspace(band_shape(shape, plan), shape.hidden_size, nullptr).size;
}

}  // namespace omni_moe::cuda
