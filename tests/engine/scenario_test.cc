// The engine from end to end in the situations that programs bring it into, each rank a thread of this process.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <barrier>
#include <latch>
#include <numeric>
#include <random>
#include <semaphore>
#include <thread>

#include "tests/support/random_seed.h"
#include "tests/support/rank_threads.h"

namespace hvd::testing {
namespace {

using namespace std::chrono_literals;

// Every wait of the tests themselves ends, at the latest, together with what a rank waits for.
constexpr auto kLongest = 60s;

TensorEntry entry_of(OpKind op, const std::string& name, DataType dtype, Shape shape, const void* input, void* output,
                     ProcessSetId process_set = 0) {
  TensorEntry entry = make_entry(op, name, dtype, std::move(shape), input, output);
  entry.request.key.process_set = process_set;
  return entry;
}

template <typename T>
Result<HandleRef> allreduce_of(TestRank& hvd, const std::string& name, DataType dtype, std::vector<T>& values,
                               ReduceOp op = ReduceOp::kSum) {
  TensorEntry entry = entry_of(OpKind::kAllreduce, name, dtype, {static_cast<std::int64_t>(values.size())},
                               values.data(), values.data());
  entry.request.reduce_op = op;
  return hvd.enqueue(std::move(entry));
}

void expect_works(TestRank& hvd, const std::string& name, ProcessSetId process_set = 0) {
  std::vector<float> values(7, 1.0f);
  const Status status = hvd.allreduce(name, values, values, ReduceOp::kSum, process_set);
  ASSERT_TRUE(status.ok()) << status.text();
  EXPECT_EQ(values[6], static_cast<float>(hvd.runtime().process_set(process_set)->size()));
}

// Ranks that the test itself builds and takes apart, for what run_ranks has no words for: each has its own network
// end and may end in its own way.
class Job {
 public:
  explicit Job(int size, const TestRank::Settings& settings = {}) : Job(size, [&](int) { return settings; }) {}
  Job(int size, const std::function<TestRank::Settings(int rank)>& settings) : network_(size) {
    for (int rank = 0; rank < size; ++rank)
      ranks_.push_back(std::make_unique<TestRank>(network_, rank, settings(rank)));
  }
  TestRank& operator[](int rank) { return *ranks_[static_cast<std::size_t>(rank)]; }
  int size() const { return network_.size(); }
  /// To the others this looks like the death of the rank's process.
  void kill(int rank) { ranks_[static_cast<std::size_t>(rank)].reset(); }
  /// Runs `body` in a thread of each of `ranks`.
  void run(const std::vector<int>& ranks, const std::function<void(TestRank&)>& body) {
    std::vector<std::jthread> threads;
    for (const int rank : ranks) threads.emplace_back([&body, &hvd = (*this)[rank]] { body(hvd); });
  }
  /// The same for all that are alive.
  void run(const std::function<void(TestRank&)>& body) {
    std::vector<int> alive;
    for (int rank = 0; rank < size(); ++rank) {
      if (ranks_[static_cast<std::size_t>(rank)]) alive.push_back(rank);
    }
    run(alive, body);
  }
  void shut_down() {
    run([](TestRank& hvd) { hvd.shut_down(); });
  }

 private:
  InprocNetwork network_;
  std::vector<std::unique_ptr<TestRank>> ranks_;
};

// ---- orders, types, fusion
// -------------------------------------------------------------------------------------------

TEST(Scenario, AnyOrderOfSubmissionOnEachRankGivesTheSameResults) {
  const std::uint64_t seed = seed_of_this_run();
  run_ranks(4, [seed](TestRank& hvd) {
    std::mt19937_64 random(seed + static_cast<std::uint64_t>(hvd.rank()));
    constexpr std::size_t tensors = 60;
    for (int round = 0; round < 5; ++round) {
      std::vector<std::size_t> order(tensors);
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.end(), random);
      std::vector<std::vector<float>> values(tensors);
      std::vector<Result<HandleRef>> handles;
      for (const std::size_t t : order) {
        values[t].assign(t * t * 3 % 6000, static_cast<float>(t) + static_cast<float>(hvd.rank()));
        handles.push_back(allreduce_of(hvd, "t" + std::to_string(t), DataType::kFloat32, values[t]));
      }
      std::shuffle(order.begin(), order.end(), random);  // and any order of waits
      for (const std::size_t i : order) ASSERT_TRUE(hvd.wait(handles[i]).ok()) << hvd.wait(handles[i]).text();
      for (std::size_t t = 0; t < tensors; ++t) {
        const float expected = 4.0f * static_cast<float>(t) + 6.0f;
        for (const float value : values[t]) ASSERT_EQ(value, expected) << "tensor " << t;
      }
    }
  });
}

TEST(Scenario, MixedTypesInFlightTogether) {
  TestRank::Settings settings;
  settings.options.cycle_time = 50ms;  // enough company, while the large one is in flight
  run_ranks(
      3,
      [](TestRank& hvd) {
        constexpr int each = 40;
        std::vector<float> large(4 << 20, 1.0f);
        std::vector<std::vector<float>> floats(each, std::vector<float>(10, 1.5f));
        std::vector<std::vector<double>> doubles(each, std::vector<double>(10, 2.5));
        std::vector<std::vector<std::int32_t>> ints(each, std::vector<std::int32_t>(10, 7));
        std::vector<Result<HandleRef>> handles;
        handles.push_back(allreduce_of(hvd, "large", DataType::kFloat32, large));
        for (std::size_t i = 0; i < each; ++i) {
          handles.push_back(allreduce_of(hvd, fmt::format("f{}", i), DataType::kFloat32, floats[i]));
          handles.push_back(allreduce_of(hvd, fmt::format("d{}", i), DataType::kFloat64, doubles[i], ReduceOp::kMax));
          handles.push_back(allreduce_of(hvd, fmt::format("i{}", i), DataType::kInt32, ints[i]));
        }
        for (const auto& handle : handles) ASSERT_TRUE(hvd.wait(handle).ok()) << hvd.wait(handle).text();
        EXPECT_EQ(large.back(), 3.0f);
        for (const auto& values : floats) EXPECT_EQ(values, std::vector<float>(10, 4.5f));
        for (const auto& values : doubles) EXPECT_EQ(values, std::vector<double>(10, 2.5));
        for (const auto& values : ints) EXPECT_EQ(values, std::vector<std::int32_t>(10, 21));
        // How many are fused depends on time; the tests of the planner and of the controller say what may be.
        EXPECT_LE(hvd.runtime().statistics().executor.collective_calls.value(), 1 + 3 * each);
      },
      settings);
}

TEST(Scenario, GathersAndBroadcastsBesideReductions) {
  run_ranks(3, [](TestRank& hvd) {
    for (int round = 0; round < 3; ++round) {  // the later ones through the cache
      std::vector<std::int64_t> rows(static_cast<std::size_t>(hvd.rank()) * 2, hvd.rank());
      Result<HandleRef> gather =
          hvd.enqueue(entry_of(OpKind::kAllgather, "g", DataType::kInt64, {hvd.rank(), 2}, rows.data(), nullptr));
      std::vector<double> weights(100, hvd.rank() == 2 ? 4.0 : 0.0);
      TensorEntry entry =
          entry_of(OpKind::kBroadcast, "b", DataType::kFloat64, {10, 10}, weights.data(), weights.data());
      entry.request.root_rank = 2;
      Result<HandleRef> broadcast = hvd.enqueue(std::move(entry));
      ASSERT_TRUE(hvd.barrier("wait").ok());
      expect_works(hvd, "x");
      ASSERT_TRUE(hvd.wait(gather).ok()) << hvd.wait(gather).text();
      ASSERT_TRUE(hvd.wait(broadcast).ok()) << hvd.wait(broadcast).text();
      EXPECT_EQ(weights, std::vector<double>(100, 4.0));
      const OutputTensor& all = gather.value()->output().tensors.at(0);
      EXPECT_EQ(all.shape, (Shape{3, 2}));
      ASSERT_EQ(all.bytes, 6 * sizeof(std::int64_t));
      const auto* values = reinterpret_cast<const std::int64_t*>(all.memory.get());
      EXPECT_EQ(std::vector<std::int64_t>(values, values + 6), (std::vector<std::int64_t>{1, 1, 2, 2, 2, 2}));
    }
  });
}

// ---- disagreement
// ----------------------------------------------------------------------------------------------------

struct Mismatch {
  std::string name;
  std::function<void(Request& request, int rank)> change;
  OpKind op;
  std::string text;  // what the error has to say
};

void PrintTo(const Mismatch& mismatch, std::ostream* out) { *out << mismatch.name; }

class MismatchScenario : public ::testing::TestWithParam<Mismatch> {};

TEST_P(MismatchScenario, IsAnErrorThatNamesTheTensorOnAllRanksAndTheJobGoesOn) {
  run_ranks(3, [](TestRank& hvd) {
    for (int round = 0; round < 2; ++round) {
      std::vector<float> memory(64, 1.0f);
      TensorEntry entry =
          entry_of(GetParam().op, "odd.tensor", DataType::kFloat32, {4, 2}, memory.data(), memory.data());
      GetParam().change(entry.request, hvd.rank());
      const Status status = hvd.wait(hvd.enqueue(std::move(entry)));
      EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << status.text();
      EXPECT_NE(status.text().find("odd.tensor"), std::string::npos) << status.text();
      EXPECT_NE(status.text().find(GetParam().text), std::string::npos) << status.text();
      expect_works(hvd, "after");
      expect_works(hvd, "odd.tensor");  // and the name itself is free again
    }
  });
}

INSTANTIATE_TEST_SUITE_P(
    All, MismatchScenario,
    ::testing::Values(Mismatch{"DataType",
                               [](Request& r, int rank) {
                                 if (rank == 2) r.dtype = DataType::kFloat64;
                               },
                               OpKind::kAllreduce, "mismatched data type: float32: ranks 0-1; float64: rank 2"},
                      Mismatch{"Shape",
                               [](Request& r, int rank) {
                                 if (rank == 1) r.shape = {2, 4};
                               },
                               OpKind::kAllreduce, "mismatched shape: [4, 2]: ranks 0,2; [2, 4]: rank 1"},
                      Mismatch{"Reduction",
                               [](Request& r, int rank) {
                                 if (rank == 0) r.reduce_op = ReduceOp::kMax;
                               },
                               OpKind::kAllreduce, "mismatched reduction: Max: rank 0; Sum: ranks 1-2"},
                      Mismatch{"Prescale", [](Request& r, int rank) { r.prescale = rank; }, OpKind::kAllreduce,
                               "mismatched prescale factor: 0: rank 0; 1: rank 1; 2: rank 2"},
                      Mismatch{"RootRank", [](Request& r, int rank) { r.root_rank = rank == 0 ? 1 : 0; },
                               OpKind::kBroadcast, "mismatched root rank: 1: rank 0; 0: ranks 1-2"},
                      Mismatch{"GatherTrailingShape", [](Request& r, int rank) { r.shape = {rank, rank == 2 ? 3 : 2}; },
                               OpKind::kAllgather,
                               "mismatched shape after the first dimension: [2]: ranks 0-1; [3]: rank 2"},
                      Mismatch{"GatherDimensions",
                               [](Request& r, int rank) {
                                 if (rank == 1) r.shape = {4};
                               },
                               OpKind::kAllgather, "mismatched number of dimensions: 2: ranks 0,2; 1: rank 1"},
                      Mismatch{"TwoThingsAtOnce",
                               [](Request& r, int rank) {
                                 if (rank == 1) r.dtype = DataType::kInt32;
                                 if (rank == 1) r.shape = {1};
                               },
                               OpKind::kAllreduce, "; mismatched shape: "}),
    [](const auto& param) { return param.param.name; });

TEST(Scenario, AMismatchAfterTheNameWasRememberedIsAnErrorToo) {
  run_ranks(3, [](TestRank& hvd) {
    expect_works(hvd, "x");
    expect_works(hvd, "x");
    std::vector<float> memory(64, 1.0f);
    const std::size_t count = hvd.rank() == 1 ? 5 : 7;  // 7 is what is remembered: two ranks send its id
    const Status status = hvd.allreduce("x", std::span(memory).first(count), std::span(memory).first(count));
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(status.text(), "allreduce 'x': mismatched shape: [7]: ranks 0,2; [5]: rank 1");
    expect_works(hvd, "x");
    // All change their mind together: what is remembered is replaced.
    for (int round = 0; round < 3; ++round) {
      ASSERT_TRUE(hvd.allreduce("x", std::span(memory).first(9), std::span(memory).first(9)).ok());
    }
    expect_works(hvd, "x");
  });
}

TEST(Scenario, CallSitesAreNamedInAMismatch) {
  run_ranks(2, [](TestRank& hvd) {
    std::vector<float> memory(8);
    TensorEntry entry =
        entry_of(OpKind::kAllreduce, "x", DataType::kFloat32, {2 + hvd.rank()}, memory.data(), memory.data());
    const Status status = hvd.wait(hvd.enqueue(std::move(entry), {"train.py", hvd.rank() == 0 ? 88 : 90}));
    EXPECT_EQ(status.text(), "allreduce 'x': mismatched shape: [2]: rank 0 (train.py:88); [3]: rank 1 (train.py:90)");
  });
}

TEST(Scenario, ANameInFlightIsRefusedAtTheCallAndTheFirstGoesOn) {
  run_ranks(2, [](TestRank& hvd) {
    ASSERT_TRUE(hvd.barrier("together").ok());
    std::vector<float> memory(4, 1.0f);
    if (hvd.rank() == 0) {
      const Result<HandleRef> first = hvd.allreduce_async("twice", memory, memory);
      std::vector<float> other(4, 1.0f);
      const Result<HandleRef> second = hvd.allreduce_async("twice", other, other);
      ASSERT_FALSE(second.ok());
      EXPECT_EQ(second.status().code(), StatusCode::kInvalidArgument);
      EXPECT_NE(second.status().text().find("'twice'"), std::string::npos) << second.status().text();
      ASSERT_TRUE(hvd.barrier("now").ok());
      ASSERT_TRUE(hvd.wait(first).ok());
    } else {
      ASSERT_TRUE(hvd.barrier("now").ok());
      ASSERT_TRUE(hvd.allreduce("twice", memory, memory).ok());
    }
    EXPECT_EQ(memory[0], 2.0f);
    expect_works(hvd, "twice");
  });
}

// ---- process sets
// ----------------------------------------------------------------------------------------------------

// Each runs alone, and while each member of another set waits there for what the other one has not handed over.
class ProcessSetScenario : public ::testing::TestWithParam<bool> {
 protected:
  // The first static set is the stuck one. When the test's own part is over its members hand over the rest.
  static void run(int size, std::vector<std::vector<int>> process_sets, const std::vector<int>& stuck,
                  const std::function<void(TestRank&)>& body) {
    TestRank::Settings settings;
    settings.process_sets = std::move(process_sets);
    settings.process_sets.insert(settings.process_sets.begin(), stuck);
    const bool is_stuck = GetParam();
    const auto members = [&](TestRank& hvd) {
      if (!is_stuck || std::find(stuck.begin(), stuck.end(), hvd.rank()) == stuck.end()) return body(hvd);
      std::vector<std::vector<float>> values(stuck.size(), std::vector<float>(20'000, 1.0f));
      const auto start = [&](std::size_t i) {
        return hvd.allreduce_async(fmt::format("stuck {}", stuck[i]), values[i], values[i], ReduceOp::kSum, kStuck);
      };
      const auto own = static_cast<std::size_t>(std::find(stuck.begin(), stuck.end(), hvd.rank()) - stuck.begin());
      std::vector<Result<HandleRef>> handles{start(own)};
      ASSERT_TRUE(handles[0].ok()) << handles[0].status().text();
      body(hvd);
      EXPECT_FALSE(handles[0].value()->done());
      ASSERT_TRUE(hvd.barrier("all have looked", kStuck).ok());
      for (std::size_t i = 0; i < stuck.size(); ++i) {
        if (i != own) handles.push_back(start(i));
      }
      for (const Result<HandleRef>& handle : handles) ASSERT_TRUE(hvd.wait(handle).ok()) << hvd.wait(handle).text();
      for (const std::vector<float>& one : values) EXPECT_EQ(one.back(), static_cast<float>(stuck.size()));
    };
    const auto everyone = [&](TestRank& hvd) {
      members(hvd);
      ASSERT_TRUE(hvd.barrier("all are done").ok());  // the first shutdown ends what is in flight on all ranks
    };
    run_ranks(size, everyone, settings);
  }

  static constexpr ProcessSetId kStuck = 1;
};

INSTANTIATE_TEST_SUITE_P(Scenario, ProcessSetScenario, ::testing::Bool(),
                         [](const auto& parameter) { return parameter.param ? "BesideAStuckSet" : "Alone"; });

TEST_P(ProcessSetScenario, AnOperationOfASetThatThisRankIsNotInOrThatDoesNotExistIsRefusedAtTheCall) {
  run(3, {{0, 2}}, /*stuck=*/{1, 2}, [](TestRank& hvd) {
    std::vector<float> memory(4, 1.0f);
    if (hvd.rank() == 1) {
      EXPECT_EQ(hvd.allreduce("x", memory, memory, ReduceOp::kSum, 2).text(),
                "allreduce: Rank 1 is not a member of the provided process set.");
    } else {
      expect_works(hvd, "x", 2);
    }
    EXPECT_EQ(hvd.allreduce("x", memory, memory, ReduceOp::kSum, 9).code(), StatusCode::kInvalidArgument);
    TensorEntry entry = entry_of(OpKind::kBroadcast, "b", DataType::kFloat32, {4}, memory.data(), memory.data(),
                                 hvd.rank() == 1 ? 0 : 2);
    entry.request.root_rank = hvd.rank() == 1 ? 3 : 1;  // not in the set, or not in the job
    const Status root = hvd.wait(hvd.enqueue(std::move(entry)));
    EXPECT_EQ(root.code(), StatusCode::kInvalidArgument) << root.text();
    expect_works(hvd, "after");
  });
}

TEST_P(ProcessSetScenario, SetsAreAddedUsedAndRemovedWhileOthersWork) {
  run(4, {}, /*stuck=*/{1, 2}, [](TestRank& hvd) {
    for (int round = 0; round < 3; ++round) {
      const Result<ProcessSetId> even = hvd.add_process_set({0, 2});
      ASSERT_TRUE(even.ok()) << even.status().text();
      const Result<ProcessSetId> high = hvd.add_process_set({2, 3});
      ASSERT_TRUE(high.ok()) << high.status().text();
      EXPECT_NE(even.value(), high.value());
      const Result<ProcessSetId> again = hvd.add_process_set({0, 2});
      EXPECT_EQ(again.status().code(), StatusCode::kInvalidArgument) << again.status().text();
      if (hvd.rank() % 2 == 0) expect_works(hvd, "x", even.value());
      if (hvd.rank() >= 2) expect_works(hvd, "x", high.value());
      expect_works(hvd, "x");
      for (const ProcessSetId id : {even.value(), high.value()}) {
        TensorEntry entry = make_entry(OpKind::kProcessSetRemove, "remove", DataType::kUint8, {id}, nullptr, nullptr);
        const Status removed = hvd.wait(hvd.enqueue(std::move(entry)));
        ASSERT_TRUE(removed.ok()) << removed.text();
        EXPECT_EQ(hvd.runtime().process_set(id), nullptr);
      }
      EXPECT_EQ(hvd.runtime().process_set_ids(), (std::vector<ProcessSetId>{0, kStuck}));
    }
  });
}

TEST_P(ProcessSetScenario, OverlappingSetsInOppositeOrdersDoNotBlockEachOther) {
  run(4, {{0, 1}, {1, 2}, {0, 2}}, /*stuck=*/{2, 3}, [](TestRank& hvd) {
    for (int round = 0; round < 30; ++round) {
      std::vector<std::vector<float>> values(4, std::vector<float>(30'000, 1.0f));
      std::vector<Result<HandleRef>> handles;
      std::vector<int> places;
      for (int step = 0; step < 4; ++step) {
        // The set of all, then 2, 3 and 4.
        const int place = hvd.rank() % 2 == 0 ? step : 3 - step;
        const int set = place == 0 ? 0 : place + 1;
        if (!hvd.runtime().process_set(static_cast<ProcessSetId>(set))->contains(hvd.rank())) continue;
        auto& tensor = values[static_cast<std::size_t>(place)];
        handles.push_back(hvd.allreduce_async("x", tensor, tensor, ReduceOp::kSum, static_cast<ProcessSetId>(set)));
        places.push_back(place);
      }
      for (std::size_t i = 0; i < handles.size(); ++i) {
        ASSERT_TRUE(hvd.wait(handles[i]).ok()) << hvd.wait(handles[i]).text();
        ASSERT_EQ(values[static_cast<std::size_t>(places[i])].back(), places[i] == 0 ? 4.0f : 2.0f);
      }
    }
  });
}

// ---- the end of a job
// ------------------------------------------------------------------------------------------------

TEST(Scenario, EnqueueAfterTheEndIsRefused) {
  Job job(2);
  job.run([](TestRank& hvd) { expect_works(hvd, "x"); });
  job.shut_down();
  EXPECT_TRUE(job[0].runtime().finished());
  EXPECT_TRUE(job[1].runtime().finished());
  EXPECT_FALSE(job[0].runtime().lost_a_peer());
  std::vector<float> memory(4);
  EXPECT_FALSE(job[0].allreduce_async("late", memory, memory).ok());
}

TEST(Scenario, WhenOneRankShutsDownTheOthersWaitsEndWithItsName) {
  for (const int leaver : {0, 2}) {
    Job job(3);
    job.run([leaver](TestRank& hvd) {
      expect_works(hvd, "x");
      if (hvd.rank() == leaver) {
        hvd.shut_down();
        return;
      }
      std::vector<float> memory(4);
      const Status status = hvd.allreduce("waits", memory, memory);
      EXPECT_EQ(status.code(), StatusCode::kInternal) << status.text();
      EXPECT_NE(status.text().find("shut down"), std::string::npos) << status.text();
    });
    job.shut_down();
    for (int rank = 0; rank < 3; ++rank) EXPECT_TRUE(job[rank].runtime().finished()) << "rank " << rank;
  }
}

TEST(Scenario, WhatIsInFlightWhenARankShutsDownIsFinished) {
  Job job(3);
  job.run([](TestRank& hvd) {
    std::vector<float> memory(3 << 20, 1.0f);
    const Result<HandleRef> handle = hvd.allreduce_async("large", memory, memory);
    std::vector<float> small(1, 1.0f);
    ASSERT_TRUE(hvd.allreduce("agreed after it", small, small).ok());
    hvd.shut_down();
    ASSERT_TRUE(handle.ok() && handle.value()->done());
    EXPECT_TRUE(handle.value()->status().ok()) << handle.value()->status().text();
    EXPECT_EQ(memory.back(), 3.0f);
  });
}

TEST(Scenario, ShuttingDownTwiceOrFromSeveralThreadsIsOneEnd) {
  Job job(2);
  job.run([](TestRank& hvd) {
    expect_works(hvd, "x");
    std::jthread other([&hvd] { hvd.shut_down(); });
    hvd.shut_down();
  });
  job.shut_down();
  EXPECT_TRUE(job[0].runtime().finished() && job[1].runtime().finished());
}

// ---- lost peers
// ------------------------------------------------------------------------------------------------------

class LostPeerScenario : public ::testing::TestWithParam<int> {};

TEST_P(LostPeerScenario, EndsEveryWaitWithItsRankNamedAndSetsWithoutItGoOn) {
  const int victim = GetParam();
  TestRank::Settings settings;
  std::vector<int> rest{0, 1, 2, 3};
  std::erase(rest, victim);
  settings.process_sets = {rest};
  Job job(4, settings);
  job.run([](TestRank& hvd) { expect_works(hvd, "x"); });
  std::latch waiting(3);
  std::jthread killer([&] {
    waiting.wait();
    job.kill(victim);
  });
  job.run(rest, [&](TestRank& hvd) {
    const int rank = hvd.rank();
    std::vector<float> memory(1 << 20);
    const Result<HandleRef> first = hvd.allreduce_async("a", memory, memory);
    const Result<HandleRef> second = hvd.barrier_async("b");
    waiting.count_down();
    for (const Result<HandleRef>* handle : {&first, &second}) {
      const Status status = hvd.wait(*handle);
      EXPECT_EQ(status.code(), StatusCode::kInternal) << status.text();
      EXPECT_NE(status.text().find(fmt::format("rank {} is lost", victim)), std::string::npos)
          << "rank " << rank << ": " << status.text();
    }
    // Later ones end at once, and say why.
    std::vector<float> later(4);
    const Status status = hvd.allreduce("later", later, later);
    EXPECT_EQ(status.code(), StatusCode::kInternal) << status.text();
    EXPECT_NE(status.text().find(fmt::format("rank {} is lost", victim)), std::string::npos) << status.text();
    EXPECT_TRUE(hvd.runtime().lost_a_peer());
    std::vector<float> values(5, 1.0f);
    const Status without = hvd.allreduce("y", values, values, ReduceOp::kSum, 1);
    if (victim == 0) {  // the coordinator is gone, nobody can agree on anything: an error, not a wait
      EXPECT_EQ(without.code(), StatusCode::kInternal) << without.text();
      EXPECT_NE(without.text().find("rank 0 is lost"), std::string::npos) << without.text();
    } else {
      ASSERT_TRUE(without.ok()) << without.text();
      EXPECT_EQ(values[0], 3.0f);
    }
    hvd.shut_down();
    EXPECT_TRUE(hvd.runtime().finished());
  });
}

INSTANTIATE_TEST_SUITE_P(Ranks, LostPeerScenario, ::testing::Values(0, 1, 3));

TEST(Scenario, APeerLostInTheMiddleOfALargeReductionEndsItOnAllRanks) {
  // The victim's engine stands still at its 40th segment, as a process that is stopped and then killed.
  struct StandStill final : FaultHook {
    FaultAction at(FaultPoint point, int /*peer*/) override {
      if (point == FaultPoint::kSegmentReceive && ++passages == 40) {
        reached.count_down();
        go_on.acquire();
      }
      return FaultAction::kPass;
    }
    int passages = 0;
    std::latch reached{1};
    std::binary_semaphore go_on{0};
  } fault;
  Job job(3, [&](int rank) {
    TestRank::Settings settings;
    if (rank == 1) settings.fault = &fault;
    return settings;
  });
  std::vector<std::vector<float>> memory(3, std::vector<float>(16 << 20, 1.0f));
  std::vector<Result<HandleRef>> handles;
  for (int rank = 0; rank < 3; ++rank) {
    auto& mine = memory[static_cast<std::size_t>(rank)];
    handles.push_back(job[rank].allreduce_async("large", mine, mine));
  }
  fault.reached.wait();
  std::jthread killer([&] { job.kill(1); });  // comes to an end once its engine goes on
  fault.go_on.release();
  killer.join();
  for (const int rank : {0, 2}) {
    const Status status = job[rank].wait(handles[static_cast<std::size_t>(rank)]);
    EXPECT_EQ(status.code(), StatusCode::kInternal) << status.text();
    EXPECT_NE(status.text().find("rank 1 is lost"), std::string::npos) << status.text();
    EXPECT_NE(status.text().find("'large'"), std::string::npos) << status.text();
  }
  job.shut_down();
}

TEST(Scenario, ATransferThatFailsOnOneRankEndsTheCallOnAllAndTheSetStaysUsable) {
  for (const char* text :
       {"fail@segment_send#1:rank=1", "fail@segment_receive#2:rank=2", "fail@segment_send#3:rank=0"}) {
    std::vector<std::unique_ptr<FaultPlan>> plans;
    for (int rank = 0; rank < 3; ++rank) plans.push_back(FaultPlan::parse(text, rank).value());
    Job job(3, [&](int rank) {
      TestRank::Settings settings;
      settings.fault = plans[static_cast<std::size_t>(rank)].get();
      return settings;
    });
    job.run([text](TestRank& hvd) {
      // A frame that is half-way out when its call fails still goes out: until then the transport needs the memory.
      const auto memory = std::make_shared<std::vector<float>>(100'000, 1.0f);
      TensorEntry entry =
          entry_of(OpKind::kAllreduce, "x", DataType::kFloat32, {100'000}, memory->data(), memory->data());
      entry.keep_alive = memory;
      const Status status = hvd.wait(hvd.enqueue(std::move(entry)));
      EXPECT_EQ(status.code(), StatusCode::kInternal) << text << " on rank " << hvd.rank();
      EXPECT_NE(status.text().find("'x'"), std::string::npos) << status.text();
      for (int round = 0; round < 3; ++round) expect_works(hvd, "x");
    });
    job.shut_down();
  }
}

// ---- waiting
// ---------------------------------------------------------------------------------------------------------

TEST(Scenario, AStalledTensorIsReportedWithTheRanksThatAreMissing) {
  TestRank::Settings settings;
  settings.options.stall_check_time = 1s;
  ::testing::internal::CaptureStderr();
  run_ranks(
      4,
      [](TestRank& hvd) {
        std::vector<float> memory(4, 1.0f);
        // Ranks 1 and 3 come only when the check has had its time twice.
        if (hvd.rank() % 2 == 0) {
          const Result<HandleRef> handle = hvd.allreduce_async("lonely", memory, memory);
          EXPECT_FALSE(hvd.loop().wait(*handle.value(), SteadyClock().now() + 2500ms));
          ASSERT_TRUE(hvd.barrier("late").ok());
          ASSERT_TRUE(hvd.wait(handle).ok());
        } else {
          ASSERT_TRUE(hvd.barrier("late").ok());
          ASSERT_TRUE(hvd.allreduce("lonely", memory, memory).ok());
        }
      },
      settings);
  const std::string log = ::testing::internal::GetCapturedStderr();
  EXPECT_NE(log.find("Missing ranks 1,3: allreduce 'lonely'"), std::string::npos) << log;
}

TEST(Scenario, AStallBeyondItsLimitEndsTheJobOnAllRanks) {
  TestRank::Settings settings;
  settings.options.stall_check_time = 0s;  // the limit holds without the reports
  settings.options.stall_shutdown_time = 1s;
  run_ranks(
      3,
      [](TestRank& hvd) {
        std::vector<float> memory(4, 1.0f);
        if (hvd.rank() != 1) {
          const Status status = hvd.allreduce("lonely", memory, memory);
          EXPECT_EQ(status.code(), StatusCode::kInternal);
          EXPECT_NE(status.text().find("'lonely' has waited for rank 1 "), std::string::npos) << status.text();
        } else {
          const Status status = hvd.barrier("another");
          EXPECT_NE(status.text().find("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"), std::string::npos) << status.text();
        }
      },
      settings);
}

TEST(Scenario, AnIdleJobSendsNothingAndDoesNotWake) {
  Job job(4);
  job.run([](TestRank& hvd) {
    for (int i = 0; i < 5; ++i) expect_works(hvd, "x");
    ASSERT_TRUE(hvd.barrier("b").ok());
  });
  struct Counts {
    std::int64_t messages, wakeups;
    bool operator==(const Counts&) const = default;
  };
  const auto counts = [&] {
    std::vector<Counts> all;
    for (int rank = 0; rank < job.size(); ++rank) {
      all.push_back(
          {job[rank].runtime().statistics().transport.control_messages_sent.value(), job[rank].loop().wakeups()});
    }
    return all;
  };
  // The last messages of the barrier may still be on their way: idle is what has not changed for a while.
  std::vector<Counts> before = counts();
  const TimePoint deadline = SteadyClock().now() + kLongest;
  bool still = false;
  while (!still && SteadyClock().now() < deadline) {
    std::binary_semaphore nobody(0);
    EXPECT_FALSE(nobody.try_acquire_for(300ms));  // the observation; nothing is awaited
    const std::vector<Counts> after = counts();
    still = after == before;
    before = after;
  }
  EXPECT_TRUE(still) << "an idle job never came to rest";
  job.run([](TestRank& hvd) { expect_works(hvd, "x"); });  // and it wakes when it has to
  job.shut_down();
}

TEST(Scenario, SynchronousWaitersAndHandlesOfOtherThreadsGoTogether) {
  run_ranks(3, [](TestRank& hvd) {
    // Each rank has a thread that waits for each of its operations, one that keeps many in flight, and one that
    // only looks.
    std::atomic<bool> over{false};
    std::vector<float> looked_at(2000, 1.0f);
    const Result<HandleRef> slow = hvd.allreduce_async("looked at", looked_at, looked_at);
    std::jthread looker([&] {
      while (!slow.value()->done() && !over.load()) std::this_thread::yield();
    });
    std::jthread synchronous([&] {
      std::vector<float> memory(10);
      for (int i = 0; i < 300; ++i) {
        std::fill(memory.begin(), memory.end(), 1.0f);
        const Status status = hvd.allreduce("sync", memory, memory);
        ASSERT_TRUE(status.ok()) << status.text();
        ASSERT_EQ(memory[9], 3.0f);
      }
    });
    std::vector<std::vector<float>> memory(20, std::vector<float>(3000));
    for (int round = 0; round < 20; ++round) {
      std::vector<Result<HandleRef>> handles;
      for (std::size_t t = 0; t < memory.size(); ++t) {
        std::fill(memory[t].begin(), memory[t].end(), 1.0f);
        handles.push_back(hvd.allreduce_async(fmt::format("async{}", t), memory[t], memory[t]));
      }
      for (const auto& handle : handles) ASSERT_TRUE(hvd.wait(handle).ok()) << hvd.wait(handle).text();
      for (const auto& values : memory) ASSERT_EQ(values.back(), 3.0f);
    }
    ASSERT_TRUE(hvd.wait(slow).ok());
    over.store(true);
  });
}

TEST(Scenario, SeveralThreadsOfEachRankWaitForOneHandle) {
  run_ranks(2, [](TestRank& hvd) {
    for (int round = 0; round < 50; ++round) {
      std::vector<float> memory(100, 1.0f);
      const Result<HandleRef> handle = hvd.allreduce_async("shared", memory, memory);
      {
        std::vector<std::jthread> waiters;
        for (int i = 0; i < 4; ++i) waiters.emplace_back([&] { EXPECT_TRUE(hvd.wait(handle).ok()); });
      }
      ASSERT_EQ(memory[99], 2.0f);
    }
  });
}

TEST(Scenario, AWaitWithADeadlineEndsAndTheOperationGoesOn) {
  run_ranks(2, [](TestRank& hvd) {
    std::vector<float> memory(4, 1.0f);
    if (hvd.rank() == 0) {
      const Result<HandleRef> handle = hvd.allreduce_async("x", memory, memory);
      EXPECT_FALSE(hvd.loop().wait(*handle.value(), SteadyClock().now() + 20ms));
      ASSERT_TRUE(hvd.barrier("now").ok());
      ASSERT_TRUE(hvd.wait(handle).ok());
    } else {
      ASSERT_TRUE(hvd.barrier("now").ok());
      ASSERT_TRUE(hvd.allreduce("x", memory, memory).ok());
    }
    EXPECT_EQ(memory[0], 2.0f);
  });
}

// ---- the cache
// -------------------------------------------------------------------------------------------------------

TEST(Scenario, RepeatedNamesGoOutAsCacheIds) {
  run_ranks(3, [](TestRank& hvd) {
    expect_works(hvd, "x");
    EXPECT_EQ(hvd.runtime().statistics().cache_hits.value(), 0);
    for (int i = 0; i < 10; ++i) expect_works(hvd, "x");
    EXPECT_EQ(hvd.runtime().statistics().cache_hits.value(), 10);
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(hvd.barrier("b").ok());
    EXPECT_EQ(hvd.runtime().statistics().cache_hits.value(), 12);
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(hvd.barrier("").ok());  // unnamed ones never come again
    EXPECT_EQ(hvd.runtime().statistics().cache_hits.value(), 12);
  });
}

// ---- standing responses
// ---------------------------------------------------------------------------------------------

std::int64_t standing_calls(TestRank& hvd) { return hvd.runtime().statistics().executor.standing_calls.value(); }
std::int64_t withdrawn_calls(TestRank& hvd) {
  return hvd.runtime().statistics().executor.standing_calls_withdrawn.value();
}

TEST(Scenario, WhatIsRepeatedAloneNeedsNoMessagesInTheEnd) {
  for (const int size : {2, 3, 4, 8}) {
    std::latch all_have_counted(size);  // before one of them ends the job, of which there are messages
    run_ranks(size, [&](TestRank& hvd) {
      for (int i = 0; i < 100 && standing_calls(hvd) < 1; ++i) expect_works(hvd, "x");
      ASSERT_EQ(standing_calls(hvd), 1) << "all ranks begin to do without at the same use";
      const std::int64_t before = hvd.runtime().statistics().transport.control_messages_sent.value();
      for (int i = 0; i < 50; ++i) expect_works(hvd, "x");
      EXPECT_EQ(standing_calls(hvd), 51);
      EXPECT_EQ(withdrawn_calls(hvd), 0);
      EXPECT_EQ(hvd.runtime().statistics().transport.control_messages_sent.value(), before);
      all_have_counted.arrive_and_wait();
    });
  }
}

TEST(Scenario, AStandingResponseThatOneRankDiffersFromIsAMismatchOnAllAndTheJobGoesOn) {
  run_ranks(3, [](TestRank& hvd) {
    for (int i = 0; i < 100 && standing_calls(hvd) < 1; ++i) expect_works(hvd, "x");
    ASSERT_EQ(standing_calls(hvd), 1);
    std::vector<float> memory(hvd.rank() == 2 ? 5 : 7, 1.0f);
    const Status status = hvd.allreduce("x", memory, memory);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.text().find("[5]: rank 2"), std::string::npos) << status.text();
    EXPECT_LE(withdrawn_calls(hvd), hvd.rank() == 2 ? 0 : 1);
    EXPECT_EQ(memory[0], 1.0f) << "a call that is withdrawn leaves its tensor as it was";
    for (int i = 0; i < 20; ++i) expect_works(hvd, "x");
  });
}

TEST(Scenario, ARankThatIsLateOrHasMoreToDoEndsAStandingResponse) {
  std::latch withdrawn(2);
  run_ranks(3, [&](TestRank& hvd) {
    for (int i = 0; i < 100 && standing_calls(hvd) < 1; ++i) expect_works(hvd, "x");
    ASSERT_EQ(standing_calls(hvd), 1);
    std::vector<float> late(7, 1.0f);
    if (hvd.rank() == 1) {
      withdrawn.wait();  // the others wait in silence, then ask, and negotiate
      ASSERT_TRUE(hvd.allreduce("x", late, late).ok());
    } else {
      const Result<HandleRef> handle = hvd.allreduce_async("x", late, late);
      const TimePoint end = SteadyClock().now() + kLongest;
      while (withdrawn_calls(hvd) == 0 && SteadyClock().now() < end) {
        EXPECT_FALSE(hvd.loop().wait(*handle.value(), SteadyClock().now() + 5ms));
      }
      withdrawn.count_down();
      ASSERT_TRUE(hvd.wait(handle).ok());
    }
    EXPECT_EQ(late[6], 3.0f);
    EXPECT_EQ(withdrawn_calls(hvd), hvd.rank() == 1 ? 0 : 1);
    std::vector<float> memory(7, 1.0f);
    std::vector<float> other(7, 1.0f);
    const Result<HandleRef> first = hvd.allreduce_async("x", memory, memory);
    const Result<HandleRef> second = hvd.allreduce_async("y", other, other);
    ASSERT_TRUE(hvd.wait(first).ok());
    ASSERT_TRUE(hvd.wait(second).ok());
    EXPECT_EQ(memory[6], 3.0f);
    EXPECT_EQ(other[6], 3.0f);
  });
}

TEST(Scenario, ANameInAStandingCallIsInFlight) {
  run_ranks(2, [](TestRank& hvd) {
    for (int i = 0; i < 100 && standing_calls(hvd) < 1; ++i) expect_works(hvd, "x");
    std::vector<float> memory(7, 1.0f);
    if (hvd.rank() == 0) {
      const Result<HandleRef> first = hvd.allreduce_async("x", memory, memory);
      EXPECT_FALSE(hvd.loop().wait(*first.value(), SteadyClock().now() + 20ms));
      EXPECT_EQ(standing_calls(hvd), 2);
      std::vector<float> again(7, 1.0f);
      EXPECT_EQ(hvd.allreduce("x", again, again).code(), StatusCode::kInvalidArgument);
      ASSERT_TRUE(hvd.barrier("now").ok());
      ASSERT_TRUE(hvd.wait(first).ok());
    } else {
      ASSERT_TRUE(hvd.barrier("now").ok());
      ASSERT_TRUE(hvd.allreduce("x", memory, memory).ok());
    }
    EXPECT_EQ(memory[6], 2.0f);
  });
}

TEST(Scenario, ACacheThatForgetsAllTheTimeChangesNothing) {
  const std::uint64_t seed = seed_of_this_run();
  for (const std::size_t capacity : {std::size_t{0}, std::size_t{1}, std::size_t{2}, std::size_t{5}}) {
    TestRank::Settings settings;
    settings.options.cache_capacity = capacity;
    settings.options.cycle_time = 3ms;
    run_ranks(
        3,
        [seed, capacity](TestRank& hvd) {
          std::mt19937_64 random(seed + static_cast<std::uint64_t>(hvd.rank()));
          constexpr std::size_t names = 8;
          std::vector<std::vector<float>> values(names);
          for (int round = 0; round < 60; ++round) {
            std::vector<std::size_t> order(names);
            std::iota(order.begin(), order.end(), 0);
            std::shuffle(order.begin(), order.end(), random);
            std::vector<Result<HandleRef>> handles;
            for (const std::size_t t : order) {
              // One large tensor keeps a call in flight, so that small ones wait for company.
              values[t].assign(t == 0 ? 200'000 : 10 + t, 1.0f);
              handles.push_back(hvd.allreduce_async(fmt::format("t{}", t), values[t], values[t]));
            }
            for (const auto& handle : handles) {
              const Status status = hvd.wait(handle);
              ASSERT_TRUE(status.ok()) << "capacity " << capacity << ", round " << round << ": " << status.text();
            }
            for (const auto& tensor : values) ASSERT_EQ(tensor.back(), 3.0f);
          }
          if (capacity == 0) {
            EXPECT_EQ(hvd.runtime().statistics().cache_hits.value(), 0);
          }
        },
        settings);
    if (::testing::Test::HasFailure()) return;
  }
}

// ---- stress
// ----------------------------------------------------------------------------------------------------------

TEST(Scenario, ThousandsOfSmallOperationsFromSeveralThreadsOfEachRank) {
  run_ranks(4, [](TestRank& hvd) {
    constexpr int threads = 3;
    constexpr int rounds = 25;
    constexpr int in_flight = 16;
    std::vector<std::jthread> workers;
    for (int thread = 0; thread < threads; ++thread) {
      workers.emplace_back([&hvd, thread] {
        std::vector<std::vector<float>> memory(in_flight, std::vector<float>(5));
        for (int round = 0; round < rounds; ++round) {
          std::vector<Result<HandleRef>> handles;
          for (int i = 0; i < in_flight; ++i) {
            auto& values = memory[static_cast<std::size_t>(i)];
            std::fill(values.begin(), values.end(), static_cast<float>(i));
            handles.push_back(hvd.allreduce_async(fmt::format("{}.{}", thread, i), values, values));
          }
          for (int i = 0; i < in_flight; ++i) {
            const Status status = hvd.wait(handles[static_cast<std::size_t>(i)]);
            ASSERT_TRUE(status.ok()) << status.text();
            ASSERT_EQ(memory[static_cast<std::size_t>(i)][4], 4.0f * static_cast<float>(i));
          }
        }
      });
    }
    workers.clear();
    EXPECT_EQ(hvd.runtime().statistics().executor.operations_done.value(), threads * rounds * in_flight);
  });
}

// ---- nothing delays anything else
// ------------------------------------------------------------------------------------

TEST(Scenario, ALargeReductionHeldAtAStoppedPeerDelaysNeitherAnotherSetNorAnError) {
  // Rank 3 stands still, as a stopped process does, in the middle of its reduction.
  struct StandStill final : FaultHook {
    FaultAction at(FaultPoint point, int /*peer*/) override {
      if (point == FaultPoint::kSegmentReceive && ++passages == 20) {
        reached.count_down();
        go_on.acquire();
      }
      return FaultAction::kPass;
    }
    int passages = 0;
    std::latch reached{1};
    std::binary_semaphore go_on{0};
  } fault;
  Job job(4, [&](int rank) {
    TestRank::Settings settings;
    settings.process_sets = {{0, 1, 2}};
    if (rank == 3) settings.fault = &fault;
    return settings;
  });
  std::vector<std::vector<float>> memory(4, std::vector<float>(16 << 20, 1.0f));
  std::vector<Result<HandleRef>> held;
  for (int rank = 0; rank < 4; ++rank) {
    auto& mine = memory[static_cast<std::size_t>(rank)];
    held.push_back(job[rank].allreduce_async("held", mine, mine));
  }
  fault.reached.wait();
  {
    std::vector<std::jthread> threads;
    for (const int rank : {0, 1, 2}) {
      threads.emplace_back([&job, rank] {
        TestRank& hvd = job[rank];
        for (int round = 0; round < 5; ++round) {
          ASSERT_TRUE(hvd.barrier("b", 1).ok());
          expect_works(hvd, "x", 1);
          std::vector<float> wrong(hvd.rank() == 1 ? 5 : 4);
          EXPECT_EQ(hvd.allreduce("wrong", wrong, wrong, ReduceOp::kSum, 1).text(),
                    "allreduce 'wrong': mismatched shape: [4]: ranks 0,2; [5]: rank 1");
        }
      });
    }
  }
  for (const auto& handle : held) EXPECT_FALSE(handle.value()->done()) << "nothing was held";
  fault.go_on.release();
  for (int rank = 0; rank < 4; ++rank) {
    const Status status = job[rank].wait(held[static_cast<std::size_t>(rank)]);
    EXPECT_TRUE(status.ok()) << status.text();
    EXPECT_EQ(memory[static_cast<std::size_t>(rank)].back(), 4.0f);
  }
  job.shut_down();
}

}  // namespace
}  // namespace hvd::testing
