// Rows in expert order, and the permutation of every set of CPU kernels, against their definitions
// in double, serially and on two threads.
#include "cpu_kernel_testing.h"
#include "permute_testing.h"

namespace omni_moe::cpu {
namespace {

class CpuPermute : public CpuKernels {};

// Any double of a buffer's element type.
std::vector<double> values_of(const Buffer& buffer) {
  std::vector<double> values;
  for (int64_t i = 0; i < buffer.size(); ++i) values.push_back(buffer[i]);
  return values;
}

struct Problem {
  PermuteCase c;
  DType dtype;
  bool has_wide_weights;
  Random& random;
  std::vector<int32_t> ids = draw_ids(c);
  ExpertRows maps = expert_rows_of(c, ids);

  PermuteShape shape() const { return shape_of(c, dtype, has_wide_weights); }
  DType weights_dtype() const {
    const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    return has_wide_weights ? wide : dtype;
  }
};

void check(const KernelTable& table, const Executor& executor, const Problem& p) {
  SCOPED_TRACE(p.c.name());
  const int64_t n = p.c.hidden_size, num_tokens = p.c.num_tokens, num_rows = p.c.num_rows();
  Buffer tokens = p.random.normal(p.dtype, num_tokens * n),
         rows = p.random.normal(p.dtype, num_rows * n),
         weights = p.random.normal(p.weights_dtype(), p.c.num_pairs());
  const PermuteOracle want =
      permute_oracle(p.c, p.maps, values_of(tokens), values_of(rows), values_of(weights));

  // 1. With and without weights.
  for (const bool weighted : {false, true}) {
    Buffer permuted(p.dtype, num_rows * n), summed(p.dtype, num_tokens * n);
    PermuteParams permute{p.shape()};
    permute.tokens = tokens.data();
    permute.row_id_map = p.maps.row_id_map.data();
    permute.expert_ends = p.maps.expert_ends.data();
    permute.rows = permuted.data();
    UnpermuteParams unpermute{p.shape()};
    unpermute.rows = rows.data();
    unpermute.row_id_map = p.maps.row_id_map.data();
    unpermute.tokens = summed.data();
    if (weighted) permute.weights = unpermute.weights = weights.data();
    table.permute(permute, executor);
    table.unpermute(unpermute, executor);
    expect_close(p.dtype, permuted, weighted ? want.weighted_rows : want.rows, 1);
    expect_close(p.dtype, summed, weighted ? want.weighted_sums : want.sums, p.c.k, 8);
  }

  // 2. The gradient in one pass.
  Buffer grad_rows(p.dtype, num_rows * n), grad_weights(p.weights_dtype(), p.c.num_pairs());
  UnpermuteBackwardParams backward{p.shape()};
  backward.grad_tokens = tokens.data();
  backward.rows = rows.data();
  backward.weights = weights.data();
  backward.row_id_map = p.maps.row_id_map.data();
  backward.expert_ends = p.maps.expert_ends.data();
  backward.grad_rows = grad_rows.data();
  backward.grad_weights = grad_weights.data();
  table.unpermute_backward(backward, executor);
  expect_close(p.dtype, grad_rows, want.weighted_rows, 1);
  expect_close(p.weights_dtype(), grad_weights, want.dots, n, std::sqrt(n));
}

TEST_P(CpuPermute, AllCases) {
  for (const DType dtype : kDTypes) {
    for (const PermuteCase& c : kPermuteCases) {
      for (const bool has_wide_weights : {false, true}) {
        const Problem p{c, dtype, has_wide_weights, random_};
        check(GetParam(), serial_, p);
        check(GetParam(), two_threads_, p);
        if (HasFailure()) return;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, CpuPermute, testing::ValuesIn(kernel_tables()), capability_of);

// Against a count by expert.
TEST(CpuExpertRows, AllCases) {
  for (const PermuteCase& c : kPermuteCases) {
    SCOPED_TRACE(c.name());
    const std::vector<int32_t> ids = draw_ids(c);
    const ExpertRows want = expert_rows_of(c, ids);
    for (const bool has_slots : {false, true}) {
      if (!has_slots && c.capacity >= 0 && !c.is_padded)
        continue;  // slots alone say who is dropped
      std::vector<int32_t> map(ids.size() + 1, -7), ends(c.num_experts + 1, -7);
      const std::vector<int32_t> slots = slots_of(c, ids);
      ExpertRowsParams params{.indices = ids.data(),
                              .slots = has_slots ? slots.data() : nullptr,
                              .row_id_map = map.data(),
                              .expert_ends = ends.data(),
                              .num_pairs = static_cast<int64_t>(ids.size()),
                              .num_experts = c.num_experts,
                              .capacity = c.is_padded ? c.capacity : -1};
      expert_rows(params, SerialExecutor());
      EXPECT_EQ(map.back(), -7) << "written past the end";
      EXPECT_EQ(ends.back(), -7) << "written past the end";
      map.pop_back();
      ends.pop_back();
      EXPECT_EQ(map, want.row_id_map);
      EXPECT_EQ(ends, want.expert_ends);
    }
  }
}

}  // namespace
}  // namespace omni_moe::cpu
