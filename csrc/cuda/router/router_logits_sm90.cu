// The router's logits in one Hopper kernel: both gates' products, statistics of the batch, and the
// normalised result:
//   logits = x [gate_x; gate_y]ᵀ,  normed = (logits - mean) inv_std of each column.
//
// A warpgroup makes 64 tokens by 64 columns and keeps them in registers while the grid agrees on
// the statistics: the products never reach memory. So the grid must fit on the device at once (a
// cooperative launch); larger problems take a matrix product and batch_norm_forward.cu. What counts
// here is latency, since 2 T (R + C) H FLOP and T (H + R + C) elements are 2 to 6 µs of work.
//
// The two blocks of a cluster take neighbouring tokens and share their tiles of the gates: each
// loads half of them, which TMA writes to both. (Larger clusters would read less of L2, but do not
// fill the device: an H200 holds 30 of four.)
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/hopper/mainloop.cuh"
#include "cuda/hopper/mbarrier.cuh"
#include "cuda/hopper/stmatrix.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/hopper/wgmma.cuh"
#include "cuda/router/batch_norm_common.cuh"
#include "cuda/router/router_logits_layout.cuh"
#include "cuda/router/router_logits_moments.cuh"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

namespace {

using namespace router_logits;
using batch_norm::RunningStatistics;

// ---- Products -----------------------------------------------------------------------------------

template <class B>
__device__ __forceinline__ void load_stages(const Arguments& args, SharedStorage<B>& shared) {
  constexpr int kHalf = kPanelCols / kCluster;
  const int first_row = blockIdx.x % kCluster * kHalf;
  RingCursor<B::kStages> ring;
  for (int k = 0; k < args.num_stages; ++k, ring.advance()) {
    const int stage = ring.stage;
    uint64_t* full = &shared.full[stage];
    mbarrier_wait(&shared.empty[stage], ring.parity ^ 1);
    // The other block's parts may have come already: they count once these bytes are expected.
    mbarrier_arrive_expect(full, B::kStageBytes);
#pragma unroll
    for (int i = 0; i < B::kPanels; ++i) {
      const Panel panel(args, blockIdx.y * B::kPanels + i);
      tma_load_multicast(args.gates[panel.is_y],
                         shared.gates[stage][i] + first_row * kSwizzleRowBytes, full,
                         panel.col + first_row, k * kStageDepth, 0b11);
    }
    tma_load(args.x, shared.x[stage], full, blockIdx.x * B::kTokens, k * kStageDepth);
  }
}

// ---- Results ------------------------------------------------------------------------------------

// Moments and 1 / sqrt(var + eps) of two columns, and their place in `statistics` for the panel.
template <class B, bool kTraining, class T>
__device__ __forceinline__ void find_scales(const Arguments& args,
                                            const RunningStatistics<T>& running, const Panel& panel,
                                            int column_pair, bool is_owner,
                                            PanelStatistics<B>& statistics, float2 (&moments)[2],
                                            float (&inv_stds)[2]) {
  const auto eps = static_cast<float>(args.norm.eps);
  if constexpr (kTraining) {
    if (panel.index < args.num_panels) batch_moments<B>(args, panel, column_pair, moments);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int col = column_pair * 2 + i;
    float var = moments[i].y * args.token_share;
    if (!kTraining && is_owner && panel.col + col < panel.width) {
      moments[i].x = running.load(running.buffers.running_mean, panel.col + col);
      var = running.load(running.buffers.running_var, panel.col + col);
    }
    inv_stds[i] = rsqrtf(var + eps);
    if (is_owner) statistics.scales[col] = make_float2(moments[i].x, inv_stds[i]);
  }
}

// Writes the warp's 16 rows of its panel, by way of `buffer`, the warp's alone.
template <class T, class B>
__device__ __forceinline__ void store_normed(const Arguments& args,
                                             const PanelStatistics<B>& statistics,
                                             const Panel& panel, char* buffer, int row,
                                             const float (&d)[kRegisters]) {
  const int lane = threadIdx.x % kWarpSize;
  store_rows(buffer, [&](int i) {
    const int col = i / 4 * 8 + lane % 4 * 2;
    const float4 scales = *reinterpret_cast<const float4*>(&statistics.scales[col]);
    return pack_pair((d[i] - scales.x) * scales.y, (d[i + 1] - scales.z) * scales.w, T());
  });
  fence_async_proxy();
  __syncwarp();
  if (lane == 0 && row < args.num_tokens && panel.index < args.num_panels) {
    tma_store(args.normed[panel.is_y], buffer, row, panel.col);
    tma_store_commit();
    tma_store_wait_read<0>();
  }
}

// Writes inv_std and, in training, the running statistics of two columns.
template <bool kTraining, class T>
__device__ __forceinline__ void keep_statistics(const Arguments& args,
                                                const RunningStatistics<T>& running,
                                                const Panel& panel, int column_pair,
                                                const float2 (&moments)[2],
                                                const float (&inv_stds)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int col = panel.col + column_pair * 2 + i;
    if (col >= panel.width) break;
    if (args.norm.inv_std != nullptr) {
      static_cast<float*>(args.norm.inv_std)[(panel.is_y ? args.norm.num_rows : 0) + col] =
          inv_stds[i];
    }
    if constexpr (kTraining) {
      const auto momentum = static_cast<float>(args.norm.momentum);
      running.update(running.buffers.running_mean, col, momentum, moments[i].x);
      running.update(running.buffers.running_var, col, momentum,
                     moments[i].y / static_cast<float>(args.num_tokens - 1));
      if (col == 0 && running.buffers.num_batches_tracked != nullptr) {
        ++*running.buffers.num_batches_tracked;
      }
    }
  }
}

