// BatchNorm of both axes' router logits at the torch boundary: check, allocate, launch.
#include "batch_norm.h"

#include <torch/library.h>

#include "backend.h"
#include "ops.h"

namespace omni_moe::torch_api {

namespace {

using OptionalTensor = std::optional<Tensor>;

BatchNormBuffers pointers_of(const BatchNormBufferArguments& buffers, bool training) {
  const auto data = [&](const OptionalTensor& tensor) -> void* {
    if (!tensor) return nullptr;
    return training ? tensor->mutable_data_ptr() : const_cast<void*>(tensor->const_data_ptr());
  };
  return {data(buffers.running_mean), data(buffers.running_var),
          static_cast<int64_t*>(data(buffers.num_batches_tracked))};
}

}  // namespace

void prepare_buffers(const char* op, const BatchNormOptions& options) {
  for (const auto& axis : {options.x, options.y}) {
    // In-place updates cannot go to a copy.
    const auto check_dense = [&](const char* name, const OptionalTensor& buffer) {
      TORCH_CHECK_VALUE(!buffer || buffer->is_contiguous(), op, ": expected ", name, "_", axis.axis,
                        " to be contiguous, but got stride ", buffer->strides());
    };
    check_dense("running_mean", axis.running_mean);
    check_dense("running_var", axis.running_var);
  }
  if (!options.training) return;
  // Autograd sees changes in place by the versions of tensors. Tensors of inference mode raise.
  for (const auto& axis : {options.x, options.y}) {
    for (const auto& buffer : {std::cref(axis.running_mean), std::cref(axis.running_var),
                               std::cref(axis.num_batches_tracked)}) {
      if (buffer.get()) (*buffer.get()).unsafeGetTensorImpl()->bump_version();
    }
  }
}

BatchNormForwardParams parameters_of(const Tensor& like, int64_t num_tokens, int64_t num_rows,
                                     int64_t num_cols, const BatchNormOptions& options) {
  const OptionalTensor& mean_x = options.x.running_mean;
  const OptionalTensor& mean_y = options.y.running_mean;
  const Tensor& stats = mean_x ? *mean_x : mean_y ? *mean_y : like;
  return {/*logits=*/nullptr,
          /*normed_x=*/nullptr,
          /*normed_y=*/nullptr,
          /*inv_std=*/nullptr,
          pointers_of(options.x, options.training),
          pointers_of(options.y, options.training),
          num_tokens,
          num_rows,
          num_cols,
          /*logits_stride=*/0,
          to_dtype(like),
          to_dtype(stats),
          options.training,
          options.momentum,
          options.eps,
          /*workspace=*/nullptr};
}

Normed allocate_normed(const Tensor& like, bool want_inv_std, BatchNormForwardParams* params) {
  Normed normed{at::empty({params->num_tokens, params->num_rows}, like.options()),
                at::empty({params->num_tokens, params->num_cols}, like.options()), Tensor()};
  params->normed_x = normed.x.mutable_data_ptr();
  params->normed_y = normed.y.mutable_data_ptr();
  if (want_inv_std) {
    const auto dtype = accumulation_dtype(like.scalar_type());
    normed.inv_std = at::empty({params->num_rows + params->num_cols}, like.options().dtype(dtype));
    params->inv_std = normed.inv_std.mutable_data_ptr();
  }
  return normed;
}

Normed normalise(const Tensor& logits, int64_t num_rows, const BatchNormOptions& options,
                 bool want_inv_std) {
  const Tensor rows = logits.stride(1) == 1 ? logits : logits.contiguous();
  BatchNormForwardParams params =
      parameters_of(rows, rows.size(0), num_rows, rows.size(1) - num_rows, options);
  const Normed normed = allocate_normed(rows, want_inv_std, &params);
  params.logits = rows.const_data_ptr();
  params.logits_stride = rows.stride(0);
  launch(params, rows.device());
  return normed;
}

Tensor normalise_backward(const Tensor& grad_normed_x, const Tensor& grad_normed_y,
                          const Tensor& normed_x, const Tensor& normed_y, const Tensor& inv_std,
                          bool training) {
  const Tensor grad_x = grad_normed_x.contiguous(), grad_y = grad_normed_y.contiguous();
  const Tensor x = normed_x.contiguous(), y = normed_y.contiguous(), scale = inv_std.contiguous();
  Tensor grad_logits = at::empty({x.size(0), x.size(1) + y.size(1)}, x.options());
  launch({grad_x.const_data_ptr(), grad_y.const_data_ptr(), x.const_data_ptr(), y.const_data_ptr(),
          scale.const_data_ptr(), grad_logits.mutable_data_ptr(), x.size(0), x.size(1), y.size(1),
          to_dtype(x), training, /*workspace=*/nullptr},
         x.device());
  return grad_logits;
}

namespace {

Normed batch_norm(const Tensor& router_logits, int64_t num_rows, const BatchNormOptions& options,
                  bool want_inv_std) {
  constexpr auto kOp = "omni_batch_norm";
  check_batch_norm(kOp, router_logits, num_rows, options.x, options.y, options.training,
                   options.eps);
  prepare_buffers(kOp, options);
  return normalise(router_logits, num_rows, options, want_inv_std);
}

std::tuple<Tensor, Tensor> omni_batch_norm_kernel(
    const Tensor& router_logits, int64_t num_rows, const OptionalTensor& running_mean_x,
    const OptionalTensor& running_var_x, const OptionalTensor& num_batches_tracked_x,
    const OptionalTensor& running_mean_y, const OptionalTensor& running_var_y,
    const OptionalTensor& num_batches_tracked_y, bool training, double momentum, double eps) {
  auto normed = batch_norm(router_logits, num_rows,
                           {{"x", running_mean_x, running_var_x, num_batches_tracked_x},
                            {"y", running_mean_y, running_var_y, num_batches_tracked_y},
                            training,
                            momentum,
                            eps},
                           /*want_inv_std=*/false);
  return {normed.x, normed.y};
}

std::tuple<Tensor, Tensor, Tensor> omni_batch_norm_save_stats_kernel(
    const Tensor& router_logits, int64_t num_rows, const OptionalTensor& running_mean_x,
    const OptionalTensor& running_var_x, const OptionalTensor& num_batches_tracked_x,
    const OptionalTensor& running_mean_y, const OptionalTensor& running_var_y,
    const OptionalTensor& num_batches_tracked_y, bool training, double momentum, double eps) {
  auto normed = batch_norm(router_logits, num_rows,
                           {{"x", running_mean_x, running_var_x, num_batches_tracked_x},
                            {"y", running_mean_y, running_var_y, num_batches_tracked_y},
                            training,
                            momentum,
                            eps},
                           /*want_inv_std=*/true);
  return {normed.x, normed.y, normed.inv_std};
}

Tensor omni_batch_norm_backward_kernel(const Tensor& grad_normed_x, const Tensor& grad_normed_y,
                                       const Tensor& normed_x, const Tensor& normed_y,
                                       const Tensor& inv_std, bool training) {
  check_batch_norm_backward("omni_batch_norm_backward", grad_normed_x, grad_normed_y, normed_x,
                            normed_y, inv_std);
  return normalise_backward(grad_normed_x, grad_normed_y, normed_x, normed_y, inv_std, training);
}

void register_kernels(torch::Library& m) {
  m.impl("omni_batch_norm", omni_batch_norm_kernel);
  m.impl("omni_batch_norm_save_stats", omni_batch_norm_save_stats_kernel);
  m.impl("omni_batch_norm_backward", omni_batch_norm_backward_kernel);
}

}  // namespace

TORCH_LIBRARY_IMPL(omni_moe, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(omni_moe, CUDA, m) { register_kernels(m); }

}  // namespace omni_moe::torch_api
