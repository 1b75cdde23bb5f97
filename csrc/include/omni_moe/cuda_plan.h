// Which kernels a CUDA op runs, and in how much workspace: plans are data, made by pure functions
// of the operands' shapes, their alignment and a description of the device. They need neither a GPU
// nor the CUDA toolkit, so that any build can be asked. Of the pointers in a Params struct only
// their alignment is read, and null counts as aligned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "omni_moe/batch_norm.h"
#include "omni_moe/expert.h"
#include "omni_moe/mlp.h"
#include "omni_moe/permute.h"
#include "omni_moe/router.h"
#include "omni_moe/router_logits.h"
#include "omni_moe/token_norm.h"
#include "omni_moe/topk_router.h"

namespace omni_moe::cuda {

// What plans read of a device. The defaults stand for one that is not known: plans can be made for
// it, and their launches say what is wrong.
struct DeviceInfo {
  int num_sms = 1;
  int l2_bytes = 0;
  int shared_bytes_per_block = 0;      // the opt-in limit of one block
  bool has_cooperative_launch = true;  // a grid can wait for itself
  // What the code can do that runs on the device; it may be compiled from PTX of an older one.
  bool has_early_launch = false;    // kernels can wait for the kernel in front of them
  bool has_hopper_kernels = false;  // kernels of sm_90a do not trap, and the driver knows TMA
};

// In every plan, `device` is the device that it was made for, and workspace_bytes (aligned to 256)
// goes to the launch as Params::workspace.

// ---- Router -------------------------------------------------------------------------------------

enum class RouterForwardKernel : int8_t {
  kWarp,      // a warp per token, all in registers: few experts per token and short axes
  kUnsorted,  // a warp per token, whose experts come in no order: many tokens and short axes
  kBlock,     // a block per token: any shape
};

struct RouterForwardPlan {
  DeviceInfo device;
  RouterForwardKernel kernel;
  int items_per_lane;    // kWarp, kUnsorted: logits of an axis
  int sort_width;        // kWarp: more than K
  bool lists_in_shared;  // kBlock: in shared memory, else in the workspace
  size_t list_bytes;     // kBlock, kUnsorted: of one block
  int64_t num_blocks;
  size_t workspace_bytes;
};

struct RouterBackwardPlan {
  DeviceInfo device;
  int warps_per_token;
  bool sums_in_shared;  // in shared memory, else in the workspace
  size_t sum_bytes;     // of one block
  int64_t num_blocks;
  size_t workspace_bytes;
};

// How blocks lie over tokens and columns: a block has a panel of columns of one axis over one part
// of the tokens, in num_rounds turns.
struct BatchNormGrid {
  int panels_x;  // panels of the x axis; those of the y axis come next
  int num_panels;
  int panels_per_round;
  int num_rounds;
  int num_parts;
  int64_t tokens_per_part;
};

struct BatchNormPlan {
  DeviceInfo device;
  bool uses_vectors;  // 16 bytes a load, else one element
  BatchNormGrid grid;
  size_t workspace_bytes;
};
using BatchNormForwardPlan = BatchNormPlan;
using BatchNormBackwardPlan = BatchNormPlan;

struct TokenNormPlan {
  bool uses_vectors;  // 16 bytes a load, else one element
  size_t workspace_bytes;
};
using TokenNormForwardPlan = TokenNormPlan;
using TokenNormBackwardPlan = TokenNormPlan;

struct RouterLogitsForwardPlan {
  DeviceInfo device;
  int token_tiles;  // of 64 tokens, in a block
  int panels;       // of 64 columns, in a block
  size_t workspace_bytes;
};

RouterForwardPlan plan_router_forward(const RouterForwardParams& params, const DeviceInfo& device);
RouterBackwardPlan plan_router_backward(const RouterBackwardParams& params,
                                        const DeviceInfo& device);
BatchNormForwardPlan plan_batch_norm_forward(const BatchNormForwardParams& params,
                                             const DeviceInfo& device);
BatchNormBackwardPlan plan_batch_norm_backward(const BatchNormBackwardParams& params,
                                               const DeviceInfo& device);

// The same on every device.
TokenNormForwardPlan plan_token_norm_forward(const TokenNormForwardParams& params);
TokenNormBackwardPlan plan_token_norm_backward(const TokenNormBackwardParams& params);

// Null where there is no kernel for these operands on the device. There is one on Hopper, in a
// build for sm_90a, for 16-bit elements, H, R and C multiples of 8, 16-byte aligned pointers, and a
// grid that fits on the device at once (4096 tokens by 768 logits on an H200).
std::optional<RouterLogitsForwardPlan> plan_router_logits_forward(
    const RouterLogitsForwardParams& params, const DeviceInfo& device);

// ---- Top-k router -------------------------------------------------------------------------------

enum class TopKRouterForwardKernel : int8_t {
  kWarp,   // a warp per token, all in registers: few experts per token, and not too many in all
  kBlock,  // a block per token, which sorts its experts: any shape
};

struct TopKRouterForwardPlan {
  DeviceInfo device;
  TopKRouterForwardKernel kernel;
  int items_per_lane;  // kWarp: logits of a token
  size_t shared_bytes;
  int64_t num_blocks;
  size_t workspace_bytes;  // counts by block, unless there is one block
};

struct TopKRouterBackwardPlan {
  DeviceInfo device;
  int warps_per_block;  // a warp per token
  size_t shared_bytes;
  int64_t num_blocks;
  size_t workspace_bytes;
};

struct ExpertSlotsPlan {
  DeviceInfo device;
  int pairs_per_block;
  int64_t num_blocks;
  size_t workspace_bytes;  // counts by block
};

TopKRouterForwardPlan plan_topk_router_forward(const TopKRouterForwardParams& params,
                                               const DeviceInfo& device);
TopKRouterBackwardPlan plan_topk_router_backward(const TopKRouterBackwardParams& params,
                                                 const DeviceInfo& device);
ExpertSlotsPlan plan_expert_slots(const ExpertSlotsParams& params, const DeviceInfo& device);

// ---- Permutation --------------------------------------------------------------------------------

struct ExpertRowsPlan {
  DeviceInfo device;
  int pairs_per_block;
  int64_t num_blocks;
  size_t workspace_bytes;  // counts by block, and of all
};

struct PermutePlan {
  DeviceInfo device;
  bool uses_vectors;    // 16 bytes a load, else one element
  int threads_per_row;  // of a block; a power of two
  int64_t num_blocks;
  size_t workspace_bytes;
};

ExpertRowsPlan plan_expert_rows(const ExpertRowsParams& params, const DeviceInfo& device);
PermutePlan plan_permute(const PermuteParams& params, const DeviceInfo& device);
PermutePlan plan_unpermute(const UnpermuteParams& params, const DeviceInfo& device);
PermutePlan plan_unpermute_backward(const UnpermuteBackwardParams& params,
                                    const DeviceInfo& device);

// ---- Experts ------------------------------------------------------------------------------------

enum class TokenPassStrategy : int8_t {
  kTwoPhase,  // a block per token or part of one: dot products by warp, then sums by column
  kFused,     // a block per token, 16 bytes of the row per thread
  kL2Tiled,   // one tile of columns after the other, all tokens in each: for rows used again
  kBands,     // whole rows and columns of the grid on tensor cores: for many experts per token
};

// A band is a row or a column of the grid of experts, a task a token's experts in one band.
struct BandPlan {
  int num_rows;               // R
  int num_cols;               // C
  int max_tasks;              // of a token; the pairs of further bands are gathered
  int min_pairs;              // of a task; the pairs of bands with fewer are gathered
  bool has_weight_gradients;  // the pass is that of a backward, which sums them by bands, too
};

// Forward and backward are the same pass over tokens.
struct TokenPassPlan {
  TokenPassStrategy strategy;
  int tile_bytes;           // kL2Tiled: 256 or 512
  int threads;              // kTwoPhase: per block
  int num_splits;           // kTwoPhase: blocks per token; above 1 a second stage adds their sums
  int64_t pairs_per_split;  // kTwoPhase
  BandPlan bands;           // kBands
};

struct ExpertForwardPlan {
  DeviceInfo device;
  TokenPassPlan token_pass;
  size_t workspace_bytes;
};

// How the pairs are put into expert order.
struct SchedulePlan {
  bool by_counting;           // else by a radix sort
  uint32_t part_pairs;        // longer segments of an expert are summed in parts
  int64_t max_parts;          // of all segments
  size_t sort_storage_bytes;  // radix sort
};

struct ExpertBackwardPlan {
  DeviceInfo device;
  TokenPassPlan token_pass;
  SchedulePlan schedule;
  size_t workspace_bytes;
};

ExpertForwardPlan plan_expert_forward(const ExpertForwardParams& params, const DeviceInfo& device);
// Without the storage of a radix sort, whose size CUB alone knows: cuda.h's function adds it.
ExpertBackwardPlan plan_expert_backward(const ExpertBackwardParams& params,
                                        const DeviceInfo& device);

// ---- MLP ----------------------------------------------------------------------------------------

struct GatedActivationPlan {
  bool uses_vectors;  // 16 bytes a load, else one element
  bool is_one_row;    // dense operands are handled as one long row
  size_t workspace_bytes;
};
using GatedActivationForwardPlan = GatedActivationPlan;
using GatedActivationBackwardPlan = GatedActivationPlan;

// Tiles of the result, and the persistent clusters of blocks that share them.
struct GatedLinearPlan {
  DeviceInfo device;
  int num_token_tiles;  // of the tokens of all blocks of a cluster
  int num_col_tiles;
  int num_clusters;
  size_t workspace_bytes;
};
using GatedLinearForwardPlan = GatedLinearPlan;
using GatedLinearBackwardPlan = GatedLinearPlan;

// The same on every device.
GatedActivationForwardPlan plan_gated_activation_forward(
    const GatedActivationForwardParams& params);
GatedActivationBackwardPlan plan_gated_activation_backward(
    const GatedActivationBackwardParams& params);

// Null where there is no kernel for these operands on the device. There is one on Hopper, in a
// build for sm_90a, for 16-bit elements, H and I multiples of 8, and 16-byte aligned pointers.
std::optional<GatedLinearForwardPlan> plan_gated_linear_forward(
    const GatedLinearForwardParams& params, const DeviceInfo& device);
std::optional<GatedLinearBackwardPlan> plan_gated_linear_backward(
    const GatedLinearBackwardParams& params, const DeviceInfo& device);

}  // namespace omni_moe::cuda
