// BatchNorm of the router's logits on the CPU.
//
// The tokens of the batch are cut into parts by their number alone, so that the result depends
// neither on the threads nor on tokens that a mask leaves out. Each part has its own statistics,
// merged in order of the parts; then each part is normalised. The variance is merged as Σ (x -
// mean)² with Chan's formula, never as E[x²] - E[x]². Two reads of the logits, one write; backward:
// two reads of the gradient and of the normalised logits, one write.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "omni_moe/cpu.h"
#include "vec.h"

namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY {

namespace {

constexpr int64_t kMinPartTokens = 64;
constexpr int64_t kMaxParts = 64;
constexpr int64_t kChunkTokens = 8;       // rows whose columns are in registers together
constexpr int64_t kMergeGrain = 1 << 11;  // columns of a task that merges the parts

struct Parts {
  int64_t num_tokens, tokens_per_part, count;

  explicit Parts(int64_t num_tokens)
      : num_tokens(num_tokens),
        tokens_per_part(std::max(kMinPartTokens, (num_tokens + kMaxParts - 1) / kMaxParts)),
        count((num_tokens + tokens_per_part - 1) / tokens_per_part) {}

  int64_t begin(int64_t part) const { return part * tokens_per_part; }
  int64_t end(int64_t part) const { return std::min(num_tokens, begin(part) + tokens_per_part); }
  int64_t size(int64_t part) const { return end(part) - begin(part); }
};

// Two numbers a column, for every part: [parts, 2, whole vectors of columns].
template <typename Acc>
struct PartSums {
  int64_t width;
  std::vector<Acc> values;

  PartSums(int64_t parts, int64_t num_columns)
      : width(whole_vectors<Acc>(num_columns)), values(parts * 2 * width) {}
  Acc* first(int64_t part) { return values.data() + part * 2 * width; }
  Acc* second(int64_t part) { return first(part) + width; }
};

// The tokens of the batch: all, or those that a mask counts in.
struct Batch {
  int64_t num_tokens;
  std::vector<int64_t> tokens;  // empty: all
  bool is_masked;

  Batch(int64_t all_tokens, const bool* token_mask)
      : num_tokens(all_tokens), is_masked(token_mask != nullptr) {
    if (!is_masked) return;
    for (int64_t t = 0; t < all_tokens; ++t) {
      if (token_mask[t]) tokens.push_back(t);
    }
    num_tokens = static_cast<int64_t>(tokens.size());
  }
};

// One axis of the grid within rows that hold both or it alone, those of a batch's tokens.
template <typename T>
struct AxisRows {
  T* data;  // of the first row of all tokens
  int64_t stride;
  const int64_t* tokens;  // or null: all

  AxisRows(T* data, int64_t stride, const Batch& batch)
      : data(data), stride(stride), tokens(batch.is_masked ? batch.tokens.data() : nullptr) {}
  T* row(int64_t t) const { return data + (tokens == nullptr ? t : tokens[t]) * stride; }
};

template <typename T>
void fill_zero(void* elements, int64_t count) {
  if (count > 0) std::memset(elements, 0, count * sizeof(T));
}

// ---- Forward ------------------------------------------------------------------------------------

// The moments of `count` values joined to those of `total` values so far: mean and Σ (x - mean)².
template <typename Acc>
void merge_moments(int64_t total, int64_t count, Vec<Acc> mean, Vec<Acc> m2, Acc* mean_so_far,
                   Acc* m2_so_far) {
  const Acc share = Acc(count) / Acc(total + count);
  const Vec<Acc> old_mean = load(mean_so_far), delta = mean - old_mean;
  store(mean_so_far, old_mean + delta * share);
  store(m2_so_far, load(m2_so_far) + m2 + delta * delta * (Acc(total) * share));
}

// Moments of one part; the accumulators start as zeros.
template <typename T>
void part_moments(AxisRows<const T> rows, int64_t num_columns, int64_t begin, int64_t end,
                  acc_t<T>* mean, acc_t<T>* m2) {
  using Acc = acc_t<T>;
  for (int64_t t = begin; t < end; t += kChunkTokens) {
    const int64_t count = std::min(kChunkTokens, end - t);
    for_each_vector<Acc>(num_columns, [&](int64_t i, int64_t lanes) {
      Vec<Acc> values[kChunkTokens];
      for (int64_t j = 0; j < count; ++j) values[j] = load_lanes(rows.row(t + j) + i, lanes);
      Vec<Acc> sum = {}, squares = {};
      for (int64_t j = 1; j < count; ++j) sum += values[j] - values[0];
      const Vec<Acc> chunk_mean = values[0] + sum / Acc(count);
      for (int64_t j = 0; j < count; ++j) {
        squares += (values[j] - chunk_mean) * (values[j] - chunk_mean);
      }
      merge_moments<Acc>(t - begin, count, chunk_mean, squares, mean + i, m2 + i);
    });
  }
}

// The batch's statistics of one column as the running ones take them in.
template <typename Stat, typename Acc>
void update_running(const BatchNormBuffers& buffers, int64_t i, Acc momentum, Acc mean,
                    Acc unbiased_var) {
  const auto update = [&](void* running, Acc value) {
    Stat* at = static_cast<Stat*>(running) + i;
    store_scalar(
        at, static_cast<acc_t<Stat>>(momentum * value + (1 - momentum) * Acc(load_scalar(at))));
  };
  if (buffers.running_mean) update(buffers.running_mean, mean);
  if (buffers.running_var) update(buffers.running_var, unbiased_var);
}

// Mean and inverse standard deviation of the columns of one axis, in training.
template <typename T, typename Stat>
void batch_statistics(const BatchNormForwardParams& p, const Parts& parts, AxisRows<const T> rows,
                      int64_t num_columns, const BatchNormBuffers& buffers, acc_t<T>* mean,
                      acc_t<T>* inv_std, const Executor& executor) {
  using Acc = acc_t<T>;
  PartSums<Acc> moments(parts.count, num_columns);
  executor.parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      part_moments<T>(rows, num_columns, parts.begin(part), parts.end(part), moments.first(part),
                      moments.second(part));
    }
  });
  const int64_t width = whole_vectors<Acc>(num_columns);
  std::vector<Acc> m2(width);
  executor.parallel_for(
      0, width / kLanes<Acc>, kMergeGrain / kLanes<Acc>, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * kLanes<Acc>; i < end * kLanes<Acc>; i += kLanes<Acc>) {
          for (int64_t part = 0; part < parts.count; ++part) {
            merge_moments<Acc>(parts.begin(part), parts.size(part), load(moments.first(part) + i),
                               load(moments.second(part) + i), mean + i, m2.data() + i);
          }
        }
      });
  const auto n = std::max<int64_t>(parts.num_tokens, 1);
  for (int64_t i = 0; i < num_columns; ++i) {
    inv_std[i] = 1 / std::sqrt(m2[i] / Acc(n) + Acc(p.eps));
    if (n > 1) {
      update_running<Stat>(buffers, i, Acc(p.momentum), mean[i], m2[i] / Acc(n - 1));
    }
  }
  if (buffers.num_batches_tracked) ++*buffers.num_batches_tracked;
}

template <typename T, typename Stat>
void running_statistics(const BatchNormForwardParams& p, int64_t num_columns,
                        const BatchNormBuffers& buffers, acc_t<T>* mean, acc_t<T>* inv_std) {
  using Acc = acc_t<T>;
  for (int64_t i = 0; i < num_columns; ++i) {
    mean[i] = load_scalar(static_cast<const Stat*>(buffers.running_mean) + i);
    const Acc var = load_scalar(static_cast<const Stat*>(buffers.running_var) + i);
    inv_std[i] = 1 / std::sqrt(var + Acc(p.eps));
  }
}

template <typename T, typename Stat>
void forward_axis(const BatchNormForwardParams& p, const Batch& batch, AxisRows<const T> rows,
                  int64_t num_columns, const BatchNormBuffers& buffers, void* normed_out,
                  acc_t<T>* inv_std_out, const Executor& executor) {
  using Acc = acc_t<T>;
  const Parts parts(batch.num_tokens);
  const AxisRows<T> normed(static_cast<T*>(normed_out), num_columns, batch);
  if (batch.is_masked) fill_zero<T>(normed_out, p.num_tokens * num_columns);
  std::vector<Acc> mean(whole_vectors<Acc>(num_columns)), inv_std(mean.size());
  if (p.training) {
    batch_statistics<T, Stat>(p, parts, rows, num_columns, buffers, mean.data(), inv_std.data(),
                              executor);
  } else {
    running_statistics<T, Stat>(p, num_columns, buffers, mean.data(), inv_std.data());
  }
  executor.parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = parts.begin(begin); t < parts.end(end - 1); ++t) {
      for_each_vector<Acc>(num_columns, [&](int64_t i, int64_t lanes) {
        const auto centred = load_lanes(rows.row(t) + i, lanes) - load(mean.data() + i);
        store_lanes(normed.row(t) + i, centred * load(inv_std.data() + i), lanes);
      });
    }
  });
  if (inv_std_out) std::copy_n(inv_std.begin(), num_columns, inv_std_out);
}

// ---- Backward -----------------------------------------------------------------------------------

// Σ g and Σ g n of every column over one part.
template <typename T>
void part_gradient_sums(AxisRows<const T> grads, AxisRows<const T> normed, int64_t num_columns,
                        int64_t begin, int64_t end, acc_t<T>* sum_grad, acc_t<T>* sum_product) {
  using Acc = acc_t<T>;
  for (int64_t t = begin; t < end; t += kChunkTokens) {
    const int64_t chunk_end = std::min(t + kChunkTokens, end);
    for_each_vector<Acc>(num_columns, [&](int64_t i, int64_t lanes) {
      Vec<Acc> sum = {}, product = {};
      for (int64_t row = t; row < chunk_end; ++row) {
        const Vec<Acc> g = load_lanes(grads.row(row) + i, lanes);
        sum += g;
        product += g * load_lanes(normed.row(row) + i, lanes);
      }
      store(sum_grad + i, load(sum_grad + i) + sum);
      store(sum_product + i, load(sum_product + i) + product);
    });
  }
}

template <typename T>
void backward_axis(const BatchNormBackwardParams& p, const Batch& batch, const void* grad,
                   const void* normed, const acc_t<T>* inv_std, int64_t num_columns,
                   AxisRows<T> grad_logits, const Executor& executor) {
  using Acc = acc_t<T>;
  const Parts parts(batch.num_tokens);
  const AxisRows<const T> grads(static_cast<const T*>(grad), num_columns, batch);
  const AxisRows<const T> norms(static_cast<const T*>(normed), num_columns, batch);
  // mean(g) and mean(g n); zeros outside training.
  const int64_t width = whole_vectors<Acc>(num_columns);
  std::vector<Acc> mean_grad(width), mean_product(width);
  if (p.training) {
    PartSums<Acc> sums(parts.count, num_columns);
    executor.parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        part_gradient_sums<T>(grads, norms, num_columns, parts.begin(part), parts.end(part),
                              sums.first(part), sums.second(part));
      }
    });
    for (int64_t part = 0; part < parts.count; ++part) {
      for (int64_t i = 0; i < width; i += kLanes<Acc>) {
        store(mean_grad.data() + i, load(mean_grad.data() + i) + load(sums.first(part) + i));
        store(mean_product.data() + i, load(mean_product.data() + i) + load(sums.second(part) + i));
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      mean_grad[i] /= Acc(batch.num_tokens);
      mean_product[i] /= Acc(batch.num_tokens);
    }
  }
  executor.parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = parts.begin(begin); t < parts.end(end - 1); ++t) {
      for_each_vector<Acc>(num_columns, [&](int64_t i, int64_t lanes) {
        Vec<Acc> g = load_lanes(grads.row(t) + i, lanes);
        if (p.training) {
          const Vec<Acc> n = load_lanes(norms.row(t) + i, lanes);
          g = g - load(mean_grad.data() + i) - n * load(mean_product.data() + i);
        }
        store_lanes(grad_logits.row(t) + i, g * load_lanes(inv_std + i, lanes), lanes);
      });
    }
  });
}

}  // namespace

void batch_norm_forward(const BatchNormForwardParams& params, const Executor& executor) {
  const auto& p = params;
  dispatch_dtype(p.dtype, [&](auto value) {
    using T = typename decltype(value)::type;
    using Acc = acc_t<T>;
    const T* logits = static_cast<const T*>(p.logits);
    Acc* inv_std = static_cast<Acc*>(p.inv_std);
    const Batch batch(p.num_tokens, p.training ? p.token_mask : nullptr);
    const auto both_axes = [&](auto stat) {
      using Stat = typename decltype(stat)::type;
      forward_axis<T, Stat>(p, batch, {logits, p.logits_stride, batch}, p.num_rows, p.x, p.normed_x,
                            inv_std, executor);
      forward_axis<T, Stat>(p, batch, {logits + p.num_rows, p.logits_stride, batch}, p.num_cols,
                            p.y, p.normed_y, inv_std ? inv_std + p.num_rows : nullptr, executor);
    };
    if (p.stats_dtype == p.dtype) {
      both_axes(Type<T>{});
    } else if (p.stats_dtype == DType::kFloat32) {
      both_axes(Type<float>{});
    } else {
      throw std::invalid_argument("omni_moe: stats_dtype must be dtype or kFloat32");
    }
  });
}

void batch_norm_backward(const BatchNormBackwardParams& params, const Executor& executor) {
  const auto& p = params;
  dispatch_dtype(p.dtype, [&](auto value) {
    using T = typename decltype(value)::type;
    const auto* inv_std = static_cast<const acc_t<T>*>(p.inv_std);
    const int64_t stride = p.num_rows + p.num_cols;
    T* grad_logits = static_cast<T*>(p.grad_logits);
    const Batch batch(p.num_tokens, p.training ? p.token_mask : nullptr);
    if (batch.is_masked) fill_zero<T>(grad_logits, p.num_tokens * stride);
    backward_axis<T>(p, batch, p.grad_x, p.normed_x, inv_std, p.num_rows,
                     {grad_logits, stride, batch}, executor);
    backward_axis<T>(p, batch, p.grad_y, p.normed_y, inv_std + p.num_rows, p.num_cols,
                     {grad_logits + p.num_rows, stride, batch}, executor);
  });
}

}  // namespace omni_moe::cpu::OMNI_MOE_CPU_CAPABILITY
