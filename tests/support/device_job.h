// A job whose ranks are threads of this process, each with a device and an NCCL of host memory: the fakes find work
// that is not ordered, memory that is used after its end, and calls that wait for a device.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/fake_device.h"
#include "tests/support/fake_nccl.h"
#include "tests/support/random_seed.h"
#include "tests/support/rank_threads.h"

namespace hvd::testing {

class FakeSource final : public DeviceSource {
 public:
  explicit FakeSource(FakeDevice& device) : device_(device), api_(FakeNccl::api_with_memory()) {}
  Result<DeviceRuntime*> runtime() override { return &device_; }
  Result<const nccl::Api*> nccl() override {
    if (!missing.empty()) return Status::unavailable(missing);
    return &api_;
  }
  std::string missing;

 private:
  FakeDevice& device_;
  nccl::Api api_;
};

// What a framework has: tensors in device memory, made by kernels on a stream.
class DeviceRank {
 public:
  DeviceRank(InprocNetwork& network, int rank, TestRank::Settings settings, std::uint64_t seed, int devices)
      : device(FakeDevice::Settings{seed + static_cast<std::uint64_t>(rank), devices}), source(device) {
    settings.devices = &source;
    hvd = std::make_unique<TestRank>(network, rank, std::move(settings));
    stream = device.create_stream(0).value();
    device.start();
  }
  ~DeviceRank() {
    hvd.reset();
    device.stop();
    device.release();
    device.run_until_idle();
    device.synchronise();
    tensors.clear();
    device.destroy_stream(0, stream);
    if (leaves_work) return;
    const FakeDevice::Counts counts = device.counts();
    EXPECT_EQ(counts.events, 0u);
    EXPECT_EQ(counts.streams, 0u);
    EXPECT_EQ(counts.bytes, 0u);
    EXPECT_EQ(counts.pinned_bytes, 0u);
  }
  DeviceRank(const DeviceRank&) = delete;
  DeviceRank& operator=(const DeviceRank&) = delete;

  int rank() const { return hvd->rank(); }

  // Memory that the device knows until this object ends.
  struct Tensor {
    Tensor(FakeDevice& of, std::size_t size) : device(of), bytes(std::max<std::size_t>(size, 1)) {
      device.adopt(bytes.data(), bytes.size());
    }
    ~Tensor() { device.forget(bytes.data()); }
    Tensor(const Tensor&) = delete;
    Tensor& operator=(const Tensor&) = delete;
    FakeDevice& device;
    std::vector<std::byte> bytes;
  };
  std::byte* make(std::size_t bytes) {
    tensors.push_back(std::make_unique<Tensor>(device, bytes));
    return tensors.back()->bytes.data();
  }
  /// A kernel writes `values` to device memory, later.
  template <typename T>
  T* produce(std::vector<T> values) {
    const std::size_t bytes = values.size() * sizeof(T);
    std::byte* const place = make(bytes);
    write(place, std::move(values));
    return reinterpret_cast<T*>(place);
  }
  template <typename T>
  void write(std::byte* place, std::vector<T> values) {
    const std::size_t bytes = values.size() * sizeof(T);
    FakeWork work{.name = "producer", .writes = {{place, bytes}}};
    work.run = [place, bytes, values = std::move(values)] {
      if (bytes > 0) std::memcpy(place, values.data(), bytes);
    };
    const Status launched = device.launch(stream, std::move(work));
    EXPECT_TRUE(launched.ok()) << launched.text();
  }
  /// What a kernel on the stream reads there.
  template <typename T>
  std::vector<T> consume(const void* place, std::size_t count) {
    return consume<T>(place, count, stream);
  }
  template <typename T>
  std::vector<T> consume(const void* place, std::size_t count, DeviceStream on) {
    const auto values = std::make_shared<std::vector<T>>(count);
    const auto seen = std::make_shared<std::atomic<bool>>(false);
    FakeWork work{.name = "consumer", .reads = {{static_cast<const std::byte*>(place), count * sizeof(T)}}};
    work.run = [values, place] {
      if (!values->empty()) std::memcpy(values->data(), place, values->size() * sizeof(T));
    };
    work.finish = [seen] { seen->store(true); };
    const Status launched = device.launch(on, std::move(work));
    EXPECT_TRUE(launched.ok()) << launched.text();
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (!seen->load() && std::chrono::steady_clock::now() < end)
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    EXPECT_TRUE(seen->load()) << "the device did not get there within 60 s";
    return seen->load() ? *values : std::vector<T>();
  }

