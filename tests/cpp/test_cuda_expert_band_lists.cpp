// The lists of the expert passes by bands, against the same rules on the host: which experts of a
// token are taken by which band, the order in which bands are worked off, and what the tables'
// gradients sum.
#include <algorithm>
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "cuda/experts/bands/bands.h"
#include "cuda/experts/expert_plan.h"
#include "cuda_expert_bands_testing.h"

namespace omni_moe {
namespace {

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

cuda::TokenPassShape shape_of(const BandCase& c) {
  return {c.num_tokens,     c.hidden_size,       c.grid.size(), c.num_experts_per_token,
          size_of(c.dtype), /*is_aligned=*/true, c.grid.cols};
}

TEST_P(CudaExpertBands, CoverAndSchedule) {
  const BandCase& c = GetParam();
  const auto shape = shape_of(c);
  if (c.num_tokens == 0) return;
  ASSERT_TRUE(cuda::bands_support(shape));
  cuda::BandPlan plan = cuda::plan_bands(shape);
  plan.has_weight_gradients = true;
  const cuda::BandShape bands = cuda::band_shape(shape, plan);
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
    if (num_tasks > 0) {
      ASSERT_EQ(ranges[band].first_task, first_task) << band;
    }
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

INSTANTIATE_TEST_SUITE_P(Cases, CudaExpertBands, testing::ValuesIn(band_cases()), name_of_case);

}  // namespace
}  // namespace omni_moe
