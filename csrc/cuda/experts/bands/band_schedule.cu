// The tasks of all tokens in order of band, then token, and their tiles: runs of at most kTileTasks
// tasks of one band. A block writes the tasks of one band. It finds where they begin by adding the
// sizes of the bands before it, and their order in the band's bits, one for each token, so that the
// order is always the same. At T 4096 with 320 rows and columns it reads 0.3 MB of bits and moves
// 28 bytes for each of 80,000 tasks: a few µs, most of it the time to find a token's own list.
#include "cuda/common/check.h"
#include "cuda/experts/bands/band_scan.cuh"
#include "cuda/experts/bands/bands.h"

namespace omni_moe::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

constexpr int kTailThreads = 512;
constexpr int kTailWarps = kTailThreads / kWarpSize;

struct ScheduleArgs {
  BandShape shape;
  const TokenCover* covers;
  const TokenTask* token_tasks;
  const uint32_t* chosen;
  const int* band_sizes;
  int* positions;
  BandTask* tasks;
  BandTile* tiles;
  int* num_tiles;
  BandRange* ranges;
};

struct TailArgs {
  BandShape shape;
  const TokenCover* covers;
  const uint16_t* places;
  const int* tail_sizes;
  BandRange* ranges;
  int* tails;
};

// The place of a band among a token's tasks, which are in order of their bands.
__device__ __forceinline__ int find_slot(const TokenTask* tasks, int num_tasks, int band) {
  int slot = 0;
  int last = num_tasks - 1;
  while (slot < last) {
    const int middle = (slot + last) / 2;
    if (tasks[middle].band < band) {
      slot = middle + 1;
    } else {
      last = middle;
    }
  }
  return slot;
}

__global__ void __launch_bounds__(kThreads)
    band_schedule_kernel(const __grid_constant__ ScheduleArgs args) {
  __shared__ int scratch[kWarps];
  constexpr int kTileTasks = BandTuning::kTileTasks;
  const int band = blockIdx.x;
  const int size = args.band_sizes[band];
  const int max_tasks = args.shape.plan.max_tasks;

  // 1. Tasks and tiles of the bands before this one.
  int tasks_before = 0;
  int tiles_before = 0;
  for (int other = threadIdx.x; other < band; other += kThreads) {
    const int tasks = args.band_sizes[other];
    tasks_before += tasks;
    tiles_before += ceil_div(tasks, kTileTasks);
  }
  tasks_before = block_add<kWarps>(tasks_before, scratch);
  tiles_before = block_add<kWarps>(tiles_before, scratch);
  if (args.ranges != nullptr && threadIdx.x == 0) {
    args.ranges[band] = {tasks_before, size, /*first_tail=*/0, /*num_tails=*/0};
  }

  // 2. Tiles.
  const int num_tiles = ceil_div(size, kTileTasks);
  for (int tile = threadIdx.x; tile < num_tiles; tile += kThreads) {
    const int first = tile * kTileTasks;
    args.tiles[tiles_before + tile] = {band, tasks_before + first, min(size - first, kTileTasks)};
  }
  if (band == args.shape.num_bands() - 1 && threadIdx.x == 0) {
    *args.num_tiles = tiles_before + num_tiles;
  }

  // 3. Tasks: 32 tokens a thread.
  const uint32_t* chosen = args.chosen + static_cast<int64_t>(band) * args.shape.num_words();
  int position = tasks_before;
  for (int base = 0; base < args.shape.num_words(); base += kThreads) {
    const int word = base + threadIdx.x;
    uint32_t bits = word < args.shape.num_words() ? chosen[word] : 0;
    int total;
    int at = position + block_exclusive_scan<kWarps>(__popc(bits), scratch, &total);
    position += total;
    for (; bits != 0; bits &= bits - 1, ++at) {
      const int token = word * 32 + __ffs(bits) - 1;
      const int64_t first_slot = static_cast<int64_t>(token) * max_tasks;
      const TokenTask* own = args.token_tasks + first_slot;
      const int slot = find_slot(own, args.covers[token].num_tasks, band);
      args.tasks[at] = {token, token * args.shape.num_pairs + own[slot].first, own[slot].num_pairs,
                        own[slot].has_repeats};
      args.positions[first_slot + slot] = at;
    }
  }
}

// The tails' pairs of one column, in the order of the lists: a thread looks through the tail of a
// token, first to count and then to write.
__global__ void __launch_bounds__(kTailThreads)
    band_tails_kernel(const __grid_constant__ TailArgs args) {
  __shared__ int scratch[kTailWarps];
  const int col = blockIdx.x;
  const int num_tails = args.tail_sizes[col];
  if (num_tails == 0) return;
  int tails_before = 0;
  for (int other = threadIdx.x; other < col; other += kTailThreads) {
    tails_before += args.tail_sizes[other];
  }
  tails_before = block_add<kTailWarps>(tails_before, scratch);
  if (threadIdx.x == 0) {
    BandRange& range = args.ranges[args.shape.plan.num_rows + col];
    range.first_tail = tails_before;
    range.num_tails = num_tails;
  }
  const int num_pairs = args.shape.num_pairs;
  int position = tails_before;
  for (int base = 0; position < tails_before + num_tails; base += kTailThreads) {
    const int token = base + static_cast<int>(threadIdx.x);
    const int first = min(token, args.shape.num_tokens - 1) * num_pairs;
    const int begin = token < args.shape.num_tokens ? args.covers[token].tail : num_pairs;
    int count = 0;
    for (int i = begin; i < num_pairs; ++i) count += args.places[first + i] == col ? 1 : 0;
    int total;
    int at = position + block_exclusive_scan<kTailWarps>(count, scratch, &total);
    position += total;
    for (int i = begin; count > 0; ++i) {
      if (args.places[first + i] != col) continue;
      args.tails[at++] = first + i;
      --count;
    }
  }
}

}  // namespace

cudaError_t band_tails(const BandShape& shape, const BandWorkspace& workspace,
                       cudaStream_t stream) {
  const TailArgs args{
      shape,          workspace.covers, workspace.places, workspace.tail_sizes, workspace.ranges,
      workspace.tails};
  band_tails_kernel<<<shape.plan.num_cols, kTailThreads, 0, stream>>>(args);
  return clear_failure(launch_status());
}

cudaError_t band_schedule(const BandShape& shape, const BandWorkspace& workspace,
                          cudaStream_t stream) {
  const ScheduleArgs args{shape,
                          workspace.covers,
                          workspace.token_tasks,
                          workspace.chosen,
                          workspace.band_sizes,
                          workspace.positions,
                          workspace.tasks,
                          workspace.tiles,
                          workspace.num_tiles,
                          workspace.ranges};
  band_schedule_kernel<<<shape.num_bands(), kThreads, 0, stream>>>(args);
  return clear_failure(launch_status());
}

}  // namespace omni_moe::cuda
