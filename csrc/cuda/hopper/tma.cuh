// The tensor memory accelerator copies rectangular tiles of a row-major matrix between global and
// shared memory, each by one instruction of one thread. In shared memory a tile row is 128 bytes
// and the 16-byte piece p of row r lies at piece p ^ (r % 8) (swizzle128), so that eight rows of
// one column meet no bank twice. Reads past the matrix give zeros, writes past it are dropped.
// sm_90 and later.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "cuda/common/check.h"
#include "cuda/hopper/mbarrier.cuh"

namespace omni_moe::cuda {

inline constexpr int kSwizzleRowBytes = 128;
inline constexpr int kSwizzleAlignment = 1024;  // eight rows, the period of the pattern

// ---- Host: descriptors --------------------------------------------------------------------------

// The driver's encoder, or null if there is none. It is found at run time, because the library does
// not link libcuda.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  using Encoder = decltype(&cuTensorMapEncodeTiled);
  static std::atomic<Encoder> encoder{nullptr};
  if (const Encoder known = encoder.load(std::memory_order_relaxed)) return known;
  // A failure may pass, so that the driver is asked again after it.
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t status = clear_failure(cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  encoder.store(reinterpret_cast<Encoder>(function), std::memory_order_relaxed);
  return encoder.load(std::memory_order_relaxed);
}

// Describes a matrix [num_rows, num_cols] to TMA: dense, 16-byte aligned, with rows of a multiple
// of 16 bytes. A copy moves tile_rows rows of 128 bytes. The driver needs a current context, which
// a new thread (one of autograd's) has only after a call of the runtime such as
// cudaFuncSetAttribute.
template <class T>
cudaError_t encode_tensor_map(const void* matrix, int64_t num_rows, int64_t num_cols, int tile_rows,
                              CUtensorMap* map) {
  static_assert(sizeof(T) == 2, "other element types are not needed yet");
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(num_cols), static_cast<cuuint64_t>(num_rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(num_cols) * sizeof(T)};
  const cuuint32_t tile[] = {kSwizzleRowBytes / sizeof(T), static_cast<cuuint32_t>(tile_rows)};
  const cuuint32_t steps[] = {1, 1};
  constexpr auto kType = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                   : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(map, kType, 2, const_cast<void*>(matrix), sizes, row_bytes, tile, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Describes a grid [num_rows, num_cols] of dense vectors of `length` elements. A copy moves 128
// bytes of tile_rows by tile_cols neighbours, which follow each other row by row. What it asks else
// is as above.
template <class T>
cudaError_t encode_grid_map(const void* grid, int64_t num_rows, int64_t num_cols, int64_t length,
                            int tile_rows, int tile_cols, CUtensorMap* map) {
  static_assert(sizeof(T) == 2, "other element types are not needed yet");
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(length), static_cast<cuuint64_t>(num_cols),
                              static_cast<cuuint64_t>(num_rows)};
  const cuuint64_t strides[] = {sizes[0] * sizeof(T), sizes[0] * sizes[1] * sizeof(T)};
  const cuuint32_t tile[] = {kSwizzleRowBytes / sizeof(T), static_cast<cuuint32_t>(tile_cols),
                             static_cast<cuuint32_t>(tile_rows)};
  const cuuint32_t steps[] = {1, 1, 1};
  constexpr auto kType = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                   : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(map, kType, 3, const_cast<void*>(grid), sizes, strides, tile, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// ---- Device: copies -----------------------------------------------------------------------------

// Byte of 16-byte piece `piece` of row `row` in a tile aligned to kSwizzleAlignment.
__device__ __forceinline__ int swizzle128(int row, int piece) {
  return row * kSwizzleRowBytes + ((piece ^ (row & 7)) << 4);
}

// Loads the tile whose first element is (row, col); its bytes complete on `barrier`.
__device__ __forceinline__ void tma_load(const CUtensorMap& map, void* tile, uint64_t* barrier,
                                         int row, int col) {
  const int32_t at[] = {col, row};
  ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, tile, &map, at, barrier);
}

// The same into every block of the cluster whose bit of `blocks` is set, at the same place of its
// shared memory and on its own barrier.
__device__ __forceinline__ void tma_load_multicast(const CUtensorMap& map, void* tile,
                                                   uint64_t* barrier, int row, int col,
                                                   uint16_t blocks) {
  const int32_t at[] = {col, row};
  ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, tile, &map, at, barrier, blocks);
}

// The same of a grid: the tile's first vector is (row, col), of which it takes elements from
// `element` on.
__device__ __forceinline__ void tma_load_grid_multicast(const CUtensorMap& map, void* tile,
                                                        uint64_t* barrier, int row, int col,
                                                        int element, uint16_t blocks) {
  const int32_t at[] = {element, col, row};
  ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, tile, &map, at, barrier, blocks);
}

// The store belongs to the calling thread's current bulk group.
__device__ __forceinline__ void tma_store(const CUtensorMap& map, const void* tile, int row,
                                          int col) {
  const int32_t at[] = {col, row};
  ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &map, at, tile);
}

// The same into a grid; vectors and elements past its end are dropped.
__device__ __forceinline__ void tma_store_grid(const CUtensorMap& map, const void* tile, int row,
                                               int col, int element) {
  const int32_t at[] = {element, col, row};
  ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &map, at, tile);
}

// Adds to what the grid holds, rounding to its type. No order of several adds is kept.
__device__ __forceinline__ void tma_add_grid(const CUtensorMap& map, const void* tile, int row,
                                             int col, int element) {
  const int32_t at[] = {element, col, row};
  ptx::cp_reduce_async_bulk_tensor(ptx::space_global, ptx::space_shared, ptx::op_add, &map, at,
                                   tile);
}

// Brings what the grid holds there into L2. cuda::ptx has no prefetch of tensors.
__device__ __forceinline__ void tma_prefetch_grid(const CUtensorMap& map, int row, int col,
                                                  int element) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(&map),
               "r"(element), "r"(col), "r"(row)
               : "memory");
}

__device__ __forceinline__ void tma_store_commit() { ptx::cp_async_bulk_commit_group(); }

// Waits until all but the last kPending of the thread's bulk groups have read their shared memory.
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
  ptx::cp_async_bulk_wait_group_read(ptx::n32_t<kPending>{});
}

// Waits until all of the thread's stores are done.
__device__ __forceinline__ void tma_store_wait_all() {
  ptx::cp_async_bulk_wait_group(ptx::n32_t<0>{});
}

// Orders this thread's writes of shared memory before the copy engine's or tensor cores' reads of
// it.
__device__ __forceinline__ void fence_async_proxy() { ptx::fence_proxy_async(ptx::space_shared); }

}  // namespace omni_moe::cuda
