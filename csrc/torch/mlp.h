// The shared MLP, for the ops that contain it.
#pragma once

#include "omni_moe/types.h"
#include "ops.h"

namespace omni_moe::torch_api {

// `x_name` is what the op that messages speak of calls the input.
void check_mlp(const char* op, const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
               const Tensor& down_weight, const char* x_name = "x");

// The two products (…, I) that the backward takes: empty unless saved.
std::tuple<Tensor, Tensor> mlp_products(const Tensor& x, const Tensor& gate_weight,
                                        bool save_for_backward);

// act(x gate_weightᵀ) * (x up_weightᵀ) (T, I) of rows (T, H), checked; fills products that are not
// empty.
Tensor gated_linear(const Tensor& rows, const Tensor& gate_weight, const Tensor& up_weight,
                    Activation activation, const std::tuple<Tensor, Tensor>& products);

// For the nodes of ops that contain the MLP: how its backward may use the memory of the products.
void save_mlp_options(AutogradContext* ctx, std::string_view activation);

std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_backward(AutogradContext* ctx, const Tensor& grad,
                                                        const Tensor& x, const Tensor& gate_weight,
                                                        const Tensor& up_weight,
                                                        const Tensor& down_weight, Tensor gate,
                                                        Tensor up, Mask<4> mask);

}  // namespace omni_moe::torch_api
