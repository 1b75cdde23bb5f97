// Rows are cut into 16-byte pieces, and a lane holds the same columns of every row it meets. Each
// lane then has a share of every row's dot product, and one butterfly (warp_transpose_sum) sums the
// shares and spreads the results. Registers hold little but rows in flight. Rows start at multiples
// of 16 bytes and are a multiple of 16 bytes long.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/expert_id.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"

namespace omni_moe::cuda {

inline constexpr int kPieceBytes = 16;

// 16 bytes of a row as they lie in memory. The type has words, because the compiler would carry
// elements through loops one by one.
using RowPiece = uint4;

// A lane's columns in fp32.
template <class T>
using PieceValues = float[kVecWidth<T>];

// `base` points at the lane's columns of row 0. Gathered rows find nothing in L1.
__device__ __forceinline__ RowPiece load_piece(const char* base, int32_t row, int row_bytes) {
  // The offset has 64 bits, because E H passes 2^31 at a million rows.
  return load_vec_streaming<RowPiece>(base + static_cast<int64_t>(row) * row_bytes);
}

template <class T>
__device__ __forceinline__ void unpack_piece(const RowPiece& piece, PieceValues<T>& values) {
  unpack(reinterpret_cast<const Vec<T, kVecWidth<T>>&>(piece), values);
}

template <class T>
__device__ __forceinline__ RowPiece pack_piece(const PieceValues<T>& values) {
  RowPiece piece;
  pack(values, reinterpret_cast<Vec<T, kVecWidth<T>>&>(piece));
  return piece;
}

template <class T>
__device__ __forceinline__ float dot_piece(const PieceValues<T>& query, const RowPiece& piece) {
  float values[kVecWidth<T>];
  unpack_piece<T>(piece, values);
  float even = 0.0f;
  float odd = 0.0f;
#pragma unroll
  for (int i = 0; i < kVecWidth<T>; i += 2) {
    even = fmaf(query[i], values[i], even);
    odd = fmaf(query[i + 1], values[i + 1], odd);
  }
  return even + odd;
}

template <class T>
__device__ __forceinline__ void add_piece(float coefficient, const RowPiece& piece,
                                          PieceValues<T>& sum) {
  float values[kVecWidth<T>];
  unpack_piece<T>(piece, values);
#pragma unroll
  for (int i = 0; i < kVecWidth<T>; ++i) sum[i] = fmaf(coefficient, values[i], sum[i]);
}

// Keeps the compiler from holding a piece that is used twice as fp32, in twice the registers.
__device__ __forceinline__ void keep_packed(RowPiece& piece) {
  asm volatile("" : "+r"(piece.x), "+r"(piece.y), "+r"(piece.z), "+r"(piece.w));
}

// One step of warp_transpose_sum: lanes keep one half of 2 kHalf values and give the other away.
template <int kHalf, int kCount>
__device__ __forceinline__ void warp_exchange_halves(float (&values)[kCount], int lane) {
  if constexpr (kHalf > 0) {
    const bool upper = (lane & kHalf) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float keep = upper ? values[i + kHalf] : values[i];
      const float give = upper ? values[i] : values[i + kHalf];
      values[i] = keep + __shfl_xor_sync(kFullWarp, give, kHalf);
    }
    warp_exchange_halves<kHalf / 2>(values, lane);
  }
}

// Lane l gets Σ values[l % kCount] over kLanes neighbouring lanes (kCount <= kLanes, powers of
// two); those of them that get the same sum get the same bits. This takes kCount - 1 + log2(kLanes
// / kCount) shuffles, where a butterfly per value would take kCount log2(kLanes).
template <int kLanes, int kCount>
__device__ __forceinline__ float warp_transpose_sum(float (&values)[kCount], int lane) {
  static_assert(kCount <= kLanes && kLanes <= kWarpSize);
  warp_exchange_halves<kCount / 2>(values, lane);
  float sum = values[0];
#pragma unroll
  for (int offset = kCount; offset < kLanes; offset *= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, offset);
  }
  return sum;
}

// The expert ids of one token, 32 to a window, one per lane. Past the token's last pair comes its
// last id again, so that loads need no guard, which would cost registers and, worse, copies that
// wait for the load.
class IdWindow {
 public:
  __device__ __forceinline__ IdWindow(const void* indices, IndexType index_type, int64_t first_pair,
                                      int num_pairs, int64_t num_experts, int lane)
      : indices_(indices),
        index_type_(index_type),
        first_pair_(first_pair),
        num_pairs_(num_pairs),
        num_experts_(num_experts),
        lane_(lane) {}

  // Call at every multiple of 32 pairs.
  __device__ __forceinline__ void open(int k) {
    const int pair = min(k + lane_, num_pairs_ - 1);
    const int64_t id = load_index(indices_, index_type_, first_pair_ + pair);
    const bool is_valid = static_cast<uint64_t>(id) < static_cast<uint64_t>(num_experts_);
    all_valid_ = all_valid_ && is_valid;
    ids_ = is_valid ? static_cast<int32_t>(id) : 0;
  }

  // Call when all shuffles are done. After a check that may leave the kernel the compiler can no
  // longer prove that the warp is together, and gives every later shuffle a slow path.
  __device__ __forceinline__ void check() const {
    check_expert_id(all_valid_ ? 0 : -1, num_experts_);
  }

  // Id of pair k of the window.
  __device__ __forceinline__ int32_t operator[](int k) const {
    return __shfl_sync(kFullWarp, ids_, k);
  }

 private:
  const void* indices_;
  IndexType index_type_;
  int64_t first_pair_;
  int num_pairs_;
  int64_t num_experts_;
  int lane_;
  int32_t ids_ = 0;
  bool all_valid_ = true;
};

}  // namespace omni_moe::cuda
