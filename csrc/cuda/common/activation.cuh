// act(x) and act'(x) in fp32 for every Activation, with the limits of torch.nn.functional:
// NaN stays NaN (relu too), relu'(0) = 0.
#pragma once

#include <cuda_runtime.h>

#include "omni_moe/types.h"

namespace omni_moe::cuda {

struct ActivationResult {
  float value;       // act(x)
  float derivative;  // act'(x)
};

// One template serves both: a result that the caller does not use is dead code.
template <Activation kActivation>
__device__ __forceinline__ ActivationResult activate_with_derivative(float x) {
  if constexpr (kActivation == Activation::kSilu) {
    const float sigmoid = 1.0f / (1.0f + expf(-x));
    // x / (1 + e^-x) has one rounding fewer than x * sigmoid, and it is what the reference
    // computes.
    return {x / (1.0f + expf(-x)), sigmoid * (1.0f + x * (1.0f - sigmoid))};
  } else if constexpr (kActivation == Activation::kGelu) {
    constexpr float kSqrtHalf = 0.70710678118654752440f;
    constexpr float kInvSqrtTwoPi = 0.39894228040143267794f;
    const float cdf = 0.5f * (1.0f + erff(x * kSqrtHalf));
    return {x * cdf, cdf + x * kInvSqrtTwoPi * expf(-0.5f * x * x)};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    constexpr float kSqrtTwoOverPi = 0.79788456080286535588f;
    constexpr float kCubic = 0.044715f;
    const float tanh_inner = tanhf(kSqrtTwoOverPi * (x + kCubic * x * x * x));
    const float inner_derivative = kSqrtTwoOverPi * (1.0f + 3.0f * kCubic * x * x);
    return {0.5f * x * (1.0f + tanh_inner),
            0.5f * (1.0f + tanh_inner) +
                0.5f * x * (1.0f - tanh_inner * tanh_inner) * inner_derivative};
  } else if constexpr (kActivation == Activation::kRelu) {
    return x <= 0.0f ? ActivationResult{0.0f, 0.0f} : ActivationResult{x, 1.0f};
  } else {
    static_assert(kActivation == Activation::kIdentity, "an activation without a definition");
    return {x, 1.0f};
  }
}

template <Activation kActivation>
__device__ __forceinline__ float activate(float x) {
  return activate_with_derivative<kActivation>(x).value;
}

// 1 / (1 + e^-x) in four instructions, two of them of the special function unit. CUDA's own
// functions (exp2f, __expf, __fdividef) surround these two with steps that keep denormals.
__device__ __forceinline__ float fast_sigmoid(float x) {
  constexpr float kMinusLog2E = -1.44269504088896340736f;
  float power, sigmoid;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(kMinusLog2E * x));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(1.0f + power));
  return sigmoid;
}

// For kernels whose results are rounded to 16 bits (2^-11 at most) and which have no time for an
// exact division and range reductions: errors stay near 2^-21.
template <Activation kActivation>
__device__ __forceinline__ ActivationResult fast_activate_with_derivative(float x) {
  if constexpr (kActivation == Activation::kSilu) {
    const float sigmoid = fast_sigmoid(x);
    return {x * sigmoid, sigmoid * (1.0f + x * (1.0f - sigmoid))};
  } else if constexpr (kActivation == Activation::kGelu) {
    constexpr float kSqrtHalf = 0.70710678118654752440f;
    constexpr float kInvSqrtTwoPi = 0.39894228040143267794f;
    const float cdf = 0.5f * (1.0f + erff(x * kSqrtHalf));
    return {x * cdf, cdf + x * kInvSqrtTwoPi * __expf(-0.5f * x * x)};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = sigmoid(2 u)
    constexpr float kTwoSqrtTwoOverPi = 1.59576912160573071176f;
    constexpr float kCubic = 0.044715f;
    const float sigmoid = fast_sigmoid(kTwoSqrtTwoOverPi * (x + kCubic * x * x * x));
    const float inner_derivative = kTwoSqrtTwoOverPi * (1.0f + 3.0f * kCubic * x * x);
    return {x * sigmoid, sigmoid + x * sigmoid * (1.0f - sigmoid) * inner_derivative};
  } else {
    return activate_with_derivative<kActivation>(x);
  }
}

template <Activation kActivation>
__device__ __forceinline__ float fast_activate(float x) {
  return fast_activate_with_derivative<kActivation>(x).value;
}

// The activation is chosen at run time in kernels that evaluate it once per row, where a uniform
// branch costs less than five copies of the kernel.
__device__ __forceinline__ ActivationResult activate_with_derivative(Activation activation,
                                                                     float x) {
  switch (activation) {
    case Activation::kSilu:
      return activate_with_derivative<Activation::kSilu>(x);
    case Activation::kGelu:
      return activate_with_derivative<Activation::kGelu>(x);
    case Activation::kGeluTanh:
      return activate_with_derivative<Activation::kGeluTanh>(x);
    case Activation::kRelu:
      return activate_with_derivative<Activation::kRelu>(x);
    case Activation::kIdentity:
      return activate_with_derivative<Activation::kIdentity>(x);
  }
  __builtin_unreachable();  // launchers reject other values
}

__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kSilu:
      return activate<Activation::kSilu>(x);
    case Activation::kGelu:
      return activate<Activation::kGelu>(x);
    case Activation::kGeluTanh:
      return activate<Activation::kGeluTanh>(x);
    case Activation::kRelu:
      return activate<Activation::kRelu>(x);
    case Activation::kIdentity:
      return activate<Activation::kIdentity>(x);
  }
  __builtin_unreachable();
}

// grad * act'(x). A closed relu gives 0 whatever the gradient, as in torch; a product with 0 would
// turn an infinite gradient into NaN.
__device__ __forceinline__ float through_derivative(Activation activation,
                                                    const ActivationResult& act, float grad) {
  const bool is_closed = activation == Activation::kRelu && act.derivative == 0.0f;
  return is_closed ? 0.0f : grad * act.derivative;
}

}  // namespace omni_moe::cuda
