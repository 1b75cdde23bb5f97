// SIMD for the CPU kernels: one vector of accumulators (fp32, or fp64 for fp64 operands), loaded
// from and stored to any storage type. Written with the compiler's vector extensions, so the same
// source serves every instruction set that the file including it is compiled for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#if defined(__SSE2__)
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

// 0, 1, 2, …
template <typename Int, int kCount = kVectorBytes / static_cast<int>(sizeof(Int))>
inline auto lane_numbers() {
  using V = typename VectorOf<Int, kCount* static_cast<int>(sizeof(Int))>::type;
  V v;
  for (int lane = 0; lane < kCount; ++lane) v[lane] = static_cast<Int>(lane);
  return v;
}

template <typename Acc>
inline int64_t whole_vectors(int64_t n) {
  return (n + kLanes<Acc> - 1) / kLanes<Acc> * kLanes<Acc>;
}

// ---- Storage type -> accumulators ---------------------------------------------------------------

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

// ---- Accumulators -> storage type, rounded to nearest even --------------------------------------

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

// ---- Partial vectors ----------------------------------------------------------------------------

// Only the first `count` lanes are in memory; the others read as zero, or as `rest`.

template <typename T>
inline Vec<acc_t<T>> load_partial(const T* p, int64_t count) {
  T lanes[kLanes<acc_t<T>>] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}
template <typename T>
inline Vec<acc_t<T>> load_partial(const T* p, int64_t count, acc_t<T> rest) {
  using Int = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;
  const auto loaded = lane_numbers<Int>() < static_cast<Int>(count);
  return loaded ? load_partial(p, count) : Vec<acc_t<T>>{} + rest;
}
template <typename T>
inline void store_partial(T* p, Vec<acc_t<T>> v, int64_t count) {
  T lanes[kLanes<acc_t<T>>];
  store(lanes, v);
  std::memcpy(p, lanes, count * sizeof(T));
}

// ---- Rows, vector by vector ---------------------------------------------------------------------

// body(column, lanes): a full vector at a time, then the columns left over.
template <typename Acc, typename Body>
inline void for_each_vector(int64_t num_columns, Body&& body) {
  int64_t column = 0;
  for (; column + kLanes<Acc> <= num_columns; column += kLanes<Acc>) body(column, kLanes<Acc>);
  if (column < num_columns) body(column, num_columns - column);
}
// The lanes of such a vector.
template <typename T>
inline Vec<acc_t<T>> load_lanes(const T* p, int64_t lanes) {
  return lanes == kLanes<acc_t<T>> ? load(p) : load_partial(p, lanes);
}
template <typename T>
inline void store_lanes(T* p, Vec<acc_t<T>> v, int64_t lanes) {
  lanes == kLanes<acc_t<T>> ? store(p, v) : store_partial(p, v, lanes);
}

// ---- Rows of n elements, to and from accumulators -----------------------------------------------

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

// ---- Single elements ----------------------------------------------------------------------------

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

// ---- Compaction ---------------------------------------------------------------------------------

// One bit a lane of a comparison's result.
template <typename Mask>
inline uint32_t lane_bits(Mask mask) {
  constexpr bool kWide = sizeof(mask[0]) == 8;
#if defined(__AVX512F__)
  const auto bits = bit_cast<__m512i>(mask);
  if constexpr (kWide) {
    return _mm512_movepi64_mask(bits);
  } else {
    return _mm512_movepi32_mask(bits);
  }
#elif defined(__AVX2__)
  if constexpr (kWide) {
    return _mm256_movemask_pd(bit_cast<__m256d>(mask));
  } else {
    return _mm256_movemask_ps(bit_cast<__m256>(mask));
  }
#elif defined(__SSE2__)
  if constexpr (kWide) {
    return _mm_movemask_pd(bit_cast<__m128d>(mask));
  } else {
    return _mm_movemask_ps(bit_cast<__m128>(mask));
  }
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kVectorBytes / static_cast<int>(sizeof(mask[0])); ++lane) {
    bits |= uint32_t(mask[lane] != 0) << lane;
  }
  return bits;
#endif
}

// counts + 1 in the lanes where a > b.
template <typename V>
inline V count_greater(V counts, V a, V b) {
#if defined(__AVX512F__)
  // Two instructions; through a vector mask the compiler makes it three.
  const auto left = bit_cast<__m512i>(a), right = bit_cast<__m512i>(b);
  const auto sums = bit_cast<__m512i>(counts);
  if constexpr (sizeof(counts[0]) == 8) {
    const auto where = _mm512_cmpgt_epi64_mask(left, right);
    return bit_cast<V>(_mm512_mask_add_epi64(sums, where, sums, _mm512_set1_epi64(1)));
  } else {
    const auto where = _mm512_cmpgt_epi32_mask(left, right);
    return bit_cast<V>(_mm512_mask_add_epi32(sums, where, sums, _mm512_set1_epi32(1)));
  }
#else
  return counts - (a > b);
#endif
}

// append_lanes may write this many elements past those it appends.
inline constexpr int64_t kAppendSlack = 16;

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each set of eight lanes, their numbers: the permutation that moves them to the front.
struct FrontLanes {
  uint8_t lanes[256][8];
  constexpr FrontLanes() : lanes() {
    for (int bits = 0; bits < 256; ++bits) {
      for (int lane = 0, filled = 0; lane < 8; ++lane) {
        if (bits >> lane & 1) lanes[bits][filled++] = static_cast<uint8_t>(lane);
      }
    }
  }
};
inline constexpr FrontLanes kFrontLanes;
#endif

// Writes the lanes whose bit is set to out[0], out[1], …
template <typename V, typename E>
inline void append_lanes(E* out, V v, uint32_t bits) {
  static_assert(sizeof(v[0]) == sizeof(E));
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(E) == 4) {
    // To a register first: the instruction that compresses to memory is microcoded on Zen 4.
    const auto front = _mm512_maskz_compress_epi32(bits, bit_cast<__m512i>(v));
    return _mm512_storeu_si512(out, front);
  } else if constexpr (sizeof(V) == 64 && sizeof(E) == 8) {
    const auto front = _mm512_maskz_compress_epi64(bits, bit_cast<__m512i>(v));
    return _mm512_storeu_si512(out, front);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(V) == 32 && sizeof(E) == 4) {
    const auto lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kFrontLanes.lanes[bits]));
    const auto front =
        _mm256_permutevar8x32_epi32(bit_cast<__m256i>(v), _mm256_cvtepu8_epi32(lanes));
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), front);
  }
#endif
  for (int lane = 0; lane < static_cast<int>(sizeof(V) / sizeof(E)); ++lane) {
    *out = v[lane];
    out += bits >> lane & 1;
  }
}

// ---- Dispatch on the storage type ---------------------------------------------------------------

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
