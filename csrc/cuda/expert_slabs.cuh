// Token passes over tables that outgrow L2 while their rows are used several times: the hidden
// dimension is cut into slabs so narrow that one slab of all rows lives in L2, and blocks run slab
// by slab, all tokens in each. A table then leaves HBM once per pass, in pieces, and the gathers
// run at the rate of L2. Three launches:
//   scores: partial[slab][pair] = vector[t, slab] · table[i, slab]
//   coefficients: per pair, the sum over slabs in order, activation, routing
//   sum: out[t, slab] = Σ_k coefficient[pair] table[i, slab]
// A warp owns a (token, slab). Beside the rows, 4 bytes per pair and slab are written and read.
#pragma once

#include "common/activation.cuh"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/row_columns.cuh"
#include "expert_launch.cuh"
#include "expert_pair_grads.cuh"
#include "omni_moe/expert.h"

namespace omni_moe::cuda {

// Loads at a time in what is left of a token after its full batches.
inline constexpr int kSlabTailLoads = 2;

// Which (token, slab) a warp has: slabs in order of blockIdx, so that blocks resident together
// share a slab or two.
struct SlabTask {
  int slab;
  int64_t token;
  bool exists;  // false past the last token: the warp repeats that one and stores nothing
};

template <class Slab>
__device__ __forceinline__ SlabTask slab_task(int64_t num_tokens) {
  const uint32_t token_blocks =
      static_cast<uint32_t>((num_tokens + Slab::kWarps - 1) / Slab::kWarps);
  const uint32_t slab = blockIdx.x / token_blocks;
  const int64_t token = static_cast<int64_t>(blockIdx.x - slab * token_blocks) * Slab::kWarps +
                        threadIdx.x / kWarpSize;
  return {static_cast<int>(slab), min(token, num_tokens - 1), token < num_tokens};
}

struct SlabScoreArgs {
  const void* vectors[2];  // [T, H] each
  const void* tables[2];   // [E, H] each
  const void* indices;     // [T, K]
  IndexType index_type;
  int64_t num_tokens;
  int64_t num_experts;
  int num_pairs;  // K
  int row_bytes;
  int num_slabs;   // per table; slabs num_slabs … belong to tables[1]
  float* partial;  // [num_slabs per table in use, T * K]
};

// Where a lane stands: kLanes lanes cover a slab of one row, a warp-wide load kRows rows.
template <class T, class Slab>
struct SlabLane {
  static constexpr int kLanes = Slab::kBytes / kPieceBytes;
  static constexpr int kRows = kWarpSize / kLanes;
  int lane;
  int row_in_load;
  bool in_row;
  int byte;  // of the row; past its end: column 0 again
  int row_bytes;

  __device__ __forceinline__ SlabLane(int slab, int row_bytes_of_table)
      : lane(threadIdx.x % kWarpSize),
        row_in_load(lane / kLanes),
        in_row(slab * Slab::kBytes + lane % kLanes * kPieceBytes < row_bytes_of_table),
        byte(in_row ? slab * Slab::kBytes + lane % kLanes * kPieceBytes : 0),
        row_bytes(row_bytes_of_table) {}

  // Loads rows first, first + 1, … of the window.
  template <int kLoads>
  __device__ __forceinline__ void load_rows(const char* table, const IdWindow& ids, int first,
                                            RowPiece (&pieces)[kLoads]) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      pieces[i] = load_piece(table, ids[first + i * kRows + row_in_load], row_bytes);
    }
  }
};

// Calls body(first, tag) for batches of tag.value loads: full ones, then a few at a time.
template <class Slab, int kRows, class Body>
__device__ __forceinline__ void for_each_batch(int num_pairs, Body&& body) {
  constexpr int kBatch = kRows * Slab::kLoads;
  static_assert(kBatch <= kWarpSize);
  int first = 0;
  for (; num_pairs - first >= kBatch; first += kBatch) body(first, ValueTag<Slab::kLoads>{});
  for (; first < num_pairs; first += kRows * kSlabTailLoads)
    body(first, ValueTag<kSlabTailLoads>{});
}

template <class T, class Slab>
__global__ void __launch_bounds__(Slab::kWarps* kWarpSize, Slab::kBlocksPerSm)
    expert_slab_scores_kernel(const __grid_constant__ SlabScoreArgs args) {
  using Lane = SlabLane<T, Slab>;
  const SlabTask task = slab_task<Slab>(args.num_tokens);
  const bool second = task.slab >= args.num_slabs;
  const Lane lane(second ? task.slab - args.num_slabs : task.slab, args.row_bytes);
  const void* vectors = second ? args.vectors[1] : args.vectors[0];
  const void* rows = second ? args.tables[1] : args.tables[0];
  const char* table = static_cast<const char*>(rows) + lane.byte;
  const int num_pairs = args.num_pairs;
  const int64_t first_pair = task.token * num_pairs;
  float* partial = args.partial + task.slab * (args.num_tokens * num_pairs) + first_pair;

  IdWindow ids(args.indices, args.index_type, first_pair, num_pairs, args.num_experts, lane.lane);
  const RowPiece vector_piece = load_piece(static_cast<const char*>(vectors) + lane.byte,
                                           static_cast<int32_t>(task.token), args.row_bytes);
  for_each_batch<Slab, Lane::kRows>(num_pairs, [&](int first, auto tag) {
    constexpr int kLoads = decltype(tag)::value;
    if (first % kWarpSize == 0) ids.open(first);
    // 1. All rows of a batch.
    RowPiece pieces[kLoads];
    lane.load_rows(table, ids, first % kWarpSize, pieces);
    // 2. Their dot products, then one lane per pair.
    float vector[kVecWidth<T>];
    unpack_piece<T>(vector_piece, vector);
    float dots[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float dot = dot_piece<T>(vector, pieces[i]);
      dots[i] = lane.in_row ? dot : 0.0f;
    }
    const float dot = warp_transpose_sum<Lane::kLanes>(dots, lane.lane);
    const int pair = first + lane.lane % kLoads * Lane::kRows + lane.row_in_load;
    const bool is_first = lane.lane % Lane::kLanes < kLoads;
    if (is_first && pair < num_pairs && task.exists) partial[pair] = dot;
  });
  ids.check();
}

// A pair's score, slabs in order.
__device__ __forceinline__ float sum_slabs(const float* partial, int64_t pair, int64_t all_pairs,
                                           int num_slabs) {
  float sum = 0.0f;
#pragma unroll 8
  for (int slab = 0; slab < num_slabs; ++slab) sum += partial[slab * all_pairs + pair];
  return sum;
}

template <class T>
__global__ void __launch_bounds__(256)
    expert_forward_slab_coefficients_kernel(const __grid_constant__ ExpertForwardParams params,
                                            const float* partial, int num_slabs,
                                            float* coefficients) {
  wait_for_previous_kernel();
  const int64_t all_pairs = params.num_tokens * params.num_experts_per_token;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pair >= all_pairs) return;
  const float score = sum_slabs(partial, pair, all_pairs, num_slabs);
  const float weight = to_float(static_cast<const T*>(params.routing_weights)[pair]);
  coefficients[pair] = activate(params.activation, score) * weight;
}

// The partial sums of the second table follow those of the first.
template <class T>
__global__ void __launch_bounds__(256)
    expert_backward_slab_coefficients_kernel(const __grid_constant__ ExpertBackwardParams params,
                                             PairOutputs outputs, const float* partial,
                                             int num_slabs, float* coefficients) {
  wait_for_previous_kernel();
  const int64_t all_pairs = params.num_tokens * params.num_experts_per_token;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pair >= all_pairs) return;
  const uint32_t position = outputs.position(pair);
  const float score = sum_slabs(partial, pair, all_pairs, num_slabs);
  const float grad = sum_slabs(partial + num_slabs * all_pairs, pair, all_pairs, num_slabs);
  const float weight = to_float(static_cast<const T*>(params.routing_weights)[pair]);
  const PairGrads result = pair_grads(params.activation, score, grad, weight);
  store_pair<T>(params, outputs, pair, position, pair / params.num_experts_per_token, result);
  coefficients[pair] = result.up_coefficient;
}

struct SlabSumArgs {
  const void* table;    // [E, H]
  const void* indices;  // [T, K], checked before
  IndexType index_type;
  const float* coefficients;  // [T * K]
  void* out;                  // [T, H]
  int64_t num_tokens;
  int64_t num_experts;
  int num_pairs;  // K
  int row_bytes;
};

template <class T, class Slab>
__global__ void __launch_bounds__(Slab::kWarps* kWarpSize, Slab::kBlocksPerSm)
    expert_slab_sum_kernel(const __grid_constant__ SlabSumArgs args) {
  using Lane = SlabLane<T, Slab>;
  const SlabTask task = slab_task<Slab>(args.num_tokens);
  const Lane lane(task.slab, args.row_bytes);
  const char* table = static_cast<const char*>(args.table) + lane.byte;
  const int num_pairs = args.num_pairs;
  const int64_t first_pair = task.token * num_pairs;

  IdWindow ids(args.indices, args.index_type, first_pair, num_pairs, args.num_experts, lane.lane);
  float sum[kVecWidth<T>] = {};
  float coefficients = 0.0f;  // lane l: that of pair (first rounded down to 32) + l
  for_each_batch<Slab, Lane::kRows>(num_pairs, [&](int first, auto tag) {
    constexpr int kLoads = decltype(tag)::value;
    const int window = first % kWarpSize;
    if (window == 0) ids.open(first);
    RowPiece pieces[kLoads];
    lane.load_rows(table, ids, window, pieces);
    if (first == 0) wait_for_previous_kernel();  // the rows need no coefficients
    if (window == 0) {
      coefficients = args.coefficients[first_pair + min(first + lane.lane, num_pairs - 1)];
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int j = i * Lane::kRows + lane.row_in_load;
      const float coefficient = __shfl_sync(kFullWarp, coefficients, window + j);
      if (kLoads == Slab::kLoads || first + j < num_pairs) {
        add_piece<T>(coefficient, pieces[i], sum);
      }
    }
  });
  // The rows of a load, in the order of the butterfly.
#pragma unroll
  for (int offset = Lane::kLanes; offset < kWarpSize; offset *= 2) {
#pragma unroll
    for (int i = 0; i < kVecWidth<T>; ++i) sum[i] += __shfl_xor_sync(kFullWarp, sum[i], offset);
  }
  if (lane.in_row && lane.row_in_load == 0 && task.exists) {
    char* out = static_cast<char*>(args.out) + task.token * args.row_bytes + lane.byte;
    store_vec_streaming(out, pack_piece<T>(sum));
  }
}

// ---- Launchers ----------------------------------------------------------------------------------

template <class Slab>
cudaError_t slab_blocks(int64_t num_tokens, int64_t num_slabs, unsigned* blocks) {
  const int64_t wanted = ceil_div<int64_t>(num_tokens, Slab::kWarps) * num_slabs;
  if (wanted > INT32_MAX) return cudaErrorInvalidValue;
  *blocks = static_cast<unsigned>(wanted);
  return cudaSuccess;
}

template <class T, class Slab>
cudaError_t launch_slab_scores(const SlabScoreArgs& args, int num_tables, cudaStream_t stream) {
  unsigned blocks = 0;
  return run_steps(
      [&] { return slab_blocks<Slab>(args.num_tokens, num_tables * args.num_slabs, &blocks); },
      [&] {
        expert_slab_scores_kernel<T, Slab><<<blocks, Slab::kWarps * kWarpSize, 0, stream>>>(args);
        return launch_status();
      });
}

