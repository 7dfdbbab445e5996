// The engine from end to end, each rank a thread of this process.

#include "tests/support/rank_threads.h"

#include <gtest/gtest.h>

#include <numeric>

namespace hvd::testing {
namespace {

std::vector<float> ramp(std::size_t count, int rank) {
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<float>(i % 97) + static_cast<float>(rank);
  return values;
}

TEST(RankThreads, SumOfAllRanksArrivesOnEachOfThem) {
  for (const int size : {1, 2, 3, 4, 8}) {
    run_ranks(size, [size](TestRank& hvd) {
      for (const std::size_t count : {std::size_t{1}, std::size_t{1000}, std::size_t{100'003}}) {
        std::vector<float> result(count);
        const std::vector<float> input = ramp(count, hvd.rank());
        const Status status = hvd.allreduce("x", input, result);
        ASSERT_TRUE(status.ok()) << status.text();
        for (std::size_t i = 0; i < count; ++i) {
          const float expected =
              static_cast<float>(i % 97) * static_cast<float>(size) + static_cast<float>(size * (size - 1) / 2);
          ASSERT_EQ(result[i], expected) << "element " << i << " of " << count << " on " << size << " ranks";
        }
      }
    });
  }
}

TEST(RankThreads, AMismatchIsAnErrorOnEveryRankAndTheJobGoesOn) {
  run_ranks(3, [](TestRank& hvd) {
    std::vector<float> wrong(hvd.rank() == 1 ? 5 : 4);
    const Status status = hvd.allreduce("w", wrong, wrong);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(status.text(), "allreduce 'w': mismatched shape: [4]: ranks 0,2; [5]: rank 1");
    std::vector<float> right(4, 1.0f);
    EXPECT_TRUE(hvd.allreduce("w", right, right).ok());
    EXPECT_EQ(right[3], 3.0f);
  });
}

TEST(RankThreads, ManyTensorsInDifferentOrders) {
  run_ranks(4, [](TestRank& hvd) {
    constexpr int tensors = 200;
    std::vector<std::vector<float>> values;
    std::vector<Result<HandleRef>> handles;
    for (int i = 0; i < tensors; ++i) values.emplace_back(static_cast<std::size_t>(i * 37 % 5000 + 1), 1.0f);
    for (int round = 0; round < 3; ++round) {
      for (int i = 0; i < tensors; ++i) {
        const int t = (i * (2 * hvd.rank() + 1)) % tensors;  // another order on each rank (the factor is odd)
        const auto index = static_cast<std::size_t>(hvd.rank() == 2 ? i : t);
        handles.push_back(
            hvd.allreduce_async("t" + std::to_string(index), values[index], values[index], ReduceOp::kAverage));
        if (!handles.back().ok()) ADD_FAILURE() << handles.back().status().text();
      }
      for (auto& handle : handles) ASSERT_TRUE(hvd.wait(handle).ok()) << hvd.wait(handle).text();
      handles.clear();
    }
    for (const auto& tensor : values) EXPECT_EQ(tensor.back(), 1.0f);
    EXPECT_LE(hvd.runtime().statistics().executor.collective_calls.value(), 3 * tensors);
  });
}

}  // namespace
}  // namespace hvd::testing
