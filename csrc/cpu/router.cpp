// Cartesian-product router on the CPU.
//
// The K best of the R × C sums x[row] + y[col], without forming the grid: sort the best K of each
// axis, then merge. The sums x[i] + y[0], x[i] + y[1], … of each sorted row i descend, so a heap
// with one head per opened row gives them in order; row i + 1 opens when row i's first sum is
// taken. O(R + C + K log K) a token. fp addition is monotone, so the K largest values are found
// exactly; only among sums equal to the K-th may a pair outside the merge have the smaller id (two
// different logits can round to one sum), and those ties are settled by a scan of the rows that
// hold them.
#include <algorithm>
#include <limits>
#include <vector>

#include "activation.h"
#include "omni_moe/cpu.h"

namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY {

namespace {

// ---- sort keys: unsigned integers in the order of the values ----

template <typename Acc>
using Key = std::conditional_t<std::is_same_v<Acc, double>, uint64_t, uint32_t>;
template <typename Acc>
using KeyAndId = std::conditional_t<std::is_same_v<Acc, double>, unsigned __int128, uint64_t>;

template <typename Acc>
using KeyVec = typename VectorOf<Key<Acc>, kVectorBytes>::type;

// NaN above everything, all NaN equal; -0 equal to +0. For a value or a vector of them.
template <typename Acc, typename Keys = Key<Acc>, typename Values = Acc>
inline Keys to_key(Values value) {
  constexpr auto kSign = Key<Acc>(1) << (8 * sizeof(Acc) - 1);
  const auto bits = bit_cast<Keys>(value + Acc(0));
  const Keys ordered = bits & kSign ? ~bits : bits | kSign;
  return value != value ? ~Keys{} : ordered;
}
template <typename Acc>
inline Acc from_key(Key<Acc> key) {
  constexpr auto kSign = Key<Acc>(1) << (8 * sizeof(Acc) - 1);
  if (key == std::numeric_limits<Key<Acc>>::max()) return std::numeric_limits<Acc>::quiet_NaN();
  return bit_cast<Acc>(key & kSign ? key ^ kSign : ~key);
}

// Larger is better: by key, then by the smaller id.
template <typename Acc>
inline KeyAndId<Acc> pack(Key<Acc> key, int32_t id) {
  return (KeyAndId<Acc>(key) << 32) | (0xffffffffu - static_cast<uint32_t>(id));
}
template <typename Acc>
inline Key<Acc> key_of(KeyAndId<Acc> packed) {
  return static_cast<Key<Acc>>(packed >> 32);
}
template <typename Acc>
inline int32_t id_of(KeyAndId<Acc> packed) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(packed));
}

// Sorts distinct items. Up to kRankSortItems by rank: an item's place is the number of greater
// ones, n² vector compares without a branch. std::sort mispredicts half of its n log n branches.
constexpr int64_t kRankSortItems = 96;

template <typename Acc>
void sort_descending(KeyAndId<Acc>* items, int64_t n) {
  if (n > kRankSortItems) {
    std::sort(items, items + n, [](const auto& a, const auto& b) { return a > b; });
    return;
  }
  KeyAndId<Acc> unsorted[kRankSortItems];
  std::copy_n(items, n, unsorted);
  for (int64_t i = 0; i < n; ++i) {
    int64_t rank = 0;
    for (int64_t j = 0; j < n; ++j) rank += unsorted[j] > unsorted[i];
    items[rank] = unsorted[i];
  }
}

// ---- one axis ----

template <typename Acc>
struct Axis {
  std::vector<Acc> logits;            // [n] in the given order
  std::vector<Key<Acc>> keys;         // [n]
  std::vector<KeyAndId<Acc>> packed;  // the best m and some more, sorted; one place to spare
  std::vector<Acc> best;              // [m] their values
  std::vector<int32_t> ids;           // [m] their positions
  Acc smallest;

  explicit Axis(int64_t n, int64_t m)
      : logits(n), keys(n), packed(m + m / 2 + 1), best(m), ids(m) {}
};

template <typename Acc>
int64_t count_at_least(const std::vector<Key<Acc>>& keys, Key<Acc> threshold) {
  int32_t count = 0;
  for (const auto key : keys) count += key >= threshold;
  return count;
}

