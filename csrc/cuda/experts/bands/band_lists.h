// The lists of a pass by bands: which pairs of a token lie in which task, the tasks in the order of
// their bands, and where they stand in the workspace. Needs no CUDA toolkit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/common/operands.h"
#include "cuda/common/workspace.h"
#include "cuda/experts/bands/band_plan.h"

namespace omni_moe::cuda {

// A band's number: rows 0 … R-1, then columns R … R+C-1.
OMNI_MOE_HOST_DEVICE inline int band_length(const BandPlan& plan, int band) {
  return band < plan.num_rows ? plan.num_cols : plan.num_rows;
}

// A pair in a token's list: its place in the band in the upper half, its k in the lower.
// In the list of coefficients the bits of the coefficient stand in place of k.
using BandPair = uint32_t;

// Where a token's list of pairs is cut. Tasks come first, in order of their bands and each with
// pairs in order of k; pairs from `tail` on have no task.
struct TokenCover {
  int num_tasks;
  int tail;
};
struct TokenTask {
  int band;
  int first;  // pair in the token's list
  int num_pairs;
  int has_repeats;  // whether pairs share a place, since the token chose an expert more than once
};

// A task in the order of bands and tokens, and a run of them in one band.
struct alignas(16) BandTask {
  int token;
  int first;  // pair in the list of all tokens
  int num_pairs;
  int has_repeats;
};
struct BandTile {
  int band;
  int first_task;
  int num_tasks;
};

// What the gradients of the tables sum in a band: its tasks and, in a column, the pairs of tails,
// each as a task of one pair.
struct BandRange {
  int first_task;
  int num_tasks;
  int first_tail;
  int num_tails;
};

// The tasks of a band in groups of 16, as the tensor cores take them: so many from first_group on,
// the last of which may be filled up.
struct BandGroups {
  int first_group;
  int num_tasks;
};

// A pair of a group: where it stands in P as a tile of 16 tasks by all places of the band
// (band_layout.cuh) in the upper half, in units of 2 bytes, and the bits of its coefficient in the
// lower.
using BandCell = uint32_t;

// What cover and schedule are told of a pass.
struct BandShape {
  int num_tokens;   // T
  int num_pairs;    // K, of a token
  int num_experts;  // R * C
  BandPlan plan;

  OMNI_MOE_HOST_DEVICE int num_bands() const { return plan.num_rows + plan.num_cols; }
  // Of a band's bits of chosen tokens.
  OMNI_MOE_HOST_DEVICE int num_words() const { return ceil_div(num_tokens, 32); }
  int64_t max_tasks() const { return int64_t{num_tokens} * plan.max_tasks; }
  int64_t max_tiles() const { return num_bands() + max_tasks() / BandTuning::kTileTasks; }
  // Each task, those of tails among them, has a pair.
  int64_t max_groups() const {
    return num_bands() + int64_t{num_tokens} * num_pairs / BandTuning::kGroupTasks;
  }
};

BandShape band_shape(const TokenPassShape& shape, const BandPlan& plan);

struct BandWorkspace {
  BandPair* pairs;     // [T, K], of the tail with the row as place
  uint16_t* places;    // [T, K] of the pairs in their bands, and one more; of the tail its column
  TokenCover* covers;  // [T]
  TokenTask* token_tasks;  // [T, max_tasks]
  int* positions;          // [T, max_tasks] of a token's tasks among all tasks
  uint32_t* chosen;        // [bands, words] a bit for each token with a task in the band
  int* band_sizes;         // [bands] tasks of each band
  int* band_pairs;         // [bands] pairs of each band's tasks
  int* tail_sizes;         // [C] pairs of tails in each column
  BandTask* tasks;         // [T * max_tasks]
  BandTile* tiles;         // [max_tiles]
  int* num_tiles;          // [1]
  float* dots;             // [T, K] of each pair in the lists
  BandPair* coefficients;  // [T, K]
  void* partial;           // [T * max_tasks, H] in the 16-bit type
  // Of a plan with weight gradients, whose `coefficients` are those of `up`.
  BandPair* down_coefficients;  // [T, K]
  BandRange* ranges;            // [bands]
  int* tails;                   // [T * K] places in the lists of the tails' pairs, by column
  BandGroups* groups;           // [bands]
  int* group_tokens;            // [max_groups, 16] or -1
  int* group_first;             // [max_groups + 1] of a group's cells
  BandCell* up_cells;           // [T * K] by band, then as its tasks; in the memory of `dots`
  BandCell* down_cells;         // [T * K]; in the memory of `pairs`
  size_t size;
};

inline BandWorkspace cut_band_workspace(const BandShape& shape, int64_t hidden_size, void* base) {
  WorkspaceCutter cutter(base);
  BandWorkspace workspace{};
  const size_t num_pairs = static_cast<size_t>(shape.num_tokens) * shape.num_pairs;
  const size_t num_tasks = static_cast<size_t>(shape.max_tasks());
  workspace.pairs = cutter.take<BandPair>(num_pairs);
  workspace.places = cutter.take<uint16_t>(num_pairs + 1);
  workspace.covers = cutter.take<TokenCover>(shape.num_tokens);
  workspace.token_tasks = cutter.take<TokenTask>(num_tasks);
  workspace.positions = cutter.take<int>(num_tasks);
  workspace.chosen =
      cutter.take<uint32_t>(static_cast<size_t>(shape.num_bands()) * shape.num_words());
  // These three are cleared together with `chosen`.
  workspace.band_sizes = cutter.take<int>(shape.num_bands());
  workspace.band_pairs = cutter.take<int>(shape.num_bands());
  workspace.tail_sizes = cutter.take<int>(shape.plan.num_cols);
  workspace.tasks = cutter.take<BandTask>(num_tasks);
  workspace.tiles = cutter.take<BandTile>(static_cast<size_t>(shape.max_tiles()));
  workspace.num_tiles = cutter.take<int>(1);
  workspace.dots = cutter.take<float>(num_pairs);
  workspace.coefficients = cutter.take<BandPair>(num_pairs);
  workspace.partial = cutter.take<uint16_t>(num_tasks * static_cast<size_t>(hidden_size));
  if (shape.plan.has_weight_gradients) {
    workspace.down_coefficients = cutter.take<BandPair>(num_pairs);
    const auto max_groups = static_cast<size_t>(shape.max_groups());
    workspace.groups = cutter.take<BandGroups>(shape.num_bands());
    workspace.group_tokens = cutter.take<int>(max_groups * BandTuning::kGroupTasks);
    workspace.group_first = cutter.take<int>(max_groups + 1);
    workspace.up_cells = reinterpret_cast<BandCell*>(workspace.dots);
    workspace.down_cells = workspace.pairs;
    workspace.ranges = cutter.take<BandRange>(shape.num_bands());
    workspace.tails = cutter.take<int>(num_pairs);
  }
  workspace.size = cutter.size();
  return workspace;
}

}  // namespace omni_moe::cuda
