// How a set lies on hosts, and collectives of its parts within one call.

#include "ops/hierarchy.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <numeric>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "ops/host_backend.h"
#include "tests/ops/algorithms/stepped_ranks.h"

namespace hvd::testing {
namespace {

Membership membership_on(const std::vector<int>& hosts) {
  Membership membership;
  membership.ranks.resize(hosts.size());
  std::iota(membership.ranks.begin(), membership.ranks.end(), 0);
  membership.hosts = hosts;
  return membership;
}

TEST(Hierarchy, IsThereWhereSeveralHostsHaveEquallyManyRanksMoreThanOne) {
  for (const std::vector<int>& hosts : std::vector<std::vector<int>>{
           {0, 0, 1, 1}, {0, 0, 0, 1, 1, 1}, {0, 0, 1, 1, 2, 2}, {0, 1, 0, 1}, {7, 3, 3, 7}}) {
    EXPECT_TRUE(has_hierarchy(membership_on(hosts)));
  }
  for (const std::vector<int>& hosts :
       std::vector<std::vector<int>>{{0}, {0, 0, 0, 0}, {0, 1, 2, 3}, {0, 0, 0, 1, 1}, {0, 0, 1}}) {
    EXPECT_FALSE(has_hierarchy(membership_on(hosts)));
  }
}

TEST(Hierarchy, HasTheRanksOfAHostAndThoseOfAPlace) {
  const Membership set{5, {10, 12, 14, 16, 18, 20}, {4, 9, 4, 9, 9, 4}};
  const std::vector<std::vector<int>> local{{10, 14, 20}, {12, 16, 18}, {10, 14, 20},
                                            {12, 16, 18}, {12, 16, 18}, {10, 14, 20}};
  const std::vector<std::vector<int>> cross{{10, 12}, {10, 12}, {14, 16}, {14, 16}, {18, 20}, {18, 20}};
  for (int rank = 0; rank < set.size(); ++rank) {
    const Hierarchy hierarchy = hierarchy_of(set, rank);
    EXPECT_EQ(hierarchy.local->ranks, local[static_cast<std::size_t>(rank)]);
    EXPECT_EQ(hierarchy.cross->ranks, cross[static_cast<std::size_t>(rank)]);
    EXPECT_TRUE(hierarchy.local->on_one_host());
    EXPECT_FALSE(hierarchy.cross->on_one_host());
    EXPECT_EQ(hierarchy.cross->generation, 5u);
  }
}

Task<Status> add_up(CollectiveContext& context, std::int64_t* value) {
  AllreduceCall call;
  call.dtype = DataType::kInt64;
  auto* const place = reinterpret_cast<std::byte*>(value);
  call.tensors.push_back({place, place, 1});
  const std::span<std::byte> no_fusion;
  return host_allreduce(context, std::move(call), no_fusion);
}

// Parts and the whole in turns: were messages counted wrongly, some would find no receiver.
Task<Status> add_up_by_parts(CollectiveContext& context, Hierarchy hierarchy, std::int64_t* values) {
  HVD_CO_RETURN_IF_ERROR(co_await add_up(context, &values[0]));
  for (int round = 0; round < 2; ++round) {
    {
      const CollectiveContext::Part local(context, hierarchy.local);
      EXPECT_EQ(context.size(), hierarchy.local->size());
      HVD_CO_RETURN_IF_ERROR(co_await add_up(context, &values[1]));
    }
    {
      const CollectiveContext::Part cross(context, hierarchy.cross);
      HVD_CO_RETURN_IF_ERROR(co_await add_up(context, &values[2]));
    }
    HVD_CO_RETURN_IF_ERROR(co_await add_up(context, &values[3]));
  }
  co_return Status();
}

TEST(Parts, OfOneCallHaveCollectivesOfTheirOwn) {
  std::mt19937_64 random = generator_of_this_run();
  for (const std::vector<int>& hosts :
       std::vector<std::vector<int>>{{0, 0, 1, 1}, {0, 1, 0, 1}, {0, 0, 1, 1, 2, 2}, {1, 0, 0, 1, 1, 0}}) {
    const auto size = static_cast<std::int64_t>(hosts.size());
    const Membership set = membership_on(hosts);
    SteppedRanks ranks(static_cast<int>(size), random, {});
    std::vector<std::array<std::int64_t, 4>> values(hosts.size());
    for (std::size_t i = 0; i < values.size(); ++i) values[i].fill(static_cast<std::int64_t>(1) << (4 * i));
    const std::vector<Status> ends = ranks.run([&](CollectiveContext& context, int rank) {
      return add_up_by_parts(context, hierarchy_of(set, rank), values[static_cast<std::size_t>(rank)].data());
    });
    std::int64_t all = 0;
    for (std::int64_t i = 0; i < size; ++i) all += static_cast<std::int64_t>(1) << (4 * i);
    for (int rank = 0; rank < size; ++rank) {
      const auto index = static_cast<std::size_t>(rank);
      ASSERT_TRUE(ends[index].ok()) << ends[index].text();
      const auto twice = [](const Membership& part) {  // the second time, each has what the first one gave
        std::int64_t sum = 0;
        for (const int one : part.ranks) sum += static_cast<std::int64_t>(1) << (4 * one);
        return sum * part.size();
      };
      const Hierarchy hierarchy = hierarchy_of(set, rank);
      EXPECT_EQ(values[index][0], all);
      EXPECT_EQ(values[index][1], twice(*hierarchy.local));
      EXPECT_EQ(values[index][2], twice(*hierarchy.cross));
      EXPECT_EQ(values[index][3], all * size);
    }
  }
}

}  // namespace
}  // namespace hvd::testing
