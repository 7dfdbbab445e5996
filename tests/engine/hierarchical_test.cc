// Allreduces on device memory that go by NCCL within hosts and over the host's transports between them. Each rank is a
// thread of this process with a device and an NCCL of host memory, and is told which host it is on.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <latch>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/support/device_job.h"

namespace hvd::testing {
namespace {

using namespace std::chrono_literals;

struct Layout {
  const char* name;
  std::vector<int> hosts;  // of each rank
  bool has_hierarchy;
};
void PrintTo(const Layout& layout, std::ostream* out) { *out << layout.name; }

const std::array kLayouts{
    Layout{"Hosts2By2", {0, 0, 1, 1}, true},       Layout{"Hosts2By3", {0, 0, 0, 1, 1, 1}, true},
    Layout{"Hosts3By2", {0, 0, 1, 1, 2, 2}, true}, Layout{"Interleaved", {0, 1, 0, 1}, true},
    Layout{"OneEach", {0, 1, 2, 3}, false},        Layout{"OneHost", {0, 0, 0, 0}, false},
    Layout{"Uneven", {0, 0, 0, 1, 1}, false},
};

constexpr std::size_t kPortionFloats = 256;  // with the shortest segments

TestRank::Settings settings_on(const std::vector<int>& hosts) {
  TestRank::Settings settings;
  settings.hosts = hosts;
  settings.options.hierarchical_allreduce = true;
  settings.options.segment_bytes = 64;
  settings.options.small_limit_bytes = 64;  // most portions are reduced in a ring, the smallest are not
  settings.options.nccl_registered_bytes = std::size_t{1} << 20;  // for what goes another way
  settings.options.dynamic_process_sets = true;
  return settings;
}

std::int64_t sent_bytes(DeviceRank& rank) { return rank.hvd->runtime().statistics().transport.data_bytes_sent.value(); }

std::int64_t sent_bytes(DeviceJob& job) {
  std::int64_t sum = 0;
  for (int rank = 0; rank < job.size(); ++rank) sum += sent_bytes(job[rank]);
  return sum;
}

// ---- values

class OnLayouts : public ::testing::TestWithParam<Layout> {
 protected:
  TestRank::Settings settings() const { return settings_on(GetParam().hosts); }
  int size() const { return static_cast<int>(GetParam().hosts.size()); }
};

TEST_P(OnLayouts, EveryReductionOfEveryTypeIsThatOfTheHost) {
  DeviceJob job(size(), settings());
  job.run([](DeviceRank& rank) {
    for (const DataTypeInfo& type : kDataTypes) {
      for (const ReduceOp op :
           {ReduceOp::kSum, ReduceOp::kAverage, ReduceOp::kMin, ReduceOp::kMax, ReduceOp::kProduct}) {
        for (const std::size_t count : {0, 1, 101}) {
          const std::string name = fmt::format("{} {} {}", type.name, name_of(op), count);
          const std::vector<std::byte> input = elements(type.type, count, rank.rank());
          TensorEntry like = make_entry(OpKind::kAllreduce, name + " host", type.type,
                                        {static_cast<std::int64_t>(count)}, input.data(), nullptr);
          like.request.reduce_op = op;
          like.request.prescale = 2.0;
          like.request.postscale = 0.5;
          TensorEntry entry = rank.entry(OpKind::kAllreduce, name, type.type, like.request.shape, rank.produce(input),
                                         rank.make(input.size()));
          entry.request.reduce_op = op;
          entry.request.prescale = 2.0;
          entry.request.postscale = 0.5;
          std::byte* const output = entry.output;
          const std::vector<std::byte> expected = on_host(rank, std::move(like), input.size());
          const Status status = rank.run(std::move(entry));
          ASSERT_TRUE(status.ok()) << name << ": " << status.text();
          EXPECT_EQ(rank.consume<std::byte>(output, input.size()), expected) << name;
        }
      }
    }
  });
  job.shut_down();
}

std::vector<float> random_floats(std::size_t count, int rank) {
  std::mt19937 random(static_cast<std::mt19937::result_type>(1000 * count) + static_cast<unsigned>(rank));
  std::uniform_real_distribution<float> values(-1.0f, 1.0f);
  std::vector<float> made(count);
  for (float& value : made) value = values(random);
  return made;
}

std::vector<double> double_sum(std::size_t count, int ranks) {
  std::vector<double> sum(count);
  for (int rank = 0; rank < ranks; ++rank) {
    const std::vector<float> values = random_floats(count, rank);
    for (std::size_t i = 0; i < count; ++i) sum[i] += values[i];
  }
  return sum;
}

// Sizes about what a share is cut at, in place and apart; all ranks see the same bits.
TEST_P(OnLayouts, SumsAreRightAndTheSameEverywhereWhateverTheSize) {
  DeviceJob job(size(), settings());
  const auto local = static_cast<std::size_t>(std::ranges::count(GetParam().hosts, 0));
  const std::size_t portion = kPortionFloats * local;
  const std::set<std::size_t> counts{0,
                                     1,
                                     local - 1,
                                     local,
                                     local + 1,
                                     997,
                                     portion - 1,
                                     portion,
                                     portion + 1,
                                     2 * portion + 1,
                                     7 * portion + local - 1};
  std::mutex mutex;
  std::map<std::pair<std::size_t, bool>, std::vector<std::vector<float>>> seen;
  job.run([&](DeviceRank& rank) {
    for (const bool in_place : {true, false}) {
      for (const std::size_t count : counts) {
        const std::vector<float> input = random_floats(count, rank.rank());
        float* const from = rank.produce(input);
        void* const to = in_place ? static_cast<void*>(from) : rank.make(count * sizeof(float));
        const Status status = rank.run(rank.entry(OpKind::kAllreduce, fmt::format("x{} {}", count, in_place),
                                                  DataType::kFloat32, {static_cast<std::int64_t>(count)}, from, to));
        ASSERT_TRUE(status.ok()) << count << ": " << status.text();
        std::vector<float> result = rank.consume<float>(to, count);
        if (!in_place) {
          EXPECT_EQ(rank.consume<float>(from, count), input) << "an input is changed";
        }
        const std::scoped_lock lock(mutex);
        seen[{count, in_place}].push_back(std::move(result));
      }
    }
  });
  for (const auto& [key, results] : seen) {
    const std::size_t count = key.first;
    ASSERT_EQ(results.size(), static_cast<std::size_t>(size()));
    for (const std::vector<float>& one : results) EXPECT_EQ(one, results.front()) << count;
    const std::vector<double> expected = double_sum(count, size());
    for (std::size_t i = 0; i < count; ++i) ASSERT_NEAR(results.front()[i], expected[i], 1e-5) << i << " of " << count;
  }
  for (int rank = 0; rank < job.size(); ++rank) EXPECT_EQ(job[rank].device.counts().synchronising_calls, 0u);
  EXPECT_EQ(job.nccl().concurrent_calls(), 0u);
  job.shut_down();
}

TEST_P(OnLayouts, ManyTensorsInFlightAreFusedAndKeepTheirValues) {
  DeviceJob job(size(), settings());
  job.run([](DeviceRank& rank) {
    const auto average = static_cast<float>(rank.hvd->size() + 1) / 2;
    const auto own = static_cast<float>(rank.rank() + 1);
    for (int round = 0; round < 3; ++round) {
      std::vector<std::pair<float*, std::size_t>> places;
      std::vector<Result<HandleRef>> handles;
      for (std::size_t i = 0; i < 50; ++i) {
        const std::size_t count = i * i % 777;
        float* const place = rank.produce(std::vector<float>(count, own * static_cast<float>(i)));
        places.emplace_back(place, count);
        TensorEntry entry = rank.entry(OpKind::kAllreduce, fmt::format("x{}", i), DataType::kFloat32,
                                       {static_cast<std::int64_t>(count)}, place, place);
        entry.request.reduce_op = ReduceOp::kAverage;
        entry.request.postscale = 2.0;
        handles.push_back(rank.hvd->enqueue(std::move(entry)));
      }
      for (std::size_t i = 0; i < places.size(); ++i) {
        const Status status = rank.wait(handles[i]);
        ASSERT_TRUE(status.ok()) << status.text();
        const auto [place, count] = places[i];
        EXPECT_EQ(rank.consume<float>(place, count), std::vector<float>(count, 2 * average * static_cast<float>(i)));
      }
    }
  });
  EXPECT_EQ(job.nccl().concurrent_calls(), 0u);
  job.shut_down();
}

// A group is one call of several reductions, which use the same host memory one after the other.
TEST_P(OnLayouts, TensorsOfAGroupAreReducedInTheirRuns) {
  TestRank::Settings chosen = settings();
  chosen.options.segment_bytes = 1024;
  DeviceJob job(size(), chosen);
  job.run([](DeviceRank& rank) {
    const std::array<std::size_t, 4> counts{5, 20'000, 777, 30'001};  // what is large goes alone
    for (int round = 0; round < 3; ++round) {
      std::array<float*, 4> places{};
      for (std::size_t i = 0; i < counts.size(); ++i) {
        places[i] = rank.produce(std::vector<float>(counts[i], static_cast<float>(i + 1)));
      }
      TensorEntry entry = rank.entry(OpKind::kAllreduce, "group", DataType::kFloat32, {5}, places[0], places[0]);
      for (std::size_t i = 1; i < counts.size(); ++i) {
        auto* const place = reinterpret_cast<std::byte*>(places[i]);
        entry.request.more.push_back({DataType::kFloat32, {static_cast<std::int64_t>(counts[i])}});
        entry.more.push_back({place, place});
      }
      const Status status = rank.run(std::move(entry));
      ASSERT_TRUE(status.ok()) << status.text();
      for (std::size_t i = 0; i < counts.size(); ++i) {
        const auto sum = static_cast<float>((i + 1) * static_cast<std::size_t>(rank.hvd->size()));
        EXPECT_EQ(rank.consume<float>(places[i], counts[i]), std::vector<float>(counts[i], sum));
      }
    }
  });
  job.shut_down();
}

TEST_P(OnLayouts, ARankThatHasJoinedStandsInWithElementsThatChangeNothing) {
  DeviceJob job(size(), settings());
  job.run([](DeviceRank& rank) {
    const int brings = rank.hvd->size() - 1;
    for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMin, ReduceOp::kProduct}) {
      if (rank.rank() == brings) break;  // has no data
      float* const place = rank.produce(std::vector<float>(9, 2.0f));
      TensorEntry entry =
          rank.entry(OpKind::kAllreduce, std::string(name_of(op)), DataType::kFloat32, {9}, place, place);
      entry.request.reduce_op = op;
      const Status status = rank.run(std::move(entry));
      ASSERT_TRUE(status.ok()) << status.text();
      const float expected = op == ReduceOp::kSum   ? 2.0f * static_cast<float>(brings)
                             : op == ReduceOp::kMin ? 2.0f
                                                    : std::pow(2.0f, static_cast<float>(brings));
      EXPECT_EQ(rank.consume<float>(place, 9), std::vector<float>(9, expected)) << name_of(op);
    }
    TensorEntry join = make_entry(OpKind::kJoin, std::string(kJoinName), DataType::kUint8, {}, nullptr, nullptr);
    EXPECT_TRUE(rank.hvd->wait(rank.hvd->enqueue(std::move(join))).ok());
  });
  job.shut_down();
}

