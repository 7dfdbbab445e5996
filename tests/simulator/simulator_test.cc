// The simulator itself: it replays, and it sees what it is there to see.

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "common/log.h"
#include "tests/simulator/world.h"

namespace hvd::simulator {
namespace {

constexpr ScenarioLimits kFewRanks{2, 8, false};

Report run(const Scenario& scenario) { return simulate(scenario, /*print_trace=*/false); }

class Simulator : public ::testing::Test {
 protected:
  void SetUp() override { log::configure(log::Level::kFatal, /*hide_time=*/true, /*rank=*/0, /*size=*/1); }
};

TEST_F(Simulator, ASeedReplaysBitForBit) {
  for (std::uint64_t seed = 100; seed < 140; ++seed) {
    const Report first = run(draw_scenario(seed, kFewRanks));
    const Report second = run(draw_scenario(seed, kFewRanks));
    EXPECT_TRUE(first.ok()) << "seed " << seed << ": " << first.invariant << ": " << first.text;
    EXPECT_EQ(first.trace_hash, second.trace_hash) << "seed " << seed;
    EXPECT_EQ(first.counts.events, second.counts.events) << "seed " << seed;
  }
}

TEST_F(Simulator, DifferentSeedsAreDifferentJobs) {
  std::set<std::uint64_t> hashes;
  for (std::uint64_t seed = 0; seed < 200; ++seed) hashes.insert(run(draw_scenario(seed, kFewRanks)).trace_hash);
  EXPECT_EQ(hashes.size(), 200u);
}

TEST_F(Simulator, AThousandSeedsMeetEverythingThatIsDrawn) {
  Counts sum;
  std::map<OpKind, int> operations;
  int groups = 0;
  int without_joined = 0;
  int in_other_order = 0;
  for (std::uint64_t seed = 0; seed < 1000; ++seed) {
    const Scenario scenario = draw_scenario(seed, kFewRanks);
    for (const OperationPlan& plan : scenario.operations) {
      ++operations[plan.op];
      if (!plan.more.empty()) ++groups;
      if (plan.layout != 0 && plan.shape.size() > 1 && !plan.layouts_differ) ++in_other_order;
      const std::size_t present = scenario.present(plan).size();
      if (present > 0 && present < scenario.sets[static_cast<std::size_t>(plan.slot)].ranks.size()) ++without_joined;
    }
    const Report report = run(scenario);
    ASSERT_TRUE(report.ok()) << "seed " << seed << ": " << report.invariant << ": " << report.text;
    sum.fused_calls += report.counts.fused_calls;
    sum.cache_hits += report.counts.cache_hits;
    sum.evictions += report.counts.evictions;
    sum.standing_calls += report.counts.standing_calls;
    sum.withdrawn_calls += report.counts.withdrawn_calls;
    sum.errors += report.counts.errors;
    sum.bytes_reordered += report.counts.bytes_reordered;
    sum.deaths += report.counts.deaths;
    sum.faults += report.counts.faults;
  }
  EXPECT_EQ(operations.size(), 9u) << "every operation";
  for (const auto& [op, count] : operations) EXPECT_GT(count, 100) << name_of(op);
  EXPECT_GT(groups, 300);
  EXPECT_GT(without_joined, 300);
  EXPECT_GT(in_other_order, 300);
  EXPECT_GT(sum.fused_calls, 300);
  EXPECT_GT(sum.cache_hits, 3000);
  EXPECT_GT(sum.evictions, 3000);
  EXPECT_GT(sum.standing_calls, 1000);
  EXPECT_GT(sum.withdrawn_calls, 100);
  EXPECT_GT(sum.errors, 3000);
  EXPECT_GT(sum.bytes_reordered, 30000);
  EXPECT_GT(sum.deaths, 50);
  EXPECT_GT(sum.faults, 30);
}

// There a flipped bit may be in a count of rows, and then messages no longer fit.
bool has_alltoall(const Scenario& scenario) {
  return std::any_of(scenario.operations.begin(), scenario.operations.end(),
                     [](const OperationPlan& plan) { return plan.op == OpKind::kAlltoall; });
}

// The first broken invariants that a sabotage leads to, over seeds in which nothing else goes wrong.
std::set<std::string> broken_by(Sabotage::Kind kind) {
  std::set<std::string> broken;
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    Scenario scenario = draw_scenario(seed, kFewRanks);
    if (!scenario.is_undisturbed()) continue;
    if (kind == Sabotage::Kind::kFlipDataBit && has_alltoall(scenario)) continue;
    scenario.sabotage = {kind, 5 + seed % 7};
    const Report report = run(scenario);
    if (!report.ok()) broken.insert(report.invariant);
  }
  return broken;
}

TEST_F(Simulator, AFlippedBitIsAWrongSum) {
  EXPECT_EQ(broken_by(Sabotage::Kind::kFlipDataBit), std::set<std::string>{std::string(invariant::kRightSum)});
}

TEST_F(Simulator, ALostPieceIsAnEndlessWait) {
  EXPECT_TRUE(broken_by(Sabotage::Kind::kLosePiece).contains(std::string(invariant::kNoEndlessWait)));
}

TEST_F(Simulator, ALostControlMessageIsAnEndlessWait) {
  EXPECT_TRUE(broken_by(Sabotage::Kind::kLoseControl).contains(std::string(invariant::kNoEndlessWait)));
}

TEST_F(Simulator, ControlMessagesOutOfOrderAreAnotherSequence) {
  EXPECT_TRUE(broken_by(Sabotage::Kind::kSwapControl).contains(std::string(invariant::kSameSequence)));
}

TEST_F(Simulator, EndsThatDoNotBelongToTheScenarioAreSeen) {
  // Without a job: a mismatch that ended well, a sum that is wrong, an error without a cause.
  Scenario scenario = draw_scenario(1, kFewRanks);
  scenario.operations.resize(1);
  OperationPlan& plan = scenario.operations.front();
  plan = {};
  plan.name = "w";
  plan.dtype = DataType::kInt32;
  plan.shape = {1};
  plan.odd = OperationPlan::Odd::kShape;
  plan.odd_rank = 1;
  HandleState handle;
  handle.complete({});
  {
    Checker checker;
    Ends(scenario, checker).on_resolved(0, 0, handle, std::vector<std::byte>(4));
    EXPECT_EQ(checker.invariant(), invariant::kErrorEverywhere);
  }
  plan.odd = OperationPlan::Odd::kNothing;
  {
    Checker checker;
    Ends(scenario, checker).on_resolved(0, 0, handle, std::vector<std::byte>(4, std::byte{0x77}));
    EXPECT_EQ(checker.invariant(), invariant::kRightSum);
  }
  {
    Checker checker;
    HandleState failed;
    failed.complete(Status::internal("out of the blue"));
    Ends(scenario, checker).on_resolved(0, 0, failed, {});
    EXPECT_EQ(checker.invariant(), invariant::kExpectedEnd);
  }
}

}  // namespace
}  // namespace hvd::simulator
