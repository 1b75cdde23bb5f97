// Backward of the atomic experts in two orders. With s = hidden[t] · up[i], g = grad[t] · down[i]:
//   token order (here): grad_routing[t,k] = act(s) g,  grad_hidden[t] = Σ_k routing act'(s) g
//   up[i],
//     and per pair the two coefficients below, dropped at the pair's place in expert order;
//   expert order (weight_grad.cu): grad_down[i] = Σ routing act(s) grad[t],
//     grad_up[i] = Σ routing act'(s) g hidden[t].
// The token pass reads 2 T K rows like the forward (the phased kernel reads the up rows twice) and
// writes 16 bytes per pair.
#include <algorithm>

#include "common/activation.cuh"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/index.cuh"
#include "common/row_gather.cuh"
#include "common/row_ring.cuh"
#include "common/workspace.h"
#include "expert_columns.cuh"
#include "expert_pair_grads.cuh"
#include "expert_plan.h"
#include "expert_slabs.cuh"
#include "schedule.h"
#include "split_combine.cuh"
#include "tuning.h"
#include "weight_grad.h"

namespace omni_moe::cuda {
namespace {

// ---- Phased: a block per token, or per part of a token's pairs ----------------------------------

constexpr int kPhasedThreads = BackwardPhasedTuning::kThreads;

template <class T, int kVec>
using BackwardColumnSum = ColumnSum<T, kVec, kPhasedThreads, BackwardPhasedTuning::kColumnRows>;

// Grid (T, num_splits). With num_splits > 1 grad_hidden goes to `partial` [T, num_splits, H].
template <class T, int kVec>
__global__ void __launch_bounds__(kPhasedThreads, BackwardPhasedTuning::kBlocksPerSm)
    expert_backward_phased_kernel(const __grid_constant__ ExpertBackwardParams params,
                                  PairOutputs outputs, int pairs_per_split, float* partial) {
  constexpr int kWarps = kPhasedThreads / kWarpSize;
  constexpr int kRows = BackwardPhasedTuning::kScoreRows;
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
  for (int j = threadIdx.x; j < num_pairs; j += kPhasedThreads) {
    ids[j] = load_expert_id(params.indices, params.index_type, first_pair + j, params.num_experts);
    coefficients[j] = to_float(routing[j]);
  }
  __syncthreads();

  // 2. Both dot products of kRows pairs at a time per warp; the pair's results.
  LaneRow<T, kVec, kChunks> hidden;
  LaneRow<T, kVec, kChunks> grad;
  int64_t hidden_tile = -1;
  int64_t grad_tile = -1;
  for (int first = warp; first < num_pairs; first += kWarps * kRows) {
    int32_t rows[kRows];
    float scores[kRows];
    float grads[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // past the end: the first row again
      const int j = first + r * kWarps;
      rows[r] = ids[j < num_pairs ? j : first];
    }
    warp_dot_rows(static_cast<const T*>(params.hidden_states) + token * hidden_size,
                  static_cast<const T*>(params.up_weights), rows, hidden_size, lane, &hidden,
                  &hidden_tile, scores);
    warp_dot_rows(static_cast<const T*>(params.grad_expert_states) + token * hidden_size,
                  static_cast<const T*>(params.down_weights), rows, hidden_size, lane, &grad,
                  &grad_tile, grads);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int j = first + r * kWarps;
      if (lane == 0 && j < num_pairs) {
        const PairGrads result =
            pair_grads(params.activation, scores[r], grads[r], coefficients[j]);
        const int64_t pair = first_pair + j;
        store_pair<T>(params, outputs, pair, outputs.position(pair), token, result);
        coefficients[j] = result.up_coefficient;
      }
    }
  }
  if (params.grad_hidden_states == nullptr) return;  // uniform

