// Routers at the torch boundary: check, allocate, launch.
#include <torch/library.h>

#include "backend.h"
#include "checks.h"
#include "ops.h"

namespace omni_moe::torch_api {

namespace {

std::tuple<Tensor, Tensor> route(const char* op, const Tensor& router_logits_x,
                                 const Tensor& router_logits_y, int64_t num_experts_per_token,
                                 RouterScore score) {
  check_router_logits(op, router_logits_x, router_logits_y, num_experts_per_token);
  const Tensor x = router_logits_x.contiguous(), y = router_logits_y.contiguous();
  Tensor weights = at::empty({x.size(0), num_experts_per_token}, x.options());
  Tensor indices = at::empty({x.size(0), num_experts_per_token}, x.options().dtype(at::kInt));
  launch({x.const_data_ptr(), y.const_data_ptr(), weights.mutable_data_ptr(),
          indices.mutable_data_ptr<int32_t>(), x.size(0), x.size(1), y.size(1),
          num_experts_per_token, to_dtype(x), score, /*workspace=*/nullptr},
         x.device());
  return {weights, indices};
}

std::tuple<Tensor, Tensor> omni_router_kernel(const Tensor& router_logits_x,
                                              const Tensor& router_logits_y,
                                              int64_t num_experts_per_token) {
  return route("omni_router", router_logits_x, router_logits_y, num_experts_per_token,
               RouterScore::kLogit);
}

std::tuple<Tensor, Tensor> omni_softmax_router_kernel(const Tensor& router_logits_x,
                                                      const Tensor& router_logits_y,
                                                      int64_t num_experts_per_token,
                                                      bool norm_topk_prob) {
  return route("omni_softmax_router", router_logits_x, router_logits_y, num_experts_per_token,
               norm_topk_prob ? RouterScore::kSoftmaxTopK : RouterScore::kSoftmax);
}

std::tuple<Tensor, Tensor> omni_router_backward_kernel(const Tensor& grad_scores,
                                                       const Tensor& indices, int64_t num_rows,
                                                       int64_t num_cols) {
  constexpr auto kOp = "omni_router_backward";
  check_router_choice(kOp, {kOp, "grad_scores", grad_scores}, {kOp, "indices", indices});
  check_indices(kOp, indices, num_rows * num_cols);
  const Tensor grad = grad_scores.contiguous(), ids = indices.contiguous();
  Tensor grad_x = at::empty({grad.size(0), num_rows}, grad.options());
  Tensor grad_y = at::empty({grad.size(0), num_cols}, grad.options());
  launch({grad.const_data_ptr(), /*logits_x=*/nullptr, /*logits_y=*/nullptr,
          ids.const_data_ptr<int32_t>(), grad_x.mutable_data_ptr(), grad_y.mutable_data_ptr(),
          grad.size(0), num_rows, num_cols, grad.size(1), to_dtype(grad), RouterScore::kLogit,
          /*workspace=*/nullptr},
         grad.device());
  return {grad_x, grad_y};
}

std::tuple<Tensor, Tensor> omni_softmax_router_backward_kernel(const Tensor& grad_routing_weights,
                                                               const Tensor& router_logits_x,
                                                               const Tensor& router_logits_y,
                                                               const Tensor& indices,
                                                               bool norm_topk_prob) {
  constexpr auto kOp = "omni_softmax_router_backward";
  check_softmax_router_backward(kOp, grad_routing_weights, router_logits_x, router_logits_y,
                                indices);
  const Tensor grad = grad_routing_weights.contiguous(), ids = indices.contiguous();
  const Tensor x = router_logits_x.contiguous(), y = router_logits_y.contiguous();
  check_indices(kOp, ids, x.size(1) * y.size(1));
  Tensor grad_x = at::empty_like(x), grad_y = at::empty_like(y);
  launch(
      {grad.const_data_ptr(), x.const_data_ptr(), y.const_data_ptr(), ids.const_data_ptr<int32_t>(),
       grad_x.mutable_data_ptr(), grad_y.mutable_data_ptr(), x.size(0), x.size(1), y.size(1),
       ids.size(1), to_dtype(x), norm_topk_prob ? RouterScore::kSoftmaxTopK : RouterScore::kSoftmax,
       /*workspace=*/nullptr},
      x.device());
  return {grad_x, grad_y};
}

void register_kernels(torch::Library& m) {
  m.impl("omni_router", omni_router_kernel);
  m.impl("omni_router_backward", omni_router_backward_kernel);
  m.impl("omni_softmax_router", omni_softmax_router_kernel);
  m.impl("omni_softmax_router_backward", omni_softmax_router_backward_kernel);
}

}  // namespace

TORCH_LIBRARY_IMPL(omni_moe, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(omni_moe, CUDA, m) { register_kernels(m); }

}  // namespace omni_moe::torch_api
