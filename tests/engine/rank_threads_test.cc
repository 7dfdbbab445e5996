// The engine from end to end, each rank a thread of this process.

#include "tests/support/rank_threads.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <thread>

namespace hvd::testing {
namespace {

std::vector<float> ramp(std::size_t count, int rank) {
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<float>(i % 97) + static_cast<float>(rank);
  return values;
}

TestRank::Settings pulls_from(std::size_t bytes) {
  TestRank::Settings settings;
  settings.options.pull_from_bytes = bytes;
  return settings;
}

void expect_sums(int size, std::size_t pull_from) {
  const auto body = [&](TestRank& hvd) {
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
    const bool pulled = hvd.runtime().statistics().transport.data_bytes_pulled.value() > 0;
    EXPECT_EQ(pulled, size > 1 && pull_from > 0);
  };
  run_ranks(size, body, pulls_from(pull_from));
}

TEST(RankThreads, SumOfAllRanksArrivesOnEachOfThem) {
  for (const int size : {1, 2, 3, 4, 8}) expect_sums(size, 0);
}

TEST(RankThreads, SumsArriveWhereRanksReadEachOthersMemory) {
  for (const int size : {2, 3, 4, 8}) expect_sums(size, 1);
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

// Arms a hook while no rank is in an operation.
class Arming {
 public:
  explicit Arming(int ranks) : everybody_(ranks) {}

  void arm(std::atomic<bool>& armed) {
    everybody_.arrive_and_wait();
    armed.store(true);  // all do, before any goes on
    everybody_.arrive_and_wait();
  }

 private:
  std::barrier<> everybody_;
};

// Throws once, on the first rank that receives a control message once it is armed.
class ThrowingHook final : public FaultHook {
 public:
  FaultAction at(FaultPoint point, int /*peer*/) override {
    if (point == FaultPoint::kControlReceive && armed.exchange(false)) throw std::runtime_error("a planted failure");
    return FaultAction::kPass;
  }
  std::atomic<bool> armed{false};
};

TEST(RankThreads, WhatTheEngineThrowsEndsTheJobOnEveryRankWithTheReason) {
  for (const bool waiters_drive : {true, false}) {
    ThrowingHook hook;
    Arming arming(3);
    TestRank::Settings settings;
    settings.fault = &hook;
    std::atomic<int> told_the_reason{0};
    const auto body = [&](TestRank& hvd) {
      std::vector<float> values(10, 1.0f);
      EXPECT_TRUE(hvd.allreduce("before", values, values).ok());
      arming.arm(hook.armed);
      auto handle = hvd.allreduce_async("after", values, values);
      if (handle.ok() && !waiters_drive) {  // the background thread does it
        const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(30);
        while (!(*handle)->done() && std::chrono::steady_clock::now() < limit) std::this_thread::yield();
      }
      const Status ended = hvd.wait(handle);
      EXPECT_FALSE(ended.ok());
      if (ended.text().find("a planted failure") != std::string::npos) told_the_reason.fetch_add(1);
      EXPECT_FALSE(hvd.barrier("later").ok());
    };
    run_ranks(3, body, settings);
    EXPECT_GE(told_the_reason.load(), 1);
  }
}

// Loses one segment.
class DroppingHook final : public FaultHook {
 public:
  FaultAction at(FaultPoint point, int /*peer*/) override {
    const bool drop = point == FaultPoint::kSegmentSend && armed.exchange(false);
    return drop ? FaultAction::kDrop : FaultAction::kPass;
  }
  std::atomic<bool> armed{false};
};

TEST(RankThreads, ACallThatDoesNotEndIsGivenUpInTimeAndTheJobGoesOn) {
  for (const std::size_t count : {std::size_t{10}, std::size_t{100'003}}) {
    DroppingHook hook;
    Arming arming(3);
    TestRank::Settings settings;
    settings.fault = &hook;
    settings.options.stall_check_time = std::chrono::seconds(1);
    settings.options.stall_shutdown_time = std::chrono::seconds(1);
    const auto body = [&](TestRank& hvd) {
      std::vector<float> values(count, 1.0f);
      arming.arm(hook.armed);
      const Status ended = hvd.allreduce("stuck", values, values);
      EXPECT_NE(
          ended.text().find("allreduce 'stuck' has begun and not ended within HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"),
          std::string::npos)
          << ended.text();
      EXPECT_NE(ended.text().find(", for rank"), std::string::npos) << ended.text();
      std::fill(values.begin(), values.end(), 1.0f);
      ASSERT_TRUE(hvd.barrier("all have seen it").ok());
      EXPECT_TRUE(hvd.allreduce("stuck", values, values).ok());
      EXPECT_EQ(values.back(), 3.0f);
    };
    run_ranks(3, body, settings);
  }
}

void reduce_many_tensors_in_different_orders(const TestRank::Settings& settings) {
  const auto body = [](TestRank& hvd) {
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
  };
  run_ranks(4, body, settings);
}

TEST(RankThreads, ManyTensorsInDifferentOrders) { reduce_many_tensors_in_different_orders({}); }

TEST(RankThreads, ManyTensorsInDifferentOrdersWhereRanksReadEachOthersMemory) {
  reduce_many_tensors_in_different_orders(pulls_from(1));
}

// Where no core is free the background thread takes its time, but it comes.
TEST(RankThreads, OperationsThatNobodyWaitsForEndByThemselves) {
  run_ranks(3, [](TestRank& hvd) {
    std::vector<float> values(1000, 1.0f);
    for (int round = 0; round < 20; ++round) {
      const Result<HandleRef> handle = hvd.allreduce_async("lies", values, values, ReduceOp::kAverage);
      ASSERT_TRUE(handle.ok()) << handle.status().text();
      const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
      while (!handle.value()->done() && std::chrono::steady_clock::now() < end) {
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      }
      ASSERT_TRUE(handle.value()->done());
      EXPECT_TRUE(handle.value()->status().ok()) << handle.value()->status().text();
    }
  });
}

TEST(RankThreads, OneWaitForManyOperations) {
  run_ranks(3, [](TestRank& hvd) {
    constexpr int tensors = 20;
    std::vector<std::vector<float>> values(tensors, std::vector<float>(3000, 1.0f));
    std::vector<HandleState*> all;
    std::vector<HandleRef> kept;
    const auto start = [&](int i) {
      const Result<HandleRef> handle = hvd.allreduce_async("t" + std::to_string(i), values[static_cast<std::size_t>(i)],
                                                           values[static_cast<std::size_t>(i)]);
      ASSERT_TRUE(handle.ok()) << handle.status().text();
      kept.push_back(handle.value());
      all.push_back(kept.back().get());
    };
    for (int i = 0; i < tensors - 1; ++i) start(i);
    if (hvd.rank() != 0) start(tensors - 1);
    const auto soon = [] { return std::chrono::steady_clock::now() + std::chrono::milliseconds(20); };
    const auto late = [] { return std::chrono::steady_clock::now() + std::chrono::seconds(60); };
    if (hvd.rank() != 0) {
      EXPECT_FALSE(hvd.loop().wait(all, soon())) << "rank 0 has not started the last one";
    }
    ASSERT_TRUE(hvd.barrier("all have seen that").ok());
    if (hvd.rank() == 0) start(tensors - 1);
    ASSERT_TRUE(hvd.loop().wait(all, late()));
    for (const HandleRef& handle : kept) EXPECT_TRUE(handle->done() && handle->status().ok());
    for (const std::vector<float>& one : values) EXPECT_EQ(one[2999], 3.0f);
    EXPECT_TRUE(hvd.loop().wait(std::span<HandleState* const>(), soon()));
  });
}

}  // namespace
}  // namespace hvd::testing
