// The fake device itself: legal orders, what it finds wrong, capture, faults.
#include "tests/support/fake_device.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <numeric>
#include <set>

#include <gtest/gtest.h>

#include "ops/reduce/reducer.h"

namespace hvd::testing {
namespace {

using Texts = std::vector<std::string>;

/// Whether there is one text alone, and `part` is in it.
::testing::AssertionResult is_only(const Texts& texts, const std::string& part) {
  if (texts.size() == 1 && texts[0].find(part) != std::string::npos) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << ::testing::PrintToString(texts) << " instead of one with '" << part << "'";
}

/// A device with two streams, events, and memory of the test.
struct Fixture {
  explicit Fixture(std::uint64_t seed = 1) : device({.seed = seed}) { device.adopt(memory.data(), memory.size()); }

  std::byte* at(std::size_t offset) { return memory.data() + offset; }
  DeviceEvent event() { return device.create_event(0).value(); }
  Status write(DeviceStream stream, const std::string& name, std::size_t offset = 0, std::size_t bytes = 8) {
    return device.launch(stream, {.name = name, .writes = {{at(offset), bytes}}});
  }
  Status read(DeviceStream stream, const std::string& name, std::size_t offset = 0, std::size_t bytes = 8) {
    return device.launch(stream, {.name = name, .reads = {{at(offset), bytes}}});
  }

  std::array<std::byte, 256> memory{};
  FakeDevice device;
  DeviceStream a = device.create_stream(0).value();
  DeviceStream b = device.create_stream(0).value();
};

TEST(FakeDevice, RunsNothingBeforeTimePasses) {
  Fixture fixture;
  int value = 1;
  int result = 0;
  fixture.device.adopt(&value, sizeof(value));
  fixture.device.adopt(&result, sizeof(result));
  const DeviceEvent event = fixture.event();
  EXPECT_TRUE(fixture.device.query(0, event).value()) << "never recorded";
  ASSERT_TRUE(fixture.device.copy(0, &result, &value, sizeof(value), fixture.a).ok());
  ASSERT_TRUE(fixture.device.record(0, event, fixture.a).ok());
  EXPECT_FALSE(fixture.device.query(0, event).value());
  EXPECT_EQ(result, 0);
  EXPECT_EQ(fixture.device.advance(1), 1U);
  EXPECT_EQ(result, 1);
  EXPECT_FALSE(fixture.device.query(0, event).value());
  EXPECT_EQ(fixture.device.run_until_idle(), 1U);
  EXPECT_TRUE(fixture.device.query(0, event).value());
}

TEST(FakeDevice, OrdersDifferBySeedAndComeBackWithIt) {
  const auto order = [](std::uint64_t seed) {
    Fixture fixture(seed);
    const DeviceEvent event = fixture.event();
    for (int i = 0; i < 4; ++i) {
      EXPECT_TRUE(fixture.write(fixture.a, "a" + std::to_string(i), 0).ok());
      if (i == 1) {
        EXPECT_TRUE(fixture.device.record(0, event, fixture.a).ok());
      }
      if (i == 2) {
        EXPECT_TRUE(fixture.device.wait(0, fixture.b, event).ok());
      }
      EXPECT_TRUE(fixture.write(fixture.b, "b" + std::to_string(i), 64).ok());
    }
    fixture.device.run_until_idle();
    return fixture.device.history();
  };
  std::set<std::vector<std::string>> orders;
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    const std::vector<std::string> history = order(seed);
    EXPECT_EQ(history, order(seed));
    const auto place = [&history](const std::string& name) { return std::ranges::find(history, name); };
    for (int i = 0; i < 3; ++i) {
      EXPECT_LT(place("1: a" + std::to_string(i)), place("1: a" + std::to_string(i + 1)));
      EXPECT_LT(place("2: b" + std::to_string(i)), place("2: b" + std::to_string(i + 1)));
    }
    EXPECT_LT(place("1: a1"), place("2: b2")) << "the event";
    orders.insert(history);
  }
  EXPECT_GT(orders.size(), 10U);
}

TEST(FakeDevice, FindsUnorderedAccess) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {  // in whichever order they run
    Fixture fixture(seed);
    ASSERT_TRUE(fixture.write(fixture.a, "writer", 0, 16).ok());
    ASSERT_TRUE(fixture.read(fixture.b, "reader", 12, 8).ok());
    fixture.device.run_until_idle();
    EXPECT_TRUE(is_only(fixture.device.take_violations(), "unordered: '"));
  }
}

