// Token pass by bands, for many experts per token on a grid: whole grid rows and columns on the
// tensor cores instead of a gather of every pair.
//
// Expert row * C + col of a grid of R rows and C columns lies in two bands: its grid row (C experts
// next to each other) and its grid column (R experts, C apart). A router that scores experts by
// x[row] + y[col] chooses a staircase: once rows and columns are sorted, its cells are covered by
// the first few rows and columns. At 320 x 320 and K 512 about 12 rows and 7 columns hold all but 4
// of a token's pairs, and their dense work is 6 % of that of all experts.
//
// A task is a (token, band): with S = query · keysᵀ over the band and P = coefficient(S) at the
// token's pairs, 0 elsewhere, it contributes P · values. Every pair of a token is in one task or in
// the token's tail, whose rows are gathered. Any ids are right, only slower. Per pass:
//   cover         the tasks and the tail of each token                           (band_cover.cu)
//   schedule      the tasks of each band by token, cut into tiles                (band_schedule.cu)
//   dots          S of each tile on the tensor cores, kept at the pairs only (band_dots_sm90.cu)
//   coefficients  P of each pair in the 16-bit type, by the pass's own rule      (band_pass.cuh)
//   values        P · values of each tile: the partial output of each task (band_values_sm90.cu)
//   sum           a token's partial outputs, its tail and the addend, in order   (band_pass.cuh)
// The backward's pass leaves coefficients for the gradients of the tables, too:
//   tails         the tails' pairs by column                                  (band_schedule.cu)
//   cells         the coefficients of each band in the order of its tasks        (band_cells.cu)
//   weight grad   Pᵀ · rows of the tokens, for rows and columns      (band_weight_grad_sm90.cu)
//
// With bf16 at T 4096, H 1024, K 512 and a grid of 320 x 320 (84,000 tasks, 640 tiles) the two
// products have 110 GFLOP, 135 with groups of 64 tasks filled up: about 200 µs at 650 TFLOP/s. Both
// tables are read once for rows and once for columns, 840 MB of memory, and the partial outputs are
// written and read, 340 MB: together 450 µs at the 2.6 TB/s at which an H100 reads a table of this
// size. There the steps took 36, 13, 232, 17, 249 and 85 µs, a pass 653, and a gather of every pair
// 2256; the gradients of the tables took 636 µs more, by gathers 1550.
//
// What is rounded: each coefficient and each partial output once to the 16-bit type; everything is
// summed in fp32. Experts that a token did not choose meet its zeros in P, so an infinity or NaN in
// a row of `values` reaches all tokens with a task in that row's bands.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/experts/bands/band_lists.h"
#include "omni_moe/types.h"

namespace omni_moe::cuda {

// pairs, covers, token_tasks, chosen and band_sizes from ids [T, K] of index_type.
cudaError_t band_cover(const BandShape& shape, const void* indices, IndexType index_type,
                       const BandWorkspace& workspace, cudaStream_t stream);

// positions, tasks, tiles and num_tiles from what band_cover made.
cudaError_t band_schedule(const BandShape& shape, const BandWorkspace& workspace,
                          cudaStream_t stream);

// dots of all tasks' pairs; T: __half or __nv_bfloat16.
template <class T>
cudaError_t band_dots(const BandShape& shape, const void* queries, const void* keys,
                      int64_t hidden_size, const BandWorkspace& workspace, const DeviceInfo& device,
                      cudaStream_t stream);

// partial of all tasks, from their coefficients.
template <class T>
cudaError_t band_values(const BandShape& shape, const void* values, int64_t hidden_size,
                        const BandWorkspace& workspace, const DeviceInfo& device,
                        cudaStream_t stream);

// The pairs of tails by column, for a plan with weight gradients.
cudaError_t band_tails(const BandShape& shape, const BandWorkspace& workspace, cudaStream_t stream);

// The groups of tasks and their cells, of all that the pass of a backward has left.
template <class T>
cudaError_t band_cells(const BandShape& shape, const BandWorkspace& workspace, cudaStream_t stream);

struct BandWeightGradTables {
  const void* hidden_states;       // [T, H]
  const void* grad_expert_states;  // [T, H]
  void* grad_up;                   // [E, H], or null: not wanted
  void* grad_down;                 // [E, H], or null: not wanted
};

// Writes every row of the gradients from the groups and their cells.
template <class T>
cudaError_t band_weight_grad(const BandShape& shape, const BandWeightGradTables& tables,
                             int64_t hidden_size, const BandWorkspace& workspace,
                             const DeviceInfo& device, cudaStream_t stream);

}  // namespace omni_moe::cuda
