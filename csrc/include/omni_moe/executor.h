// How CPU kernels run in parallel without owning threads: the caller brings them.
// The torch boundary hands in at::parallel_for; a C++ program hands in its own pool.
#pragma once

#include <cstdint>
#include <functional>

namespace omni_moe::cpu {

class Executor {
 public:
  virtual ~Executor() = default;

  // Calls body(begin_i, end_i) on disjoint ranges that cover [begin, end), each at least `grain`
  // long where the range allows it, and returns when all are done. Results of the kernels do not
  // depend on how the range is cut.
  virtual void parallel_for(int64_t begin, int64_t end, int64_t grain,
                            const std::function<void(int64_t, int64_t)>& body) const = 0;
};

// Runs everything on the calling thread.
class SerialExecutor final : public Executor {
 public:
  void parallel_for(int64_t begin, int64_t end, int64_t /*grain*/,
                    const std::function<void(int64_t, int64_t)>& body) const override {
    if (begin < end) body(begin, end);
  }
};

}  // namespace omni_moe::cpu
