// The CUDA router without an order of the K experts: the set and its weights are those of the CPU
// backend's sorted router, and two runs give the same order.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "cuda_router_testing.h"

namespace omni_moe {
namespace {

using CudaRouterUnsorted = CudaKernelTest;
using cuda::RouterForwardKernel;

// Positions of each token's pairs by ascending id.
std::vector<int64_t> order_by_id(const std::vector<int32_t>& ids, int64_t k) {
  std::vector<int64_t> order(ids.size());
  std::iota(order.begin(), order.end(), 0);
  for (size_t begin = 0; begin < ids.size(); begin += k) {
    std::sort(order.begin() + begin, order.begin() + begin + k,
              [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
  }
  return order;
}

template <typename Element>
std::vector<Element> gather(const std::vector<Element>& elements,
                            const std::vector<int64_t>& order) {
  std::vector<Element> result;
  for (const int64_t i : order) result.push_back(elements[i]);
  return result;
}

void check(Problem& p, RouterForwardKernel kernel) {
  const Case& c = p.c;
  SCOPED_TRACE(c.name());
  auto params = p.params_of<RouterForwardParams>(Side::kDevice);
  params.sorted = false;
  // Planned for a single SM, so that few tokens are many.
  auto device = cuda::current_device();
  device.num_sms = 1;
  const auto plan = cuda::plan_router_forward(params, device);
  ASSERT_EQ(plan.kernel, kernel);
  const auto got =
      run_twice({&p.weights.device, &p.device_ids}, plan.workspace_bytes, [&](void* workspace) {
        params.workspace = workspace;
        return cuda::router_forward(params, plan, nullptr);
      });
  const auto ids = integers_of<int32_t>(got[1]);
  const auto order = order_by_id(ids, c.k), want_order = order_by_id(p.ids, c.k);
  ASSERT_EQ(gather(p.ids, want_order), gather(ids, order));
  const Values want = gather(p.weights.values, want_order);
  expect_close(
      "weights", gather(decode(c.dtype, got[0]), order), want,
      [&](size_t i) {
        return p.is_softmax() ? rounding_error(c.dtype, want[i]) + 5e-6 * std::abs(want[i]) : 0;
      },
      NaNs::kMatch);
}

void check(const Case& c, RouterForwardKernel kernel = RouterForwardKernel::kUnsorted) {
  Problem p(c);
  check(p, kernel);
}

// More experts per token than the warp kernel takes, up to all of them.
void check_grid(int64_t num_tokens, int64_t num_rows, int64_t num_cols) {
  const int64_t pairs = num_rows * num_cols;
  for (const int64_t k :
       {int64_t{129}, int64_t{160}, int64_t{511}, int64_t{700}, pairs / 2, pairs - 1, pairs}) {
    if (k <= 128 || k > pairs || k > 5000) continue;
    for (const DType type : kDTypes) {
      for (const RouterScore score : kScores) {
        for (const Logits logits : kAllLogits) {
          check({num_tokens, num_rows, num_cols, k, type, score, logits});
        }
        if (testing::Test::HasFailure()) return;
      }
    }
  }
}

TEST_F(CudaRouterUnsorted, Grid12x12) { check_grid(37, 12, 12); }
TEST_F(CudaRouterUnsorted, Grid64x64) { check_grid(7, 64, 64); }
TEST_F(CudaRouterUnsorted, Grid37x100) { check_grid(5, 37, 100); }
TEST_F(CudaRouterUnsorted, Grid100x37) { check_grid(5, 100, 37); }
TEST_F(CudaRouterUnsorted, Grid1x300) { check_grid(3, 1, 300); }
TEST_F(CudaRouterUnsorted, Grid300x1) { check_grid(3, 300, 1); }
TEST_F(CudaRouterUnsorted, Grid65x257) { check_grid(2, 65, 257); }
TEST_F(CudaRouterUnsorted, Grid7x600) { check_grid(3, 7, 600); }

TEST_F(CudaRouterUnsorted, PapersGrid) {
  for (const int64_t k : {512, 4096, 12500}) {
    for (const DType type : kDTypes) {
      for (const Logits logits : kFiniteLogits) {
        for (const RouterScore score : kScores) check({5, 320, 320, k, type, score, logits});
      }
      check({5, 320, 320, k, type, RouterScore::kSoftmaxTopK, Logits::kMasked});
      check({5, 320, 320, k, type, RouterScore::kLogit, Logits::kSpecial});
    }
  }
}

TEST_F(CudaRouterUnsorted, LongestAxes) {
  for (const DType type : kDTypes) {
    for (const RouterScore score : kScores) {
      check({3, 1024, 1024, 4096, type, score, Logits::kNormal});
      check({3, 1024, 1024, 2000, type, score, Logits::kTies});
      check({3, 3, 1024, 200, type, score, Logits::kNormal});
      check({3, 1023, 5, 200, type, score, Logits::kNormal});
    }
  }
}

// As many blocks as an SM holds, and more.
TEST_F(CudaRouterUnsorted, ManyTokens) {
  for (const DType type : kDTypes) {
    check({4099, 40, 48, 200, type, RouterScore::kSoftmax, Logits::kNormal});
  }
}

// Sums of finite logits that overflow are told apart as halves.
TEST_F(CudaRouterUnsorted, SumsThatOverflow) {
  for (const DType type : {DType::kFloat32, DType::kBFloat16}) {
    for (const RouterScore score : kScores) {
      for (const int64_t k : {200, 1500}) {
        Problem p({9, 40, 50, k, type, score, Logits::kNormal});
        std::mt19937 random(5);
        std::uniform_real_distribution<double> share(-1, 1);
        const auto fill = [&](Operand& logits) {
          logits.fill([&] { return share(random) * 3.3e38; });
        };
        fill(p.x);
        fill(p.y);
        p.softmax_x = softmax(p.x.values, p.c.num_tokens, p.c.num_rows);
        p.softmax_y = softmax(p.y.values, p.c.num_tokens, p.c.num_cols);
        p.choose();
        check(p, RouterForwardKernel::kUnsorted);
      }
    }
  }
}

// Where there is no such kernel the sorted ones answer.
TEST_F(CudaRouterUnsorted, OtherShapes) {
  for (const DType type : kDTypes) {
    check({37, 64, 64, 16, type, RouterScore::kSoftmax, Logits::kTies}, RouterForwardKernel::kWarp);
    check({3, 1025, 300, 200, type, RouterScore::kSoftmax, Logits::kTies},
          RouterForwardKernel::kBlock);
  }
}

}  // namespace
}  // namespace omni_moe
