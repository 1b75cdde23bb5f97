// Named parts of a pass for profilers.
#pragma once

#include <ATen/record_function.h>

#include <optional>
#include <utility>

namespace omni_moe::torch_api {

// From here to the end of the scope: a range for torch.profiler, on the GPU's time line as well,
// and an NVTX range under torch.autograd.profiler.emit_nvtx. An op has a range of its own already;
// these give a part one name, whatever the op that it is in, and tell the parts of one op apart.
// Without a profiler it is a look at a thread-local list, 12 ns.
class NamedRange {
 public:
  explicit NamedRange(const char* name) {
    if (auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE)) {
      range_.emplace(std::move(*callbacks));
      range_->before(name);
    }
  }

 private:
  std::optional<at::RecordFunction> range_;
};

inline constexpr const char* kRouterRange = "omni_moe.router";
inline constexpr const char* kExpertsRange = "omni_moe.experts";
inline constexpr const char* kMlpRange = "omni_moe.mlp";

}  // namespace omni_moe::torch_api