  TensorEntry entry(OpKind op, const std::string& name, DataType dtype, Shape shape, const void* input, void* output) {
    TensorEntry made = make_entry(op, name, dtype, std::move(shape), input, output);
    made.request.memory = MemoryKind::kDevice;
    made.device = 0;
    made.producer = stream;
    return made;
  }
  /// Waits for the host's end, and lets the stream wait for the device's.
  Status wait(const Result<HandleRef>& handle) {
    HVD_RETURN_IF_ERROR(hvd->wait(handle));
    if (handle.value()->output().launched == nullptr) return Status::internal("nothing to let a stream wait for");
    for (const OutputTensor& output : handle.value()->output().tensors) {
      output.block->add_consumer(stream);
    }
    return hvd->runtime().let_stream_wait(handle.value()->output().launched, stream);
  }
  Status run(TensorEntry made) {
    made.caller_waits = ++runs_ % 2 == 0;  // on the caller's stream, and on the engine's
    return wait(hvd->enqueue(std::move(made)));
  }

  FakeDevice device;
  FakeSource source;
  std::unique_ptr<TestRank> hvd;
  DeviceStream stream = nullptr;
  bool leaves_work = false;  ///< it ends while the device is at work, and leaves to the process what that needs
  std::vector<std::unique_ptr<Tensor>> tensors;

 private:
  int runs_ = 0;
};

class DeviceJob {
 public:
  explicit DeviceJob(int size, const TestRank::Settings& settings = {}, FakeNccl::Settings nccl = {}, int devices = 1)
      : nccl_(as_in_life(nccl)), network_(size) {
    const std::uint64_t seed = seed_of_this_run();
    for (int rank = 0; rank < size; ++rank) {
      ranks_.push_back(std::make_unique<DeviceRank>(network_, rank, settings, seed, devices));
    }
  }
  ~DeviceJob() {
    ranks_.clear();
    EXPECT_EQ(nccl_.alive_communicators(), 0u);
    EXPECT_EQ(nccl_.alive_registrations(), 0u);
    // What a rank had in line when it was killed may never end: its memory is left to the process then.
    if (!killed_) {
      EXPECT_EQ(nccl_.alive_memory(), 0u);
    }
  }
  DeviceJob(const DeviceJob&) = delete;
  DeviceJob& operator=(const DeviceJob&) = delete;

  int size() const { return network_.size(); }
  FakeNccl& nccl() { return nccl_; }
  DeviceRank& operator[](int rank) { return *ranks_[static_cast<std::size_t>(rank)]; }
  void kill(int rank) {
    killed_ = true;
    (*this)[rank].leaves_work = true;
    ranks_[static_cast<std::size_t>(rank)].reset();
  }
  /// Runs `body` on a thread of each rank that is there.
  void run(const std::function<void(DeviceRank&)>& body) {
    std::vector<std::jthread> threads;
    for (auto& rank : ranks_) {
      if (rank) threads.emplace_back([&body, &rank = *rank] { body(rank); });
    }
  }
  void shut_down() {
    run([](DeviceRank& rank) { rank.hvd->shut_down(); });
  }

 private:
  static FakeNccl::Settings as_in_life(FakeNccl::Settings settings) {
    settings.abort_waits = true;  // each device has a thread
    return settings;
  }

  FakeNccl nccl_;
  InprocNetwork network_;
  bool killed_ = false;
  std::vector<std::unique_ptr<DeviceRank>> ranks_;
};

/// Small whole numbers: every order of summation gives the same bits in each type.
std::vector<std::byte> elements(DataType dtype, std::size_t count, int rank);

/// What an operation gives on host memory, in the same job; its result has `bytes`.
std::vector<std::byte> on_host(DeviceRank& rank, TensorEntry entry, std::size_t bytes);

/// A sum of ones, with its result looked at.
Status allreduce_once(DeviceRank& rank, const std::string& name, std::size_t count = 7);
/// NCCL takes int16 as int32, so even one tensor goes through memory of the engine, on all ranks. Each gives its rank +
/// 1; of a set: `members` ranks from 0 on.
Status allreduce_int16(DeviceRank& rank, const std::string& name, std::size_t count = 5, ProcessSetId set = 0,
                       int members = 0);
void expect_host_works(DeviceRank& rank, const std::string& name);
void expect_all_communicators_end(DeviceJob& job);

}  // namespace hvd::testing
