// act(x) and its backward for a scalar or a whole vector of accumulators, one template for both.
#pragma once

#include "vec.h"

namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY {

template <typename V>
struct ElementOf {
  using type = std::remove_reference_t<decltype(std::declval<V&>()[0])>;
};
template <>
struct ElementOf<float> {
  using type = float;
};
template <>
struct ElementOf<double> {
  using type = double;
};

// Applies f to each lane, for functions that no hot path evaluates.
template <typename V, typename F>
inline V map_lanes(V v, F f) {
  if constexpr (std::is_arithmetic_v<V>) {
    return f(v);
  } else {
    for (int lane = 0; lane < static_cast<int>(sizeof(V) / sizeof(v[0])); ++lane) {
      v[lane] = f(v[lane]);
    }
    return v;
  }
}

template <typename V>
inline V exp_of(V v) {
  return map_lanes(v, [](auto x) { return std::exp(x); });
}

// exp(x) = 2^n exp(r), |r| <= ln2/2, polynomial of degree 6: within 2 ulp of fp32 on the range
// that does not saturate. Below it gives 0 (so exp(-inf) = 0), above it 2^128 = inf; NaN stays NaN.
inline Vec<float> exp_of(Vec<float> x) {
  constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> zero = {};
  const Vec<float> lowest = zero - 88.0f, highest = zero + 89.0f;
  const auto underflow = x < lowest;
  x = x > highest ? highest : x;
  const Vec<float> shifted = x * 1.44269504088896341f + kRoundMagic;
  const Vec<float> n = shifted - kRoundMagic;
  const Vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<float> p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const I32Vec exponent = bit_cast<I32Vec>(shifted) - bit_cast<int32_t>(kRoundMagic);
  const Vec<float> scale = bit_cast<Vec<float>>((exponent + 127) << 23);
  return underflow ? zero : p * scale;
}

template <typename V>
inline V sigmoid(V x) {
  using E = typename ElementOf<V>::type;
  return E(1) / (E(1) + exp_of(-x));
}

// The last operation is a sum, not the equal 0.5 * (1 + erf): the compiler could fuse that product
// with a sum that follows, or not, depending on what else is computed, and the last bit with it.
template <typename V>
inline V normal_cdf(V x) {
  using E = typename ElementOf<V>::type;
  return E(0.5) +
         E(0.5) * map_lanes(x * E(0.70710678118654752440), [](auto z) { return std::erf(z); });
}

// tanh(√(2/π) (x + 0.044715 x³)), the inner part of gelu_tanh.
template <typename V>
inline V gelu_tanh_inner(V x) {
  using E = typename ElementOf<V>::type;
  return map_lanes(E(0.79788456080286535588) * (x + E(0.044715) * x * x * x),
                   [](auto z) { return std::tanh(z); });
}

template <typename V>
inline V activate(Activation activation, V x) {
  using E = typename ElementOf<V>::type;
  switch (activation) {
    case Activation::kSilu:
      return x / (E(1) + exp_of(-x));
    case Activation::kGelu:
      return x * normal_cdf(x);
    case Activation::kGeluTanh:
      return E(0.5) * x * (E(1) + gelu_tanh_inner(x));
    case Activation::kRelu:
      return x < E(0) ? V{} : x;  // written so that NaN stays NaN
    case Activation::kIdentity:
      return x;
  }
  throw std::invalid_argument("omni_moe: unknown Activation");
}

// grad * act'(x)
template <typename V>
inline V activate_backward(Activation activation, V x, V grad) {
  using E = typename ElementOf<V>::type;
  switch (activation) {
    case Activation::kSilu: {
      const V s = sigmoid(x);
      return grad * (s * (E(1) + x * (E(1) - s)));
    }
    case Activation::kGelu: {
      const V density = E(0.39894228040143267794) * exp_of(E(-0.5) * x * x);
      return grad * (normal_cdf(x) + x * density);
    }
    case Activation::kGeluTanh: {
      const V t = gelu_tanh_inner(x);
      const V inner_grad = E(0.79788456080286535588) * (E(1) + E(3 * 0.044715) * x * x);
      return grad * (E(0.5) * (E(1) + t) + E(0.5) * x * (E(1) - t * t) * inner_grad);
    }
    case Activation::kRelu:
      return x <= E(0) ? V{} : grad;  // no product: as in torch, 0 whatever the gradient
    case Activation::kIdentity:
      return grad;
  }
  throw std::invalid_argument("omni_moe: unknown Activation");
}

}  // namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY
