// The pass over atomic experts, for the ops that contain it.
#pragma once

#include "ops.h"

namespace omni_moe::torch_api {

// What the pass reads. Names are those of omni_expert; `up_name` and `down_name` are what the op
// that messages speak of calls the tables.
struct ExpertOperands {
  const char* op;
  const Tensor& hidden_states;
  const Tensor& up_weights;
  const Tensor& down_weights;
  const Tensor& routing_weights;
  const Tensor& indices;
  c10::SymInt num_cols;
  const char* up_name = "up_weights";
  const char* down_name = "down_weights";
};

void check_experts(const ExpertOperands& operands, const OptionalTensor& addend);

// (T, H), and hidden · up for the backward, (T, K) in the accumulation type: empty unless saved.
// The operands have been checked.
std::tuple<Tensor, Tensor> expert_outputs_of(const ExpertOperands& operands,
                                             bool save_for_backward);

// Fills them, from indices that it checks.
void run_experts(const ExpertOperands& operands, std::string_view activation,
                 const OptionalTensor& addend, const std::tuple<Tensor, Tensor>& outputs);

}  // namespace omni_moe::torch_api
