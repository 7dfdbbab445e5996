// The fake NCCL itself: results, calls in progress, and what it finds wrong.
#include "tests/support/fake_nccl.h"

#include <array>
#include <chrono>
#include <functional>
#include <numeric>

#include <gtest/gtest.h>

#include "tests/support/fake_device.h"

namespace hvd::testing {
namespace {

using Kind = FakeNcclFault::Kind;
using Texts = std::vector<std::string>;

/// A rank with a device and a communicator.
struct Rank {
  FakeDevice device;
  DeviceStream stream = device.create_stream(0).value();
  nccl::Comm comm = nullptr;
  std::array<float, 16> input{};
  std::array<float, 64> output{};

  Rank() {
    device.adopt(input.data(), sizeof(input));
    device.adopt(output.data(), sizeof(output));
    output.fill(-1);
  }
};

/// Ranks that one thread drives.
struct Ranks {
  explicit Ranks(std::size_t size, FakeNccl::Settings settings = {}) : nccl(settings), api(FakeNccl::api()) {
    for (std::size_t rank = 0; rank < size; ++rank) {
      ranks.push_back(std::make_unique<Rank>());
      devices.push_back(&ranks.back()->device);
      std::iota(ranks[rank]->input.begin(), ranks[rank]->input.end(), static_cast<float>(100 * rank));
    }
  }

  Rank& operator[](std::size_t rank) { return *ranks[rank]; }

  void init() {
    nccl::UniqueId id;
    EXPECT_EQ(api.get_unique_id(&id), nccl::kSuccess);
    nccl::Config config;
    config.blocking = 0;
    for (int rank = 0; rank < static_cast<int>(ranks.size()); ++rank) {
      nccl::Comm* comm = &ranks[static_cast<std::size_t>(rank)]->comm;
      EXPECT_EQ(api.comm_init_rank_config(comm, static_cast<int>(ranks.size()), id, rank, &config), nccl::kInProgress);
    }
    for (auto& rank : ranks) EXPECT_EQ(settle(rank->comm), nccl::kSuccess);
  }
  /// Polls until the communicator is no more in progress; kInProgress where it stays so.
  nccl::Result settle(nccl::Comm comm) {
    nccl::Result error = nccl::kInProgress;
    for (int i = 0; i < 100 && error == nccl::kInProgress; ++i) {
      EXPECT_EQ(api.comm_get_async_error(comm, &error), nccl::kSuccess);
    }
    return error;
  }
  void all_reduce(std::size_t rank, std::size_t count = 16, nccl::ElementType type = nccl::kFloat32) {
    Rank& r = *ranks[rank];
    api.all_reduce(r.input.data(), r.output.data(), count, type, nccl::kSum, r.comm, r.stream);
    settle(r.comm);
  }
  void destroy() {
    for (auto& rank : ranks) {
      EXPECT_EQ(api.comm_finalize(rank->comm), nccl::kInProgress);
      EXPECT_EQ(settle(rank->comm), nccl::kSuccess);
      EXPECT_EQ(api.comm_destroy(rank->comm), nccl::kSuccess);
    }
    EXPECT_EQ(nccl.alive_communicators(), 0U);
  }
  std::string only_violation() {
    const Texts texts = nccl.take_violations();
    EXPECT_EQ(texts.size(), 1U) << ::testing::PrintToString(texts);
    return texts.empty() ? "" : texts[0];
  }
  void expect_violation(const std::string& part) {
    const std::string text = only_violation();
    EXPECT_NE(text.find(part), std::string::npos) << text;
  }

  FakeNccl nccl;
  nccl::Api api;
  std::vector<std::unique_ptr<Rank>> ranks;
  std::vector<FakeDevice*> devices;
};

/// Each rank on a thread of its own, with a device that goes on by itself.
void check_on_threads(std::size_t size) {
  Ranks ranks(size, {.seed = size, .every_launch_in_progress = true});
  nccl::UniqueId id;
  EXPECT_EQ(ranks.api.get_unique_id(&id), nccl::kSuccess);
  std::vector<std::jthread> threads;
  for (std::size_t i = 0; i < size; ++i) {
    threads.emplace_back([&ranks, id, i, size] {
      Rank& rank = ranks[i];
      const nccl::Api& api = ranks.api;
      const auto n = static_cast<float>(size);
      const DeviceEvent event = rank.device.create_event(0).value();
      nccl::Config config;
      config.blocking = 0;
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
      const auto wait_until = [&](const std::function<bool()>& done) {
        while (!done() && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
      };
      const auto settled = [&] {
        nccl::Result error = nccl::kSuccess;
        EXPECT_EQ(api.comm_get_async_error(rank.comm, &error), nccl::kSuccess);
        return error != nccl::kInProgress;
      };
      const auto run = [&](nccl::Result result) {
        if (result == nccl::kInProgress) wait_until(settled);
        EXPECT_TRUE(rank.device.record(0, event, rank.stream).ok());
        wait_until([&] { return rank.device.query(0, event).value(); });
      };
      rank.device.start();
      EXPECT_TRUE(rank.device.exchange_current(0).ok());
      api.comm_init_rank_config(&rank.comm, static_cast<int>(size), id, static_cast<int>(i), &config);
      wait_until(settled);
      float* in = rank.input.data();
      float* out = rank.output.data();
      const float ranks_sum = 100 * n * (n - 1) / 2;
      run(api.all_reduce(in, out, 16, nccl::kFloat32, nccl::kSum, rank.comm, rank.stream));
      EXPECT_EQ(out[5], ranks_sum + 5 * n);
      run(api.all_reduce(in, out, 16, nccl::kFloat32, nccl::kMax, rank.comm, rank.stream));
      EXPECT_EQ(out[5], 100 * (n - 1) + 5);
      run(api.all_gather(in, out, 8, nccl::kFloat32, rank.comm, rank.stream));
      for (std::size_t from = 0; from < size; ++from) EXPECT_EQ(out[8 * from + 3], 100 * static_cast<float>(from) + 3);
      run(api.reduce_scatter(in, out, 2, nccl::kFloat32, nccl::kSum, rank.comm, rank.stream));
      EXPECT_EQ(out[1], ranks_sum + static_cast<float>(2 * i + 1) * n);
      const int root = static_cast<int>(size) - 1;
      run(api.broadcast(in, out, 16, nccl::kFloat32, root, rank.comm, rank.stream));
      EXPECT_EQ(out[7], 100 * static_cast<float>(root) + 7);
      out[7] = -1;
      run(api.reduce(in, out, 16, nccl::kFloat32, nccl::kSum, root, rank.comm, rank.stream));
      EXPECT_EQ(out[7], static_cast<int>(i) == root ? ranks_sum + 7 * n : -1);
      // All to all: element `to` of each rank, to itself as well.
      EXPECT_EQ(api.group_start(), nccl::kSuccess);
      for (std::size_t peer = 0; peer < size; ++peer) {
        const int to = static_cast<int>(peer);
        EXPECT_EQ(api.receive(out + peer, 1, nccl::kFloat32, to, rank.comm, rank.stream), nccl::kSuccess);
        EXPECT_EQ(api.send(in + peer, 1, nccl::kFloat32, to, rank.comm, rank.stream), nccl::kSuccess);
      }
      run(api.group_end());
      for (std::size_t from = 0; from < size; ++from) EXPECT_EQ(out[from], static_cast<float>(100 * from + i));
      EXPECT_EQ(api.comm_finalize(rank.comm), nccl::kInProgress);
      wait_until(settled);
      EXPECT_EQ(api.comm_destroy(rank.comm), nccl::kSuccess);
      EXPECT_TRUE(rank.device.exchange_current(-1).ok());
    });
  }
  threads.clear();
  for (FakeDevice* device : ranks.devices) device->stop();
  EXPECT_EQ(ranks.nccl.alive_communicators(), 0U);
}

TEST(FakeNccl, EveryCollectiveOnOneToEightRanks) {
  for (std::size_t size = 1; size <= 8; ++size) check_on_threads(size);
}

TEST(FakeNccl, WaitsForAllRanksAndTheirStreams) {
  Ranks ranks(2);
  ranks.init();
  ranks.all_reduce(0);
  EXPECT_EQ(ranks[0].device.run_until_idle(), 0U) << "rank 1 has not called";
  ASSERT_TRUE(ranks[1].device.launch(ranks[1].stream, {.name = "before"}).ok());
  ranks.all_reduce(1);
  EXPECT_EQ(ranks[0].device.run_until_idle(), 0U) << "rank 1 has other work first";
  run_until_idle(ranks.devices);
  EXPECT_EQ(ranks[0].output[1], 102);
  EXPECT_EQ(ranks[0].output, ranks[1].output);
  ranks.destroy();
}

TEST(FakeNccl, SayInProgressUntilAllRanksCalledInit) {
  Ranks ranks(1, {.max_init_polls = 0});
  nccl::UniqueId id;
  ASSERT_EQ(ranks.api.get_unique_id(&id), nccl::kSuccess);
  nccl::Config config;
  config.blocking = 0;
  std::array<nccl::Comm, 2> comms{};
  ASSERT_EQ(ranks.api.comm_init_rank_config(comms.data(), 2, id, 0, &config), nccl::kInProgress);
  EXPECT_EQ(ranks.settle(comms[0]), nccl::kInProgress);
  ASSERT_EQ(ranks.api.comm_init_rank_config(&comms[1], 2, id, 1, &config), nccl::kInProgress);
  EXPECT_EQ(ranks.settle(comms[0]), nccl::kSuccess);
  for (nccl::Comm comm : comms) EXPECT_EQ(ranks.api.comm_abort(comm), nccl::kSuccess);
}

TEST(FakeNccl, ALaunchInProgressIsNotOnItsStream) {
  bool seen = false;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Ranks ranks(1, {.seed = seed});
    ranks.init();
    Rank& rank = ranks[0];
    const auto call = [&] {
      return ranks.api.all_reduce(rank.input.data(), rank.output.data(), 16, nccl::kFloat32, nccl::kSum, rank.comm,
                                  rank.stream);
    };
    if (call() == nccl::kInProgress) {
      seen = true;
      EXPECT_EQ(rank.device.counts().pending, 0U);
      EXPECT_EQ(call(), nccl::kInvalidUsage);
      ranks.expect_violation("not ready");
      EXPECT_EQ(ranks.settle(rank.comm), nccl::kSuccess);
    }
    EXPECT_EQ(call(), nccl::kSuccess) << "the first launch alone takes its time";
    EXPECT_EQ(rank.device.counts().pending, 2U);
    rank.device.run_until_idle();
    ranks.destroy();
  }
  EXPECT_TRUE(seen);
}

TEST(FakeNccl, FindsRanksThatDisagree) {
  Ranks ranks(2);
  ranks.init();
  ranks.all_reduce(0);
  ranks.all_reduce(1);
  ranks.all_reduce(0, 16);
  ranks.all_reduce(1, 8);
  ranks.expect_violation(
      "ranks disagree in NCCL call 1 of communicator 0: rank 0 has all_reduce of 16 float32 (sum), "
      "rank 1 has all_reduce of 8 float32 (sum)");
  ranks.all_reduce(0, 4, nccl::kInt32);
  ranks.all_reduce(1, 4, nccl::kFloat32);
  ranks.expect_violation("call 2");
  run_until_idle(ranks.devices);
  EXPECT_EQ(ranks[0].device.counts().pending, 0U) << "a wrong collective ends without effect";
  ranks.destroy();
}

TEST(FakeNccl, ItsAccessesAreCheckedForOrder) {
  Ranks ranks(1);
  ranks.init();
  Rank& rank = ranks[0];
  const DeviceStream other = rank.device.create_stream(0).value();
  ASSERT_TRUE(rank.device.launch(other, {.name = "gradient", .writes = {{rank.input.data(), 8}}}).ok());
  ranks.all_reduce(0);
  rank.device.run_until_idle();
  EXPECT_EQ(rank.device.take_violations().size(), 1U);
  ranks.all_reduce(0);
  rank.device.forget(rank.output.data());
  rank.device.run_until_idle();
  EXPECT_EQ(rank.device.take_violations().size(), 1U);
  ranks.destroy();
}

TEST(FakeNccl, FindsUseAfterDestroyAndAbort) {
  Ranks ranks(2);
  ranks.init();
  ranks.all_reduce(0);
  EXPECT_EQ(ranks.api.comm_destroy(ranks[0].comm), nccl::kSuccess);
  ranks.expect_violation("work that is not done");
  EXPECT_EQ(ranks.api.comm_abort(ranks[0].comm), nccl::kInvalidArgument);
  ranks.expect_violation("was destroyed");
  EXPECT_EQ(ranks.api.comm_abort(ranks[1].comm), nccl::kSuccess);
  EXPECT_EQ(ranks.api.comm_finalize(ranks[1].comm), nccl::kInvalidArgument);
  ranks.expect_violation("was aborted");
  EXPECT_EQ(ranks.nccl.alive_communicators(), 0U);
}

TEST(FakeNccl, AnAsyncErrorComesAfterItsCallAndAbortEndsTheWork) {
  Ranks ranks(2);
  ranks.init();
  ranks.nccl.inject({.kind = Kind::kAsyncError, .rank = 1, .call = 1, .text = "cable cut"});
  for (std::size_t call = 0; call < 2; ++call) {
    EXPECT_EQ(ranks.settle(ranks[1].comm), nccl::kSuccess);
    ranks.all_reduce(0);
    ranks.all_reduce(1);
    run_until_idle(ranks.devices);
  }
  EXPECT_EQ(ranks.settle(ranks[0].comm), nccl::kSuccess);
  EXPECT_EQ(ranks.settle(ranks[1].comm), nccl::kRemoteError);
  EXPECT_STREQ(ranks.api.get_last_error(ranks[1].comm), "cable cut");
  EXPECT_EQ(ranks[0].device.counts().pending, 1U);
  EXPECT_EQ(ranks.api.comm_abort(ranks[1].comm), nccl::kSuccess);
  ranks[0].output.fill(-1);
  run_until_idle(ranks.devices);
  EXPECT_EQ(ranks[1].device.counts().pending, 0U);
  EXPECT_EQ(ranks[0].device.counts().pending, 1U) << "an abort elsewhere frees nobody";
  EXPECT_EQ(ranks.api.comm_abort(ranks[0].comm), nccl::kSuccess);
  run_until_idle(ranks.devices);
  EXPECT_EQ(ranks[0].device.counts().pending, 0U);
  EXPECT_EQ(ranks[0].output[0], -1);
}

TEST(FakeNccl, InitFailsHangsOrIsRefused) {
  Ranks ranks(1);
  ranks.nccl.inject({.kind = Kind::kInitFails, .group = 0, .text = "no route to host"});
  ranks.nccl.inject({.kind = Kind::kInitHangs, .group = 1});
  ranks.nccl.inject({.kind = Kind::kInitRefused, .group = 2, .text = "no driver"});
  nccl::Config config;
  config.blocking = 0;
  const auto init = [&](nccl::Comm* comm) {
    nccl::UniqueId id;
    EXPECT_EQ(ranks.api.get_unique_id(&id), nccl::kSuccess);
    return ranks.api.comm_init_rank_config(comm, 1, id, 0, &config);
  };
  std::array<nccl::Comm, 3> comms{};
  ASSERT_EQ(init(comms.data()), nccl::kInProgress);
  EXPECT_EQ(ranks.settle(comms[0]), nccl::kSystemError);
  EXPECT_STREQ(ranks.api.get_last_error(comms[0]), "no route to host");
  ASSERT_EQ(init(&comms[1]), nccl::kInProgress);
  EXPECT_EQ(ranks.settle(comms[1]), nccl::kInProgress);
  EXPECT_EQ(init(&comms[2]), nccl::kSystemError);
  EXPECT_STREQ(ranks.api.get_last_error(nullptr), "no driver");
  EXPECT_EQ(ranks.nccl.alive_communicators(), 2U);
  EXPECT_EQ(ranks.api.comm_abort(comms[0]), nccl::kSuccess);
  EXPECT_EQ(ranks.api.comm_abort(comms[1]), nccl::kSuccess);
}

TEST(FakeNccl, CollectivesAndLaunchesHangUntilTheAbort) {
  Ranks ranks(1);
  ranks.init();
  ranks.nccl.inject({.kind = Kind::kCollectiveHangs, .group = 0, .call = 1});
  ranks.nccl.inject({.kind = Kind::kLaunchHangs, .group = 0, .call = 2});
  for (int call = 0; call < 3; ++call) ranks.all_reduce(0);
  EXPECT_EQ(ranks.settle(ranks[0].comm), nccl::kInProgress);
  ranks[0].device.run_until_idle();
  EXPECT_EQ(ranks[0].device.counts().pending, 1U);
  EXPECT_EQ(ranks.api.comm_abort(ranks[0].comm), nccl::kSuccess);
  ranks[0].device.run_until_idle();
  EXPECT_EQ(ranks[0].device.counts().pending, 0U);
}

TEST(FakeNccl, ASlowAbortHoldsUpNobodyElse) {
  Ranks ranks(2, {.abort_takes = std::chrono::milliseconds(300)});
  ranks.init();
  std::jthread aborter([&ranks] { ranks.api.comm_abort(ranks[0].comm); });
  while (ranks.nccl.abort_threads().empty()) std::this_thread::yield();
  EXPECT_EQ(ranks.settle(ranks[1].comm), nccl::kSuccess);
  EXPECT_EQ(ranks.nccl.alive_communicators(), 2U) << "the abort is still under way";
  EXPECT_EQ(ranks.nccl.abort_threads(), std::vector{aborter.get_id()});
  aborter.join();
  EXPECT_EQ(ranks.nccl.alive_communicators(), 1U);
  ranks.api.comm_abort(ranks[1].comm);
}

TEST(FakeNccl, ReplaysCollectivesOfAGraph) {
  Ranks ranks(2, {.max_launch_polls = 0});
  ranks.init();
  std::vector<FakeGraphRef> graphs;
  for (std::size_t i = 0; i < 2; ++i) {
    ASSERT_TRUE(ranks[i].device.begin_capture(ranks[i].stream).ok());
    ranks.all_reduce(i);
    graphs.push_back(ranks[i].device.end_capture(ranks[i].stream).value());
  }
  for (int step = 1; step < 4; ++step) {
    for (std::size_t i = 0; i < 2; ++i) {
      ranks[i].input.fill(static_cast<float>(step));
      ASSERT_TRUE(ranks[i].device.replay(graphs[i], ranks[i].stream).ok());
    }
    run_until_idle(ranks.devices);
    EXPECT_EQ(ranks[1].output[0], static_cast<float>(2 * step));
  }
  ranks.destroy();
  ASSERT_TRUE(ranks[0].device.replay(graphs[0], ranks[0].stream).ok());
  ranks.expect_violation("a graph uses rank 0 of communicator 0, which is gone");
}

TEST(FakeNccl, GroupsJoinCallsAndSendsMatchInOrder) {
  Ranks ranks(2);
  ranks.init();
  Rank& sender = ranks[0];
  Rank& receiver = ranks[1];
  ranks.api.group_start();
  ranks.api.group_start();
  ranks.api.send(sender.input.data(), 2, nccl::kFloat32, 1, sender.comm, sender.stream);
  ranks.api.group_end();
  ranks.api.send(sender.input.data() + 2, 3, nccl::kFloat32, 1, sender.comm, sender.stream);
  ranks.api.group_end();
  EXPECT_EQ(ranks.settle(sender.comm), nccl::kSuccess);
  EXPECT_EQ(sender.device.counts().launches, 1U);
  ranks.api.receive(receiver.output.data(), 2, nccl::kFloat32, 0, receiver.comm, receiver.stream);
  EXPECT_EQ(ranks.settle(receiver.comm), nccl::kSuccess);
  ranks.api.receive(receiver.output.data() + 8, 3, nccl::kFloat32, 0, receiver.comm, receiver.stream);
  run_until_idle(ranks.devices);
  EXPECT_EQ(receiver.output[1], 1);
  EXPECT_EQ(receiver.output[10], 4);
  EXPECT_EQ(ranks.api.group_end(), nccl::kInvalidUsage);
  ranks.expect_violation("group_end without");
  ranks.api.send(sender.input.data(), 2, nccl::kFloat32, 1, sender.comm, sender.stream);
  ranks.api.receive(receiver.output.data(), 1, nccl::kFloat32, 0, receiver.comm, receiver.stream);
  ranks.expect_violation("ranks disagree in NCCL send 2 from 0 to 1");
  run_until_idle(ranks.devices);
  ranks.destroy();
}

TEST(FakeNccl, ChecksMemoryThatIsRegistered) {
  Ranks two(2);
  two.init();
  const nccl::Api api = FakeNccl::api_with_memory();
  std::array<void*, 2> memory{};
  std::array<void*, 2> registrations{};
  for (std::size_t rank = 0; rank < 2; ++rank) {
    EXPECT_TRUE(two[rank].device.exchange_current(0).ok());
    ASSERT_EQ(api.mem_alloc(&memory[rank], 64), nccl::kSuccess);
    ASSERT_EQ(api.comm_register(two[rank].comm, memory[rank], 64, &registrations[rank]), nccl::kSuccess);
  }
  const auto reduce = [&](std::size_t rank, std::size_t offset) {
    void* const place = static_cast<std::byte*>(memory[rank]) + offset;
    api.all_reduce(place, place, 4, nccl::kInt32, nccl::kSum, two[rank].comm, two[rank].stream);
    two.settle(two[rank].comm);
  };
  reduce(0, 0);
  reduce(1, 0);
  run_until_idle(two.devices);
  EXPECT_EQ(two.nccl.registered_calls(), 2U);
  reduce(0, 0);
  two.all_reduce(1, 4, nccl::kInt32);  // memory of its own
  EXPECT_NE(two.only_violation().find("ranks disagree"), std::string::npos);
  reduce(0, 0);
  reduce(1, 16);
  EXPECT_NE(two.only_violation().find("registered at 16"), std::string::npos);
  run_until_idle(two.devices);
  api.mem_free(memory[0]);
  EXPECT_NE(two.only_violation().find("the memory is registered with rank 0"), std::string::npos);
  EXPECT_EQ(api.comm_deregister(two[1].comm, registrations[1]), nccl::kSuccess);
  EXPECT_EQ(two.nccl.alive_registrations(), 0U) << "the other one went with its memory";
  EXPECT_EQ(api.comm_deregister(two[1].comm, registrations[1]), nccl::kInvalidArgument);
  EXPECT_NE(two.only_violation().find("no such registration"), std::string::npos);
  reduce(1, 0);  // what it reads and what it writes
  const Texts texts = two.nccl.take_violations();
  ASSERT_EQ(texts.size(), 2U);
  EXPECT_NE(texts.front().find("not registered with it"), std::string::npos);
  ASSERT_EQ(api.comm_register(two[1].comm, memory[1], 64, &registrations[1]), nccl::kSuccess);
  two.nccl.inject({.kind = FakeNcclFault::Kind::kRegisterFails});
  void* other = nullptr;
  EXPECT_EQ(api.comm_register(two[1].comm, memory[1], 64, &other), nccl::kSystemError);
  for (std::size_t rank = 0; rank < 2; ++rank) api.comm_abort(two[rank].comm);
  EXPECT_EQ(two.nccl.alive_registrations(), 0U);
  run_until_idle(two.devices);
  api.mem_free(memory[1]);
  EXPECT_EQ(two.nccl.alive_memory(), 0U);
  EXPECT_TRUE(two[1].device.exchange_current(-1).ok());
}

TEST(FakeNccl, FindsBadStreamsAndPlaces) {
  Ranks ranks(2);
  ranks.init();
  Rank& rank = ranks[0];
  ranks.api.all_reduce(rank.input.data(), rank.input.data() + 1, 4, nccl::kFloat32, nccl::kSum, rank.comm, rank.stream);
  ranks.settle(rank.comm);
  ranks.expect_violation("overlap");
  EXPECT_EQ(ranks.api.all_reduce(rank.input.data(), rank.output.data(), 4, nccl::kFloat32, nccl::kSum, rank.comm,
                                 ranks[1].stream),
            nccl::kInvalidArgument);
  ranks.expect_violation("not of the device");
  EXPECT_EQ(
      ranks.api.all_reduce(rank.input.data(), rank.output.data(), 4, nccl::kUint32, nccl::kSum, rank.comm, rank.stream),
      nccl::kInvalidArgument);
  ranks.expect_violation("bad type");
  for (auto& each : ranks.ranks) ranks.api.comm_abort(each->comm);
}

}  // namespace
}  // namespace hvd::testing
