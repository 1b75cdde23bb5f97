// What the tests of the CPU kernels share: storage of any dtype, tolerances, executors, and the
// fixture that runs a test for every set of kernels this processor can run. Outputs start as NaN
// and are followed by guard bytes, so that an element left out or written too far is seen.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <ostream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernel_testing.h"
#include "omni_moe/cpu.h"

namespace omni_moe::cpu {

inline void PrintTo(const KernelTable& table, std::ostream* out) { *out << table.capability; }

inline constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16,
                                    DType::kFloat64};

// ---- storage ------------------------------------------------------------------------------------

// n elements of a storage type, read and written as double; NaN at first.
class Buffer {
 public:
  Buffer(DType dtype, int64_t n)
      : dtype_(dtype), bytes_(n * size_of(dtype) + kGuardBytes, kGuard), size_(n) {
    std::fill(bytes_.begin(), bytes_.end() - kGuardBytes, 0xff);
  }

  void* data() { return bytes_.data(); }
  int64_t size() const { return size_; }

  double operator[](int64_t i) const {
    return load_element(dtype_, bytes_.data() + i * size_of(dtype_));
  }
  void set(int64_t i, double value) {
    store_element(dtype_, bytes_.data() + i * size_of(dtype_), value);
  }

  bool guard_is_whole() const {
    return std::all_of(bytes_.end() - kGuardBytes, bytes_.end(),
                       [](unsigned char byte) { return byte == kGuard; });
  }
  bool operator==(const Buffer& other) const { return bytes_ == other.bytes_; }

 private:
  static constexpr size_t kGuardBytes = 128;
  static constexpr unsigned char kGuard = 0x5a;

  DType dtype_;
  std::vector<unsigned char> bytes_;
  int64_t size_;
};

class Random {
 public:
  Buffer normal(DType dtype, int64_t n, double scale = 1) {
    Buffer buffer(dtype, n);
    std::normal_distribution<double> distribution(0, scale);
    for (int64_t i = 0; i < n; ++i) buffer.set(i, distribution(engine_));
    return buffer;
  }
  int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(engine_); }

 private:
  std::mt19937 engine_{42};
};

// Ids in either type.
struct Indices {
  std::vector<int32_t> narrow;
  std::vector<int64_t> wide;
  const void* data(IndexType type) const {
    return type == IndexType::kInt32 ? static_cast<const void*>(narrow.data()) : wide.data();
  }
  void push_back(int64_t id) {
    narrow.push_back(static_cast<int32_t>(id));
    wide.push_back(id);
  }
};

// ---- comparison ---------------------------------------------------------------------------------

// One rounding to the dtype on top of the accumulator's own error, which grows with the size of the
// terms and the root of their number.
inline double allowed_error(DType dtype, double want, double scale, int64_t num_terms) {
  const double accumulator =
      unit_roundoff(dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32);
  const double tiny = dtype == DType::kFloat16 ? 0x1p-25 : 0x1p-140;
  return unit_roundoff(dtype) * std::abs(want) + (8 + std::sqrt(num_terms)) * accumulator * scale +
         tiny;
}

inline void expect_close(DType dtype, const Buffer& got, const std::vector<double>& want,
                         int64_t num_terms, double terms = 0, double slack = 1) {
  ASSERT_EQ(got.size(), static_cast<int64_t>(want.size()));
  EXPECT_TRUE(got.guard_is_whole());
  double scale = terms;
  for (const double value : want) {
    if (std::isfinite(value)) scale = std::max(scale, std::abs(value));
  }
  for (int64_t i = 0; i < got.size(); ++i) {
    if (std::isnan(want[i])) {
      ASSERT_TRUE(std::isnan(got[i])) << "element " << i;
    } else if (std::isinf(want[i])) {
      ASSERT_EQ(got[i], want[i]) << "element " << i;
    } else {
      ASSERT_NEAR(got[i], want[i], slack * allowed_error(dtype, want[i], scale, num_terms))
          << "element " << i;
    }
  }
}

// ---- activations --------------------------------------------------------------------------------

inline long double activate(Activation activation, long double x) {
  const long double inner = sqrtl(2 / acosl(-1)) * (x + 0.044715L * x * x * x);
  switch (activation) {
    case Activation::kSilu:
      return x / (1 + expl(-x));
    case Activation::kGelu:
      return 0.5L * x * erfcl(-x / sqrtl(2));
    case Activation::kGeluTanh:
      return 0.5L * x * (1 + tanhl(inner));
    case Activation::kRelu:
      return std::max(x, 0.0L);
    case Activation::kIdentity:
      return x;
  }
  return kNaN;
}

// Central difference of fourth order, good to about 1e-15; relu by hand, for its kink.
inline double activate_grad(Activation activation, double x) {
  if (activation == Activation::kRelu) return x > 0;
  constexpr long double kStep = 2e-4L;
  const auto f = [&](long double offset) { return activate(activation, x + offset); };
  return (8 * (f(kStep) - f(-kStep)) - (f(2 * kStep) - f(-2 * kStep))) / (12 * kStep);
}

// Size of terms whose rounding in fp64 is as large as the error of activate_grad.
inline constexpr double kDifferenceTerms = 50;

// ---- executors ----------------------------------------------------------------------------------

// Cuts each range in three uneven parts, run by two threads; the kernels must not care. If the body
// throws on both threads, the caller gets the exception of its own.
class TwoThreadExecutor final : public Executor {
 public:
  void parallel_for(int64_t begin, int64_t end, int64_t /*grain*/,
                    const std::function<void(int64_t, int64_t)>& body) const override {
    const int64_t first = begin + (end - begin) / 3, second = begin + (end - begin) / 2;
    const auto run = [&](int64_t from, int64_t to) {
      if (from < to) body(from, to);
    };
    std::exception_ptr error;
    std::thread other([&] {
      try {
        run(second, end);
        run(begin, first);
      } catch (...) {
        error = std::current_exception();
      }
    });
    try {
      run(first, second);
    } catch (...) {
      other.join();
      throw;
    }
    other.join();
    if (error) std::rethrow_exception(error);
  }
};

class CpuKernels : public testing::TestWithParam<KernelTable> {
 protected:
  Random random_;
  const SerialExecutor serial_;
  const TwoThreadExecutor two_threads_;
};

inline std::string capability_of(const testing::TestParamInfo<KernelTable>& info) {
  return info.param.capability;
}

}  // namespace omni_moe::cpu