// Fills axis.keys and returns the smallest and the largest.
template <typename Acc>
std::pair<Key<Acc>, Key<Acc>> make_keys(Axis<Acc>& axis) {
  const int64_t n = axis.logits.size();
  KeyVec<Acc> lows = ~KeyVec<Acc>{}, highs = {};
  int64_t i = 0;
  for (; i + kLanes<Acc> <= n; i += kLanes<Acc>) {
    const auto keys = to_key<Acc, KeyVec<Acc>>(load(axis.logits.data() + i));
    std::memcpy(axis.keys.data() + i, &keys, sizeof(keys));
    lows = keys < lows ? keys : lows;
    highs = keys > highs ? keys : highs;
  }
  Key<Acc> low = ~Key<Acc>(0), high = 0;
  for (int lane = 0; lane < kLanes<Acc>; ++lane) {
    low = std::min<Key<Acc>>(low, lows[lane]);
    high = std::max<Key<Acc>>(high, highs[lane]);
  }
  for (; i < n; ++i) {
    axis.keys[i] = to_key<Acc>(axis.logits[i]);
    low = std::min(low, axis.keys[i]);
    high = std::max(high, axis.keys[i]);
  }
  return {low, high};
}

// A value between two keys to bisect at: half way in value while that narrows the range (logits are
// spread evenly in value, not in bits), half way in bits otherwise.
template <typename Acc>
Key<Acc> bisect_at(Key<Acc> low, Key<Acc> high, int step) {
  constexpr int kValueSteps = 12;
  if (step < kValueSteps) {
    const Acc middle = from_key<Acc>(low) / 2 + from_key<Acc>(high) / 2;
    const Key<Acc> key = to_key<Acc>(middle);
    if (key > low && key <= high) return key;
  }
  return low + (high - low) / 2 + 1;
}

// Sorts the best m of the axis: bisect for a threshold that m to m + slack keys reach (each probe
// is one vectorised count, cheaper than a selection with its mispredicted branches), sort those.
template <typename T>
void sort_best(const T* source, Axis<acc_t<T>>& axis) {
  using Acc = acc_t<T>;
  const int64_t n = axis.logits.size(), m = axis.best.size();
  widen(source, axis.logits.data(), n);
  auto [low, high] = make_keys(axis);
  axis.smallest = from_key<Acc>(low);
  const int64_t slack = m / 2;
  int64_t count = n;  // keys >= low, at least m of them
  for (int step = 0; low < high && count > m + slack; ++step) {
    const Key<Acc> middle = bisect_at<Acc>(low, high, step);
    const int64_t above = count_at_least<Acc>(axis.keys, middle);
    if (above >= m) {
      low = middle;
      count = above;
    } else {
      high = middle - 1;
    }
  }

  // Many equal keys can leave more than the slack: of those at the threshold, the first suffice.
  const int64_t above = low == ~Key<Acc>(0) ? 0 : count_at_least<Acc>(axis.keys, low + 1);
  int64_t ties = count <= m + slack ? n : m - above;
  int64_t filled = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Key<Acc> key = axis.keys[i];
    axis.packed[filled] = pack<Acc>(key, static_cast<int32_t>(i));
    const int64_t tied = key == low;
    filled += int64_t{key > low} | (tied & int64_t{ties > 0});  // no branch to mispredict
    ties -= tied;
  }
  sort_descending<Acc>(axis.packed.data(), filled);
  for (int64_t i = 0; i < m; ++i) {
    axis.best[i] = from_key<Acc>(key_of<Acc>(axis.packed[i]));
    axis.ids[i] = id_of<Acc>(axis.packed[i]);
  }
}

// log Σ exp(logits - largest), NaN where log_softmax is NaN: a NaN or +inf logit, or all logits
// -inf.
template <typename Acc>
Acc log_relative_sum(const std::vector<Acc>& logits, Acc largest) {
  if (!(std::abs(largest) <= std::numeric_limits<Acc>::max())) {
    return std::numeric_limits<Acc>::quiet_NaN();
  }
  const int64_t n = logits.size();
  Vec<Acc> sum = {};
  int64_t i = 0;
  for (; i + kLanes<Acc> <= n; i += kLanes<Acc>) sum += exp_of(load(logits.data() + i) - largest);
  Acc total = sum_of_lanes<Acc>(sum);
  for (; i < n; ++i) total += std::exp(logits[i] - largest);
  return std::log(total);
}

// ---- one token ----

// The head of sorted row `row`: its sum with sorted column `col`.
template <typename Acc>
struct Head {
  KeyAndId<Acc> packed;
  int32_t row, col;
};

template <typename Acc>
class TokenRouter {
 public:
  TokenRouter(int64_t num_rows, int64_t num_cols, int64_t k)
      : x(num_rows, std::min(k, num_rows)), y(num_cols, std::min(k, num_cols)), chosen(k) {
    heap_.reserve(x.best.size());
  }

  Axis<Acc> x, y;
  std::vector<KeyAndId<Acc>> chosen;  // [K] sums and ids, best first

  // Fills `chosen` from the sorted axes.
  void choose() {
    if (sums_to_nan_by_infinities()) return choose_from_grid();
    merge();
    settle_ties();
  }

 private:
  KeyAndId<Acc> sum_at(int32_t row, int32_t col) const {
    const auto id = static_cast<int32_t>(x.ids[row] * num_cols() + y.ids[col]);
    return pack<Acc>(to_key<Acc>(x.best[row] + y.best[col]), id);
  }
  int64_t num_cols() const { return y.logits.size(); }

  // inf - inf is NaN, which sorts first though its terms do not: the one case in which sums do not
  // descend along a sorted axis.
  bool sums_to_nan_by_infinities() const {
    constexpr Acc kInf = std::numeric_limits<Acc>::infinity();
    const auto has_positive = [&](const Axis<Acc>& axis) {
      return std::find(axis.logits.begin(), axis.logits.end(), kInf) != axis.logits.end();
    };
    return (x.smallest == -kInf && has_positive(y)) || (y.smallest == -kInf && has_positive(x));
  }

  void choose_from_grid() {
    std::vector<KeyAndId<Acc>> grid;
    grid.reserve(x.logits.size() * y.logits.size());
    for (const Acc row : x.logits) {
      for (const Acc col : y.logits) {
        grid.push_back(pack<Acc>(to_key<Acc>(row + col), static_cast<int32_t>(grid.size())));
      }
    }
    std::partial_sort_copy(grid.begin(), grid.end(), chosen.begin(), chosen.end(),
                           [](const auto& a, const auto& b) { return a > b; });
  }

  // The first sum of each opened row waits in `heap_`, a binary max-heap; taking it moves the row
  // on.
  void merge() {
    heap_.clear();
    heap_.push_back({sum_at(0, 0), 0, 0});
    for (auto& taken : chosen) {
      const Head<Acc> head = heap_.front();
      taken = head.packed;
      if (head.col + 1 < static_cast<int32_t>(y.best.size())) {
        heap_.front() = {sum_at(head.row, head.col + 1), head.row, head.col + 1};
      } else {
        heap_.front() = heap_.back();
        heap_.pop_back();
      }
      sift_down();
      if (head.col == 0 && head.row + 1 < static_cast<int32_t>(x.best.size())) {
        heap_.push_back({sum_at(head.row + 1, 0), head.row + 1, 0});
        std::push_heap(heap_.begin(), heap_.end(), worse_);
      }
    }
  }

  void sift_down() {
    if (heap_.empty()) return;
    const Head<Acc> moved = heap_.front();
    const size_t size = heap_.size();
    size_t hole = 0;
    for (size_t child = 1; child < size; child = 2 * hole + 1) {
      if (child + 1 < size && heap_[child].packed < heap_[child + 1].packed) ++child;
      if (heap_[child].packed <= moved.packed) break;
      heap_[hole] = heap_[child];
      hole = child;
    }
    heap_[hole] = moved;
  }

  // Sums equal in key left the heap in an order of the logits; put them in the order of their ids.
  void settle_ties() {
    const Key<Acc> last = key_of<Acc>(chosen.back());
    auto begin = chosen.begin();
    while (begin != chosen.end()) {
      const Key<Acc> key = key_of<Acc>(*begin);
      auto end = begin + 1;
      while (end != chosen.end() && key_of<Acc>(*end) == key) ++end;
      if (key == last && tie_outside(last)) {
        take_smallest_ids(last, begin);
      } else if (end - begin > 1) {
        sort_descending<Acc>(&*begin, end - begin);
      }
      begin = end;
    }
  }

