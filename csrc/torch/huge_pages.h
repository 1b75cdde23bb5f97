// Large fresh CPU tensors on huge pages.
#pragma once

#include <ATen/ATen.h>

namespace omni_moe::torch_api {

// at::empty_like(like), contiguous; on Linux CPUs a large result lies in a mapping of its own that
// asks for transparent huge pages and goes back to the system with the tensor. A dense weight
// gradient of that size is new memory every step, and the page faults of 4 KiB pages cost more than
// writing it: a backward pass of few tokens with two gradients of 64 MiB took 76 ms with 4 KiB
// pages and 14 ms with 2 MiB pages (1 core, Linux 6).
at::Tensor empty_like_on_huge_pages(const at::Tensor& like);

}  // namespace omni_moe::torch_api
