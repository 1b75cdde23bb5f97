// The router's logits in one Hopper kernel: both gates' products, statistics of the batch, and the
// normalised result:
//   logits = x [gate_x; gate_y]ᵀ,  normed = (logits - mean) inv_std of each column.
//
// A warpgroup makes 64 tokens by 64 columns and keeps them in registers while the grid agrees on
// the statistics: the products never reach memory. So the grid must fit on the device at once (a
// cooperative launch); larger problems take a matrix product and batch_norm_forward.cu. What counts
// here is latency: 2 T (R + C) H FLOP and T (H + R + C) elements are 2 to 6 µs of work.
//
// The two blocks of a cluster take neighbouring tokens and share their tiles of the gates: each
// loads half of them, which TMA writes to both. (Larger clusters would read less of L2, but do not
// fill the device: an H200 holds 30 of four.)
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "cuda/common/check.h"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/dispatch.h"
#include "cuda/common/workspace.h"
#include "cuda/hopper/mainloop.cuh"
#include "cuda/hopper/mbarrier.cuh"
#include "cuda/hopper/stmatrix.cuh"
#include "cuda/hopper/tma.cuh"
#include "cuda/hopper/wgmma.cuh"
#include "cuda/router/batch_norm_common.cuh"
#include "omni_moe/cuda.h"

namespace omni_moe::cuda {

namespace {

using batch_norm::RunningStatistics;

constexpr int kTileTokens = kWgmmaRows;
constexpr int kPanelCols = 64;
constexpr int kTileThreads = 128;  // a warpgroup
constexpr int kTileWarps = kTileThreads / kWarpSize;
constexpr int kRegisters = kTileTokens * kPanelCols / kTileThreads;
constexpr int kWarpRows = kTileTokens / kTileWarps;
constexpr int kTileBytes = kTileTokens * kSwizzleRowBytes;  // of x or a gate in one stage
static_assert(kTileTokens == kPanelCols);

// kTokenTiles by kPanels warpgroups.
template <int kTokenTiles_, int kPanels_>
struct Block {
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kPanels = kPanels_;
  static constexpr int kTokens = kTokenTiles * kTileTokens;
  static constexpr int kConsumerWarps = kTokenTiles * kPanels * kTileWarps;
  static constexpr int kThreads = (kConsumerWarps + 1) * kWarpSize;  // the last warp loads
  static constexpr int kStageBytes = (kTokenTiles + kPanels) * kTileBytes;
  static constexpr int kStages = std::min(16, 200 * 1024 / kStageBytes);
  // Of the batch's moments a warp merges two columns in each of kColumnPairs threads, many times
  // over.
  static constexpr int kColumnPairs = kPanelCols / 2 / (kTokenTiles * kTileWarps);
};

struct Arguments {
  CUtensorMap x;
  CUtensorMap gates[2];   // x, y
  CUtensorMap normed[2];  // stores
  BatchNormForwardParams norm;
  int num_tokens;
  float token_share;  // 1 / T
  int num_stages;     // ceil(H / 64)
  int num_panels_x;   // of gate_x; those of gate_y come next
  int num_panels;
};

// Moments of a panel's columns in the block, then what they are over the batch.
template <class B>
struct PanelStatistics {
  float2 moments[B::kTokenTiles * kTileWarps][kPanelCols];  // mean, Σ (x - mean)² of a warp's rows
  float2 scales[kPanelCols];                                // mean, 1 / sqrt(var + eps)
};

template <class B>
struct SharedStorage {
  char x[B::kStages][B::kTokenTiles][kTileBytes];
  char gates[B::kStages][B::kPanels][kTileBytes];
  PanelStatistics<B> statistics[B::kPanels];
  uint64_t full[B::kStages];   // the stage's tiles have landed here
  uint64_t empty[B::kStages];  // all consumers of the cluster have read the stage
};

// 64 columns of one axis.
struct Panel {
  int index;
  bool is_y;
  int col;    // the first in its axis
  int width;  // of the axis

