// What the tests of the kernels of both backends share: elements of any dtype, read and written as
// double, and the error of one rounding.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "omni_moe/types.h"

namespace omni_moe {

inline constexpr double kInf = std::numeric_limits<double>::infinity();
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
inline constexpr Activation kActivations[] = {Activation::kSilu, Activation::kGelu,
                                              Activation::kGeluTanh, Activation::kRelu,
                                              Activation::kIdentity};

inline size_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

template <typename T>
T load_bytes(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}
template <typename T>
void store_bytes(void* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}

inline double load_element(DType dtype, const void* from) {
  if (dtype == DType::kFloat64) return load_bytes<double>(from);
  if (dtype == DType::kFloat32) return load_bytes<float>(from);
  if (dtype == DType::kFloat16) return static_cast<float>(load_bytes<_Float16>(from));
  const uint32_t bits = uint32_t(load_bytes<uint16_t>(from)) << 16;
  return load_bytes<float>(&bits);
}

// Rounds to the nearest, ties to even, by way of fp32.
inline void store_element(DType dtype, void* to, double value) {
  if (dtype == DType::kFloat64) return store_bytes(to, value);
  const auto narrow = static_cast<float>(value);
  if (dtype == DType::kFloat32) return store_bytes(to, narrow);
  if (dtype == DType::kFloat16) return store_bytes(to, static_cast<_Float16>(narrow));
  auto bits = load_bytes<uint32_t>(&narrow);
  if (narrow == narrow) bits += 0x7fff + (bits >> 16 & 1);
  store_bytes(to, static_cast<uint16_t>(bits >> 16));
}

inline double rounded(DType dtype, double value) {
  unsigned char element[sizeof(double)];
  store_element(dtype, element, value);
  return load_element(dtype, element);
}

// Of one rounding to the dtype, relative.
inline double unit_roundoff(DType dtype) {
  return dtype == DType::kFloat64   ? 0x1p-53
         : dtype == DType::kFloat32 ? 0x1p-24
         : dtype == DType::kFloat16 ? 0x1p-11
                                    : 0x1p-8;
}

}  // namespace omni_moe
