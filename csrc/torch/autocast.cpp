// Autocast: gates, experts and MLP run in the autocast dtype, as matrix products do; the routers,
// which compute in fp32 inside, only bring their two vectors to one dtype.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops.h"

namespace omni_moe::torch_api {

namespace {

template <c10::DeviceType kDevice>
struct Autocast {
  // Casts below run once, outside autocast.
  static c10::impl::ExcludeDispatchKeyGuard exclude() {
    return c10::impl::ExcludeDispatchKeyGuard(
        c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(kDevice)));
  }
  static Tensor cast(const Tensor& t) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), t, kDevice);
  }
  static Tensor cast(const Tensor& t, at::ScalarType dtype) {
    return at::autocast::cached_cast(dtype, t, kDevice);
  }

  static std::tuple<Tensor, Tensor> omni_router(const Tensor& x, const Tensor& y, c10::SymInt k) {
    const auto guard = exclude();
    const auto dtype = at::promote_types(x.scalar_type(), y.scalar_type());
    return torch_api::omni_router(cast(x, dtype), cast(y, dtype), std::move(k));
  }
  static std::tuple<Tensor, Tensor> omni_softmax_router(const Tensor& x, const Tensor& y,
                                                        c10::SymInt k, bool norm_topk_prob) {
    const auto guard = exclude();
    const auto dtype = at::promote_types(x.scalar_type(), y.scalar_type());
    return torch_api::omni_softmax_router(cast(x, dtype), cast(y, dtype), std::move(k),
                                          norm_topk_prob);
  }
  static Tensor omni_expert(const Tensor& hidden_states, const Tensor& up_weights,
                            const Tensor& down_weights, const Tensor& routing_weights,
                            const Tensor& indices, std::string_view activation,
                            const std::optional<Tensor>& addend) {
    const auto guard = exclude();
    return torch_api::omni_expert(cast(hidden_states), cast(up_weights), cast(down_weights),
                                  cast(routing_weights), indices, activation,
                                  addend ? std::optional(cast(*addend)) : std::nullopt);
  }
  static Tensor omni_mlp(const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
                         const Tensor& down_weight, std::string_view activation, bool recompute) {
    const auto guard = exclude();
    return torch_api::omni_mlp(cast(x), cast(gate_weight), cast(up_weight), cast(down_weight),
                               activation, recompute);
  }
  static Tensor omni_expert_mlp(const Tensor& hidden_states, const Tensor& up_embed,
                                const Tensor& down_embed, const Tensor& routing_weights,
                                const Tensor& indices, const Tensor& gate_weight,
                                const Tensor& up_weight, const Tensor& down_weight,
                                std::string_view activation, bool recompute) {
    const auto guard = exclude();
    return torch_api::omni_expert_mlp(cast(hidden_states), cast(up_embed), cast(down_embed),
                                      cast(routing_weights), indices, cast(gate_weight),
                                      cast(up_weight), cast(down_weight), activation, recompute);
  }
  static std::tuple<Tensor, Tensor> omni_router_logits(
      const Tensor& hidden_states, const Tensor& gate_x, const Tensor& gate_y,
      const std::optional<Tensor>& running_mean_x, const std::optional<Tensor>& running_var_x,
      const std::optional<Tensor>& num_batches_tracked_x,
      const std::optional<Tensor>& running_mean_y, const std::optional<Tensor>& running_var_y,
      const std::optional<Tensor>& num_batches_tracked_y, bool training, double momentum,
      double eps) {
    const auto guard = exclude();
    return torch_api::omni_router_logits(cast(hidden_states), cast(gate_x), cast(gate_y),
                                         running_mean_x, running_var_x, num_batches_tracked_x,
                                         running_mean_y, running_var_y, num_batches_tracked_y,
                                         training, momentum, eps);
  }

  static void register_kernels(torch::Library& m) {
    m.impl("omni_router", omni_router);
    m.impl("omni_softmax_router", omni_softmax_router);
    m.impl("omni_expert", omni_expert);
    m.impl("omni_mlp", omni_mlp);
    m.impl("omni_expert_mlp", omni_expert_mlp);
    m.impl("omni_router_logits", omni_router_logits);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(omni_moe, AutocastCPU, m) { Autocast<c10::kCPU>::register_kernels(m); }
TORCH_LIBRARY_IMPL(omni_moe, AutocastCUDA, m) { Autocast<c10::kCUDA>::register_kernels(m); }

}  // namespace omni_moe::torch_api