// ---- Kernel -------------------------------------------------------------------------------------

template <class T, class B, bool kTraining>
__global__ void __launch_bounds__(B::kThreads, 1)
    router_logits_forward_kernel(const __grid_constant__ Arguments args) {
  if (!kHasHopperInstructions) {
    __trap();
    return;
  }
  extern __shared__ char dynamic_shared[];
  const uint32_t misaligned = shared_address(dynamic_shared) % kSwizzleAlignment;
  auto& shared = *reinterpret_cast<SharedStorage<B>*>(
      dynamic_shared + (kSwizzleAlignment - misaligned) % kSwizzleAlignment);
  const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);
  const int lane = threadIdx.x % kWarpSize;

  // 1. Barriers of both blocks stand before one copies to the other.
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < B::kStages; ++stage) {
      mbarrier_init(&shared.full[stage], 1);
      mbarrier_init(&shared.empty[stage], B::kConsumerWarps * kCluster);
    }
    mbarrier_init_fence();
  }
  cluster_sync();
  wait_for_previous_kernel();

  // 2. Products, and moments of the block's tokens.
  const int tile = warp / kTileWarps, token_tile = tile / B::kPanels, consumer = tile % B::kPanels;
  const int panel_warp = token_tile * kTileWarps + warp % kTileWarps;
  const int token = blockIdx.x * B::kTokens + panel_warp * kWarpRows;  // the warp's first
  const Panel panel(args, blockIdx.y * B::kPanels + consumer);
  PanelStatistics<B>& statistics = shared.statistics[consumer];
  float d[kRegisters];
  if (warp == B::kConsumerWarps) {
    if (lane == 0) load_stages(args, shared);
    __syncwarp();
  } else {
    RingCursor<B::kStages> ring;
    run_mainloop<T, WgmmaMajor::kDepth, kPanelCols>(
        shared, args.num_stages, ring, d, [&](int stage) { return shared.x[stage][token_tile]; },
        [&](int stage) { return shared.gates[stage][consumer]; });
    if constexpr (kTraining) {
      warp_moments(d, rows_within(args.num_tokens, token, kWarpRows),
                   statistics.moments[panel_warp]);
      sync_panel<B>(consumer);
      publish_moments(args, statistics, panel, panel_warp * kWarpSize + lane);
    }
  }
  // After this nothing comes from the other block any more.
  if constexpr (kTraining) {
    cooperative_groups::this_grid().sync();
  } else {
    cluster_sync();
  }
  let_next_kernel_start();
  if (warp == B::kConsumerWarps) return;

  // 3. Mean and scale of two columns for each of the panel's first kColumnPairs lanes.
  const RunningStatistics<T> running(args.norm, panel.is_y);
  const int column_pair = panel_warp * B::kColumnPairs + lane % B::kColumnPairs;
  const bool is_owner = lane < B::kColumnPairs;
  float2 moments[2] = {};  // mean and, in training, Σ (x - mean)²
  float inv_stds[2] = {};
  find_scales<B, kTraining>(args, running, panel, column_pair, is_owner, statistics, moments,
                            inv_stds);
  sync_panel<B>(consumer);

  // 4. Normalise. The stages are free.
  store_normed<T>(args, statistics, panel, shared.x[0][0] + warp * (kWarpRows * kSwizzleRowBytes),
                  token, d);

  // 5. What is kept is written by the first block of each column: nothing waits for it.
  if (blockIdx.x != 0 || !is_owner || panel.index >= args.num_panels) return;
  keep_statistics<kTraining>(args, running, panel, column_pair, moments, inv_stds);
}

