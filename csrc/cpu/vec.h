// SIMD for the CPU kernels: one vector of accumulators (fp32, or fp64 for fp64 operands), loaded
// from and stored to any storage type. Written with the compiler's vector extensions, so the same
// source serves every instruction set that the file including it is compiled for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "omni_moe/types.h"

#ifndef OMNI_MOE_CPU_CAPABILITY
#error "compile with OMNI_MOE_CPU_CAPABILITY naming the instruction set (see CMakeLists.txt)"
#endif

// Everything lives in a namespace named after the instruction set: the same inline function
// compiled for two sets must be two symbols, or the linker would keep either.
namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Accumulator of a storage type.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};

template <typename Acc>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Acc));

template <typename Acc>
using Vec = typename VectorOf<Acc, kVectorBytes>::type;
using U32Vec = typename VectorOf<uint32_t, kVectorBytes>::type;
using I32Vec = typename VectorOf<int32_t, kVectorBytes>::type;
using U16Vec = typename VectorOf<uint16_t, kVectorBytes / 2>::type;

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename V>
inline V load_bits(const void* source) {
  V v;
  std::memcpy(&v, source, sizeof(V));
  return v;
}

// ---- storage type -> accumulators ----

inline Vec<float> load(const float* p) { return load_bits<Vec<float>>(p); }
inline Vec<double> load(const double* p) { return load_bits<Vec<double>>(p); }
inline Vec<float> load(const BFloat16* p) {
  return bit_cast<Vec<float>>(__builtin_convertvector(load_bits<U16Vec>(p), U32Vec) << 16);
}
inline Vec<float> load(const Float16* p) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(load_bits<__m256i>(p)));
#elif defined(__F16C__)
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(load_bits<__m128i>(p)));
#else
  Vec<float> v;
  for (int lane = 0; lane < kLanes<float>; ++lane) {
    v[lane] = static_cast<float>(bit_cast<_Float16>(p[lane].bits));
  }
  return v;
#endif
}

// ---- accumulators -> storage type, rounded to nearest even ----

inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(BFloat16* p, Vec<float> v) {
  const U32Vec bits = bit_cast<U32Vec>(v);
  const U32Vec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32Vec quiet_nan = (bits >> 16) | 0x40u;  // rounding could carry a NaN into an infinity
  const U16Vec narrow = __builtin_convertvector(v == v ? rounded : quiet_nan, U16Vec);
  std::memcpy(p, &narrow, sizeof(narrow));
}
inline void store(Float16* p, Vec<float> v) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof(half));
#elif defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof(half));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) {
    p[lane].bits = bit_cast<uint16_t>(static_cast<_Float16>(v[lane]));
  }
#endif
}

// ---- the first `count` lanes only; the others read as zero ----

template <typename T>
inline Vec<acc_t<T>> load_partial(const T* p, int64_t count) {
  T lanes[kLanes<acc_t<T>>] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}
template <typename T>
inline void store_partial(T* p, Vec<acc_t<T>> v, int64_t count) {
  T lanes[kLanes<acc_t<T>>];
  store(lanes, v);
  std::memcpy(p, lanes, count * sizeof(T));
}

// ---- rows of n elements, to and from accumulators ----

template <typename T>
inline void widen(const T* row, acc_t<T>* out, int64_t n) {
  using Acc = acc_t<T>;
  int64_t i = 0;
  for (; i + kLanes<Acc> <= n; i += kLanes<Acc>) store(out + i, load(row + i));
  if (i < n) store_partial(out + i, load_partial(row + i, n - i), n - i);
}
template <typename T>
inline void narrow(const acc_t<T>* row, T* out, int64_t n) {
  using Acc = acc_t<T>;
  int64_t i = 0;
  for (; i + kLanes<Acc> <= n; i += kLanes<Acc>) store(out + i, load(row + i));
  if (i < n) store_partial(out + i, load_partial(row + i, n - i), n - i);
}

// ---- single elements ----

template <typename T>
inline acc_t<T> load_scalar(const T* p) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return *p;
  } else {
    return load_partial(p, 1)[0];
  }
}
template <typename T>
inline void store_scalar(T* p, acc_t<T> value) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    *p = value;
  } else {
    store_partial(p, Vec<acc_t<T>>{value}, 1);
  }
}

template <typename Acc>
inline Acc sum_of_lanes(Vec<Acc> v) {
  Acc lanes[kLanes<Acc>];
  store(lanes, v);
  for (int width = kLanes<Acc> / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// ---- dispatch on the storage type ----

template <typename T>
struct Type {
  using type = T;
};

template <typename Body>
inline void dispatch_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Type<float>{});
    case DType::kFloat64:
      return body(Type<double>{});
    case DType::kFloat16:
      return body(Type<Float16>{});
    case DType::kBFloat16:
      return body(Type<BFloat16>{});
  }
  throw std::invalid_argument("omni_moe: unknown DType");
}

template <typename Body>
inline void dispatch_index(IndexType index_type, Body&& body) {
  switch (index_type) {
    case IndexType::kInt32:
      return body(Type<int32_t>{});
    case IndexType::kInt64:
      return body(Type<int64_t>{});
  }
  throw std::invalid_argument("omni_moe: unknown IndexType");
}

}  // namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY
