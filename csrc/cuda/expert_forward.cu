// Forward of the atomic experts, token by token:
//   out[t] = Σ_k act(hidden[t] · up[i]) * routing[t,k] * down[i],  i = indices[t,k].
// Reads 2 T K rows of H elements (from L2 or HBM) and little else, so every strategy (plan.h) aims
// at bytes in flight: columns in registers (expert_columns.cuh), the same slab by slab for tables
// past L2 (expert_slabs.cuh), row pairs streamed through shared memory (ring), and for any shape
// and alignment, and few tokens, scores first and then columns (phased).
#include <algorithm>

#include "common/activation.cuh"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/index.cuh"
#include "common/row_gather.cuh"
#include "common/row_ring.cuh"
#include "common/workspace.h"
#include "expert_columns.cuh"
#include "expert_plan.h"
#include "expert_slabs.cuh"
#include "split_combine.cuh"
#include "tuning.h"

namespace omni_moe::cuda {
namespace {

// ---- Phased: a block per token, or per part of a token's pairs ----------------------------------

template <class T, int kVec, int kThreads>
using ForwardColumnSum = ColumnSum<T, kVec, kThreads, PhasedTuning::kColumnRows>;

template <class T, int kVec, int kThreads>
size_t phased_shared_bytes(int64_t pairs_per_split) {
  const size_t pairs = static_cast<size_t>(round_up<int64_t>(pairs_per_split, 4));
  return pairs * (sizeof(int32_t) + sizeof(float)) +
         ForwardColumnSum<T, kVec, kThreads>::kScratchFloats * sizeof(float);
}

// Grid (T, num_splits). With num_splits > 1 the sums go to `partial` [T, num_splits, H].
template <class T, int kVec, int kThreads, int kBlocksPerSm>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    expert_forward_phased_kernel(const __grid_constant__ ExpertForwardParams params,
                                 int pairs_per_split, float* partial) {
  constexpr int kWarps = kThreads / kWarpSize;
  constexpr int kRows = PhasedTuning::kScoreRows;
  constexpr int kChunks =
      kVec == 1 ? PhasedTuning::kScalarChunksPerLane : PhasedTuning::kChunksPerLane;
  extern __shared__ __align__(128) char shared[];
  const int padded_pairs = round_up(pairs_per_split, 4);
  int32_t* ids = reinterpret_cast<int32_t*>(shared);
  float* coefficients = reinterpret_cast<float*>(ids + padded_pairs);
  float* scratch = coefficients + padded_pairs;

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = blockIdx.x;
  const int64_t hidden_size = params.hidden_size;
  const int64_t first_k = static_cast<int64_t>(blockIdx.y) * pairs_per_split;
  const int64_t left = params.num_experts_per_token - first_k;
  const int num_pairs = static_cast<int>(left < pairs_per_split ? left : pairs_per_split);
  const int64_t first_pair = token * params.num_experts_per_token + first_k;

  // 1. Ids and routing weights of the block's pairs.
  const T* routing = static_cast<const T*>(params.routing_weights) + first_pair;
  for (int j = threadIdx.x; j < num_pairs; j += kThreads) {
    ids[j] = load_expert_id(params.indices, params.index_type, first_pair + j, params.num_experts);
    coefficients[j] = to_float(routing[j]);
  }
  __syncthreads();

  // 2. coefficients[j] = act(hidden · up) * routing, kRows pairs at a time per warp.
  ForwardColumnSum<T, kVec, kThreads> columns(static_cast<const T*>(params.down_weights), ids,
                                              num_pairs, hidden_size);
  // Few tokens: latency is all, and there are registers to start the down rows with the up rows.
  constexpr bool kPrefetchEarly = kThreads > PhasedTuning::kThreads;
  if constexpr (kPrefetchEarly) columns.prefetch();
  LaneRow<T, kVec, kChunks> hidden;
  int64_t hidden_tile = -1;
  for (int first = warp; first < num_pairs; first += kWarps * kRows) {
    int32_t rows[kRows];
    float scores[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // past the end: the first row again
      const int j = first + r * kWarps;
      rows[r] = ids[j < num_pairs ? j : first];
    }
    warp_dot_rows(static_cast<const T*>(params.hidden_states) + token * hidden_size,
                  static_cast<const T*>(params.up_weights), rows, hidden_size, lane, &hidden,
                  &hidden_tile, scores);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int j = first + r * kWarps;
      if (lane == 0 && j < num_pairs) coefficients[j] *= activate(params.activation, scores[r]);
    }
  }
  if constexpr (!kPrefetchEarly) columns.prefetch();
  __syncthreads();

  // 3. Σ_j coefficients[j] * down row.
  if (gridDim.y == 1) {
    T* out = static_cast<T*>(params.expert_states) + token * hidden_size;
    columns.run(coefficients, scratch, [&](int64_t column, const float(&sum)[kVec]) {
      Vec<T, kVec> packed;
      pack(sum, packed);
      store_vec(out + column, packed);
    });
  } else {
    float* out = partial + (token * gridDim.y + blockIdx.y) * hidden_size;
    columns.run(coefficients, scratch, [&](int64_t column, const float(&sum)[kVec]) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) out[column + i] = sum[i];
    });
  }
}

template <class T, int kVec, int kThreads, int kBlocksPerSm>
cudaError_t launch_phased(const ExpertForwardParams& params, const TokenPassPlan& plan,
                          cudaStream_t stream) {
  const auto kernel = expert_forward_phased_kernel<T, kVec, kThreads, kBlocksPerSm>;
  const size_t shared_bytes = phased_shared_bytes<T, kVec, kThreads>(plan.pairs_per_split);
  const dim3 grid(static_cast<unsigned>(params.num_tokens), static_cast<unsigned>(plan.num_splits));
  float* partial = static_cast<float*>(params.workspace);
  return run_steps([&] { return allow_shared_memory(kernel, shared_bytes); },
                   [&] {
                     kernel<<<grid, kThreads, shared_bytes, stream>>>(
                         params, static_cast<int>(plan.pairs_per_split), partial);
                     return launch_status();
                   },
                   [&] {
                     if (plan.num_splits == 1) return cudaSuccess;
                     return launch_split_combine(partial, static_cast<T*>(params.expert_states),
                                                 params.num_tokens, plan.num_splits,
                                                 params.hidden_size, stream);
                   });
}

// ---- Ring: a warp per token ---------------------------------------------------------------------

template <class T, int kChunks, RowCopy kCopy>
__global__ void __launch_bounds__(RingTuning::kWarpsPerBlock* kWarpSize,
                                  RingShape<kChunks>::kBlocksPerSm)
    expert_forward_ring_kernel(const __grid_constant__ ExpertForwardParams params) {
  constexpr int kStages = RingShape<kChunks>::kStages;
  constexpr int kWarps = RingTuning::kWarpsPerBlock;
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t barriers[kWarps][kStages];
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int num_pairs = static_cast<int>(params.num_experts_per_token);
  const int row_bytes = static_cast<int>(params.hidden_size * sizeof(T));
  const char* up = static_cast<const char*>(params.up_weights);
  const char* down = static_cast<const char*>(params.down_weights);
  const uint32_t num_tokens = static_cast<uint32_t>(params.num_tokens);
  const uint32_t first_token = blockIdx.x * kWarps + warp;
  const uint32_t stride = gridDim.x * kWarps;

  // 1. Fill the ring.
  RowRing<kCopy, kStages> ring(shared + warp * ring_bytes(kStages, row_bytes), barriers[warp],
                               row_bytes, lane);
  PairCursor ahead(params.indices, params.index_type, num_tokens, num_pairs, params.num_experts,
                   first_token, stride, lane);
  const auto push_next = [&] {
    if (ahead.done()) {
      ring.push_nothing();
      return;
    }
    const int64_t offset = static_cast<int64_t>(ahead.expert()) * row_bytes;
    ring.push(up + offset, down + offset);
    ahead.advance();
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) push_next();

  for (uint32_t next = first_token; next < num_tokens; next += stride) {
    const int64_t token = next;
    // 2. The token's own row stays in registers.
    LanePieces<T, kChunks> hidden;
    hidden.load_global(static_cast<const char*>(params.hidden_states) + token * row_bytes,
                       row_bytes, lane);
    const T* routing = static_cast<const T*>(params.routing_weights) + token * num_pairs;
    LaneSum<T, kChunks> sum;
    sum.clear();
    float weights = 0.0f;  // lane l: routing weight of pair (k rounded down to 32) + l
    for (int k = 0; k < num_pairs; ++k) {
      if (k % kWarpSize == 0 && lane < num_pairs - k) weights = to_float(routing[k + lane]);
      // 3. Score, then add the down row, as the pairs arrive.
      const char* stage = ring.wait();
      LanePieces<T, kChunks> row;
      row.load_shared(stage, row_bytes, lane);
      const float score = warp_sum(hidden.dot(row));
      row.load_shared(stage + row_bytes, row_bytes, lane);
      const float weight = __shfl_sync(kFullWarp, weights, k % kWarpSize);
      sum.add(activate(params.activation, score) * weight, row);
      ring.release();
      push_next();
    }
    // 4. One rounding.
    sum.store(static_cast<char*>(params.expert_states) + token * row_bytes, row_bytes, lane);
  }
}