template <class T, class Slab>
cudaError_t launch_slab_sum(const SlabSumArgs& args, int num_slabs, const DeviceInfo& device,
                            cudaStream_t stream) {
  unsigned blocks = 0;
  return run_steps([&] { return slab_blocks<Slab>(args.num_tokens, num_slabs, &blocks); },
                   [&] {
                     return launch_early(expert_slab_sum_kernel<T, Slab>, blocks,
                                         Slab::kWarps * kWarpSize, device, stream, args);
                   });
}

// What the passes leave in the workspace.
struct SlabWorkspace {
  float* partial;       // [tables * slabs, T * K]
  float* coefficients;  // [T * K]
};

template <class T, class Slab>
cudaError_t launch_forward_slabs(const ExpertForwardParams& params, const SlabWorkspace& workspace,
                                 const DeviceInfo& device, cudaStream_t stream) {
  const int num_pairs = static_cast<int>(params.num_experts_per_token);
  const int row_bytes = static_cast<int>(params.hidden_size * sizeof(T));
  const int num_slabs = ceil_div(row_bytes, Slab::kBytes);
  const int64_t all_pairs = params.num_tokens * num_pairs;
  SlabScoreArgs scores{{params.hidden_states, nullptr},
                       {params.up_weights, nullptr},
                       params.indices,
                       params.index_type,
                       params.num_tokens,
                       params.num_experts,
                       num_pairs,
                       row_bytes,
                       num_slabs,
                       workspace.partial};
  SlabSumArgs sum{params.down_weights,
                  params.indices,
                  params.index_type,
                  workspace.coefficients,
                  params.expert_states,
                  params.num_tokens,
                  params.num_experts,
                  num_pairs,
                  row_bytes};
  return run_steps([&] { return launch_slab_scores<T, Slab>(scores, 1, stream); },
                   [&] {
                     return launch_early(expert_forward_slab_coefficients_kernel<T>,
                                         static_cast<unsigned>(ceil_div<int64_t>(all_pairs, 256)),
                                         256, device, stream, params, workspace.partial, num_slabs,
                                         workspace.coefficients);
                   },
                   [&] { return launch_slab_sum<T, Slab>(sum, num_slabs, device, stream); });
}

template <class T, class Slab>
cudaError_t launch_backward_slabs(const ExpertBackwardParams& params, const PairOutputs& outputs,
                                  const SlabWorkspace& workspace, const DeviceInfo& device,
                                  cudaStream_t stream) {
  const int num_pairs = static_cast<int>(params.num_experts_per_token);
  const int row_bytes = static_cast<int>(params.hidden_size * sizeof(T));
  const int num_slabs = ceil_div(row_bytes, Slab::kBytes);
  const int64_t all_pairs = params.num_tokens * num_pairs;
  SlabScoreArgs scores{{params.hidden_states, params.grad_expert_states},
                       {params.up_weights, params.down_weights},
                       params.indices,
                       params.index_type,
                       params.num_tokens,
                       params.num_experts,
                       num_pairs,
                       row_bytes,
                       num_slabs,
                       workspace.partial};
  SlabSumArgs sum{params.up_weights,
                  params.indices,
                  params.index_type,
                  workspace.coefficients,
                  params.grad_hidden_states,
                  params.num_tokens,
                  params.num_experts,
                  num_pairs,
                  row_bytes};
  return run_steps([&] { return launch_slab_scores<T, Slab>(scores, 2, stream); },
                   [&] {
                     return launch_early(expert_backward_slab_coefficients_kernel<T>,
                                         static_cast<unsigned>(ceil_div<int64_t>(all_pairs, 256)),
                                         256, device, stream, params, outputs, workspace.partial,
                                         num_slabs, workspace.coefficients);
                   },
                   [&] {
                     if (params.grad_hidden_states == nullptr) return cudaSuccess;
                     return launch_slab_sum<T, Slab>(sum, num_slabs, device, stream);
                   });
}

}  // namespace omni_moe::cuda
