// How BatchNorm's blocks lie over tokens and columns; the launch asks again where the stream has
// fewer SMs than the device. Needs no CUDA toolkit.
#pragma once

#include "omni_moe/cuda_plan.h"

namespace omni_moe::cuda {

// `rows`: of a thread in registers, at vectors of `vec` columns.
BatchNormGrid plan_batch_norm_grid(int64_t num_tokens, int64_t num_rows, int64_t num_cols, int vec,
                                   int rows, int num_sms);

}  // namespace omni_moe::cuda
