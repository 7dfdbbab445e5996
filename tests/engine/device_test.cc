// Device memory through the engine from end to end, each rank a thread of this process with a device and an NCCL of
// host memory. The fakes find work that is not ordered, memory that is used after its end, and calls that wait for a
// device.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <latch>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <utility>

#include "tests/support/device_job.h"
#include "tests/support/manual_clock.h"

namespace hvd::testing {
namespace {

using namespace std::chrono_literals;

class OnDevices : public ::testing::TestWithParam<const char*> {
 protected:
  TestRank::Settings settings() const {
    TestRank::Settings made;
    const std::string_view parameter = GetParam();
    made.options.gpu_operations = parameter == "host" ? "host" : "nccl";
    made.options.nccl_registered_bytes = parameter == "nccl_unregistered" ? 0 : std::size_t{32} << 20;
    return made;
  }
};

TEST_P(OnDevices, EveryReductionOfEveryTypeIsThatOfTheHost) {
  for (const int size : {1, 2, 3, 5, 8}) {
    DeviceJob job(size, settings());
    job.run([](DeviceRank& rank) {
      for (const DataTypeInfo& type : kDataTypes) {
        for (const ReduceOp op :
             {ReduceOp::kSum, ReduceOp::kAverage, ReduceOp::kMin, ReduceOp::kMax, ReduceOp::kProduct}) {
          for (const std::size_t count : {std::size_t{0}, std::size_t{1}, std::size_t{257}}) {
            const std::string name = fmt::format("{} {} {}", type.name, name_of(op), count);
            const std::vector<std::byte> input = elements(type.type, count, rank.rank());
            TensorEntry like = make_entry(OpKind::kAllreduce, name + " host", type.type,
                                          {static_cast<std::int64_t>(count)}, input.data(), nullptr);
            like.request.reduce_op = op;
            like.request.prescale = 2.0;
            like.request.postscale = 0.5;
            TensorEntry entry = rank.entry(OpKind::kAllreduce, name, type.type, like.request.shape, rank.produce(input),
                                           rank.make(input.size()));
            std::byte* const output = entry.output;
            entry.request.reduce_op = op;
            entry.request.prescale = 2.0;
            entry.request.postscale = 0.5;
            const Status status = rank.run(std::move(entry));
            ASSERT_TRUE(status.ok()) << name << ": " << status.text();
            EXPECT_EQ(rank.consume<std::byte>(output, input.size()), on_host(rank, std::move(like), input.size()))
                << name << " on " << rank.hvd->size() << " ranks";
          }
        }
      }
    });
    job.shut_down();
    for (int rank = 0; rank < size; ++rank) EXPECT_EQ(job[rank].device.counts().synchronising_calls, 0u);
  }
}

TEST_P(OnDevices, ALargeInt16IsScaledAsOnTheHost) {
  DeviceJob job(2, settings());
  job.run([](DeviceRank& rank) {
    const std::vector<std::int16_t> input{20'000, -20'000, 3};
    for (const ReduceOp op : {ReduceOp::kMax, ReduceOp::kSum, ReduceOp::kAverage}) {
      const std::string name(name_of(op));
      TensorEntry host = make_entry(OpKind::kAllreduce, name + " host", DataType::kInt16, {3}, input.data(), nullptr);
      std::byte* const output = rank.make(6);
      TensorEntry entry = rank.entry(OpKind::kAllreduce, name, DataType::kInt16, {3}, rank.produce(input), output);
      host.request.reduce_op = entry.request.reduce_op = op;
      host.request.prescale = entry.request.prescale = 2.0;
      const Status status = rank.run(std::move(entry));
      ASSERT_TRUE(status.ok()) << status.text();
      EXPECT_EQ(rank.consume<std::byte>(output, 6), on_host(rank, std::move(host), 6)) << name;
    }
  });
  job.shut_down();
}

TEST_P(OnDevices, ManyTensorsInFlightAreFusedAndKeepTheirValues) {
  DeviceJob job(3, settings());
  job.run([](DeviceRank& rank) {
    constexpr std::size_t tensors = 60;
    for (int round = 0; round < 3; ++round) {
      std::vector<std::byte*> places;
      std::vector<Result<HandleRef>> handles;
      for (std::size_t t = 0; t < tensors; ++t) {
        const std::vector<float> values(t * t % 700 + 1, static_cast<float>(t) + static_cast<float>(rank.rank()));
        places.push_back(reinterpret_cast<std::byte*>(rank.produce(values)));
        TensorEntry entry =
            rank.entry(OpKind::kAllreduce, fmt::format("t{}", t), t % 2 == 0 ? DataType::kFloat32 : DataType::kInt32,
                       {static_cast<std::int64_t>(values.size())}, places[t], places[t]);
        if (t % 2 != 0) {
          rank.write(places[t], std::vector<std::int32_t>(values.size(), static_cast<std::int32_t>(t)));
          entry.producer = rank.stream;
        }
        handles.push_back(rank.hvd->enqueue(std::move(entry)));
      }
      for (std::size_t t = 0; t < tensors; ++t) {
        const Status status = rank.wait(handles[t]);
        ASSERT_TRUE(status.ok()) << status.text();
        if (t % 2 == 0) {
          EXPECT_EQ(rank.consume<float>(places[t], 1).front(), 3.0f * static_cast<float>(t) + 3.0f);
        } else {
          EXPECT_EQ(rank.consume<std::int32_t>(places[t], 1).front(), 3 * static_cast<std::int32_t>(t));
        }
      }
    }
  });
  job.shut_down();
}

TEST_P(OnDevices, GathersBroadcastsScattersAndExchangesAsTheHostDoes) {
  for (const int size : {1, 2, 3, 4}) {
    DeviceJob job(size, settings());
    job.run([size](DeviceRank& rank) {
      const auto compare = [&](const std::string& name, TensorEntry host, TensorEntry device, std::size_t bytes) {
        std::byte* const given = device.output;
        const Result<HandleRef> handle = rank.hvd->enqueue(std::move(device));
        const Status status = rank.wait(handle);
        ASSERT_TRUE(status.ok()) << name << ": " << status.text();
        const auto& made = handle.value()->output().tensors;
        const std::byte* const place = made.empty() ? given : made.front().memory.get();
        const std::size_t count = made.empty() ? bytes : made.front().bytes;
        EXPECT_EQ(rank.consume<std::byte>(place, count), on_host(rank, std::move(host), bytes))
            << name << " on " << size << " ranks";
      };
      for (const DataType dtype : {DataType::kFloat32, DataType::kInt16, DataType::kBfloat16}) {
        for (const bool even : {true, false}) {
          const std::int64_t rows = even ? 2 : rank.rank();
          const std::vector<std::byte> input = elements(dtype, static_cast<std::size_t>(rows * 3), rank.rank());
          const Shape shape{rows, 3};
          const std::string name = fmt::format("{} {}", name_of(dtype), even);
          compare("allgather", make_entry(OpKind::kAllgather, "gh" + name, dtype, shape, input.data(), nullptr),
                  rank.entry(OpKind::kAllgather, "g" + name, dtype, shape, rank.produce(input), nullptr), 0);

          const std::int64_t all_rows = even ? 2 * size : 2 * size + 1;
          const std::vector<std::byte> whole = elements(dtype, static_cast<std::size_t>(all_rows * 3), rank.rank());
          const Shape whole_shape{all_rows, 3};
          TensorEntry host = make_entry(OpKind::kBroadcast, "bh" + name, dtype, whole_shape, whole.data(), nullptr);
          std::byte* const place = rank.make(whole.size());
          TensorEntry device =
              rank.entry(OpKind::kBroadcast, "b" + name, dtype, whole_shape, rank.produce(whole), place);
          host.request.root_rank = device.request.root_rank = size - 1;
          compare("broadcast", std::move(host), std::move(device), whole.size());

          host = make_entry(OpKind::kReducescatter, "rh" + name, dtype, whole_shape, whole.data(), nullptr);
          device = rank.entry(OpKind::kReducescatter, "r" + name, dtype, whole_shape, rank.produce(whole), nullptr);
          host.request.reduce_op = device.request.reduce_op = ReduceOp::kAverage;
          host.request.prescale = device.request.prescale = 3.0;
          compare("reducescatter", std::move(host), std::move(device), 0);

          host = make_entry(OpKind::kAlltoall, "ah" + name, dtype, whole_shape, whole.data(), nullptr);
          device = rank.entry(OpKind::kAlltoall, "a" + name, dtype, whole_shape, rank.produce(whole), nullptr);
          if (!even) {
            for (int to = 0; to < size; ++to) host.request.splits.push_back((rank.rank() + to) % 3 == 0 ? 0 : 1);
            host.request.has_splits = device.request.has_splits = true;
            device.request.splits = host.request.splits;
          }
          compare("alltoall", std::move(host), std::move(device), 0);
        }
      }
    });
    job.shut_down();
  }
}

TEST_P(OnDevices, ARankThatHasJoinedStandsInWithElementsThatChangeNothing) {
  DeviceJob job(3, settings());
  job.run([](DeviceRank& rank) {
    const std::vector<std::byte> input = elements(DataType::kInt16, 9, 0);
    if (rank.rank() != 2) {  // of a size that does not fill 16 bytes, which NCCL takes as it lies
      float* const place = rank.produce(std::vector<float>(9, 1.0f));
      const Status status = rank.run(rank.entry(OpKind::kAllreduce, "odd", DataType::kFloat32, {9}, place, place));
      ASSERT_TRUE(status.ok()) << status.text();
      EXPECT_EQ(rank.consume<float>(place, 9), std::vector<float>(9, 2.0f));
    }
    for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMin, ReduceOp::kMax, ReduceOp::kProduct}) {
      if (rank.rank() == 2) break;  // has no data
      TensorEntry entry = rank.entry(OpKind::kAllreduce, std::string(name_of(op)), DataType::kInt16, {9},
                                     rank.produce(input), rank.make(input.size()));
      std::byte* const output = entry.output;
      entry.request.reduce_op = op;
      const Status status = rank.run(std::move(entry));
      ASSERT_TRUE(status.ok()) << status.text();
      const std::int16_t expected = op == ReduceOp::kSum ? 2 : 1;
      EXPECT_EQ(rank.consume<std::int16_t>(output, 9).front(), expected) << name_of(op);
    }
    TensorEntry join = make_entry(OpKind::kJoin, std::string(kJoinName), DataType::kUint8, {}, nullptr, nullptr);
    const Status status = rank.hvd->wait(rank.hvd->enqueue(std::move(join)));
    EXPECT_TRUE(status.ok()) << status.text();
  });
  job.shut_down();
}

