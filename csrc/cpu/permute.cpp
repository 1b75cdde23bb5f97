// Tokens into expert order and back on the CPU. Memory-bound: each row is read and written once,
// threads over tokens; sums over the pairs of a token are in order of k.
#include "omni_moe/permute.h"

#include <algorithm>

#include "omni_moe/cpu.h"
#include "vec.h"

namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY {

namespace {

constexpr int64_t kTaskElements = 1 << 13;

int64_t token_grain(const PermuteShape& p) {
  return std::max<int64_t>(
      1, kTaskElements / std::max<int64_t>(1, p.hidden_size * p.num_experts_per_token));
}

template <typename T>
acc_t<T> load_weight(const PermuteShape& p, const void* weights, int64_t pair) {
  if (weights == nullptr) return 1;
  return p.has_wide_weights ? static_cast<const acc_t<T>*>(weights)[pair]
                            : load_scalar(static_cast<const T*>(weights) + pair);
}

template <typename T>
void scale_row(const T* row, acc_t<T> factor, T* out, int64_t n) {
  for_each_vector<acc_t<T>>(n, [&](int64_t i, int64_t lanes) {
    store_lanes(out + i, load_lanes(row + i, lanes) * factor, lanes);
  });
}

// Zeros in the rows that no pair has.
template <typename T>
void clear_empty_rows(const PermuteShape& p, const int32_t* expert_ends, T* rows,
                      const Executor& executor) {
  const int64_t num_parts = p.is_padded ? p.num_experts : 1;
  executor.parallel_for(0, num_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t last = p.is_padded ? part : p.num_experts - 1;
      const int64_t first = last < 0 ? 0 : expert_ends[last];
      const int64_t behind = p.num_rows / num_parts * (part + 1);
      if (first < behind) {
        std::fill_n(rows + first * p.hidden_size, (behind - first) * p.hidden_size, T{});
      }
    }
  });
}

}  // namespace

void permute(const PermuteParams& params, const Executor& executor) {
  const auto& p = params;
  dispatch_dtype(p.dtype, [&](auto value) {
    using T = typename decltype(value)::type;
    T* rows = static_cast<T*>(p.rows);
    const int64_t n = p.hidden_size, k = p.num_experts_per_token;
    executor.parallel_for(0, p.num_tokens, token_grain(p), [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin * k; pair < end * k; ++pair) {
        const int64_t row = p.row_id_map[pair];
        if (row < 0) continue;
        const T* token = static_cast<const T*>(p.tokens) + pair / k * n;
        if (p.weights == nullptr) {
          std::copy_n(token, n, rows + row * n);
        } else {
          scale_row(token, load_weight<T>(p, p.weights, pair), rows + row * n, n);
        }
      }
    });
    clear_empty_rows(p, p.expert_ends, rows, executor);
  });
}

void unpermute(const UnpermuteParams& params, const Executor& executor) {
  const auto& p = params;
  dispatch_dtype(p.dtype, [&](auto value) {
    using T = typename decltype(value)::type;
    using Acc = acc_t<T>;
    const T* rows = static_cast<const T*>(p.rows);
    const int64_t n = p.hidden_size, k = p.num_experts_per_token;
    executor.parallel_for(0, p.num_tokens, token_grain(p), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for_each_vector<Acc>(n, [&](int64_t i, int64_t lanes) {
          Vec<Acc> sum{};
          for (int64_t pair = t * k; pair < (t + 1) * k; ++pair) {
            const int64_t row = p.row_id_map[pair];
            if (row < 0) continue;
            sum += load_lanes(rows + row * n + i, lanes) * load_weight<T>(p, p.weights, pair);
          }
          store_lanes(static_cast<T*>(p.tokens) + t * n + i, sum, lanes);
        });
      }
    });
  });
}

void unpermute_backward(const UnpermuteBackwardParams& params, const Executor& executor) {
  const auto& p = params;
  dispatch_dtype(p.dtype, [&](auto value) {
    using T = typename decltype(value)::type;
    using Acc = acc_t<T>;
    T* grad_rows = static_cast<T*>(p.grad_rows);
    const int64_t n = p.hidden_size, k = p.num_experts_per_token;
    executor.parallel_for(0, p.num_tokens, token_grain(p), [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin * k; pair < end * k; ++pair) {
        const int64_t row = p.row_id_map[pair];
        const T* grad = static_cast<const T*>(p.grad_tokens) + pair / k * n;
        Acc dot = 0;
        if (row >= 0) {
          Vec<Acc> dots{};
          for_each_vector<Acc>(n, [&](int64_t i, int64_t lanes) {
            dots += load_lanes(grad + i, lanes) *
                    load_lanes(static_cast<const T*>(p.rows) + row * n + i, lanes);
          });
          dot = sum_of_lanes<Acc>(dots);
          if (grad_rows != nullptr) {
            scale_row(grad, load_weight<T>(p, p.weights, pair), grad_rows + row * n, n);
          }
        }
        if (p.has_wide_weights) {
          static_cast<Acc*>(p.grad_weights)[pair] = dot;
        } else {
          store_scalar(static_cast<T*>(p.grad_weights) + pair, dot);
        }
      }
    });
    if (grad_rows != nullptr) clear_empty_rows(p, p.expert_ends, grad_rows, executor);
  });
}

}  // namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY
