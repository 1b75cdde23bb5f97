// Expert-ordered half of the backward:
//   grad_up[i] = Σ up_coefficient * hidden[t],  grad_down[i] = Σ down_coefficient * grad[t]
// over the pairs (t, k) of expert i, in ascending pair order. The kernel gathers 2 T K rows (from
// L2, as long as the tokens fit there) and writes each of the 2 E rows once, idle experts' with
// zeros. A warp owns a tile of the gradients, a few neighbouring experts by a stretch of columns,
// and reads the experts' pairs as one stream, so that loads run ahead across experts. Segments
// longer than part_pairs are summed in parts by other warps, and a second kernel adds the parts.
#include <algorithm>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/common/warp_scan.cuh"
#include "cuda/experts/expert_tuning.h"
#include "cuda/experts/weight_grad.h"

namespace omni_moe::cuda {
namespace {

constexpr int kThreads = WeightGradTuning::kThreads;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kCombineThreads = WeightGradTuning::kCombineThreads;
constexpr int kCombineWarps = kCombineThreads / kWarpSize;

struct WeightGradArgs {
  const void* hidden_states;
  const void* grad_expert_states;
  void* grad_up_weights;
  void* grad_down_weights;
  int64_t hidden_size;
  int64_t num_experts;
  ExpertSchedule schedule;
  const PairRecord* records;
  float* partial;
  int64_t num_column_tiles;  // of a row, one warp each
  int experts_per_warp;      // <= 32
  int num_part_blocks;       // the first blocks sum parts, the rest experts
  bool column_tile_major;    // the order of tasks, below
};

__device__ __forceinline__ PairRecord load_record(const PairRecord* record) {
  const int4 bits = *reinterpret_cast<const int4*>(record);
  return {bits.x, __int_as_float(bits.y), __int_as_float(bits.z), 0};
}

// The two sums of one expert over this lane's kVec columns.
template <class T, int kVec>
struct ColumnGrads {
  float up[kVec];
  float down[kVec];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kVec; ++i) up[i] = down[i] = 0.0f;
  }
};

// Adds records 0 … total-1 of a warp's stream. record_at(i, &record) is called by all lanes, with
// i < total or not, and returns the number of the segment that i is in; enter(segment) is called
// before the first record of each segment.
template <class T, int kVec, class RecordAt, class Enter>
__device__ __forceinline__ void add_records(const WeightGradArgs& args, int64_t total,
                                            int64_t column, int lane, ColumnGrads<T, kVec>* grads,
                                            RecordAt&& record_at, Enter&& enter) {
  constexpr int kRows = WeightGradTuning::kRows;
  static_assert(kWarpSize % kRows == 0);
  const bool in_row = column < args.hidden_size;
  const bool want_up = args.grad_up_weights != nullptr;
  const bool want_down = args.grad_down_weights != nullptr;
  const T* hidden = static_cast<const T*>(args.hidden_states) + column;
  const T* grad = static_cast<const T*>(args.grad_expert_states) + column;
  for (int64_t base = 0; base < total; base += kWarpSize) {
    PairRecord record{};
    const int segment = record_at(base + lane, &record);
    const int count = static_cast<int>(min(static_cast<int64_t>(kWarpSize), total - base));
    for (int first = 0; first < count; first += kRows) {
      // 1. Rows of kRows pairs at once.
      Vec<T, kVec> hidden_rows[kRows];
      Vec<T, kVec> grad_rows[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t offset = __shfl_sync(kFullWarp, record.token, first + r) * args.hidden_size;
        if (in_row && first + r < count) {
          if (want_up) hidden_rows[r] = load_vec<Vec<T, kVec>>(hidden + offset);
          if (want_down) grad_rows[r] = load_vec<Vec<T, kVec>>(grad + offset);
        }
      }
      // 2. Their sums, one after the other.
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float up = __shfl_sync(kFullWarp, record.up_coefficient, first + r);
        const float down = __shfl_sync(kFullWarp, record.down_coefficient, first + r);
        const int row_segment = __shfl_sync(kFullWarp, segment, first + r);
        if (first + r < count) {
          enter(row_segment);
          float row[kVec];
          if (want_up) {
            unpack(hidden_rows[r], row);
#pragma unroll
            for (int i = 0; i < kVec; ++i) grads->up[i] = fmaf(up, row[i], grads->up[i]);
          }
          if (want_down) {
            unpack(grad_rows[r], row);
#pragma unroll
            for (int i = 0; i < kVec; ++i) grads->down[i] = fmaf(down, row[i], grads->down[i]);
          }
        }
      }
    }
  }
}

template <class T, int kVec>
__device__ __forceinline__ void store_grad_row(void* table, int64_t offset,
                                               const float (&sum)[kVec]) {
  if (table == nullptr) return;
  Vec<T, kVec> packed;
  pack(sum, packed);
  // Nothing here reads these again, so that L2 stays free for the rows that are gathered.
  store_vec_streaming(static_cast<T*>(table) + offset, packed);
}

// One warp sums one column tile of the experts from first_expert on.
template <class T, int kVec>
__device__ __forceinline__ void sum_experts(const WeightGradArgs& args, int64_t first_expert,
                                            int64_t column, int lane) {
  // 1. Lane l holds the segment of the warp's expert l. Long segments count as empty here.
  const int64_t left = args.num_experts - first_expert;
  const int num_segments =
      static_cast<int>(left < args.experts_per_warp ? left : args.experts_per_warp);
  uint32_t begin = 0;
  uint32_t length = 0;
  if (lane < num_segments) {
    begin = args.schedule.segment_begin[first_expert + lane];
    length = args.schedule.segment_end[first_expert + lane] - begin;
  }
  const bool is_long = length > args.schedule.part_pairs;
  const unsigned long_segments = __ballot_sync(kFullWarp, is_long);
  if (is_long) length = 0;
  const uint32_t stream_end = warp_inclusive_scan(length);
  const uint32_t stream_begin = stream_end - length;
  const uint32_t total = __shfl_sync(kFullWarp, stream_end, kWarpSize - 1);

  // 2. Sum the stream; at each change of expert write what has been summed.
  ColumnGrads<T, kVec> grads;
  grads.clear();
  int current = 0;
  const auto finish_until = [&](int segment) {
    for (; current < segment; ++current) {
      if ((long_segments >> current & 1) == 0 && column < args.hidden_size) {
        const int64_t offset = (first_expert + current) * args.hidden_size + column;
        store_grad_row<T>(args.grad_up_weights, offset, grads.up);
        store_grad_row<T>(args.grad_down_weights, offset, grads.down);
      }
      grads.clear();
    }
  };
  const auto record_at = [&](int64_t i, PairRecord* record) {
    int segment = 0;
    for (int s = 0; s < num_segments; ++s) {
      segment += __shfl_sync(kFullWarp, stream_end, s) <= i ? 1 : 0;
    }
    const int source = segment < kWarpSize ? segment : 0;  // past the end any lane will do
    const uint32_t segment_begin = __shfl_sync(kFullWarp, begin, source);
    const uint32_t segment_start = __shfl_sync(kFullWarp, stream_begin, source);
    if (i < total) *record = load_record(args.records + segment_begin + (i - segment_start));
    return segment;
  };
  add_records<T, kVec>(args, total, column, lane, &grads, record_at, finish_until);
  finish_until(num_segments);
}

// One warp sums one column tile of a part of a long segment into `partial`.
template <class T, int kVec>
__device__ __forceinline__ void sum_part(const WeightGradArgs& args, int64_t slot, int64_t column,
                                         int lane) {
  const SegmentPart part = args.schedule.parts[slot];
  const int64_t begin = args.schedule.segment_begin[part.expert] +
                        static_cast<int64_t>(part.part) * args.schedule.part_pairs;
  const int64_t left = args.schedule.segment_end[part.expert] - begin;
  const int64_t total = min(left, static_cast<int64_t>(args.schedule.part_pairs));
  ColumnGrads<T, kVec> grads;
  grads.clear();
  const auto record_at = [&](int64_t i, PairRecord* record) {
    if (i < total) *record = load_record(args.records + begin + i);
    return 0;
  };
  add_records<T, kVec>(args, total, column, lane, &grads, record_at, [](int) {});
  if (column < args.hidden_size) {
    float* up = args.partial + slot * 2 * args.hidden_size + column;
    float* down = up + args.hidden_size;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      up[i] = grads.up[i];
      down[i] = grads.down[i];
    }
  }
}

// What a warp sums: a part of a segment or a tile of experts, and this lane's first column.
struct Task {
  int64_t item;
  int64_t column;
};

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    weight_grad_kernel(const __grid_constant__ WeightGradArgs args) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  const int64_t part_warps = static_cast<int64_t>(args.num_part_blocks) * kWarps;
  // In the order of column tiles, warps that run together gather the same columns, of which L2
  // holds all tokens. In the other order they gather all columns of the same pairs and share their
  // records.
  const auto split = [&](int64_t task, int64_t count) {
    const int64_t tile = args.column_tile_major ? task / count : task % args.num_column_tiles;
    const int64_t item = args.column_tile_major ? task % count : task / args.num_column_tiles;
    return Task{item, (tile * kWarpSize + lane) * kVec};
  };
  if (warp < part_warps) {
    const int64_t num_parts = args.schedule.counters->num_parts;
    for (int64_t task = warp; task < num_parts * args.num_column_tiles; task += part_warps) {
      const Task part = split(task, num_parts);
      sum_part<T, kVec>(args, part.item, part.column, lane);
    }
    return;
  }
  const int64_t num_expert_tiles =
      (args.num_experts + args.experts_per_warp - 1) / args.experts_per_warp;
  const int64_t task = warp - part_warps;
  if (task >= num_expert_tiles * args.num_column_tiles) return;
  const Task tile = split(task, num_expert_tiles);
  sum_experts<T, kVec>(args, tile.item * args.experts_per_warp, tile.column, lane);
}

