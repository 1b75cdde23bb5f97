// Cartesian-product router on the CPU.
//
// The K best of the R × C sums x[row] + y[col], without forming the grid: sort the best K + 1 of
// each axis, then choose among the pairs of ranks (i, j), from 1, with i · j <= K + 1, about
// K ln K of them. Any other pair has i · j - 1 > K pairs whose sums are no smaller, as fp addition
// is monotone: the K largest sums are found without it, and where its sum equals the K-th, more
// than K candidates reach that sum. Then, and only then, may a pair that was not chosen have the
// smaller id (two different logits can round to one sum), and the tie is settled by ids. Sums of
// finite logits that overflow would tie, too: their halves are compared instead.
// O(R + C + K log K) a token.
#include <algorithm>
#include <limits>
#include <vector>

#include "activation.h"
#include "omni_moe/cpu.h"
#include "select.h"

namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY {

namespace {

template <typename Acc>
constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();

// ---- One axis of one token ----------------------------------------------------------------------

template <typename Acc>
struct Axis {
  const int64_t n, m;            // logits, and how many of the best are wanted
  const int32_t stride;          // of the id
  std::vector<Acc> logits;       // [n], then -inf
  std::vector<Key<Acc>> keys;    // [n], then kNoKey
  std::vector<int32_t> order;    // [m] positions of the best, sorted
  std::vector<Acc> best;         // [m] their values
  std::vector<Acc> relative;     // [m] best[i] - best[0]
  std::vector<int32_t> id_part;  // [m] order[i] * stride

  Axis(int64_t n, int64_t m, int64_t stride)
      : n(n),
        m(m),
        stride(static_cast<int32_t>(stride)),
        logits(whole_vectors<Acc>(n)),
        keys(whole_vectors<Acc>(n)),
        order(n),
        best(whole_vectors<Acc>(m) + kLanes<Acc>),  // a run of whole vectors may start anywhere
        relative(best.size()),
        id_part(best.size()) {}

  template <typename T>
  void load_sorted(const T* source, Selector<Acc>& selector) {
    int64_t i = 0;
    for (; i + kLanes<Acc> <= n; i += kLanes<Acc>) {
      const Vec<Acc> values = load(source + i);
      const auto value_keys = to_key<Acc, KeyVec<Acc>>(values);
      store(logits.data() + i, values);
      std::memcpy(keys.data() + i, &value_keys, sizeof(value_keys));
    }
    if (i < n) {
      const Vec<Acc> values = load_partial(source + i, n - i, -kInfinity<Acc>);
      store(logits.data() + i, values);
      std::fill(keys.begin() + i, keys.end(), kNoKey<Acc>);
      for (; i < n; ++i) keys[i] = to_key<Acc>(logits[i]);
    }

    selector.best(keys.data(), n, m, order.data());
    const Acc largest = logits[order[0]];
    for (int64_t rank = 0; rank < m; ++rank) {
      best[rank] = logits[order[rank]];
      relative[rank] = best[rank] - largest;
      id_part[rank] = order[rank] * stride;
    }
  }

  // Σ exp(logits - largest), NaN where log_softmax is NaN: a NaN or +inf logit, or all logits -inf.
  Acc relative_total() const {
    const Acc largest = best[0];
    if (!(std::abs(largest) < kInfinity<Acc>)) return std::numeric_limits<Acc>::quiet_NaN();
    Vec<Acc> sum = {};
    for (size_t i = 0; i < logits.size(); i += kLanes<Acc>) {
      sum += exp_of(load(logits.data() + i) - largest);
    }
    return sum_of_lanes<Acc>(sum);
  }

  // The largest magnitude of a finite logit.
  Acc largest_finite() const {
    Acc largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Acc magnitude = std::abs(logits[i]);
      if (magnitude < kInfinity<Acc>) largest = std::max(largest, magnitude);
    }
    return largest;
  }

  // `relative` stays that of the logits themselves.
  void halve() {
    for (std::vector<Acc>* values : {&logits, &best}) {
      for (Acc& value : *values) value *= Acc(0.5);
    }
  }

  bool has(Acc value) const {
    return std::find(logits.begin(), logits.begin() + n, value) != logits.begin() + n;
  }
};

// ---- One token ----------------------------------------------------------------------------------

// Pairs: the sum of their logits as a key, their id, and their sum less the largest, axis by axis
// (the difference of two large sums has lost digits that log_softmax keeps).
template <typename Acc>
struct Pairs {
  std::vector<Key<Acc>> keys;
  std::vector<int32_t> ids;
  std::vector<Acc> relative;

  explicit Pairs(int64_t n) : keys(n), ids(n), relative(n, -kInfinity<Acc>) {}
  void set(int64_t i, const Pairs& from, int64_t position) {
    keys[i] = from.keys[position];
    ids[i] = from.ids[position];
    relative[i] = from.relative[position];
  }
};

// Candidates of one rank of one axis: with ranks [begin, end) of the other. `begin` stays where the
// run is empty; the pair at `end` is the first that is no candidate.
struct Run {
  bool is_row;
  int64_t rank, begin, end;
};

template <typename Acc>
class TokenRouter {
 public:
  TokenRouter(int64_t num_rows, int64_t num_cols, int64_t k)
      : x(num_rows, std::min(k + 1, num_rows), num_cols),
        y(num_cols, std::min(k + 1, num_cols), 1),
        chosen(whole_vectors<Acc>(k)),
        k_(k),
        runs_(make_runs()),
        num_candidates_(count_candidates()),
        candidates_(whole_vectors<Acc>(num_candidates_) + kLanes<Acc>),
        selector_(std::max({num_candidates_, num_rows, num_cols})),
        order_(num_candidates_ + 1) {}

  Axis<Acc> x, y;
  Pairs<Acc> chosen;  // [K] the best first; then a relative sum of -inf

  template <typename T>
  void load_sorted(const T* logits_x, const T* logits_y) {
    unit_ = 1;
    x.load_sorted(logits_x, selector_);
    y.load_sorted(logits_y, selector_);
  }

  // Fills `chosen` from the sorted axes: once, or twice where sums overflow.
  void choose() {
    do {
      if (sums_to_nan_by_infinities()) {
        choose_from_grid();
      } else {
        choose_by_ranks();
      }
    } while (chose_infinite() && halve_overflowed());
  }

  // What a key of `chosen` has for 1.
  Acc unit() const { return unit_; }

 private:
  void choose_by_ranks() {
    make_candidates();
    // One more than K: whether it ties with the K-th.
    const int64_t wanted = std::min(k_ + 1, num_candidates_);
    selector_.best(candidates_.keys.data(), num_candidates_, wanted, order_.data());
    for (int64_t i = 0; i < k_; ++i) chosen.set(i, candidates_, order_[i]);
    settle_ties(wanted > k_ && candidates_.keys[order_[k_]] == chosen.keys[k_ - 1]);
  }

  bool chose_infinite() const {
    return chosen.keys[0] >= to_key<Acc>(kInfinity<Acc>) ||
           chosen.keys[k_ - 1] == to_key<Acc>(-kInfinity<Acc>);
  }

  // Halves the logits where sums of finite ones overflow, so that an infinite sum may hide larger
  // ones; false where there is nothing to halve. Half of a sum is exact unless it is smaller than
  // the smallest normal number, beside a logit of the size of the largest.
  [[gnu::noinline, gnu::cold]] bool halve_overflowed() {
    if (unit_ != 1 || x.largest_finite() + y.largest_finite() < kInfinity<Acc>) return false;
    unit_ = Acc(0.5);
    x.halve();
    y.halve();
    return true;
  }

  // The region i · j <= K + 1 as the rows of the first ranks, up to the root, and the columns of
  // the first ranks below those rows.
  std::vector<Run> make_runs() const {
    const int64_t limit = k_ + 1;
    int64_t root = 1;
    while ((root + 1) * (root + 1) <= limit) ++root;
    std::vector<Run> runs;
    for (int64_t i = 0; i < std::min(root, x.m); ++i) {
      runs.push_back({true, i, 0, std::min(limit / (i + 1), y.m)});
    }
    for (int64_t j = 0; j < std::min(root, y.m); ++j) {
      runs.push_back({false, j, root, std::max(root, std::min(limit / (j + 1), x.m))});
    }
    return runs;
  }
  int64_t count_candidates() const {
    int64_t count = 0;
    for (const Run& run : runs_) count += run.end - run.begin;
    return count;
  }
  const Axis<Acc>& fixed_axis(const Run& run) const { return run.is_row ? x : y; }
  const Axis<Acc>& axis_along(const Run& run) const { return run.is_row ? y : x; }

  // Whole vectors: what a run writes past its end, the next one overwrites.
  void make_candidates() {
    using Ids = typename VectorOf<int32_t, 4 * kLanes<Acc>>::type;
    int64_t filled = 0;
    for (const Run& run : runs_) {
      const Axis<Acc>& fixed = fixed_axis(run);
      const Axis<Acc>& along = axis_along(run);
      const Acc value = fixed.best[run.rank], relative = fixed.relative[run.rank];
      const int32_t id_part = fixed.id_part[run.rank];
      for (int64_t i = run.begin; i < run.end; i += kLanes<Acc>) {
        const int64_t at = filled + i - run.begin;
        const auto keys = to_key<Acc, KeyVec<Acc>>(value + load(along.best.data() + i));
        const Ids ids = id_part + load_bits<Ids>(along.id_part.data() + i);
        std::memcpy(candidates_.keys.data() + at, &keys, sizeof(keys));
        std::memcpy(candidates_.ids.data() + at, &ids, sizeof(ids));
        store(candidates_.relative.data() + at, relative + load(along.relative.data() + i));
      }
      filled += run.end - run.begin;
    }
    std::fill_n(candidates_.keys.begin() + filled, whole_vectors<Acc>(filled) - filled,
                kNoKey<Acc>);
  }

  // inf - inf is NaN, which sorts first though its terms do not: the one case in which sums do not
  // descend along a sorted axis.
  bool sums_to_nan_by_infinities() const {
    const Key<Acc> infinite = to_key<Acc>(kInfinity<Acc>);
    const auto may_be_infinite = [&](const Axis<Acc>& axis) {
      return axis.keys[axis.order[0]] >= infinite;
    };
    return (may_be_infinite(x) && x.has(kInfinity<Acc>) && y.has(-kInfinity<Acc>)) ||
           (may_be_infinite(y) && y.has(kInfinity<Acc>) && x.has(-kInfinity<Acc>));
  }

  // Only for sums of logits: the softmax of an infinite logit is NaN, so `relative` is not needed.
  void choose_from_grid() {
    std::vector<std::pair<Key<Acc>, int32_t>> grid;  // and ~id, so that greater is better
    grid.reserve(x.n * y.n);
    for (int64_t row = 0; row < x.n; ++row) {
      for (int64_t col = 0; col < y.n; ++col) {
        grid.emplace_back(to_key<Acc>(x.logits[row] + y.logits[col]), ~int32_t(grid.size()));
      }
    }
    std::partial_sort(grid.begin(), grid.begin() + k_, grid.end(), std::greater<>());
    for (int64_t i = 0; i < k_; ++i) {
      chosen.keys[i] = grid[i].first;
      chosen.ids[i] = ~grid[i].second;
    }
  }

  // Puts equal sums in the order of their ids. `cut`: the last of them had to be left out.
  void settle_ties(bool cut) {
    for (int64_t begin = 0, end; begin < k_; begin = end) {
      const Key<Acc> key = chosen.keys[begin];
      for (end = begin + 1; end < k_ && chosen.keys[end] == key;) ++end;
      if (end == k_ && cut) {
        tie_outside_candidates(key) ? take_from_grid(key, begin) : take_from_candidates(key, begin);
      } else if (end - begin > 1) {
        take_by_id(order_.begin() + begin, order_.begin() + end, begin);
      }
    }
  }

  // Whether a pair that is no candidate may have this sum, the K-th largest: then the first one
  // past some run has it, or the one past the corner of rows and columns.
  bool tie_outside_candidates(Key<Acc> key) const {
    for (const Run& run : runs_) {
      const Axis<Acc>& along = axis_along(run);
      if (run.end >= along.n) continue;
      // Past the sorted ones is none larger than the last of them.
      const Acc next = along.best[std::min(run.end, along.m - 1)];
      if (to_key<Acc>(fixed_axis(run).best[run.rank] + next) == key) return true;
    }
    const int64_t corner = runs_.back().begin;
    return corner < x.m && corner < y.m && to_key<Acc>(x.best[corner] + y.best[corner]) == key;
  }

  void take_from_candidates(Key<Acc> key, int64_t begin) {
    int64_t tied = 0;
    for (int64_t i = 0; i < num_candidates_; ++i) {
      order_[tied] = static_cast<int32_t>(i);
      tied += candidates_.keys[i] == key;
    }
    take_by_id(order_.begin(), order_.begin() + tied, begin);
  }

  // chosen[at, …) = these candidates with the smallest ids, as many as there is room for.
  void take_by_id(std::vector<int32_t>::iterator first, std::vector<int32_t>::iterator last,
                  int64_t at) {
    const auto smaller_id = [&](int32_t a, int32_t b) {
      return candidates_.ids[a] < candidates_.ids[b];
    };
    std::sort(first, last, smaller_id);
    for (; first != last && at < k_; ++first, ++at) chosen.set(at, candidates_, *first);
  }

  // chosen[at, K) = the smallest ids of the whole grid whose sum has this key.
  void take_from_grid(Key<Acc> key, int64_t at) {
    for (int64_t row = 0; at < k_; ++row) {
      const Acc value = x.logits[row];
      if (to_key<Acc>(value + y.best[0]) < key) continue;
      for (int64_t col = 0; col < y.n && at < k_; ++col) {
        if (to_key<Acc>(value + y.logits[col]) != key) continue;
        chosen.keys[at] = key;
        chosen.ids[at] = static_cast<int32_t>(row * y.n + col);
        chosen.relative[at++] = ((value - x.best[0]) + (y.logits[col] - y.best[0])) / unit_;
      }
    }
  }

  const int64_t k_;
  Acc unit_ = 1;
  const std::vector<Run> runs_;
  const int64_t num_candidates_;
  Pairs<Acc> candidates_;
  Selector<Acc> selector_;
  std::vector<int32_t> order_;  // positions of candidates
};

// weights[K] = what is written for `chosen`, and whole vectors of it. `unit` is that of its keys.
// `total` is Σ over the whole grid of exp(relative sum); only kSoftmax uses it.
template <typename Acc>
void score_chosen(RouterScore score, Acc unit, Acc total, const Pairs<Acc>& chosen,
                  std::vector<Acc>& weights) {
  const int64_t padded = weights.size();
  Vec<Acc> sum = {};
  for (int64_t i = 0; i < padded; i += kLanes<Acc>) {
    const auto keys = load_keys<Acc>(chosen.keys.data() + i);
    const Vec<Acc> weight = score == RouterScore::kLogit ? from_key<Acc, Vec<Acc>>(keys) / unit
                                                         : exp_of(load(chosen.relative.data() + i));
    store(weights.data() + i, weight);
    sum += weight;
  }
  if (score == RouterScore::kLogit) return;
  if (score == RouterScore::kSoftmaxTopK) total = sum_of_lanes<Acc>(sum);
  for (int64_t i = 0; i < padded; i += kLanes<Acc>) {
    store(weights.data() + i, load(weights.data() + i) / total);
  }
}

template <typename T>
void router_forward_tokens(const RouterForwardParams& p, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t k = p.num_experts_per_token;
  TokenRouter<Acc> router(p.num_rows, p.num_cols, k);
  std::vector<Acc> scores(whole_vectors<Acc>(k));
  for (int64_t t = begin; t < end; ++t) {
    T* weights = static_cast<T*>(p.weights) + t * k;
    int32_t* indices = p.indices + t * k;
    if (p.token_mask != nullptr && !p.token_mask[t]) {
      for (int64_t i = 0; i < k; ++i) store_scalar(weights + i, Acc(0));
      std::fill_n(indices, k, -1);
      continue;
    }
    router.load_sorted(static_cast<const T*>(p.logits_x) + t * p.num_rows,
                       static_cast<const T*>(p.logits_y) + t * p.num_cols);
    Acc total = 0;
    if (p.score != RouterScore::kLogit) {
      total = router.x.relative_total() * router.y.relative_total();
    }
    if (std::isnan(total)) {
      for (int64_t i = 0; i < k; ++i) {
        store_scalar(weights + i, std::numeric_limits<Acc>::quiet_NaN());
        indices[i] = static_cast<int32_t>(i);
      }
      continue;
    }
    router.choose();
    score_chosen(p.score, router.unit(), total, router.chosen, scores);
    narrow(scores.data(), weights, k);
    std::copy_n(router.chosen.ids.data(), k, indices);
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
