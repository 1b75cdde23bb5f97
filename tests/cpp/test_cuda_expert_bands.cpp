// The expert passes by bands: the lists of cover and schedule against the same rule on the host,
// and both passes against the CPU backend's in fp64, for ids of a router and for ids that no router
// would choose. Outputs and workspace are poisoned before each run, every element is checked, and a
// second run must repeat the first bit for bit.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <ostream>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/experts/bands/bands.h"
#include "cuda/experts/expert_plan.h"
#include "cuda/experts/schedule.h"
#include "cuda_kernel_testing.h"

namespace omni_moe {
namespace {

// ---- ids ----

enum class Routing {
  kRouter,      // the K best of x[row] + y[col] with normal logits
  kUniform,     // any experts, repeated ones too
  kDistinct,    // any K different experts
  kOneExpert,   // the same one K times
  kOneRow,      // cells of one row, the same of all tokens, repeated where K > C
  kOneColumn,   // of one column
  kDiagonal,    // no two in the same row or column, where K allows
  kDuplicates,  // a router's, each twice
};
constexpr Routing kRoutings[] = {Routing::kRouter,    Routing::kUniform,   Routing::kDistinct,
                                 Routing::kOneExpert, Routing::kOneRow,    Routing::kOneColumn,
                                 Routing::kDiagonal,  Routing::kDuplicates};

struct Grid {
  int64_t rows, cols;
  int64_t size() const { return rows * cols; }
};

std::vector<int64_t> routers_choice(const Grid& grid, int64_t k, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  Values x(grid.rows), y(grid.cols);
  for (double& value : x) value = normal(random);
  for (double& value : y) value = normal(random);
  std::vector<int64_t> ids(grid.size());
  std::iota(ids.begin(), ids.end(), 0);
  const auto score = [&](int64_t id) { return x[id / grid.cols] + y[id % grid.cols]; };
  std::partial_sort(ids.begin(), ids.begin() + k, ids.end(),
                    [&](int64_t a, int64_t b) { return score(a) > score(b); });
  ids.resize(k);
  return ids;
}

std::vector<int64_t> ids_of_token(Routing routing, const Grid& grid, int64_t k, int64_t token,
                                  std::mt19937_64& random) {
  std::vector<int64_t> ids(k);
  switch (routing) {
    case Routing::kRouter:
      return routers_choice(grid, k, random);
    case Routing::kUniform:
      for (int64_t& id : ids) id = static_cast<int64_t>(random() % grid.size());
      break;
    case Routing::kDistinct: {
      std::vector<int64_t> all(grid.size());
      std::iota(all.begin(), all.end(), 0);
      std::shuffle(all.begin(), all.end(), random);
      std::copy_n(all.begin(), k, ids.begin());
      break;
    }
    case Routing::kOneExpert:
      std::fill(ids.begin(), ids.end(), grid.size() - 1);
      break;
    case Routing::kOneRow:
      for (int64_t i = 0; i < k; ++i) ids[i] = (grid.rows - 1) * grid.cols + i % grid.cols;
      break;
    case Routing::kOneColumn:
      for (int64_t i = 0; i < k; ++i) ids[i] = i % grid.rows * grid.cols + grid.cols / 2;
      break;
    case Routing::kDiagonal:
      for (int64_t i = 0; i < k; ++i) {
        ids[i] = (i + token) % grid.rows * grid.cols + (i + i / grid.rows) % grid.cols;
      }
      break;
    case Routing::kDuplicates:
      ids = routers_choice(grid, (k + 1) / 2, random);
      ids.resize(k);
      std::copy_n(ids.begin(), k / 2, ids.begin() + (k + 1) / 2);
      break;
  }
  return ids;
}

struct Case {
  int64_t num_tokens;
  Grid grid;
  int64_t num_experts_per_token, hidden_size;
  Routing routing = Routing::kRouter;
  DType dtype = DType::kBFloat16;
  IndexType index_type = IndexType::kInt32;
  Activation activation = Activation::kSilu;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << "T" << c.num_tokens << "_R" << c.grid.rows << "_C" << c.grid.cols << "_K"
             << c.num_experts_per_token << "_H" << c.hidden_size << "_routing" << int(c.routing)
             << "_" << name_of(c.dtype) << "_index" << int(c.index_type) << "_act"
             << int(c.activation);
}

std::vector<int64_t> ids_of(const Case& c) {
  std::mt19937_64 random(11);
  std::vector<int64_t> ids;
  ids.reserve(c.num_tokens * c.num_experts_per_token);
  for (int64_t token = 0; token < c.num_tokens; ++token) {
    const auto own = ids_of_token(c.routing, c.grid, c.num_experts_per_token, token, random);
    ids.insert(ids.end(), own.begin(), own.end());
  }
  return ids;
}

Bytes bytes_of_ids(const std::vector<int64_t>& ids, IndexType index_type) {
  if (index_type == IndexType::kInt64) return bytes_of(ids);
  return bytes_of(std::vector<int32_t>(ids.begin(), ids.end()));
}

cuda::TokenPassShape shape_of(const Case& c) {
  return {c.num_tokens,     c.hidden_size,       c.grid.size(), c.num_experts_per_token,
          size_of(c.dtype), /*is_aligned=*/true, c.grid.cols};
}

// ---- cover and schedule ----

// The lists of one token as bands.h describes them.
struct HostCover {
  std::vector<cuda::TokenTask> tasks;
  std::vector<cuda::BandPair> pairs;
  int tail = 0;
};

HostCover cover_on_host(const int64_t* ids, int64_t k, const cuda::BandPlan& plan) {
  const auto row_of = [&](int64_t i) { return static_cast<int>(ids[i] / plan.num_cols); };
  const auto col_of = [&](int64_t i) { return static_cast<int>(ids[i] % plan.num_cols); };
  std::vector<int> sizes(plan.num_rows + plan.num_cols), slots(sizes.size(), -1);
  for (int64_t i = 0; i < k; ++i) ++sizes[row_of(i)];
  int height = 0;
  for (int h = 1; h <= plan.num_rows; ++h) {
    const auto reach = std::count_if(sizes.begin(), sizes.begin() + plan.num_rows,
                                     [&](int size) { return size >= h; });
    if (reach >= h) height = h;
  }
  std::vector<std::vector<cuda::BandPair>> lists;
  std::vector<int> bands;
  const auto choose = [&](int first, int last, int threshold) {
    for (int band = first; band < last; ++band) {
      if (sizes[band] < threshold || static_cast<int>(bands.size()) == plan.max_tasks) continue;
      slots[band] = static_cast<int>(bands.size());
      bands.push_back(band);
    }
  };
  choose(0, plan.num_rows, std::max(height, plan.min_pairs));
  for (int64_t i = 0; i < k; ++i) {
    if (slots[row_of(i)] < 0) ++sizes[plan.num_rows + col_of(i)];
  }
  choose(plan.num_rows, plan.num_rows + plan.num_cols, plan.min_pairs);
  lists.resize(bands.size() + 1);
  for (int64_t i = 0; i < k; ++i) {
    const int row = row_of(i), col = col_of(i);
    const bool in_row = slots[row] >= 0;
    const int slot = in_row ? slots[row] : slots[plan.num_rows + col];
    const auto place = static_cast<uint32_t>(in_row ? col : row);
    lists[slot >= 0 ? slot : bands.size()].push_back(place << 16 | static_cast<uint32_t>(i));
  }
  HostCover cover;
  std::vector<cuda::BandPair> overflow;
  for (size_t slot = 0; slot < bands.size(); ++slot) {
    const size_t kept = std::min<size_t>(lists[slot].size(), cuda::band_length(plan, bands[slot]));
    cover.tasks.push_back(
        {bands[slot], static_cast<int>(cover.pairs.size()), static_cast<int>(kept), 0});
    cover.pairs.insert(cover.pairs.end(), lists[slot].begin(), lists[slot].begin() + kept);
    overflow.insert(overflow.end(), lists[slot].begin() + kept, lists[slot].end());
  }
  cover.tail = static_cast<int>(cover.pairs.size());
  cover.pairs.insert(cover.pairs.end(), lists.back().begin(), lists.back().end());
  cover.pairs.insert(cover.pairs.end(), overflow.begin(), overflow.end());
  return cover;
}

template <class T>
std::vector<T> download(const T* device, size_t count) {
  std::vector<T> host(count);
  if (count > 0) {
    EXPECT_EQ(cudaSuccess,
              cudaMemcpy(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost));
  }
  return host;
}

class CudaExpertBands : public CudaKernelTest, public testing::WithParamInterface<Case> {
 protected:
  void SetUp() override {
    CudaKernelTest::SetUp();
    if (!IsSkipped() && !cuda::current_device().has_hopper_kernels)
      GTEST_SKIP() << "needs kernels of Hopper";
  }
};

TEST_P(CudaExpertBands, CoverAndSchedule) {
  const Case& c = GetParam();
  const auto shape = shape_of(c);
  if (c.num_tokens == 0) return;
  ASSERT_TRUE(cuda::bands_support(shape));
  cuda::BandPlan plan = cuda::plan_bands(shape);
  plan.has_weight_gradients = true;
  const cuda::BandShape bands{static_cast<int>(c.num_tokens),
                              static_cast<int>(c.num_experts_per_token),
                              static_cast<int>(c.grid.size()), plan};
  const auto ids = ids_of(c);
  const DeviceArray device_ids(bytes_of_ids(ids, c.index_type));
  const DeviceArray memory(cuda::band_workspace_bytes(shape, plan));
  const auto workspace = cuda::cut_band_workspace(bands, c.hidden_size, memory.data());
  expect_success(
      cuda::band_cover(bands, device_ids.data(), c.index_type, workspace, /*stream=*/nullptr));
  expect_success(cuda::band_schedule(bands, workspace, nullptr));
  expect_success(cuda::band_tails(bands, workspace, nullptr));
  memory.read();  // its guards

  // 1. Each token's lists.
  const int64_t k = c.num_experts_per_token;
  const auto covers = download(workspace.covers, c.num_tokens);
  const auto pairs = download(workspace.pairs, c.num_tokens * k);
  const auto places = download(workspace.places, c.num_tokens * k);
  std::vector<std::vector<int>> tails(plan.num_cols);
  const auto token_tasks = download(workspace.token_tasks, bands.max_tasks());
  const auto positions = download(workspace.positions, bands.max_tasks());
  std::vector<std::vector<cuda::BandTask>> by_band(bands.num_bands());
  std::vector<std::vector<int64_t>> place_of_position(bands.num_bands());
  for (int64_t token = 0; token < c.num_tokens; ++token) {
    const HostCover want = cover_on_host(ids.data() + token * k, k, plan);
    ASSERT_EQ(covers[token].num_tasks, static_cast<int>(want.tasks.size())) << token;
    ASSERT_EQ(covers[token].tail, want.tail) << token;
    for (size_t i = 0; i < want.tasks.size(); ++i) {
      const auto& got = token_tasks[token * plan.max_tasks + i];
      ASSERT_EQ(got.band, want.tasks[i].band) << token << " " << i;
      ASSERT_EQ(got.first, want.tasks[i].first) << token << " " << i;
      ASSERT_EQ(got.num_pairs, want.tasks[i].num_pairs) << token << " " << i;
      std::set<uint32_t> places_of_task;
      for (int at = got.first; at < got.first + got.num_pairs; ++at) {
        places_of_task.insert(want.pairs[at] >> 16);
      }
      const bool has_repeats = static_cast<int>(places_of_task.size()) < got.num_pairs;
      ASSERT_EQ(got.has_repeats, has_repeats) << token << " " << i;
      by_band[got.band].push_back({static_cast<int>(token), static_cast<int>(token * k) + got.first,
                                   got.num_pairs, has_repeats});
      place_of_position[got.band].push_back(token * plan.max_tasks + static_cast<int64_t>(i));
    }
    std::vector<bool> seen(k);
    for (int64_t i = 0; i < k; ++i) {
      const uint32_t got = pairs[token * k + i];
      ASSERT_LT(got & 0xffff, k);
      ASSERT_FALSE(seen[got & 0xffff]) << "pair " << (got & 0xffff) << " of token " << token;
      seen[got & 0xffff] = true;
      if (i < want.tail) {
        ASSERT_EQ(got, want.pairs[i]) << token << " " << i;
        ASSERT_EQ(places[token * k + i], want.pairs[i] >> 16) << token << " " << i;
      } else {
        const uint32_t pair = want.pairs[i] & 0xffff;
        const int64_t id = ids[token * k + pair];
        const auto row = static_cast<uint32_t>(id / plan.num_cols);
        const int64_t col = id % plan.num_cols;
        ASSERT_EQ(got, row << 16 | pair) << token << " " << i;
        ASSERT_EQ(places[token * k + i], col) << token << " " << i;
        tails[col].push_back(static_cast<int>(token * k + i));
      }
    }
  }

  // 2. All tasks and their tiles.
  const auto num_tiles = download(workspace.num_tiles, 1)[0];
  const auto tiles = download(workspace.tiles, num_tiles);
  const auto tasks = download(workspace.tasks, bands.max_tasks());
  int position = 0;
  int tile = 0;
  for (int band = 0; band < bands.num_bands(); ++band) {
    const int size = static_cast<int>(by_band[band].size());
    for (int first = 0; first < size; first += cuda::BandTuning::kTileTasks, ++tile) {
      ASSERT_LT(tile, num_tiles);
      EXPECT_EQ(tiles[tile].band, band);
      EXPECT_EQ(tiles[tile].first_task, position + first);
      EXPECT_EQ(tiles[tile].num_tasks, std::min(size - first, cuda::BandTuning::kTileTasks));
    }
    for (int i = 0; i < size; ++i, ++position) {
      ASSERT_EQ(tasks[position].token, by_band[band][i].token) << "task " << position;
      ASSERT_EQ(tasks[position].first, by_band[band][i].first) << "task " << position;
      ASSERT_EQ(tasks[position].num_pairs, by_band[band][i].num_pairs) << "task " << position;
      ASSERT_EQ(tasks[position].has_repeats, by_band[band][i].has_repeats) << "task " << position;
      ASSERT_EQ(positions[place_of_position[band][i]], position);
    }
  }
  EXPECT_EQ(tile, num_tiles);

  // 3. What the tables' gradients sum.
  const auto ranges = download(workspace.ranges, bands.num_bands());
  const auto all_tails = download(workspace.tails, c.num_tokens * k);
  int first_task = 0, first_tail = 0;
  for (int band = 0; band < bands.num_bands(); ++band) {
    const int num_tasks = static_cast<int>(by_band[band].size());
    ASSERT_EQ(ranges[band].num_tasks, num_tasks) << band;
    if (num_tasks > 0) ASSERT_EQ(ranges[band].first_task, first_task) << band;
    first_task += num_tasks;
    const auto want =
        band < plan.num_rows ? std::vector<int>() : std::move(tails[band - plan.num_rows]);
    ASSERT_EQ(ranges[band].num_tails, static_cast<int>(want.size())) << band;
    if (want.empty()) continue;
    ASSERT_EQ(ranges[band].first_tail, first_tail) << band;
    const auto begin = all_tails.begin() + first_tail;
    ASSERT_EQ(std::vector<int>(begin, begin + want.size()), want) << band;
    first_tail += static_cast<int>(want.size());
  }
}

// ---- passes ----

struct Problem {
  explicit Problem(const Case& c)
      : c(c),
        hidden(c.dtype, c.num_tokens * c.hidden_size),
        grad(c.dtype, c.num_tokens * c.hidden_size),
        up(c.dtype, c.grid.size() * c.hidden_size),
        down(c.dtype, c.grid.size() * c.hidden_size),
        routing(c.dtype, num_pairs()),
        addend(c.dtype, c.num_tokens * c.hidden_size),
        out(c.dtype, c.num_tokens * c.hidden_size),
        grad_hidden(c.dtype, c.num_tokens * c.hidden_size),
        grad_up(c.dtype, c.grid.size() * c.hidden_size),
        grad_down(c.dtype, c.grid.size() * c.hidden_size),
        grad_routing(c.dtype, num_pairs()),
        pre_activations(DType::kFloat32, num_pairs()),
        ids(ids_of(c)),
        host_ids(bytes_of_ids(ids, c.index_type)),
        device_ids(host_ids) {
    std::mt19937 random(7);
    fill_normal(hidden, random);
    fill_normal(grad, random);
    fill_normal(up, random, 1.5 / std::sqrt(double(c.hidden_size)));
    fill_normal(down, random, 1.5 / std::sqrt(double(c.hidden_size)));
    fill_normal(routing, random);
    fill_normal(addend, random);
    cpu::expert_forward(params_of<ExpertForwardParams>(Side::kHost), kSerial);
  }

  int64_t num_pairs() const { return c.num_tokens * c.num_experts_per_token; }

  template <typename Params>
  Params params_of(Side side) {
    Params params{};
    params.num_tokens = c.num_tokens;
    params.hidden_size = c.hidden_size;
    params.num_experts = c.grid.size();
    params.num_experts_per_token = c.num_experts_per_token;
    params.dtype = dtype_on(side, c.dtype);
    params.index_type = c.index_type;
    params.activation = c.activation;
    params.num_cols = c.grid.cols;
    params.hidden_states = hidden.at(side);
    params.up_weights = up.at(side);
    params.down_weights = down.at(side);
    params.routing_weights = routing.at(side);
    params.indices = side == Side::kDevice ? device_ids.data() : host_ids.data();
    params.addend = c.num_tokens % 2 == 1 ? addend.at(side) : nullptr;
    params.pre_activations = pre_activations.at(side);
    if constexpr (std::is_same_v<Params, ExpertForwardParams>) {
      params.expert_states = out.at(side);
    } else {
      params.grad_expert_states = grad.at(side);
      params.grad_hidden_states = grad_hidden.at(side);
      params.grad_up_weights = grad_up.at(side);
      params.grad_down_weights = grad_down.at(side);
      params.grad_routing_weights = grad_routing.at(side);
    }
    return params;
  }

