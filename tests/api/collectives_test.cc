// The collectives of the public C++ headers, on every rank of a job.
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <complex>
#include <cstdint>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <horovod_cpp/collectives.h>
#include <horovod_cpp/hvd.h>

namespace {

using hvd::ReduceOp;
using namespace std::chrono_literals;

int sum_of_ranks() { return hvd::size() * (hvd::size() - 1) / 2; }

TEST(Collectives, OnlyElementsThatTravelAreTaken) {
  static_assert(hvd::Element<float> && hvd::Element<bool> && hvd::Element<std::byte> && hvd::Element<long long>);
  static_assert(hvd::Element<std::complex<float>> && !hvd::Element<std::complex<long double>>);
  static_assert(!hvd::Element<unsigned> && !hvd::Element<std::string> && !hvd::Element<long double>);
  static_assert(hvd::MutableElements<std::vector<double>&> && !hvd::MutableElements<const std::vector<double>&>);
  static_assert(!hvd::Elements<std::vector<bool>>);  // packs its elements
  static_assert(std::is_nothrow_move_constructible_v<hvd::Handle<void>> &&
                !std::is_copy_constructible_v<hvd::Handle<void>>);
}

template <typename T>
class CollectivesOf : public testing::Test {};
using Types = testing::Types<std::uint8_t, std::int8_t, std::int16_t, std::int32_t, long, long long, float, double>;
TYPED_TEST_SUITE(CollectivesOf, Types);

TYPED_TEST(CollectivesOf, AllreduceSums) {
  std::vector<TypeParam> data(1000, static_cast<TypeParam>(hvd::rank() + 1));
  hvd::allreduce(data, {.op = ReduceOp::kSum});
  EXPECT_EQ(data, std::vector<TypeParam>(1000, static_cast<TypeParam>(sum_of_ranks() + hvd::size())));
}

TEST(Collectives, ComplexNumbersAreElements) {
  const auto ranks = static_cast<double>(hvd::size());
  std::vector<std::complex<double>> data(1000, {1.0, -2.0});
  hvd::allreduce(data, {.op = ReduceOp::kSum});
  EXPECT_EQ(data, std::vector<std::complex<double>>(1000, {ranks, -2.0 * ranks}));
  const std::vector<std::complex<float>> mine(static_cast<std::size_t>(hvd::rank() + 1), {3.0F, 4.0F});
  const auto gathered = hvd::allgather(mine);
  ASSERT_EQ(gathered.size(), static_cast<std::size_t>(sum_of_ranks() + hvd::size()));
  EXPECT_EQ(gathered[gathered.size() - 1], (std::complex<float>{3.0F, 4.0F}));
  EXPECT_THROW(hvd::allreduce(data, {.op = ReduceOp::kMax}), hvd::InvalidArgument);
  if (hvd::size() == 1) return;
  std::vector<double> parts(2000);
  const auto mismatched = [&] {
    if (hvd::rank() == 0) return hvd::allreduce(parts, {.name = "complex"});
    hvd::allreduce(data, {.name = "complex"});
  };
  try {
    mismatched();
    FAIL() << "their memory is equal, their meaning is not";
  } catch (const hvd::InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("float64: rank 0"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("complex128: rank"), std::string::npos) << error.what();
  }
}

TEST(Collectives, AllreduceAveragesUnlessToldOtherwise) {
  EXPECT_DOUBLE_EQ(hvd::allreduce(double(hvd::rank())), (hvd::size() - 1) / 2.0);
  EXPECT_EQ(hvd::allreduce(hvd::rank(), {.op = ReduceOp::kMax}), hvd::size() - 1);
  EXPECT_EQ(hvd::allreduce(hvd::rank() == 0, {.op = ReduceOp::kMin}), hvd::size() == 1);
  EXPECT_DOUBLE_EQ(hvd::allreduce(1.0, {.op = ReduceOp::kSum, .prescale = 0.5, .postscale = 4.0}), 2.0 * hvd::size());
}

TEST(Collectives, AllreduceLeavesItsInputAlone) {
  const std::array<float, 3> input{1, 2, 3};
  std::array<float, 3> output{};
  hvd::allreduce(input, output, {.op = ReduceOp::kSum});
  const auto ranks = static_cast<float>(hvd::size());
  EXPECT_EQ(output, (std::array{ranks, 2 * ranks, 3 * ranks}));
  EXPECT_EQ(input, (std::array<float, 3>{1, 2, 3}));
}

TEST(Collectives, ManyAreInFlightAtOnceInAnyOrder) {
  constexpr int kCount = 50;
  std::vector<std::vector<double>> data;
  std::vector<hvd::Handle<void>> handles(kCount);
  for (int i = 0; i < kCount; ++i) data.emplace_back(1 + 37 * i, i + hvd::rank());
  for (int k = 0; k < kCount; ++k) {
    const int i = hvd::rank() % 2 == 0 ? k : kCount - 1 - k;
    handles[i] = hvd::allreduce_async(data[i], {.op = ReduceOp::kSum, .name = "many." + std::to_string(i)});
  }
  hvd::wait_all(std::span(handles));
  for (int i = 0; i < kCount; ++i) {
    EXPECT_TRUE(handles[i].done());
    handles[i].wait();
    EXPECT_FALSE(handles[i].valid());
    EXPECT_DOUBLE_EQ(data[i].front(), i * hvd::size() + sum_of_ranks());
    EXPECT_DOUBLE_EQ(data[i].back(), data[i].front());
  }
}

TEST(Collectives, AllgatherTakesUnevenSizes) {
  const std::vector<std::int32_t> mine(static_cast<std::size_t>(hvd::rank()), hvd::rank());
  const hvd::Output<std::int32_t> all = hvd::allgather(mine);
  std::vector<std::int32_t> expected;
  for (int rank = 0; rank < hvd::size(); ++rank) expected.insert(expected.end(), static_cast<std::size_t>(rank), rank);
  EXPECT_EQ(std::vector(all.begin(), all.end()), expected);
  const auto ranks = hvd::allgather(hvd::rank());
  EXPECT_EQ(ranks.size(), static_cast<std::size_t>(hvd::size()));
  EXPECT_EQ(ranks[ranks.size() - 1], hvd::size() - 1);
}

TEST(Collectives, AnOutputOutlivesItsHandle) {
  std::vector<float> mine(3, static_cast<float>(hvd::rank()));
  hvd::Handle<hvd::Output<float>> handle = hvd::allgather_async(mine);
  hvd::Output<float> output = handle.wait();
  handle = {};
  const hvd::Output<float> moved = std::move(output);
  moved[0] += 1;
  EXPECT_EQ(moved[0], 1.0F);
  EXPECT_EQ(moved.elements().back(), static_cast<float>(hvd::size() - 1));
}

TEST(Collectives, BroadcastOverwritesWithTheRoots) {
  const int root = hvd::size() - 1;
  std::vector<std::int64_t> data(5, hvd::rank());
  hvd::broadcast(data, root);
  EXPECT_EQ(data, std::vector<std::int64_t>(5, root));
  EXPECT_EQ(hvd::broadcast(hvd::rank() + 10, 0), 10);
  hvd::broadcast_async(std::span(data).first(1), 0).wait();
}

TEST(Collectives, ReducescatterGivesEachRankItsShare) {
  const auto size = static_cast<std::size_t>(hvd::size());
  std::vector<float> data(2 * size + 1, 1.0F);
  const auto mine = hvd::reducescatter(data, {.op = ReduceOp::kSum});
  EXPECT_EQ(mine.size(), hvd::rank() == 0 ? 3U : 2U);
  for (const float element : mine) EXPECT_EQ(element, static_cast<float>(size));
}

TEST(Collectives, AlltoallExchangesShares) {
  const auto size = static_cast<std::size_t>(hvd::size());
  std::vector<std::int32_t> data(size);
  for (std::size_t i = 0; i < size; ++i) data[i] = 10 * hvd::rank() + static_cast<int>(i);
  const auto even = hvd::alltoall(data);
  for (std::size_t i = 0; i < size; ++i) EXPECT_EQ(even[i], 10 * static_cast<int>(i) + hvd::rank());

  // Rank r sends r elements to each rank.
  const std::vector<std::int64_t> splits(size, hvd::rank());
  const std::vector<std::int32_t> rows(size * static_cast<std::size_t>(hvd::rank()), hvd::rank());
  const auto uneven = hvd::alltoall(rows, splits, {.name = "uneven"});
  EXPECT_EQ(uneven.size(), static_cast<std::size_t>(sum_of_ranks()));
  ASSERT_EQ(uneven.received_splits().size(), size);
  for (std::size_t i = 0; i < size; ++i) EXPECT_EQ(uneven.received_splits()[i], static_cast<std::int64_t>(i));
}

TEST(Collectives, EmptyMemoryIsFine) {
  std::vector<float> nothing;
  hvd::allreduce(nothing);
  EXPECT_EQ(hvd::allgather(nothing).size(), 0U);
}

TEST(Collectives, JoinStandsInForRanksWithoutData) {
  for (int turn = 0; turn < hvd::rank(); ++turn) {
    EXPECT_EQ(hvd::allreduce(1, {.op = ReduceOp::kSum}), hvd::size() - 1 - turn);
  }
  EXPECT_EQ(hvd::join(), hvd::size() - 1);
}

TEST(Collectives, AWaitMayHaveALimit) {
  hvd::Handle<void> handle;
  if (hvd::size() > 1 && hvd::rank() == 0) {
    handle = hvd::barrier_async({.name = "late"});
    EXPECT_FALSE(handle.wait_for(5ms));
    EXPECT_FALSE(handle.done());
  }
  hvd::barrier();  // of its own: unnamed
  if (!handle.valid()) handle = hvd::barrier_async({.name = "late"});
  while (!handle.wait_for(1s)) {
  }
  handle.wait();
  EXPECT_THROW(handle.wait(), hvd::PreconditionError);
  EXPECT_THROW(static_cast<void>(handle.done()), hvd::PreconditionError);
}

TEST(Collectives, RanksThatDisagreeGetAnErrorAndGoOn) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank always agrees";
  std::vector<float> data(static_cast<std::size_t>(2 + hvd::rank()));
  hvd::Handle<void> handle = hvd::allreduce_async(data, {.name = "shapes"});
  try {
    handle.wait();
    FAIL() << "shapes differ";
  } catch (const hvd::InvalidArgument& error) {
    const std::string text = error.what();
    EXPECT_EQ(error.rank(), hvd::rank());
    EXPECT_EQ(error.operation(), "allreduce 'shapes'");
    EXPECT_NE(text.find("'shapes'"), std::string::npos) << text;
    EXPECT_NE(text.find("collectives_test.cc:"), std::string::npos) << text;
  }
  EXPECT_EQ(hvd::allreduce(1, {.op = ReduceOp::kSum}), hvd::size());
}

