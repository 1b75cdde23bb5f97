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
                std::string_view meaning) {
  TORCH_CHECK_VALUE(argument.tensor.sym_size(dim) == expected, argument.op, ": expected ",
                    argument.name, ".size(", dim, ") to equal the ", meaning, " (", expected,
                    "), but got shape ", argument.tensor.sym_sizes());
}

void check_fits_int32(const char* op, const c10::SymInt& count, std::string_view meaning) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(count.maybe_as_int().value_or(0) <= kMost, op, ": expected at most 2^31 - 1 ",
                    meaning, ", but got ", count);
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

void check_token_mask(const Argument& mask, const Argument& first) {
  check_rank(mask, 1);
  check_like(mask, first, /*same_dtype=*/false);
  check_dtype(mask, at::kBool);
  check_size(mask, 0, first.tensor.sym_size(0), std::string("number of tokens of ") + first.name);
}

void check_dtype(const Argument& argument, at::ScalarType dtype) {
  const char* name = dtype == at::kInt ? "int32" : dtype == at::kLong ? "int64" : toString(dtype);
  TORCH_CHECK_VALUE(argument.tensor.scalar_type() == dtype, argument.op, ": expected ",
                    argument.name, " to be ", name, ", but got ", argument.tensor.scalar_type());
}

namespace {
std::atomic<int64_t> num_index_check_scopes{0};
}

void begin_index_checks() { ++num_index_check_scopes; }
void end_index_checks() { --num_index_check_scopes; }
bool index_checks_are_on() { return num_index_check_scopes > 0; }

void check_indices(const char* op, const at::Tensor& indices, int64_t num_experts, int64_t lowest,
                   const char* name) {
  if (!indices.is_cpu() && !index_checks_are_on()) return;
  const at::Tensor host = indices.cpu().contiguous();
  const int64_t position = cpu::find_invalid_index(host.const_data_ptr(), to_index_type(host),
                                                   host.numel(), num_experts, lowest);
  if (position < 0) return;
  const int64_t k = host.size(1);
  TORCH_CHECK_INDEX(false, op, ": expected ", name, " in [", lowest, ", ", num_experts,
                    "), but got ", host.flatten()[position].item<int64_t>(), " at ", name, "[",
                    position / k, ", ", position % k, "]");
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

at::ScalarType accumulation_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor empty_if(bool wanted, c10::SymIntArrayRef sizes, const at::TensorOptions& options) {
  return wanted ? at::empty_symint(sizes, options) : at::empty({0}, options);
}

}  // namespace omni_moe::torch_api
