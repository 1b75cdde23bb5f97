// A guard for kernels that call ATen.
#pragma once

#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace omni_moe::torch_api {

// The operands of these kernels have the dtypes in which to compute. Autocast has cast the inputs
// of a forward already, and a backward pass may run under another autocast than its forward, or
// under none.
inline c10::impl::ExcludeDispatchKeyGuard without_autocast() {
  return c10::impl::ExcludeDispatchKeyGuard(c10::autocast_dispatch_keyset);
}

}  // namespace omni_moe::torch_api