TEST_P(OnDevices, MemoryIsKeptUntilTheDeviceIsDoneWithIt) {
  DeviceJob job(2, settings());
  job.run([](DeviceRank& rank) {
    auto owner = std::make_shared<int>(1);
    const std::weak_ptr<int> watch = owner;
    const std::vector<float> values(5, 1.0f);
    float* const place = rank.produce(values);
    TensorEntry entry = rank.entry(OpKind::kAllreduce, "x", DataType::kFloat32, {5}, place, place);
    entry.keep_alive = std::move(owner);
    // Through the host nothing is done before the device is.
    const bool hangs = std::string_view(GetParam()) != "host";
    if (hangs) rank.device.hang();
    const Status status = rank.run(std::move(entry));
    ASSERT_TRUE(status.ok()) << status.text();
    if (hangs) {
      std::this_thread::sleep_for(20ms);  // some looks of the engine at the device
      EXPECT_FALSE(watch.expired()) << "the device has not begun, and nobody holds it";
      rank.device.release();
    }
    EXPECT_EQ(rank.consume<float>(place, 5), std::vector<float>(5, 2.0f));
    const auto end = std::chrono::steady_clock::now() + 60s;
    while (!watch.expired() && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(1ms);
    EXPECT_TRUE(watch.expired()) << "it is done, and still held";
  });
  job.shut_down();
}

// A rank has parts of its model on each of its devices; which one has what differs between ranks.
TEST_P(OnDevices, ARankMayHaveTensorsOnSeveralDevices) {
  DeviceJob job(3, settings(), {}, /*devices=*/2);
  job.run([](DeviceRank& rank) {
    const DeviceStream other = rank.device.create_stream(1).value();
    const auto tensor = [&](int round, int i) {
      const int device = (i + (rank.rank() == 1 && round > 0 ? 1 : 0)) % 2;
      auto* const place = reinterpret_cast<float*>(rank.make(20));
      const Status made = rank.device.launch(
          device == 0 ? rank.stream : other,
          {.name = "producer", .writes = {{place, 20}}, .run = [=] { std::fill_n(place, 5, static_cast<float>(i)); }});
      EXPECT_TRUE(made.ok()) << made.text();
      TensorEntry entry = rank.entry(OpKind::kAllreduce, fmt::format("x{}", i), DataType::kFloat32, {5}, place, place);
      entry.device = device;
      entry.producer = device == 0 ? rank.stream : other;
      return entry;
    };
    for (int round = 0; round < 3; ++round) {
      std::vector<TensorEntry> entries;
      std::vector<Result<HandleRef>> handles;
      std::vector<std::byte*> places;
      for (int i = 0; i < 20; ++i) entries.push_back(tensor(round, i));
      std::vector<DeviceStream> streams;
      for (TensorEntry& entry : entries) {
        streams.push_back(entry.producer);
        places.push_back(entry.output);
        handles.push_back(rank.hvd->enqueue(std::move(entry)));
      }
      for (std::size_t i = 0; i < handles.size(); ++i) {
        const Status status = rank.hvd->wait(handles[i]);
        ASSERT_TRUE(status.ok()) << status.text();
        const DeviceMarkRef& mark = handles[i].value()->output().launched;
        ASSERT_TRUE(rank.hvd->runtime().let_stream_wait(mark, streams[i]).ok());
        EXPECT_EQ(rank.consume<float>(places[i], 5, streams[i]), std::vector<float>(5, 3.0f * static_cast<float>(i)));
      }
    }
    if (rank.rank() != 2) {  // the other has no more data; what stands in lies where its tensors were
      TensorEntry entry = tensor(2, 3);
      std::byte* const place = entry.output;
      const DeviceStream stream = entry.producer;
      const Result<HandleRef> handle = rank.hvd->enqueue(std::move(entry));
      ASSERT_TRUE(rank.hvd->wait(handle).ok());
      ASSERT_TRUE(rank.hvd->runtime().let_stream_wait(handle.value()->output().launched, stream).ok());
      EXPECT_EQ(rank.consume<float>(place, 5, stream), std::vector<float>(5, 6.0f));
    }
    TensorEntry join = make_entry(OpKind::kJoin, std::string(kJoinName), DataType::kUint8, {}, nullptr, nullptr);
    EXPECT_TRUE(rank.hvd->wait(rank.hvd->enqueue(std::move(join))).ok());
    rank.device.destroy_stream(1, other);
  });
  // Of devices 0 and of devices 1 on all ranks; and once rank 1 has changed them, of two mixtures.
  const bool staged = std::string_view(GetParam()) == "host";
  EXPECT_EQ(job.nccl().alive_communicators(), staged ? 0u : 4u * 3u);
  EXPECT_EQ(job.nccl().concurrent_calls(), 0u);
  job.shut_down();
}

INSTANTIATE_TEST_SUITE_P(Backends, OnDevices, ::testing::Values("nccl", "nccl_unregistered", "host"),
                         [](const auto& one) { return std::string(one.param); });

// ---- what goes wrong

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

// ---- registered memory

// NCCL takes int16 as int32, so even one tensor goes through memory of the engine, on all ranks.
Status allreduce_int16(DeviceRank& rank, const std::string& name, std::size_t count = 5, ProcessSetId set = 0,
                       int members = 0) {
  const auto own = static_cast<std::int16_t>(rank.rank() + 1);
  std::int16_t* const place = rank.produce(std::vector<std::int16_t>(count, own));
  TensorEntry entry =
      rank.entry(OpKind::kAllreduce, name, DataType::kInt16, {static_cast<std::int64_t>(count)}, place, place);
  entry.request.key.process_set = set;
  const Status status = rank.run(std::move(entry));
  if (!status.ok()) return status;
  if (members == 0) members = rank.hvd->size();
  const auto total = static_cast<std::int16_t>(members * (members + 1) / 2);
  EXPECT_EQ(rank.consume<std::int16_t>(place, count), std::vector<std::int16_t>(count, total)) << name;
  return status;
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

// ---- graphs

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