// ---- which way they go

// A ring over the hosts for each share: 2(H-1)/H of it a rank, so 2(H-1) times the tensor in all. By the host alone it
// is 2(N-1) times.
TEST_P(OnLayouts, BetweenHostsGoTheBytesOfOneRingOverHosts) {
  const auto hosts = static_cast<std::int64_t>(std::ranges::max(GetParam().hosts)) + 1;
  constexpr std::size_t kCount = 6 * 1000;  // of which every share has whole chunks
  for (const bool staged : {false, true}) {
    TestRank::Settings chosen = settings();
    if (staged) chosen.options.gpu_operations = "host";
    DeviceJob job(size(), chosen);
    job.run([](DeviceRank& rank) { EXPECT_TRUE(allreduce_once(rank, "warm", kCount).ok()); });
    const std::int64_t before = sent_bytes(job);
    job.run([](DeviceRank& rank) { EXPECT_TRUE(allreduce_once(rank, "measured", kCount).ok()); });
    const std::int64_t flat = staged ? 2 * (size() - 1) : 0;
    const std::int64_t times = !staged && GetParam().has_hierarchy ? 2 * (hosts - 1) : flat;
    EXPECT_EQ(sent_bytes(job) - before, times * static_cast<std::int64_t>(kCount * sizeof(float)))
        << (staged ? "staged" : "nccl");
    job.shut_down();
  }
}

