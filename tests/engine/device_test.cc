// Device memory through the engine from end to end, each rank a thread of this process with a device and an NCCL of
// host memory: what comes out is what comes out on host memory. The fakes find work that is not ordered, memory that is
// used after its end, and calls that wait for a device.
#include "tests/support/device_job.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

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

}  // namespace
}  // namespace hvd::testing
