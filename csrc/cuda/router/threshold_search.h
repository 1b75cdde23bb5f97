// The K-th largest sum x[row] + y[col] of two axes, of which y is sorted, found without listing the
// sums. No sum is NaN or +inf. Needs no CUDA toolkit: a warp runs these steps in
// router_forward_unsorted.cu, a loop in tests/cpp/test_router_threshold.cpp.
//
// A guess is counted row by row: how many of a row's sums reach it is a binary search over y, since
// fp32 addition is monotone. The count says on which side of the guess the K-th sum lies, and the
// sums next to the guess become the new bounds. Bounds are sums themselves, so that every guess
// excludes one at least, and ties at the K-th sum end the search as soon as both bounds meet there.
// Guesses interpolate the logarithm of the odds that a sum reaches a number, which is close to
// straight in both tails; every fourth halves the range of keys, which bounds their number for any
// logits. 320 × 320 normal logits take 5 to 7 guesses, adversarial ones under 130.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/common/operands.h"
#include "cuda/router/ordered_key.h"

namespace omni_moe::cuda {

// ---- Bounds -------------------------------------------------------------------------------------

class ThresholdSearch {
 public:
  static constexpr int kUnknown = 0;

  // At least k of num_pairs sums reach `low`, which is one of them: count_low of them, if that is
  // known. `high` is the largest.
  OMNI_MOE_HOST_DEVICE ThresholdSearch(int k, int num_pairs, float low, int count_low, float high)
      : k_(k),
        num_pairs_(num_pairs),
        count_low_(count_low),
        wanted_(log_odds(k)),
        low_{low, log_odds(count_low)},
        high_{high, log_odds(1)},
        previous_(high_),
        last_(high_) {}

  // The k best are those that reach low(), all of them or with only some of those that equal it.
  OMNI_MOE_HOST_DEVICE bool is_found() const { return low_.sum == high_.sum || !has_surplus(); }
  OMNI_MOE_HOST_DEVICE float low() const { return low_.sum; }
  // Whether more than k sums reach low(), or may.
  OMNI_MOE_HOST_DEVICE bool has_surplus() const { return count_low_ != k_; }
  // How many sums exceed the upper bound, which is low() where the search ended with a surplus.
  OMNI_MOE_HOST_DEVICE int count_above() const { return count_above_; }
  OMNI_MOE_HOST_DEVICE int num_guesses() const { return num_guesses_; }

  // low() < guess() <= upper bound.
  OMNI_MOE_HOST_DEVICE float guess() const {
    // A quarter of the way at first: about k normal or uniform sums reach that.
    float sum = low_.sum + 0.25f * (high_.sum - low_.sum);
    if (num_guesses_ > 0) {
      const bool are_counted = count_low_ != kUnknown && count_above_ > 0;
      sum = are_counted ? interpolate(low_, high_) : interpolate(previous_, last_);
    }
    const bool is_between = sum > low_.sum && sum <= high_.sum;  // false for NaN
    if (is_between && num_guesses_ % 4 != 3) return sum;
    const uint32_t key_high = ordered_key(high_.sum);
    return value_of_key(key_high - (key_high - ordered_key(low_.sum)) / 2);
  }

  // `count` sums reach the guess; of those between the bounds least_reaching is the least that
  // does, greatest_below the greatest that does not. Returns whether the lower bound moved.
  OMNI_MOE_HOST_DEVICE bool narrow(float guess, int count, float least_reaching,
                                   float greatest_below) {
    previous_ = last_;
    last_ = {guess, log_odds(count)};
    ++num_guesses_;
    if (count >= k_) {
      low_ = {least_reaching, last_.log_odds};
      count_low_ = count;
      return true;
    }
    high_ = {greatest_below, last_.log_odds};
    count_above_ = count;
    return false;
  }

 private:
  struct Point {
    float sum;
    float log_odds;  // that a sum reaches it
  };

  OMNI_MOE_HOST_DEVICE float log_odds(int count) const {
    return log2f(static_cast<float>(count) + 0.5f) -
           log2f(static_cast<float>(num_pairs_ - count) + 0.5f);
  }

  // The sum that k sums would reach if the logarithm were straight.
  OMNI_MOE_HOST_DEVICE float interpolate(const Point& a, const Point& b) const {
    return a.sum + (b.sum - a.sum) * ((wanted_ - a.log_odds) / (b.log_odds - a.log_odds));
  }

  int k_;
  int num_pairs_;
  int count_low_;
  int count_above_ = 0;
  int num_guesses_ = 0;
  float wanted_;
  Point low_;
  Point high_;
  Point previous_;
  Point last_;
};

// ---- Rows ---------------------------------------------------------------------------------------

// How many of x + y[first … last) reach a sum; y descends. Added to `first`.
OMNI_MOE_HOST_DEVICE inline int count_reaching(float x, const float* y, int first, int last,
                                               float sum) {
  while (first < last) {
    const int middle = (first + last) / 2;
    if (x + y[middle] >= sum)
      first = middle + 1;
    else
      last = middle;
  }
  return first;
}

// A row and its columns [first, last), whose sums may lie between the bounds; those before exceed
// the upper one.
struct alignas(8) OpenRow {
  uint16_t row;
  uint16_t first;
  uint16_t last;
  uint16_t count;  // of its sums that reach the guess

  OMNI_MOE_HOST_DEVICE bool is_open() const { return first < last; }

  // Also lowers `least_reaching` and raises `greatest_below` to sums of this row.
  OMNI_MOE_HOST_DEVICE void count_sums(float x, const float* y, float guess, float& least_reaching,
                                       float& greatest_below) {
    count = static_cast<uint16_t>(count_reaching(x, y, first, last, guess));
    if (count > first) least_reaching = fminf(least_reaching, x + y[count - 1]);
    if (count < last) greatest_below = fmaxf(greatest_below, x + y[count]);
  }

  OMNI_MOE_HOST_DEVICE void narrow(bool lower_bound_moved) {
    if (lower_bound_moved)
      last = count;
    else
      first = count;
  }
};

}  // namespace omni_moe::cuda
