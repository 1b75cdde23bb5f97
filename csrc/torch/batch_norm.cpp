// BatchNorm of both axes' router logits at the torch boundary: check, allocate, launch.
#include <torch/library.h>

#include "backend.h"
#include "checks.h"
#include "ops.h"

namespace omni_moe::torch_api {

namespace {

using OptionalTensor = std::optional<Tensor>;

BatchNormBuffers buffers_of(const OptionalTensor& running_mean, const OptionalTensor& running_var,
                            const OptionalTensor& num_batches_tracked, bool training) {
  const auto data = [&](const OptionalTensor& tensor) -> void* {
    if (!tensor) return nullptr;
    return training ? tensor->mutable_data_ptr() : const_cast<void*>(tensor->const_data_ptr());
  };
  return {data(running_mean), data(running_var), static_cast<int64_t*>(data(num_batches_tracked))};
}

// In-place updates cannot go to a copy.
void check_dense(const char* op, const char* name, const OptionalTensor& buffer) {
  TORCH_CHECK_VALUE(!buffer || buffer->is_contiguous(), op, ": expected ", name,
                    " to be contiguous, but got stride ", buffer->strides());
}

// Autograd sees changes in place by the versions of tensors. Tensors of inference mode raise.
void bump_versions(std::initializer_list<const OptionalTensor*> buffers) {
  for (const OptionalTensor* buffer : buffers) {
    if (*buffer) (*buffer)->unsafeGetTensorImpl()->bump_version();
  }
}

Tensor with_dense_rows(const Tensor& t) { return t.stride(1) == 1 ? t : t.contiguous(); }

struct Normed {
  Tensor x, y, inv_std;
};

Normed normalise(const char* op, const Tensor& router_logits, int64_t num_rows,
                 const OptionalTensor& running_mean_x, const OptionalTensor& running_var_x,
                 const OptionalTensor& num_batches_tracked_x, const OptionalTensor& running_mean_y,
                 const OptionalTensor& running_var_y, const OptionalTensor& num_batches_tracked_y,
                 bool training, double momentum, double eps, bool want_inv_std) {
  check_batch_norm(op, router_logits, num_rows,
                   {"x", running_mean_x, running_var_x, num_batches_tracked_x},
                   {"y", running_mean_y, running_var_y, num_batches_tracked_y}, training, eps);
  check_dense(op, "running_mean_x", running_mean_x);
  check_dense(op, "running_var_x", running_var_x);
  check_dense(op, "running_mean_y", running_mean_y);
  check_dense(op, "running_var_y", running_var_y);
  if (training) {
    bump_versions({&running_mean_x, &running_var_x, &num_batches_tracked_x, &running_mean_y,
                   &running_var_y, &num_batches_tracked_y});
  }
  const Tensor logits = with_dense_rows(router_logits);
  const int64_t num_tokens = logits.size(0), num_cols = logits.size(1) - num_rows;
  Normed normed{at::empty({num_tokens, num_rows}, logits.options()),
                at::empty({num_tokens, num_cols}, logits.options()), Tensor()};
  if (want_inv_std) {
    normed.inv_std = at::empty({logits.size(1)},
                               logits.options().dtype(accumulation_dtype(logits.scalar_type())));
  }
  const Tensor& stats = running_mean_x ? *running_mean_x : running_mean_y.value_or(logits);
  launch({logits.const_data_ptr(), normed.x.mutable_data_ptr(), normed.y.mutable_data_ptr(),
          want_inv_std ? normed.inv_std.mutable_data_ptr() : nullptr,
          buffers_of(running_mean_x, running_var_x, num_batches_tracked_x, training),
          buffers_of(running_mean_y, running_var_y, num_batches_tracked_y, training), num_tokens,
          num_rows, num_cols, logits.stride(0), to_dtype(logits), to_dtype(stats), training,
          momentum, eps, /*workspace=*/nullptr},
         logits.device());
  return normed;
}

std::tuple<Tensor, Tensor> omni_batch_norm_kernel(
    const Tensor& router_logits, int64_t num_rows, const OptionalTensor& running_mean_x,
    const OptionalTensor& running_var_x, const OptionalTensor& num_batches_tracked_x,
    const OptionalTensor& running_mean_y, const OptionalTensor& running_var_y,
    const OptionalTensor& num_batches_tracked_y, bool training, double momentum, double eps) {
  auto normed = normalise("omni_batch_norm", router_logits, num_rows, running_mean_x, running_var_x,
                          num_batches_tracked_x, running_mean_y, running_var_y,
                          num_batches_tracked_y, training, momentum, eps, /*want_inv_std=*/false);
  return {normed.x, normed.y};
}

std::tuple<Tensor, Tensor, Tensor> omni_batch_norm_save_stats_kernel(
    const Tensor& router_logits, int64_t num_rows, const OptionalTensor& running_mean_x,
    const OptionalTensor& running_var_x, const OptionalTensor& num_batches_tracked_x,
    const OptionalTensor& running_mean_y, const OptionalTensor& running_var_y,
    const OptionalTensor& num_batches_tracked_y, bool training, double momentum, double eps) {
  auto normed = normalise("omni_batch_norm", router_logits, num_rows, running_mean_x, running_var_x,
                          num_batches_tracked_x, running_mean_y, running_var_y,
                          num_batches_tracked_y, training, momentum, eps, /*want_inv_std=*/true);
  return {normed.x, normed.y, normed.inv_std};
}

Tensor omni_batch_norm_backward_kernel(const Tensor& grad_normed_x, const Tensor& grad_normed_y,
                                       const Tensor& normed_x, const Tensor& normed_y,
                                       const Tensor& inv_std, bool training) {
  check_batch_norm_backward("omni_batch_norm_backward", grad_normed_x, grad_normed_y, normed_x,
                            normed_y, inv_std);
  const Tensor grad_x = grad_normed_x.contiguous(), grad_y = grad_normed_y.contiguous();
  const Tensor x = normed_x.contiguous(), y = normed_y.contiguous(), scale = inv_std.contiguous();
  Tensor grad_logits = at::empty({x.size(0), x.size(1) + y.size(1)}, x.options());
  launch({grad_x.const_data_ptr(), grad_y.const_data_ptr(), x.const_data_ptr(), y.const_data_ptr(),
          scale.const_data_ptr(), grad_logits.mutable_data_ptr(), x.size(0), x.size(1), y.size(1),
          to_dtype(x), training, /*workspace=*/nullptr},
         x.device());
  return grad_logits;
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