  void solve_backward() {
    pre_activations.upload();
    auto params = params_of<ExpertBackwardParams>(Side::kHost);
    struct alignas(64) Line {
      unsigned char bytes[64];
    };
    std::vector<Line> workspace(cpu::expert_backward_workspace_size(params) / sizeof(Line) + 1);
    params.workspace = workspace.data();
    cpu::expert_backward(params, kSerial);
  }

  // The root of the sum of the squares of what is added up to each element of a pass's output:
  // coefficients times rows of `table`. Coefficients and partial outputs are rounded.
  Values sizes_of_sums(const Values& coefficients, const Values& table) const {
    const int64_t k = c.num_experts_per_token, width = c.hidden_size;
    Values sums(c.num_tokens * width);
    for (int64_t pair = 0; pair < num_pairs(); ++pair) {
      const double* row = table.data() + ids[pair] * width;
      double* sum = sums.data() + pair / k * width;
      const double square = coefficients[pair] * coefficients[pair];
      for (int64_t h = 0; h < width; ++h) sum[h] += square * row[h] * row[h];
    }
    for (double& sum : sums) sum = std::sqrt(sum);
    return sums;
  }

  // The same of the tables' gradients: coefficients times rows of `states`, a token's.
  Values sizes_of_table_sums(const Values& coefficients, const Values& states) const {
    const int64_t k = c.num_experts_per_token, width = c.hidden_size;
    Values sums(c.grid.size() * width);
    for (int64_t pair = 0; pair < num_pairs(); ++pair) {
      const double* row = states.data() + pair / k * width;
      double* sum = sums.data() + ids[pair] * width;
      const double square = coefficients[pair] * coefficients[pair];
      for (int64_t h = 0; h < width; ++h) sum[h] += square * row[h] * row[h];
    }
    for (double& sum : sums) sum = std::sqrt(sum);
    return sums;
  }

  Case c;
  Operand hidden, grad, up, down, routing, addend;
  Operand out, grad_hidden, grad_up, grad_down, grad_routing;
  Operand pre_activations;
  std::vector<int64_t> ids;
  Bytes host_ids;
  DeviceArray device_ids;
};

cuda::ExpertForwardPlan plan_of(const ExpertForwardParams& params) {
  const cuda::DeviceInfo device = cuda::current_device();
  const auto bands = cuda::plan_token_pass(cuda::token_pass_shape(params), device,
                                           cuda::TokenPassStrategy::kBands);
  return cuda::plan_expert_forward(params, device, bands);
}
cuda::ExpertBackwardPlan plan_of(const ExpertBackwardParams& params) {
  const cuda::DeviceInfo device = cuda::current_device();
  const auto bands = cuda::plan_token_pass(cuda::token_pass_shape(params), device,
                                           cuda::TokenPassStrategy::kBands);
  const int64_t num_pairs = params.num_tokens * params.num_experts_per_token;
  return cuda::plan_expert_backward(params, device, bands,
                                    cuda::sort_storage_bytes({num_pairs, params.num_experts}));
}

// Each coefficient and each partial output has lost at most a rounding; of many, the root of the
// sum of their squares tells how far they go together, and six times its deviation is never seen.
void expect_close_sums(const char* name, const Operand& output, const Bytes& got,
                       const Values& sizes) {
  const double unit = unit_roundoff(output.dtype);
  expect_close(name, decode(output.dtype, got), output.values, [&](size_t i) {
    return 2 * unit * std::abs(output.values[i]) + 5 * unit * sizes[i] +
           rounding_error(output.dtype, 0) * 64 + 2e-6;
  });
}

void expect_close_values(const char* name, const Operand& output, const Bytes& got) {
  const bool is_fp32 = output.dtype == DType::kFloat32;
  const double relative = is_fp32 ? 2e-5 : 2 * unit_roundoff(output.dtype);
  double largest = 1;
  for (const double value : output.values) largest = std::max(largest, std::abs(value));
  const double absolute = (is_fp32 ? 5e-5 : 2e-4) * largest;
  expect_close(name, decode(output.dtype, got), output.values,
               [&](size_t i) { return relative * std::abs(output.values[i]) + absolute; });
}

TEST_P(CudaExpertBands, Forward) {
  Problem problem(GetParam());
  auto params = problem.params_of<ExpertForwardParams>(Side::kDevice);
  if (params.num_tokens == 0) return;
  const auto plan = plan_of(params);
  const auto got = run_twice({&problem.out.device, &problem.pre_activations.device},
                             plan.workspace_bytes, [&](void* workspace) {
                               params.workspace = workspace;
                               return cuda::expert_forward(params, plan, nullptr);
                             });
  Values coefficients = activate(problem.c.activation, problem.pre_activations.values).value;
  for (int64_t i = 0; i < problem.num_pairs(); ++i) coefficients[i] *= problem.routing.values[i];
  expect_close_sums("expert_states", problem.out, got[0],
                    problem.sizes_of_sums(coefficients, problem.down.values));
  expect_close_values("pre_activations", problem.pre_activations, got[1]);
}

TEST_P(CudaExpertBands, Backward) {
  Problem problem(GetParam());
  problem.solve_backward();
  auto params = problem.params_of<ExpertBackwardParams>(Side::kDevice);
  if (params.num_tokens == 0) return;
  const auto plan = plan_of(params);
  const size_t bytes = plan.workspace_bytes;
  const std::vector<const DeviceArray*> outputs = {
      &problem.grad_hidden.device, &problem.grad_up.device, &problem.grad_down.device,
      &problem.grad_routing.device};
  const auto launch = [&](void* workspace) {
    params.workspace = workspace;
    return cuda::expert_backward(params, plan, nullptr);
  };
  const auto got = run_twice(outputs, bytes, launch);
  Values coefficients = activate(problem.c.activation, problem.pre_activations.values).slope;
  const int64_t width = problem.c.hidden_size;
  for (int64_t i = 0; i < problem.num_pairs(); ++i) {
    const double* grad = problem.grad.values.data() + i / problem.c.num_experts_per_token * width;
    const double* down = problem.down.values.data() + problem.ids[i] * width;
    coefficients[i] *=
        problem.routing.values[i] * std::inner_product(grad, grad + width, down, 0.0);
  }
  expect_close_sums("grad_hidden", problem.grad_hidden, got[0],
                    problem.sizes_of_sums(coefficients, problem.up.values));
  expect_close_sums("grad_up", problem.grad_up, got[1],
                    problem.sizes_of_table_sums(coefficients, problem.hidden.values));
  Values down_coefficients = activate(problem.c.activation, problem.pre_activations.values).value;
  for (int64_t i = 0; i < problem.num_pairs(); ++i) {
    down_coefficients[i] *= problem.routing.values[i];
  }
  expect_close_sums("grad_down", problem.grad_down, got[2],
                    problem.sizes_of_table_sums(down_coefficients, problem.grad.values));
  expect_close_values("grad_routing", problem.grad_routing, got[3]);

  // The gradient of the routing weights alone takes no second product.
  params.grad_hidden_states = params.grad_up_weights = params.grad_down_weights = nullptr;
  const auto alone = run_twice({&problem.grad_routing.device}, bytes, launch);
  EXPECT_TRUE(alone[0] == got[3]);

  // One table's gradient alone is that of both.
  params.grad_routing_weights = nullptr;
  params.grad_down_weights = problem.grad_down.device.data();
  EXPECT_TRUE(run_twice({&problem.grad_down.device}, bytes, launch)[0] == got[2]);
}

// A captured pass repeats the bits of a launched one, also after the workspace has been used for
// other ids.
TEST(CudaExpertBandsGraph, Replays) {
  if (!cuda::current_device().has_hopper_kernels) GTEST_SKIP() << "needs kernels of Hopper";
  Problem problem({300, {40, 40}, 64, 256});
  auto params = problem.params_of<ExpertForwardParams>(Side::kDevice);
  const auto plan = plan_of(params);
  const DeviceArray workspace(plan.workspace_bytes);
  params.workspace = workspace.data();
  expect_success(cuda::expert_forward(params, plan, nullptr));
  const Bytes want = problem.out.device.read();

  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  ASSERT_EQ(cudaSuccess, cudaStreamCreate(&stream));
  ASSERT_EQ(cudaSuccess, cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  EXPECT_EQ(cudaSuccess, cuda::expert_forward(params, plan, stream));
  ASSERT_EQ(cudaSuccess, cudaStreamEndCapture(stream, &graph));
  ASSERT_EQ(cudaSuccess, cudaGraphInstantiate(&executable, graph, 0));
  for (const bool is_shifted : {true, false}) {
    auto ids = problem.ids;
    for (int64_t& id : ids) id = is_shifted ? (id + 41) % problem.c.grid.size() : id;
    problem.device_ids.upload(bytes_of_ids(ids, problem.c.index_type));
    problem.out.device.poison();
    ASSERT_EQ(cudaSuccess, cudaGraphLaunch(executable, stream));
    ASSERT_EQ(cudaSuccess, cudaStreamSynchronize(stream));
    EXPECT_EQ(problem.out.device.read() == want, !is_shifted);
  }
  EXPECT_EQ(cudaSuccess, cudaGraphExecDestroy(executable));
  EXPECT_EQ(cudaSuccess, cudaGraphDestroy(graph));
  EXPECT_EQ(cudaSuccess, cudaStreamDestroy(stream));
}

std::vector<Case> cases() {
  std::vector<Case> cases;
  const auto bf16 = DType::kBFloat16;
  const auto fp16 = DType::kFloat16;
  const auto i32 = IndexType::kInt32;
  const auto i64 = IndexType::kInt64;
  for (const Routing routing : kRoutings) {
    cases.push_back({199, {17, 24}, 16, 72, routing, bf16, i32});
    cases.push_back({37, {64, 64}, 64, 256, routing, fp16, i64});
    cases.push_back({37, {100, 40}, 100, 1000, routing, bf16, i64});
    cases.push_back({300, {130, 40}, 33, 64, routing, bf16, i32});
    cases.push_back({1, {8, 8}, 7, 8, routing, bf16, i32});
    cases.push_back({19, {40, 200}, 512, 264, routing, fp16, i32});
  }
  for (const int64_t tokens : {0, 1, 37, 199}) {
    for (const int64_t width : {8, 64, 1000, 1024}) {
      cases.push_back({tokens, {32, 32}, 16, width, Routing::kRouter, bf16, i32});
    }
  }
  cases.push_back({37, {17, 24}, 17 * 24, 136, Routing::kDistinct, bf16, i32});  // all experts
  cases.push_back({150, {5, 7}, 35, 64, Routing::kRouter, fp16, i32});           // all, small
  cases.push_back({3, {64, 64}, 4096, 64, Routing::kRouter, bf16, i32});         // all, many
  cases.push_back({64, {1, 200}, 50, 64, Routing::kRouter, bf16, i32});          // one row
  cases.push_back({64, {200, 1}, 50, 64, Routing::kRouter, bf16, i64});          // one column
  cases.push_back({1300, {32, 32}, 32, 64, Routing::kRouter, bf16, i32});
  cases.push_back({1024, {64, 64}, 100, 64, Routing::kRouter, bf16, i32});
  cases.push_back({2100, {16, 16}, 16, 128, Routing::kOneRow, bf16, i32});  // many tiles of a band
  cases.push_back({64, {160, 150}, 256, 512, Routing::kRouter, bf16, i32});
  cases.push_back({64, {256, 256}, 256, 64, Routing::kRouter, fp16, i32});
  cases.push_back({40, {320, 320}, 512, 128, Routing::kRouter, bf16, i32});
  cases.push_back({40, {320, 320}, 512, 64, Routing::kUniform, bf16, i32});
  cases.push_back({700, {40, 320}, 64, 192, Routing::kOneRow, fp16, i32});  // of several layouts
  cases.push_back({700, {320, 40}, 64, 136, Routing::kOneColumn, bf16, i32});
  cases.push_back({300, {400, 330}, 200, 264, Routing::kOneRow, bf16, i32});
  cases.push_back({12, {320, 320}, 4096, 64, Routing::kRouter, bf16, i32});
  cases.push_back({20, {400, 330}, 300, 64, Routing::kRouter, bf16, i32});  // longer than 320
  cases.push_back({20, {40, 512}, 300, 64, Routing::kRouter, fp16, i32});
  for (const int64_t width : {2056, 4096, 8192}) {  // several pieces a thread in the sum
    cases.push_back({20, {24, 24}, 24, width, Routing::kUniform, bf16, i32});
  }
  for (const Activation activation : kActivations) {
    cases.push_back({37, {32, 32}, 16, 64, Routing::kRouter, bf16, i32, activation});
  }
  return cases;
}

std::string name_of_case(const testing::TestParamInfo<Case>& info) {
  return testing::PrintToString(info.param) + "_" + std::to_string(info.index);
}

INSTANTIATE_TEST_SUITE_P(Cases, CudaExpertBands, testing::ValuesIn(cases()), name_of_case);

}  // namespace
}  // namespace omni_moe
