// Cuts one workspace allocation into aligned pieces. With a null base it only adds up the size, so
// that the size function and the launcher share one description of the layout.
#pragma once

#include <cstddef>
#include <cstdint>

namespace omni_moe::cuda {

class WorkspaceCutter {
 public:
  static constexpr size_t kAlignment = 256;

  explicit WorkspaceCutter(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(size_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + size_);
    size_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }

  size_t size() const { return size_; }

 private:
  char* base_;
  size_t size_ = 0;
};

}  // namespace omni_moe::cuda
