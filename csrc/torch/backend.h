// Hands a Params struct to the backend of a device: the one place that knows which backends exist.
#pragma once

#include <ATen/ATen.h>

#include "omni_moe/batch_norm.h"
#include "omni_moe/expert.h"
#include "omni_moe/mlp.h"
#include "omni_moe/router.h"
#include "omni_moe/router_logits.h"

namespace omni_moe::torch_api {

// Each allocates the backend's workspace, runs on the current stream (CUDA) or at::parallel_for's
// threads (CPU), and raises if the launch fails.
void launch(RouterForwardParams params, at::Device device);
void launch(RouterBackwardParams params, at::Device device);
void launch(ExpertForwardParams params, at::Device device);
void launch(ExpertBackwardParams params, at::Device device);
void launch(GatedActivationForwardParams params, at::Device device);
void launch(GatedActivationBackwardParams params, at::Device device);
void launch(BatchNormForwardParams params, at::Device device);
void launch(BatchNormBackwardParams params, at::Device device);

// Not every backend has these: ask first (outputs may still be null then).
bool supports(const GatedLinearForwardParams& params, at::Device device);
bool supports(const GatedLinearBackwardParams& params, at::Device device);
void launch(GatedLinearForwardParams params, at::Device device);
void launch(GatedLinearBackwardParams params, at::Device device);
bool supports(const RouterLogitsForwardParams& params, at::Device device);
// False, and nothing has run, where the launch finds that there is no kernel for it after all: the
// stream has too few of the device's multiprocessors.
bool try_launch(const RouterLogitsForwardParams& params, at::Device device);

// As in namespace cuda; false without CUDA.
bool set_early_launch(bool allowed);
bool has_early_launch();
bool has_hopper_kernels();

}  // namespace omni_moe::torch_api
