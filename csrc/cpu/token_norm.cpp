// LayerNorm and RMSNorm of each token's logits on the CPU, token by token: three reads of a row
// that stays in L1, one write. The mean is taken relative to the row's first logit, and the
// variance as Σ (x - mean)², so that an offset common to a row costs no digits.
#include <algorithm>
#include <cmath>

#include "omni_moe/cpu.h"
#include "vec.h"

namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY {

namespace {

// So many logits make a task worth handing to a thread.
constexpr int64_t kTaskLogits = 1 << 14;

template <typename Params>
int64_t token_grain(const Params& p) {
  return std::max<int64_t>(1, kTaskLogits / (p.num_rows + p.num_cols));
}

// The lanes of a vector of for_each_vector; those past the row read as `rest`.
template <typename T>
Vec<acc_t<T>> load_lanes_or(const T* p, int64_t lanes, acc_t<T> rest) {
  return lanes == kLanes<acc_t<T>> ? load(p) : load_partial(p, lanes, rest);
}

// Writes the normed row and returns 1 / sqrt(… + eps).
template <typename T>
acc_t<T> normalise(const T* row, int64_t n, TokenNorm norm, double eps, T* normed) {
  using Acc = acc_t<T>;
  Acc mean = 0;
  if (norm == TokenNorm::kLayerNorm) {
    const Acc first = load_scalar(row);
    Vec<Acc> sum = {};
    for_each_vector<Acc>(
        n, [&](int64_t i, int64_t lanes) { sum += load_lanes_or(row + i, lanes, first) - first; });
    mean = first + sum_of_lanes<Acc>(sum) / Acc(n);
  }
  Vec<Acc> squares = {};
  for_each_vector<Acc>(n, [&](int64_t i, int64_t lanes) {
    const Vec<Acc> centred = load_lanes_or(row + i, lanes, mean) - mean;
    squares += centred * centred;
  });
  const Acc inv_std = 1 / std::sqrt(sum_of_lanes<Acc>(squares) / Acc(n) + Acc(eps));
  for_each_vector<Acc>(n, [&](int64_t i, int64_t lanes) {
    store_lanes(normed + i, (load_lanes(row + i, lanes) - mean) * inv_std, lanes);
  });
  return inv_std;
}

template <typename T>
void normalise_backward(const T* grad, const T* normed, int64_t n, TokenNorm norm, acc_t<T> inv_std,
                        T* grad_logits) {
  using Acc = acc_t<T>;
  Vec<Acc> sum_grad = {}, sum_product = {};
  for_each_vector<Acc>(n, [&](int64_t i, int64_t lanes) {
    const Vec<Acc> g = load_lanes(grad + i, lanes);
    sum_grad += g;
    sum_product += g * load_lanes(normed + i, lanes);
  });
  const Acc mean_grad =
      norm == TokenNorm::kLayerNorm ? sum_of_lanes<Acc>(sum_grad) / Acc(n) : Acc(0);
  const Acc mean_product = sum_of_lanes<Acc>(sum_product) / Acc(n);
  for_each_vector<Acc>(n, [&](int64_t i, int64_t lanes) {
    const Vec<Acc> g = load_lanes(grad + i, lanes), y = load_lanes(normed + i, lanes);
    store_lanes(grad_logits + i, (g - mean_grad - y * mean_product) * inv_std, lanes);
  });
}

}  // namespace

void token_norm_forward(const TokenNormForwardParams& params, const Executor& executor) {
  const auto& p = params;
  dispatch_dtype(p.dtype, [&](auto value) {
    using T = typename decltype(value)::type;
    using Acc = acc_t<T>;
    auto* inv_std = static_cast<Acc*>(p.inv_std);
    executor.parallel_for(0, p.num_tokens, token_grain(p), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const T* row = static_cast<const T*>(p.logits) + t * p.logits_stride;
        const Acc x =
            normalise(row, p.num_rows, p.norm, p.eps, static_cast<T*>(p.normed_x) + t * p.num_rows);
        const Acc y = normalise(row + p.num_rows, p.num_cols, p.norm, p.eps,
                                static_cast<T*>(p.normed_y) + t * p.num_cols);
        if (inv_std) inv_std[2 * t] = x, inv_std[2 * t + 1] = y;
      }
    });
  });
}

void token_norm_backward(const TokenNormBackwardParams& params, const Executor& executor) {
  const auto& p = params;
  dispatch_dtype(p.dtype, [&](auto value) {
    using T = typename decltype(value)::type;
    const auto* inv_std = static_cast<const acc_t<T>*>(p.inv_std);
    const auto at = [](const void* rows, int64_t t, int64_t n) {
      return static_cast<const T*>(rows) + t * n;
    };
    executor.parallel_for(0, p.num_tokens, token_grain(p), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        T* grad_logits = static_cast<T*>(p.grad_logits) + t * (p.num_rows + p.num_cols);
        normalise_backward(at(p.grad_x, t, p.num_rows), at(p.normed_x, t, p.num_rows), p.num_rows,
                           p.norm, inv_std[2 * t], grad_logits);
        normalise_backward(at(p.grad_y, t, p.num_cols), at(p.normed_y, t, p.num_cols), p.num_cols,
                           p.norm, inv_std[2 * t + 1], grad_logits + p.num_rows);
      }
    });
  });
}

}  // namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY
