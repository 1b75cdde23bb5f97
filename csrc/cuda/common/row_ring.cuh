// A warp's stream of expert rows: PairCursor walks the (token, k) pairs of the warp's tokens and
// RowRing keeps the next kStages pairs of rows (up, down) in flight into shared memory. Rows start
// at multiples of 16 bytes and are a multiple of 16 bytes long.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../plan.h"
#include "index.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace omni_moe::cuda {

inline constexpr int kRingLoadBytes = 16;

// The expert ids of tokens first, first + stride, … < num_tokens, in order. Lanes hold a window of
// 32 ids, and the loads of the window after it are already under way.
class PairCursor {
 public:
  __device__ __forceinline__ PairCursor(const void* indices, IndexType index_type,
                                        uint32_t num_tokens, int num_experts_per_token,
                                        int64_t num_experts, uint32_t first, uint32_t stride,
                                        int lane)
      : indices_(indices),
        index_type_(index_type),
        num_tokens_(num_tokens),
        num_pairs_(num_experts_per_token),
        num_experts_(num_experts),
        token_(num_experts_per_token > 0 ? first : num_tokens),
        stride_(stride),
        lane_(lane) {
    next_window_ = load_window(token_, 0);
    open_window();
  }

  __device__ __forceinline__ bool done() const { return token_ >= num_tokens_; }

  // The id at the cursor; all lanes get it.
  __device__ __forceinline__ int32_t expert() const {
    return __shfl_sync(kFullWarp, window_, k_ % kWarpSize);
  }

  __device__ __forceinline__ void advance() {
    ++k_;
    if (k_ == num_pairs_) {
      k_ = 0;
      token_ += stride_;
      open_window();
    } else if (k_ % kWarpSize == 0) {
      open_window();
    }
  }

 private:
  // Id 0 stands for what lies past the end; it is never used.
  __device__ __forceinline__ int64_t load_window(uint32_t token, int k) const {
    const bool exists = token < num_tokens_ && lane_ < num_pairs_ - k;
    // 64-bit: T K may pass 2^31.
    const int64_t pair = static_cast<int64_t>(token) * num_pairs_ + k + lane_;
    return exists ? load_index(indices_, index_type_, pair) : 0;
  }

  // Moves into the window at (token_, k_) and starts loading the one after it.
  __device__ __forceinline__ void open_window() {
    if (token_ < num_tokens_) check_expert_id(next_window_, num_experts_);
    window_ = static_cast<int32_t>(next_window_);
    const bool same_token = kWarpSize < num_pairs_ - k_;
    next_window_ =
        same_token ? load_window(token_, k_ + kWarpSize) : load_window(token_ + stride_, 0);
  }

  const void* indices_;
  IndexType index_type_;
  uint32_t num_tokens_;
  int num_pairs_;
  int64_t num_experts_;
  uint32_t token_;  // T < 2^31 and the stride is small: no overflow past the end
  uint32_t stride_;
  int lane_;
  int k_ = 0;
  int32_t window_ = 0;
  int64_t next_window_ = 0;
};

// Shared memory of one warp's ring.
__host__ __device__ constexpr size_t ring_bytes(int stages, size_t row_bytes) {
  return stages * 2 * row_bytes;
}

template <RowCopy kCopy, int kStages>
class RowRing;

// Portable: each lane copies the 16-byte pieces it will itself read back, so that its own
// cp.async.wait_group is all the synchronisation needed.
template <int kStages>
class RowRing<RowCopy::kAsync, kStages> {
 public:
  __device__ __forceinline__ RowRing(char* stages, uint64_t* /*barriers*/, int row_bytes, int lane)
      : stages_(stages), row_bytes_(row_bytes), lane_(lane) {}

  // Starts the copy of a pair of rows into the stage released last.
  __device__ __forceinline__ void push(const void* up, const void* down) {
    char* stage = stages_ + head_ * 2 * row_bytes_;
    for (int byte = lane_ * kRingLoadBytes; byte < row_bytes_; byte += kWarpSize * kRingLoadBytes) {
      copy(stage + byte, static_cast<const char*>(up) + byte);
      copy(stage + row_bytes_ + byte, static_cast<const char*>(down) + byte);
    }
    push_nothing();
  }

  // Keeps the count of stages in flight when the stream has ended.
  __device__ __forceinline__ void push_nothing() {
    asm volatile("cp.async.commit_group;" ::: "memory");
    head_ = head_ + 1 == kStages ? 0 : head_ + 1;
  }

  // The oldest stage, once it has arrived: the up row, then the down row.
  __device__ __forceinline__ const char* wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
    return stages_ + tail_ * 2 * row_bytes_;
  }

  // Call when every read of the oldest stage is done.
  __device__ __forceinline__ void release() { tail_ = tail_ + 1 == kStages ? 0 : tail_ + 1; }

 private:
  static __device__ __forceinline__ void copy(char* to, const char* from) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  }

  char* stages_;
  int row_bytes_;
  int lane_;
  int head_ = 0;
  int tail_ = 0;
};

