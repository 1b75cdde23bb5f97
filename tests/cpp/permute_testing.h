// Cases of the permutation for the tests of both backends, and their definition in double.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "omni_moe/permute.h"

namespace omni_moe {

enum class Ids { kRandom, kOneExpert, kSomeMasked };

struct PermuteCase {
  int64_t num_tokens, num_experts, k, hidden_size;
  int64_t capacity = -1;   // -1: none
  bool is_padded = false;  // each expert has as many rows
  Ids ids = Ids::kSomeMasked;

  int64_t num_pairs() const { return num_tokens * k; }
  int64_t num_rows() const {
    const int64_t most = num_experts * capacity;
    return is_padded ? most : capacity < 0 ? num_pairs() : std::min(num_pairs(), most);
  }
  std::string name() const {
    return "T" + std::to_string(num_tokens) + " E" + std::to_string(num_experts) + " K" +
           std::to_string(k) + " H" + std::to_string(hidden_size) + " C" +
           std::to_string(capacity) + (is_padded ? " padded" : "");
  }
};

// Empty, one of each, rows that no vector divides, long rows, tokens of many and of no pairs, empty
// experts, experts past their capacity and far below it, no places at all.
inline const PermuteCase kPermuteCases[] = {
    {0, 4, 2, 8},
    {0, 4, 2, 8, 3, true},
    {1, 1, 1, 1},
    {37, 4, 0, 8},
    {37, 7, 3, 100},
    {37, 7, 3, 100, 9},
    {37, 7, 3, 100, 9, true},
    {37, 7, 3, 128, 40, true},
    {37, 7, 3, 128, 0, true},
    {37, 7, 3, 128, 0},
    {37, 5, 5, 8, -1, false, Ids::kRandom},
    {199, 60, 4, 1000, 12, true},
    {5, 3, 2, 1024, -1, false, Ids::kOneExpert},
    {5, 3, 2, 1024, 4, true, Ids::kOneExpert},
    {60, 300, 70, 24},
    {3, 8, 2, 4104},
    {3, 8, 2, 0},
};

inline std::vector<int32_t> draw_ids(const PermuteCase& c) {
  std::mt19937 random(5);
  std::vector<int32_t> ids(c.num_pairs());
  for (int32_t& id : ids) {
    id = static_cast<int32_t>(random() % static_cast<unsigned>(c.num_experts));
    if (c.ids == Ids::kOneExpert) id = static_cast<int32_t>(c.num_experts - 1);
    if (c.ids == Ids::kSomeMasked && random() % 4 == 0) id = -1;
  }
  return ids;
}

inline std::vector<int32_t> slots_of(const PermuteCase& c, const std::vector<int32_t>& ids) {
  std::vector<int32_t> queued(c.num_experts), slots;
  for (const int32_t id : ids) {
    const int32_t slot = id < 0 ? -1 : queued[id]++;
    slots.push_back(c.capacity >= 0 && slot >= c.capacity ? -1 : slot);
  }
  return slots;
}

struct ExpertRows {
  std::vector<int32_t> row_id_map, expert_ends;
};

inline ExpertRows expert_rows_of(const PermuteCase& c, const std::vector<int32_t>& ids) {
  const std::vector<int32_t> slots = slots_of(c, ids);
  ExpertRows rows{std::vector<int32_t>(ids.size(), -1), {}};
  int64_t begin = 0;
  for (int64_t e = 0; e < c.num_experts; ++e) {
    if (c.is_padded) begin = e * c.capacity;
    int64_t end = begin;
    for (size_t pair = 0; pair < ids.size(); ++pair) {
      if (ids[pair] != e || slots[pair] < 0) continue;
      rows.row_id_map[pair] = static_cast<int32_t>(begin + slots[pair]);
      ++end;
    }
    rows.expert_ends.push_back(static_cast<int32_t>(end));
    begin = end;
  }
  return rows;
}

inline PermuteShape shape_of(const PermuteCase& c, DType dtype, bool has_wide_weights) {
  return {.num_tokens = c.num_tokens,
          .num_rows = c.num_rows(),
          .hidden_size = c.hidden_size,
          .num_experts_per_token = c.k,
          .num_experts = c.num_experts,
          .is_padded = c.is_padded,
          .dtype = dtype,
          .has_wide_weights = has_wide_weights};
}

// All results of the values given; `tokens` also stand for the gradient of the un-permuted tokens.
struct PermuteOracle {
  std::vector<double> rows, weighted_rows;  // [N, H] of the tokens
  std::vector<double> sums, weighted_sums;  // [T, H] of the rows
  std::vector<double> dots;                 // [T, K] token · row
};

inline PermuteOracle permute_oracle(const PermuteCase& c, const ExpertRows& maps,
                                    const std::vector<double>& tokens,
                                    const std::vector<double>& rows,
                                    const std::vector<double>& weights) {
  const int64_t n = c.hidden_size;
  PermuteOracle want;
  want.rows.resize(c.num_rows() * n);
  want.weighted_rows.resize(c.num_rows() * n);
  want.sums.resize(c.num_tokens * n);
  want.weighted_sums.resize(c.num_tokens * n);
  want.dots.resize(c.num_pairs());
  for (int64_t pair = 0; pair < c.num_pairs(); ++pair) {
    const int64_t row = maps.row_id_map[pair];
    if (row < 0) continue;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = pair / c.k * n + i, in_row = row * n + i;
      want.rows[in_row] = tokens[at];
      want.weighted_rows[in_row] = weights[pair] * tokens[at];
      want.sums[at] += rows[in_row];
      want.weighted_sums[at] += weights[pair] * rows[in_row];
      want.dots[pair] += tokens[at] * rows[in_row];
    }
  }
  return want;
}

}  // namespace omni_moe