template <class T, int kChunks, RowCopy kCopy>
cudaError_t launch_ring(const ExpertForwardParams& params, const DeviceInfo& device,
                        cudaStream_t stream) {
  constexpr int kWarps = RingTuning::kWarpsPerBlock;
  const auto kernel = expert_forward_ring_kernel<T, kChunks, kCopy>;
  const size_t shared_bytes =
      kWarps * ring_bytes(RingShape<kChunks>::kStages, params.hidden_size * sizeof(T));
  const int64_t wanted = ceil_div<int64_t>(params.num_tokens, kWarps);
  const int64_t resident = int64_t{RingShape<kChunks>::kBlocksPerSm} * device.num_sms;
  return run_steps([&] { return allow_shared_memory(kernel, shared_bytes); },
                   [&] {
                     kernel<<<static_cast<unsigned>(wanted < resident ? wanted : resident),
                              kWarps * kWarpSize, shared_bytes, stream>>>(params);
                     return launch_status();
                   });
}

// ---- Launcher -----------------------------------------------------------------------------------

bool is_supported(const ExpertForwardParams& params) {
  constexpr int64_t kMax = INT32_MAX;  // grid size; ids and k are 32-bit in registers
  return params.num_tokens >= 0 && params.num_tokens <= kMax && params.hidden_size >= 0 &&
         params.num_experts >= 0 && params.num_experts <= kMax &&
         params.num_experts_per_token >= 0 && params.num_experts_per_token <= kMax &&
         element_size(params.dtype) != 0 && is_valid(params.activation) &&
         is_valid(params.index_type);
}

template <class T>
cudaError_t launch_phased(const ExpertForwardParams& params, const TokenPassPlan& plan,
                          bool is_aligned, cudaStream_t stream) {
  constexpr int kDecodeThreads = PhasedTuning::kDecodeThreads;
  constexpr int kDecodeBlocks = PhasedTuning::kDecodeBlocksPerSm;
  constexpr int kThreads = PhasedTuning::kThreads;
  constexpr int kBlocks = PhasedTuning::kBlocksPerSm;
  if (plan.threads == kDecodeThreads) {
    return is_aligned
               ? launch_phased<T, kVecWidth<T>, kDecodeThreads, kDecodeBlocks>(params, plan, stream)
               : launch_phased<T, 1, kDecodeThreads, kDecodeBlocks>(params, plan, stream);
  }
  return is_aligned ? launch_phased<T, kVecWidth<T>, kThreads, kBlocks>(params, plan, stream)
                    : launch_phased<T, 1, kThreads, kBlocks>(params, plan, stream);
}

template <class T>
cudaError_t launch_ring(const ExpertForwardParams& params, const TokenPassPlan& plan,
                        const DeviceInfo& device, cudaStream_t stream) {
  const bool bulk = plan.copy == RowCopy::kBulk;
  if (plan.chunks_per_lane == 4) {
    return bulk ? launch_ring<T, 4, RowCopy::kBulk>(params, device, stream)
                : launch_ring<T, 4, RowCopy::kAsync>(params, device, stream);
  }
  return bulk ? launch_ring<T, 8, RowCopy::kBulk>(params, device, stream)
              : launch_ring<T, 8, RowCopy::kAsync>(params, device, stream);
}

