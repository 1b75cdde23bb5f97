// The experts, the schedule and the index check of the CPU backend against oracles in double, for
// every set of kernels, serially and on two threads.
#include <atomic>
#include <cstdlib>
#include <new>

#include "cpu_kernel_testing.h"

// ---- memory -------------------------------------------------------------------------------------

// This program's own operator new counts what has not been deleted, and fails where a test asks.
namespace {
std::atomic<int64_t> num_live_allocations{0};
thread_local bool memory_is_short = false;
}  // namespace

void* operator new(size_t bytes) {
  void* memory = memory_is_short ? nullptr : std::malloc(std::max<size_t>(bytes, 1));
  if (!memory) throw std::bad_alloc();
  ++num_live_allocations;
  return memory;
}
void operator delete(void* memory) noexcept {
  if (!memory) return;
  --num_live_allocations;
  std::free(memory);
}
void operator delete(void* memory, size_t /*bytes*/) noexcept { operator delete(memory); }
// As the standard library has them; those of AddressSanitizer would go past the ones above.
void* operator new[](size_t bytes) { return operator new(bytes); }
void operator delete[](void* memory) noexcept { operator delete(memory); }
void operator delete[](void* memory, size_t /*bytes*/) noexcept { operator delete(memory); }

namespace omni_moe::cpu {
namespace {

// ---- oracles ------------------------------------------------------------------------------------

enum class Pattern { kRandom, kIdle, kOne, kDuplicates };
constexpr Pattern kPatterns[] = {Pattern::kRandom, Pattern::kIdle, Pattern::kOne,
                                 Pattern::kDuplicates};

struct Sizes {
  int64_t num_tokens, hidden_size, num_experts, k;
};
constexpr Sizes kExpertShapes[] = {{0, 8, 4, 3},      {1, 1, 1, 1},      {37, 8, 16, 0},
                                   {37, 100, 36, 3},  {9, 1000, 20, 16}, {199, 24, 300, 5},
                                   {13, 1024, 8, 33}, {37, 33, 12, 144}};

struct ExpertCase {
  Sizes shape;
  DType dtype;
  Activation activation;
  Buffer hidden, up, down, routing, grad;
  Indices indices;

  ExpertCase(Random& random, const Sizes& s, DType dtype, Activation activation, Pattern pattern)
      : shape(s),
        dtype(dtype),
        activation(activation),
        hidden(random.normal(dtype, s.num_tokens * s.hidden_size)),
        up(random.normal(dtype, s.num_experts * s.hidden_size, 1 / std::sqrt(s.hidden_size))),
        down(random.normal(dtype, s.num_experts * s.hidden_size, 1 / std::sqrt(s.hidden_size))),
        routing(random.normal(dtype, s.num_tokens * s.k)),
        grad(random.normal(dtype, s.num_tokens * s.hidden_size)) {
    for (int64_t t = 0; t < s.num_tokens; ++t) {
      const int64_t of_token = random.below(s.num_experts);
      for (int64_t i = 0; i < s.k; ++i) {
        indices.push_back(pattern == Pattern::kRandom ? random.below(s.num_experts)
                          : pattern == Pattern::kIdle ? random.below((s.num_experts + 3) / 4)
                          : pattern == Pattern::kOne  ? s.num_experts - 1
                                                      : of_token);
      }
    }
  }

