// The m largest of n keys in order, without the mispredicted branches of a comparison sort: a
// threshold that few more than m keys reach, a compaction of the keys that reach it, and a sort of
// those by rank (a radix sort where they are many). Keys are integers in the order of the values
// they stand for.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "vec.h"

namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY {

// ---- Keys ---------------------------------------------------------------------------------------

template <typename Acc>
using Key = std::conditional_t<std::is_same_v<Acc, double>, int64_t, int32_t>;
template <typename Acc>
using KeyVec = typename VectorOf<Key<Acc>, kVectorBytes>::type;

// Below the key of every value, -inf included; fills arrays of keys up to whole vectors.
template <typename Acc>
inline constexpr Key<Acc> kNoKey = std::numeric_limits<Key<Acc>>::min();

// Bits of a floating-point number <-> integer of the same order, for a scalar or a vector.
template <typename Acc, typename Keys>
inline Keys flip_negative(Keys bits) {
  constexpr auto kMagnitude = std::numeric_limits<Key<Acc>>::max();
  return bits ^ ((bits >> (8 * sizeof(Acc) - 1)) & kMagnitude);
}

// NaN above everything, all NaN equal; -0 equal to +0.
template <typename Acc, typename Keys = Key<Acc>, typename Values = Acc>
inline Keys to_key(Values value) {
  const auto key = flip_negative<Acc>(bit_cast<Keys>(value + Acc(0)));
  return value != value ? Keys{} + std::numeric_limits<Key<Acc>>::max() : key;
}
template <typename Acc, typename Values = Acc, typename Keys = Key<Acc>>
inline Values from_key(Keys key) {
  return bit_cast<Values>(flip_negative<Acc>(key));
}

template <typename Acc>
inline KeyVec<Acc> load_keys(const Key<Acc>* keys) {
  return load_bits<KeyVec<Acc>>(keys);
}

// ---- Selection ----------------------------------------------------------------------------------

// Keeps its working memory from call to call.
template <typename Acc>
class Selector {
 public:
  explicit Selector(int64_t most_keys)
      : maxima_(whole_vectors<Acc>(most_keys)),
        kept_keys_(most_keys + std::max<int64_t>(kAppendSlack, kRankedAtOnce)),
        kept_(most_keys + kAppendSlack),
        ranks_(kRankSortKeys + kRankedAtOnce),
        num_placed_(kRankSortKeys) {}

  // order[0, m) = the positions of the m largest, the largest first, equal ones by position; room
  // for n. 1 <= m <= n; keys[n, whole_vectors(n)) are kNoKey.
  void best(const Key<Acc>* keys, int64_t n, int64_t m, int32_t* order) {
    const int64_t most = most_to_sort(m);
    int64_t num_kept = keep(keys, n, n <= most ? kNoKey<Acc> + 1 : low_threshold(keys, n, m));
    if (num_kept > most) num_kept = keep_fewer(num_kept, m);
    num_kept <= kRankSortKeys ? sort_by_rank(num_kept, order) : sort_by_digits(num_kept, order);
  }

 private:
  // Ranks cost n² / lanes compares without a branch to mispredict; above, a radix sort. From 16 to
  // 32 vectors of keys: 6.0 µs -> 3.9 µs a token of the router (320 x 320, K128, AVX2).
  static constexpr int64_t kRankSortKeys = 32 * kLanes<Acc>;
  // Each key is loaded once for as many vectors as there are chains of additions to overlap.
  static constexpr int kRankedVectors = 4, kRankedAtOnce = kRankedVectors * kLanes<Acc>;

  // Sorting half as many more than m costs less than another round for a tighter threshold.
  static int64_t most_to_sort(int64_t m) { return m + m / 2 + 8; }

  // A threshold that at least m keys reach: the largest of each group of keys stands for the group,
  // and the m-th largest of those is near the m-th largest of all.
  Key<Acc> low_threshold(const Key<Acc>* keys, int64_t n, int64_t m) {
    constexpr int kWidth = kLanes<Acc>;
    const int64_t num_groups = whole_vectors<Acc>(m + m / 2), padded = whole_vectors<Acc>(n);
    if (2 * num_groups > padded) return threshold(keys, n, m, most_to_sort(m));
    for (int64_t group = 0; group < num_groups; group += kWidth) {
      auto largest = load_keys<Acc>(keys + group);
      for (int64_t i = group + num_groups; i < padded; i += num_groups) {
        const auto next = load_keys<Acc>(keys + i);
        largest = next > largest ? next : largest;
      }
      std::memcpy(maxima_.data() + group, &largest, sizeof(largest));
    }
    // m / 2 more keeps too many to sort, m / 8 takes another round: 0.88 µs, 0.82 µs at m / 4, 0.87
    // µs a token of the router (256 x 256, K32, AVX-512).
    return threshold(maxima_.data(), num_groups, m, m + m / 4);
  }

  // A key that at least m keys reach, and at most `most` unless the m-th largest is a tie. Each
  // round counts at kLanes probes between the bounds, one a lane.
  static Key<Acc> threshold(const Key<Acc>* keys, int64_t n, int64_t m, int64_t most) {
    auto [low, high] = smallest_and_largest(keys, n);
    int64_t count = n;  // keys >= low
    for (int round = 0; low < high && count > most; ++round) {
      const KeyVec<Acc> probes = probes_between(low, high, round);
      KeyVec<Acc> counts = {};
#pragma GCC unroll 4
      for (int64_t i = 0; i < n; ++i) {
        counts = count_greater(counts, KeyVec<Acc>{} + keys[i], probes - 1);
      }
      const int reached = __builtin_popcount(lane_bits(counts >= Key<Acc>(m)));
      if (reached < kLanes<Acc>) high = probes[reached] - 1;
      if (reached > 0) {
        low = probes[reached - 1];
        count = counts[reached - 1];
      }
    }
    return low;
  }

  static std::pair<Key<Acc>, Key<Acc>> smallest_and_largest(const Key<Acc>* keys, int64_t n) {
    KeyVec<Acc> lows = KeyVec<Acc>{} + std::numeric_limits<Key<Acc>>::max(), highs = {};
    highs += kNoKey<Acc>;
    for (int64_t i = 0; i < n; i += kLanes<Acc>) {
      const auto next = load_keys<Acc>(keys + i);
      lows = next < lows && next != kNoKey<Acc> ? next : lows;
      highs = next > highs ? next : highs;
    }
    Key<Acc> low = lows[0], high = highs[0];
    for (int lane = 1; lane < kLanes<Acc>; ++lane) {
      low = std::min<Key<Acc>>(low, lows[lane]);
      high = std::max<Key<Acc>>(high, highs[lane]);
    }
    return {low, high};
  }

  // Ascending keys in (low, high]: first evenly spaced in value, as logits are, then in bits, which
  // ends whatever the values.
  static KeyVec<Acc> probes_between(Key<Acc> low, Key<Acc> high, int round) {
    using Unsigned = std::make_unsigned_t<Key<Acc>>;
    constexpr int kValueRounds = 2, kWidth = kLanes<Acc>;
    KeyVec<Acc> probes;
    if (round < kValueRounds) {
      const Acc from = from_key<Acc>(low), step = (from_key<Acc>(high) - from) / kWidth;
      const auto lanes = __builtin_convertvector(lane_numbers<Key<Acc>>() + 1, Vec<Acc>);
      probes = to_key<Acc, KeyVec<Acc>>(from + step * lanes);
      probes = probes > low ? probes : KeyVec<Acc>{} + (low + 1);
      return probes < high ? probes : KeyVec<Acc>{} + high;
    }
    const Unsigned range = Unsigned(high) - Unsigned(low);
    const Unsigned step = std::max<Unsigned>(1, range / kWidth);
    for (int lane = 0; lane < kWidth; ++lane) {
      probes[lane] = Key<Acc>(Unsigned(low) + std::min<Unsigned>(range, step * (lane + 1)));
    }
    return probes;
  }

  // Keeps the keys that reach the threshold, in the order of their positions.
  int64_t keep(const Key<Acc>* keys, int64_t n, Key<Acc> threshold) {
    int64_t num_kept = 0;
    for (int64_t i = 0; i < n; i += kLanes<Acc>) {
      const KeyVec<Acc> candidates = load_keys<Acc>(keys + i);
      const auto reach = lane_bits(candidates >= threshold);
      append_lanes(kept_keys_.data() + num_kept, candidates, reach);
      append_lanes(kept_.data() + num_kept, lane_numbers<int32_t, kLanes<Acc>>() + int32_t(i),
                   reach);
      num_kept += __builtin_popcount(reach);
    }
    return num_kept;
  }

  // Where groups were a bad sample, or many keys are equal: of those at the threshold the first
  // suffice.
  int64_t keep_fewer(int64_t num_kept, int64_t m) {
    std::fill_n(kept_keys_.begin() + num_kept, whole_vectors<Acc>(num_kept) - num_kept,
                kNoKey<Acc>);
    const Key<Acc> low = threshold(kept_keys_.data(), num_kept, m, most_to_sort(m));
    int64_t above = 0, ties = 0;
    for (int64_t i = 0; i < num_kept; ++i) {
      above += kept_keys_[i] > low;
      ties += kept_keys_[i] == low;
    }
    if (above + ties > most_to_sort(m)) ties = m - above;
    int64_t filled = 0;
    for (int64_t i = 0; i < num_kept; ++i) {
      const Key<Acc> key = kept_keys_[i];
      kept_keys_[filled] = key;
      kept_[filled] = kept_[i];
      const int64_t tied = key == low;
      filled += int64_t{key > low} | (tied & int64_t{ties > 0});  // no branch to mispredict
      ties -= tied;
    }
    return filled;
  }

  // A key's place is the number of greater keys, plus that of the equal ones placed before it.
  void sort_by_rank(int64_t n, int32_t* order) {
    const Key<Acc>* keys = kept_keys_.data();
    for (int64_t i = 0; i < n; i += kRankedAtOnce) {
      KeyVec<Acc> own[kRankedVectors], ranks[kRankedVectors] = {};
      // Unrolled, or the arrays would live in memory.
#pragma GCC unroll 4
      for (int v = 0; v < kRankedVectors; ++v) own[v] = load_keys<Acc>(keys + i + v * kLanes<Acc>);
      for (int64_t j = 0; j < n; ++j) {
        const KeyVec<Acc> other = KeyVec<Acc>{} + keys[j];
#pragma GCC unroll 4
        for (int v = 0; v < kRankedVectors; ++v) {
          ranks[v] = count_greater(ranks[v], other, own[v]);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < kRankedVectors; ++v) {
        std::memcpy(ranks_.data() + i + v * kLanes<Acc>, &ranks[v], sizeof(ranks[v]));
      }
    }
    std::fill_n(num_placed_.begin(), n, 0);
    for (int64_t i = 0; i < n; ++i) {
      const Key<Acc> rank = ranks_[i];
      order[rank + num_placed_[rank]++] = kept_[i];
    }
  }

  // Radix sort, a byte a pass, the least significant first; each pass keeps the order of equal
  // ones.
  void sort_by_digits(int64_t n, int32_t* order) {
    sorted_keys_.resize(n);
    sorted_.resize(n);
    for (int shift = 0; shift < 8 * static_cast<int>(sizeof(Acc)); shift += 8) {
      // The largest first: all bits complemented but the sign, which is the other way round.
      const auto digit = [&](Key<Acc> key) { return uint8_t((kNoKey<Acc> ^ ~key) >> shift); };
      int32_t ends[257] = {};
      for (int64_t i = 0; i < n; ++i) ++ends[digit(kept_keys_[i]) + 1];
      for (int value = 0; value < 256; ++value) ends[value + 1] += ends[value];
      for (int64_t i = 0; i < n; ++i) {
        const int32_t place = ends[digit(kept_keys_[i])]++;
        sorted_keys_[place] = kept_keys_[i];
        sorted_[place] = kept_[i];
      }
      std::copy_n(sorted_keys_.begin(), n, kept_keys_.begin());
      std::copy_n(sorted_.begin(), n, kept_.begin());
    }
    std::copy_n(kept_.begin(), n, order);
  }

  std::vector<Key<Acc>> maxima_, kept_keys_, sorted_keys_;
  std::vector<int32_t> kept_, sorted_;  // positions of kept_keys_, of sorted_keys_
  std::vector<Key<Acc>> ranks_;         // sort_by_rank: of kept_keys_
  std::vector<int16_t> num_placed_;     // sort_by_rank: at each rank
};

}  // namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY
