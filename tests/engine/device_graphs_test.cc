// Calls that become part of a graph, on ranks as in device_test.cc.
#include "tests/support/device_job.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/support/manual_clock.h"

namespace hvd::testing {
namespace {

using namespace std::chrono_literals;

TEST(DeviceGraphs, ACapturedCallRunsWithEachReplay) {
  DeviceJob job(2);
  std::vector<FakeGraphRef> graphs(2);
  std::vector<float*> places(2);
  job.run([&](DeviceRank& rank) {
    const auto index = static_cast<std::size_t>(rank.rank());
    ASSERT_TRUE(allreduce_once(rank, "warm").ok());
    places[index] = rank.produce(std::vector<float>(5, 1.0f));
    ASSERT_TRUE(rank.device.begin_capture(rank.stream).ok());
    for (int i = 0; i < 3; ++i) {
      const Status status = rank.run(
          rank.entry(OpKind::kAllreduce, fmt::format("x{}", i), DataType::kFloat32, {5}, places[index], places[index]));
      ASSERT_TRUE(status.ok()) << status.text();
    }
    Result<FakeGraphRef> graph = rank.device.end_capture(rank.stream);
    ASSERT_TRUE(graph.ok()) << graph.status().text();
    graphs[index] = std::move(graph).value();
  });
  job.run([&](DeviceRank& rank) {
    const auto index = static_cast<std::size_t>(rank.rank());
    ASSERT_NE(graphs[index], nullptr);
    for (int replay = 0; replay < 20; ++replay) {
      rank.write(reinterpret_cast<std::byte*>(places[index]), std::vector<float>(5, 1.0f));
      ASSERT_TRUE(rank.device.replay(graphs[index], rank.stream).ok());
      EXPECT_EQ(rank.consume<float>(places[index], 5), std::vector<float>(5, 8.0f));
    }
    const Status status = allreduce_once(rank, "beside");
    EXPECT_TRUE(status.ok()) << status.text();
  });
  job.shut_down();
}

TEST(DeviceGraphs, AnOutputThatIsDroppedUnderCaptureIsUsedAgainAfterIt) {
  DeviceJob job(2);
  job.run([](DeviceRank& rank) {
    const auto gather = [&](const std::string& name) {
      const float* const input = rank.produce(std::vector<float>(16, 1.0f));
      return rank.hvd->enqueue(rank.entry(OpKind::kAllgather, name, DataType::kFloat32, {16}, input, nullptr));
    };
    const auto seen = [&](const Result<HandleRef>& handle) {
      return rank.consume<float>(handle.value()->output().tensors.front().memory.get(), 32);
    };
    Result<HandleRef> first = gather("first");
    ASSERT_TRUE(rank.wait(first).ok());
    EXPECT_EQ(seen(first), std::vector<float>(32, 1.0f));
    std::this_thread::sleep_for(20ms);  // until the engine has seen that the device is done
    ASSERT_TRUE(rank.device.begin_capture(rank.stream).ok());
    first = Status::internal("dropped");
    EXPECT_TRUE(rank.device.end_capture(rank.stream).ok()) << "an event of ours became part of the graph";
    for (int i = 0; i < 3; ++i) {
      const Result<HandleRef> later = gather(fmt::format("later{}", i));
      const Status status = rank.wait(later);
      ASSERT_TRUE(status.ok()) << status.text();
      EXPECT_EQ(seen(later), std::vector<float>(32, 1.0f));
    }
  });
  job.shut_down();
}

// Most programs have their work on the default stream, which is closed while a stream that waits for it is captured.
TEST(DeviceGraphs, TheDefaultStreamIsLeftAloneDuringACapture) {
  FakeDevice device;
  ManualClock clock;
  Loop loop(clock);
  const DeviceStream stream = device.create_stream(0).value();
  {
    DeviceEngine engine(loop, device);
    const std::weak_ptr<void> kept = engine.keep(DeviceEvents::place(0, nullptr, /*captured=*/false), nullptr);
    ASSERT_TRUE(device.begin_capture(stream, /*blocking=*/true).ok());
    engine.look();  // the fake finds an event that is recorded now
    EXPECT_FALSE(kept.expired());
    Result<std::shared_ptr<DeviceBlock>> block = engine.memory().lease(0, 16, stream);
    ASSERT_TRUE(block.ok());
    block.value()->add_consumer(nullptr);
    block = Status::internal("dropped");
    EXPECT_EQ(device.counts().synchronising_calls, 0u);
    EXPECT_TRUE(device.end_capture(stream).ok());
    engine.look();
    device.run_until_idle();
    engine.look();
    EXPECT_TRUE(kept.expired());
    const std::size_t allocations = device.counts().allocations;
    EXPECT_TRUE(engine.memory().lease(0, 16, stream).ok());
    EXPECT_EQ(device.counts().allocations, allocations) << "it is used again";
    device.run_until_idle();
  }
  device.destroy_stream(0, stream);
}

TEST(DeviceGraphs, WhatCannotBeCapturedSaysSo) {
  DeviceJob job(2);
  job.run([&](DeviceRank& rank) {
    float* const place = rank.produce(std::vector<float>(5, 1.0f));
    ASSERT_TRUE(rank.device.begin_capture(rank.stream).ok());
    const Status first = rank.run(rank.entry(OpKind::kAllreduce, "x", DataType::kFloat32, {5}, place, place));
    EXPECT_NE(first.text().find("do one step before the capture begins"), std::string::npos) << first.text();
    static_cast<void>(rank.device.end_capture(rank.stream));
    ASSERT_TRUE(allreduce_once(rank, "warm").ok());
    ASSERT_TRUE(rank.device.begin_capture(rank.stream).ok());
    TensorEntry adasum = rank.entry(OpKind::kAllreduce, "a", DataType::kFloat32, {5}, place, place);
    adasum.request.reduce_op = ReduceOp::kAdasum;
    const Status second = rank.run(std::move(adasum));
    EXPECT_NE(second.text().find("cannot become part of a CUDA graph"), std::string::npos) << second.text();
    static_cast<void>(rank.device.end_capture(rank.stream));
    EXPECT_TRUE(allreduce_once(rank, "after").ok());
  });
  job.shut_down();
}

}  // namespace
}  // namespace hvd::testing
