// How a process finds out what launched it, and how ranks compare settings and choose their ways to each other.

#include "ops/transport/connect.h"

#include <gtest/gtest.h>

#include <array>
#include <condition_variable>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <thread>

#include "ops/transport/members.h"

namespace hvd::testing {
namespace {

using namespace std::chrono_literals;

// ---- what launched this process
// ---------------------------------------------------------------------------------------

class DetectLaunch : public ::testing::Test {
 protected:
  void SetUp() override { clear(); }
  void TearDown() override { clear(); }
  static void clear() {
    for (const char* name :
         {"HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_RENDEZVOUS_PORT", "HOROVOD_RENDEZVOUS_ADDR", "HOROVOD_RENDEZVOUS_FD",
          "HOROVOD_JOB_TOKEN", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
          "TORCHELASTIC_RESTART_COUNT", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MPI_LOCALNRANKS"}) {
      ::unsetenv(name);
    }
  }
  static void set(std::initializer_list<std::pair<const char*, const char*>> variables) {
    for (const auto& [name, value] : variables) ::setenv(name, value, 1);
  }
  static std::string refusal() {
    const Result<Launch> launch = detect_launch();
    EXPECT_FALSE(launch.ok());
    if (launch.ok()) return "";
    EXPECT_EQ(launch.status().code(), StatusCode::kInvalidArgument);
    return launch.status().text();
  }
};

TEST_F(DetectLaunch, NothingIsASingleRank) {
  Result<Launch> launch = detect_launch();
  ASSERT_TRUE(launch.ok());
  EXPECT_TRUE(std::holds_alternative<SingleLaunch>(*launch));
}

TEST_F(DetectLaunch, HvdrunComesFirst) {
  set({{"HOROVOD_RANK", "1"}, {"HOROVOD_SIZE", "3"}, {"HOROVOD_RENDEZVOUS_PORT", "4711"}, {"HOROVOD_JOB_TOKEN", "t"}});
  set({{"OMPI_COMM_WORLD_SIZE", "2"}, {"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "a"}, {"MASTER_PORT", "1"}});
  Result<Launch> launch = detect_launch();
  ASSERT_TRUE(launch.ok()) << launch.status().text();
  const auto* from = std::get_if<TcpBootstrap::FromLauncher>(&*launch);
  ASSERT_NE(from, nullptr);
  EXPECT_EQ(from->rank, 1);
  EXPECT_EQ(from->size, 3);
  EXPECT_EQ(from->port, 4711);
  EXPECT_EQ(from->token, "t");
  EXPECT_EQ(from->address, "127.0.0.1");
}

TEST_F(DetectLaunch, AnMpiLauncherComesBeforeTorchrun) {
  set({{"OMPI_COMM_WORLD_SIZE", "2"}, {"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "a"}, {"MASTER_PORT", "1"}});
  Result<Launch> launch = detect_launch();
  ASSERT_TRUE(launch.ok()) << launch.status().text();
  EXPECT_TRUE(std::holds_alternative<MpiLaunch>(*launch));
}

TEST_F(DetectLaunch, TorchrunsTokenTellsRestartsApart) {
  set({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "host"}, {"MASTER_PORT", "29500"}});
  const auto read = [] {
    Result<Launch> launch = detect_launch();
    return launch.ok() ? std::get<TcpBootstrap::FromTorchrun>(*launch) : TcpBootstrap::FromTorchrun{};
  };
  const TcpBootstrap::FromTorchrun first = read();
  EXPECT_EQ(first.rank, 1);
  EXPECT_EQ(first.size, 2);
  EXPECT_EQ(first.master_address, "host");
  EXPECT_EQ(first.master_port, 29500);
  set({{"TORCHELASTIC_RESTART_COUNT", "1"}});
  EXPECT_NE(read().token, first.token);
}

TEST_F(DetectLaunch, JunkIsNamedWithItsRange) {
  set({{"HOROVOD_RANK", "x"}, {"HOROVOD_SIZE", "2"}, {"HOROVOD_RENDEZVOUS_PORT", "1"}});
  EXPECT_EQ(refusal(), "HOROVOD_RANK='x' cannot be used: it has to be a whole number from 0 to 1");
  set({{"HOROVOD_RANK", "2"}});
  EXPECT_NE(refusal().find("HOROVOD_RANK='2'"), std::string::npos);
  set({{"HOROVOD_RANK", "1"}, {"HOROVOD_SIZE", "0"}});
  EXPECT_NE(refusal().find("HOROVOD_SIZE='0'"), std::string::npos);
  set({{"HOROVOD_SIZE", "2"}, {"HOROVOD_RENDEZVOUS_PORT", "65536"}});
  EXPECT_NE(refusal().find("HOROVOD_RENDEZVOUS_PORT='65536'"), std::string::npos);
  set({{"HOROVOD_RANK", "0"}, {"HOROVOD_RENDEZVOUS_PORT", "1"}, {"HOROVOD_JOB_TOKEN", "t"}});
  EXPECT_EQ(refusal(), "HOROVOD_RENDEZVOUS_FD is not set, although the launcher's others are");
  clear();
  set({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "a"}});
  EXPECT_EQ(refusal(), "MASTER_PORT is not set, although the launcher's others are");
}

TEST_F(DetectLaunch, HvdrunsVariablesWithoutATokenAreRefused) {
  set({{"HOROVOD_RANK", "1"}, {"HOROVOD_SIZE", "2"}, {"HOROVOD_RENDEZVOUS_PORT", "1"}});
  for (const bool empty : {false, true}) {
    if (empty) set({{"HOROVOD_JOB_TOKEN", ""}});
    const std::string text = refusal();
    EXPECT_NE(text.find("HOROVOD_JOB_TOKEN is not set"), std::string::npos) << text;
    EXPECT_NE(text.find("hvdrun"), std::string::npos) << text;
  }
}

// ---- a part of the ranks
// ---------------------------------------------------------------------------------------------------

TEST(Members, AreTakenInTheirOrderAndAllInOrderAreNoPart) {
  const auto checked = [](std::vector<int> members, int rank, int size) {
    Result<std::vector<int>> result = checked_members(members, rank, size);
    EXPECT_TRUE(result.ok()) << result.status().text();
    return result.ok() ? *result : std::vector<int>{-1};
  };
  EXPECT_EQ(checked({2, 0}, 0, 3), (std::vector<int>{2, 0}));
  EXPECT_EQ(checked({1, 0}, 0, 2), (std::vector<int>{1, 0}));
  EXPECT_EQ(checked({0, 1}, 1, 2), std::vector<int>());
  EXPECT_EQ(checked({}, 1, 2), std::vector<int>());
}

TEST(Members, WhatCannotBeUsedIsNamed) {
  const auto refusal = [](std::vector<int> members, int rank, int size) {
    Result<std::vector<int>> result = checked_members(members, rank, size);
    return result.ok() ? std::string() : result.status().text();
  };
  EXPECT_NE(refusal({0, 3}, 0, 3).find("init(comm=[0, 3]): 3 is not a rank from 0 to 2"), std::string::npos);
  EXPECT_NE(refusal({-1, 0}, 0, 3).find("-1 is not a rank from 0 to 2"), std::string::npos);
  EXPECT_NE(refusal({1, 0, 1}, 0, 3).find("rank 1 is in it twice"), std::string::npos);
  EXPECT_NE(refusal({1, 2}, 0, 3).find("rank 0, which called it, is not in it"), std::string::npos);
}

// ---- joining and connecting
// -------------------------------------------------------------------------------------------

// Where the ranks of a test, each a thread, meet.
class MeetingPoint {
 public:
  explicit MeetingPoint(int size) : blobs_(static_cast<std::size_t>(size)) {}

  Result<std::vector<std::vector<std::byte>>> meet(int rank, std::span<const std::byte> mine, TimePoint deadline) {
    std::unique_lock lock(mutex_);
    const int round = round_;
    blobs_[static_cast<std::size_t>(rank)].assign(mine.begin(), mine.end());
    if (++arrived_ == static_cast<int>(blobs_.size())) {
      met_ = blobs_;
      arrived_ = 0;
      ++round_;
      all_here_.notify_all();
    } else if (!all_here_.wait_until(lock, deadline, [&] { return round_ != round; })) {
      return Status::deadline_exceeded("not all have come");
    }
    return met_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  std::vector<std::vector<std::byte>> blobs_;
  std::vector<std::vector<std::byte>> met_;
  int arrived_ = 0;
  int round_ = 0;
};

class ThreadBootstrap final : public Bootstrap {
 public:
  ThreadBootstrap(MeetingPoint& point, int rank, int size) : point_(point), rank_(rank), size_(size) {}
  std::string_view name() const override { return "threads"; }
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  Result<std::vector<std::vector<std::byte>>> allgather(std::span<const std::byte> mine, TimePoint deadline) override {
    if (rounds_left == 0) return Status::internal("the bootstrap has broken");
    --rounds_left;
    return point_.meet(rank_, mine, deadline);
  }
  int rounds_left = 1000;

 private:
  MeetingPoint& point_;
  int rank_;
  int size_;
};

struct RankSetup {
  Options options;
  Handshake handshake;
  int rounds = 1000;
};

// What connect_all said to each rank.
std::vector<Result<Connection>> connect_ranks(int size, const std::function<void(int, RankSetup&)>& prepare) {
  MeetingPoint point(size);
  std::vector<std::unique_ptr<Joined>> joined(static_cast<std::size_t>(size));
  std::vector<Result<Connection>> results;
  for (int rank = 0; rank < size; ++rank) results.emplace_back(Status::internal("not run"));
  {
    std::vector<std::jthread> threads;
    for (int rank = 0; rank < size; ++rank) {
      threads.emplace_back([&, rank] {
        RankSetup setup;
        prepare(rank, setup);
        auto bootstrap = std::make_unique<ThreadBootstrap>(point, rank, size);
        bootstrap->rounds_left = setup.rounds;
        auto& mine = joined[static_cast<std::size_t>(rank)];
        mine = std::make_unique<Joined>(std::move(bootstrap));
        results[static_cast<std::size_t>(rank)] =
            connect_all(*mine, setup.options, setup.handshake, SteadyClock().now() + 30s);
      });
    }
  }
  return results;
}

TEST(ConnectAll, RanksOfOneHostShareMemory) {
  for (const int size : {1, 2, 3, 5}) {
    std::vector<Result<Connection>> ranks = connect_ranks(size, [](int, RankSetup&) {});
    for (int rank = 0; rank < size; ++rank) {
      Result<Connection>& connection = ranks[static_cast<std::size_t>(rank)];
      ASSERT_TRUE(connection.ok()) << connection.status().text();
      EXPECT_EQ(connection->hosts, std::vector<int>(static_cast<std::size_t>(size), 0));
      EXPECT_EQ(connection->rank, rank);
      EXPECT_EQ(connection->local_rank, rank);
      EXPECT_EQ(connection->local_size, size);
      EXPECT_EQ(connection->cross_rank, 0);
      EXPECT_EQ(connection->cross_size, 1);
      EXPECT_TRUE(connection->homogeneous);
      for (int peer = 0; peer < size; ++peer) {
        if (peer == rank) continue;
        EXPECT_EQ(connection->fabric->data_route(peer).name(), "shared memory");
      }
    }
  }
}

TEST(ConnectAll, TheTransportThatIsAskedForIsTaken) {
  std::vector<Result<Connection>> ranks =
      connect_ranks(3, [](int, RankSetup& setup) { setup.options.transport = "tcp"; });
  for (int rank = 0; rank < 3; ++rank) {
    Result<Connection>& connection = ranks[static_cast<std::size_t>(rank)];
    ASSERT_TRUE(connection.ok()) << connection.status().text();
    EXPECT_EQ(connection->hosts, (std::vector<int>{0, 0, 0})) << "the ranks are known to be on one host all the same";
    EXPECT_EQ(connection->fabric->data_route((rank + 1) % 3).name(), "TCP");
  }
}

TEST(ConnectAll, MpiCannotBeAskedForInAJobWithoutIt) {
  for (const Result<Connection>& connection :
       connect_ranks(2, [](int, RankSetup& setup) { setup.options.transport = "mpi"; })) {
    ASSERT_FALSE(connection.ok());
    EXPECT_EQ(connection.status().code(), StatusCode::kUnavailable);
    EXPECT_EQ(connection.status().text(), "HOROVOD_TRANSPORT=mpi needs a job that was started through MPI (mpirun)");
  }
}

TEST(ConnectAll, SettingsThatDifferAreNamedOnEveryRankAlike) {
  std::vector<Result<Connection>> ranks = connect_ranks(3, [](int rank, RankSetup& setup) {
    if (rank == 1) setup.options.cache_capacity = 7;
    setup.handshake.extra = {{"process sets", rank == 2 ? "[0,1]" : ""}};
  });
  for (const Result<Connection>& connection : ranks) {
    ASSERT_FALSE(connection.ok());
    EXPECT_EQ(connection.status().code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(connection.status().text(), ranks[0].status().text());
  }
  const std::string text = ranks[0].status().text();
  EXPECT_NE(text.find("the ranks of this job do not agree: "), std::string::npos) << text;
  EXPECT_NE(text.find("HOROVOD_CACHE_CAPACITY: 65536: ranks 0,2, 7: rank 1"), std::string::npos) << text;
  EXPECT_NE(text.find("process sets: (none): ranks 0-1, [0,1]: rank 2"), std::string::npos) << text;
}

// Wherever it breaks, every rank gets an error and nothing stays open.
TEST(ConnectAll, ABootstrapThatBreaksInAnyRoundIsAnErrorOnEveryRank) {
  for (const std::string transport : {"auto", "tcp"}) {
    for (int rounds = 0; rounds < 5; ++rounds) {
      const std::vector<Result<Connection>> ranks = connect_ranks(2, [&](int, RankSetup& setup) {
        setup.options.transport = transport;
        setup.rounds = rounds;
      });
      const bool enough = rounds >= (transport == "tcp" ? 5 : 4);
      for (const Result<Connection>& connection : ranks) {
        ASSERT_EQ(connection.ok(), enough) << transport << " after " << rounds << " rounds";
        if (enough) continue;
        EXPECT_EQ(connection.status().text(), "the bootstrap has broken");
      }
    }
  }
}

}  // namespace
}  // namespace hvd::testing
