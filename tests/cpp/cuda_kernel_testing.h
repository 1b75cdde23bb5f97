// What all tests of the CUDA kernels share:
//   encode, decode      elements of a dtype as bytes, from and to doubles;
//   DeviceArray         device memory between two guards, NaN bytes until a kernel writes it;
//   Operand             what a kernel reads or writes, in its dtype on the device and in fp64 on
//                       the host, for its oracle: the same kernel of the CPU backend in fp64;
//   run_twice           a kernel on poisoned outputs, which a second run must repeat bit for bit;
//   rounding_error, sum_error, product_error, expect_close
//                       how far a result may be from the oracle, and the comparison;
//   activate, multiply_row, sampled_rows
//                       what the oracles of the fused products have in common;
//   CudaKernelTest      a fixture that needs a device.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernel_testing.h"
#include "omni_moe/cpu.h"
#include "omni_moe/cuda.h"

namespace omni_moe {

inline constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

inline const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "fp32" : dtype == DType::kFloat16 ? "fp16" : "bf16";
}

// ---- elements ----

using Bytes = std::vector<unsigned char>;
using Values = std::vector<double>;

inline Bytes encode(DType dtype, const Values& values) {
  Bytes bytes(values.size() * size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    store_element(dtype, bytes.data() + i * size_of(dtype), values[i]);
  }
  return bytes;
}

inline Values decode(DType dtype, const Bytes& bytes) {
  Values values(bytes.size() / size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = load_element(dtype, bytes.data() + i * size_of(dtype));
  }
  return values;
}

// Integers as they are.
template <typename T>
Bytes bytes_of(const std::vector<T>& integers) {
  Bytes bytes(integers.size() * sizeof(T));
  if (!bytes.empty()) std::memcpy(bytes.data(), integers.data(), bytes.size());
  return bytes;
}
template <typename T>
std::vector<T> integers_of(const Bytes& bytes) {
  std::vector<T> integers(bytes.size() / sizeof(T));
  if (!bytes.empty()) std::memcpy(integers.data(), bytes.data(), bytes.size());
  return integers;
}

// ---- storage ----

inline constexpr unsigned char kPoison = 0xff;  // all bytes: a NaN in every floating-point type

// Device memory between two guards that must stay untouched, `offset` bytes past an address aligned
// as cudaMalloc's are.
class DeviceArray {
 public:
  explicit DeviceArray(size_t bytes, size_t offset = 0) : bytes_(bytes), begin_(kGuard + offset) {
    EXPECT_EQ(cudaSuccess, cudaMalloc(&base_, begin_ + bytes_ + kGuard));
    poison();
  }
  explicit DeviceArray(const Bytes& host, size_t offset = 0) : DeviceArray(host.size(), offset) {
    upload(host);
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(base_); }

  void* data() const { return static_cast<unsigned char*>(base_) + begin_; }

  // With OMNI_MOE_TEST_INITCHECK set, as sanitize.sh does for compute-sanitizer's initcheck, only
  // the guards: that tool finds reads of memory that nobody has written, and poison counts as
  // written.
  void poison() const {
    if (std::getenv("OMNI_MOE_TEST_INITCHECK") == nullptr) {
      EXPECT_EQ(cudaSuccess, cudaMemset(base_, kPoison, begin_ + bytes_ + kGuard));
      return;
    }
    EXPECT_EQ(cudaSuccess, cudaMemset(base_, kPoison, begin_));
    EXPECT_EQ(cudaSuccess,
              cudaMemset(static_cast<unsigned char*>(data()) + bytes_, kPoison, kGuard));
  }

  void upload(const Bytes& host) const {
    ASSERT_EQ(bytes_, host.size());
    EXPECT_EQ(cudaSuccess, cudaMemcpy(data(), host.data(), bytes_, cudaMemcpyHostToDevice));
  }

