// The pairs of a pass as cells of P, for the gradients of the tables (band_weight_grad_sm90.cu):
// band by band and task by task, so that a kernel that lays out P for every slab of H reads them in
// one stream and has nothing to look up.
//
// A block takes a band, 256 tasks at a time. Per pair it reads 8 bytes and writes 8 for both
// tables.
#include "cuda/common/check.h"
#include "cuda/experts/bands/band_layout.cuh"
#include "cuda/experts/bands/band_scan.cuh"
#include "cuda/experts/bands/bands.h"

namespace omni_moe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kGroupTasks = BandTuning::kGroupTasks;

struct CellArgs {
  BandShape shape;
  const BandTask* tasks;
  const BandRange* ranges;
  const int* band_sizes;
  const int* band_pairs;
  const int* tail_sizes;
  const int* tails;
  const BandPair* coefficients;
  const BandPair* down_coefficients;
  BandGroups* groups;
  int* group_tokens;
  int* group_first;
  BandCell* up_cells;
  BandCell* down_cells;
};

// Task i of a band, those of its tails last; past the end it has no pairs.
__device__ __forceinline__ BandTask task_at(const CellArgs& args, const BandRange& range, int i) {
  if (i < range.num_tasks) return args.tasks[range.first_task + i];
  if (i >= range.num_tasks + range.num_tails) return {-1, 0, 0, 0};
  const int pair = args.tails[range.first_tail + i - range.num_tasks];
  return {pair / args.shape.num_pairs, pair, 1, 0};
}

template <class T>
__device__ __forceinline__ BandCell cell_of(const BandPair* coefficients, int at,
                                            const BandTask& task, int row) {
  BandPair pair = coefficients[at];
  const int place = static_cast<int>(pair >> 16);
  if (task.has_repeats) {
    float sum;
    const int end = task.first + task.num_pairs;
    if (!sum_at_place<T>(coefficients, task.first, end, at, &sum)) return kNoCell;
    pair = with_coefficient<T>(pair, sum);
  }
  return static_cast<BandCell>(cell_index(place, row % kGroupTasks)) << 16 | (pair & 0xffff);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    band_cells_kernel(const __grid_constant__ CellArgs args) {
  __shared__ int scratch[kWarps];
  __shared__ BandTask tasks[kThreads];
  __shared__ int begins[kThreads];
  const int band = blockIdx.x;
  const int num_rows = args.shape.plan.num_rows;
  const auto tails_of = [&](int b) { return b < num_rows ? 0 : args.tail_sizes[b - num_rows]; };

  // 1. Groups and cells of the bands before this one.
  int group = 0;
  int cell = 0;
  for (int other = threadIdx.x; other < band; other += kThreads) {
    const int tails = tails_of(other);
    group += ceil_div(args.band_sizes[other] + tails, kGroupTasks);
    cell += args.band_pairs[other] + tails;
  }
  group = block_add<kWarps>(group, scratch);
  cell = block_add<kWarps>(cell, scratch);
  const BandRange range = args.ranges[band];
  const int num_tasks = range.num_tasks + range.num_tails;
  const int num_groups = ceil_div(num_tasks, kGroupTasks);
  if (threadIdx.x == 0) args.groups[band] = {group, num_tasks};

  for (int base = 0; base < num_tasks; base += kThreads) {
    // 2. Where each task's cells begin.
    const int i = base + static_cast<int>(threadIdx.x);
    const BandTask task = task_at(args, range, i);
    int total;
    const int begin = block_exclusive_scan<kWarps>(task.num_pairs, scratch, &total);
    tasks[threadIdx.x] = task;
    begins[threadIdx.x] = begin;
    if (i < num_groups * kGroupTasks) {
      args.group_tokens[group * kGroupTasks + i] = task.token;
      if (i % kGroupTasks == 0) args.group_first[group + i / kGroupTasks] = cell + begin;
    }
    __syncthreads();
    // 3. The cells.
    for (int at = threadIdx.x; at < total; at += kThreads) {
      int row = 0;
#pragma unroll
      for (int step = kThreads / 2; step > 0; step /= 2) {
        if (begins[row + step] <= at) row += step;
      }
      const BandTask& own = tasks[row];
      const int pair = own.first + at - begins[row];
      args.up_cells[cell + at] = cell_of<T>(args.coefficients, pair, own, row);
      args.down_cells[cell + at] = cell_of<T>(args.down_coefficients, pair, own, row);
    }
    cell += total;
    __syncthreads();
  }
  if (band == args.shape.num_bands() - 1 && threadIdx.x == 0) {
    args.group_first[group + num_groups] = cell;
  }
}

}  // namespace

template <class T>
cudaError_t band_cells(const BandShape& shape, const BandWorkspace& workspace,
                       cudaStream_t stream) {
  const CellArgs args{shape,
                      workspace.tasks,
                      workspace.ranges,
                      workspace.band_sizes,
                      workspace.band_pairs,
                      workspace.tail_sizes,
                      workspace.tails,
                      workspace.coefficients,
                      workspace.down_coefficients,
                      workspace.groups,
                      workspace.group_tokens,
                      workspace.group_first,
                      workspace.up_cells,
                      workspace.down_cells};
  band_cells_kernel<T><<<shape.num_bands(), kThreads, 0, stream>>>(args);
  return clear_failure(launch_status());
}

template cudaError_t band_cells<__half>(const BandShape&, const BandWorkspace&, cudaStream_t);
template cudaError_t band_cells<__nv_bfloat16>(const BandShape&, const BandWorkspace&,
                                               cudaStream_t);

}  // namespace omni_moe::cuda
