// The CUDA permutation and its rows against their definitions in double and the CPU backend's
// kernels in fp64: every element, over poisoned memory, twice the same bits.
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cuda_kernel_testing.h"
#include "permute_testing.h"

namespace omni_moe {
namespace {

using CudaPermute = CudaKernelTest;
using CudaExpertRows = CudaKernelTest;

// ---- Rows ----

void check_expert_rows(const PermuteCase& c, bool has_slots) {
  SCOPED_TRACE(c.name() + (has_slots ? " by slots" : " in order"));
  const std::vector<int32_t> ids = draw_ids(c);
  const ExpertRows want = expert_rows_of(c, ids);
  const DeviceArray indices(bytes_of(ids)), slots(bytes_of(slots_of(c, ids))),
      map(ids.size() * sizeof(int32_t)), ends(c.num_experts * sizeof(int32_t));
  ExpertRowsParams params{.indices = static_cast<const int32_t*>(indices.data()),
                          .slots = has_slots ? static_cast<const int32_t*>(slots.data()) : nullptr,
                          .row_id_map = static_cast<int32_t*>(map.data()),
                          .expert_ends = static_cast<int32_t*>(ends.data()),
                          .num_pairs = static_cast<int64_t>(ids.size()),
                          .num_experts = c.num_experts,
                          .capacity = c.is_padded ? c.capacity : -1};
  const auto plan = cuda::plan_expert_rows(params);
  const auto got = run_twice({&map, &ends}, plan.workspace_bytes, [&](void* workspace) {
    params.workspace = workspace;
    return cuda::expert_rows(params, plan, nullptr);
  });
  EXPECT_EQ(want.row_id_map, integers_of<int32_t>(got[0]));
  EXPECT_EQ(want.expert_ends, integers_of<int32_t>(got[1]));
}

TEST_F(CudaExpertRows, AllCases) {
  for (const PermuteCase& c : kPermuteCases) {
    check_expert_rows(c, /*has_slots=*/true);
    if (c.capacity < 0 || c.is_padded) check_expert_rows(c, /*has_slots=*/false);
    if (HasFailure()) return;
  }
}

// One block and many, more experts than pairs, all that fit.
TEST_F(CudaExpertRows, ManyPairs) {
  for (const int64_t num_pairs : {1, 31, 256, 257, 5000, 100000}) {
    for (const int64_t num_experts : {1, 8, 33, 300, 4096}) {
      for (const Ids ids : {Ids::kRandom, Ids::kOneExpert, Ids::kSomeMasked}) {
        const PermuteCase dense{num_pairs, num_experts, 1, 1, -1, false, ids};
        const int64_t capacity = num_pairs / num_experts + 1;
        for (const bool has_slots : {false, true}) {
          check_expert_rows(dense, has_slots);
          check_expert_rows({num_pairs, num_experts, 1, 1, capacity, true, ids}, has_slots);
        }
        if (HasFailure()) return;
      }
    }
  }
}

// ---- Permutation ----

struct Problem {
  Problem(const PermuteCase& c, DType dtype, bool has_wide_weights, int64_t offset = 0)
      : c(c),
        maps(expert_rows_of(c, draw_ids(c))),
        map(bytes_of(maps.row_id_map)),
        ends(bytes_of(maps.expert_ends)),
        has_wide_weights(has_wide_weights),
        tokens(dtype, c.num_tokens * c.hidden_size, offset),
        rows(dtype, c.num_rows() * c.hidden_size, offset),
        weights(has_wide_weights ? DType::kFloat32 : dtype, c.num_pairs()),
        out_tokens(dtype, tokens.values.size(), offset),
        out_rows(dtype, rows.values.size(), offset),
        out_weights(weights.dtype, c.num_pairs()) {
    std::mt19937 random(7);
    for (Operand* operand : {&tokens, &rows, &weights}) fill_normal(*operand, random);
  }

  PermuteShape shape() const { return shape_of(c, tokens.dtype, has_wide_weights); }
  const int32_t* row_id_map() const { return static_cast<const int32_t*>(map.data()); }
  const int32_t* expert_ends() const { return static_cast<const int32_t*>(ends.data()); }