template <class T, int kMaxRowBytes>
cudaError_t launch_columns(const ExpertForwardParams& params, cudaStream_t stream) {
  using Tuning = ForwardColumnsTuning<kMaxRowBytes>;
  return launch_columns<Tuning>(expert_forward_columns_kernel<T, Tuning>, params.num_tokens,
                                params.hidden_size * sizeof(T), stream, params);
}

template <class T>
cudaError_t launch_slabs(const ExpertForwardParams& params, const TokenPassShape& shape,
                         const TokenPassPlan& plan, const DeviceInfo& device, cudaStream_t stream) {
  WorkspaceCutter cutter(params.workspace);
  const size_t pairs = static_cast<size_t>(params.num_tokens * params.num_experts_per_token);
  const size_t floats = token_pass_workspace_floats(shape, plan);
  SlabWorkspace workspace{};
  workspace.partial = cutter.take<float>(floats);
  workspace.coefficients = workspace.partial + (floats - pairs);
  return plan.slab_bytes == 512
             ? launch_forward_slabs<T, SlabTuning<512>>(params, workspace, device, stream)
             : launch_forward_slabs<T, SlabTuning<256>>(params, workspace, device, stream);
}

}  // namespace

TokenPassShape token_pass_shape(const ExpertForwardParams& params) {
  const size_t element = element_size(params.dtype);
  return {params.num_tokens,
          params.hidden_size,
          params.num_experts,
          params.num_experts_per_token,
          element,
          params.hidden_size * element % 16 == 0 && is_aligned(params.hidden_states, 16) &&
              is_aligned(params.up_weights, 16) && is_aligned(params.down_weights, 16) &&
              is_aligned(params.expert_states, 16),
          1};
}

cudaError_t expert_forward(const ExpertForwardParams& params, const TokenPassPlan& plan,
                           cudaStream_t stream) {
  if (!is_supported(params)) return cudaErrorInvalidValue;
  if (params.num_tokens == 0 || params.hidden_size == 0) return cudaSuccess;
  const TokenPassShape shape = token_pass_shape(params);
  if (!supports(plan.strategy, shape)) return cudaErrorInvalidValue;
  DeviceInfo device;
  const cudaError_t status = current_device_info(&device);
  if (status != cudaSuccess) return status;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (plan.strategy) {
      case TokenPassStrategy::kPhased:
        return launch_phased<T>(params, plan, shape.is_aligned, stream);
      case TokenPassStrategy::kColumns:
        return params.hidden_size * sizeof(T) <= 2048 ? launch_columns<T, 2048>(params, stream)
                                                      : launch_columns<T, 4096>(params, stream);
      case TokenPassStrategy::kRing:
        return launch_ring<T>(params, plan, device, stream);
      case TokenPassStrategy::kSlabs:
        return launch_slabs<T>(params, shape, plan, device, stream);
    }
    return cudaErrorInvalidValue;
  });
}

cudaError_t expert_forward(const ExpertForwardParams& params, cudaStream_t stream) {
  if (!is_supported(params)) return cudaErrorInvalidValue;
  ExpertDeviceInfo device;
  const cudaError_t status = current_expert_device_info(&device);
  if (status != cudaSuccess) return status;
  return expert_forward(params, plan_token_pass(token_pass_shape(params), device), stream);
}

size_t expert_forward_workspace_size(const ExpertForwardParams& params, const TokenPassPlan& plan) {
  const size_t floats = token_pass_workspace_floats(token_pass_shape(params), plan);
  return round_up<size_t>(floats * sizeof(float), WorkspaceCutter::kAlignment);
}

// Enough for this shape with any alignment.
size_t expert_forward_workspace_size(const ExpertForwardParams& params) {
  ExpertDeviceInfo device;
  if (!is_supported(params) || current_expert_device_info(&device) != cudaSuccess) return 0;
  TokenPassShape shape = token_pass_shape(params);
  size_t bytes = 0;
  for (const bool aligned : {false, true}) {
    shape.is_aligned = aligned && params.hidden_size * shape.element_size % 16 == 0;
    bytes = std::max(bytes, expert_forward_workspace_size(params, plan_token_pass(shape, device)));
  }
  return bytes;
}

}  // namespace omni_moe::cuda
