// What the tests of the expert passes by bands share: ids of a router and ids that no router would
// choose, the cases, and a fixture that needs kernels of Hopper.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "cuda_expert_testing.h"

namespace omni_moe {

// ---- ids ----

enum class Routing {
  kRouter,      // the K best of x[row] + y[col] with normal logits
  kUniform,     // any experts, repeated ones too
  kDistinct,    // any K different experts
  kOneExpert,   // the same one K times
  kOneRow,      // cells of one row, the same of all tokens, repeated where K > C
  kOneColumn,   // of one column
  kDiagonal,    // no two in the same row or column, where K allows
  kDuplicates,  // a router's, each twice
};
inline constexpr Routing kRoutings[] = {
    Routing::kRouter, Routing::kUniform,   Routing::kDistinct, Routing::kOneExpert,
    Routing::kOneRow, Routing::kOneColumn, Routing::kDiagonal, Routing::kDuplicates};

struct Grid {
  int64_t rows, cols;
  int64_t size() const { return rows * cols; }
};

inline std::vector<int64_t> routers_choice(const Grid& grid, int64_t k, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  Values x(grid.rows), y(grid.cols);
  for (double& value : x) value = normal(random);
  for (double& value : y) value = normal(random);
  std::vector<int64_t> ids(grid.size());
  std::iota(ids.begin(), ids.end(), 0);
  const auto score = [&](int64_t id) { return x[id / grid.cols] + y[id % grid.cols]; };
  std::partial_sort(ids.begin(), ids.begin() + k, ids.end(),
                    [&](int64_t a, int64_t b) { return score(a) > score(b); });
  ids.resize(k);
  return ids;
}

inline std::vector<int64_t> ids_of_token(Routing routing, const Grid& grid, int64_t k,
                                         int64_t token, std::mt19937_64& random) {
  std::vector<int64_t> ids(k);
  switch (routing) {
    case Routing::kRouter:
      return routers_choice(grid, k, random);
    case Routing::kUniform:
      for (int64_t& id : ids) id = static_cast<int64_t>(random() % grid.size());
      break;
    case Routing::kDistinct: {
      std::vector<int64_t> all(grid.size());
      std::iota(all.begin(), all.end(), 0);
      std::shuffle(all.begin(), all.end(), random);
      std::copy_n(all.begin(), k, ids.begin());
      break;
    }
    case Routing::kOneExpert:
      std::fill(ids.begin(), ids.end(), grid.size() - 1);
      break;
    case Routing::kOneRow:
      for (int64_t i = 0; i < k; ++i) ids[i] = (grid.rows - 1) * grid.cols + i % grid.cols;
      break;
    case Routing::kOneColumn:
      for (int64_t i = 0; i < k; ++i) ids[i] = i % grid.rows * grid.cols + grid.cols / 2;
      break;
    case Routing::kDiagonal:
      for (int64_t i = 0; i < k; ++i) {
        ids[i] = (i + token) % grid.rows * grid.cols + (i + i / grid.rows) % grid.cols;
      }
      break;
    case Routing::kDuplicates:
      ids = routers_choice(grid, (k + 1) / 2, random);
      ids.resize(k);
      std::copy_n(ids.begin(), k / 2, ids.begin() + (k + 1) / 2);
      break;
  }
  return ids;
}

struct BandCase {
  int64_t num_tokens;
  Grid grid;
  int64_t num_experts_per_token, hidden_size;
  Routing routing = Routing::kRouter;
  DType dtype = DType::kBFloat16;
  IndexType index_type = IndexType::kInt32;
  Activation activation = Activation::kSilu;
};

inline std::ostream& operator<<(std::ostream& out, const BandCase& c) {
  return out << "T" << c.num_tokens << "_R" << c.grid.rows << "_C" << c.grid.cols << "_K"
             << c.num_experts_per_token << "_H" << c.hidden_size << "_routing" << int(c.routing)
             << "_" << name_of(c.dtype) << "_index" << int(c.index_type) << "_act"
             << int(c.activation);
}

inline std::vector<int64_t> ids_of(const BandCase& c) {
  std::mt19937_64 random(11);
  std::vector<int64_t> ids;
  ids.reserve(c.num_tokens * c.num_experts_per_token);
  for (int64_t token = 0; token < c.num_tokens; ++token) {
    const auto own = ids_of_token(c.routing, c.grid, c.num_experts_per_token, token, random);
    ids.insert(ids.end(), own.begin(), own.end());
  }
  return ids;
}

// ---- cases ----

inline std::vector<BandCase> band_cases() {
  std::vector<BandCase> cases;
  const auto bf16 = DType::kBFloat16;
  const auto fp16 = DType::kFloat16;
  const auto i32 = IndexType::kInt32;
  const auto i64 = IndexType::kInt64;
  for (const Routing routing : kRoutings) {
    cases.push_back({199, {17, 24}, 16, 72, routing, bf16, i32});
    cases.push_back({37, {64, 64}, 64, 256, routing, fp16, i64});
    cases.push_back({37, {100, 40}, 100, 1000, routing, bf16, i64});
    cases.push_back({300, {130, 40}, 33, 64, routing, bf16, i32});
    cases.push_back({1, {8, 8}, 7, 8, routing, bf16, i32});
    cases.push_back({19, {40, 200}, 512, 264, routing, fp16, i32});
  }
  for (const int64_t tokens : {0, 1, 37, 199}) {
    for (const int64_t width : {8, 64, 1000, 1024}) {
      cases.push_back({tokens, {32, 32}, 16, width, Routing::kRouter, bf16, i32});
    }
  }
  cases.push_back({37, {17, 24}, 17 * 24, 136, Routing::kDistinct, bf16, i32});  // all experts
  cases.push_back({150, {5, 7}, 35, 64, Routing::kRouter, fp16, i32});           // all, small
  cases.push_back({3, {64, 64}, 4096, 64, Routing::kRouter, bf16, i32});         // all, many
  cases.push_back({64, {1, 200}, 50, 64, Routing::kRouter, bf16, i32});          // one row
  cases.push_back({64, {200, 1}, 50, 64, Routing::kRouter, bf16, i64});          // one column
  cases.push_back({1300, {32, 32}, 32, 64, Routing::kRouter, bf16, i32});
  cases.push_back({1024, {64, 64}, 100, 64, Routing::kRouter, bf16, i32});
  cases.push_back({2100, {16, 16}, 16, 128, Routing::kOneRow, bf16, i32});  // many tiles of a band
  cases.push_back({64, {160, 150}, 256, 512, Routing::kRouter, bf16, i32});
  cases.push_back({64, {256, 256}, 256, 64, Routing::kRouter, fp16, i32});
  cases.push_back({40, {320, 320}, 512, 128, Routing::kRouter, bf16, i32});
  cases.push_back({40, {320, 320}, 512, 64, Routing::kUniform, bf16, i32});
  cases.push_back({700, {40, 320}, 64, 192, Routing::kOneRow, fp16, i32});  // of several layouts
  cases.push_back({700, {320, 40}, 64, 136, Routing::kOneColumn, bf16, i32});
  cases.push_back({300, {400, 330}, 200, 264, Routing::kOneRow, bf16, i32});
  cases.push_back({12, {320, 320}, 4096, 64, Routing::kRouter, bf16, i32});
  cases.push_back({20, {400, 330}, 300, 64, Routing::kRouter, bf16, i32});  // longer than 320
  cases.push_back({20, {40, 512}, 300, 64, Routing::kRouter, fp16, i32});
  for (const int64_t width : {2056, 4096, 8192}) {  // several pieces a thread in the sum
    cases.push_back({20, {24, 24}, 24, width, Routing::kUniform, bf16, i32});
  }
  for (const Activation activation : kActivations) {
    cases.push_back({37, {32, 32}, 16, 64, Routing::kRouter, bf16, i32, activation});
  }
  return cases;
}

inline std::string name_of_case(const testing::TestParamInfo<BandCase>& info) {
  return testing::PrintToString(info.param) + "_" + std::to_string(info.index);
}

// ---- fixture ----

class CudaExpertBands : public CudaKernelTest, public testing::WithParamInterface<BandCase> {
 protected:
  void SetUp() override {
    CudaKernelTest::SetUp();
    if (!IsSkipped() && !cuda::current_device().has_hopper_kernels)
      GTEST_SKIP() << "needs kernels of Hopper";
  }
};

}  // namespace omni_moe