  __device__ __forceinline__ Panel(const Arguments& args, int index)
      : index(index),
        is_y(index >= args.num_panels_x),
        col((is_y ? index - args.num_panels_x : index) * kPanelCols),
        width(static_cast<int>(is_y ? args.norm.num_cols : args.norm.num_rows)) {}
};

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

// ---- Statistics ---------------------------------------------------------------------------------

__device__ __forceinline__ int rows_within(int num_tokens, int first, int rows) {
  return min(max(num_tokens - first, 0), rows);
}

// The threads that hold a panel's columns.
template <class B>
__device__ __forceinline__ void sync_panel(int panel) {
  asm volatile("bar.sync %0, %1;" ::"r"(panel + 1), "n"(B::kTokenTiles * kTileThreads) : "memory");
}

// Merges moments of one column as sums relative to `base`, one of the means or close to them.
class MomentSums {
 public:
  __device__ __forceinline__ explicit MomentSums(float base) : base_(base) {}

  __device__ __forceinline__ void add(int rows, float mean, float m2) {
    const float distance = mean - base_;
    const float weighted = static_cast<float>(rows) * distance;
    sum_ += weighted;
    squares_ += weighted * distance + m2;
  }
  __device__ __forceinline__ void add_lane(int mask) {
    sum_ += __shfl_xor_sync(kFullWarp, sum_, mask);
    squares_ += __shfl_xor_sync(kFullWarp, squares_, mask);
  }
  // One over the number of values -> mean, Σ (x - mean)².
  __device__ __forceinline__ float2 get(float share) const {
    const float shift = sum_ * share;
    const float m2 = squares_ - sum_ * shift;
    return make_float2(base_ + shift, m2 < 0.0f ? 0.0f : m2);  // NaN stays
  }

 private:
  float base_;
  float sum_ = 0.0f;
  float squares_ = 0.0f;
};

// Moments of the warp's 16 rows, column by column, merged in halves: of the columns that two lanes
// have in common each goes on with one half, so that at the end a lane has one column of 32.
__device__ __forceinline__ void warp_moments(const float (&d)[kRegisters], int num_rows,
                                             float2* moments) {
  const int lane = threadIdx.x % kWarpSize;
  const bool has_first = lane / 4 < num_rows, has_second = lane / 4 + 8 < num_rows;
#pragma unroll
  for (int part = 0; part < kRegisters / 16; ++part) {  // of 32 columns, 8 of them here
    float count = static_cast<float>(has_first + has_second);
    float mean[8], m2[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int at = part * 16 + i / 2 * 4 + i % 2;
      const float first = d[at], second = d[at + 2];
      const float half = 0.5f * (second - first);
      mean[i] = has_second ? first + half : first;
      m2[i] = has_second ? 2.0f * half * half : 0.0f;
    }
#pragma unroll
    for (int step = 0; step < 3; ++step) {
      const int offset = 16 >> step, kept = 4 >> step;
      const bool is_upper = (lane & offset) != 0;
      const float more = __shfl_xor_sync(kFullWarp, count, offset);
      const float share = __fdividef(more, fmaxf(count + more, 1.0f));
      const float cross = count * share;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i >= kept) break;
        const float own_mean = is_upper ? mean[i + kept] : mean[i];
        const float own_m2 = is_upper ? m2[i + kept] : m2[i];
        const float distance =
            __shfl_xor_sync(kFullWarp, is_upper ? mean[i] : mean[i + kept], offset) - own_mean;
        mean[i] = own_mean + distance * share;
        m2[i] = own_m2 + distance * distance * cross +
                __shfl_xor_sync(kFullWarp, is_upper ? m2[i] : m2[i + kept], offset);
      }
      count += more;
    }
    // Bits 4, 3 and 2 of the lane chose bits 2, 1 and 0 of i.
    const int i = (lane >> 4 & 1) * 4 + (lane >> 3 & 1) * 2 + (lane >> 2 & 1);
    moments[part * 32 + i / 2 * 8 + lane % 4 * 2 + i % 2] = make_float2(mean[0], m2[0]);
  }
}

