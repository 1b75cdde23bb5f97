// The K best pairs of a token out of its two sorted tops, by one warp, for K <= kMaxWarpExperts.
//
// With 1-based ranks i and j, i * j - 1 pairs are at least as good as pair (i, j), so that the K
// largest sums lie within i * j <= K: about K ln K candidates. Two different logits can round to
// one sum, though, and then a pair beyond that border may equal the K-th sum and have the smaller
// id. The pairs just past the border tell whether that is so (router_ties.cuh).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/reduce.cuh"
#include "cuda/router/router_axis.cuh"
#include "cuda/router/router_keys.cuh"
#include "cuda/router/router_ties.cuh"
#include "cuda/router/router_tuning.h"

namespace omni_moe::cuda {

inline constexpr int kMaxWarpExperts = RouterWarpTuning::kMaxExperts;

// ---- Candidates ---------------------------------------------------------------------------------

// The rank pairs with i * j <= kMaxWarpExperts are in order of their products, so that those of
// a smaller K are a prefix.

constexpr int num_rank_pairs(int k) {
  int count = 0;
  for (int i = 1; i <= k; ++i) count += k / i;
  return count;
}

template <int k>
inline constexpr int kNumRankPairs = num_rank_pairs(k);

struct RankPairs {
  uint8_t x[kNumRankPairs<kMaxWarpExperts>];  // 0-based ranks
  uint8_t y[kNumRankPairs<kMaxWarpExperts>];
};

constexpr RankPairs make_rank_pairs() {
  RankPairs pairs{};
  int n = 0;
  for (int product = 1; product <= kMaxWarpExperts; ++product) {
    for (int i = 1; i <= product; ++i) {
      if (product % i != 0) continue;
      pairs.x[n] = static_cast<uint8_t>(i - 1);
      pairs.y[n] = static_cast<uint8_t>(product / i - 1);
      ++n;
    }
  }
  return pairs;
}

__device__ constexpr RankPairs kRankPairs = make_rank_pairs();

// ---- Selection ----------------------------------------------------------------------------------

// What the ranks alone say about the k-th sum.
template <int kCapacity>
struct Border {
  uint32_t lower_bound;                     // the k-th sum's key is at least this
  uint32_t outside[kCapacity / kWarpSize];  // keys one rank past the candidates of a row, or 0
};

template <int kCapacity>
__device__ __forceinline__ Border<kCapacity> warp_border(const TopOfAxis<kCapacity>& x, int num_x,
                                                         const TopOfAxis<kCapacity>& y, int num_y,
                                                         int k) {
  Border<kCapacity> border;
  uint32_t bound = 0;
#pragma unroll
  for (int i = 0; i < kCapacity / kWarpSize; ++i) {
    const int rank = i * kWarpSize + threadIdx.x % kWarpSize + 1;  // 1-based
    border.outside[i] = 0;
    if (rank > num_x) continue;
    const float value = x.value[rank - 1];
    // The 1-based rank of this row's last candidate. An approximate quotient will do: the half
    // keeps it far from the next integer.
    const int last = static_cast<int>(__fdividef(k + 0.5f, static_cast<float>(rank)));
    // The corner of any rectangle of k or more ranks is a lower bound of the k-th sum.
    const int corner = last * rank < k ? last + 1 : last;
    if (corner <= num_y) bound = max(bound, ordered_key(value + y.value[corner - 1]));
    if (last < num_y && rank <= k + 1) border.outside[i] = ordered_key(value + y.value[last]);
  }
  border.lower_bound = __reduce_max_sync(kFullWarp, bound);
  return border;
}

// entries[0 … k) = the chosen pairs, sorted.
template <int kCapacity, class T>
__device__ __forceinline__ void warp_choose(const Token<T>& token, int num_x, int num_y,
                                            int num_candidates, WarpStorage<kCapacity>& storage) {
  constexpr int kMaxK = kCapacity - 1 < kMaxWarpExperts ? kCapacity - 1 : kMaxWarpExperts;
  constexpr int kSlots = (kNumRankPairs<kMaxK> + kWarpSize - 1) / kWarpSize;
  const TopOfAxis<kCapacity>& x = storage.axis[0];
  const TopOfAxis<kCapacity>& y = storage.axis[1];
  const int lane = threadIdx.x % kWarpSize;

  // 1. Keys of the candidates.
  uint32_t keys[kSlots];
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    keys[slot] = 0;
    const int candidate = slot * kWarpSize + lane;
    if (slot * kWarpSize < num_candidates && candidate < num_candidates) {
      const int i = kRankPairs.x[candidate];
      const int j = kRankPairs.y[candidate];
      if (i < num_x && j < num_y) keys[slot] = ordered_key(x.value[i] + y.value[j]);
    }
  }

  // 2. Threshold.
  const Border<kCapacity> border = warp_border(x, num_x, y, num_y, token.k);
  const auto count = [&](uint32_t threshold) {
    int n = 0;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (slot * kWarpSize < num_candidates) n += keys[slot] >= threshold ? 1 : 0;
    }
    return __reduce_add_sync(kFullWarp, n);
  };
  int count_low = count(border.lower_bound);
  const uint32_t low = bisect_threshold(border.lower_bound, ordered_key(x.value[0] + y.value[0]),
                                        token.k, kCapacity, count_low, count);
  const bool overfull = count_low > kCapacity;  // more ties than fit: keep what is above them
  const uint32_t threshold = overfull ? low + 1 : low;

  // 3. Compact and sort.
  int filled = 0;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    if (slot * kWarpSize >= num_candidates) continue;
    const bool chosen = keys[slot] >= threshold;
    const unsigned mask = __ballot_sync(kFullWarp, chosen);
    if (chosen) {
      const int candidate = slot * kWarpSize + lane;
      const uint32_t row = x.position[kRankPairs.x[candidate]];
      const uint32_t col = y.position[kRankPairs.y[candidate]];
      storage.entries[filled + __popc(mask & ((1u << lane) - 1))] =
          make_entry(keys[slot], row * token.num_cols + col);
    }
    filled += __popc(mask);
  }
  warp_sort_entries<kCapacity>(storage.entries, filled);

  // 4. Ties with the k-th sum outside the candidates.
  const uint32_t kth_key = overfull ? low : key_of_entry(storage.entries[token.k - 1]);
  bool outside = overfull;
  int above = 0;
#pragma unroll
  for (int i = 0; i < kCapacity / kWarpSize; ++i) {
    outside |= border.outside[i] == kth_key;
    above += key_of_entry(storage.entries[i * kWarpSize + lane]) > kth_key ? 1 : 0;
  }
  if (__any_sync(kFullWarp, outside)) {
    above = __reduce_add_sync(kFullWarp, above);
    __syncwarp();  // all have read the entries that the ties overwrite
    if (!warp_fill_ties_from_tops(storage, token.num_rows, token.num_cols, num_x, num_y, kth_key,
                                  above)) {
      warp_fill_ties(token, kth_key, y.value[0], above, storage.entries);
    }
  }
}

}  // namespace omni_moe::cuda