TEST(Collectives, MistakesOfTheCallerThrowAtOnce) {
  const std::vector<float> input(3);
  std::vector<float> output(2);
  EXPECT_THROW(hvd::allreduce(input, output), hvd::InvalidArgument);
  output.clear();
  EXPECT_THROW(hvd::allreduce(input, output), hvd::InvalidArgument);
  EXPECT_THROW(static_cast<void>(hvd::broadcast(1, hvd::size())), hvd::InvalidArgument);
  EXPECT_THROW(hvd::barrier({.process_set = hvd::ProcessSet(99)}), hvd::Error);
  EXPECT_THROW(hvd::barrier({.name = std::string("a\0b", 3)}), hvd::InvalidArgument);
}

TEST(Collectives, ADroppedHandleWaits) {
  std::vector<float> data(100'000, 1.0F);
  {
    const auto dropped = hvd::allreduce_async(data, {.op = ReduceOp::kSum});
  }
  EXPECT_EQ(data.back(), static_cast<float>(hvd::size()));
}

TEST(Collectives, ThreadsShareAJob) {
  std::vector<std::jthread> threads;
  for (int thread = 0; thread < 3; ++thread) {
    threads.emplace_back([thread] {
      for (int turn = 0; turn < 20; ++turn) {
        const std::string name = "thread." + std::to_string(thread);
        EXPECT_EQ(hvd::allreduce(thread + turn, {.op = ReduceOp::kSum, .name = name}), (thread + turn) * hvd::size());
      }
    });
  }
}

}  // namespace
