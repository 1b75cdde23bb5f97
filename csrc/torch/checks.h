// The words in which ops refuse their arguments: each check names the argument, what was expected
// and what came. What an op wants of its arguments stands in its own file.
#pragma once

#include <ATen/ATen.h>

#include <initializer_list>
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
                std::string_view meaning);

// `count`, of what `meaning` says, is at most 2^31 - 1. A symbolic one is checked when it is known:
// a guard here would keep torch.export from taking any number of tokens.
void check_fits_int32(const char* op, const c10::SymInt& count, std::string_view meaning);

// fp32, fp16, bf16; fp64 on the CPU.
void check_floating(const Argument& argument);
void check_integer(const Argument& argument);
void check_dtype(const Argument& argument, at::ScalarType dtype);

// (T) bool on the device of `first`, whose rows are the tokens.
void check_token_mask(const Argument& mask, const Argument& first);

// Same dtype (where `same_dtype`) and device as `first`.
void check_like(const Argument& argument, const Argument& first, bool same_dtype = true);

// Raises IndexError naming the first id outside [lowest, num_experts). Reads the ids on the host:
// always for CPU tensors; for CUDA tensors only while index checks are on, since it synchronises.
// `name` is what the op calls them.
void check_indices(const char* op, const at::Tensor& indices, int64_t num_experts,
                   int64_t lowest = 0, const char* name = "indices");

// Index checks are on, for every thread of the process, while more scopes have begun than ended. A
// flag of one thread would not reach autograd's threads, which run the backward passes, and a flag
// that each scope saves and restores would be left wrong by scopes of two threads that overlap.
void begin_index_checks();
void end_index_checks();
bool index_checks_are_on();

Activation parse_activation(const char* op, std::string_view name);
DType to_dtype(const at::Tensor& tensor);
IndexType to_index_type(const at::Tensor& tensor);

// Sums of this dtype are taken in: fp32, and fp64 for fp64.
at::ScalarType accumulation_dtype(at::ScalarType dtype);

// A dense tensor of that shape, or an empty one where it is not wanted.
at::Tensor empty_if(bool wanted, c10::SymIntArrayRef sizes, const at::TensorOptions& options);

}  // namespace omni_moe::torch_api