TEST_P(OnLayouts, OtherOperationsUseTheCommunicatorOfAllRanks) {
  DeviceJob job(size(), settings());
  job.run([](DeviceRank& rank) {
    EXPECT_TRUE(allreduce_once(rank, "x").ok());
    for (int i = 0; i < 3; ++i) {
      float* const place = rank.produce(std::vector<float>(5, static_cast<float>(rank.rank())));
      TensorEntry entry = rank.entry(OpKind::kBroadcast, "b", DataType::kFloat32, {5}, place, place);
      entry.request.root_rank = 1;
      ASSERT_TRUE(rank.run(std::move(entry)).ok());
      EXPECT_EQ(rank.consume<float>(place, 5), std::vector<float>(5, 1.0f));
      EXPECT_TRUE(allreduce_once(rank, "y").ok());
    }
  });
  const std::size_t levels = GetParam().has_hierarchy ? 2 : 1;
  EXPECT_EQ(job.nccl().alive_communicators(), levels * static_cast<std::size_t>(size()));
  EXPECT_EQ(job.nccl().concurrent_calls(), 0u);
  job.shut_down();
}

INSTANTIATE_TEST_SUITE_P(Layouts, OnLayouts, ::testing::ValuesIn(kLayouts),
                         [](const auto& one) { return std::string(one.param.name); });