  PermuteCase c;
  ExpertRows maps;
  DeviceArray map, ends;
  bool has_wide_weights;
  Operand tokens, rows, weights;  // tokens are also the gradient of the un-permuted ones
  Operand out_tokens, out_rows, out_weights;
};

void check_permute(Problem& p, bool weighted, const std::vector<double>& want) {
  PermuteParams params{p.shape()};
  params.tokens = p.tokens.at(Side::kDevice);
  params.row_id_map = p.row_id_map();
  params.expert_ends = p.expert_ends();
  if (weighted) params.weights = p.weights.at(Side::kDevice);
  params.rows = p.out_rows.at(Side::kDevice);
  const auto plan = cuda::plan_permute(params);
  const auto got = run_twice({&p.out_rows.device}, plan.workspace_bytes,
                             [&](void*) { return cuda::permute(params, plan, nullptr); });
  expect_close("rows", decode(p.out_rows.dtype, got[0]), want, [&](size_t i) {
    return weighted ? rounding_error(p.out_rows.dtype, want[i]) + 1e-7 * std::abs(want[i]) : 0;
  });
}

void check_unpermute(Problem& p, bool weighted, const std::vector<double>& want) {
  UnpermuteParams params{p.shape()};
  params.rows = p.rows.at(Side::kDevice);
  params.row_id_map = p.row_id_map();
  if (weighted) params.weights = p.weights.at(Side::kDevice);
  params.tokens = p.out_tokens.at(Side::kDevice);
  const auto plan = cuda::plan_unpermute(params);
  const auto got = run_twice({&p.out_tokens.device}, plan.workspace_bytes,
                             [&](void*) { return cuda::unpermute(params, plan, nullptr); });
  expect_close("tokens", decode(p.out_tokens.dtype, got[0]), want, [&](size_t i) {
    double terms = 0;
    const int64_t n = p.c.hidden_size, token = static_cast<int64_t>(i) / n;
    for (int64_t pair = token * p.c.k; pair < (token + 1) * p.c.k; ++pair) {
      const int64_t row = p.maps.row_id_map[pair];
      if (row < 0) continue;
      const double value = p.rows.values[row * n + static_cast<int64_t>(i) % n];
      terms += std::abs(weighted ? value * p.weights.values[pair] : value);
    }
    return rounding_error(p.out_tokens.dtype, want[i]) + sum_error(p.c.k) * terms;
  });
}

void check_backward(Problem& p, bool wants_rows, const PermuteOracle& want) {
  UnpermuteBackwardParams params{p.shape()};
  params.grad_tokens = p.tokens.at(Side::kDevice);
  params.rows = p.rows.at(Side::kDevice);
  params.weights = p.weights.at(Side::kDevice);
  params.row_id_map = p.row_id_map();
  params.expert_ends = p.expert_ends();
  if (wants_rows) params.grad_rows = p.out_rows.at(Side::kDevice);
  params.grad_weights = p.out_weights.at(Side::kDevice);
  const auto plan = cuda::plan_unpermute_backward(params);
  const auto got =
      run_twice({&p.out_weights.device, &p.out_rows.device}, plan.workspace_bytes,
                [&](void*) { return cuda::unpermute_backward(params, plan, nullptr); });
  const int64_t n = p.c.hidden_size;
  expect_close("grad_weights", decode(p.out_weights.dtype, got[0]), want.dots, [&](size_t i) {
    double terms = 0;
    const int64_t pair = static_cast<int64_t>(i), row = p.maps.row_id_map[pair];
    for (int64_t j = 0; row >= 0 && j < n; ++j) {
      terms += std::abs(p.tokens.values[pair / p.c.k * n + j] * p.rows.values[row * n + j]);
    }
    return rounding_error(p.out_weights.dtype, want.dots[i]) + sum_error(n) * terms;
  });
  if (!wants_rows) return;
  expect_close("grad_rows", decode(p.out_rows.dtype, got[1]), want.weighted_rows, [&](size_t i) {
    const double value = want.weighted_rows[i];
    return rounding_error(p.out_rows.dtype, value) + 1e-7 * std::abs(value);
  });
}

// The CPU backend in fp64 agrees with the definition, so that either is the oracle.
void check_oracle(Problem& p, const PermuteOracle& want) {
  Values sums(p.tokens.values.size());
  UnpermuteParams params{shape_of(p.c, DType::kFloat64, false)};
  params.rows = p.rows.values.data();
  params.row_id_map = p.maps.row_id_map.data();
  params.weights = p.weights.values.data();
  params.tokens = sums.data();
  cpu::unpermute(params, kSerial);
  expect_close("fp64 sums", sums, want.weighted_sums, [&](size_t) { return 1e-12 * (1 + p.c.k); });
}

void check(Problem p) {
  SCOPED_TRACE(std::string(name_of(p.tokens.dtype)) + " " + p.c.name() +
               (p.has_wide_weights ? " wide weights" : ""));
  const PermuteOracle want =
      permute_oracle(p.c, p.maps, p.tokens.values, p.rows.values, p.weights.values);
  check_oracle(p, want);
  check_permute(p, /*weighted=*/false, want.rows);
  check_permute(p, /*weighted=*/true, want.weighted_rows);
  check_unpermute(p, /*weighted=*/false, want.sums);
  check_unpermute(p, /*weighted=*/true, want.weighted_sums);
  check_backward(p, /*wants_rows=*/true, want);
  check_backward(p, /*wants_rows=*/false, want);
}

TEST_F(CudaPermute, AllCases) {
  for (const DType dtype : kDTypes) {
    for (const PermuteCase& c : kPermuteCases) {
      for (const bool has_wide_weights : {false, true}) {
        check({c, dtype, has_wide_weights});
        if (HasFailure()) return;
      }
    }
  }
}

// Rows that no vector load may read.
TEST_F(CudaPermute, Unaligned) {
  for (const DType dtype : kDTypes) {
    for (const int64_t offset : {1, 2, 4}) {
      check({{37, 7, 3, 128, 9, true}, dtype, false, offset});
      if (HasFailure()) return;
    }
  }
}

TEST_F(CudaPermute, ManyTokens) {
  check({{20000, 64, 6, 40}, DType::kBFloat16, false});
  check({{3000, 8, 2, 520, 2000, true}, DType::kFloat32, false});
}

}  // namespace
}  // namespace omni_moe
