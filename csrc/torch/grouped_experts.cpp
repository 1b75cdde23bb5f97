// The parts of experts that are MLPs: a linear layer by expert over rows in expert order, which is
// PyTorch's grouped GEMM where that runs without waiting for the device, and act(gate) * up of the
// halves of its output.
#include <algorithm>
#include <string>

#include "backend.h"
#include "checks.h"
#include "omni_moe/mlp.h"
#include "ops.h"

// ---- Schemas -----------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  // rows (N, H), weight (E, O, H), expert_ends (E) int32, ascending -> (N, O). Rows behind the last
  // end hold anything, in outputs and gradients, and are not looked at.
  m.def("_omni_grouped_linear(Tensor rows, Tensor weight, Tensor expert_ends) -> Tensor output");
  // A gradient that output_mask does not ask for comes back empty.
  m.def(
      "_omni_grouped_linear_backward(Tensor grad_output, Tensor rows, Tensor weight, "
      "Tensor expert_ends, bool[2] output_mask) -> (Tensor grad_rows, Tensor grad_weight)");
  // (N, 2I), gate before up -> (N, I).
  m.def("_omni_gated_activation(Tensor gate_up, str activation) -> Tensor activated");
  m.def(
      "_omni_gated_activation_backward(Tensor grad_activated, Tensor gate_up, str activation) "
      "-> Tensor grad_gate_up");
}

namespace omni_moe::torch_api {

namespace {

using Pair = std::tuple<Tensor, Tensor>;

// ---- Outputs -----------------------------------------------------------------------------------

void check_grouped_linear(const char* op, const Tensor& rows, const Tensor& weight,
                          const Tensor& expert_ends) {
  const Argument input{op, "rows", rows}, table{op, "weight", weight},
      ends{op, "expert_ends", expert_ends};
  check_rank(input, 2);
  check_floating(input);
  check_rank(table, 3);
  check_like(table, input);
  check_size(table, 2, rows.sym_size(1), "width of rows");
  check_rank(ends, 1);
  check_dtype(ends, at::kInt);
  check_like(ends, input, /*same_dtype=*/false);
  check_size(ends, 0, weight.sym_size(0), "number of experts of weight");
}

Tensor grouped_linear_outputs(const Tensor& rows, const Tensor& weight, const Tensor& expert_ends) {
  check_grouped_linear(omni_grouped_linear.name, rows, weight, expert_ends);
  const c10::SymInt sizes[] = {rows.sym_size(0), weight.sym_size(1)};
  return at::empty_symint(sizes, rows.options());
}

void check_grouped_linear_backward(const Tensor& grad_output, const Tensor& rows,
                                   const Tensor& weight, const Tensor& expert_ends) {
  const char* op = omni_grouped_linear_backward.name;
  const Argument grad{op, "grad_output", grad_output};
  check_grouped_linear(op, rows, weight, expert_ends);
  check_rank(grad, 2);
  check_like(grad, {op, "rows", rows});
  check_size(grad, 0, rows.sym_size(0), "number of rows of rows");
  check_size(grad, 1, weight.sym_size(1), "output size of weight");
}

// The meta kernel alone: gradients of a grouped GEMM are its own outputs.
Pair grouped_linear_backward_outputs(const Tensor& grad_output, const Tensor& rows,
                                     const Tensor& weight, const Tensor& expert_ends,
                                     Mask<2> output_mask) {
  check_grouped_linear_backward(grad_output, rows, weight, expert_ends);
  return {empty_if(output_mask[0], rows.sym_sizes(), rows.options()),
          empty_if(output_mask[1], weight.sym_sizes(), weight.options())};
}

Tensor gated_activation_outputs(const Tensor& gate_up, std::string_view activation) {
  const Argument input{omni_gated_activation.name, "gate_up", gate_up};
  parse_activation(input.op, activation);
  check_rank(input, 2);
  check_floating(input);
  TORCH_CHECK_VALUE(gate_up.sym_size(1) % 2 == 0, input.op,
                    ": expected gate_up to have an even number of columns, but got ",
                    gate_up.sym_size(1));
  const c10::SymInt sizes[] = {gate_up.sym_size(0), gate_up.sym_size(1) / 2};
  return at::empty_symint(sizes, gate_up.options());
}

Tensor gated_activation_backward_outputs(const Tensor& grad_activated, const Tensor& gate_up,
                                         std::string_view activation) {
  const char* op = omni_gated_activation_backward.name;
  const Argument input{op, "gate_up", gate_up}, grad{op, "grad_activated", grad_activated};
  parse_activation(op, activation);
  check_rank(input, 2);
  check_floating(input);
  check_rank(grad, 2);
  check_like(grad, input);
  check_size(grad, 0, gate_up.sym_size(0), "number of rows of gate_up");
  check_size(input, 1, grad_activated.sym_size(1) * 2, "columns of gate and up");
  return at::empty_symint(gate_up.sym_sizes(), gate_up.options());
}

// ---- Grouped linear ----------------------------------------------------------------------------

// PyTorch's grouped GEMM on a GPU is one kernel for bf16, and asks for strides and addresses of 16
// bytes. For other dtypes it is a loop over experts that waits for the ends, as below.
bool takes_grouped_mm(const Tensor& rows, const Tensor& weight) {
  if (!rows.is_cuda() || rows.scalar_type() != at::kBFloat16) return false;
  if (rows.numel() == 0 || weight.numel() == 0) return false;
  const auto is_aligned = [](const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  };
  constexpr int64_t kVec = 8;
  const bool by_rows = weight.stride(2) == 1 && weight.stride(1) >= weight.size(2);
  const bool by_columns = weight.stride(1) == 1 && weight.stride(2) >= weight.size(1);
  return weight.size(1) % kVec == 0 && weight.size(2) % kVec == 0 && (by_rows || by_columns) &&
         weight.stride(0) % kVec == 0 && weight.stride(by_rows ? 1 : 2) % kVec == 0 &&
         is_aligned(rows) && is_aligned(weight);
}

// body(expert, first row, rows) for each expert; returns the last end. Waits for the device.
template <typename Body>
int64_t for_each_group(const char* op, const Tensor& expert_ends, int64_t num_rows, Body&& body) {
  const Tensor host = expert_ends.cpu().contiguous();
  const int32_t* ends = host.const_data_ptr<int32_t>();
  int64_t begin = 0;
  for (int64_t e = 0; e < host.numel(); ++e) {
    TORCH_CHECK_VALUE(ends[e] >= begin && ends[e] <= num_rows, op,
                      ": expected expert_ends to ascend up to the ", num_rows, " rows, but got ",
                      ends[e], " at expert ", e);
    body(e, begin, ends[e] - begin);
    begin = ends[e];
  }
  return begin;
}

// output = rows of each expert times its matrix (E, H, O); zeros behind the last row.
Tensor grouped_product(const char* op, const Tensor& rows, const Tensor& matrices,
                       const Tensor& expert_ends) {
  const Tensor output = at::empty({rows.size(0), matrices.size(2)}, rows.options());
  const int64_t end =
      for_each_group(op, expert_ends, rows.size(0), [&](int64_t e, int64_t first, int64_t count) {
        if (count == 0) return;
        Tensor part = output.narrow(0, first, count);
        at::mm_out(part, rows.narrow(0, first, count), matrices.select(0, e));
      });
  output.narrow(0, end, rows.size(0) - end).zero_();
  return output;
}

Tensor grouped_linear_kernel(const Tensor& rows, const Tensor& weight, const Tensor& expert_ends) {
  const char* op = omni_grouped_linear.name;
  check_grouped_linear(op, rows, weight, expert_ends);
  const Tensor input = rows.contiguous(), matrices = weight.transpose(1, 2);
  if (takes_grouped_mm(input, weight)) {
    return at::_grouped_mm(input, matrices, expert_ends.contiguous());
  }
  return grouped_product(op, input, matrices, expert_ends);
}

Pair grouped_linear_backward_kernel(const Tensor& grad_output, const Tensor& rows,
                                    const Tensor& weight, const Tensor& expert_ends,
                                    Mask<2> output_mask) {
  const char* op = omni_grouped_linear_backward.name;
  check_grouped_linear_backward(grad_output, rows, weight, expert_ends);
  const Tensor grad = grad_output.contiguous(), input = rows.contiguous();
  Tensor grad_rows = at::empty({0}, rows.options()), grad_weight = at::empty({0}, rows.options());
  if (takes_grouped_mm(input, weight) && takes_grouped_mm(grad, weight)) {
    const Tensor ends = expert_ends.contiguous();
    if (output_mask[0]) grad_rows = at::_grouped_mm(grad, weight, ends);
    if (output_mask[1]) grad_weight = at::_grouped_mm(grad.t(), input, ends);
    return {grad_rows, grad_weight};
  }
  if (output_mask[0]) grad_rows = grouped_product(op, grad, weight, expert_ends);
  if (output_mask[1]) {
    grad_weight = at::zeros(weight.sizes(), weight.options());
    for_each_group(op, expert_ends, rows.size(0), [&](int64_t e, int64_t first, int64_t count) {
      if (count == 0) return;
      Tensor part = grad_weight.select(0, e);
      at::mm_out(part, grad.narrow(0, first, count).t(), input.narrow(0, first, count));
    });
  }
  return {grad_rows, grad_weight};
}

// ---- Gated activation --------------------------------------------------------------------------

void* at_column(const Tensor& matrix, int64_t column) {
  return static_cast<char*>(matrix.mutable_data_ptr()) + column * matrix.element_size();
}
const void* at_column_of_input(const Tensor& matrix, int64_t column) {
  return static_cast<const char*>(matrix.const_data_ptr()) + column * matrix.element_size();
}

Tensor gated_activation_kernel(const Tensor& gate_up, std::string_view activation) {
  const Tensor activated = gated_activation_outputs(gate_up, activation);
  const Tensor input = gate_up.contiguous();
  const int64_t size = activated.size(1);
  launch(GatedActivationForwardParams{.gate = at_column_of_input(input, 0),
                                      .up = at_column_of_input(input, size),
                                      .activated = activated.mutable_data_ptr(),
                                      .num_tokens = activated.size(0),
                                      .intermediate_size = size,
                                      .gate_stride = 2 * size,
                                      .up_stride = 2 * size,
                                      .dtype = to_dtype(input),
                                      .activation =
                                          parse_activation(omni_gated_activation.name, activation)},
         input.device());
  return activated;
}

Tensor gated_activation_backward_kernel(const Tensor& grad_activated, const Tensor& gate_up,
                                        std::string_view activation) {
  const Tensor grads = gated_activation_backward_outputs(grad_activated, gate_up, activation);
  const Tensor input = gate_up.contiguous(), grad = grad_activated.contiguous();
  const int64_t size = grad.size(1);
  launch(GatedActivationBackwardParams{.grad_activated = grad.const_data_ptr(),
                                       .gate = at_column_of_input(input, 0),
                                       .up = at_column_of_input(input, size),
                                       .grad_gate = at_column(grads, 0),
                                       .grad_up = at_column(grads, size),
                                       .activated = nullptr,
                                       .num_tokens = grad.size(0),
                                       .intermediate_size = size,
                                       .gate_stride = 2 * size,
                                       .up_stride = 2 * size,
                                       .grad_gate_stride = 2 * size,
                                       .grad_up_stride = 2 * size,
                                       .dtype = to_dtype(input),
                                       .activation = parse_activation(
                                           omni_gated_activation_backward.name, activation)},
         input.device());
  return grads;
}

// ---- Gradients ---------------------------------------------------------------------------------

struct OmniGroupedLinearBackward : Function<OmniGroupedLinearBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& rows, const Tensor& weight,
                               const Tensor& expert_ends) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({rows, weight, expert_ends});
    return {omni_grouped_linear(rows, weight, expert_ends)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto guard = without_autocast();
    const auto saved = ctx->get_saved_variables();
    const Mask<2> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    auto [grad_rows, grad_weight] =
        omni_grouped_linear_backward(grads[0], saved[0], saved[1], saved[2], mask);
    return {if_wanted(mask[0], grad_rows), if_wanted(mask[1], grad_weight), Tensor()};
  }
};

struct OmniGatedActivationBackward : Function<OmniGatedActivationBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& gate_up,
                               std::string_view activation) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({gate_up});
    ctx->saved_data["activation"] = std::string(activation);
    return {omni_gated_activation(gate_up, activation)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    return {omni_gated_activation_backward(grads[0], saved[0],
                                           ctx->saved_data["activation"].toStringRef()),
            Tensor()};
  }
};

// ---- Registration ------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  register_kernels(m, omni_grouped_linear, grouped_linear_outputs, grouped_linear_kernel);
  register_gradient<omni_grouped_linear, OmniGroupedLinearBackward>(m);
  register_autocast<omni_grouped_linear, AutocastTo::kAutocastDtype>(m);

  register_kernels(m, omni_grouped_linear_backward, grouped_linear_backward_outputs,
                   grouped_linear_backward_kernel);
  register_no_gradient(m, omni_grouped_linear_backward);

  register_kernels(m, omni_gated_activation, gated_activation_outputs, gated_activation_kernel);
  register_gradient<omni_gated_activation, OmniGatedActivationBackward>(m);

  register_kernels(m, omni_gated_activation_backward, gated_activation_backward_outputs,
                   gated_activation_backward_kernel);
  register_no_gradient(m, omni_gated_activation_backward);
}

}  // namespace

}  // namespace omni_moe::torch_api