TEST(FakeDevice, ReadsTogetherAndNeighboursAreFine) {
  Fixture fixture;
  ASSERT_TRUE(fixture.read(fixture.a, "reader", 0, 16).ok());
  ASSERT_TRUE(fixture.read(fixture.b, "reader", 8, 16).ok());
  ASSERT_TRUE(fixture.write(fixture.a, "writer", 32, 16).ok());
  ASSERT_TRUE(fixture.write(fixture.b, "writer", 48, 16).ok());
  fixture.device.run_until_idle();
  EXPECT_EQ(fixture.device.violations(), Texts{});
}

TEST(FakeDevice, AnEventOrdersAcrossThreeStreams) {
  Fixture fixture;
  const DeviceStream c = fixture.device.create_stream(0).value();
  const DeviceEvent first = fixture.event();
  const DeviceEvent second = fixture.event();
  ASSERT_TRUE(fixture.write(fixture.a, "writer").ok());
  ASSERT_TRUE(fixture.device.record(0, first, fixture.a).ok());
  ASSERT_TRUE(fixture.device.wait(0, fixture.b, first).ok());
  ASSERT_TRUE(fixture.device.record(0, second, fixture.b).ok());
  ASSERT_TRUE(fixture.device.wait(0, c, second).ok());
  ASSERT_TRUE(fixture.write(c, "writer").ok());
  fixture.device.run_until_idle();
  EXPECT_EQ(fixture.device.violations(), Texts{});
}

TEST(FakeDevice, WaitsForTheRecordOfItsTime) {
  Fixture fixture;
  const DeviceEvent event = fixture.event();
  ASSERT_TRUE(fixture.device.wait(0, fixture.b, event).ok()) << "never recorded: no wait";
  ASSERT_TRUE(fixture.write(fixture.a, "a0").ok());
  ASSERT_TRUE(fixture.device.record(0, event, fixture.a).ok());
  ASSERT_TRUE(fixture.device.wait(0, fixture.b, event).ok());
  ASSERT_TRUE(fixture.write(fixture.a, "a1", 64).ok());
  ASSERT_TRUE(fixture.device.record(0, event, fixture.a).ok());  // the wait before keeps its place
  ASSERT_TRUE(fixture.write(fixture.b, "b after a0").ok());
  ASSERT_TRUE(fixture.write(fixture.b, "b not after a1", 64).ok());
  fixture.device.run_until_idle();
  EXPECT_TRUE(is_only(fixture.device.take_violations(), "unordered: '"));
}

TEST(FakeDevice, WhatTheHostSawIsOrdered) {
  Fixture fixture;
  const DeviceEvent event = fixture.event();
  ASSERT_TRUE(fixture.write(fixture.a, "writer").ok());
  ASSERT_TRUE(fixture.device.record(0, event, fixture.a).ok());
  fixture.device.run_until_idle();
  ASSERT_TRUE(fixture.device.query(0, event).value());
  ASSERT_TRUE(fixture.write(fixture.b, "later").ok());
  fixture.device.run_until_idle();
  EXPECT_EQ(fixture.device.violations(), Texts{});
  ASSERT_TRUE(fixture.write(fixture.a, "not seen").ok());
  fixture.device.run_until_idle();
  EXPECT_TRUE(is_only(fixture.device.take_violations(), "unordered: 'not seen'"));
  fixture.device.synchronise();
  ASSERT_TRUE(fixture.write(fixture.b, "after a stop").ok());
  fixture.device.run_until_idle();
  EXPECT_EQ(fixture.device.violations(), Texts{});
}

TEST(FakeDevice, FindsUseAfterFreeAndFreeInUse) {
  Fixture fixture;
  void* memory = fixture.device.allocate(0, 64).value();
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory) % 256, 0U);
  ASSERT_TRUE(fixture.device.copy(0, memory, fixture.at(0), 64, fixture.a).ok());
  fixture.device.free(0, memory);
  EXPECT_TRUE(is_only(fixture.device.take_violations(), "is freed while 'copy'"));
  fixture.device.run_until_idle();
  EXPECT_TRUE(is_only(fixture.device.take_violations(), "'copy' on stream 1 touches memory that is not"));
  fixture.device.free(0, memory);
  EXPECT_TRUE(is_only(fixture.device.take_violations(), "was not allocated or is gone"));
  EXPECT_EQ(fixture.device.counts().synchronising_calls, 2U);
}