Status sum_in_set(DeviceRank& rank, const std::string& name, ProcessSetId set, int members) {
  constexpr std::size_t kCount = 3000;
  float* const place = rank.produce(std::vector<float>(kCount, 1.0f));
  TensorEntry entry = rank.entry(OpKind::kAllreduce, name, DataType::kFloat32, {kCount}, place, place);
  entry.request.key.process_set = set;
  HVD_RETURN_IF_ERROR(rank.run(std::move(entry)));
  EXPECT_EQ(rank.consume<float>(place, kCount), std::vector<float>(kCount, static_cast<float>(members)));
  return {};
}

// Of six ranks on two hosts: {0, 1, 3, 4} has two on each, {0, 1, 2, 3} three and one, {2, 5} one on each.
TEST(HierarchicalSets, EachSetGoesAsItsOwnRanksLie) {
  DeviceJob job(6, settings_on({0, 0, 0, 1, 1, 1}));
  const std::vector<std::vector<int>> members{{0, 1, 3, 4}, {0, 1, 2, 3}, {2, 5}};
  const std::vector<bool> crosses{true, false, false};
  for (std::size_t i = 0; i < members.size(); ++i) {
    std::atomic<ProcessSetId> set{};
    const auto each = [&](const std::string& name) {
      job.run([&, name](DeviceRank& rank) {
        if (std::ranges::count(members[i], rank.rank()) == 0) return;
        const Status status = sum_in_set(rank, name, set.load(), static_cast<int>(members[i].size()));
        EXPECT_TRUE(status.ok()) << status.text();
      });
    };
    job.run([&](DeviceRank& rank) { set = rank.hvd->add_process_set(members[i]).value(); });
    each("warm");
    const std::int64_t before = sent_bytes(job);
    each("measured");
    EXPECT_EQ(sent_bytes(job) - before, crosses[i] ? 2 * 3000 * 4 : 0) << i;
  }
  job.run([](DeviceRank& rank) { EXPECT_TRUE(allreduce_once(rank, "all", 3000).ok()); });
  EXPECT_EQ(job.nccl().concurrent_calls(), 0u);
  job.shut_down();
}