// Hopper: one instruction of one lane copies a row; an mbarrier per stage counts the bytes.
template <int kStages>
class RowRing<RowCopy::kBulk, kStages> {
 public:
  __device__ __forceinline__ RowRing(char* stages, uint64_t* barriers, int row_bytes, int lane)
      : stages_(static_cast<unsigned>(__cvta_generic_to_shared(stages))),
        stages_generic_(stages),
        barriers_(static_cast<unsigned>(__cvta_generic_to_shared(barriers))),
        row_bytes_(row_bytes),
        lane_(lane) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers_ + 8 * stage)
                     : "memory");
      }
      // The copy engine must see initialised barriers.
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
#endif
  }

  __device__ __forceinline__ void push(const void* up, const void* down) {
#if __CUDA_ARCH__ >= 900
    if (lane_ == 0) {
      const unsigned barrier = barriers_ + 8 * head_;
      const unsigned stage = stages_ + head_ * 2 * row_bytes_;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                   "r"(2 * row_bytes_)
                   : "memory");
      copy(stage, up, barrier);
      copy(stage + row_bytes_, down, barrier);
    }
#endif
    head_ = head_ + 1 == kStages ? 0 : head_ + 1;
  }

  __device__ __forceinline__ void push_nothing() {}

  __device__ __forceinline__ const char* wait() {
#if __CUDA_ARCH__ >= 900
    const unsigned barrier = barriers_ + 8 * tail_;
    unsigned arrived = 0;
    do {
      asm volatile(
          "{\n"
          ".reg .pred arrived;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 arrived, [%1], %2;\n"
          "selp.u32 %0, 1, 0, arrived;\n"
          "}\n"
          : "=r"(arrived)
          : "r"(barrier), "r"(parity_)
          : "memory");
    } while (arrived == 0);
#endif
    return stages_generic_ + tail_ * 2 * row_bytes_;
  }

  __device__ __forceinline__ void release() {
    __syncwarp();  // all lanes have read before lane 0 refills the stage
    if (++tail_ == kStages) {
      tail_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  __device__ __forceinline__ void copy(unsigned to, const void* from, unsigned barrier) const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to),
        "l"(from), "r"(row_bytes_), "r"(barrier)
        : "memory");
#endif
  }

  unsigned stages_;
  const char* stages_generic_;
  unsigned barriers_;
  int row_bytes_;
  int lane_;
  int head_ = 0;
  int tail_ = 0;
  unsigned parity_ = 0;
};

// A lane's pieces of one row: piece c is bytes (32 c + lane) * 16 …, zeros past the row's end.
template <class T, int kChunks>
struct LanePieces {
  static constexpr int kVec = kVecWidth<T>;
  Vec<T, kVec> piece[kChunks];

  template <class Load>
  __device__ __forceinline__ void load(const char* row, int row_bytes, int lane, Load&& load_one) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int byte = (c * kWarpSize + lane) * kRingLoadBytes;
      if (byte < row_bytes) {
        piece[c] = load_one(row + byte);
      } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) piece[c].data[i] = from_float<T>(0.0f);
      }
    }
  }

  __device__ __forceinline__ void load_global(const void* row, int row_bytes, int lane) {
    load(static_cast<const char*>(row), row_bytes, lane,
         [](const char* at) { return load_vec<Vec<T, kVec>>(reinterpret_cast<const T*>(at)); });
  }

  __device__ __forceinline__ void load_shared(const char* row, int row_bytes, int lane) {
    load(row, row_bytes, lane,
         [](const char* at) { return *reinterpret_cast<const Vec<T, kVec>*>(at); });
  }

  // In a loop: keeps the compiler from converting the row to fp32 once before it, which takes
  // twice the registers.
  __device__ __forceinline__ void keep_packed() {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      uint4& words = reinterpret_cast<uint4&>(piece[c]);
      asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
    }
  }

  // This lane's part of the dot product, in two chains.
  __device__ __forceinline__ float dot(const LanePieces& other) const {
    float even = 0.0f;
    float odd = 0.0f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float a[kVec];
      float b[kVec];
      unpack(piece[c], a);
      unpack(other.piece[c], b);
#pragma unroll
      for (int i = 0; i < kVec; i += 2) {
        even = fmaf(a[i], b[i], even);
        odd = fmaf(a[i + 1], b[i + 1], odd);
      }
    }
    return even + odd;
  }
};

// A lane's share of an fp32 row sum, laid out like LanePieces.
template <class T, int kChunks>
struct LaneSum {
  static constexpr int kVec = kVecWidth<T>;
  float sum[kChunks][kVec];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[c][i] = 0.0f;
    }
  }

  __device__ __forceinline__ void add(float coefficient, const LanePieces<T, kChunks>& row) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float values[kVec];
      unpack(row.piece[c], values);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[c][i] = fmaf(coefficient, values[i], sum[c][i]);
    }
  }

  __device__ __forceinline__ void store(void* row, int row_bytes, int lane) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int byte = (c * kWarpSize + lane) * kRingLoadBytes;
      if (byte < row_bytes) {
        Vec<T, kVec> packed;
        pack(sum[c], packed);
        store_vec(reinterpret_cast<T*>(static_cast<char*>(row) + byte), packed);
      }
    }
  }
};

}  // namespace omni_moe::cuda
