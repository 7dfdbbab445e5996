// Lifecycle, topology and process sets through the public C++ headers.
#include <gtest/gtest.h>

#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include <horovod_cpp/collectives.h>
#include <horovod_cpp/hvd.h>

namespace {

TEST(Lifecycle, KnowsItsPlace) {
  EXPECT_TRUE(hvd::is_initialized());
  EXPECT_GE(hvd::rank(), 0);
  EXPECT_LT(hvd::rank(), hvd::size());
  EXPECT_EQ(hvd::local_rank(), hvd::rank());  // the tests run on one host
  EXPECT_EQ(hvd::local_size(), hvd::size());
  EXPECT_EQ(hvd::cross_rank(), 0);
  EXPECT_EQ(hvd::cross_size(), 1);
  EXPECT_TRUE(hvd::is_homogeneous());
  EXPECT_FALSE(hvd::version().empty());
}

TEST(Lifecycle, ASecondSessionLeavesTheJobAlone) {
  {
    const hvd::Session inner;
  }
  EXPECT_TRUE(hvd::is_initialized());
}

TEST(Lifecycle, ProcessSetZeroHasAllRanks) {
  const hvd::ProcessSet all;
  std::vector<int> expected(static_cast<std::size_t>(hvd::size()));
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(all.ranks(), expected);
  EXPECT_EQ(all.rank(), hvd::rank());
  EXPECT_EQ(hvd::process_sets().front(), all);
}

TEST(Lifecycle, ProcessSetsComeAndGo) {
  if (hvd::size() == 1) GTEST_SKIP() << "a set of one rank is set 0";
  const int last = hvd::size() - 1;
  const hvd::ProcessSet set = hvd::add_process_set(std::vector{last});
  EXPECT_EQ(set.size(), 1);
  EXPECT_EQ(set.included(), hvd::rank() == last);
  EXPECT_EQ(hvd::process_sets().size(), 2U);
  if (set.included()) {
    EXPECT_EQ(hvd::allreduce(7, {.op = hvd::ReduceOp::kSum, .process_set = set}), 7);
  } else {
    EXPECT_THROW(static_cast<void>(hvd::allreduce(7, {.process_set = set})), hvd::PreconditionError);
  }
  hvd::remove_process_set(set);
  EXPECT_EQ(hvd::process_sets().size(), 1U);
  EXPECT_THROW(static_cast<void>(set.size()), hvd::InvalidArgument);
}

TEST(Lifecycle, ErrorsNameRankOperationAndCallSite) {
  try {
    hvd::remove_process_set(hvd::ProcessSet());
    FAIL() << "set 0 stays";
  } catch (const hvd::Error& error) {
    EXPECT_EQ(error.rank(), hvd::rank());
    EXPECT_EQ(error.operation(), "remove_process_set");
    const std::string text = error.what();
    EXPECT_EQ(text.rfind("rank " + std::to_string(hvd::rank()) + ": ", 0), 0U) << text;
    EXPECT_NE(text.find("lifecycle_test.cc:"), std::string::npos) << text;
  }
}

// The last test: what was in flight is over.
TEST(LifecycleEnd, TheJobEndsAndBeginsAgain) {
  const int ranks = hvd::size();
  hvd::barrier();
  hvd::shutdown();
  EXPECT_FALSE(hvd::is_initialized());
  EXPECT_THROW(static_cast<void>(hvd::rank()), hvd::PreconditionError);
  try {
    hvd::barrier();
    FAIL() << "there is no job";
  } catch (const hvd::PreconditionError& error) {
    EXPECT_EQ(error.rank(), -1);
    EXPECT_EQ(error.code(), hvd::StatusCode::kPrecondition);
  }
  hvd::InitOptions options;
  if (ranks > 1) options.process_sets = {{0}};
  hvd::init(options);
  EXPECT_EQ(hvd::allreduce(1, {.op = hvd::ReduceOp::kSum}), ranks);
  EXPECT_EQ(hvd::process_sets().back().ranks(), std::vector{0});
}

}  // namespace
