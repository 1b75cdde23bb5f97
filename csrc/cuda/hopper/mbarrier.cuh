// Barriers in shared memory that count arrivals and bytes of asynchronous copies: a phase ends when
// the expected threads have arrived and the announced bytes have landed. sm_90 and later.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cuda/ptx>

namespace omni_moe::cuda {

namespace ptx = ::cuda::ptx;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  ptx::mbarrier_init(barrier, arrivals);
}

// Lets the copy engine and the other blocks of the cluster see the barriers that this thread has
// initialised; to be called after the last one.
__device__ __forceinline__ void mbarrier_init_fence() {
  ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  ptx::fence_proxy_async(ptx::space_shared);
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  ptx::mbarrier_arrive(barrier);
}

// Arrives once and announces `bytes` of copies that will complete on this barrier.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, barrier,
                                 bytes);
}

// Arrives at the barrier that lies at the same place in block `rank` of the cluster. With CUDA's
// __cluster_map_shared_rank and cuda::ptx the kernels grow by 24 to 32 instructions, since the
// address goes to the generic space and back.
__device__ __forceinline__ void mbarrier_arrive_remote(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Returns once the phase of this parity has ended; a fresh barrier is past the phase of parity 1.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// Returns once every thread of every block of the cluster has called it; each then sees what the
// others wrote before.
__device__ __forceinline__ void cluster_sync() {
  ptx::barrier_cluster_arrive(ptx::sem_release);
  ptx::barrier_cluster_wait(ptx::sem_acquire);
}

// The stage of a ring of kStages buffers and the parity of its current lap.
template <int kStages>
struct RingCursor {
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace omni_moe::cuda