  // Length of the longest sum: a pre_activation, a token's experts, or an expert's pairs.
  int64_t num_terms() const {
    std::vector<int64_t> counts(shape.num_experts);
    for (const int64_t id : indices.wide) ++counts[id];
    return shape.hidden_size + std::max(shape.k, *std::max_element(counts.begin(), counts.end()));
  }
};

double dot(const Buffer& a, int64_t a_row, const Buffer& b, int64_t b_row, int64_t n) {
  double sum = 0;
  for (int64_t h = 0; h < n; ++h) sum += a[a_row * n + h] * b[b_row * n + h];
  return sum;
}

std::vector<double> expert_oracle(const ExpertCase& c) {
  const auto& s = c.shape;
  std::vector<double> out(s.num_tokens * s.hidden_size);
  for (int64_t pair = 0; pair < s.num_tokens * s.k; ++pair) {
    const int64_t t = pair / s.k, e = c.indices.wide[pair];
    const double value = activate(c.activation, dot(c.hidden, t, c.up, e, s.hidden_size));
    for (int64_t h = 0; h < s.hidden_size; ++h) {
      out[t * s.hidden_size + h] += value * c.routing[pair] * c.down[e * s.hidden_size + h];
    }
  }
  return out;
}

struct ExpertGradients {
  std::vector<double> hidden, up, down, routing;
};

ExpertGradients expert_backward_oracle(const ExpertCase& c) {
  const auto& s = c.shape;
  ExpertGradients grads;
  grads.hidden.resize(s.num_tokens * s.hidden_size);
  grads.up.resize(s.num_experts * s.hidden_size);
  grads.down.resize(s.num_experts * s.hidden_size);
  grads.routing.resize(s.num_tokens * s.k);
  for (int64_t pair = 0; pair < s.num_tokens * s.k; ++pair) {
    const int64_t t = pair / s.k, e = c.indices.wide[pair];
    const double pre_activation = dot(c.hidden, t, c.up, e, s.hidden_size);
    const double g = dot(c.grad, t, c.down, e, s.hidden_size);
    const double value = activate(c.activation, pre_activation);
    const double grad_pre_activation =
        c.routing[pair] * activate_grad(c.activation, pre_activation) * g;
    grads.routing[pair] = value * g;
    for (int64_t h = 0; h < s.hidden_size; ++h) {
      const int64_t at_token = t * s.hidden_size + h, at_expert = e * s.hidden_size + h;
      grads.hidden[at_token] += grad_pre_activation * c.up[at_expert];
      grads.up[at_expert] += grad_pre_activation * c.hidden[at_token];
      grads.down[at_expert] += c.routing[pair] * value * c.grad[at_token];
    }
  }
  return grads;
}

// ---- experts ------------------------------------------------------------------------------------

ExpertShape shape_of(const ExpertCase& c, IndexType type) {
  return {c.shape.num_tokens, c.shape.hidden_size, c.shape.num_experts, c.shape.k, c.dtype, type,
          c.activation};
}

// Expert states, then pre_activations.
std::pair<Buffer, Buffer> run_forward(const KernelTable& table, ExpertCase& c, IndexType type,
                                      const Executor& executor) {
  const auto& s = c.shape;
  Buffer out(c.dtype, s.num_tokens * s.hidden_size);
  const auto accumulation_dtype = c.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  Buffer pre_activations(accumulation_dtype, s.num_tokens * s.k);
  ExpertForwardParams params{shape_of(c, type)};
  params.hidden_states = c.hidden.data();
  params.up_weights = c.up.data();
  params.down_weights = c.down.data();
  params.routing_weights = c.routing.data();
  params.indices = c.indices.data(type);
  params.expert_states = out.data();
  params.pre_activations = pre_activations.data();
  table.expert_forward(params, executor);
  return {std::move(out), std::move(pre_activations)};
}

// The gradients of hidden, up, down and routing; those not wanted stay NaN.
std::vector<Buffer> run_backward(const KernelTable& table, ExpertCase& c, IndexType type,
                                 const Executor& executor, unsigned wanted = 0b1111) {
  const auto& s = c.shape;
  Buffer pre_activations = run_forward(table, c, type, executor).second;
  std::vector<Buffer> grads;
  for (const int64_t size : {s.num_tokens * s.hidden_size, s.num_experts * s.hidden_size,
                             s.num_experts * s.hidden_size, s.num_tokens * s.k}) {
    grads.emplace_back(c.dtype, size);
  }
  const auto data = [&](int i) { return wanted >> i & 1 ? grads[i].data() : nullptr; };
  ExpertBackwardParams params{shape_of(c, type)};
  params.grad_expert_states = c.grad.data();
  params.hidden_states = c.hidden.data();
  params.up_weights = c.up.data();
  params.down_weights = c.down.data();
  params.routing_weights = c.routing.data();
  params.indices = c.indices.data(type);
  params.pre_activations = pre_activations.data();
  params.grad_hidden_states = data(0);
  params.grad_up_weights = data(1);
  params.grad_down_weights = data(2);
  params.grad_routing_weights = data(3);
  // Bytes of the workspace as doubles, for the alignment; NaN and a guard, as in the outputs.
  const size_t bytes = expert_backward_workspace_size(params);
  Buffer workspace(DType::kFloat64, (bytes + 7) / 8);
  params.workspace = workspace.data();
  table.expert_backward(params, executor);
  EXPECT_TRUE(workspace.guard_is_whole());
  return grads;
}

void check_experts(const KernelTable& table, ExpertCase& c, const Executor& serial,
                   const Executor& two_threads) {
  const auto forward = run_forward(table, c, IndexType::kInt64, serial);
  expect_close(c.dtype, forward.first, expert_oracle(c), c.num_terms());
  EXPECT_EQ(run_forward(table, c, IndexType::kInt64, two_threads), forward);
  EXPECT_EQ(run_forward(table, c, IndexType::kInt32, two_threads), forward);

  const auto grads = run_backward(table, c, IndexType::kInt64, serial);
  const auto want = expert_backward_oracle(c);
  const double terms = c.dtype == DType::kFloat64 ? kDifferenceTerms : 0;
  expect_close(c.dtype, grads[0], want.hidden, c.num_terms(), terms);
  expect_close(c.dtype, grads[1], want.up, c.num_terms(), terms);
  expect_close(c.dtype, grads[2], want.down, c.num_terms(), terms);
  expect_close(c.dtype, grads[3], want.routing, c.num_terms(), terms);
  EXPECT_EQ(run_backward(table, c, IndexType::kInt64, two_threads), grads);
  EXPECT_EQ(run_backward(table, c, IndexType::kInt32, two_threads), grads);
}

TEST_P(CpuKernels, ExpertShapes) {
  for (const Sizes& shape : kExpertShapes) {
    for (const DType dtype : kDTypes) {
      SCOPED_TRACE(testing::Message() << "T " << shape.num_tokens << ", H " << shape.hidden_size
                                      << ", dtype " << int(dtype));
      ExpertCase c(random_, shape, dtype, Activation::kSilu, Pattern::kRandom);
      check_experts(GetParam(), c, serial_, two_threads_);
    }
  }
}

TEST_P(CpuKernels, ExpertActivationsAndPatterns) {
  for (const Activation activation : kActivations) {
    for (const Pattern pattern : kPatterns) {
      for (const DType dtype : kDTypes) {
        SCOPED_TRACE(testing::Message() << "activation " << int(activation) << ", pattern "
                                        << int(pattern) << ", dtype " << int(dtype));
        ExpertCase c(random_, {37, 40, 24, 5}, dtype, activation, pattern);
        check_experts(GetParam(), c, serial_, two_threads_);
      }
    }
  }
}

TEST_P(CpuKernels, ExpertGradientsNotWantedAreNotWritten) {
  ExpertCase c(random_, {37, 40, 24, 5}, DType::kFloat32, Activation::kSilu, Pattern::kRandom);
  const auto all = run_backward(GetParam(), c, IndexType::kInt32, serial_);
  for (unsigned wanted = 0; wanted < 16; ++wanted) {
    const auto some = run_backward(GetParam(), c, IndexType::kInt32, serial_, wanted);
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(some[i], wanted >> i & 1 ? all[i] : Buffer(c.dtype, all[i].size()));
    }
  }
}

// ---- exceptions ---------------------------------------------------------------------------------

// Runs bodies on another executor; from its call number `first_failure` on, they get no memory.
class ShortMemoryExecutor final : public Executor {
 public:
  ShortMemoryExecutor(const Executor& executor, int first_failure)
      : executor_(executor), calls_left_(first_failure) {}

  void parallel_for(int64_t begin, int64_t end, int64_t grain,
                    const std::function<void(int64_t, int64_t)>& body) const override {
    const bool fails = calls_left_-- <= 0;
    executor_.parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
      struct Shortage {
        explicit Shortage(bool fails) { memory_is_short = fails; }
        ~Shortage() { memory_is_short = false; }
      };
      const Shortage shortage(fails);
      body(from, to);
    });
  }

 private:
  const Executor& executor_;
  mutable int calls_left_;
};

TEST_P(CpuKernels, ExceptionsOfTheBodyReachTheCaller) {
  ExpertCase c(random_, {37, 40, 24, 5}, DType::kFloat32, Activation::kSilu, Pattern::kRandom);
  const auto want = run_backward(GetParam(), c, IndexType::kInt32, serial_);
  for (const Executor* executor :
       {static_cast<const Executor*>(&serial_), static_cast<const Executor*>(&two_threads_)}) {
    const int64_t num_live = num_live_allocations;
    // The forward, the backward in token order, the backward in expert order.
    for (int first_failure = 0; first_failure < 3; ++first_failure) {
      EXPECT_THROW(run_backward(GetParam(), c, IndexType::kInt32,
                                ShortMemoryExecutor(*executor, first_failure)),
                   std::bad_alloc);
      EXPECT_EQ(num_live_allocations, num_live);
    }
    EXPECT_EQ(run_backward(GetParam(), c, IndexType::kInt32, ShortMemoryExecutor(*executor, 3)),
              want);

    ExpertCase unknown = c;
    unknown.activation = static_cast<Activation>(99);
    EXPECT_THROW(run_forward(GetParam(), unknown, IndexType::kInt32, *executor),
                 std::invalid_argument);
  }
}

// ---- schedule, index check ----------------------------------------------------------------------

TEST(Schedule, GroupsPairsByExpertInOrder) {
  Random random;
  for (const int64_t num_pairs : {0, 1, 64, 1000}) {
    for (const int64_t num_experts : {1, 7, 5000}) {
      for (const IndexType type : {IndexType::kInt32, IndexType::kInt64}) {
        Indices indices;
        for (int64_t i = 0; i < num_pairs; ++i) indices.push_back(random.below(num_experts));
        std::vector<int64_t> offsets(num_experts + 2, -1), pairs(num_pairs + 1, -1);
        schedule({indices.data(type), offsets.data(), pairs.data(), num_pairs, num_experts, type});
        EXPECT_EQ(offsets.back(), -1);
        EXPECT_EQ(pairs.back(), -1);
        ASSERT_EQ(offsets[0], 0);
        ASSERT_EQ(offsets[num_experts], num_pairs);
        for (int64_t e = 0; e < num_experts; ++e) {
          std::vector<int64_t> want;
          for (int64_t pair = 0; pair < num_pairs; ++pair) {
            if (indices.wide[pair] == e) want.push_back(pair);
          }
          ASSERT_EQ(
              std::vector<int64_t>(pairs.begin() + offsets[e], pairs.begin() + offsets[e + 1]),
              want)
              << "expert " << e;
        }
      }
    }
  }
}

TEST(FindInvalidIndex, NamesTheFirst) {
  for (const IndexType type : {IndexType::kInt32, IndexType::kInt64}) {
    Indices indices;
    for (const int64_t id : {0, 4, 2, 1}) indices.push_back(id);
    const auto find = [&](int64_t count, int64_t num_experts) {
      return find_invalid_index(indices.data(type), type, count, num_experts);
    };
    EXPECT_EQ(find(4, 5), -1);
    EXPECT_EQ(find(4, 4), 1);
    EXPECT_EQ(find(4, 2), 1);
    EXPECT_EQ(find(0, 0), -1);
    EXPECT_EQ(find(4, 0), 0);
    indices.push_back(-1);
    indices.push_back(7);
    EXPECT_EQ(find(6, 5), 4);
  }
  const int64_t wraps_to_zero[] = {int64_t{1} << 32};
  EXPECT_EQ(find_invalid_index(wraps_to_zero, IndexType::kInt64, 1, 5), 0);
}

TEST(KernelTables, AreNamedAndEndWithTheBest) {
  ASSERT_FALSE(kernel_tables().empty());
  EXPECT_STREQ(kernel_tables().front().capability, "baseline");
  EXPECT_STREQ(kernels().capability, kernel_tables().back().capability);
}

INSTANTIATE_TEST_SUITE_P(Kernels, CpuKernels, testing::ValuesIn(kernel_tables()), capability_of);

}  // namespace
}  // namespace omni_moe::cpu