// Adds the parts of each long segment: a block per 32 columns of one table's row, warp w taking
// parts w, w + kCombineWarps, ….
template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    weight_grad_combine_kernel(const __grid_constant__ WeightGradArgs args) {
  wait_for_previous_kernel();
  __shared__ float warp_sums[kCombineWarps][kWarpSize];
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t hidden_size = args.hidden_size;
  const int64_t column_blocks = (hidden_size + kWarpSize - 1) / kWarpSize;
  const int64_t num_tasks = args.schedule.counters->num_long * 2 * column_blocks;
  for (int64_t task = blockIdx.x; task < num_tasks; task += gridDim.x) {
    const LongSegment segment = args.schedule.long_segments[task / (2 * column_blocks)];
    const int table = static_cast<int>(task / column_blocks % 2);
    const int64_t column = task % column_blocks * kWarpSize + lane;
    T* grad = static_cast<T*>(table == 0 ? args.grad_up_weights : args.grad_down_weights);
    if (grad == nullptr) continue;  // uniform
    float sum = 0.0f;
    if (column < hidden_size) {
      const float* parts =
          args.partial + (segment.first_part * int64_t{2} + table) * hidden_size + column;
#pragma unroll 8
      for (int part = warp; part < segment.num_parts; part += kCombineWarps) {
        sum += parts[part * 2 * hidden_size];
      }
    }
    warp_sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < hidden_size) {
#pragma unroll
      for (int w = 1; w < kCombineWarps; ++w) sum += warp_sums[w][lane];
      grad[segment.expert * hidden_size + column] = from_float<T>(sum);
    }
    __syncthreads();  // before the next task overwrites warp_sums
  }
}

// So few experts per warp that short segments give it about kTargetPairs pairs.
int experts_per_warp(int64_t num_pairs, int64_t num_experts) {
  const int64_t wanted =
      int64_t{WeightGradTuning::kTargetPairs} * num_experts / std::max<int64_t>(num_pairs, 1);
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, int64_t{WeightGradTuning::kMaxExperts}));
}

template <class T, int kVec>
cudaError_t launch(WeightGradArgs args, int64_t num_tokens, int64_t num_pairs,
                   const DeviceInfo& device, cudaStream_t stream) {
  args.num_column_tiles = ceil_div<int64_t>(args.hidden_size, int64_t{kWarpSize} * kVec);
  args.experts_per_warp = experts_per_warp(num_pairs, args.num_experts);
  // The order of column tiles pays where the tokens and the gradients of both kinds together exceed
  // L2. On an H200 it took T16384 E65536 K32 from 407 to 338 µs and T4096 E65536 K16 from 90 to 84,
  // but T4096 E4096 K16 from 44.8 to 47.5 and T1024 K32 from 27.4 to 28.6.
  args.column_tile_major =
      2 * (num_tokens + args.num_experts) * args.hidden_size * static_cast<int64_t>(sizeof(T)) >
      device.l2_bytes;
  const int64_t part_tasks = args.schedule.max_parts * args.num_column_tiles;
  const int64_t part_blocks = int64_t{WeightGradTuning::kPartBlocksPerSm} * device.num_sms;
  args.num_part_blocks =
      static_cast<int>(std::min(ceil_div<int64_t>(part_tasks, kWarps), part_blocks));
  const int64_t expert_tasks =
      ceil_div<int64_t>(args.num_experts, args.experts_per_warp) * args.num_column_tiles;
  const int64_t blocks = args.num_part_blocks + ceil_div<int64_t>(expert_tasks, kWarps);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return run_steps(
      [&] {
        return launch_early(weight_grad_kernel<T, kVec>, static_cast<unsigned>(blocks), kThreads,
                            device, stream, args);
      },
      [&] {
        if (args.schedule.max_parts == 0) return cudaSuccess;
        return launch_early(weight_grad_combine_kernel<T>,
                            static_cast<unsigned>(2 * device.num_sms), kCombineThreads, device,
                            stream, args);
      });
}

}  // namespace

cudaError_t weight_grad(const ExpertBackwardParams& params, const ExpertSchedule& schedule,
                        const PairRecord* records, float* partial, const DeviceInfo& device,
                        cudaStream_t stream) {
  if (params.num_experts == 0 || params.hidden_size == 0) return cudaSuccess;
  WeightGradArgs args{};
  args.hidden_states = params.hidden_states;
  args.grad_expert_states = params.grad_expert_states;
  args.grad_up_weights = params.grad_up_weights;
  args.grad_down_weights = params.grad_down_weights;
  args.hidden_size = params.hidden_size;
  args.num_experts = params.num_experts;
  args.schedule = schedule;
  args.records = records;
  args.partial = partial;
  const int64_t num_pairs = params.num_tokens * params.num_experts_per_token;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool aligned =
        params.hidden_size * sizeof(T) % 16 == 0 && is_aligned(params.hidden_states, 16) &&
        is_aligned(params.grad_expert_states, 16) && is_aligned(params.grad_up_weights, 16) &&
        is_aligned(params.grad_down_weights, 16);
    return aligned ? launch<T, kVecWidth<T>>(args, params.num_tokens, num_pairs, device, stream)
                   : launch<T, 1>(args, params.num_tokens, num_pairs, device, stream);
  });
}

}  // namespace omni_moe::cuda
