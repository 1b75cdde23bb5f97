// Element types and activations shared by every kernel: what a `void*` in a Params struct points
// to.
#pragma once

#include <cstdint>

namespace omni_moe {

// Storage type of the floating-point operands. Sums are carried in fp32 (fp64 for kFloat64).
enum class DType : int8_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

// Storage type of expert ids given by the caller. The routers always write int32.
enum class IndexType : int8_t { kInt32, kInt64 };

// act in E_i(x) = act(x · up_i) * down_i, and in the shared MLP's act(gate) * up.
enum class Activation : int8_t { kSilu, kGelu, kGeluTanh, kRelu, kIdentity };

}  // namespace omni_moe
