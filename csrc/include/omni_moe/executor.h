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
  //
  // The body may throw: std::bad_alloc where a thread's scratch memory cannot be had,
  // std::invalid_argument for an enum value that it does not know. An implementation must then
  // still wait for every range that it has begun, since the body refers to the caller's stack, may
  // leave out the others, and must throw one of the exceptions to the caller; at::parallel_for does
  // so. Kernels pass on whatever parallel_for throws and free what they hold; their outputs are
  // then unspecified.
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
