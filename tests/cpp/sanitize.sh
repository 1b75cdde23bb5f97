#!/bin/sh
# Runs compute-sanitizer over a small part of the CUDA tests: every kernel, few elements.
#
#   tests/cpp/sanitize.sh [build directory] [tool ...]
#
# Defaults: build/cmake, and the tools memcheck, racecheck and synccheck. racecheck sees shared
# memory only: of kernels that overlap it says nothing. initcheck has to be read by hand: beside reads
# in kernels ("__global__ memory read") it reports copies of results to the host, which are complete:
# the tests check each element over poisoned memory. Needs a GPU and compute-sanitizer (of the CUDA
# toolkit; COMPUTE_SANITIZER names it where it is not on PATH). Exits with 1 if a program failed,
# reported an error or took more than SECONDS_EACH (60).
set -u

build=${1:-build/cmake}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- memcheck racecheck synccheck
sanitizer=${COMPUTE_SANITIZER:-compute-sanitizer}

# All strategies of the experts; pairs split over blocks; both schedules, long segments.
expert='*CudaExpert.*OfEveryStrategy/T37_H1024_K3_*'
expert=$expert:'*CudaExpert.*/T1_H100_K200_*:*CudaExpert.Backward/T199_H128_K16_E500_*'
expert=$expert:'*CudaExpert.Backward/T50_H1024_K70_*:*CudaExpert.Backward/T1200_H64_K40_*'
# Ids of a router and all other kinds, in both index types; few tokens and many pairs.
band_lists='*CoverAndSchedule/T37_R64_C64_*:*CoverAndSchedule/T19_R40_C200_*'
band_lists=$band_lists:'*CoverAndSchedule/T3_R64_C64_*:*CoverAndSchedule/T1300_*'
# A shape for each tile, by the length of the bands: up to 64, 128, 160, 320 and 512 experts; pairs
# in no band; rows of several pieces in the sum.
bands='*CudaExpertBands.*ward/T37_R64_C64_*_routing0_*'
bands=$bands:'*CudaExpertBands.*ward/T37_R64_C64_*_routing1_*'
bands=$bands:'*CudaExpertBands.*ward/T37_R100_C40_*_routing0_*'
bands=$bands:'*CudaExpertBands.*ward/T300_R130_C40_*_routing0_*'
bands=$bands:'*CudaExpertBands.*ward/T40_R320_C320_K512_H64_*:*CudaExpertBands.*ward/T20_R40_C512_*'
bands=$bands:'*CudaExpertBands.*ward/T20_R24_C24_K24_H2056_*'
# Tails in every dimension, fewer and more tiles than one.
linear='*GatedLinear.*/T37_H200_I136_*:*GatedLinear.*/T199_H200_I264_*:*GatedLinear.*/T257_H64_I128_*'
linear_backward='*GatedLinearBackward.*/T37_H104_I136_*:*GatedLinearBackward.*/T199_H200_I264_*'
# Warp and block kernels, all dtypes and special values; shared and global workspaces.
router='CudaRouter.ForwardGrid5x7:CudaRouter.ForwardManyExpertsPerToken:CudaRouter.ForwardEmpty'
router=$router:'CudaRouter.BackwardSpecialValues:CudaRouter.BackwardLongAxes'
# Ties, special values and the scan of the grid; few items a lane and many, partial groups of rows.
router_unsorted='CudaRouterUnsorted.Grid12x12:CudaRouterUnsorted.Grid65x257'
# Warp and block kernels, all dtypes, special values, no alignment, masked tokens; slots.
topk_router='CudaTopKRouter.TiesMaskedAndSpecialLogits:CudaTopKRouter.Unaligned'
topk_router=$topk_router:'CudaTopKRouter.ManyTokens:CudaTopKRouter.Slots'
activation='CudaGatedActivation.ForwardAndBackward'
# Vectors and single columns, one part and several, several rounds, all dtypes.
batch_norm='CudaBatchNorm.Small:CudaBatchNorm.ManyColumns:CudaBatchNorm.NoTokens'
# Vectors and single columns, what registers hold and more; all dtypes and both norms.
token_norm='CudaTokenNorm.Small:CudaTokenNorm.NoTokens:CudaTokenNorm.WideAxes'
# BatchNorm of every pattern of masks, all dtypes; the router by a warp and by a block.
token_mask='CudaTokenMask.SmallNorms:CudaTokenMask.NormOfNoTokens:CudaTokenMask.SmallRouters'
# Blocks of three of the four shapes, partial tiles; both dtypes, training and eval.
router_logits='*RouterLogitsOf.*/T1_H200_*:*RouterLogitsOf.*/T37_H200_*'
router_logits=$router_logits:'*RouterLogitsOf.*/T199_H264_*:*RouterLogitsOf.*/T37_H72_*'
router_logits=$router_logits:'*RouterLogitsOf.*/T199_H72_*'
# Dense, dropped and padded rows, vectors and single elements, one block of pairs and several.
permute='CudaPermute.AllCases:CudaExpertRows.AllCases'

status=0
for tool in "$@"; do
  # Memory that the tests poison counts as written.
  unset OMNI_MOE_TEST_INITCHECK
  [ "$tool" = initcheck ] && export OMNI_MOE_TEST_INITCHECK=1
  for pair in "expert $expert" "expert_band_lists $band_lists" "expert_bands $bands" \
    "gated_linear $linear" "gated_linear_backward $linear_backward" "router $router" \
    "router_unsorted $router_unsorted" "topk_router $topk_router" \
    "gated_activation $activation" "batch_norm $batch_norm" \
    "token_norm $token_norm" "token_mask $token_mask" "router_logits $router_logits" \
    "permute $permute"; do
    name=test_cuda_${pair%% *}
    start=$(date +%s)
    if timeout "${SECONDS_EACH:-60}" "$sanitizer" --tool "$tool" --error-exitcode 1 \
      --print-limit 3 "$build/tests/cpp/$name" --gtest_brief=1 --gtest_filter="${pair#* }"; then
      result=passed
    else
      result=FAILED
      status=1
    fi
    echo "$tool $name: $result in $(($(date +%s) - start)) s"
  done
done
exit $status
