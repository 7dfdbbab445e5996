// Calls on device memory where something goes wrong or does not end, on ranks as in device_test.cc: who is told, what
// ends, and what goes on.
#include "tests/support/device_job.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <latch>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

namespace hvd::testing {
namespace {

using namespace std::chrono_literals;

TEST(DeviceFaults, MemoryOfDifferentKindsIsAMismatchThatNamesTheRanks) {
  DeviceJob job(3);
  job.run([](DeviceRank& rank) {
    if (rank.rank() == 1) {
      std::vector<float> values(4, 1.0f);
      const Status status = rank.hvd->allreduce("x", values, values);
      EXPECT_EQ(status.text(), "allreduce 'x': mismatched memory: CUDA device: ranks 0,2; host: rank 1");
    } else {
      const Status status = allreduce_once(rank, "x", 4);
      EXPECT_EQ(status.text(), "allreduce 'x': mismatched memory: CUDA device: ranks 0,2; host: rank 1");
    }
    const Status status = allreduce_once(rank, "y");
    EXPECT_TRUE(status.ok()) << status.text();
  });
  job.shut_down();
}

TEST(DeviceFaults, AMissingLibraryFailsTheCallOnAllRanksAndTheJobGoesOn) {
  for (const int without : {0, 1}) {
    DeviceJob job(3);
    job[without].source.missing = "NCCL is not there";
    job.run([](DeviceRank& rank) {
      const Status status = allreduce_once(rank, "x");
      EXPECT_FALSE(status.ok());
      EXPECT_NE(status.text().find("NCCL is not there"), std::string::npos) << status.text();
      expect_host_works(rank, "y");
    });
    job.shut_down();
  }
}

TEST(DeviceFaults, ACommunicatorThatCannotBeMadeFailsTheCallOnAllRanks) {
  for (const auto kind : {FakeNcclFault::Kind::kInitRefused, FakeNcclFault::Kind::kInitFails}) {
    DeviceJob job(3);
    job.nccl().inject({.kind = kind, .rank = 1, .text = "no route to 10.0.0.7<4242>"});
    job.run([](DeviceRank& rank) {
      const Status status = allreduce_once(rank, "x");
      EXPECT_FALSE(status.ok());
      EXPECT_NE(status.text().find("no route to 10.0.0.7"), std::string::npos) << status.text();
      expect_host_works(rank, "y");
    });
    job.shut_down();
  }
}

TEST(DeviceFaults, ACommunicatorThatIsNotMadeInTimeFailsTheCall) {
  TestRank::Settings settings;
  settings.options.start_timeout = 1s;
  DeviceJob job(2, settings);
  job.nccl().inject({.kind = FakeNcclFault::Kind::kInitHangs, .rank = 1});
  job.run([](DeviceRank& rank) {
    const Status status = allreduce_once(rank, "x");
    EXPECT_NE(status.text().find("did not make a communicator"), std::string::npos) << status.text();
    expect_host_works(rank, "y");
  });
  job.shut_down();
}

TEST(DeviceFaults, AnErrorWhileACallIsInFlightEndsTheSetsLaterCallsOnAllRanks) {
  DeviceJob job(3);
  job.nccl().inject({.kind = FakeNcclFault::Kind::kAsyncError, .rank = 1, .call = 2, .text = "socket to rank 2 broke"});
  job.run([](DeviceRank& rank) {
    Status status;
    const auto end = std::chrono::steady_clock::now() + 30s;
    for (int i = 0; status.ok() && std::chrono::steady_clock::now() < end; ++i) {
      float* const place = rank.produce(std::vector<float>(3, 1.0f));
      const bool exchanges = i % 2 == 1;  // ranks tell each other more before NCCL is asked
      status = rank.run(rank.entry(exchanges ? OpKind::kAlltoall : OpKind::kAllreduce, fmt::format("x{}", i),
                                   DataType::kFloat32, {3}, place, exchanges ? nullptr : place));
      std::this_thread::sleep_for(1ms);
    }
    EXPECT_NE(status.text().find("socket to rank 2 broke (network interface: "), std::string::npos) << status.text();
    expect_host_works(rank, "y");
  });
  job.shut_down();
}

TEST(DeviceFaults, AFailureOnOneDeviceEndsTheSetsCallsOnAllDevices) {
  DeviceJob job(2, {}, {}, /*devices=*/2);
  job.run([&](DeviceRank& rank) {
    const DeviceStream other = rank.device.create_stream(1).value();
    ASSERT_TRUE(allreduce_once(rank, "first").ok());
    const auto on_other = [&](const std::string& name) {
      auto* const place = reinterpret_cast<float*>(rank.make(12));
      TensorEntry entry = rank.entry(OpKind::kAllreduce, name, DataType::kFloat32, {3}, place, place);
      entry.device = 1;
      entry.producer = other;
      return rank.hvd->wait(rank.hvd->enqueue(std::move(entry)));
    };
    job.nccl().inject({.kind = FakeNcclFault::Kind::kAsyncError, .group = 1, .rank = 1, .text = "a socket broke"});
    Status status = on_other("second");
    const auto end = std::chrono::steady_clock::now() + 30s;
    for (int i = 0; status.ok() && std::chrono::steady_clock::now() < end; ++i) {
      status = allreduce_once(rank, fmt::format("x{}", i));
    }
    EXPECT_NE(status.text().find("a socket broke"), std::string::npos) << status.text();
    EXPECT_NE(on_other("third").text().find("a socket broke"), std::string::npos);
    expect_host_works(rank, "y");
    rank.device.destroy_stream(1, other);
  });
  job.shut_down();
}

TEST(DeviceFaults, ALostRankEndsWhatIsInFlight) {
  FakeNccl::Settings slow;
  slow.abort_takes = 300ms;
  DeviceJob job(3, {}, slow);
  job.run([](DeviceRank& rank) {
    const Status status = allreduce_once(rank, "x");
    EXPECT_TRUE(status.ok()) << status.text();
  });
  job.kill(2);
  job.run([](DeviceRank& rank) {
    const auto start = std::chrono::steady_clock::now();
    Status status;
    for (int i = 0; status.ok() && i < 100; ++i) status = allreduce_once(rank, fmt::format("y{}", i));
    EXPECT_NE(status.text().find("rank 2"), std::string::npos) << status.text();
    EXPECT_LT(std::chrono::steady_clock::now() - start, 5s);
  });
  job.shut_down();
}

TEST(DeviceFaults, NoMemoryIsAnErrorThatSaysHowMuchWasAskedFor) {
  DeviceJob job(2);
  job.run([](DeviceRank& rank) {
    EXPECT_TRUE(allreduce_once(rank, "warm").ok());
    if (rank.rank() == 1) rank.device.fail(FakeCall::kAllocate, Status::internal("no memory for 4096 bytes"));
    const std::vector<float> values(8, 1.0f);
    TensorEntry entry = rank.entry(OpKind::kAllgather, "x", DataType::kFloat32, {8}, rank.produce(values), nullptr);
    const Status status = rank.run(std::move(entry));
    if (rank.rank() == 1) {
      EXPECT_NE(status.text().find("no memory for 4096 bytes"), std::string::npos) << status.text();
    }
    rank.device.clear_faults();
    // The others may have given NCCL what this rank could not: the communicator is of no use any more.
    const Status after = allreduce_once(rank, "y");
    EXPECT_NE(after.text().find("no memory for 4096 bytes"), std::string::npos) << after.text();
    expect_host_works(rank, "z");
  });
  job.shut_down();
}

TEST(DeviceFaults, ARemovedSetsCallsComeToTheirEnd) {
  TestRank::Settings settings;
  settings.options.dynamic_process_sets = true;
  DeviceJob job(3, settings);
  job.run([](DeviceRank& rank) {
    for (int round = 0; round < 3; ++round) {
      const Result<ProcessSetId> set = rank.hvd->add_process_set({0, 1});
      ASSERT_TRUE(set.ok()) << set.status().text();
      rank.device.hang();
      float* const place = rank.produce(std::vector<float>(4, 1.0f));
      if (rank.rank() < 2) {
        TensorEntry entry = rank.entry(OpKind::kAllreduce, "x", DataType::kFloat32, {4}, place, place);
        entry.request.key.process_set = set.value();
        const Status status = rank.run(std::move(entry));
        ASSERT_TRUE(status.ok()) << status.text();
      }
      TensorEntry remove =
          make_entry(OpKind::kProcessSetRemove, "remove", DataType::kUint8, {set.value()}, nullptr, nullptr);
      const Status removed = rank.hvd->wait(rank.hvd->enqueue(std::move(remove)));
      ASSERT_TRUE(removed.ok()) << removed.text();
      rank.device.release();
      EXPECT_EQ(rank.consume<float>(place, 4), std::vector<float>(4, rank.rank() < 2 ? 2.0f : 1.0f));
    }
  });
  job.shut_down();
}

TEST(DeviceFaults, AFailureOfOneRankEndsTheSetsCallsOnAll) {
  DeviceJob job(3);
  job.run([](DeviceRank& rank) {
    ASSERT_TRUE(allreduce_once(rank, "warm").ok());
    TensorEntry entry = rank.entry(OpKind::kAllreduce, "x", DataType::kFloat32, {3}, nullptr, nullptr);
    float* const place = rank.produce(std::vector<float>(3, 1.0f));
    entry.input = reinterpret_cast<std::byte*>(place);
    entry.output = reinterpret_cast<std::byte*>(place);
    if (rank.rank() == 1) rank.device.fail(FakeCall::kWait, Status::internal("no wait"));
    static_cast<void>(rank.hvd->wait(rank.hvd->enqueue(std::move(entry))));
    rank.device.clear_faults();
    for (int i = 0; i < 5; ++i) {
      const Status later = allreduce_once(rank, fmt::format("later{}", i));
      EXPECT_FALSE(later.ok());
    }
    expect_host_works(rank, "z");
  });
  job.shut_down();
}

TEST(DeviceFaults, ADeviceThatFallsBehindHoldsUpTheHostAndThenGoesOn) {
  DeviceJob job(2);
  job.run([](DeviceRank& rank) {
    ASSERT_TRUE(allreduce_once(rank, "warm").ok());
    rank.device.hang();
    std::vector<float*> places;
    std::vector<Result<HandleRef>> handles;
    for (int i = 0; i < 200; ++i) {
      places.push_back(rank.produce(std::vector<float>(40'000, 1.0f)));  // too large to be fused
      handles.push_back(rank.hvd->enqueue(
          rank.entry(OpKind::kAllreduce, fmt::format("x{}", i), DataType::kFloat32, {40'000}, places[i], places[i])));
    }
    std::this_thread::sleep_for(100ms);
    const auto done =
        std::count_if(handles.begin(), handles.end(), [](const auto& one) { return one.value()->done(); });
    EXPECT_GE(done, 100);
    EXPECT_LT(done, 140);
    rank.device.release();
    for (const auto& handle : handles) {
      const Status status = rank.wait(handle);
      ASSERT_TRUE(status.ok()) << status.text();
    }
    for (float* const place : places) EXPECT_EQ(rank.consume<float>(place, 1).front(), 2.0f);
  });
  job.shut_down();
}

// Of both sets a call is in line, one behind the other on each device, and the first one does not end.
TEST(DeviceFaults, TheAbortOfASetWaitsForNoOther) {
  TestRank::Settings settings;
  settings.options.dynamic_process_sets = true;
  DeviceJob job(4, settings);
  job.run([&](DeviceRank& rank) {
    Result<ProcessSetId> set = rank.hvd->add_process_set({0, 1, 2});
    ASSERT_TRUE(set.ok()) << set.status().text();
    ASSERT_TRUE(allreduce_once(rank, "all").ok());
    const bool is_member = rank.rank() < 3;
    if (is_member) {
      ASSERT_TRUE(allreduce_int16(rank, "set", 5, *set, 3).ok());
    }
    job.nccl().inject({.kind = FakeNcclFault::Kind::kCollectiveHangs, .rank = 2, .call = 1});
    for (const ProcessSetId each : {*set, ProcessSetId{0}}) {
      if (each != 0 && !is_member) continue;
      float* const place = rank.produce(std::vector<float>(4, 1.0f));
      TensorEntry entry = rank.entry(OpKind::kAllreduce, "hangs", DataType::kFloat32, {4}, place, place);
      entry.request.key.process_set = each;
      const Status status = rank.hvd->wait(rank.hvd->enqueue(std::move(entry)));
      EXPECT_TRUE(status.ok()) << status.text();
    }
  });
  job.kill(2);
  expect_all_communicators_end(job);
  job.shut_down();
}

TEST(DeviceFaults, ARemovedSetThatHasLostAMemberIsAborted) {
  TestRank::Settings settings;
  settings.options.dynamic_process_sets = true;
  DeviceJob job(3, settings);
  job.run([&](DeviceRank& rank) {
    Result<ProcessSetId> set = rank.hvd->add_process_set({0, 1});
    ASSERT_TRUE(set.ok()) << set.status().text();
    if (rank.rank() < 2) {
      ASSERT_TRUE(allreduce_int16(rank, "warm", 5, *set, 2).ok());
    }
    job.nccl().inject({.kind = FakeNcclFault::Kind::kCollectiveHangs, .rank = 1, .call = 1});
    if (rank.rank() < 2) {
      float* const place = rank.produce(std::vector<float>(4, 1.0f));
      TensorEntry entry = rank.entry(OpKind::kAllreduce, "hangs", DataType::kFloat32, {4}, place, place);
      entry.request.key.process_set = *set;
      const Status status = rank.hvd->wait(rank.hvd->enqueue(std::move(entry)));
      EXPECT_TRUE(status.ok()) << status.text();
    }
    TensorEntry remove = make_entry(OpKind::kProcessSetRemove, "remove", DataType::kUint8, {*set}, nullptr, nullptr);
    const Status removed = rank.hvd->wait(rank.hvd->enqueue(std::move(remove)));
    EXPECT_TRUE(removed.ok()) << removed.text();
  });
  EXPECT_EQ(job.nccl().alive_communicators(), 2u);
  job.kill(1);
  expect_all_communicators_end(job);
  job.shut_down();
}

TEST(DeviceFaults, ACollectiveThatDoesNotEndIsGivenUp) {
  TestRank::Settings settings;
  settings.options.stall_check_time = 1s;
  settings.options.stall_shutdown_time = 5s;
  DeviceJob job(3, settings);
  job.nccl().inject({.kind = FakeNcclFault::Kind::kCollectiveHangs, .rank = 1, .call = 1});
  job.run([](DeviceRank& rank) {
    ASSERT_TRUE(allreduce_once(rank, "warm").ok());
    float* const place = rank.produce(std::vector<float>(4, 1.0f));
    const Status begun = rank.run(rank.entry(OpKind::kAllreduce, "hangs", DataType::kFloat32, {4}, place, place));
    EXPECT_TRUE(begun.ok()) << "it ends on a device alone: " << begun.text();
    rank.consume<float>(place, 4);  // comes to its end, and says when it does not
    const Status later = allreduce_once(rank, "later");
    EXPECT_NE(later.text().find("allreduce 'hangs', which a GPU has not finished, has begun and not ended within "
                                "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"),
              std::string::npos)
        << later.text();
    expect_host_works(rank, "z");
  });
  job.shut_down();
}

// What is on its way sleeps until a device, or NCCL, has got somewhere, which takes longer than a shutdown may.
TEST(DeviceFaults, AShutdownEndsHandlesThatWaitForADeviceOrForNccl) {
  for (const bool staged : {true, false}) {
    TestRank::Settings settings;
    settings.options.gpu_operations = staged ? "host" : "nccl";
    settings.options.shutdown_timeout = 200ms;
    DeviceJob job(2, settings);
    if (!staged) job.nccl().inject({.kind = FakeNcclFault::Kind::kInitHangs, .rank = 0});
    std::latch all_asked(2);
    job.run([&](DeviceRank& rank) {
      if (staged && rank.rank() == 0) rank.device.hang();
      std::vector<Result<HandleRef>> handles;
      for (int i = 0; i < 3; ++i) {  // some wait for their turn
        float* const place = rank.produce(std::vector<float>(40'000, 1.0f));
        handles.push_back(rank.hvd->enqueue(
            rank.entry(OpKind::kAllreduce, fmt::format("x{}", i), DataType::kFloat32, {40'000}, place, place)));
      }
      const auto under_way = [&] { return rank.hvd->runtime().statistics().executor.collective_calls.value() > 0; };
      const auto end = std::chrono::steady_clock::now() + 1s;
      while (!under_way() && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(1ms);
      all_asked.arrive_and_wait();
      rank.hvd->shut_down();
      for (const Result<HandleRef>& handle : handles) {
        ASSERT_TRUE(handle.ok());
        EXPECT_TRUE(handle.value()->done()) << (staged ? "staged" : "nccl") << ", rank " << rank.rank();
      }
      rank.leaves_work = true;
    });
  }
}

TEST(DeviceFaults, WhatADeviceIsAtWorkOnOutlivesTheShutdown) {
  TestRank::Settings settings;
  settings.options.shutdown_timeout = 200ms;
  DeviceJob job(2, settings);
  job.run([](DeviceRank& rank) {
    ASSERT_TRUE(allreduce_once(rank, "warm").ok());
    auto owner = std::make_shared<int>(1);
    const std::weak_ptr<int> watch = owner;
    float* const place = rank.produce(std::vector<float>(5, 1.0f));
    TensorEntry entry = rank.entry(OpKind::kAllreduce, "x", DataType::kFloat32, {5}, place, place);
    entry.keep_alive = std::move(owner);
    rank.device.hang();
    EXPECT_TRUE(rank.run(std::move(entry)).ok());
    rank.hvd->shut_down();
    EXPECT_FALSE(watch.expired()) << "the device may still write there";
    rank.leaves_work = true;
    rank.device.release();
  });
}

TEST(DeviceFaults, AnEndThatCannotBeMarkedIsAnError) {
  DeviceJob job(3);
  job.run([](DeviceRank& rank) {
    ASSERT_TRUE(allreduce_once(rank, "warm").ok());
    float* const place = rank.produce(std::vector<float>(3, 1.0f));
    if (rank.rank() == 1) {  // the first is that of the producer
      rank.device.fail(FakeCall::kRecord, Status::internal("no record"), /*after=*/1, /*times=*/1);
    }
    const Status status =
        rank.hvd->wait(rank.hvd->enqueue(rank.entry(OpKind::kAllreduce, "x", DataType::kFloat32, {3}, place, place)));
    if (rank.rank() == 1) {
      EXPECT_NE(status.text().find("no record"), std::string::npos) << status.text();
    }
    Status later;
    const auto end = std::chrono::steady_clock::now() + 30s;
    while (later.ok() && std::chrono::steady_clock::now() < end) later = allreduce_once(rank, "later");
    EXPECT_NE(later.text().find("no record"), std::string::npos) << later.text();
    expect_host_works(rank, "z");
  });
  job.shut_down();
}

TEST(DeviceFaults, WorkOnOneStreamHoldsUpNoneOnAnother) {
  DeviceJob job(2);
  std::array<std::atomic<bool>, 2> go{};
  job.run([&](DeviceRank& rank) {
    ASSERT_TRUE(allreduce_once(rank, "warm").ok());
    std::atomic<bool>& released = go[static_cast<std::size_t>(rank.rank())];
    float* const slow = rank.produce(std::vector<float>(3, 1.0f));
    ASSERT_TRUE(
        rank.device.launch(rank.stream, {.name = "long", .ready = [&released] { return released.load(); }}).ok());
    TensorEntry behind = rank.entry(OpKind::kAllreduce, "behind", DataType::kFloat32, {3}, slow, slow);
    behind.caller_waits = true;
    EXPECT_TRUE(rank.wait(rank.hvd->enqueue(std::move(behind))).ok());

    const DeviceStream side = rank.device.create_stream(0).value();
    auto owner = std::make_shared<int>(1);
    const std::weak_ptr<int> watch = owner;
    auto* const place = reinterpret_cast<float*>(rank.make(12));
    ASSERT_TRUE(
        rank.device
            .launch(side,
                    {.name = "producer", .writes = {{place, 12}}, .run = [place] { std::fill_n(place, 3, 1.0f); }})
            .ok());
    TensorEntry beside = rank.entry(OpKind::kAllreduce, "beside", DataType::kFloat32, {3}, place, place);
    beside.request.reduce_op = ReduceOp::kAdasum;  // through the host, on the engine's stream
    beside.producer = side;
    beside.keep_alive = std::move(owner);
    EXPECT_TRUE(rank.hvd->wait(rank.hvd->enqueue(std::move(beside))).ok());
    const auto end = std::chrono::steady_clock::now() + 30s;
    while (!watch.expired() && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(1ms);
    EXPECT_TRUE(watch.expired()) << "it is done, and still held";
    released = true;
    EXPECT_EQ(rank.consume<float>(slow, 3), std::vector<float>(3, 2.0f));
    rank.device.destroy_stream(0, side);
  });
  job.shut_down();
}

TEST(DeviceFaults, CollectivesOfTwoSetsAreNeverOnADeviceAtOnce) {
  TestRank::Settings settings;
  settings.options.dynamic_process_sets = true;
  DeviceJob job(3, settings);
  job.run([](DeviceRank& rank) {
    Result<ProcessSetId> set = rank.hvd->add_process_set({0, 1});
    ASSERT_TRUE(set.ok()) << set.status().text();
    std::vector<float*> places;
    std::vector<Result<HandleRef>> handles;
    for (int i = 0; i < 40; ++i) {
      places.push_back(rank.produce(std::vector<float>(40'000, 1.0f)));
      TensorEntry entry =
          rank.entry(OpKind::kAllreduce, fmt::format("x{}", i), DataType::kFloat32, {40'000}, places[i], places[i]);
      const bool in_set = i % 2 == 0;
      if (in_set && rank.rank() == 2) continue;
      if (in_set) entry.request.key.process_set = *set;
      entry.caller_waits = i % 3 == 0;  // in turns on the caller's stream and on the engine's
      handles.push_back(rank.hvd->enqueue(std::move(entry)));
      if (i % 3 == 0) {
        EXPECT_TRUE(rank.wait(handles.back()).ok());
      }
    }
    for (const auto& handle : handles) EXPECT_TRUE(rank.wait(handle).ok());
    for (std::size_t i = 0; i < places.size(); ++i) {
      const float sum = i % 2 != 0 ? 3.0f : rank.rank() < 2 ? 2.0f : 1.0f;
      EXPECT_EQ(rank.consume<float>(places[i], 1).front(), sum);
    }
  });
  EXPECT_EQ(job.nccl().concurrent_calls(), 0u);
  job.shut_down();
}

TEST(DeviceFaults, CollectivesOfASetThatWasAddedAfterAnotherWasRemovedFollowTheOthers) {
  TestRank::Settings settings;
  settings.options.dynamic_process_sets = true;
  DeviceJob job(3, settings);
  job.run([](DeviceRank& rank) {
    const DeviceStream side = rank.device.create_stream(0).value();
    for (int round = 0; round < 4; ++round) {
      std::vector<std::pair<float*, DeviceStream>> places;
      const auto call = [&](ProcessSetId set, DeviceStream stream) {
        auto* const place = reinterpret_cast<float*>(rank.make(160'000));
        places.emplace_back(place, stream);
        EXPECT_TRUE(rank.device
                        .launch(stream, {.name = "producer",
                                         .writes = {{place, 160'000}},
                                         .run = [place] { std::fill_n(place, 40'000, 1.0f); }})
                        .ok());
        TensorEntry entry = rank.entry(OpKind::kAllreduce, "x", DataType::kFloat32, {40'000}, place, place);
        entry.request.key.process_set = set;
        entry.producer = stream;
        entry.caller_waits = true;
        const Result<HandleRef> handle = rank.hvd->enqueue(std::move(entry));
        const Status status = rank.hvd->wait(handle);
        EXPECT_TRUE(status.ok()) << status.text();
      };
      for (int i = 0; i < 3; ++i) call(0, rank.stream);
      Result<ProcessSetId> set = rank.hvd->add_process_set({0, 1});
      ASSERT_TRUE(set.ok()) << set.status().text();
      if (rank.rank() < 2) call(*set, side);
      TensorEntry remove = make_entry(OpKind::kProcessSetRemove, "remove", DataType::kUint8, {*set}, nullptr, nullptr);
      ASSERT_TRUE(rank.hvd->wait(rank.hvd->enqueue(std::move(remove))).ok());
      call(0, rank.stream);
      for (const auto& [place, stream] : places) EXPECT_GE(rank.consume<float>(place, 1, stream).front(), 1.0f);
    }
    rank.device.destroy_stream(0, side);
  });
  EXPECT_EQ(job.nccl().concurrent_calls(), 0u);
  job.shut_down();
}

TEST(DeviceFaults, OnceWarmNothingIsAllocated) {
  for (const char* const operations : {"nccl", "host"}) {
    TestRank::Settings settings;
    settings.options.gpu_operations = operations;
    settings.options.nccl_registered_bytes = 0;
    DeviceJob job(2, settings);
    job.run([](DeviceRank& rank) {
      for (int i = 0; i < 100; ++i) ASSERT_TRUE(allreduce_int16(rank, fmt::format("x{}", i % 3)).ok());
      // Few can be under way at once, as each is looked at before the next one.
      EXPECT_LE(rank.device.counts().allocations, 10u);
      EXPECT_EQ(rank.device.counts().synchronising_calls, 0u);
    });
    job.shut_down();
  }
}

// ---- any call to the device fails once, on one rank

class OneDeviceCallFails : public ::testing::TestWithParam<std::tuple<FakeCall, const char*>> {};

TEST_P(OneDeviceCallFails, EverythingEndsAndTheHostsMemoryWorks) {
  const auto [call, operations] = GetParam();
  for (std::size_t after = 0; after < 4; ++after) {
    TestRank::Settings settings;
    settings.options.gpu_operations = operations;
    DeviceJob job(3, settings);
    job.run([&, call = call](DeviceRank& rank) {
      if (rank.rank() == 1) rank.device.fail(call, Status::internal("planted"), after, 1);
      for (int i = 0; i < 3; ++i) {
        for (const OpKind op :
             {OpKind::kAllreduce, OpKind::kAllgather, OpKind::kReducescatter, OpKind::kAlltoall, OpKind::kBroadcast}) {
          std::byte* const place = rank.produce(elements(DataType::kInt16, 6, rank.rank()));
          const bool in_place = op == OpKind::kAllreduce || op == OpKind::kBroadcast;
          // Of one rank alone it is an error in the caller's hands, which the others have to wait for.
          Result<HandleRef> handle = Status::internal("not tried");
          for (int tries = 0; !handle && tries < 3; ++tries) {
            handle = rank.hvd->enqueue(rank.entry(op, fmt::format("{} {}", name_of(op), i), DataType::kInt16, {6},
                                                  place, in_place ? place : nullptr));
          }
          ASSERT_TRUE(handle.ok()) << handle.status().text();
          static_cast<void>(rank.wait(handle));
        }
      }
      if (after == 0) {
        const auto end = std::chrono::steady_clock::now() + 30s;
        while (rank.device.has_faults_left() && std::chrono::steady_clock::now() < end) {
          std::this_thread::sleep_for(1ms);
        }
        EXPECT_FALSE(rank.device.has_faults_left()) << "nothing makes such a call";
      }
      rank.device.clear_faults();
      rank.consume<std::byte>(rank.produce(std::vector<std::byte>(1)), 1);  // the device is free
      expect_host_works(rank, "z");
    });
    job.shut_down();
  }
}

using DeviceCall = std::tuple<FakeCall, const char*>;
// NCCL needs no pinned memory, and the host scales by itself.
INSTANTIATE_TEST_SUITE_P(
    Calls, OneDeviceCallFails,
    ::testing::Values(DeviceCall{FakeCall::kCreateStream, "nccl"}, DeviceCall{FakeCall::kCreateEvent, "nccl"},
                      DeviceCall{FakeCall::kRecord, "nccl"}, DeviceCall{FakeCall::kWait, "nccl"},
                      DeviceCall{FakeCall::kQuery, "nccl"}, DeviceCall{FakeCall::kAllocate, "nccl"},
                      DeviceCall{FakeCall::kCopy, "nccl"}, DeviceCall{FakeCall::kConvert, "nccl"},
                      DeviceCall{FakeCall::kCreateStream, "host"}, DeviceCall{FakeCall::kCreateEvent, "host"},
                      DeviceCall{FakeCall::kRecord, "host"}, DeviceCall{FakeCall::kWait, "host"},
                      DeviceCall{FakeCall::kQuery, "host"}, DeviceCall{FakeCall::kAllocate, "host"},
                      DeviceCall{FakeCall::kAllocatePinned, "host"}, DeviceCall{FakeCall::kCopy, "host"}),
    [](const auto& one) {
      return fmt::format("{}_{}", static_cast<int>(std::get<0>(one.param)), std::get<1>(one.param));
    });

}  // namespace
}  // namespace hvd::testing
