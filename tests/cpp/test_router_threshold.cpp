// The threshold search of the router's unsorted kernel, run row by row on the host, against a sort
// of all sums.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda/router/threshold_search.h"

namespace omni_moe::cuda {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
using Logits = std::vector<float>;

struct Grid {
  Grid(Logits x, Logits y_in_any_order) : x(std::move(x)), y(std::move(y_in_any_order)) {
    std::sort(y.begin(), y.end(), std::greater<>());
    for (const float row : this->x) {
      for (const float column : y) sums.push_back(row + column);
    }
    std::sort(sums.begin(), sums.end(), std::greater<>());
  }

  int num_pairs() const { return static_cast<int>(sums.size()); }
  int count_at_least(float sum) const {
    return static_cast<int>(std::upper_bound(sums.begin(), sums.end(), sum, std::greater<>()) -
                            sums.begin());
  }
  int count_above(float sum) const {
    return static_cast<int>(std::lower_bound(sums.begin(), sums.end(), sum, std::greater<>()) -
                            sums.begin());
  }

  Logits x, y, sums;  // y and sums descend
};

// What a warp does for a token. Checks each count and both bounds on the way.
ThresholdSearch search(const Grid& grid, int k, float low, int count_low) {
  ThresholdSearch search(k, grid.num_pairs(), low, count_low, grid.sums[0]);
  std::vector<OpenRow> open;
  const auto num_cols = static_cast<uint16_t>(grid.y.size());
  for (size_t row = 0; row < grid.x.size(); ++row) {
    if (grid.x[row] + grid.y[0] >= low)
      open.push_back({static_cast<uint16_t>(row), 0, num_cols, 0});
  }
  int settled = 0;
  float high = grid.sums[0];
  while (!search.is_found()) {
    const float guess = search.guess();
    EXPECT_GT(guess, search.low());
    EXPECT_LE(guess, high);
    float least_reaching = kInf, greatest_below = -kInf;
    int count = settled;
    for (OpenRow& row : open) {
      row.count_sums(grid.x[row.row], grid.y.data(), guess, least_reaching, greatest_below);
      count += row.count;
    }
    EXPECT_EQ(count, grid.count_at_least(guess));
    const bool moved = search.narrow(guess, count, least_reaching, greatest_below);
    if (!moved) high = greatest_below;
    for (OpenRow& row : open) {
      row.narrow(moved);
      if (!row.is_open()) settled += row.first;
    }
    std::erase_if(open, [](const OpenRow& row) { return !row.is_open(); });
    if (testing::Test::HasFailure() || search.num_guesses() > 130) break;
  }
  return search;
}

void expect_threshold(const Grid& grid, int k, float low, int count_low) {
  const ThresholdSearch found = search(grid, k, low, count_low);
  EXPECT_TRUE(found.is_found()) << found.num_guesses() << " guesses";
  EXPECT_EQ(found.low(), grid.sums[k - 1]);
  if (found.has_surplus()) {
    EXPECT_EQ(found.count_above(), grid.count_above(found.low()));
  } else {
    EXPECT_EQ(k, grid.count_at_least(found.low()));
  }
}

// From every kind of lower bound: the smallest sum, the K-th itself, and one between.
void check(const std::string& name, const Logits& x, const Logits& y) {
  const Grid grid(x, y);
  const int n = grid.num_pairs();
  for (int k : {1, 2, 7, 31, 32, 33, 128, 129, 512, n / 2, n - 1, n}) {
    if (k < 1 || k > n) continue;
    SCOPED_TRACE(name + " " + std::to_string(x.size()) + "x" + std::to_string(y.size()) + " K" +
                 std::to_string(k));
    expect_threshold(grid, k, grid.sums[n - 1], n);
    expect_threshold(grid, k, grid.sums[k - 1], ThresholdSearch::kUnknown);
    expect_threshold(grid, k, grid.sums[(k - 1 + n) / 2], ThresholdSearch::kUnknown);
    if (testing::Test::HasFailure()) return;
  }
}

using Draw = std::function<float(std::mt19937&)>;

void check_drawn(const std::string& name, const Draw& draw_x, const Draw& draw_y) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  constexpr size_t kShapes[][2] = {{1, 1}, {1, 100}, {100, 1}, {5, 7}, {37, 64}, {90, 41}};
  for (const auto& shape : kShapes) {
    Logits x(shape[0]), y(shape[1]);
    for (float& logit : x) logit = draw_x(random);
    for (float& logit : y) logit = draw_y(random);
    check(name, x, y);
  }
}

void check_drawn(const std::string& name, const Draw& draw) { check_drawn(name, draw, draw); }

float normal(std::mt19937& random) { return std::normal_distribution<float>()(random); }
float uniform(std::mt19937& random) { return std::uniform_real_distribution<float>()(random); }

TEST(RouterThreshold, OrdinaryLogits) {
  check_drawn("normal", normal);
  check_drawn("uniform", uniform);
  check_drawn("heavy tails", [](auto& random) { return normal(random) / uniform(random); });
}

TEST(RouterThreshold, Ties) {
  check_drawn("all equal", [](auto&) { return 0.75f; });
  check_drawn("coarse", [](auto& random) { return std::round(2 * normal(random)) / 2; });
  check_drawn("signed zeros", [](auto& random) { return uniform(random) < 0.5f ? 0.0f : -0.0f; });
  // Gaps below the ulp of the sums.
  check_drawn(
      "swallowed", [](auto& random) { return 1.0f + std::round(normal(random)) * 2e-8f; },
      [](auto& random) { return std::round(normal(random)) * 1e-9f; });
}

TEST(RouterThreshold, UnevenLogits) {
  check_drawn("many magnitudes", [](auto& random) {
    return (uniform(random) < 0.5f ? 1.0f : -1.0f) * std::exp(30 * normal(random));
  });
  check_drawn("subnormal", [](auto& random) { return normal(random) * 1e-42f; });
  check_drawn("huge", [](auto& random) { return normal(random) * 1e37f; });
  check_drawn("masked",
              [](auto& random) { return uniform(random) < 0.6f ? -kInf : normal(random); });
  check_drawn("all masked", [](auto&) { return -kInf; });
}

TEST(RouterThreshold, OneRowOrColumnBeatsTheRest) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  for (const float advantage : {5.0f, 1e4f, 1e30f}) {
    Logits x(70), y(50);
    for (float& logit : x) logit = normal(random);
    for (float& logit : y) logit = normal(random);
    Logits high_x = x, high_y = y;
    high_x[11] += advantage;
    high_y[49] += advantage;
    check("row", high_x, y);
    check("column", x, high_y);
    check("both", high_x, high_y);
  }
}

TEST(RouterThreshold, FewGuessesForNormalLogits) {
  std::mt19937 random(7);
  int guesses = 0;
  constexpr int kTokens = 20;
  for (int token = 0; token < kTokens; ++token) {
    Logits x(320), y(320);
    for (float& logit : x) logit = normal(random);
    for (float& logit : y) logit = normal(random);
    const Grid grid(std::move(x), std::move(y));
    guesses += search(grid, 512, grid.sums[2000], ThresholdSearch::kUnknown).num_guesses();
  }
  EXPECT_LE(guesses, 8 * kTokens);
}

}  // namespace
}  // namespace omni_moe::cuda
