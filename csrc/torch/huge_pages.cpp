#include "huge_pages.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/TensorFactories.h>
#include <c10/core/CPUAllocator.h>

#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace omni_moe::torch_api {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// Smaller tensors are left to PyTorch's allocator. Up to this size glibc gives out again memory
// that has been touched before: two gradients of 16 MiB took 1.7 ms there and 3.5 ms in fresh
// mappings. From here on it maps and unmaps every block itself.
constexpr size_t kLeastBytes = size_t{32} << 20;

// A mapping of one tensor's own: the advice ends with it. Given on the allocator's memory it would
// stay there for whatever comes next, since Linux has no call that takes it back (MADV_NOHUGEPAGE
// is the opposite advice). The tensor begins on a huge page; what lies before it and behind it in
// the mapping is never touched, and so takes no memory.
class Mapping {
 public:
  explicit Mapping(size_t bytes)
      : size_(bytes + kHugePage),
        start_(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (!exists()) return;
    c10::profiledCPUMemoryReporter().New(data(), bytes);
    // Advice only: where it is refused, the pages stay small.
    madvise(data(), bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
  }
  ~Mapping() {
    if (!exists()) return;
    c10::profiledCPUMemoryReporter().Delete(data());
    munmap(start_, size_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  bool exists() const { return start_ != MAP_FAILED; }
  void* data() const {
    const auto address = reinterpret_cast<uintptr_t>(start_);
    return reinterpret_cast<void*>((address + kHugePage - 1) / kHugePage * kHugePage);
  }

 private:
  size_t size_;
  void* start_;
};

class HugePageAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes >= kLeastBytes) {
      auto mapping = std::make_unique<Mapping>(bytes);
      if (mapping->exists()) {
        void* data = mapping->data();
        return {data, mapping.release(), unmap, at::kCPU};
      }
    }
    return c10::GetCPUAllocator()->allocate(bytes);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void unmap(void* mapping) { delete static_cast<Mapping*>(mapping); }
};

}  // namespace

at::Tensor empty_like_on_huge_pages(const at::Tensor& like) {
  if (!like.is_cpu() || like.nbytes() < kLeastBytes) {
    return at::empty_like(like, like.options(), at::MemoryFormat::Contiguous);
  }
  static HugePageAllocator allocator;  // a storage that is resized asks it again
  at::Tensor tensor =
      at::detail::empty_generic(like.sizes(), &allocator, at::DispatchKeySet(at::DispatchKey::CPU),
                                like.scalar_type(), at::MemoryFormat::Contiguous);
  const auto& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    at::native::fill_empty_deterministic_(tensor);  // as at::empty does
  }
  return tensor;
}
#else
at::Tensor empty_like_on_huge_pages(const at::Tensor& like) {
  return at::empty_like(like, like.options(), at::MemoryFormat::Contiguous);
}
#endif

}  // namespace omni_moe::torch_api