  // Whether a pair that was not taken has the K-th sum too. Every such pair is in a row whose head
  // is in the heap, or beyond the K best of an axis.
  bool tie_outside(Key<Acc> last) const {
    if (!heap_.empty() && key_of<Acc>(heap_.front().packed) == last) return true;
    const auto k = static_cast<int64_t>(chosen.size());
    const bool cut_x = k < static_cast<int64_t>(x.logits.size());
    const bool cut_y = k < num_cols();
    return (cut_x && to_key<Acc>(x.best.back() + y.best.front()) == last) ||
           (cut_y && to_key<Acc>(x.best.front() + y.best.back()) == last);
  }

  // [begin, chosen.end()) = the smallest ids of the whole grid whose sum has this key.
  void take_smallest_ids(Key<Acc> key, typename std::vector<KeyAndId<Acc>>::iterator begin) {
    for (size_t row = 0; begin != chosen.end(); ++row) {
      const Acc value = x.logits[row];
      if (to_key<Acc>(value + y.best.front()) < key) continue;
      for (int64_t col = 0; col < num_cols() && begin != chosen.end(); ++col) {
        if (to_key<Acc>(value + y.logits[col]) == key) {
          *begin++ = pack<Acc>(key, static_cast<int32_t>(row * num_cols() + col));
        }
      }
    }
  }

  static constexpr auto worse_ = [](const Head<Acc>& a, const Head<Acc>& b) {
    return a.packed < b.packed;
  };
  std::vector<Head<Acc>> heap_;
};

// log_total is Σ over both axes of log Σ exp(logit - largest); only kSoftmax uses it.
template <typename Acc, typename T>
void write_token(const RouterForwardParams& p, const TokenRouter<Acc>& router, Acc log_total,
                 T* weights, int32_t* indices) {
  const int64_t k = p.num_experts_per_token;
  // A chosen sum less the largest, axis by axis: the difference of two large sums has lost digits
  // that log_softmax keeps.
  const auto relative_sum = [&](int32_t id) {
    return (router.x.logits[id / p.num_cols] - router.x.best.front()) +
           (router.y.logits[id % p.num_cols] - router.y.best.front());
  };
  Acc total = 0;
  if (p.score == RouterScore::kSoftmaxTopK) {
    for (const auto packed : router.chosen) total += std::exp(relative_sum(id_of<Acc>(packed)));
  }
  for (int64_t i = 0; i < k; ++i) {
    const int32_t id = id_of<Acc>(router.chosen[i]);
    Acc weight = from_key<Acc>(key_of<Acc>(router.chosen[i]));
    if (p.score == RouterScore::kSoftmax) {
      weight = std::exp(relative_sum(id) - log_total);
    } else if (p.score == RouterScore::kSoftmaxTopK) {
      weight = std::exp(relative_sum(id)) / total;
    }
    store_scalar(weights + i, weight);
    indices[i] = id;
  }
}

template <typename T>
void router_forward_tokens(const RouterForwardParams& p, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t k = p.num_experts_per_token;
  TokenRouter<Acc> router(p.num_rows, p.num_cols, k);
  for (int64_t t = begin; t < end; ++t) {
    T* weights = static_cast<T*>(p.weights) + t * k;
    int32_t* indices = p.indices + t * k;
    sort_best(static_cast<const T*>(p.logits_x) + t * p.num_rows, router.x);
    sort_best(static_cast<const T*>(p.logits_y) + t * p.num_cols, router.y);
    Acc log_total = 0;
    if (p.score != RouterScore::kLogit) {
      log_total = log_relative_sum(router.x.logits, router.x.best.front()) +
                  log_relative_sum(router.y.logits, router.y.best.front());
    }
    if (std::isnan(log_total)) {
      for (int64_t i = 0; i < k; ++i) {
        store_scalar(weights + i, std::numeric_limits<Acc>::quiet_NaN());
        indices[i] = static_cast<int32_t>(i);
      }
      continue;
    }
    router.choose();
    write_token(p, router, log_total, weights, indices);
  }
}

}  // namespace

void router_forward(const RouterForwardParams& params, const Executor& executor) {
  if (params.num_experts_per_token == 0) return;
  // Below about 16 tokens a thread takes longer to wake than to route them.
  constexpr int64_t kGrain = 16;
  dispatch_dtype(params.dtype, [&](auto value) {
    executor.parallel_for(0, params.num_tokens, kGrain, [&](int64_t begin, int64_t end) {
      router_forward_tokens<typename decltype(value)::type>(params, begin, end);
    });
  });
}

}  // namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY
