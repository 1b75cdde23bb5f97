// Atomic experts on the CPU.
//
// Forward, token by token: s = x · up[i], out += act(s) * routing * down[i]; each pair reads its
// two rows once (2·T·K·H elements), the token's row and its fp32 sum stay in L1. Backward, two
// passes: token by token (dhidden, drouting, and two coefficients a pair, from the pre-activations
// that the forward saved), then expert by expert over the pairs in schedule order (dup, ddown),
// each gradient row written exactly once. Every sum runs in one fixed order whatever the number of
// threads, so results repeat bitwise.
#include <algorithm>
#include <memory>

#include "activation.h"
#include "expert_workspace.h"
#include "omni_moe/cpu.h"
#include "vec.h"

namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY {

namespace {

// Work of about this many multiply-adds makes a task worth handing to a thread.
constexpr int64_t kTaskFlops = 1 << 15;

int64_t token_grain(int64_t pairs_per_token, int64_t hidden_size) {
  return std::max<int64_t>(1, kTaskFlops / std::max<int64_t>(1, pairs_per_token * hidden_size));
}

template <typename T>
acc_t<T> dot(const acc_t<T>* x, const T* row, int64_t n) {
  using Acc = acc_t<T>;
  constexpr int kWidth = kLanes<Acc>;
  Vec<Acc> sum[4] = {};  // four chains: one FMA chain would wait out its latency
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int c = 0; c < 4; ++c) sum[c] += load(x + i + c * kWidth) * load(row + i + c * kWidth);
  }
  for (; i + kWidth <= n; i += kWidth) sum[0] += load(x + i) * load(row + i);
  if (i < n) sum[1] += load_partial(x + i, n - i) * load_partial(row + i, n - i);
  return sum_of_lanes<Acc>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// sum += scale * row
template <typename T>
void accumulate(acc_t<T>* sum, acc_t<T> scale, const T* row, int64_t n) {
  using Acc = acc_t<T>;
  constexpr int kWidth = kLanes<Acc>;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(sum + i, load(sum + i) + scale * load(row + i));
  if (i < n) {
    store_partial(sum + i, load_partial(sum + i, n - i) + scale * load_partial(row + i, n - i),
                  n - i);
  }
}

// The rows of the pair after this one, asked for while this one is computed: the ids are known, the
// addresses are random, so the hardware prefetcher cannot help.
template <typename T>
void prefetch_row(const T* row, int64_t n) {
  constexpr int64_t kPerLine = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += kPerLine) __builtin_prefetch(row + i);
}

template <typename T, typename Index>
void expert_forward_tokens(const ExpertForwardParams& p, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t H = p.hidden_size, K = p.num_experts_per_token;
  const auto* hidden = static_cast<const T*>(p.hidden_states);
  const auto* up = static_cast<const T*>(p.up_weights);
  const auto* down = static_cast<const T*>(p.down_weights);
  const auto* routing = static_cast<const T*>(p.routing_weights);
  const auto* indices = static_cast<const Index*>(p.indices);
  const auto* addend = static_cast<const T*>(p.addend);
  auto* out = static_cast<T*>(p.expert_states);
  auto* pre_activations = static_cast<Acc*>(p.pre_activations);
  const std::unique_ptr<Acc[]> scratch(new Acc[2 * H]);
  Acc* x = scratch.get();
  Acc* sum = x + H;

  for (int64_t t = begin; t < end; ++t) {
    widen(hidden + t * H, x, H);
    addend ? widen(addend + t * H, sum, H) : void(std::fill_n(sum, H, Acc(0)));
    for (int64_t pair = t * K; pair < (t + 1) * K; ++pair) {
      if (pair + 1 < end * K) {
        prefetch_row(up + indices[pair + 1] * H, H);
        prefetch_row(down + indices[pair + 1] * H, H);
      }
      const int64_t row = indices[pair] * H;
      const Acc pre_activation = dot(x, up + row, H);
      if (pre_activations) pre_activations[pair] = pre_activation;
      accumulate(sum, activate(p.activation, pre_activation) * load_scalar(routing + pair),
                 down + row, H);
    }
    narrow(sum, out + t * H, H);
  }
}

template <typename T, typename Index>
void expert_backward_tokens(const ExpertBackwardParams& p, PairCoefficients<acc_t<T>>* coefficients,
                            int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t H = p.hidden_size, K = p.num_experts_per_token;
  const auto* grad = static_cast<const T*>(p.grad_expert_states);
  const auto* up = static_cast<const T*>(p.up_weights);
  const auto* down = static_cast<const T*>(p.down_weights);
  const auto* routing = static_cast<const T*>(p.routing_weights);
  const auto* indices = static_cast<const Index*>(p.indices);
  const auto* pre_activations = static_cast<const Acc*>(p.pre_activations);
  const auto* addend = static_cast<const T*>(p.addend);
  auto* grad_hidden = static_cast<T*>(p.grad_hidden_states);
  auto* grad_routing = static_cast<T*>(p.grad_routing_weights);
  const std::unique_ptr<Acc[]> scratch(new Acc[2 * H]);
  Acc* dout = scratch.get();
  Acc* sum = dout + H;

  for (int64_t t = begin; t < end; ++t) {
    widen(grad + t * H, dout, H);
    addend ? widen(addend + t * H, sum, H) : void(std::fill_n(sum, H, Acc(0)));
    for (int64_t pair = t * K; pair < (t + 1) * K; ++pair) {
      if (pair + 1 < end * K) {
        prefetch_row(up + indices[pair + 1] * H, H);
        prefetch_row(down + indices[pair + 1] * H, H);
      }
      const int64_t row = indices[pair] * H;
      const Acc pre_activation = pre_activations[pair];
      const Acc grad_value = dot(dout, down + row, H);  // d loss / d (act(s) * routing)
      const Acc activated = activate(p.activation, pre_activation);
      const Acc weight = load_scalar(routing + pair);
      const Acc grad_pre_activation =
          activate_backward(p.activation, pre_activation, weight * grad_value);
      coefficients[pair] = {grad_pre_activation, weight * activated};
      if (grad_routing) store_scalar(grad_routing + pair, activated * grad_value);
      if (grad_hidden) accumulate(sum, grad_pre_activation, up + row, H);
    }
    if (grad_hidden) narrow(sum, grad_hidden + t * H, H);
  }
}

// out = Σ over the expert's pairs of coefficient * tokens[t], zero where it has none.
template <typename T>
void reduce_expert_row(const PairCoefficients<acc_t<T>>* coefficients,
                       acc_t<T> PairCoefficients<acc_t<T>>::*coefficient, const int64_t* pairs,
                       int64_t num_pairs, int64_t K, const T* tokens, acc_t<T>* sum, T* out,
                       int64_t H) {
  if (num_pairs == 0) {
    std::memset(out, 0, H * sizeof(T));
    return;
  }
  std::fill_n(sum, H, acc_t<T>(0));
  for (int64_t i = 0; i < num_pairs; ++i) {
    accumulate(sum, coefficients[pairs[i]].*coefficient, tokens + pairs[i] / K * H, H);
  }
  narrow(sum, out, H);
}

template <typename T>
void expert_backward_experts(const ExpertBackwardParams& p,
                             const ExpertBackwardWorkspace& workspace, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t H = p.hidden_size, K = p.num_experts_per_token;
  const auto* coefficients = static_cast<const PairCoefficients<Acc>*>(workspace.coefficients);
  const int64_t* offsets = workspace.expert_offsets;
  const auto* hidden = static_cast<const T*>(p.hidden_states);
  const auto* grad = static_cast<const T*>(p.grad_expert_states);
  auto* grad_up = static_cast<T*>(p.grad_up_weights);
  auto* grad_down = static_cast<T*>(p.grad_down_weights);
  const std::unique_ptr<Acc[]> sum(new Acc[H]);

  for (int64_t e = begin; e < end; ++e) {
    const int64_t* pairs = workspace.pairs + offsets[e];
    const int64_t num_pairs = offsets[e + 1] - offsets[e];
    if (grad_up) {
      reduce_expert_row(coefficients, &PairCoefficients<Acc>::up, pairs, num_pairs, K, hidden,
                        sum.get(), grad_up + e * H, H);
    }
    if (grad_down) {
      reduce_expert_row(coefficients, &PairCoefficients<Acc>::down, pairs, num_pairs, K, grad,
                        sum.get(), grad_down + e * H, H);
    }
  }
}

// Experts [begin, end) hold work units [begin + offsets[begin], end + offsets[end]): one unit for
// the row written, one for each pair read, so that threads get equal work, not equal experts.
int64_t first_expert_at(const int64_t* offsets, int64_t num_experts, int64_t unit) {
  int64_t low = 0, high = num_experts;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    middle + offsets[middle] < unit ? low = middle + 1 : high = middle;
  }
  return low;
}

}  // namespace

void expert_forward(const ExpertForwardParams& params, const Executor& executor) {
  const int64_t grain = token_grain(params.num_experts_per_token, params.hidden_size);
  dispatch_dtype(params.dtype, [&](auto value) {
    dispatch_index(params.index_type, [&](auto index) {
      executor.parallel_for(0, params.num_tokens, grain, [&](int64_t begin, int64_t end) {
        expert_forward_tokens<typename decltype(value)::type, typename decltype(index)::type>(
            params, begin, end);
      });
    });
  });
}

void expert_backward(const ExpertBackwardParams& params, const Executor& executor) {
  const ExpertBackwardWorkspace workspace(params);
  const int64_t num_pairs = params.num_tokens * params.num_experts_per_token;
  dispatch_dtype(params.dtype, [&](auto value) {
    using T = typename decltype(value)::type;
    auto* coefficients = static_cast<PairCoefficients<acc_t<T>>*>(workspace.coefficients);

    // 1. Token order: dhidden, drouting, and the coefficients of each pair.
    dispatch_index(params.index_type, [&](auto index) {
      using Index = typename decltype(index)::type;
      executor.parallel_for(0, params.num_tokens,
                            token_grain(2 * params.num_experts_per_token, params.hidden_size),
                            [&](int64_t begin, int64_t end) {
                              expert_backward_tokens<T, Index>(params, coefficients, begin, end);
                            });
    });
    if (!params.grad_up_weights && !params.grad_down_weights) return;

    // 2. Expert order: each row of dup and ddown from its own pairs.
    schedule({params.indices, workspace.expert_offsets, workspace.pairs, num_pairs,
              params.num_experts, params.index_type});
    executor.parallel_for(
        0, num_pairs + params.num_experts, token_grain(1, params.hidden_size),
        [&](int64_t begin, int64_t end) {
          expert_backward_experts<T>(
              params, workspace,
              first_expert_at(workspace.expert_offsets, params.num_experts, begin),
              first_expert_at(workspace.expert_offsets, params.num_experts, end));
        });
  });
}

}  // namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY
