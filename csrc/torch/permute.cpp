// Tokens into expert order and back: the rows of pairs, the permutation, and the weighted sum that
// undoes it.
#include "omni_moe/permute.h"

#include "backend.h"
#include "checks.h"
#include "ops.h"

// ---- Schemas -----------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  // ids and slots (T, K) -> (T, K) int32, (E) int32.
  m.def(
      "omni_expert_rows(Tensor indices, SymInt num_experts, Tensor? slots=None, "
      "SymInt? capacity=None) -> (Tensor row_id_map, Tensor expert_ends)");
  // tokens (T, H), row_id_map (T, K) int32, expert_ends (E) int32 -> (N, H).
  m.def(
      "omni_permute(Tensor tokens, Tensor row_id_map, Tensor expert_ends, SymInt num_rows, "
      "bool padded=False) -> Tensor rows");
  // rows (N, H), weights (T, K) in the dtype of the rows or in that of its sums -> (T, H).
  m.def(
      "omni_unpermute(Tensor rows, Tensor row_id_map, Tensor expert_ends, Tensor? weights=None, "
      "bool padded=False) -> Tensor tokens");
  // A gradient that output_mask does not ask for comes back empty.
  m.def(
      "_omni_unpermute_backward(Tensor grad_tokens, Tensor rows, Tensor row_id_map, "
      "Tensor expert_ends, Tensor weights, bool padded, bool[2] output_mask) "
      "-> (Tensor grad_rows, Tensor grad_weights)");
}

namespace omni_moe::torch_api {

namespace {

using Pair = std::tuple<Tensor, Tensor>;

constexpr int64_t kMaxExperts = 4096;  // a block's counts of them fit in shared memory

// ---- Outputs -----------------------------------------------------------------------------------

Pair expert_rows_outputs(const Tensor& indices, c10::SymInt num_experts,
                         const OptionalTensor& slots, const std::optional<c10::SymInt>& capacity) {
  const char* op = omni_expert_rows.name;
  const Argument ids{op, "indices", indices};
  check_rank(ids, 2);
  check_integer(ids);
  TORCH_CHECK_VALUE(num_experts >= 0 && num_experts <= kMaxExperts, op,
                    ": expected num_experts between 0 and ", kMaxExperts, ", but got ",
                    num_experts);
  check_fits_int32(op, indices.sym_numel(), "indices");  // rows are int32
  if (slots) {
    const Argument places{op, "slots", *slots};
    check_rank(places, 2);
    check_dtype(places, at::kInt);
    check_like(places, ids, /*same_dtype=*/false);
    check_size(places, 0, indices.sym_size(0), "number of tokens of indices");
    check_size(places, 1, indices.sym_size(1), "experts per token of indices");
  }
  if (capacity) {
    TORCH_CHECK_VALUE(*capacity >= 0, op, ": expected capacity >= 0, but got ", *capacity);
    check_fits_int32(op, *capacity * num_experts, "rows of all experts");
  }
  const c10::SymInt experts[] = {std::move(num_experts)};
  const auto options = indices.options().dtype(at::kInt);
  return {at::empty_symint(indices.sym_sizes(), options), at::empty_symint(experts, options)};
}

// What both ways have in common: (T, K) and (E) int32 beside rows or tokens of `first`.
void check_maps(const Tensor& row_id_map, const Tensor& expert_ends, const Argument& first) {
  for (const auto& [argument, rank] :
       {std::pair{Argument{first.op, "row_id_map", row_id_map}, 2},
        std::pair{Argument{first.op, "expert_ends", expert_ends}, 1}}) {
    check_rank(argument, rank);
    check_dtype(argument, at::kInt);
    check_like(argument, first, /*same_dtype=*/false);
  }
}

void check_padding(const char* op, const c10::SymInt& num_rows, const Tensor& expert_ends,
                   bool padded) {
  const c10::SymInt num_experts = expert_ends.sym_size(0);
  TORCH_CHECK_VALUE(num_rows >= 0, op, ": expected num_rows >= 0, but got ", num_rows);
  check_fits_int32(op, num_rows, "rows");
  TORCH_CHECK_VALUE(!padded || (num_experts > 0 && num_rows % num_experts == 0), op,
                    ": expected a number of rows that the ", num_experts,
                    " experts divide if padded, but got ", num_rows);
}

Tensor permute_outputs(const Tensor& tokens, const Tensor& row_id_map, const Tensor& expert_ends,
                       c10::SymInt num_rows, bool padded) {
  const Argument input{omni_permute.name, "tokens", tokens};
  check_rank(input, 2);
  check_floating(input);
  check_maps(row_id_map, expert_ends, input);
  check_size({input.op, "row_id_map", row_id_map}, 0, tokens.sym_size(0),
             "number of tokens of tokens");
  check_padding(input.op, num_rows, expert_ends, padded);
  const c10::SymInt sizes[] = {std::move(num_rows), tokens.sym_size(1)};
  return at::empty_symint(sizes, tokens.options());
}

// The weights' dtype: that of the rows, or the one in which rows are summed.
void check_weights(const Tensor& weights, const Tensor& row_id_map, const Argument& rows) {
  const Argument argument{rows.op, "weights", weights};
  check_rank(argument, 2);
  check_like(argument, rows, /*same_dtype=*/false);
  const auto dtype = rows.tensor.scalar_type(), wide = accumulation_dtype(dtype);
  TORCH_CHECK_VALUE(weights.scalar_type() == dtype || weights.scalar_type() == wide, rows.op,
                    ": expected weights in the dtype of rows (", dtype, ") or ", wide, ", but got ",
                    weights.scalar_type());
  check_size(argument, 0, row_id_map.sym_size(0), "number of tokens of row_id_map");
  check_size(argument, 1, row_id_map.sym_size(1), "experts per token of row_id_map");
}

Tensor unpermute_outputs(const Tensor& rows, const Tensor& row_id_map, const Tensor& expert_ends,
                         const OptionalTensor& weights, bool padded) {
  const Argument input{omni_unpermute.name, "rows", rows};
  check_rank(input, 2);
  check_floating(input);
  check_maps(row_id_map, expert_ends, input);
  check_padding(input.op, rows.sym_size(0), expert_ends, padded);
  if (weights) check_weights(*weights, row_id_map, input);
  const c10::SymInt sizes[] = {row_id_map.sym_size(0), rows.sym_size(1)};
  return at::empty_symint(sizes, rows.options());
}

Pair unpermute_backward_outputs(const Tensor& grad_tokens, const Tensor& rows,
                                const Tensor& row_id_map, const Tensor& expert_ends,
                                const Tensor& weights, bool padded, Mask<2> output_mask) {
  const char* op = omni_unpermute_backward.name;
  const Argument input{op, "rows", rows}, grad{op, "grad_tokens", grad_tokens};
  check_rank(input, 2);
  check_floating(input);
  check_maps(row_id_map, expert_ends, input);
  check_padding(op, rows.sym_size(0), expert_ends, padded);
  check_weights(weights, row_id_map, input);
  check_rank(grad, 2);
  check_like(grad, input);
  check_size(grad, 0, row_id_map.sym_size(0), "number of tokens of row_id_map");
  check_size(grad, 1, rows.sym_size(1), "hidden_size of rows");
  return {empty_if(output_mask[0], rows.sym_sizes(), rows.options()),
          empty_if(output_mask[1], weights.sym_sizes(), weights.options())};
}

// ---- Kernels -----------------------------------------------------------------------------------

Pair expert_rows_kernel(const Tensor& indices, c10::SymInt num_experts, const OptionalTensor& slots,
                        const std::optional<c10::SymInt>& capacity) {
  auto outputs = expert_rows_outputs(indices, num_experts, slots, capacity);
  auto& [row_id_map, expert_ends] = outputs;
  Tensor ids = indices.contiguous();
  check_indices(omni_expert_rows.name, ids, expert_ends.size(0), /*lowest=*/-1);
  ids = ids.to(at::kInt);
  const Tensor places = slots ? slots->contiguous() : Tensor();
  launch(ExpertRowsParams{.indices = ids.const_data_ptr<int32_t>(),
                          .slots = slots ? places.const_data_ptr<int32_t>() : nullptr,
                          .row_id_map = row_id_map.mutable_data_ptr<int32_t>(),
                          .expert_ends = expert_ends.mutable_data_ptr<int32_t>(),
                          .num_pairs = ids.numel(),
                          .num_experts = expert_ends.size(0),
                          .capacity = capacity ? capacity->expect_int() : -1},
         ids.device());
  return outputs;
}

PermuteShape shape_of(const Tensor& tokens, const Tensor& rows, const Tensor& row_id_map,
                      const Tensor& expert_ends, bool padded, const OptionalTensor& weights) {
  return {.num_tokens = tokens.size(0),
          .num_rows = rows.size(0),
          .hidden_size = rows.size(1),
          .num_experts_per_token = row_id_map.size(1),
          .num_experts = expert_ends.size(0),
          .is_padded = padded,
          .dtype = to_dtype(rows),
          .has_wide_weights = weights && weights->scalar_type() != rows.scalar_type()};
}

// Row ids, contiguous and checked.
Tensor checked_map(const char* op, const Tensor& row_id_map, int64_t num_rows) {
  const Tensor map = row_id_map.contiguous();
  check_indices(op, map, num_rows, /*lowest=*/-1, "row_id_map");
  return map;
}

// rows = tokens in expert order, times weights unless these are null.
void run_permute(const char* op, const Tensor& tokens, const Tensor& row_id_map,
                 const Tensor& expert_ends, const OptionalTensor& weights, bool padded,
                 const Tensor& rows) {
  const Tensor input = tokens.contiguous(), ends = expert_ends.contiguous(),
               map = checked_map(op, row_id_map, rows.size(0)),
               factors = weights ? weights->contiguous() : Tensor();
  PermuteParams params{shape_of(input, rows, map, ends, padded, weights)};
  params.tokens = input.const_data_ptr();
  params.row_id_map = map.const_data_ptr<int32_t>();
  params.expert_ends = ends.const_data_ptr<int32_t>();
  if (weights) params.weights = factors.const_data_ptr();
  params.rows = rows.mutable_data_ptr();
  launch(params, rows.device());
}

Tensor permute_kernel(const Tensor& tokens, const Tensor& row_id_map, const Tensor& expert_ends,
                      c10::SymInt num_rows, bool padded) {
  const Tensor rows = permute_outputs(tokens, row_id_map, expert_ends, std::move(num_rows), padded);
  run_permute(omni_permute.name, tokens, row_id_map, expert_ends, {}, padded, rows);
  return rows;
}

Tensor unpermute_kernel(const Tensor& rows, const Tensor& row_id_map, const Tensor& expert_ends,
                        const OptionalTensor& weights, bool padded) {
  const Tensor tokens = unpermute_outputs(rows, row_id_map, expert_ends, weights, padded);
  const Tensor input = rows.contiguous(),
               map = checked_map(omni_unpermute.name, row_id_map, rows.size(0)),
               factors = weights ? weights->contiguous() : Tensor();
  UnpermuteParams params{shape_of(tokens, input, map, expert_ends, padded, weights)};
  params.rows = input.const_data_ptr();
  params.row_id_map = map.const_data_ptr<int32_t>();
  if (weights) params.weights = factors.const_data_ptr();
  params.tokens = tokens.mutable_data_ptr();
  launch(params, input.device());
  return tokens;
}

Pair unpermute_backward_kernel(const Tensor& grad_tokens, const Tensor& rows,
                               const Tensor& row_id_map, const Tensor& expert_ends,
                               const Tensor& weights, bool padded, Mask<2> output_mask) {
  const char* op = omni_unpermute_backward.name;
  auto outputs = unpermute_backward_outputs(grad_tokens, rows, row_id_map, expert_ends, weights,
                                            padded, output_mask);
  auto& [grad_rows, grad_weights] = outputs;
  if (!output_mask[1]) {  // without the dots the rows need not be read
    if (output_mask[0]) {
      run_permute(op, grad_tokens, row_id_map, expert_ends, weights, padded, grad_rows);
    }
    return outputs;
  }
  const Tensor grad = grad_tokens.contiguous(), input = rows.contiguous(),
               ends = expert_ends.contiguous(), factors = weights.contiguous(),
               map = checked_map(op, row_id_map, rows.size(0));
  UnpermuteBackwardParams params{shape_of(grad, input, map, ends, padded, weights)};
  params.grad_tokens = grad.const_data_ptr();
  params.rows = input.const_data_ptr();
  params.weights = factors.const_data_ptr();
  params.row_id_map = map.const_data_ptr<int32_t>();
  params.expert_ends = ends.const_data_ptr<int32_t>();
  if (output_mask[0]) params.grad_rows = grad_rows.mutable_data_ptr();
  params.grad_weights = grad_weights.mutable_data_ptr();
  launch(params, input.device());
  return outputs;
}

// ---- Gradients ---------------------------------------------------------------------------------

struct OmniPermuteBackward : Function<OmniPermuteBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& tokens, const Tensor& row_id_map,
                               const Tensor& expert_ends, const c10::SymInt& num_rows,
                               bool padded) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({row_id_map, expert_ends});
    ctx->saved_data["padded"] = padded;
    return {omni_permute(tokens, row_id_map, expert_ends, num_rows, padded)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto guard = without_autocast();
    const auto saved = ctx->get_saved_variables();
    variable_list input_grads(5);
    input_grads[0] = omni_unpermute(grads[0], saved[0], saved[1], /*weights=*/{},
                                    ctx->saved_data["padded"].toBool());
    return input_grads;
  }
};

struct OmniUnpermuteBackward : Function<OmniUnpermuteBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& rows, const Tensor& row_id_map,
                               const Tensor& expert_ends, const OptionalTensor& weights,
                               bool padded) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    // Without weights the gradient reads nothing of the rows.
    const auto weights_or_none = weights.value_or(Tensor());
    ctx->save_for_backward({weights ? rows : Tensor(), row_id_map, expert_ends, weights_or_none});
    ctx->saved_data["padded"] = padded;
    ctx->saved_data["num_rows"] = rows.sym_size(0);
    return {omni_unpermute(rows, row_id_map, expert_ends, weights, padded)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto guard = without_autocast();
    const auto saved = ctx->get_saved_variables();
    const bool padded = ctx->saved_data["padded"].toBool();
    variable_list input_grads(5);
    if (!saved[3].defined()) {
      input_grads[0] = omni_permute(grads[0], saved[1], saved[2],
                                    ctx->saved_data["num_rows"].toSymInt(), padded);
      return input_grads;
    }
    const Mask<2> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(3)};
    auto [grad_rows, grad_weights] =
        omni_unpermute_backward(grads[0], saved[0], saved[1], saved[2], saved[3], padded, mask);
    input_grads[0] = if_wanted(mask[0], grad_rows);
    input_grads[3] = if_wanted(mask[1], grad_weights);
    return input_grads;
  }
};

// ---- Registration ------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(omni_moe, m) {
  register_kernels(m, omni_expert_rows, expert_rows_outputs, expert_rows_kernel);
  register_no_gradient(m, omni_expert_rows);

  register_kernels(m, omni_permute, permute_outputs, permute_kernel);
  register_gradient<omni_permute, OmniPermuteBackward>(m);
  register_autocast<omni_permute, AutocastTo::kAutocastDtype, 1>(m);

  register_kernels(m, omni_unpermute, unpermute_outputs, unpermute_kernel);
  register_gradient<omni_unpermute, OmniUnpermuteBackward>(m);
  register_autocast<omni_unpermute, AutocastTo::kAutocastDtype, 1>(m);

  register_kernels(m, omni_unpermute_backward, unpermute_backward_outputs,
                   unpermute_backward_kernel);
  register_no_gradient(m, omni_unpermute_backward);
}

}  // namespace

}  // namespace omni_moe::torch_api
