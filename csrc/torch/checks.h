// Argument checks shared by the real kernels, the meta kernels and every backend. Each names the
// argument, what was expected and what came, before anything is allocated or launched.
#pragma once

#include <ATen/ATen.h>

#include <string_view>

#include "omni_moe/types.h"

namespace omni_moe::torch_api {

// A named argument of an op, for messages.
struct Argument {
  const char* op;
  const char* name;
  const at::Tensor& tensor;
};

void check_rank(const Argument& argument, int64_t rank);

// `meaning` says what the size stands for: "hidden_size of hidden_states".
void check_size(const Argument& argument, int64_t dim, const c10::SymInt& expected,
                const char* meaning);

// fp32, fp16, bf16; fp64 on the CPU.
void check_floating(const Argument& argument);
void check_integer(const Argument& argument);

// Same dtype (where `same_dtype`) and device as `first`.
void check_like(const Argument& argument, const Argument& first, bool same_dtype = true);

void check_router_logits(const char* op, const at::Tensor& router_logits_x,
                         const at::Tensor& router_logits_y,
                         const c10::SymInt& num_experts_per_token);

// What a router's backward gets of its choice: gradient (T, K) and indices (T, K) int32.
void check_router_choice(const char* op, const Argument& grad, const Argument& indices);

void check_softmax_router_backward(const char* op, const at::Tensor& grad_routing_weights,
                                   const at::Tensor& router_logits_x,
                                   const at::Tensor& router_logits_y, const at::Tensor& indices);

void check_expert(const char* op, const at::Tensor& hidden_states, const at::Tensor& up_weights,
                  const at::Tensor& down_weights, const at::Tensor& routing_weights,
                  const at::Tensor& indices, const std::optional<at::Tensor>& addend,
                  const char* up_name = "up_weights", const char* down_name = "down_weights");

void check_expert_backward(const char* op, const at::Tensor& grad_expert_states,
                           const at::Tensor& hidden_states, const at::Tensor& up_weights,
                           const at::Tensor& down_weights, const at::Tensor& routing_weights,
                           const at::Tensor& indices, const std::optional<at::Tensor>& scores,
                           const std::optional<at::Tensor>& addend);

// The passes of a gradient on the GPU number the T·K pairs of a token and an expert in 32 bits.
// Called by the forward that saves for a backward, too, so that a training step is refused at its
// start. Neither a forward alone nor the CPU has the limit; a meta tensor stands for any device.
void check_num_pairs_of_gradient(const Argument& indices);

// Sums of this dtype are taken in: fp32, and fp64 for fp64.
at::ScalarType accumulation_dtype(at::ScalarType dtype);

void check_mlp(const char* op, const at::Tensor& x, const at::Tensor& gate_weight,
               const at::Tensor& up_weight, const at::Tensor& down_weight,
               const char* x_name = "x");

void check_expert_mlp(const char* op, const at::Tensor& hidden_states, const at::Tensor& up_embed,
                      const at::Tensor& down_embed, const at::Tensor& routing_weights,
                      const at::Tensor& indices, const at::Tensor& gate_weight,
                      const at::Tensor& up_weight, const at::Tensor& down_weight);

void check_mlp_backward(const char* op, const at::Tensor& grad_output, const at::Tensor& x,
                        const at::Tensor& gate_weight, const at::Tensor& up_weight,
                        const at::Tensor& down_weight, const std::optional<at::Tensor>& gate,
                        const std::optional<at::Tensor>& up);

// What the BatchNorm of one axis carries from batch to batch, for messages.
struct BatchNormBufferArguments {
  const char* axis;  // "x" or "y"
  const std::optional<at::Tensor>& running_mean;
  const std::optional<at::Tensor>& running_var;
  const std::optional<at::Tensor>& num_batches_tracked;
};

void check_batch_norm(const char* op, const at::Tensor& router_logits, const c10::SymInt& num_rows,
                      const BatchNormBufferArguments& x, const BatchNormBufferArguments& y,
                      bool training, double eps);

// Both gates, and the BatchNorm behind them.
void check_normed_router_logits(const char* op, const at::Tensor& hidden_states,
                                const at::Tensor& gate_x, const at::Tensor& gate_y,
                                const BatchNormBufferArguments& x,
                                const BatchNormBufferArguments& y, bool training, double eps);

void check_batch_norm_backward(const char* op, const at::Tensor& grad_normed_x,
                               const at::Tensor& grad_normed_y, const at::Tensor& normed_x,
                               const at::Tensor& normed_y, const at::Tensor& inv_std);

void check_router_logits_backward(const char* op, const at::Tensor& grad_router_logits_x,
                                  const at::Tensor& grad_router_logits_y,
                                  const at::Tensor& hidden_states, const at::Tensor& gate_x,
                                  const at::Tensor& gate_y, const at::Tensor& router_logits_x,
                                  const at::Tensor& router_logits_y, const at::Tensor& inv_std);

// Raises IndexError naming the first id outside [0, num_experts). Reads the ids on the host: always
// for CPU tensors; for CUDA tensors only while index checks are on, since it synchronises.
void check_indices(const char* op, const at::Tensor& indices, int64_t num_experts);

// Index checks are on, for every thread of the process, while more scopes have begun than ended. A
// flag of one thread would not reach autograd's threads, which run the backward passes, and a flag
// that each scope saves and restores would be left wrong by scopes of two threads that overlap.
void begin_index_checks();
void end_index_checks();
bool index_checks_are_on();

Activation parse_activation(const char* op, std::string_view name);
DType to_dtype(const at::Tensor& tensor);
IndexType to_index_type(const at::Tensor& tensor);

}  // namespace omni_moe::torch_api
