#include "checks.h"

#include <atomic>
#include <limits>
#include <string>

#include "omni_moe/cpu.h"

namespace omni_moe::torch_api {

void check_rank(const Argument& argument, int64_t rank) {
  TORCH_CHECK_VALUE(argument.tensor.dim() == rank, argument.op, ": expected ", argument.name,
                    " to have ", rank, " dimensions, but got shape ", argument.tensor.sym_sizes());
}

void check_size(const Argument& argument, int64_t dim, const c10::SymInt& expected,
                const char* meaning) {
  TORCH_CHECK_VALUE(argument.tensor.sym_size(dim) == expected, argument.op, ": expected ",
                    argument.name, ".size(", dim, ") to equal the ", meaning, " (", expected,
                    "), but got shape ", argument.tensor.sym_sizes());
}

void check_floating(const Argument& argument) {
  const auto dtype = argument.tensor.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 ||
                        (dtype == at::kDouble && !argument.tensor.is_cuda()),
                    argument.op, ": expected ", argument.name,
                    " to be float32, float16 or bfloat16 (float64 on the CPU), but got ", dtype,
                    " on ", argument.tensor.device());
}

void check_integer(const Argument& argument) {
  const auto dtype = argument.tensor.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kInt || dtype == at::kLong, argument.op, ": expected ",
                    argument.name, " to be int32 or int64, but got ", dtype);
}

void check_like(const Argument& argument, const Argument& first, bool same_dtype) {
  TORCH_CHECK_VALUE(argument.tensor.device() == first.tensor.device(), argument.op, ": expected ",
                    argument.name, " on the device of ", first.name, " (", first.tensor.device(),
                    "), but got ", argument.tensor.device());
  TORCH_CHECK_VALUE(!same_dtype || argument.tensor.scalar_type() == first.tensor.scalar_type(),
                    argument.op, ": expected ", argument.name, " in the dtype of ", first.name,
                    " (", first.tensor.scalar_type(), "), but got ", argument.tensor.scalar_type());
}

void check_router_logits(const char* op, const at::Tensor& router_logits_x,
                         const at::Tensor& router_logits_y,
                         const c10::SymInt& num_experts_per_token) {
  const Argument x{op, "router_logits_x", router_logits_x};
  const Argument y{op, "router_logits_y", router_logits_y};
  check_rank(x, 2);
  check_rank(y, 2);
  check_floating(x);
  check_like(y, x);
  check_size(y, 0, router_logits_x.sym_size(0), "number of tokens of router_logits_x");
  const c10::SymInt num_rows = router_logits_x.sym_size(1), num_cols = router_logits_y.sym_size(1);
  TORCH_CHECK_VALUE(num_rows * num_cols <= std::numeric_limits<int32_t>::max(), op,
                    ": expected at most 2^31 - 1 experts, but the grid is ", num_rows, " x ",
                    num_cols);
  TORCH_CHECK_VALUE(num_experts_per_token >= 0 && num_experts_per_token <= num_rows * num_cols, op,
                    ": expected num_experts_per_token between 0 and the ", num_rows * num_cols,
                    " experts of the grid, but got ", num_experts_per_token);
}

void check_router_choice(const char* op, const Argument& grad, const Argument& indices) {
  check_rank(grad, 2);
  check_rank(indices, 2);
  check_floating(grad);
  TORCH_CHECK_VALUE(indices.tensor.scalar_type() == at::kInt, op, ": expected ", indices.name,
                    " to be int32, but got ", indices.tensor.scalar_type());
  check_like(indices, grad, /*same_dtype=*/false);
  check_size(indices, 0, grad.tensor.sym_size(0), "number of tokens of the gradient");
  check_size(indices, 1, grad.tensor.sym_size(1), "experts per token of the gradient");
}

void check_softmax_router_backward(const char* op, const at::Tensor& grad_routing_weights,
                                   const at::Tensor& router_logits_x,
                                   const at::Tensor& router_logits_y, const at::Tensor& indices) {
  const Argument x{op, "router_logits_x", router_logits_x};
  const Argument grad{op, "grad_routing_weights", grad_routing_weights};
  check_router_choice(op, grad, {op, "indices", indices});
  check_router_logits(op, router_logits_x, router_logits_y, indices.sym_size(1));
  check_like(grad, x);
  check_size(grad, 0, router_logits_x.sym_size(0), "number of tokens of router_logits_x");
}

void check_expert(const char* op, const at::Tensor& hidden_states, const at::Tensor& up_weights,
                  const at::Tensor& down_weights, const at::Tensor& routing_weights,
                  const at::Tensor& indices, const std::optional<at::Tensor>& addend,
                  const char* up_name, const char* down_name) {
  const Argument hidden{op, "hidden_states", hidden_states};
  const Argument up{op, up_name, up_weights};
  const Argument down{op, down_name, down_weights};
  const Argument routing{op, "routing_weights", routing_weights};
  const Argument ids{op, "indices", indices};
  for (const auto& argument : {hidden, up, down, routing, ids}) check_rank(argument, 2);
  check_floating(hidden);
  for (const auto& argument : {up, down, routing}) check_like(argument, hidden);
  check_integer(ids);
  check_like(ids, hidden, /*same_dtype=*/false);
  check_size(up, 1, hidden_states.sym_size(1), "hidden_size of hidden_states");
  check_size(down, 0, up_weights.sym_size(0),
             ("number of experts of " + std::string(up_name)).c_str());
  check_size(down, 1, hidden_states.sym_size(1), "hidden_size of hidden_states");
  check_size(ids, 0, hidden_states.sym_size(0), "number of tokens of hidden_states");
  check_size(routing, 0, hidden_states.sym_size(0), "number of tokens of hidden_states");
  check_size(routing, 1, indices.sym_size(1), "experts per token of indices");
  if (!addend) return;
  const Argument more{op, "addend", *addend};
  check_rank(more, 2);
  check_like(more, hidden);
  check_size(more, 0, hidden_states.sym_size(0), "number of tokens of hidden_states");
  check_size(more, 1, hidden_states.sym_size(1), "hidden_size of hidden_states");
}

void check_expert_backward(const char* op, const at::Tensor& grad_expert_states,
                           const at::Tensor& hidden_states, const at::Tensor& up_weights,
                           const at::Tensor& down_weights, const at::Tensor& routing_weights,
                           const at::Tensor& indices, const std::optional<at::Tensor>& scores,
                           const std::optional<at::Tensor>& addend) {
  check_expert(op, hidden_states, up_weights, down_weights, routing_weights, indices, addend);
  const Argument grad{op, "grad_expert_states", grad_expert_states};
  check_rank(grad, 2);
  check_like(grad, {op, "hidden_states", hidden_states});
  check_size(grad, 0, hidden_states.sym_size(0), "number of tokens of hidden_states");
  check_size(grad, 1, hidden_states.sym_size(1), "hidden_size of hidden_states");
  if (!scores) return;
  const Argument saved{op, "scores", *scores};
  check_rank(saved, 2);
  check_like(saved, {op, "hidden_states", hidden_states}, /*same_dtype=*/false);
  const auto dtype = accumulation_dtype(hidden_states.scalar_type());
  TORCH_CHECK_VALUE(scores->scalar_type() == dtype, op, ": expected scores to be ", dtype,
                    ", but got ", scores->scalar_type());
  check_size(saved, 0, hidden_states.sym_size(0), "number of tokens of hidden_states");
  check_size(saved, 1, indices.sym_size(1), "experts per token of indices");
}

void check_num_pairs_of_gradient(const Argument& indices) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(!indices.tensor.is_cuda() || indices.tensor.numel() <= kMost, indices.op,
                    ": expected ", indices.name, " to have at most ", kMost,
                    " elements for gradients on ", indices.tensor.device(), ", but got shape ",
                    indices.tensor.sizes(), " (", indices.tensor.numel(), ")");
}

at::ScalarType accumulation_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

void check_mlp(const char* op, const at::Tensor& x, const at::Tensor& gate_weight,
               const at::Tensor& up_weight, const at::Tensor& down_weight, const char* x_name) {
  const Argument input{op, x_name, x};
  const std::string hidden_size = "hidden_size of " + std::string(x_name);
  const Argument gate{op, "gate_weight", gate_weight};
  const Argument up{op, "up_weight", up_weight};
  const Argument down{op, "down_weight", down_weight};
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": expected ", x_name,
                    " to have at least 1 dimension, but got a scalar");
  check_floating(input);
  for (const auto& argument : {gate, up, down}) {
    check_rank(argument, 2);
    check_like(argument, input);
  }
  check_size(gate, 1, x.sym_size(-1), hidden_size.c_str());
  check_size(up, 0, gate_weight.sym_size(0), "intermediate_size of gate_weight");
  check_size(up, 1, x.sym_size(-1), hidden_size.c_str());
  check_size(down, 0, x.sym_size(-1), hidden_size.c_str());
  check_size(down, 1, gate_weight.sym_size(0), "intermediate_size of gate_weight");
}

void check_expert_mlp(const char* op, const at::Tensor& hidden_states, const at::Tensor& up_embed,
                      const at::Tensor& down_embed, const at::Tensor& routing_weights,
                      const at::Tensor& indices, const at::Tensor& gate_weight,
                      const at::Tensor& up_weight, const at::Tensor& down_weight) {
  check_expert(op, hidden_states, up_embed, down_embed, routing_weights, indices,
               /*addend=*/std::nullopt, "up_embed", "down_embed");
  check_mlp(op, hidden_states, gate_weight, up_weight, down_weight, "hidden_states");
}

void check_mlp_backward(const char* op, const at::Tensor& grad_output, const at::Tensor& x,
                        const at::Tensor& gate_weight, const at::Tensor& up_weight,
                        const at::Tensor& down_weight, const std::optional<at::Tensor>& gate,
                        const std::optional<at::Tensor>& up) {
  check_mlp(op, x, gate_weight, up_weight, down_weight);
  const auto check_leading = [&](const Argument& argument, const c10::SymInt& last,
                                 const char* meaning) {
    check_rank(argument, x.dim());
    check_like(argument, {op, "x", x});
    for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) {
      check_size(argument, dim, x.sym_size(dim), "same size of x");
    }
    check_size(argument, x.dim() - 1, last, meaning);
  };
  check_leading({op, "grad_output", grad_output}, x.sym_size(-1), "hidden_size of x");
  TORCH_CHECK_VALUE(gate.has_value() == up.has_value(), op,
                    ": expected gate and up both or neither, but got only ", gate ? "gate" : "up");
  if (!gate) return;
  check_leading({op, "gate", *gate}, gate_weight.sym_size(0), "intermediate_size of gate_weight");
  check_leading({op, "up", *up}, gate_weight.sym_size(0), "intermediate_size of gate_weight");
}

namespace {

// Running statistics of `num_columns` columns; `stats_dtype` is that of those seen so far.
void check_batch_norm_buffers(const Argument& logits, const BatchNormBufferArguments& buffers,
                              const c10::SymInt& num_columns, bool training,
                              std::optional<at::ScalarType>& stats_dtype) {
  const char* op = logits.op;
  const std::string mean_name = std::string("running_mean_") + buffers.axis;
  const std::string var_name = std::string("running_var_") + buffers.axis;
  const std::string count_name = std::string("num_batches_tracked_") + buffers.axis;
  TORCH_CHECK_VALUE(buffers.running_mean.has_value() == buffers.running_var.has_value(), op,
                    ": expected ", mean_name, " and ", var_name, " both or neither, but got only ",
                    buffers.running_mean ? mean_name : var_name);
  TORCH_CHECK_VALUE(training || buffers.running_mean, op, ": expected ", mean_name, " and ",
                    var_name, " unless training, but got None");
  if (buffers.num_batches_tracked) {
    const Argument count{op, count_name.c_str(), *buffers.num_batches_tracked};
    check_rank(count, 0);
    check_like(count, logits, /*same_dtype=*/false);
    TORCH_CHECK_VALUE(count.tensor.scalar_type() == at::kLong, op, ": expected ", count_name,
                      " to be int64, but got ", count.tensor.scalar_type());
  }
  if (!buffers.running_mean) return;
  for (const Argument& stat : {Argument{op, mean_name.c_str(), *buffers.running_mean},
                               Argument{op, var_name.c_str(), *buffers.running_var}}) {
    check_rank(stat, 1);
    check_size(stat, 0, num_columns, "number of logits of its axis");
    check_like(stat, logits, /*same_dtype=*/false);
    const auto dtype = stat.tensor.scalar_type(), own = logits.tensor.scalar_type();
    TORCH_CHECK_VALUE(dtype == own || dtype == accumulation_dtype(own), op, ": expected ",
                      stat.name, " to be ", accumulation_dtype(own), " or in the dtype of ",
                      logits.name, " (", own, "), but got ", dtype);
    if (!stats_dtype) stats_dtype = dtype;
    TORCH_CHECK_VALUE(dtype == *stats_dtype, op, ": expected the running statistics in one dtype (",
                      *stats_dtype, "), but got ", dtype, " for ", stat.name);
  }
}

// Of a BatchNorm of both axes over `tokens`.
void check_batch_norm_options(const Argument& tokens, const c10::SymInt& num_rows,
                              const c10::SymInt& num_cols, const BatchNormBufferArguments& x,
                              const BatchNormBufferArguments& y, bool training, double eps) {
  TORCH_CHECK_VALUE(eps > 0, tokens.op, ": expected eps to be positive, but got ", eps);
  // PyTorch's own words: the layer has always raised them.
  TORCH_CHECK_VALUE(!training || tokens.tensor.sym_size(0) != 1, tokens.op,
                    ": Expected more than 1 value per channel when training, but got ", tokens.name,
                    " of shape ", tokens.tensor.sym_sizes());
  std::optional<at::ScalarType> stats_dtype;
  check_batch_norm_buffers(tokens, x, num_rows, training, stats_dtype);
  check_batch_norm_buffers(tokens, y, num_cols, training, stats_dtype);
}

}  // namespace

void check_batch_norm(const char* op, const at::Tensor& router_logits, const c10::SymInt& num_rows,
                      const BatchNormBufferArguments& x, const BatchNormBufferArguments& y,
                      bool training, double eps) {
  const Argument logits{op, "router_logits", router_logits};
  check_rank(logits, 2);
  check_floating(logits);
  const c10::SymInt width = router_logits.sym_size(1);
  TORCH_CHECK_VALUE(num_rows >= 1 && num_rows < width, op, ": expected num_rows between 1 and ",
                    width - 1, ", one less than the width of router_logits, but got ", num_rows);
  check_batch_norm_options(logits, num_rows, width - num_rows, x, y, training, eps);
}

namespace {

// hidden_states (T, H), gate_x (R, H), gate_y (C, H).
void check_router_gates(const char* op, const at::Tensor& hidden_states, const at::Tensor& gate_x,
                        const at::Tensor& gate_y) {
  const Argument hidden{op, "hidden_states", hidden_states};
  check_rank(hidden, 2);
  check_floating(hidden);
  for (const Argument& gate : {Argument{op, "gate_x", gate_x}, Argument{op, "gate_y", gate_y}}) {
    check_rank(gate, 2);
    check_like(gate, hidden);
    TORCH_CHECK_VALUE(gate.tensor.sym_size(0) >= 1, op, ": expected ", gate.name,
                      " to have rows, but got shape ", gate.tensor.sym_sizes());
    check_size(gate, 1, hidden_states.sym_size(1), "hidden_size of hidden_states");
  }
}

}  // namespace

void check_normed_router_logits(const char* op, const at::Tensor& hidden_states,
                                const at::Tensor& gate_x, const at::Tensor& gate_y,
                                const BatchNormBufferArguments& x,
                                const BatchNormBufferArguments& y, bool training, double eps) {
  check_router_gates(op, hidden_states, gate_x, gate_y);
  check_batch_norm_options({op, "hidden_states", hidden_states}, gate_x.sym_size(0),
                           gate_y.sym_size(0), x, y, training, eps);
}

namespace {

// Gradients (T, R) and (T, C) of a BatchNorm's outputs, these, and its 1 / sqrt(var + eps).
void check_normed(const Argument& grad_x, const Argument& grad_y, const Argument& x,
                  const Argument& y, const at::Tensor& inv_std) {
  const std::string of_x = std::string(" of ") + x.name, of_y = std::string(" of ") + y.name;
  for (const auto& argument : {x, y, grad_x, grad_y}) check_rank(argument, 2);
  check_floating(x);
  for (const auto& argument : {y, grad_x, grad_y}) {
    check_like(argument, x);
    check_size(argument, 0, x.tensor.sym_size(0), ("number of tokens" + of_x).c_str());
  }
  check_size(grad_x, 1, x.tensor.sym_size(1), ("number of rows" + of_x).c_str());
  check_size(grad_y, 1, y.tensor.sym_size(1), ("number of columns" + of_y).c_str());
  const Argument scale{x.op, "inv_std", inv_std};
  check_rank(scale, 1);
  check_like(scale, x, /*same_dtype=*/false);
  const auto dtype = accumulation_dtype(x.tensor.scalar_type());
  TORCH_CHECK_VALUE(inv_std.scalar_type() == dtype, x.op, ": expected inv_std to be ", dtype,
                    ", but got ", inv_std.scalar_type());
  check_size(scale, 0, x.tensor.sym_size(1) + y.tensor.sym_size(1), "width of both axes");
}

}  // namespace

void check_batch_norm_backward(const char* op, const at::Tensor& grad_normed_x,
                               const at::Tensor& grad_normed_y, const at::Tensor& normed_x,
                               const at::Tensor& normed_y, const at::Tensor& inv_std) {
  check_normed({op, "grad_normed_x", grad_normed_x}, {op, "grad_normed_y", grad_normed_y},
               {op, "normed_x", normed_x}, {op, "normed_y", normed_y}, inv_std);
}

void check_router_logits_backward(const char* op, const at::Tensor& grad_router_logits_x,
                                  const at::Tensor& grad_router_logits_y,
                                  const at::Tensor& hidden_states, const at::Tensor& gate_x,
                                  const at::Tensor& gate_y, const at::Tensor& router_logits_x,
                                  const at::Tensor& router_logits_y, const at::Tensor& inv_std) {
  check_router_gates(op, hidden_states, gate_x, gate_y);
  const Argument x{op, "router_logits_x", router_logits_x};
  const Argument y{op, "router_logits_y", router_logits_y};
  check_normed({op, "grad_router_logits_x", grad_router_logits_x},
               {op, "grad_router_logits_y", grad_router_logits_y}, x, y, inv_std);
  check_like(x, {op, "hidden_states", hidden_states});
  check_size(x, 0, hidden_states.sym_size(0), "number of tokens of hidden_states");
  check_size(x, 1, gate_x.sym_size(0), "number of rows of gate_x");
  check_size(y, 1, gate_y.sym_size(0), "number of rows of gate_y");
}

namespace {
std::atomic<int64_t> num_index_check_scopes{0};
}

void begin_index_checks() { ++num_index_check_scopes; }
void end_index_checks() { --num_index_check_scopes; }
bool index_checks_are_on() { return num_index_check_scopes > 0; }

void check_indices(const char* op, const at::Tensor& indices, int64_t num_experts) {
  if (!indices.is_cpu() && !index_checks_are_on()) return;
  const at::Tensor host = indices.cpu().contiguous();
  const int64_t position = cpu::find_invalid_index(host.const_data_ptr(), to_index_type(host),
                                                   host.numel(), num_experts);
  if (position < 0) return;
  const int64_t k = host.size(1);
  TORCH_CHECK_INDEX(false, op, ": expected indices in [0, ", num_experts, "), but got ",
                    host.flatten()[position].item<int64_t>(), " at indices[", position / k, ", ",
                    position % k, "]");
}

Activation parse_activation(const char* op, std::string_view name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "identity") return Activation::kIdentity;
  TORCH_CHECK_VALUE(false, op, ": expected activation to be one of silu, gelu, gelu_tanh, relu, ",
                    "identity, but got '", name, "'");
}

DType to_dtype(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kDouble:
      return DType::kFloat64;
    default:
      TORCH_CHECK_VALUE(false, "omni_moe: unsupported dtype ", tensor.scalar_type());
  }
}

IndexType to_index_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kInt ? IndexType::kInt32 : IndexType::kInt64;
}

}  // namespace omni_moe::torch_api
