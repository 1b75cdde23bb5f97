// What the files of the ops are built from: a handle that calls an op through the dispatcher, and
// the kernels that look alike for every op (autograd, autocast).
//
// An op's file reads from top to bottom: the schemas; `outputs`, which checks the arguments and
// allocates (it is the meta kernel as it stands, so sizes stay symbolic); the kernel, which is
// outputs, a Params struct filled by name, and `launch`; the gradient; the registration.
#pragma once

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace omni_moe::torch_api {

using Tensor = at::Tensor;

template <size_t kSize>
struct OpName {
  char text[kSize];
  consteval OpName(const char (&name)[kSize]) { std::copy_n(name, kSize, text); }
};

// The registered op omni_moe::name. Not inline: a program that calls handles alone must link with
// the library that registers the ops.
c10::OperatorHandle find_op(const char* name);

// The op omni_moe::kName. Calling the handle is calling the op as from Python: autograd, autocast
// and meta tensors work.
template <OpName kName, typename Signature>
struct Op;

template <OpName kName, typename Result, typename... Args>
struct Op<kName, Result(Args...)> {
  static constexpr const char* name = kName.text;

  Result operator()(Args... args) const {
    static const auto op = find_op(name).template typed<Result(Args...)>();
    return op.call(std::forward<Args>(args)...);
  }
};

// ---- Autograd ----------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Forward-mode AD counts, too: `Function` has the error that says there is none.
inline bool needs_grad(const Tensor& input) {
  return (input.requires_grad() && at::GradMode::is_enabled()) || input._fw_grad(0).defined();
}
inline bool needs_grad(const std::optional<Tensor>& input) { return input && needs_grad(*input); }
template <typename Other>
bool needs_grad(const Other& /*not a tensor, or buffers*/) {
  return false;
}

// The outputs that a graph's node shows. What an op returns beyond them is for its backward: the
// node keeps that to itself, and the op's caller gets empty tensors.
template <typename Result>
Result shown_outputs(const variable_list& outputs) {
  if constexpr (std::is_same_v<Result, Tensor>) {
    return outputs[0];
  } else {
    return [&]<size_t... i>(std::index_sequence<i...>) {
      return Result{i < outputs.size() ? outputs[i] : at::empty({0}, outputs[0].options())...};
    }
    (std::make_index_sequence<std::tuple_size_v<Result>>());
  }
}

// An op's autograd kernel: below autograd where no gradient is asked for, else a node of the graph,
// whose class is a torch::autograd::Function.
template <const auto& op, typename Node>
struct WithGradient;

template <OpName kName, typename Result, typename... Args, const Op<kName, Result(Args...)>& op,
          typename Node>
struct WithGradient<op, Node> {
  static Result call(Args... args) {
    if (!(needs_grad(args) || ...)) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      return op(std::forward<Args>(args)...);
    }
    return shown_outputs<Result>(Node::apply(args...));
  }
};

// What a node's backward returns for an input whose gradient came back empty, not asked for.
inline Tensor if_wanted(bool wanted, const Tensor& grad) { return wanted ? grad : Tensor(); }

// ---- Autocast ----------------------------------------------------------------------------------

// The dtype in which an op runs under autocast.
enum class AutocastTo {
  kAutocastDtype,  // as matrix products do
  kWidestInput,    // for ops that compute in fp32 inside: their inputs only agree on one dtype
};

// An op's autocast kernel, which casts the tensors among the first kNumCast arguments. PyTorch's
// own wrapper would cast the tensors of lists, too; here those are buffers, which an op updates in
// place.
template <c10::DeviceType kDevice, AutocastTo kTo, const auto& op, size_t kNumCast>
struct Autocast;

template <c10::DeviceType kDevice, AutocastTo kTo, OpName kName, typename Result, typename... Args,
          const Op<kName, Result(Args...)>& op, size_t kNumCast>
struct Autocast<kDevice, kTo, op, kNumCast> {
  static Result call(Args... args) {
    // The op runs once more, outside autocast.
    const c10::impl::ExcludeDispatchKeyGuard guard(
        c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(kDevice)));
    auto dtype = at::ScalarType::Undefined;
    if constexpr (kTo == AutocastTo::kAutocastDtype) {
      dtype = at::autocast::get_autocast_dtype(kDevice);
    } else {
      (widen(dtype, args), ...);
    }
    return [&]<size_t... i>(std::index_sequence<i...>) {
      return op(cast_if<(i < kNumCast)>(dtype, args)...);
    }
    (std::index_sequence_for<Args...>());
  }

 private:
  template <bool kCast, typename Arg>
  static auto cast_if(at::ScalarType dtype, const Arg& input) {
    if constexpr (kCast) {
      return cast(dtype, input);
    } else {
      return input;
    }
  }

  static Tensor cast(at::ScalarType dtype, const Tensor& input) {
    return at::autocast::cached_cast(dtype, input, kDevice);
  }
  static std::optional<Tensor> cast(at::ScalarType dtype, const std::optional<Tensor>& input) {
    return at::autocast::cached_cast(dtype, input, kDevice);
  }
  template <typename Other>
  static Other cast(at::ScalarType /*dtype*/, const Other& input) {
    return input;
  }

  static void widen(at::ScalarType& dtype, const Tensor& input) {
    const auto own = input.scalar_type();
    dtype = dtype == at::ScalarType::Undefined ? own : at::promote_types(dtype, own);
  }
  template <typename Other>
  static void widen(at::ScalarType& /*dtype*/, const Other& /*input*/) {}
};

// Autocast has cast the inputs of a forward already, and a backward pass may run under another
// autocast than its forward, or under none: kernels that call ATen compute in their operands'
// dtype.
inline c10::impl::ExcludeDispatchKeyGuard without_autocast() {
  return c10::impl::ExcludeDispatchKeyGuard(c10::autocast_dispatch_keyset);
}

// ---- Registration ------------------------------------------------------------------------------

// The meta kernel, and the kernel of every backend.
template <typename OpHandle, typename Outputs, typename Kernel>
void register_kernels(torch::Library& m, const OpHandle& op, Outputs* outputs, Kernel* kernel) {
  m.impl(op.name, torch::dispatch(c10::DispatchKey::Meta, outputs));
  m.impl(op.name, torch::dispatch(c10::DispatchKey::CPU, kernel));
  m.impl(op.name, torch::dispatch(c10::DispatchKey::CUDA, kernel));
}

template <const auto& op, typename Node>
void register_gradient(torch::Library& m) {
  m.impl(op.name, torch::dispatch(c10::DispatchKey::Autograd, WithGradient<op, Node>::call));
}

// For the ops of a backward pass: asking for their gradient raises.
template <typename OpHandle>
void register_no_gradient(torch::Library& m, const OpHandle& op) {
  m.impl(op.name, torch::dispatch(c10::DispatchKey::Autograd,
                                  torch::autograd::autogradNotImplementedFallback()));
}

inline constexpr size_t kAllArguments = std::numeric_limits<size_t>::max();

template <const auto& op, AutocastTo kTo, size_t kNumCast = kAllArguments>
void register_autocast(torch::Library& m) {
  m.impl(op.name, torch::dispatch(c10::DispatchKey::AutocastCPU,
                                  Autocast<c10::kCPU, kTo, op, kNumCast>::call));
  m.impl(op.name, torch::dispatch(c10::DispatchKey::AutocastCUDA,
                                  Autocast<c10::kCUDA, kTo, op, kNumCast>::call));
}

}  // namespace omni_moe::torch_api
