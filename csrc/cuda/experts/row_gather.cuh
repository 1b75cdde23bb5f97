// Gathered rows against a query (warp_dot_rows) and their weighted sum (ColumnSum): the two
// phases of a token pass that works for any H and any alignment. kVec is 16 bytes of elements, or
// 1 where rows are not aligned.
#pragma once

#include <cstdint>

#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"

namespace omni_moe::cuda {

// A lane's share of one tile of a row: chunk c holds elements tile + (32 c + lane) * kVec ….
template <class T, int kVec, int kChunks>
struct LaneRow {
  static constexpr int kTile = kWarpSize * kVec * kChunks;
  Vec<T, kVec> chunk[kChunks];

  // Elements past the row's end are zeros. H is a multiple of kVec.
  __device__ __forceinline__ void load(const T* row, int64_t tile, int64_t hidden_size, int lane) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int64_t column = tile + (c * kWarpSize + lane) * kVec;
      if (column < hidden_size) {
        chunk[c] = load_vec_readonly<Vec<T, kVec>>(row + column);
      } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) chunk[c].data[i] = from_float<T>(0.0f);
      }
    }
  }
};

// dots[r] = query · table[ids[r]], every lane gets the result. `cached` keeps the query in
// registers between calls while the row fits one tile; start with *cached_tile = -1.
template <class T, int kVec, int kChunks, int kRows>
__device__ __forceinline__ void warp_dot_rows(const T* query, const T* table,
                                              const int32_t (&ids)[kRows], int64_t hidden_size,
                                              int lane, LaneRow<T, kVec, kChunks>* cached,
                                              int64_t* cached_tile, float (&dots)[kRows]) {
  using Tile = LaneRow<T, kVec, kChunks>;
#pragma unroll
  for (int r = 0; r < kRows; ++r) dots[r] = 0.0f;
  for (int64_t tile = 0; tile < hidden_size; tile += Tile::kTile) {
    Tile rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      rows[r].load(table + ids[r] * hidden_size, tile, hidden_size, lane);
    }
    if (tile != *cached_tile) {
      cached->load(query, tile, hidden_size, lane);
      *cached_tile = tile;
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float v[kVec];
      unpack(cached->chunk[c], v);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float row[kVec];
        unpack(rows[r].chunk[c], row);
#pragma unroll
        for (int i = 0; i < kVec; ++i) dots[r] = fmaf(v[i], row[i], dots[r]);
      }
    }
  }
  warp_sum(dots);
}

// out[column] = Σ_j coefficients[j] * table[ids[j]][column], by one block of kThreads. A thread
// owns kVec columns; where the row needs fewer threads than the block has, the rest form further
// groups that share the pairs (group g takes j = g, g + groups, …) and meet in shared memory.
template <class T, int kVec, int kThreads, int kRows>
class ColumnSum {
 public:
  static constexpr int kScratchFloats = kThreads * kVec;

  __device__ __forceinline__ ColumnSum(const T* table, const int32_t* ids, int num_pairs,
                                       int64_t hidden_size)
      : table_(table), ids_(ids), num_pairs_(num_pairs), hidden_size_(hidden_size) {
    const int64_t vectors = (hidden_size + kVec - 1) / kVec;
    column_threads_ = vectors < kThreads ? static_cast<int>(vectors) : kThreads;
    num_groups_ = kThreads / column_threads_;
    group_ = static_cast<int>(threadIdx.x) / column_threads_;
    slot_ = static_cast<int>(threadIdx.x) % column_threads_;
  }

  // Starts the first loads; they may run while the coefficients are still being computed.
  __device__ __forceinline__ void prefetch() { load_rows(column(0), group_); }

  // After prefetch() and a barrier behind the coefficients. `scratch` holds kScratchFloats.
  // store(column, float (&)[kVec]) is called once per kVec columns.
  template <class Store>
  __device__ __forceinline__ void run(const float* coefficients, float* scratch, Store&& store) {
    const int64_t tile_columns = static_cast<int64_t>(column_threads_) * kVec;
    for (int64_t tile = 0; tile < hidden_size_; tile += tile_columns) {
      const int64_t my_column = column(tile);
      if (tile != 0) load_rows(my_column, group_);
      float sum[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] = 0.0f;
      for (int first = group_; first < num_pairs_; first += num_groups_ * kRows) {
        add_rows(coefficients, first, sum);
        load_rows(my_column, first + num_groups_ * kRows);
      }
      if (num_groups_ > 1) combine_groups(scratch, sum);
      if (group_ == 0 && my_column < hidden_size_) store(my_column, sum);
      if (num_groups_ > 1) __syncthreads();  // before the next tile's sums overwrite scratch
    }
  }

 private:
  __device__ __forceinline__ int64_t column(int64_t tile) const {
    return tile + static_cast<int64_t>(slot_) * kVec;
  }

  __device__ __forceinline__ void load_rows(int64_t my_column, int first) {
    if (group_ >= num_groups_ || my_column >= hidden_size_) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int j = first + r * num_groups_;
      if (j < num_pairs_) {
        rows_[r] = load_vec_readonly<Vec<T, kVec>>(table_ + ids_[j] * hidden_size_ + my_column);
      }
    }
  }

  __device__ __forceinline__ void add_rows(const float* coefficients, int first,
                                           float (&sum)[kVec]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int j = first + r * num_groups_;
      if (j < num_pairs_) {
        float row[kVec];
        unpack(rows_[r], row);
        const float coefficient = coefficients[j];
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[i] = fmaf(coefficient, row[i], sum[i]);
      }
    }
  }

  // Group 0 adds the other groups' sums in ascending order.
  __device__ __forceinline__ void combine_groups(float* scratch, float (&sum)[kVec]) const {
    const int stride = column_threads_ * kVec;
    if (group_ < num_groups_) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        scratch[group_ * stride + i * column_threads_ + slot_] = sum[i];  // no bank conflicts
      }
    }
    __syncthreads();
    if (group_ == 0) {
      for (int g = 1; g < num_groups_; ++g) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[i] += scratch[g * stride + i * column_threads_ + slot_];
      }
    }
  }

  const T* table_;
  const int32_t* ids_;
  int num_pairs_;
  int64_t hidden_size_;
  int column_threads_;
  int num_groups_;
  int group_;
  int slot_;
  Vec<T, kVec> rows_[kRows];
};

}  // namespace omni_moe::cuda
