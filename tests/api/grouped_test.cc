// Grouped collectives of the public C++ headers, on every rank of a job.
#include <gtest/gtest.h>

#include <array>
#include <string>
#include <vector>

#include <horovod_cpp/grouped.h>
#include <horovod_cpp/hvd.h>

namespace {

using hvd::ReduceOp;
using Lists = std::vector<std::vector<double>>;

TEST(Grouped, OnlyWhatLastsMayBeInFlight) {
  static_assert(hvd::MutableGroup<Lists&> && hvd::Group<const Lists&> && !hvd::MutableGroup<const Lists&>);
  static_assert(!hvd::Group<std::vector<std::vector<std::string>>&> && !hvd::Group<std::vector<double>&>);
  static_assert(hvd::detail::LastingGroup<Lists&> && !hvd::detail::LastingGroup<Lists>);
  static_assert(hvd::detail::LastingGroup<std::vector<std::span<double>>>);
}

TEST(Grouped, AllreduceReducesEachRange) {
  Lists lists{{1.0 * hvd::rank()}, std::vector<double>(1000, 2.0), {}, {3.0, hvd::rank() + 1.0}};
  hvd::grouped_allreduce(lists, {.op = ReduceOp::kSum});
  const double ranks = hvd::size();
  EXPECT_EQ(
      lists,
      (Lists{
          {ranks * (ranks - 1) / 2}, std::vector<double>(1000, 2 * ranks), {}, {3 * ranks, ranks * (ranks + 1) / 2}}));
}

TEST(Grouped, SeveralAreInFlight) {
  Lists lists{{1, 2}, {3}};
  std::array<float, 3> single{1, 1, 1};
  hvd::Handle<void> first = hvd::grouped_allreduce_async(lists, {.op = ReduceOp::kSum});
  hvd::Handle<void> second =
      hvd::grouped_allreduce_async(std::vector{std::span(single).first(1), std::span(single).last(1)});
  second.wait();
  first.wait();
  EXPECT_EQ(lists[1][0], 3.0 * hvd::size());
  EXPECT_EQ(single, (std::array<float, 3>{1, 1, 1}));
}

TEST(Grouped, AllgatherAndReducescatterGiveOneOutputForEach) {
  const auto size = static_cast<std::size_t>(hvd::size());
  const std::vector<std::vector<int>> mine{std::vector<int>(static_cast<std::size_t>(hvd::rank()), 7), {hvd::rank()}};
  const hvd::GroupOutput<int> all = hvd::grouped_allgather(mine);
  ASSERT_EQ(all.size(), 2U);
  EXPECT_EQ(all[0].size(), size * (size - 1) / 2);
  EXPECT_EQ(all[1].size(), size);
  EXPECT_EQ(all[1].back(), hvd::size() - 1);

  const Lists lists{std::vector<double>(2 * size, 1.0), std::vector<double>(size, 2.0)};
  const auto shares = hvd::grouped_reducescatter_async(lists, {.op = ReduceOp::kSum}).wait();
  ASSERT_EQ(shares.size(), 2U);
  EXPECT_EQ(shares[0].size(), 2U);
  EXPECT_EQ(shares[1].size(), 1U);
  for (const std::span<double> share : shares) {
    EXPECT_EQ(share[0], static_cast<double>(hvd::size()) * (share.size() == 1 ? 2 : 1));
  }
}

TEST(Grouped, OneThatDiffersFailsThemAllOnAllRanks) {
  EXPECT_THROW(hvd::grouped_allreduce(Lists()), hvd::InvalidArgument);
  if (hvd::size() == 1) GTEST_SKIP() << "one rank always agrees";
  Lists lists{{1.0}, std::vector<double>(2 + static_cast<std::size_t>(hvd::rank()), 1.0)};
  try {
    hvd::grouped_allreduce(lists, {.op = ReduceOp::kSum, .name = "group"});
    FAIL() << "shapes differ";
  } catch (const hvd::InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("'group'"), std::string::npos) << error.what();
  }
  EXPECT_EQ(lists[0][0], 1.0) << "none is reduced";
  Lists counts(hvd::rank() == 0 ? 1 : 2, {1.0});
  EXPECT_THROW(hvd::grouped_allreduce(counts), hvd::InvalidArgument);
  EXPECT_EQ(hvd::allreduce(1, {.op = ReduceOp::kSum}), hvd::size());
}

}  // namespace
