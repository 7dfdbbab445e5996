// Fused calls through memory that is registered with NCCL, on ranks as in device_test.cc.
#include "tests/support/device_job.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <chrono>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace hvd::testing {
namespace {

using namespace std::chrono_literals;

NcclBackend::Statistics statistics_of(DeviceRank& rank) { return rank.hvd->runtime().statistics().nccl; }

class Registered : public ::testing::TestWithParam<int> {
 protected:
  static TestRank::Settings settings(std::size_t registered_bytes) {
    TestRank::Settings made;
    made.options.nccl_registered_bytes = registered_bytes;
    made.options.dynamic_process_sets = true;
    return made;
  }
  static std::size_t size() { return static_cast<std::size_t>(GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(Ranks, Registered, ::testing::Range(2, 9));

TEST_P(Registered, CallsThatAllRanksPackGoThroughOneBlockOnEach) {
  DeviceJob job(GetParam(), settings(4096));
  job.run([](DeviceRank& rank) {
    for (int i = 0; i < 10; ++i) {  // in turns on the caller's stream and on the engine's
      const Status status = allreduce_int16(rank, fmt::format("x{}", i));
      ASSERT_TRUE(status.ok()) << status.text();
    }
    EXPECT_EQ(statistics_of(rank).registered_bytes.value(), 4096);
    EXPECT_EQ(statistics_of(rank).registrations_failed.value(), 0);
  });
  EXPECT_EQ(job.nccl().registered_calls(), 10 * size());
  EXPECT_EQ(job.nccl().alive_registrations(), size());
  job.shut_down();
}

TEST_P(Registered, ManyCallsInLineHaveItOneAfterTheOther) {
  TestRank::Settings apart = settings(4096);
  apart.options.fusion_threshold_bytes = 0;
  DeviceJob job(GetParam(), apart);
  job.run([](DeviceRank& rank) {
    ASSERT_TRUE(allreduce_int16(rank, "warm").ok());
    std::vector<std::int16_t*> places;
    std::vector<Result<HandleRef>> handles;
    for (int i = 0; i < 40; ++i) {
      places.push_back(rank.produce(std::vector<std::int16_t>(100, static_cast<std::int16_t>(i))));
      TensorEntry entry =
          rank.entry(OpKind::kAllreduce, fmt::format("x{}", i), DataType::kInt16, {100}, places.back(), places.back());
      entry.caller_waits = i % 3 == 0;
      handles.push_back(rank.hvd->enqueue(std::move(entry)));
    }
    for (int i = 0; i < 40; ++i) {
      const Status status = rank.wait(handles[static_cast<std::size_t>(i)]);
      ASSERT_TRUE(status.ok()) << status.text();
    }
    for (int i = 0; i < 40; ++i) {
      const auto sum = static_cast<std::int16_t>(i * rank.hvd->size());
      EXPECT_EQ(rank.consume<std::int16_t>(places[static_cast<std::size_t>(i)], 100),
                std::vector<std::int16_t>(100, sum));
    }
  });
  EXPECT_EQ(job.nccl().registered_calls(), 41 * size());
  job.shut_down();
}

TEST_P(Registered, WhatIsLargerOrTakenAsItLiesDoesNotUseIt) {
  DeviceJob job(GetParam(), settings(64));
  job.run([](DeviceRank& rank) {
    EXPECT_TRUE(allreduce_once(rank, "as it lies").ok());
    EXPECT_TRUE(allreduce_int16(rank, "too large", 17).ok());
    EXPECT_EQ(statistics_of(rank).registered_bytes.value(), 0) << "before it is needed";
    EXPECT_TRUE(allreduce_int16(rank, "fits", 16).ok());
    EXPECT_EQ(statistics_of(rank).registered_bytes.value(), 64);
  });
  EXPECT_EQ(job.nccl().registered_calls(), size());
  job.shut_down();
}

TEST_P(Registered, TheKnobTurnsItOff) {
  DeviceJob job(GetParam(), settings(0));
  job.run([](DeviceRank& rank) {
    EXPECT_TRUE(allreduce_int16(rank, "x").ok());
    EXPECT_EQ(statistics_of(rank).registered_bytes.value(), 0);
    EXPECT_EQ(statistics_of(rank).registrations_failed.value(), 0);
  });
  EXPECT_EQ(job.nccl().registered_calls(), 0u);
  EXPECT_EQ(job.nccl().alive_memory(), 0u);
  job.shut_down();
}

TEST_P(Registered, WhereOneRankHasNoneAllGoWithoutAndResultsAreTheSame) {
  for (const bool no_memory : {false, true}) {
    DeviceJob job(GetParam(), settings(std::size_t{1} << 20));
    const int which = GetParam() - 1;
    if (!no_memory) job.nccl().inject({.kind = FakeNcclFault::Kind::kRegisterFails, .rank = which, .text = "no"});
    job.run([&](DeviceRank& rank) {
      ASSERT_TRUE(allreduce_once(rank, "warm").ok());
      if (no_memory && rank.rank() == which) rank.device.fail(FakeCall::kAllocate, Status::internal("none left"), 0, 1);
      for (int i = 0; i < 4; ++i) EXPECT_TRUE(allreduce_int16(rank, fmt::format("x{}", i)).ok());
      EXPECT_EQ(statistics_of(rank).registered_bytes.value(), 0);
      EXPECT_EQ(statistics_of(rank).registrations_failed.value(), rank.rank() == which ? 1 : 0) << "tried once";
    });
    EXPECT_EQ(job.nccl().registered_calls(), 0u);
    EXPECT_EQ(job.nccl().alive_registrations(), 0u);
    EXPECT_EQ(job.nccl().alive_memory(), 0u);
    job.shut_down();
  }
}

TEST_P(Registered, ARemovedSetLetsGoOfItsOwn) {
  DeviceJob job(GetParam(), settings(4096));
  job.run([](DeviceRank& rank) {
    ASSERT_TRUE(allreduce_int16(rank, "all").ok());
    const int members = rank.hvd->size() - 1;
    if (members < 2) return;
    std::vector<int> ranks(static_cast<std::size_t>(members));
    std::iota(ranks.begin(), ranks.end(), 0);
    for (int round = 0; round < 3; ++round) {
      Result<ProcessSetId> set = rank.hvd->add_process_set(ranks);
      ASSERT_TRUE(set.ok()) << set.status().text();
      if (rank.rank() < members) {
        EXPECT_TRUE(allreduce_int16(rank, "some", 5, *set, members).ok());
        EXPECT_GE(statistics_of(rank).registered_bytes.value(), 2 * 4096) << "a former set may still have its own";
      }
      TensorEntry remove = make_entry(OpKind::kProcessSetRemove, "remove", DataType::kUint8, {*set}, nullptr, nullptr);
      const Status removed = rank.hvd->wait(rank.hvd->enqueue(std::move(remove)));
      ASSERT_TRUE(removed.ok()) << removed.text();
      EXPECT_TRUE(allreduce_int16(rank, "all").ok());
    }
  });
  const auto end = std::chrono::steady_clock::now() + 10s;
  while (job.nccl().alive_memory() > size() && std::chrono::steady_clock::now() < end) {
    job.run([](DeviceRank& rank) { EXPECT_TRUE(allreduce_int16(rank, "all").ok()); });
  }
  EXPECT_EQ(job.nccl().alive_registrations(), size());
  EXPECT_EQ(job.nccl().alive_memory(), size());
  job.shut_down();
}

TEST_P(Registered, ALostRankAndAbortsLeaveNothingBehind) {
  FakeNccl::Settings slow;
  slow.abort_takes = 100ms;
  DeviceJob job(GetParam(), settings(4096), slow);
  job.run([](DeviceRank& rank) { EXPECT_TRUE(allreduce_int16(rank, "x").ok()); });
  job.kill(GetParam() - 1);
  job.run([](DeviceRank& rank) {
    Status status;
    for (int i = 0; status.ok() && i < 100; ++i) {
      std::int16_t* const place = rank.produce(std::vector<std::int16_t>(5, 1));
      status = rank.run(rank.entry(OpKind::kAllreduce, fmt::format("y{}", i), DataType::kInt16, {5}, place, place));
    }
    EXPECT_FALSE(status.ok());
    // The caller may be told before the communicator ends.
    const auto end = std::chrono::steady_clock::now() + 10s;
    while (statistics_of(rank).registered_bytes.value() != 0 && std::chrono::steady_clock::now() < end) {
      std::this_thread::sleep_for(1ms);
    }
    EXPECT_EQ(statistics_of(rank).registered_bytes.value(), 0);
  });
  job.shut_down();
}

TEST_P(Registered, AnErrorInFlightLeavesNothingBehind) {
  DeviceJob job(GetParam(), settings(4096));
  job.nccl().inject({.kind = FakeNcclFault::Kind::kAsyncError, .rank = 0, .call = 2, .text = "a socket broke"});
  job.run([](DeviceRank& rank) {
    Status status;
    const auto end = std::chrono::steady_clock::now() + 30s;
    for (int i = 0; status.ok() && std::chrono::steady_clock::now() < end; ++i) {
      std::int16_t* const place = rank.produce(std::vector<std::int16_t>(5, 1));
      status = rank.run(rank.entry(OpKind::kAllreduce, fmt::format("x{}", i), DataType::kInt16, {5}, place, place));
      std::this_thread::sleep_for(1ms);
    }
    EXPECT_NE(status.text().find("a socket broke"), std::string::npos) << status.text();
  });
  job.shut_down();
}

TEST_P(Registered, GraphsHaveMemoryOfTheirOwn) {
  DeviceJob job(GetParam(), settings(4096));
  std::vector<FakeGraphRef> graphs(size());
  std::vector<std::int16_t*> places(size());
  job.run([&](DeviceRank& rank) {
    const auto own = static_cast<std::size_t>(rank.rank());
    ASSERT_TRUE(allreduce_once(rank, "warm").ok());  // the first call that could use it is captured
    places[own] = rank.produce(std::vector<std::int16_t>(5, 1));
    ASSERT_TRUE(rank.device.begin_capture(rank.stream).ok());
    const Status status =
        rank.run(rank.entry(OpKind::kAllreduce, "x", DataType::kInt16, {5}, places[own], places[own]));
    EXPECT_TRUE(status.ok()) << status.text();
    Result<FakeGraphRef> graph = rank.device.end_capture(rank.stream);
    ASSERT_TRUE(graph.ok()) << graph.status().text();
    graphs[own] = *graph;
    EXPECT_EQ(statistics_of(rank).registered_bytes.value(), 0);
    EXPECT_TRUE(allreduce_int16(rank, "between").ok());
  });
  EXPECT_EQ(job.nccl().registered_calls(), size());
  job.run([&](DeviceRank& rank) {
    const auto own = static_cast<std::size_t>(rank.rank());
    ASSERT_TRUE(rank.device.replay(graphs[own], rank.stream).ok());
    EXPECT_EQ(rank.consume<std::int16_t>(places[own], 5),
              std::vector<std::int16_t>(5, static_cast<std::int16_t>(rank.hvd->size())));
  });
  EXPECT_EQ(job.nccl().registered_calls(), size()) << "a replay uses it";
  job.shut_down();
  graphs.clear();
}

}  // namespace
}  // namespace hvd::testing
