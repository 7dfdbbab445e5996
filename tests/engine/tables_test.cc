// The parts of negotiation that are values and pure functions: op rules, agreement, readiness, the response cache,
// fusion, the table of process sets.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "horovod_cpp/engine/agreement.h"
#include "horovod_cpp/engine/fusion_planner.h"
#include "horovod_cpp/engine/process_set_table.h"

namespace hvd::testing {
namespace {

using namespace std::chrono_literals;

MembershipRef members(std::vector<int> ranks) {
  auto membership = std::make_shared<Membership>();
  membership->hosts.assign(ranks.size(), 0);
  membership->ranks = std::move(ranks);
  return membership;
}

Request request_of(OpKind op, const std::string& name, Shape shape = {4}) {
  Request request;
  request.key = {0, op, name};
  request.dtype = DataType::kFloat32;
  request.shape = std::move(shape);
  return request;
}

// ---- op rules
// --------------------------------------------------------------------------------------------------------

TEST(OpRules, EveryOperationHasItsOwn) {
  for (int op = 0; op < 9; ++op) {
    const OpRule* rule = find_op_rule(static_cast<OpKind>(op));
    ASSERT_NE(rule, nullptr) << op;
    EXPECT_EQ(rule->op, static_cast<OpKind>(op));
  }
  EXPECT_EQ(find_op_rule(static_cast<OpKind>(9)), nullptr);
  EXPECT_EQ(find_op_rule(static_cast<OpKind>(255)), nullptr);
  EXPECT_TRUE(find_op_rule(OpKind::kAllreduce)->fusible);
  EXPECT_FALSE(find_op_rule(OpKind::kProcessSetAdd)->cacheable);
}

TEST(OpRules, CheckWhatARankCanKnowByItself) {
  const Membership all{0, {0, 1, 2}, {0, 0, 0}};
  const auto check = [&](const Request& request) { return find_op_rule(request.key.op)->check(request, all); };
  EXPECT_TRUE(check(request_of(OpKind::kAllreduce, "x")).ok());
  Request bad = request_of(OpKind::kAllreduce, "x");
  bad.dtype = static_cast<DataType>(2);
  EXPECT_EQ(check(bad).code(), StatusCode::kInvalidArgument);
  bad = request_of(OpKind::kAllreduce, "x", {-1});
  EXPECT_FALSE(check(bad).ok());
  bad = request_of(OpKind::kAllreduce, "x");
  bad.reduce_op = static_cast<ReduceOp>(9);
  EXPECT_FALSE(check(bad).ok());
  bad.reduce_op = ReduceOp::kAdasum;
  EXPECT_TRUE(check(bad).ok()) << "of floating-point numbers";
  bad.dtype = DataType::kInt32;
  EXPECT_NE(check(bad).text().find("Adasum"), std::string::npos);
  EXPECT_TRUE(check(request_of(OpKind::kAllgather, "x", {})).ok()) << "the others have to hear of a scalar, too";
  EXPECT_FALSE(check(request_of(OpKind::kAlltoall, "x", {})).ok()) << "a scalar";
  bad = request_of(OpKind::kReducescatter, "x", {2});
  bad.is_complex = true;
  EXPECT_FALSE(check(bad).ok()) << "a scalar, of two parts";
  bad.shape = {1, 2};
  EXPECT_TRUE(check(bad).ok());
  bad = request_of(OpKind::kBroadcast, "x");
  bad.root_rank = 3;
  EXPECT_FALSE(check(bad).ok());
  EXPECT_TRUE(check(request_of(OpKind::kBarrier, "x", {})).ok());
  EXPECT_TRUE(check(request_of(OpKind::kProcessSetAdd, "x", {0, 2})).ok());
  for (const Shape& ranks : std::vector<Shape>{{}, {2, 0}, {1, 1}, {-1}, {3}}) {
    EXPECT_FALSE(check(request_of(OpKind::kProcessSetAdd, "x", ranks)).ok()) << shape_text(ranks);
  }
  EXPECT_FALSE(check(request_of(OpKind::kProcessSetRemove, "x", {0})).ok());
  EXPECT_TRUE(check(request_of(OpKind::kProcessSetRemove, "x", {3})).ok());
}

// ---- agreement
// -------------------------------------------------------------------------------------------------------

std::string no_site(int /*rank*/, std::uint32_t /*site*/) { return {}; }

Agreement agree_on(const std::vector<Request>& requests, const MembershipRef& membership,
                   const CallSiteText& sites = no_site) {
  ReadinessTable table;
  // Asked for from the last to the first: the order of arrival does not matter.
  for (std::size_t i = requests.size(); i-- > 0;) {
    EXPECT_TRUE(table.add_full(membership, static_cast<int>(i), requests[i], TimePoint{}));
  }
  return agree(requests.front().key, table.take(requests.front().key), ResponseCache(), sites);
}

TEST(Agreement, OfEqualRequestsIsAnExecution) {
  Request request = request_of(OpKind::kAllreduce, "x", {2, 3});
  request.reduce_op = ReduceOp::kMin;
  request.prescale = 0.5;
  const Agreement agreement = agree_on({request, request, request}, members({0, 1, 2}));
  EXPECT_EQ(agreement.response.kind, Response::Kind::kExecute);
  EXPECT_EQ(agreement.response.reduce_op, ReduceOp::kMin);
  EXPECT_EQ(agreement.response.prescale, 0.5);
  ASSERT_EQ(agreement.response.entries.size(), 1u);
  EXPECT_EQ(agreement.response.entries[0].name, "x");
  EXPECT_EQ(agreement.response.entries[0].shape, (Shape{2, 3}));
  EXPECT_EQ(agreement.repeated, 0u);
}

TEST(Agreement, OfDifferentRowsIsAGatherWithTheRowsOfEachRank) {
  const Agreement agreement =
      agree_on({request_of(OpKind::kAllgather, "g", {1, 5}), request_of(OpKind::kAllgather, "g", {0, 5}),
                request_of(OpKind::kAllgather, "g", {7, 5})},
               members({0, 1, 2}));
  EXPECT_EQ(agreement.response.kind, Response::Kind::kExecute) << agreement.response.error;
  EXPECT_EQ(agreement.response.entries[0].first_dims, (std::vector<std::int64_t>{1, 0, 7}));
}

TEST(Agreement, OnAGatherOfScalarsIsAnErrorAlsoWhereAllRanksBringThem) {
  const Request rows = request_of(OpKind::kAllgather, "g", {1});
  const Request scalar = request_of(OpKind::kAllgather, "g", {});
  Request of_two_parts = request_of(OpKind::kAllgather, "g", {2});
  of_two_parts.is_complex = true;
  Request second_of_two = rows;
  second_of_two.more = {{DataType::kInt8, {}, 0}};
  for (const Request& one : {scalar, of_two_parts, second_of_two}) {
    const Response response = agree_on({one, one, one}, members({0, 1, 2})).response;
    EXPECT_EQ(response.kind, Response::Kind::kError);
    EXPECT_EQ(response.error_code, StatusCode::kInvalidArgument);
    EXPECT_EQ(response.error,
              "allgather 'g': a scalar cannot be gathered; give it one dimension, as in "
              "tensor.reshape(1)");
  }
  const Response mixed = agree_on({rows, scalar, rows}, members({0, 1, 2})).response;
  EXPECT_EQ(mixed.error, "allgather 'g': mismatched number of dimensions: 1: ranks 0,2; 0: rank 1");
}

TEST(Agreement, TakesATensorInTheOrderOfAllRanksOrElseInCOrder) {
  Request request = request_of(OpKind::kAllreduce, "x", {2, 3});
  request.order = 1;
  request.more = {{DataType::kInt8, {2, 3}, 1}, {DataType::kInt8, {2, 3, 4}, 2}};
  Agreement agreement = agree_on({request, request, request}, members({0, 1, 2}));
  ASSERT_EQ(agreement.response.kind, Response::Kind::kExecute);
  EXPECT_EQ(agreement.response.entries[0].order, 1u);
  EXPECT_EQ(agreement.response.entries[0].more, request.more);
  Request other = request;
  other.order = kCOrder;
  other.more[1].order = 3;
  for (const std::vector<Request>& all : {std::vector{request, other, request}, std::vector{request, request, other},
                                          std::vector{other, request, request}}) {
    agreement = agree_on(all, members({0, 1, 2}));
    ASSERT_EQ(agreement.response.kind, Response::Kind::kExecute) << "an order is nobody's mistake";
    const ResponseEntry& entry = agreement.response.entries[0];
    EXPECT_EQ(entry.order, kCOrder);
    EXPECT_EQ(entry.more[0].order, 1u) << "each tensor of a group for itself";
    EXPECT_EQ(entry.more[1].order, kCOrder);
    EXPECT_EQ(agreement.agreed.order, kCOrder) << "as it is remembered";
    EXPECT_EQ(agreement.agreed.more, entry.more);
  }
}

TEST(Agreement, NamesEveryDifferenceWithGlobalRanksAndCallSites) {
  Request first = request_of(OpKind::kAllreduce, "x");
  first.call_site = 1;
  Request second = first;
  second.dtype = DataType::kInt32;
  second.shape = {5};
  second.call_site = 2;
  const Agreement agreement =
      agree_on({first, second, first, first}, members({2, 3, 5, 6}),
               [](int rank, std::uint32_t site) { return rank == 6 ? std::string() : fmt::format("m.py:{}", site); });
  EXPECT_EQ(agreement.response.kind, Response::Kind::kError);
  EXPECT_EQ(agreement.response.error_code, StatusCode::kInvalidArgument);
  EXPECT_EQ(agreement.response.error,
            "allreduce 'x': mismatched data type: float32: ranks 2,5-6 (m.py:1); int32: rank 3 (m.py:2); "
            "mismatched shape: [4]: ranks 2,5-6 (m.py:1); [5]: rank 3 (m.py:2)");
  EXPECT_EQ(agreement.response.entries[0].name, "x");
}

TEST(Agreement, OfIdsAloneIsTheRememberedResponseAndMixedWithWholeRequestsItIsCompared) {
  const MembershipRef three = members({0, 1, 2});
  ResponseCache cache;
  const Request known = request_of(OpKind::kAllgather, "g", {1, 5});
  cache.remember({7, known, {"g", {1, 5}, {1, 2, 3}, 7, {}}, true});
  {
    ReadinessTable table;
    for (const int rank : {2, 0, 1}) EXPECT_TRUE(table.add_cached(three, rank, known.key, 7, TimePoint{}));
    const Agreement agreement = agree(known.key, table.take(known.key), cache, no_site);
    EXPECT_EQ(agreement.repeated, 7u);
    EXPECT_EQ(agreement.response.entries[0].first_dims, (std::vector<std::int64_t>{1, 2, 3}));
    EXPECT_EQ(agreement.response.entries[0].cache_id, 7u);
  }
  {
    ReadinessTable table;  // rank 1 brings another number of rows this time
    table.add_cached(three, 0, known.key, 7, TimePoint{});
    table.add_full(three, 1, request_of(OpKind::kAllgather, "g", {9, 5}), TimePoint{});
    table.add_cached(three, 2, known.key, 7, TimePoint{});
    const Agreement agreement = agree(known.key, table.take(known.key), cache, no_site);
    EXPECT_EQ(agreement.response.kind, Response::Kind::kExecute) << agreement.response.error;
    EXPECT_EQ(agreement.repeated, 0u);
    EXPECT_EQ(agreement.response.entries[0].first_dims, (std::vector<std::int64_t>{1, 9, 3}));
  }
}

// ---- readiness
// -------------------------------------------------------------------------------------------------------

TEST(ReadinessTable, KnowsWhoHasAskedAndWhoIsMissing) {
  ReadinessTable table;
  const MembershipRef set = members({1, 4, 6});
  const Request request = request_of(OpKind::kAllreduce, "x");
  const TimePoint start{};
  EXPECT_EQ(table.oldest(), kNever);
  EXPECT_TRUE(table.add_full(set, 1, request, start));
  EXPECT_FALSE(table.add_full(set, 1, request, start)) << "twice";
  EXPECT_FALSE(table.add_cached(set, 1, request.key, 3, start)) << "twice";
  const ReadinessTable::Pending* pending = table.find(request.key);
  ASSERT_NE(pending, nullptr);
  EXPECT_FALSE(pending->ready());
  EXPECT_EQ(pending->missing(), (std::vector<int>{1, 6}));
  EXPECT_EQ(pending->present(), std::vector<int>{4});
  EXPECT_TRUE(table.add_cached(set, 0, request.key, 3, start + 1s));
  EXPECT_TRUE(table.add_cached(set, 2, request.key, 3, start + 2s));
  EXPECT_TRUE(table.find(request.key)->ready());
  EXPECT_EQ(table.oldest(), start);
  const ReadinessTable::Pending taken = table.take(request.key);
  EXPECT_EQ(taken.cached, (std::vector<std::pair<CacheId, std::vector<int>>>{{3, {0, 2}}}));
  EXPECT_TRUE(table.empty());
}

TEST(ReadinessTable, ListsWhatWaitsBySetAndByAge) {
  ReadinessTable table;
  const MembershipRef set = members({0, 1});
  const TimePoint start{};
  Request a = request_of(OpKind::kAllreduce, "a");
  Request b = request_of(OpKind::kBarrier, "b");
  Request c = request_of(OpKind::kAllreduce, "c");
  c.key.process_set = 2;
  table.add_full(set, 0, c, start);
  table.add_full(set, 0, b, start + 1s);
  table.add_full(set, 0, a, start + 2s);
  EXPECT_EQ(table.waiting_in(0), (std::vector<OperationKey>{a.key, b.key}));
  EXPECT_EQ(table.waiting_in(2), std::vector<OperationKey>{c.key});
  EXPECT_EQ(table.waiting_since_before(start + 1s), std::vector<OperationKey>{c.key});
  EXPECT_EQ(table.waiting_since_before(start + 5s).size(), 3u);
}

// ---- the cache
// -------------------------------------------------------------------------------------------------------

ResponseCache::Entry remembered(CacheId id, const std::string& name, ProcessSetId set = 0) {
  Request request = request_of(OpKind::kAllreduce, name);
  request.key.process_set = set;
  return {id, request, {name, request.shape, {}, id, {}}, false};
}

TEST(ResponseCache, AnIdStandsForJustWhatIsRemembered) {
  ResponseCache cache;
  cache.remember(remembered(1, "x"));
  const Request same = request_of(OpKind::kAllreduce, "x");
  EXPECT_EQ(cache.id_for(same, 0), 1u);
  const auto changed = [&](auto change) {
    Request request = same;
    change(request);
    return cache.id_for(request, 0);
  };
  EXPECT_EQ(changed([](Request& r) { r.call_site = 9; }), 1u) << "where it was called does not matter";
  EXPECT_EQ(changed([](Request& r) { r.dtype = DataType::kInt8; }), std::nullopt);
  EXPECT_EQ(changed([](Request& r) { r.shape = {5}; }), std::nullopt);
  EXPECT_EQ(changed([](Request& r) { r.order = 1; }), std::nullopt);
  EXPECT_EQ(changed([](Request& r) { r.reduce_op = ReduceOp::kMax; }), std::nullopt);
  EXPECT_EQ(changed([](Request& r) { r.prescale = 2; }), std::nullopt);
  EXPECT_EQ(changed([](Request& r) { r.postscale = 2; }), std::nullopt);
  EXPECT_EQ(changed([](Request& r) { r.key.name = "y"; }), std::nullopt);
  EXPECT_EQ(changed([](Request& r) { r.key.process_set = 1; }), std::nullopt);
  EXPECT_EQ(changed([](Request& r) { r.key.op = OpKind::kBroadcast; }), std::nullopt);
}

TEST(ResponseCache, ComparesTheRowsOfAGatherWithThoseOfTheSameRank) {
  ResponseCache cache;
  cache.remember({4, request_of(OpKind::kAllgather, "g", {1, 5}), {"g", {1, 5}, {1, 2}, 4, {}}, false});
  EXPECT_EQ(cache.id_for(request_of(OpKind::kAllgather, "g", {2, 5}), 1), 4u);
  EXPECT_EQ(cache.id_for(request_of(OpKind::kAllgather, "g", {2, 5}), 0), std::nullopt);
}

TEST(ResponseCache, ListsTheLeastRecentlyUsedAndReplacesUnderTheSameKey) {
  ResponseCache cache;
  for (CacheId id = 1; id <= 4; ++id) cache.remember(remembered(id, std::string(1, static_cast<char>('a' + id))));
  cache.touch(1);
  EXPECT_EQ(cache.oldest(2), (std::vector<CacheId>{2, 3}));
  EXPECT_EQ(cache.oldest(10), (std::vector<CacheId>{2, 3, 4, 1}));
  cache.remember(remembered(9, "c"));  // was 2
  EXPECT_EQ(cache.find(2), nullptr);
  EXPECT_EQ(cache.oldest(10), (std::vector<CacheId>{3, 4, 1, 9}));
  EXPECT_EQ(cache.size(), 4u);
  cache.forget(3);
  cache.forget(3);
  EXPECT_EQ(cache.find(remembered(3, "d").agreed.key), nullptr);
  cache.mark_announced(4);
  EXPECT_TRUE(cache.find(4)->announced);
  cache.mark_announced(77);
  cache.touch(77);
  cache.remember(remembered(20, "z", 5));
  cache.forget_set(5);
  EXPECT_EQ(cache.find(20), nullptr);
  EXPECT_EQ(cache.size(), 3u);
}

// ---- fusion
// ----------------------------------------------------------------------------------------------------------

Response ready(const std::string& name, std::int64_t elements, DataType type = DataType::kFloat32,
               OpKind op = OpKind::kAllreduce) {
  Response response;
  response.op = op;
  response.dtype = type;
  response.entries.push_back({name, {elements}, {}, 0, {}});
  return response;
}

std::string plan(std::vector<Response> agreed, const FusionLimits& limits) {
  std::string text;
  for (const Response& call : plan_fusion(std::move(agreed), limits)) {
    for (const ResponseEntry& entry : call.entries) text += entry.name;
    text += ' ';
  }
  return text;
}

TEST(FusionPlanner, LooksAheadPastOtherTypesAndKeepsTheAgreedOrder) {
  const FusionLimits limits{1 << 20, 1 << 16, 1 << 14};
  EXPECT_EQ(plan({ready("a", 1), ready("b", 1, DataType::kFloat64), ready("c", 1), ready("d", 1, DataType::kFloat64)},
                 limits),
            "ac bd ");
  Response other_op = ready("m", 1);
  other_op.reduce_op = ReduceOp::kMax;
  Response scaled = ready("s", 1);
  scaled.prescale = 2;
  Response other_set = ready("t", 1);
  other_set.process_set = 1;
  EXPECT_EQ(plan({ready("a", 1), other_op, scaled, other_set, ready("b", 1)}, limits), "ab m s t ");
  EXPECT_EQ(plan({}, limits), "");
}

TEST(FusionPlanner, BeginsANewCallWhenTheThresholdIsReached) {
  const FusionLimits limits{100, 1 << 16, 1 << 14};
  EXPECT_EQ(plan({ready("a", 10), ready("b", 10), ready("c", 5), ready("d", 1)}, limits), "abc d ");
  EXPECT_EQ(plan({ready("a", 10), ready("b", 15)}, limits), "ab ") << "up to the threshold";
  EXPECT_EQ(plan({ready("a", 10), ready("b", 16)}, limits), "a b ");
}

TEST(FusionPlanner, SmallAndLargeOnesAndWhatIsNotToBeCopiedStayApart) {
  const FusionLimits limits{1 << 20, 400, 40};
  EXPECT_EQ(plan({ready("s", 10), ready("l", 11), ready("t", 1), ready("m", 100), ready("X", 101)}, limits),
            "st lm X ");
  EXPECT_FALSE(may_fuse(ready("X", 101), limits));
  EXPECT_TRUE(may_fuse(ready("m", 100), limits));
  EXPECT_EQ(plan({ready("a", 1), ready("b", 1)}, {0, 400, 40}), "a b ") << "fusion is off";
}

TEST(FusionPlanner, ErrorsAndOtherOperationsTravelAlone) {
  const FusionLimits limits{1 << 20, 1 << 16, 1 << 14};
  Response error = error_response({0, OpKind::kAllreduce, "e"}, StatusCode::kInternal, "text");
  EXPECT_EQ(plan({ready("a", 1), error, ready("g", 1, DataType::kFloat32, OpKind::kAllgather), ready("b", 1)}, limits),
            "ab e g ");
}

TEST(FusionPlanner, EmptyTensorsFuse) {
  EXPECT_EQ(plan({ready("a", 0), ready("b", 3), ready("c", 0)}, {100, 100, 100}), "abc ");
}

// ---- process sets
// ----------------------------------------------------------------------------------------------------

TEST(ProcessSetTable, KeepsSetsAndWhyTheyFailed) {
  ProcessSetTable table(members({0, 1, 2, 3}));
  EXPECT_EQ(table.next_id(), 1);
  table.add(1, {0, 2});
  table.add(5, {1, 3});
  EXPECT_EQ(table.next_id(), 6) << "ids are not used twice";
  EXPECT_EQ(table.ids(), (std::vector<ProcessSetId>{0, 1, 5}));
  EXPECT_EQ(table.ids_with(3), (std::vector<ProcessSetId>{0, 5}));
  EXPECT_EQ(table.id_of({1, 3}), ProcessSetId{5});
  EXPECT_EQ(table.id_of({0, 1, 2, 3}), ProcessSetId{0});
  EXPECT_EQ(table.id_of({0}), std::nullopt);
  EXPECT_EQ(table.find(2), nullptr);
  EXPECT_EQ(table.find(1)->ranks, (std::vector<int>{0, 2}));
  table.fail_sets_with(3, Status::internal("first"));
  table.fail_sets_with(1, Status::internal("second"));
  EXPECT_EQ(table.failure(5).text(), "first");
  EXPECT_EQ(table.failure(0).text(), "first");
  EXPECT_TRUE(table.failure(1).ok());
  EXPECT_TRUE(table.failure(99).ok());
  table.fail(1, Status::internal("third"));
  table.fail(1, Status::internal("fourth"));
  table.fail(99, Status::internal("nobody"));
  EXPECT_EQ(table.failure(1).text(), "third");
  const ProcessSetTable copy = table;
  table.remove(5);
  EXPECT_EQ(table.find(5), nullptr);
  EXPECT_NE(copy.find(5), nullptr) << "a value";
  EXPECT_EQ(table.next_id(), 6);
}

}  // namespace
}  // namespace hvd::testing