// ---- Launcher -----------------------------------------------------------------------------------

template <class B>
constexpr size_t kSharedBytes = sizeof(SharedStorage<B>) + kSwizzleAlignment;

int panels_of(int64_t cols) { return static_cast<int>(ceil_div<int64_t>(cols, kPanelCols)); }

template <class T, class B>
cudaError_t launch_router_logits(const RouterLogitsForwardParams& params,
                                 const RouterLogitsForwardPlan& plan, cudaStream_t stream) {
  static_assert(kSharedBytes<B> <= RouterLogitsTuning::kMaxSharedBytes);
  const BatchNormForwardParams& norm = params;
  Arguments args{};
  args.norm = norm;
  args.num_tokens = static_cast<int>(norm.num_tokens);
  args.token_share = 1.0f / static_cast<float>(norm.num_tokens);
  args.num_stages = static_cast<int>(ceil_div<int64_t>(params.hidden_size, kStageDepth));
  args.num_panels_x = panels_of(norm.num_rows);
  args.num_panels = args.num_panels_x + panels_of(norm.num_cols);

  const auto kernel = norm.training ? router_logits_forward_kernel<T, B, true>
                                    : router_logits_forward_kernel<T, B, false>;
  const dim3 grid(
      static_cast<unsigned>(RouterLogitsTuning::token_blocks(norm.num_tokens, B::kTokenTiles)),
      static_cast<unsigned>(ceil_div(args.num_panels, B::kPanels)));
  LaunchOptions options{grid, B::kThreads};
  options.shared_bytes = kSharedBytes<B>;
  options.cluster_blocks = kCluster;
  options.is_early = plan.device.has_early_launch;
  options.is_cooperative = norm.training;

  const auto matrix = [](const void* data, int64_t rows, int64_t cols, int tile_rows,
                         CUtensorMap* map) {
    return [=] { return encode_tensor_map<T>(data, rows, cols, tile_rows, map); };
  };
  constexpr int kGateRows = kPanelCols / kCluster;
  return run_steps(
      [&] { return allow_shared_memory(kernel, kSharedBytes<B>); },
      matrix(params.hidden_states, norm.num_tokens, params.hidden_size, B::kTokens, &args.x),
      matrix(params.gate_x, norm.num_rows, params.hidden_size, kGateRows, &args.gates[0]),
      matrix(params.gate_y, norm.num_cols, params.hidden_size, kGateRows, &args.gates[1]),
      matrix(norm.normed_x, norm.num_tokens, norm.num_rows, kWarpRows, &args.normed[0]),
      matrix(norm.normed_y, norm.num_tokens, norm.num_cols, kWarpRows, &args.normed[1]),
      [&] {
        // Where the stream has only some of the device's SMs (a green context, a share of MPS).
        const cudaError_t status = launch_kernel(kernel, options, stream, args);
        return status == cudaErrorCooperativeLaunchTooLarge ? cudaErrorNotSupported : status;
      });
}

// f(TypeTag<Block>) of the plan's block.
template <class F>
cudaError_t dispatch_block(const RouterLogitsForwardPlan& plan, F&& f) {
  const auto is = [&](int token_tiles, int panels) {
    return plan.token_tiles == token_tiles && plan.panels == panels;
  };
  if (is(1, 1)) return f(TypeTag<Block<1, 1>>{});
  if (is(1, 2)) return f(TypeTag<Block<1, 2>>{});
  if (is(2, 2)) return f(TypeTag<Block<2, 2>>{});
  return is(2, 3) ? f(TypeTag<Block<2, 3>>{}) : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t router_logits_forward(const RouterLogitsForwardParams& params,
                                  const RouterLogitsForwardPlan& plan, cudaStream_t stream) {
  return dispatch_block(plan, [&](auto block) {
    using B = typename decltype(block)::type;
    return params.dtype == DType::kFloat16
               ? launch_router_logits<__half, B>(params, plan, stream)
               : launch_router_logits<__nv_bfloat16, B>(params, plan, stream);
  });
}

}  // namespace omni_moe::cuda
