// What the tests of the two fused GEMMs of the CUDA shared MLP share: 16-bit matrices on the host
// and, poisoned and between guards, on the device, the activations in double precision, and how
// much an output may be off.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "device_poison.h"
#include "omni_moe/types.h"

namespace omni_moe {

inline uint16_t encode(DType dtype, float value) {
  uint16_t bits;
  if (dtype == DType::kFloat16) {
    const __half half = __float2half(value);
    std::memcpy(&bits, &half, 2);
  } else {
    const __nv_bfloat16 bfloat = __float2bfloat16(value);
    std::memcpy(&bits, &bfloat, 2);
  }
  return bits;
}

inline float decode(DType dtype, uint16_t bits) {
  return dtype == DType::kFloat16 ? __half2float(__half(__half_raw{bits}))
                                  : __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}));
}

inline double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kGelu:
      return 0.5 * x * (1 + std::erf(x * std::sqrt(0.5)));
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    case Activation::kRelu:
      return std::max(x, 0.0);
    case Activation::kIdentity:
      return x;
  }
  return NAN;
}

#define CHECK_CUDA(call) ASSERT_EQ(call, cudaSuccess) << cudaGetErrorString(cudaGetLastError())

using Matrix = std::vector<uint16_t>;

// Device elements between two guards that must stay untouched.
class DeviceMatrix {
 public:
  explicit DeviceMatrix(size_t count) : count_(count) {
    void* base = nullptr;
    EXPECT_EQ(cudaMalloc(&base, bytes()), cudaSuccess);
    base_ = static_cast<uint16_t*>(base);
    poison();
  }
  explicit DeviceMatrix(const Matrix& host) : DeviceMatrix(host.size()) {
    EXPECT_EQ(cudaMemcpy(data(), host.data(), 2 * host.size(), cudaMemcpyHostToDevice),
              cudaSuccess);
  }
  DeviceMatrix(const DeviceMatrix&) = delete;
  DeviceMatrix& operator=(const DeviceMatrix&) = delete;
  ~DeviceMatrix() { cudaFree(base_); }

  // All bytes 0xff: a NaN in both types.
  void poison() {
    EXPECT_EQ(poison_device_memory(base_, 2 * kGuard, 2 * count_, 2 * kGuard), cudaSuccess);
  }
  void* data() const { return base_ + kGuard; }

  Matrix download() const {
    Matrix all(count_ + 2 * kGuard);
    EXPECT_EQ(cudaMemcpy(all.data(), base_, bytes(), cudaMemcpyDeviceToHost), cudaSuccess);
    const auto untouched = [](uint16_t bits) { return bits == 0xffff; };
    EXPECT_TRUE(std::all_of(all.begin(), all.begin() + kGuard, untouched)) << "write before";
    EXPECT_TRUE(std::all_of(all.end() - kGuard, all.end(), untouched)) << "write past";
    return {all.begin() + kGuard, all.end() - kGuard};
  }

 private:
  static constexpr size_t kGuard = 1024;
  size_t bytes() const { return 2 * (count_ + 2 * kGuard); }
  uint16_t* base_ = nullptr;
  size_t count_;
};

inline Matrix random_matrix(int64_t rows, int64_t cols, double deviation, DType dtype,
                            std::mt19937& rng) {
  std::normal_distribution<float> normal(0.0f, static_cast<float>(deviation));
  Matrix matrix(rows * cols);
  for (uint16_t& bits : matrix) bits = encode(dtype, normal(rng));
  return matrix;
}

// A multiply-add per element of the rows checked: what a second of host time allows.
inline constexpr double kMaxOracleWork = 3e8;

// Of one rounding to the dtype, relative.
inline double rounding_of(DType dtype) { return dtype == DType::kFloat16 ? 1.0 / 2048 : 1.0 / 256; }

// Of one rounding of a value, absolute.
inline double rounding_error(DType dtype, double value) {
  const double smallest = dtype == DType::kFloat16 ? 6e-8 : 1e-37;
  return 1.01 * rounding_of(dtype) * std::abs(value) + smallest;
}

// What an fp32 sum of this many terms (which the tensor cores truncate) and the activation lose,
// relative to the root of the sum of the terms' squares.
inline double sum_error_of(int64_t terms) { return 1e-6 * std::sqrt(double(terms)) + 4e-6; }

}  // namespace omni_moe
