// Large fresh CPU tensors on huge pages.
#pragma once

#include <ATen/ATen.h>

namespace omni_moe::torch_api {

// at::empty_like(like), contiguous; on Linux CPUs a large result asks for transparent huge pages
// before it is first touched. A dense weight gradient is new memory every step, and the page faults
// of 4 KiB pages cost more than writing it: zeroing a fresh 64 MiB took 24.8 ms with 4 KiB pages
// and 7.6 ms with 2 MiB pages (2 cores, Linux 6).
at::Tensor empty_like_on_huge_pages(const at::Tensor& like);

}  // namespace omni_moe::torch_api