TEST(FakeDevice, FindsForgottenMemoryEvenWhenItComesBack) {
  Fixture fixture;
  ASSERT_TRUE(fixture.write(fixture.a, "writer").ok());
  fixture.device.forget(fixture.at(0));
  fixture.device.adopt(fixture.at(0), fixture.memory.size());
  fixture.device.run_until_idle();
  EXPECT_TRUE(is_only(fixture.device.take_violations(), "'writer' on stream 1 touches memory"));
}

TEST(FakeDevice, FindsUnknownMemoryStreamsAndEvents) {
  Fixture fixture;
  std::array<char, 8> unknown{};
  ASSERT_TRUE(fixture.device.copy(0, unknown.data(), fixture.at(0), 8, fixture.a).ok());
  ASSERT_TRUE(fixture.read(fixture.a, "past the end", 250, 8).ok());
  fixture.device.run_until_idle();
  EXPECT_EQ(fixture.device.take_violations().size(), 2U);
  const DeviceEvent event = fixture.event();
  fixture.device.destroy_event(0, event);
  EXPECT_FALSE(fixture.device.record(0, event, fixture.a).ok());
  fixture.device.destroy_stream(0, fixture.b);
  EXPECT_FALSE(fixture.write(fixture.b, "late").ok());
  EXPECT_FALSE(fixture.device.create_stream(1).ok());
  fixture.device.adopt(fixture.at(8), 8);
  EXPECT_EQ(fixture.device.take_violations().size(), 4U);
}

TEST(FakeDevice, ADestroyedStreamFinishesItsWork) {
  Fixture fixture;
  const DeviceEvent event = fixture.event();
  ASSERT_TRUE(fixture.write(fixture.b, "last").ok());
  ASSERT_TRUE(fixture.device.record(0, event, fixture.b).ok());
  fixture.device.destroy_stream(0, fixture.b);
  EXPECT_EQ(fixture.device.counts().pending, 2U);
  fixture.device.run_until_idle();
  EXPECT_TRUE(fixture.device.query(0, event).value());
}

TEST(FakeDevice, ConvertsAsTheHostDoes) {
  Fixture fixture;
  std::array<float, 5> input{1.1F, -2.3F, 3e30F, 0.1F, 7.0F};
  std::array<float, 8> output{};
  fixture.device.adopt(input.data(), sizeof(input));
  fixture.device.adopt(output.data(), sizeof(output));
  const float fill = 0.5F;
  DeviceConversion conversion{.from_type = DataType::kFloat32, .to_type = DataType::kFloat32, .factor = 0.3};
  conversion.divisor = 7;
  std::memcpy(&conversion.fill, &fill, sizeof(fill));
  const std::array pieces{DevicePiece{input.data(), output.data(), input.size()},
                          DevicePiece{nullptr, output.data() + 5, 2}, DevicePiece{input.data(), nullptr, 0}};
  ASSERT_TRUE(fixture.device.convert(0, conversion, pieces, fixture.a).ok());
  EXPECT_EQ(fixture.device.counts().launches, 1U);
  fixture.device.run_until_idle();
  std::array<float, 8> expected{};
  std::ranges::copy(input, expected.begin());
  ASSERT_TRUE(scale(expected.data(), DataType::kFloat32, 5, 0.3).ok());
  ASSERT_TRUE(divide(expected.data(), DataType::kFloat32, 5, 7).ok());
  expected[5] = expected[6] = fill;
  EXPECT_EQ(std::memcmp(output.data(), expected.data(), sizeof(output)), 0);
}

TEST(FakeDevice, WidensAndTruncatesInt16) {
  Fixture fixture;
  std::array<std::int16_t, 3> narrow{-3, 7, 32767};
  std::array<std::int32_t, 3> wide{};
  fixture.device.adopt(narrow.data(), sizeof(narrow));
  fixture.device.adopt(wide.data(), sizeof(wide));
  const std::array widen{DevicePiece{narrow.data(), wide.data(), 3}};
  const std::array back{DevicePiece{wide.data(), narrow.data(), 3}};
  ASSERT_TRUE(fixture.device.convert(0, {DataType::kInt16, DataType::kInt32}, widen, fixture.a).ok());
  ASSERT_TRUE(
      fixture.device.launch(fixture.a, {.name = "add", .writes = {{wide.data(), 12}}, .run = [&wide] { wide[2] += 2; }})
          .ok());
  ASSERT_TRUE(fixture.device.convert(0, {DataType::kInt32, DataType::kInt16}, back, fixture.a).ok());
  EXPECT_FALSE(fixture.device.convert(0, {DataType::kInt32, DataType::kFloat32}, back, fixture.a).ok());
  EXPECT_FALSE(fixture.device.convert(0, {DataType::kInt32, DataType::kInt16, 0.5}, back, fixture.a).ok());
  fixture.device.run_until_idle();
  EXPECT_EQ(wide, (std::array<std::int32_t, 3>{-3, 7, 32769}));
  EXPECT_EQ(narrow, (std::array<std::int16_t, 3>{-3, 7, -32767}));
}

TEST(FakeDevice, FindsPiecesThatOverlap) {
  Fixture fixture;
  const auto convert = [&fixture](std::vector<DevicePiece> pieces) {
    EXPECT_TRUE(fixture.device.convert(0, {}, pieces, fixture.a).ok());
    fixture.device.run_until_idle();
    return fixture.device.take_violations();
  };
  auto at = [&fixture](std::size_t offset) { return fixture.at(offset); };
  EXPECT_EQ(convert({{at(0), at(0), 8}, {at(8), at(16), 8}}), Texts{}) << "in place";
  EXPECT_TRUE(is_only(convert({{at(0), at(64), 9}, {at(8), at(72), 8}}), "two pieces write"));
  EXPECT_TRUE(is_only(convert({{at(0), at(64), 8}, {at(68), at(128), 8}}), "reads from"));
  EXPECT_TRUE(is_only(convert({{at(0), at(4), 8}}), "reads from"));
  EXPECT_EQ(convert({{at(0), at(64), 8}, {at(0), at(72), 8}}), Texts{}) << "one input twice";
}

TEST(FakeDevice, CaptureSpreadsOverEventsAndReplays) {
  Fixture fixture;
  FakeDevice& device = fixture.device;
  int runs = 0;
  const auto count = [&] {
    return FakeWork{.name = "count", .writes = {{fixture.at(0), 8}}, .run = [&runs] { ++runs; }};
  };
  const DeviceEvent fork = fixture.event();
  const DeviceEvent join = fixture.event();
  ASSERT_TRUE(device.begin_capture(fixture.a).ok());
  ASSERT_TRUE(device.launch(fixture.a, count()).ok());
  ASSERT_TRUE(device.record(0, fork, fixture.a).ok());
  EXPECT_FALSE(device.is_capturing(0, fixture.b).value());
  ASSERT_TRUE(device.wait(0, fixture.b, fork).ok());
  EXPECT_TRUE(device.is_capturing(0, fixture.b).value());
  EXPECT_FALSE(device.query(0, fork).ok()) << "a captured event has no state";
  ASSERT_TRUE(device.launch(fixture.b, count()).ok());
  ASSERT_TRUE(device.record(0, join, fixture.b).ok());
  ASSERT_TRUE(device.wait(0, fixture.a, join).ok());
  const Result<FakeGraphRef> graph = device.end_capture(fixture.a);
  ASSERT_TRUE(graph.ok()) << graph.status().text();
  EXPECT_FALSE(device.is_capturing(0, fixture.b).value());
  EXPECT_FALSE(device.wait(0, fixture.b, fork).ok()) << "the capture has ended";
  EXPECT_EQ(device.run_until_idle(), 0U);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(device.replay(graph.value(), i == 1 ? fixture.b : fixture.a).ok());
  device.run_until_idle();
  EXPECT_EQ(runs, 6);
  EXPECT_EQ(device.violations(), Texts{});
}

TEST(FakeDevice, FindsUnorderedWorkInAGraph) {
  Fixture fixture;
  const DeviceEvent fork = fixture.event();
  const DeviceEvent join = fixture.event();
  ASSERT_TRUE(fixture.device.begin_capture(fixture.a).ok());
  ASSERT_TRUE(fixture.device.record(0, fork, fixture.a).ok());
  ASSERT_TRUE(fixture.device.wait(0, fixture.b, fork).ok());
  ASSERT_TRUE(fixture.write(fixture.a, "one").ok());
  ASSERT_TRUE(fixture.write(fixture.b, "other").ok());
  ASSERT_TRUE(fixture.device.record(0, join, fixture.b).ok());
  ASSERT_TRUE(fixture.device.wait(0, fixture.a, join).ok());
  ASSERT_TRUE(fixture.device.replay(fixture.device.end_capture(fixture.a).value(), fixture.a).ok());
  fixture.device.run_until_idle();
  EXPECT_TRUE(is_only(fixture.device.take_violations(), "unordered"));
}

TEST(FakeDevice, CaptureRefusesOutsidersAndLooseEnds) {
  Fixture fixture;
  FakeDevice& device = fixture.device;
  const DeviceEvent outside = fixture.event();
  const DeviceEvent fork = fixture.event();
  ASSERT_TRUE(device.record(0, outside, fixture.b).ok());
  ASSERT_TRUE(device.begin_capture(fixture.a).ok());
  EXPECT_FALSE(device.wait(0, fixture.a, outside).ok());
  EXPECT_FALSE(device.end_capture(fixture.a).ok()) << "the wait made it invalid";

  ASSERT_TRUE(device.begin_capture(fixture.a).ok());
  ASSERT_TRUE(device.record(0, fork, fixture.a).ok());
  ASSERT_TRUE(device.wait(0, fixture.b, fork).ok());
  ASSERT_TRUE(fixture.write(fixture.b, "loose").ok());
  EXPECT_FALSE(device.end_capture(fixture.b).ok()) << "not the stream that began";
  EXPECT_NE(device.end_capture(fixture.a).status().text().find("not joined"), std::string::npos);
  EXPECT_FALSE(device.is_capturing(0, fixture.a).value());
}

TEST(FakeDevice, EachThreadHasACurrentDevice) {
  FakeDevice device({.devices = 2});
  EXPECT_EQ(device.exchange_current(1).value(), -1);
  std::jthread([&device] { EXPECT_EQ(device.exchange_current(0).value(), -1); }).join();
  EXPECT_FALSE(device.exchange_current(2).ok());
  EXPECT_EQ(device.take_violations().size(), 1U);
  EXPECT_EQ(device.exchange_current(-1).value(), 1);
}

TEST(FakeDevice, FailsOnRequest) {
  Fixture fixture;
  FakeDevice& device = fixture.device;
  device.fail_allocation(2);
  void* first = device.allocate(0, 10).value();
  const Result<void*> second = device.allocate(0, 123);
  EXPECT_EQ(second.status().code(), StatusCode::kInternal);
  EXPECT_NE(second.status().text().find("123 bytes"), std::string::npos);
  void* third = device.allocate(0, 10).value();
  void* pinned = device.allocate_pinned(5).value();
  EXPECT_EQ(device.counts().bytes, 20U);
  EXPECT_EQ(device.counts().pinned_bytes, 5U);
  device.free(0, first);
  device.free(0, third);
  device.free_pinned(pinned);
  EXPECT_EQ(device.counts().bytes + device.counts().pinned_bytes, 0U);

  const DeviceEvent event = fixture.event();
  device.fail(FakeCall::kQuery, Status::internal("the device is lost"));
  device.fail(FakeCall::kRecord, Status::internal("no record"), /*after=*/1, /*times=*/1);
  EXPECT_TRUE(device.record(0, event, fixture.a).ok());
  EXPECT_FALSE(device.record(0, event, fixture.a).ok());
  EXPECT_TRUE(device.record(0, event, fixture.a).ok());
  EXPECT_EQ(device.query(0, event).status().text(), "the device is lost");
  device.clear_faults();
  EXPECT_FALSE(device.query(0, event).value());
  EXPECT_EQ(device.counts().events, 1U);
  EXPECT_EQ(device.counts().streams, 2U);
}

TEST(FakeDevice, HangsUntilReleased) {
  Fixture fixture;
  ASSERT_TRUE(fixture.write(fixture.a, "writer").ok());
  fixture.device.hang();
  EXPECT_EQ(fixture.device.run_until_idle(), 0U);
  fixture.device.release();
  EXPECT_EQ(fixture.device.run_until_idle(), 1U);
}

TEST(FakeDevice, GoesOnByItselfWithAThread) {
  Fixture fixture;
  fixture.device.start();
  const DeviceEvent event = fixture.event();
  int value = 0;
  fixture.device.adopt(&value, sizeof(value));
  const std::vector<ByteRange> ranges{{&value, sizeof(value)}};
  for (int i = 0; i < 100; ++i) {
    ASSERT_TRUE(fixture.device.launch(fixture.a, {.name = "add", .writes = ranges, .run = [&value] { ++value; }}).ok());
  }
  ASSERT_TRUE(fixture.device.record(0, event, fixture.a).ok());
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!fixture.device.query(0, event).value() && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::yield();
  }
  EXPECT_EQ(value, 100);
  fixture.device.stop();
  EXPECT_EQ(fixture.device.counts().pending, 0U);
}

}  // namespace
}  // namespace hvd::testing