// The panel's moments in this block -> workspace, [panel][block along the tokens][column].
template <class B>
__device__ __forceinline__ void publish_moments(const Arguments& args,
                                                const PanelStatistics<B>& statistics,
                                                const Panel& panel, int thread) {
  if (thread >= kPanelCols || panel.index >= args.num_panels) return;
  const int token = blockIdx.x * B::kTokens;
  MomentSums sums(statistics.moments[0][thread].x);
#pragma unroll
  for (int warp = 0; warp < B::kTokenTiles * kTileWarps; ++warp) {
    const float2 moments = statistics.moments[warp][thread];
    sums.add(rows_within(args.num_tokens, token + warp * kWarpRows, kWarpRows), moments.x,
             moments.y);
  }
  float2* partials =
      static_cast<float2*>(args.norm.workspace) + int64_t{panel.index} * gridDim.x * kPanelCols;
  partials[blockIdx.x * kPanelCols + thread] =
      sums.get(__fdividef(1.0f, fmaxf(rows_within(args.num_tokens, token, B::kTokens), 1.0f)));
}

// What all blocks have published -> moments of two columns over the batch, in all threads of the
// warp that take turns at the blocks: those with the same lane % kColumnPairs.
template <class B>
__device__ __forceinline__ void batch_moments(const Arguments& args, const Panel& panel,
                                              int column_pair, float2 (&moments)[2]) {
  constexpr int kMergers = kWarpSize / B::kColumnPairs;
  const auto* partials = reinterpret_cast<const float4*>(args.norm.workspace) +
                         int64_t{panel.index} * gridDim.x * (kPanelCols / 2) + column_pair;
  const int num_blocks = ceil_div(args.num_tokens, B::kTokens);
  const float4 base = __ldcg(partials);  // from L2: of other blocks
  MomentSums low(base.x), high(base.z);
#pragma unroll 16
  for (int i = threadIdx.x % kWarpSize / B::kColumnPairs; i < num_blocks; i += kMergers) {
    const float4 partial = __ldcg(partials + i * (kPanelCols / 2));
    const int rows = rows_within(args.num_tokens, i * B::kTokens, B::kTokens);
    low.add(rows, partial.x, partial.y);
    high.add(rows, partial.z, partial.w);
  }
#pragma unroll
  for (int mask = B::kColumnPairs; mask < kWarpSize; mask *= 2) {
    low.add_lane(mask);
    high.add_lane(mask);
  }
  moments[0] = low.get(args.token_share);
  moments[1] = high.get(args.token_share);
}

// ---- Results ------------------------------------------------------------------------------------

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
  const auto eps = static_cast<float>(args.norm.eps);
  const int column_pair = panel_warp * B::kColumnPairs + lane % B::kColumnPairs;
  const bool is_owner = lane < B::kColumnPairs;
  float2 moments[2] = {};  // mean and, in training, Σ (x - mean)²
  float inv_stds[2] = {};
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
  sync_panel<B>(consumer);

  // 4. Normalise. The stages are free.
  store_normed<T>(args, statistics, panel, shared.x[0][0] + warp * (kWarpRows * kSwizzleRowBytes),
                  token, d);

  // 5. What is kept, by the first block of each column: nothing waits for it.
  if (blockIdx.x != 0 || !is_owner || panel.index >= args.num_panels) return;
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

// ---- Launcher -----------------------------------------------------------------------------------

template <class B>
constexpr size_t kSharedBytes = sizeof(SharedStorage<B>) + kSwizzleAlignment;

int panels_of(int64_t cols) { return static_cast<int>(ceil_div<int64_t>(cols, kPanelCols)); }
int panels_of(const BatchNormForwardParams& norm) {
  return panels_of(norm.num_rows) + panels_of(norm.num_cols);
}

template <class B>
dim3 grid_of(const BatchNormForwardParams& norm) {
  return {
      static_cast<unsigned>(ceil_div<int64_t>(norm.num_tokens, kCluster * B::kTokens) * kCluster),
      static_cast<unsigned>(ceil_div(panels_of(norm), B::kPanels))};
}

// f(TypeTag<B>) of the smallest blocks whose grid fits on the device, one on each SM.
template <class F>
cudaError_t with_block(const BatchNormForwardParams& norm, const DeviceInfo& device, F&& f) {
  const auto fits = [&](auto block) {
    const dim3 grid = grid_of<typename decltype(block)::type>(norm);
    return grid.x * grid.y <= static_cast<unsigned>(device.num_sms);
  };
  constexpr TypeTag<Block<1, 1>> kSmall;
  constexpr TypeTag<Block<1, 2>> kWide;
  constexpr TypeTag<Block<2, 2>> kLarge;
  constexpr TypeTag<Block<2, 3>> kLargest;
  if (fits(kSmall)) return f(kSmall);
  if (fits(kWide)) return f(kWide);
  if (fits(kLarge)) return f(kLarge);
  return fits(kLargest) ? f(kLargest) : cudaErrorNotSupported;
}

