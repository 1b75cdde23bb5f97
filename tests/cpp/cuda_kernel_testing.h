// What the tests of the CUDA router and activation share: storage of any dtype, poisoned device
// memory between guards, tolerances, and a fixture that needs a device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "device_poison.h"
#include "omni_moe/cuda.h"

namespace omni_moe {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct DTypeInfo {
  DType dtype;
  const char* name;
  size_t bytes;
  double epsilon;   // relative error of one rounding
  double smallest;  // absolute error of one rounding near zero
};
inline constexpr DTypeInfo kDTypes[] = {{DType::kFloat32, "fp32", 4, 6e-8, 1e-38},
                                        {DType::kFloat16, "fp16", 2, 4.9e-4, 3e-8},
                                        {DType::kBFloat16, "bf16", 2, 3.91e-3, 1e-38}};

inline float round_to(DType dtype, float value) {
  if (dtype == DType::kFloat16) return __half2float(__float2half_rn(value));
  if (dtype == DType::kBFloat16) return __bfloat162float(__float2bfloat16_rn(value));
  return value;
}

inline std::vector<unsigned char> encode(const DTypeInfo& type, const std::vector<float>& values) {
  std::vector<unsigned char> bytes(values.size() * type.bytes);
  for (size_t i = 0; i < values.size(); ++i) {
    unsigned char* to = bytes.data() + i * type.bytes;
    if (type.dtype == DType::kFloat16) {
      const __half v = __float2half_rn(values[i]);
      std::memcpy(to, &v, 2);
    } else if (type.dtype == DType::kBFloat16) {
      const __nv_bfloat16 v = __float2bfloat16_rn(values[i]);
      std::memcpy(to, &v, 2);
    } else {
      std::memcpy(to, &values[i], 4);
    }
  }
  return bytes;
}

inline std::vector<float> decode(const DTypeInfo& type, const std::vector<unsigned char>& bytes) {
  std::vector<float> values(bytes.size() / type.bytes);
  for (size_t i = 0; i < values.size(); ++i) {
    const unsigned char* from = bytes.data() + i * type.bytes;
    if (type.dtype == DType::kFloat16) {
      __half v;
      std::memcpy(&v, from, 2);
      values[i] = __half2float(v);
    } else if (type.dtype == DType::kBFloat16) {
      __nv_bfloat16 v;
      std::memcpy(&v, from, 2);
      values[i] = __bfloat162float(v);
    } else {
      std::memcpy(&values[i], from, 4);
    }
  }
  return values;
}

inline constexpr size_t kGuard = 256;  // bytes after every buffer that must stay poisoned

// Device bytes, poisoned, `offset` bytes past an aligned address.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t size, size_t offset = 0) : size_(size), offset_(offset) {
    EXPECT_EQ(cudaSuccess, cudaMalloc(&base_, size + offset + kGuard));
    EXPECT_EQ(cudaSuccess, poison_device_memory(base_, offset, size, kGuard));
  }
  explicit DeviceBuffer(const std::vector<unsigned char>& bytes, size_t offset = 0)
      : DeviceBuffer(bytes.size(), offset) {
    EXPECT_EQ(cudaSuccess, cudaMemcpy(data(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { cudaFree(base_); }

  void* data() const { return static_cast<unsigned char*>(base_) + offset_; }

  // The bytes; fails the test where the guard was written.
  std::vector<unsigned char> read() const {
    std::vector<unsigned char> bytes(size_ + kGuard);
    EXPECT_EQ(cudaSuccess, cudaMemcpy(bytes.data(), data(), bytes.size(), cudaMemcpyDeviceToHost));
    for (size_t i = size_; i < bytes.size(); ++i) {
      EXPECT_EQ(kPoison, bytes[i]) << "written past the end, byte " << i - size_;
      if (bytes[i] != kPoison) break;
    }
    bytes.resize(size_);
    return bytes;
  }

 private:
  void* base_ = nullptr;
  size_t size_;
  size_t offset_;
};

// Skips its tests where there is no device.
class CudaKernelTest : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
      GTEST_SKIP() << "needs a CUDA device, and there is none";
    }
  }
};

inline void expect_close(double got, double want, double tolerance, const std::string& what) {
  if (std::isnan(want)) {
    EXPECT_TRUE(std::isnan(got)) << what << ": " << got << " instead of NaN";
  } else if (got != want) {
    EXPECT_LE(std::abs(got - want), tolerance) << what << ": " << got << " instead of " << want;
  }
}

}  // namespace omni_moe