  // 3. grad_hidden = Σ_j coefficients[j] * up row.
  BackwardColumnSum<T, kVec> columns(static_cast<const T*>(params.up_weights), ids, num_pairs,
                                     hidden_size);
  columns.prefetch();
  __syncthreads();
  if (gridDim.y == 1) {
    T* out = static_cast<T*>(params.grad_hidden_states) + token * hidden_size;
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

template <class T, int kVec>
cudaError_t launch_phased(const ExpertBackwardParams& params, const PairOutputs& outputs,
                          const TokenPassPlan& plan, float* partial, cudaStream_t stream) {
  const auto kernel = expert_backward_phased_kernel<T, kVec>;
  const size_t pairs = static_cast<size_t>(round_up<int64_t>(plan.pairs_per_split, 4));
  const size_t shared_bytes = pairs * (sizeof(int32_t) + sizeof(float)) +
                              BackwardColumnSum<T, kVec>::kScratchFloats * sizeof(float);
  const dim3 grid(static_cast<unsigned>(params.num_tokens), static_cast<unsigned>(plan.num_splits));
  return run_steps([&] { return allow_shared_memory(kernel, shared_bytes); },
                   [&] {
                     kernel<<<grid, kPhasedThreads, shared_bytes, stream>>>(
                         params, outputs, static_cast<int>(plan.pairs_per_split), partial);
                     return launch_status();
                   },
                   [&] {
                     if (plan.num_splits == 1 || params.grad_hidden_states == nullptr)
                       return cudaSuccess;
                     return launch_split_combine(
                         partial, static_cast<T*>(params.grad_hidden_states), params.num_tokens,
                         plan.num_splits, params.hidden_size, stream);
                   });
}

// ---- Ring: a warp per token ---------------------------------------------------------------------

template <class T, int kChunks, RowCopy kCopy>
__global__ void __launch_bounds__(RingTuning::kWarpsPerBlock* kWarpSize,
                                  RingShape<kChunks>::kBlocksPerSm)
    expert_backward_ring_kernel(const __grid_constant__ ExpertBackwardParams params,
                                PairOutputs outputs) {
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
    // 2. The token's own rows stay in registers.
    LanePieces<T, kChunks> hidden;
    LanePieces<T, kChunks> grad;
    hidden.load_global(static_cast<const char*>(params.hidden_states) + token * row_bytes,
                       row_bytes, lane);
    grad.load_global(static_cast<const char*>(params.grad_expert_states) + token * row_bytes,
                     row_bytes, lane);
    const int64_t first_pair = token * num_pairs;
    const T* routing = static_cast<const T*>(params.routing_weights) + first_pair;
    LaneSum<T, kChunks> sum;
    sum.clear();
    float weights = 0.0f;  // lane l: routing weight of pair (k rounded down to 32) + l
    PairGrads mine{};      // lane l: results of that pair
    for (int k = 0; k < num_pairs; ++k) {
      const int slot = k % kWarpSize;
      if (slot == 0 && lane < num_pairs - k) weights = to_float(routing[k + lane]);
      // 3. Both dot products, then the up row again, as the pairs arrive.
      const char* stage = ring.wait();
      hidden.keep_packed();
      grad.keep_packed();
      LanePieces<T, kChunks> row;
      float dots[2];
      row.load_shared(stage + row_bytes, row_bytes, lane);
      dots[1] = grad.dot(row);
      row.load_shared(stage, row_bytes, lane);
      dots[0] = hidden.dot(row);
      ring.release();
      push_next();
      warp_sum(dots);
      const float weight = __shfl_sync(kFullWarp, weights, slot);
      const PairGrads result = pair_grads(params.activation, dots[0], dots[1], weight);
      row.keep_packed();
      sum.add(result.up_coefficient, row);
      // 4. 32 pairs' results at once.
      if (lane == slot) mine = result;
      if ((slot == kWarpSize - 1 || k == num_pairs - 1) && lane <= slot) {
        const int64_t pair = first_pair + (k - slot) + lane;
        store_pair<T>(params, outputs, pair, outputs.position(pair), token, mine);
      }
    }
    // 5. One rounding.
    if (params.grad_hidden_states != nullptr) {
      sum.store(static_cast<char*>(params.grad_hidden_states) + token * row_bytes, row_bytes, lane);
    }
  }
}

template <class T, int kChunks, RowCopy kCopy>
cudaError_t launch_ring(const ExpertBackwardParams& params, const PairOutputs& outputs,
                        const DeviceInfo& device, cudaStream_t stream) {
  constexpr int kWarps = RingTuning::kWarpsPerBlock;
  const auto kernel = expert_backward_ring_kernel<T, kChunks, kCopy>;
  const size_t shared_bytes =
      kWarps * ring_bytes(RingShape<kChunks>::kStages, params.hidden_size * sizeof(T));
  const int64_t wanted = ceil_div<int64_t>(params.num_tokens, kWarps);
  const int64_t resident = int64_t{RingShape<kChunks>::kBlocksPerSm} * device.num_sms;
  return run_steps([&] { return allow_shared_memory(kernel, shared_bytes); },
                   [&] {
                     kernel<<<static_cast<unsigned>(wanted < resident ? wanted : resident),
                              kWarps * kWarpSize, shared_bytes, stream>>>(params, outputs);
                     return launch_status();
                   });
}

// ---- Launcher -----------------------------------------------------------------------------------

bool is_supported(const ExpertBackwardParams& params) {
  constexpr int64_t kMax = INT32_MAX;  // grid size; ids, k and pair ids are 32-bit
  const bool in_range = params.num_tokens >= 0 && params.num_tokens <= kMax &&
                        params.hidden_size >= 0 && params.num_experts >= 0 &&
                        params.num_experts <= kMax && params.num_experts_per_token >= 0 &&
                        params.num_experts_per_token <= kMax;
  return in_range && params.num_tokens * params.num_experts_per_token <= kMax &&
         element_size(params.dtype) != 0 && is_valid(params.activation) &&
         is_valid(params.index_type);
}

template <class T>
cudaError_t launch_ring(const ExpertBackwardParams& params, const PairOutputs& outputs,
                        const TokenPassPlan& plan, const DeviceInfo& device, cudaStream_t stream) {
  const bool bulk = plan.copy == RowCopy::kBulk;
  if (plan.chunks_per_lane == 4) {
    return bulk ? launch_ring<T, 4, RowCopy::kBulk>(params, outputs, device, stream)
                : launch_ring<T, 4, RowCopy::kAsync>(params, outputs, device, stream);
  }
  return bulk ? launch_ring<T, 8, RowCopy::kBulk>(params, outputs, device, stream)
              : launch_ring<T, 8, RowCopy::kAsync>(params, outputs, device, stream);
}

template <class T, int kMaxRowBytes>
cudaError_t launch_columns(const ExpertBackwardParams& params, const PairOutputs& outputs,
                           cudaStream_t stream) {
  using Tuning = BackwardColumnsTuning<kMaxRowBytes>;
  return launch_columns<Tuning>(expert_backward_columns_kernel<T, Tuning>, params.num_tokens,
                                params.hidden_size * sizeof(T), stream, params, outputs);
}

struct BackwardWorkspace {
  float* token_pass;  // token_pass_workspace_floats
  size_t token_pass_floats;
  ScheduleWorkspace schedule;
  PairRecord* records;    // [T * K]
  float* weight_partial;  // parts of long segments
  size_t size;
};

// The layout does not depend on which gradients are wanted.
BackwardWorkspace cut_workspace(const ExpertBackwardParams& params, size_t token_pass_floats) {
  WorkspaceCutter cutter(params.workspace);
  BackwardWorkspace workspace{};
  const int64_t num_pairs = params.num_tokens * params.num_experts_per_token;
  workspace.token_pass_floats = token_pass_floats;
  workspace.token_pass = cutter.take<float>(token_pass_floats);
  workspace.schedule = take_schedule_workspace({num_pairs, params.num_experts}, &cutter);
  workspace.records = cutter.take<PairRecord>(num_pairs);
  workspace.weight_partial = cutter.take<float>(
      weight_grad_partial_count(workspace.schedule.schedule, params.hidden_size));
  workspace.size = cutter.size();
  return workspace;
}

template <class T>
cudaError_t launch_slabs(const ExpertBackwardParams& params, const PairOutputs& outputs,
                         const TokenPassPlan& plan, const BackwardWorkspace& workspace,
                         const DeviceInfo& device, cudaStream_t stream) {
  const int64_t num_pairs = params.num_tokens * params.num_experts_per_token;
  const SlabWorkspace slabs = {workspace.token_pass,
                               workspace.token_pass + workspace.token_pass_floats - num_pairs};
  return plan.slab_bytes == 512
             ? launch_backward_slabs<T, SlabTuning<512>>(params, outputs, slabs, device, stream)
             : launch_backward_slabs<T, SlabTuning<256>>(params, outputs, slabs, device, stream);
}

cudaError_t token_pass(const ExpertBackwardParams& params, const PairOutputs& outputs,
                       const TokenPassPlan& plan, const BackwardWorkspace& workspace,
                       const DeviceInfo& device, cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (plan.strategy) {
      case TokenPassStrategy::kPhased:
        return token_pass_shape(params).is_aligned
                   ? launch_phased<T, kVecWidth<T>>(params, outputs, plan, workspace.token_pass,
                                                    stream)
                   : launch_phased<T, 1>(params, outputs, plan, workspace.token_pass, stream);
      case TokenPassStrategy::kColumns:
        return params.hidden_size * sizeof(T) <= 2048
                   ? launch_columns<T, 2048>(params, outputs, stream)
                   : launch_columns<T, 4096>(params, outputs, stream);
      case TokenPassStrategy::kRing:
        return launch_ring<T>(params, outputs, plan, device, stream);
      case TokenPassStrategy::kSlabs:
        return launch_slabs<T>(params, outputs, plan, workspace, device, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace

TokenPassShape token_pass_shape(const ExpertBackwardParams& params) {
  const size_t element = element_size(params.dtype);
  return {params.num_tokens,
          params.hidden_size,
          params.num_experts,
          params.num_experts_per_token,
          element,
          params.hidden_size * element % 16 == 0 && is_aligned(params.grad_expert_states, 16) &&
              is_aligned(params.hidden_states, 16) && is_aligned(params.up_weights, 16) &&
              is_aligned(params.down_weights, 16) && is_aligned(params.grad_hidden_states, 16),
          2};
}

cudaError_t expert_backward(const ExpertBackwardParams& params, const TokenPassPlan& plan,
                            cudaStream_t stream) {
  if (!is_supported(params)) return cudaErrorInvalidValue;
  if (params.hidden_size == 0 && params.num_tokens * params.num_experts_per_token == 0) {
    return cudaSuccess;
  }
  const TokenPassShape shape = token_pass_shape(params);
  if (!supports(plan.strategy, shape)) return cudaErrorInvalidValue;
  DeviceInfo device;
  const cudaError_t status = current_device_info(&device);
  if (status != cudaSuccess) return status;
  const BackwardWorkspace workspace =
      cut_workspace(params, token_pass_workspace_floats(shape, plan));
  const ExpertSchedule& schedule = workspace.schedule.schedule;
  const bool want_weights =
      params.grad_up_weights != nullptr || params.grad_down_weights != nullptr;
  const PairOutputs outputs = {want_weights ? workspace.records : nullptr,
                               want_weights ? schedule.pair_position : nullptr};
  const ScheduleShape schedule_shape = {params.num_tokens * params.num_experts_per_token,
                                        params.num_experts};
  return run_steps(
      [&] {
        if (!want_weights) return cudaSuccess;
        return schedule_pairs(schedule_shape, params.indices, params.index_type, workspace.schedule,
                              device, stream);
      },
      [&] { return token_pass(params, outputs, plan, workspace, device, stream); },
      [&] {
        if (!want_weights) return cudaSuccess;
        return weight_grad(params, schedule, workspace.records, workspace.weight_partial, device,
                           stream);
      });
}

cudaError_t expert_backward(const ExpertBackwardParams& params, cudaStream_t stream) {
  if (!is_supported(params)) return cudaErrorInvalidValue;
  ExpertDeviceInfo device;
  const cudaError_t status = current_expert_device_info(&device);
  if (status != cudaSuccess) return status;
  return expert_backward(params, plan_token_pass(token_pass_shape(params), device), stream);
}

size_t expert_backward_workspace_size(const ExpertBackwardParams& params,
                                      const TokenPassPlan& plan) {
  ExpertBackwardParams sizes_only = params;
  sizes_only.workspace = nullptr;
  return cut_workspace(sizes_only, token_pass_workspace_floats(token_pass_shape(params), plan))
      .size;
}

// Enough for this shape with any alignment.
size_t expert_backward_workspace_size(const ExpertBackwardParams& params) {
  ExpertDeviceInfo device;
  if (!is_supported(params) || current_expert_device_info(&device) != cudaSuccess) return 0;
  TokenPassShape shape = token_pass_shape(params);
  size_t bytes = 0;
  for (const bool aligned : {false, true}) {
    shape.is_aligned = aligned && params.hidden_size * shape.element_size % 16 == 0;
    bytes = std::max(bytes, expert_backward_workspace_size(params, plan_token_pass(shape, device)));
  }
  return bytes;
}

}  // namespace omni_moe::cuda