template <class T, class B>
cudaError_t launch_router_logits(const RouterLogitsForwardParams& params, const DeviceInfo& device,
                                 cudaStream_t stream) {
  const BatchNormForwardParams& norm = params;
  Arguments args{};
  args.norm = norm;
  args.num_tokens = static_cast<int>(norm.num_tokens);
  args.token_share = 1.0f / static_cast<float>(norm.num_tokens);
  args.num_stages = static_cast<int>(ceil_div<int64_t>(params.hidden_size, kStageDepth));
  args.num_panels_x = panels_of(norm.num_rows);
  args.num_panels = panels_of(norm);

  const auto kernel = norm.training ? router_logits_forward_kernel<T, B, true>
                                    : router_logits_forward_kernel<T, B, false>;
  LaunchOptions options{grid_of<B>(norm), B::kThreads};
  options.shared_bytes = kSharedBytes<B>;
  options.cluster_blocks = kCluster;
  options.is_early = device.has_early_launch;
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

// What the instructions and TMA ask of shapes and operands.
bool is_representable(const RouterLogitsForwardParams& params) {
  const BatchNormForwardParams& norm = params;
  constexpr int64_t kMaxSize = 1 << 20;
  if (norm.dtype != DType::kFloat16 && norm.dtype != DType::kBFloat16) return false;
  if (norm.stats_dtype != norm.dtype && norm.stats_dtype != DType::kFloat32) return false;
  for (const int64_t size : {norm.num_tokens, norm.num_rows, norm.num_cols, params.hidden_size}) {
    if (size <= 0 || size > kMaxSize) return false;
  }
  for (const int64_t size : {norm.num_rows, norm.num_cols, params.hidden_size}) {
    if (size % 8 != 0) return false;
  }
  const void* const pointers[] = {params.hidden_states, params.gate_x, params.gate_y, norm.normed_x,
                                  norm.normed_y};
  return std::all_of(std::begin(pointers), std::end(pointers),
                     [](const void* pointer) { return is_aligned(pointer, 16); });
}

}  // namespace

bool router_logits_forward_supported(const RouterLogitsForwardParams& params) {
  DeviceInfo device;
  if (!is_representable(params) || current_device_info(&device) != cudaSuccess) return false;
  if (!device.has_hopper_code || tensor_map_encoder() == nullptr) return false;
  const auto has_shared_memory = [&](auto block) {
    const bool enough = static_cast<size_t>(device.shared_bytes_per_block) >=
                        kSharedBytes<typename decltype(block)::type>;
    return enough ? cudaSuccess : cudaErrorNotSupported;
  };
  return with_block(params, device, has_shared_memory) == cudaSuccess;
}

cudaError_t router_logits_forward(const RouterLogitsForwardParams& params, cudaStream_t stream) {
  if (!router_logits_forward_supported(params)) return cudaErrorNotSupported;
  DeviceInfo device;
  const cudaError_t status = current_device_info(&device);
  if (status != cudaSuccess) return status;
  return with_block(params, device, [&](auto block) {
    using B = typename decltype(block)::type;
    return params.dtype == DType::kFloat16
               ? launch_router_logits<__half, B>(params, device, stream)
               : launch_router_logits<__nv_bfloat16, B>(params, device, stream);
  });
}

size_t router_logits_forward_workspace_size(const RouterLogitsForwardParams& params) {
  DeviceInfo device;
  if (!params.training || current_device_info(&device) != cudaSuccess) return 0;
  size_t bytes = 0;
  (void)with_block(params, device, [&](auto block) {
    const dim3 grid = grid_of<typename decltype(block)::type>(params);
    const size_t partials = size_t{grid.x} * panels_of(params) * kPanelCols;
    bytes = round_up<size_t>(partials * sizeof(float2), WorkspaceCutter::kAlignment);
    return cudaSuccess;
  });
  return bytes;
}

}  // namespace omni_moe::cuda