TEST(HierarchicalSets, CallsOfSetsThatOverlapGoOneAfterTheOther) {
  TestRank::Settings settings = settings_on({0, 0, 0, 1, 1, 1});
  settings.options.segment_bytes = 1024;  // few portions of large tensors
  DeviceJob job(6, settings);
  job.run([](DeviceRank& rank) {
    Result<ProcessSetId> first = rank.hvd->add_process_set({0, 1, 3, 4});
    Result<ProcessSetId> second = rank.hvd->add_process_set({1, 2, 4, 5});
    ASSERT_TRUE(first.ok() && second.ok());
    std::vector<std::pair<float*, float>> places;
    std::vector<Result<HandleRef>> handles;
    for (int i = 0; i < 30; ++i) {
      const bool in_first = rank.rank() % 3 != 2;
      const bool in_second = rank.rank() % 3 != 0;
      const ProcessSetId set = i % 3 == 0 ? ProcessSetId{0} : i % 3 == 1 ? *first : *second;
      if ((i % 3 == 1 && !in_first) || (i % 3 == 2 && !in_second)) continue;
      float* const place = rank.produce(std::vector<float>(20'000, 1.0f));
      TensorEntry entry =
          rank.entry(OpKind::kAllreduce, fmt::format("x{}", i), DataType::kFloat32, {20'000}, place, place);
      entry.request.key.process_set = set;
      places.emplace_back(place, set == 0 ? 6.0f : 4.0f);
      handles.push_back(rank.hvd->enqueue(std::move(entry)));
    }
    for (std::size_t i = 0; i < handles.size(); ++i) {
      const Status status = rank.wait(handles[i]);
      ASSERT_TRUE(status.ok()) << status.text();
      EXPECT_EQ(rank.consume<float>(places[i].first, 20'000), std::vector<float>(20'000, places[i].second));
    }
  });
  EXPECT_EQ(job.nccl().concurrent_calls(), 0u);
  job.shut_down();
}

TEST(HierarchicalSets, ASetThatIsRemovedLetsGoOfItsCommunicators) {
  DeviceJob job(4, settings_on({0, 0, 1, 1}));
  job.run([](DeviceRank& rank) {
    for (int round = 0; round < 3; ++round) {
      Result<ProcessSetId> set = rank.hvd->add_process_set({0, 2});
      ASSERT_TRUE(set.ok()) << set.status().text();
      if (rank.rank() % 2 == 0) {
        EXPECT_TRUE(sum_in_set(rank, "x", *set, 2).ok());
      }
      EXPECT_TRUE(allreduce_once(rank, "all").ok());
      TensorEntry remove = make_entry(OpKind::kProcessSetRemove, "remove", DataType::kUint8, {*set}, nullptr, nullptr);
      ASSERT_TRUE(rank.hvd->wait(rank.hvd->enqueue(std::move(remove))).ok());
    }
  });
  job.shut_down();
}

// ---- memory

TEST(HierarchicalMemory, IsKeptUntilTheDeviceIsDoneWithIt) {
  DeviceJob job(4, settings_on({0, 0, 1, 1}));
  job.run([](DeviceRank& rank) {
    for (int i = 0; i < 10; ++i) {
      auto owner = std::make_shared<int>(1);
      const std::weak_ptr<int> watch = owner;
      float* const place = rank.produce(std::vector<float>(3000, 1.0f));
      TensorEntry entry = rank.entry(OpKind::kAllreduce, "x", DataType::kFloat32, {3000}, place, place);
      entry.keep_alive = std::move(owner);
      const Result<HandleRef> handle = rank.hvd->enqueue(std::move(entry));
      const Status status = rank.wait(handle);
      ASSERT_TRUE(status.ok()) << status.text();
      EXPECT_EQ(rank.consume<float>(place, 3000), std::vector<float>(3000, 4.0f));
      const auto end = std::chrono::steady_clock::now() + 30s;
      while (!watch.expired() && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(1ms);
      EXPECT_TRUE(watch.expired()) << "it is done, and still held";
    }
  });
  job.shut_down();
}

// What one call has yet to copy back is not written to by the next one, whose stream nothing orders behind it.
TEST(HierarchicalMemory, CallsInLineOnTwoStreamsHaveHostMemoryOfTheirOwn) {
  TestRank::Settings settings = settings_on({0, 0, 1, 1});
  settings.options.segment_bytes = 1024;  // few portions of large tensors
  DeviceJob job(4, settings);
  job.run([](DeviceRank& rank) {
    for (int i = 0; i < 15; ++i) {
      std::array<float*, 4> places{};
      std::vector<Result<HandleRef>> handles;
      for (std::size_t k = 0; k < places.size(); ++k) {
        places[k] = rank.produce(std::vector<float>(20'000, 1.0f));
        TensorEntry entry =
            rank.entry(OpKind::kAllreduce, fmt::format("x{}", k), DataType::kFloat32, {20'000}, places[k], places[k]);
        entry.caller_waits = k % 2 == 1;
        handles.push_back(rank.hvd->enqueue(std::move(entry)));
      }
      for (std::size_t k = 0; k < places.size(); ++k) {
        const Status status = rank.wait(handles[k]);
        ASSERT_TRUE(status.ok()) << status.text();
        EXPECT_EQ(rank.consume<float>(places[k], 20'000), std::vector<float>(20'000, 4.0f));
      }
    }
  });
  job.shut_down();
}

TEST(HierarchicalMemory, OnceWarmNothingIsAllocated) {
  DeviceJob job(4, settings_on({0, 0, 1, 1}));
  job.run([](DeviceRank& rank) {
    for (int i = 0; i < 100; ++i) ASSERT_TRUE(allreduce_once(rank, fmt::format("x{}", i % 3), 3000).ok());
    // A call's two slots, of as many calls as are not looked at before the next one.
    EXPECT_LE(rank.device.counts().allocations, 10u);
    EXPECT_EQ(rank.device.counts().synchronising_calls, 0u);
  });
  job.shut_down();
}

// ---- graphs

TEST(HierarchicalGraphs, ACapturedCallGoesByTheCommunicatorOfAllRanks) {
  DeviceJob job(4, settings_on({0, 0, 1, 1}));
  job.run([](DeviceRank& rank) {
    float* const place = rank.produce(std::vector<float>(5, 1.0f));
    const auto captured = [&](const std::string& name, FakeGraphRef* graph) {
      EXPECT_TRUE(rank.device.begin_capture(rank.stream).ok());
      const Status status = rank.run(rank.entry(OpKind::kAllreduce, name, DataType::kFloat32, {5}, place, place));
      Result<FakeGraphRef> made = rank.device.end_capture(rank.stream);
      if (status.ok() && made) *graph = made.value();
      return status;
    };
    FakeGraphRef graph;
    ASSERT_TRUE(allreduce_once(rank, "warm").ok());
    const Status refused = captured("x", &graph);
    EXPECT_NE(refused.text().find("do one broadcast"), std::string::npos) << refused.text();
    TensorEntry broadcast = rank.entry(OpKind::kBroadcast, "b", DataType::kFloat32, {5}, place, place);
    ASSERT_TRUE(rank.run(std::move(broadcast)).ok());
    const Status status = captured("y", &graph);
    ASSERT_TRUE(status.ok()) << status.text();
    ASSERT_TRUE(rank.device.replay(graph, rank.stream).ok());
    EXPECT_EQ(rank.consume<float>(place, 5), std::vector<float>(5, 4.0f));
    EXPECT_TRUE(allreduce_once(rank, "after").ok());
    graph.reset();
  });
  job.shut_down();
}

// ---- what goes wrong

/// How the operation ends for the host; what it gives is of no interest where it may be aborted.
Status end_of_sum(DeviceRank& rank, const std::string& name) {
  float* const place = rank.produce(std::vector<float>(3000, 1.0f));
  return rank.run(rank.entry(OpKind::kAllreduce, name, DataType::kFloat32, {3000}, place, place));
}

/// Sums fail sooner or later, as `said`; calls on host memory still work.
void expect_failure(DeviceRank& rank, const std::string& said) {
  Status status;
  const auto end = std::chrono::steady_clock::now() + 30s;
  for (int i = 0; status.ok() && std::chrono::steady_clock::now() < end; ++i) {
    status = end_of_sum(rank, fmt::format("until it fails {}", i));
  }
  EXPECT_NE(status.text().find(said), std::string::npos) << "rank " << rank.rank() << ": " << status.text();
  expect_host_works(rank, "host");
}

using Kind = FakeNcclFault::Kind;

TEST(HierarchicalFaults, ACommunicatorThatCannotBeMadeOnOneHostFailsTheCallOnAll) {
  for (const Kind kind : {Kind::kInitRefused, Kind::kInitFails}) {
    DeviceJob job(4, settings_on({0, 0, 1, 1}));
    job.nccl().inject({.kind = kind, .group = 1, .rank = 1, .text = "no route to 10.0.0.7<4242>"});
    job.run([](DeviceRank& rank) { expect_failure(rank, "no route to 10.0.0.7"); });
    expect_all_communicators_end(job);
    job.shut_down();
  }
}

TEST(HierarchicalFaults, ACommunicatorThatIsNotMadeInTimeFailsTheCallOnAll) {
  TestRank::Settings settings = settings_on({0, 0, 1, 1});
  settings.options.start_timeout = 1s;
  DeviceJob job(4, settings);
  job.nccl().inject({.kind = Kind::kInitHangs, .group = 0, .rank = 1});
  job.run([](DeviceRank& rank) { expect_failure(rank, "did not make a communicator of 2 ranks"); });
  job.shut_down();
}

struct LocalFault {
  const char* name;
  FakeNcclFault fault;
  const char* said;
};
void PrintTo(const LocalFault& fault, std::ostream* out) { *out << fault.name; }

// A call of 3000 elements on hosts of two: the first is the scatter, the second the gather.
class LocalFaults : public ::testing::TestWithParam<LocalFault> {};

TEST_P(LocalFaults, EndTheSetsCallsOnAllHosts) {
  TestRank::Settings settings = settings_on({0, 0, 1, 1});
  settings.options.start_timeout = 1s;
  settings.options.stall_check_time = 1s;
  settings.options.stall_shutdown_time = 2s;
  DeviceJob job(4, settings);
  job.nccl().inject(GetParam().fault);
  job.run([](DeviceRank& rank) { expect_failure(rank, GetParam().said); });
  expect_all_communicators_end(job);
  job.shut_down();
}

INSTANTIATE_TEST_SUITE_P(
    Faults, LocalFaults,
    ::testing::Values(LocalFault{"ScatterHangsInNccl",
                                 {.kind = Kind::kLaunchHangs, .group = 1, .rank = 0, .call = 2},
                                 "still connecting after 1 s"},
                      LocalFault{"ScatterHangs",
                                 {.kind = Kind::kCollectiveHangs, .group = 1, .rank = 0, .call = 2},
                                 "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"},
                      LocalFault{"GatherHangs",
                                 {.kind = Kind::kCollectiveHangs, .group = 0, .rank = 1, .call = 3},
                                 "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"},
                      LocalFault{"ScatterFails",
                                 {.kind = Kind::kAsyncError, .group = 0, .rank = 1, .call = 2, .text = "it broke"},
                                 "it broke"},
                      LocalFault{"GatherFails",
                                 {.kind = Kind::kAsyncError, .group = 1, .rank = 1, .call = 3, .text = "it broke"},
                                 "it broke"}),
    [](const auto& one) { return std::string(one.param.name); });

// Strikes at what ranks send each other between hosts, once it is armed.
class CrossFault final : public FaultHook {
 public:
  FaultAction at(FaultPoint point, int /*peer*/) override {
    const bool strikes = point == FaultPoint::kSegmentSend && left_.load() > 0 && left_.fetch_sub(1) > 0;
    return strikes ? action_.load() : FaultAction::kPass;
  }
  void arm(FaultAction action, int times) {
    action_ = action;
    left_ = times;
  }

 private:
  std::atomic<int> left_{0};
  std::atomic<FaultAction> action_{FaultAction::kPass};
};

// Ranks that have their share when it strikes may end that call well, and learn of it with the next one.
TEST(HierarchicalFaults, WhatIsLostOrFailsBetweenHostsEndsTheSetsCallsOnAll) {
  for (const FaultAction action : {FaultAction::kDrop, FaultAction::kFail}) {
    CrossFault fault;
    TestRank::Settings settings = settings_on({0, 0, 1, 1});
    settings.options.stall_check_time = 1s;
    settings.options.stall_shutdown_time = 2s;
    settings.fault = &fault;
    DeviceJob job(4, settings);
    job.run([](DeviceRank& rank) { ASSERT_TRUE(allreduce_once(rank, "warm", 3000).ok()); });
    fault.arm(action, 1);
    job.run([&](DeviceRank& rank) {
      static_cast<void>(end_of_sum(rank, "struck"));
      const Status later = end_of_sum(rank, "later");
      const char* const said = action == FaultAction::kDrop ? "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS" : "fault";
      EXPECT_NE(later.text().find(said), std::string::npos) << later.text();
      expect_host_works(rank, "host");
    });
    expect_all_communicators_end(job);
    job.shut_down();
  }
}

// A call on two hosts of two that the device of rank 3 does not get to: its host waits within, the other one between
// hosts.
class StuckCall {
 public:
  StuckCall() : job(4, settings_on({0, 0, 1, 1})) {
    job.run([](DeviceRank& rank) { EXPECT_TRUE(allreduce_once(rank, "warm", 3000).ok()); });
    FakeWork work{.name = "long"};
    work.ready = [this] { return goes_on_.load(); };
    EXPECT_TRUE(job[3].device.launch(job[3].stream, std::move(work)).ok());
    const std::int64_t before = sent_bytes(job[0]);
    for (std::size_t i = 0; i < ends.size(); ++i) {
      DeviceRank& rank = job[static_cast<int>(i)];
      float* const place = rank.produce(std::vector<float>(3000, 1.0f));
      handles_.push_back(
          rank.hvd->enqueue(rank.entry(OpKind::kAllreduce, "x", DataType::kFloat32, {3000}, place, place)));
    }
    const auto limit = std::chrono::steady_clock::now() + 10s;
    while (sent_bytes(job[0]) == before && std::chrono::steady_clock::now() < limit) std::this_thread::sleep_for(1ms);
    std::this_thread::sleep_for(20ms);
  }

  /// Of the ranks before `count`; afterwards `ends` has what they gave.
  void wait_for_ranks(std::size_t count, const std::function<void()>& meanwhile) {
    std::vector<std::jthread> waiting;
    for (std::size_t i = 0; i < count; ++i) {
      waiting.emplace_back([this, &rank = job[static_cast<int>(i)], i] { ends[i] = rank.hvd->wait(handles_[i]); });
    }
    meanwhile();
  }
  void let_the_device_go_on() {
    goes_on_ = true;
    const std::scoped_lock lock(fake_mutex());
    fake_changed_locked();
  }

 private:
  std::atomic<bool> goes_on_{false};  // asked for by a device of the job

 public:
  DeviceJob job;
  std::array<Status, 4> ends;

 private:
  std::vector<Result<HandleRef>> handles_;  // with marks of the job's devices
};

TEST(HierarchicalFaults, ALostRankEndsWhatIsInFlightOnAllHosts) {
  StuckCall stuck;
  stuck.wait_for_ranks(3, [&] {
    const std::jthread releases([&] {  // what the lost rank's end waits for
      std::this_thread::sleep_for(200ms);
      stuck.let_the_device_go_on();
    });
    stuck.job.kill(3);
  });
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_NE(stuck.ends[i].text().find("rank 3"), std::string::npos) << i << ": " << stuck.ends[i].text();
  }
  expect_all_communicators_end(stuck.job);
  stuck.job.shut_down();
}

TEST(HierarchicalFaults, AnErrorThatNcclMeetsWhileARankWaitsForItEndsTheCallOnAllHosts) {
  StuckCall stuck;
  stuck.wait_for_ranks(4, [&] { stuck.job.nccl().inject({.kind = Kind::kAsyncError, .rank = 1, .text = "it broke"}); });
  for (const Status& end : stuck.ends) EXPECT_NE(end.text().find("it broke"), std::string::npos) << end.text();
  stuck.let_the_device_go_on();
  expect_all_communicators_end(stuck.job);
  stuck.job.shut_down();
}

class OneDeviceCallFails : public ::testing::TestWithParam<FakeCall> {};

TEST_P(OneDeviceCallFails, EverythingEndsAndTheHostsMemoryWorks) {
  for (std::size_t after = 0; after < 8; ++after) {
    DeviceJob job(4, settings_on({0, 0, 1, 1}));
    job.run([&](DeviceRank& rank) {
      if (rank.rank() == 1) rank.device.fail(GetParam(), Status::internal("planted"), after, 1);
      for (int i = 0; i < 4; ++i) {
        float* const place = rank.produce(std::vector<float>(1500, 1.0f));
        // Of one rank alone it is an error in the caller's hands, which the others have to wait for.
        Result<HandleRef> handle = Status::internal("not tried");
        for (int tries = 0; !handle && tries < 3; ++tries) {
          handle = rank.hvd->enqueue(
              rank.entry(OpKind::kAllreduce, fmt::format("x{}", i), DataType::kFloat32, {1500}, place, place));
        }
        ASSERT_TRUE(handle.ok()) << handle.status().text();
        static_cast<void>(rank.wait(handle));
      }
      rank.device.clear_faults();
      rank.consume<std::byte>(rank.produce(std::vector<std::byte>(1)), 1);  // the device is free
      expect_host_works(rank, "z");
    });
    job.shut_down();
  }
}

INSTANTIATE_TEST_SUITE_P(Calls, OneDeviceCallFails,
                         ::testing::Values(FakeCall::kRecord, FakeCall::kQuery, FakeCall::kAllocatePinned,
                                           FakeCall::kCopy, FakeCall::kWait),
                         [](const auto& one) { return fmt::format("{}", static_cast<int>(one.param)); });

TEST(HierarchicalFaults, AShutdownEndsHandlesThatWaitWithinAHost) {
  TestRank::Settings settings = settings_on({0, 0, 1, 1});
  settings.options.shutdown_timeout = 200ms;
  DeviceJob job(4, settings);
  job.run([](DeviceRank& rank) { ASSERT_TRUE(allreduce_once(rank, "warm", 3000).ok()); });
  job.nccl().inject({.kind = Kind::kCollectiveHangs, .rank = 0, .call = 2});
  std::latch all_asked(4);
  job.run([&](DeviceRank& rank) {
    std::vector<Result<HandleRef>> handles;
    for (int i = 0; i < 3; ++i) {  // some wait for their turn
      float* const place = rank.produce(std::vector<float>(20'000, 1.0f));
      handles.push_back(rank.hvd->enqueue(
          rank.entry(OpKind::kAllreduce, fmt::format("x{}", i), DataType::kFloat32, {20'000}, place, place)));
    }
    const auto under_way = [&] { return rank.hvd->runtime().statistics().executor.collective_calls.value() > 1; };
    const auto end = std::chrono::steady_clock::now() + 1s;
    while (!under_way() && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(1ms);
    all_asked.arrive_and_wait();
    rank.hvd->shut_down();
    for (const Result<HandleRef>& handle : handles) {
      ASSERT_TRUE(handle.ok());
      EXPECT_TRUE(handle.value()->done()) << "rank " << rank.rank();
    }
    rank.leaves_work = true;
  });
}

}  // namespace
}  // namespace hvd::testing
