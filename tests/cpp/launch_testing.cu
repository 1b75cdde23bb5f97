// For tests in Python of what launches do, where every op can be met: kernels that let the next one
// start at once and then take their time (csrc/cuda/common/dependent_launch.cuh), and streams on
// which launches fail. A kernel that reads before it waits finds the old values behind a late one,
// and if it writes before, the last reader of that memory sees it. Functions return a cudaError_t.
#include <cuda_runtime.h>

#include <cstddef>

#include "cuda/common/dependent_launch.cuh"

namespace {

using omni_moe::cuda::let_next_kernel_start;
using omni_moe::cuda::wait_for_previous_kernel;

constexpr int kThreads = 256;
constexpr int kBlocks = 32;

struct Block {
  const unsigned char* data;
  size_t bytes;
};

__device__ unsigned long long nanoseconds() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__device__ void stay_for(unsigned microseconds) {
  const unsigned long long end = nanoseconds() + 1000ull * microseconds;
  while (nanoseconds() < end) __nanosleep(500);
}

__device__ void copy(unsigned char* to, const unsigned char* from, size_t bytes) {
  for (size_t i = blockIdx.x * kThreads + threadIdx.x; i < bytes; i += kBlocks * kThreads) {
    to[i] = from[i];
  }
}

__global__ void late_copy_kernel(unsigned char* to, const unsigned char* from, size_t bytes,
                                 unsigned microseconds) {
  let_next_kernel_start();
  stay_for(microseconds);
  copy(to, from, bytes);
}

__global__ void late_check_kernel(const Block* blocks, int num_blocks, unsigned char expected,
                                  unsigned microseconds, unsigned long long* num_changed) {
  let_next_kernel_start();
  stay_for(microseconds);
  for (int i = 0; i < num_blocks; ++i) {
    const Block block = blocks[i];
    for (size_t byte = blockIdx.x * kThreads + threadIdx.x; byte < block.bytes;
         byte += kBlocks * kThreads) {
      if (block.data[byte] != expected) atomicAdd(num_changed, 1ull);
    }
  }
}

__global__ void early_copy_kernel(unsigned char* to, const unsigned char* from, size_t bytes,
                                  bool waits) {
  if (waits) wait_for_previous_kernel();
  copy(to, from, bytes);
}

}  // namespace

extern "C" {

// Writes `to` only after the next kernel may have started.
int late_copy(void* to, const void* from, size_t bytes, unsigned microseconds, void* stream) {
  late_copy_kernel<<<kBlocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes,
      microseconds);
  return cudaGetLastError();
}

// Counts bytes that are not `expected` any more. blocks: (address, bytes) pairs on the device.
int late_check(const void* blocks, int num_blocks, unsigned char expected, unsigned microseconds,
               unsigned long long* num_changed, void* stream) {
  late_check_kernel<<<kBlocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const Block*>(blocks), num_blocks, expected, microseconds, num_changed);
  return cudaGetLastError();
}

// A kernel launched early that waits as it should, or does not: what the tests must find.
int early_copy(void* to, const void* from, size_t bytes, bool waits, void* stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kBlocks);
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, early_copy_kernel, static_cast<unsigned char*>(to),
                            static_cast<const unsigned char*>(from), bytes, waits);
}

// Until end_failing_launches(stream), every launch on it fails: it is being captured into a graph,
// and the capture is invalid.
int begin_failing_launches(void* stream) {
  const auto captured = static_cast<cudaStream_t>(stream);
  const cudaError_t status = cudaStreamBeginCapture(captured, cudaStreamCaptureModeRelaxed);
  (void)cudaStreamSynchronize(captured);  // not allowed, which ends the capture
  (void)cudaGetLastError();
  return status;
}

int end_failing_launches(void* stream) {
  cudaGraph_t graph = nullptr;
  const cudaError_t status = cudaStreamEndCapture(static_cast<cudaStream_t>(stream), &graph);
  (void)cudaGetLastError();
  return status == cudaErrorStreamCaptureInvalidated ? cudaSuccess : cudaErrorUnknown;
}

}  // extern "C"
