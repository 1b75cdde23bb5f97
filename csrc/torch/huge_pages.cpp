#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace omni_moe::torch_api {

at::Tensor empty_like_on_huge_pages(const at::Tensor& like) {
  at::Tensor tensor = at::empty_like(like, like.options(), at::MemoryFormat::Contiguous);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (tensor.is_cpu()) {
    const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    const uintptr_t begin = (address + kPage - 1) / kPage * kPage;
    const uintptr_t end = (address + tensor.nbytes()) / kPage * kPage;
    // Advice only: where it is refused, the pages stay small.
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return tensor;
}

}  // namespace omni_moe::torch_api