  // The bytes between the guards; fails the test where a guard was written.
  Bytes read() const {
    Bytes all(begin_ + bytes_ + kGuard);
    EXPECT_EQ(cudaSuccess, cudaMemcpy(all.data(), base_, all.size(), cudaMemcpyDeviceToHost));
    const auto first = all.begin() + begin_, last = first + bytes_;
    const auto untouched = [](unsigned char byte) { return byte == kPoison; };
    EXPECT_TRUE(std::all_of(all.begin(), first, untouched)) << "written before the start";
    EXPECT_TRUE(std::all_of(last, all.end(), untouched)) << "written past the end";
    return {first, last};
  }

 private:
  static constexpr size_t kGuard = 2048;
  void* base_ = nullptr;
  size_t bytes_, begin_;
};

// Whose memory a Params struct points to: that of the kernel, or that of its fp64 oracle.
enum class Side { kDevice, kHost };

inline DType dtype_on(Side side, DType dtype) {
  return side == Side::kDevice ? dtype : DType::kFloat64;
}

// An operand of a kernel and of its oracle. `offset`: elements by which it misses its alignment on
// the device.
struct Operand {
  Operand(DType dtype, int64_t count, int64_t offset = 0)
      : dtype(dtype), values(count), device(count * size_of(dtype), offset * size_of(dtype)) {}

  // Rounds the values to the dtype, on both sides.
  void upload() {
    bytes = encode(dtype, values);
    values = decode(dtype, bytes);
    device.upload(bytes);
  }
  template <typename Generate>
  void fill(Generate&& generate) {
    for (double& value : values) value = generate();
    upload();
  }
  // The address of an element.
  void* at(Side side, int64_t element = 0) {
    if (side == Side::kHost) return values.data() + element;
    return static_cast<unsigned char*>(device.data()) + element * size_of(dtype);
  }
  Values read() const { return decode(dtype, device.read()); }

  DType dtype;
  Values values;  // of an input what was uploaded; of an output zeros, then the oracle's
  Bytes bytes;    // of an input what was uploaded
  DeviceArray device;
};

inline void fill_normal(Operand& operand, std::mt19937& random, double deviation = 1) {
  std::normal_distribution<float> normal(0.0f, static_cast<float>(deviation));
  operand.fill([&] { return normal(random); });
}

// ---- runs ----

// The oracles run on the calling thread.
inline const cpu::SerialExecutor kSerial{};

// Fails the test unless a launch and what it started succeed.
inline void expect_success(cudaError_t launched) {
  EXPECT_EQ(cudaSuccess, launched) << cudaGetErrorString(launched);
  const cudaError_t ran = cudaDeviceSynchronize();
  EXPECT_EQ(cudaSuccess, ran) << cudaGetErrorString(ran);
}

// Calls launch(workspace) twice, each time over poisoned outputs and workspace, and returns the
// outputs' bytes, which must be the same both times.
template <typename Launch>
std::vector<Bytes> run_twice(const std::vector<const DeviceArray*>& outputs, size_t workspace_bytes,
                             Launch&& launch) {
  const DeviceArray workspace(workspace_bytes);
  std::vector<Bytes> first;
  for (int run = 0; run < 2; ++run) {
    workspace.poison();
    for (const DeviceArray* output : outputs) output->poison();
    expect_success(launch(workspace_bytes > 0 ? workspace.data() : nullptr));
    workspace.read();  // its guards
    for (size_t i = 0; i < outputs.size(); ++i) {
      Bytes bytes = outputs[i]->read();
      if (run == 0) {
        first.push_back(std::move(bytes));
      } else {
        EXPECT_TRUE(bytes == first[i]) << "output " << i << " differs between runs";
      }
    }
  }
  return first;
}

// ---- comparison ----

// Of one rounding of a value to the dtype, absolute: its share of the value, and near zero half the
// distance of fp16's subnormals, or about where fp32's begin.
inline double rounding_error(DType dtype, double value) {
  return unit_roundoff(dtype) * std::abs(value) + (dtype == DType::kFloat16 ? 0x1p-25 : 1e-38);
}

// What an fp32 sum of this many terms loses, relative to the size of its terms.
inline double sum_error(int64_t terms) {
  return 0x1p-24 * (8 + std::sqrt(static_cast<double>(terms)));
}

// The same of a sum in the tensor cores, which truncate, and of an activation of it, relative to
// the root of the sum of the terms' squares.
inline double product_error(int64_t terms) {
  return 1e-6 * std::sqrt(static_cast<double>(terms)) + 4e-6;
}

// Whether the oracle may want a NaN, which then must be there.
enum class NaNs { kNone, kMatch };

inline bool is_close(double got, double want, double tolerance, NaNs nans) {
  if (std::isnan(want)) return nans == NaNs::kMatch && std::isnan(got);
  return got == want || (std::isfinite(want) && std::abs(got - want) <= tolerance);
}

// Each element of `got` must lie within tolerance(i) of `want`; names the first that do not.
template <typename Tolerance>
void expect_close(const std::string& what, std::span<const double> got,
                  std::span<const double> want, Tolerance&& tolerance, NaNs nans = NaNs::kNone) {
  ASSERT_EQ(want.size(), got.size()) << what;
  int failures = 0;
  for (size_t i = 0; i < want.size() && failures < 5; ++i) {
    if (is_close(got[i], want[i], tolerance(i), nans)) continue;
    ++failures;
    ADD_FAILURE() << what << "[" << i << "] is " << got[i] << " instead of " << want[i] << " +- "
                  << tolerance(i);
  }
}

// ---- oracles ----

// The activation and its derivative at each x, from the CPU backend in fp64.
struct Activated {
  Values value, slope;
};
inline Activated activate(Activation activation, std::span<const double> x) {
  const auto n = static_cast<int64_t>(x.size());
  const Values ones(x.size(), 1);
  Activated result{Values(x.size()), Values(x.size())};
  GatedActivationBackwardParams params{};
  params.grad_activated = params.up = ones.data();
  params.gate = x.data();
  params.grad_gate = result.slope.data();
  params.grad_up = result.value.data();
  params.num_tokens = 1;
  params.intermediate_size = n;
  params.gate_stride = params.up_stride = params.grad_gate_stride = params.grad_up_stride = n;
  params.dtype = DType::kFloat64;
  params.activation = activation;
  cpu::gated_activation_backward(params, kSerial);
  return result;
}

// [rows, cols] to [cols, rows]
inline Values transposed(const Values& matrix, int64_t rows, int64_t cols) {
  Values result(matrix.size());
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) result[col * rows + row] = matrix[row * cols + col];
  }
  return result;
}

// product[width] = row[depth] times matrix[depth, width]; squares[width], unless null: the sum of
// the squares of each element's terms. Neighbouring columns make the inner loop one of vectors.
inline void multiply_row(const double* row, const Values& matrix, int64_t depth, int64_t width,
                         double* product, double* squares = nullptr) {
  std::fill_n(product, width, 0.0);
  if (squares) std::fill_n(squares, width, 0.0);
  for (int64_t k = 0; k < depth; ++k) {
    const double value = row[k];
    const double* factors = matrix.data() + k * width;
    for (int64_t i = 0; i < width; ++i) product[i] += value * factors[i];
    if (!squares) continue;
    for (int64_t i = 0; i < width; ++i) squares[i] += (value * factors[i]) * (value * factors[i]);
  }
}

// As many rows as there is time for, where each costs so many multiply-adds: spread over all tiles
// and all places in them, with the first and the last.
inline std::vector<int64_t> sampled_rows(int64_t num_rows, double work_per_row) {
  constexpr double kMaxWork = 3e8;  // about a second
  const auto count = std::clamp<int64_t>(kMaxWork / work_per_row, 1, num_rows);
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < count; ++i) {
    rows.push_back(count == 1 ? num_rows - 1 : i * (num_rows - 1) / (count - 1));
  }
  return rows;
}

// ---- fixture ----

// Skips its tests where there is no device.
class CudaKernelTest : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
      (void)cudaGetLastError();
      GTEST_SKIP() << "needs a CUDA device, and there is none";
    }
  }
};

}  // namespace omni_moe
