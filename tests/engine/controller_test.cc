// The control planes of all ranks as state machines: no thread, no transport, no clock. The test carries their
// messages, in an order drawn from a seed where any is allowed.

#include "horovod_cpp/engine/controller.h"
#include "ops/collective_context.h"
#include "tests/support/random_seed.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <deque>
#include <memory>
#include <numeric>
#include <random>

namespace hvd::testing {
namespace {

using namespace std::chrono_literals;

Request request_of(const std::string& name, Shape shape = {4}, ProcessSetId set = 0, OpKind op = OpKind::kAllreduce) {
  Request request;
  request.key = {set, op, name};
  request.dtype = DataType::kFloat32;
  request.shape = std::move(shape);
  return request;
}

MembershipRef everyone(int size) {
  auto membership = std::make_shared<Membership>();
  membership->ranks.resize(static_cast<std::size_t>(size));
  std::iota(membership->ranks.begin(), membership->ranks.end(), 0);
  membership->hosts.assign(static_cast<std::size_t>(size), 0);
  return membership;
}

CoordinatorSettings usual_settings() {
  CoordinatorSettings settings;
  settings.fusion = {1 << 20, 1 << 16, 1 << 14};
  settings.cache_capacity = 100;
  settings.company_time = 1ms;
  return settings;
}

// All ranks, and the messages between them on their way.
class Planes {
 public:
  struct Rank {
    Rank(int rank, const MembershipRef& all, const CoordinatorSettings& settings)
        : sets(all), controller(rank, sets, settings) {}
    ProcessSetTable sets;
    Controller controller;
    std::vector<Response> responses;
    std::vector<FailedSet> failed_sets;
    std::vector<FailedCall> failed_calls;
    std::vector<StallReportMessage::Line> stalls;
    TimePoint look_again = kNever;
    bool dead = false;

    const Response& last() const { return responses.back(); }
    std::vector<std::string> names() const {
      std::vector<std::string> all;
      for (const Response& response : responses) {
        for (const ResponseEntry& entry : response.entries) all.push_back(entry.name);
      }
      return all;
    }
  };

  explicit Planes(int size, const CoordinatorSettings& settings = usual_settings()) {
    const MembershipRef all = everyone(size);
    for (int rank = 0; rank < size; ++rank) ranks_.push_back(std::make_unique<Rank>(rank, all, settings));
  }

  Rank& operator[](int rank) { return *ranks_[static_cast<std::size_t>(rank)]; }
  int size() const { return static_cast<int>(ranks_.size()); }
  TimePoint now() const { return now_; }

  void add_set(ProcessSetId id, const std::vector<int>& ranks) {
    for (const auto& rank : ranks_) rank->controller.add_process_set(id, ranks);
  }
  void event(int rank, const Event& event) {
    Rank& at = (*this)[rank];
    if (at.dead) return;
    Actions actions = at.controller.on_event(event, now_);
    at.look_again = actions.look_again;
    for (auto& [to, message] : actions.messages) {
      bytes_sent += message.size();
      ++messages_sent;
      links_[{rank, to}].push_back(std::move(message));
    }
    for (auto& one : actions.failed_sets) at.failed_sets.push_back(std::move(one));
    for (auto& one : actions.responses) at.responses.push_back(std::move(one));
    for (auto& one : actions.failed_calls) at.failed_calls.push_back(std::move(one));
    for (auto& one : actions.stalls) at.stalls.push_back(std::move(one));
  }
  void ask(int rank, std::vector<Request> requests) { event(rank, RequestsEnqueued{std::move(requests), {}}); }
  void all_ask(const Request& request) {
    for (int rank = 0; rank < size(); ++rank) ask(rank, {request});
  }
  // Delivers one message of a link that is chosen by `random`. False when nothing is on its way.
  bool deliver_one(std::mt19937_64& random) {
    std::vector<std::pair<int, int>> busy;
    for (const auto& [link, messages] : links_) {
      if (!messages.empty()) busy.push_back(link);
    }
    if (busy.empty()) return false;
    const auto [from, to] = busy[random() % busy.size()];
    const std::vector<std::byte> message = std::move(links_[{from, to}].front());
    links_[{from, to}].pop_front();
    event(to, MessageArrived{from, message});
    return true;
  }
  void deliver_all() {
    std::mt19937_64 order(1);
    while (deliver_one(order)) {
    }
  }
  void pass(Duration time) {
    now_ += time;
    for (int rank = 0; rank < size(); ++rank) event(rank, TimePassed{});
  }
  // It answers no more, and nobody knows.
  void silence(int rank) {
    (*this)[rank].dead = true;
    for (auto& [link, messages] : links_) {
      if (link.first == rank || link.second == rank) messages.clear();
    }
  }
  void kill(int rank) {
    (*this)[rank].dead = true;
    for (auto& [link, messages] : links_) {
      if (link.second == rank) messages.clear();
    }
  }

  std::size_t bytes_sent = 0;
  int messages_sent = 0;

 private:
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::map<std::pair<int, int>, std::deque<std::vector<std::byte>>> links_;
  TimePoint now_{1000s};
};

// ---- agreement
// -------------------------------------------------------------------------------------------------------

TEST(Controller, NothingIsAgreedBeforeTheLastRankHasAskedAndThenAllGetTheSame) {
  Planes planes(3);
  planes.ask(2, {request_of("x")});
  planes.ask(0, {request_of("x")});
  planes.deliver_all();
  for (int rank = 0; rank < 3; ++rank) EXPECT_TRUE(planes[rank].responses.empty());
  planes.ask(1, {request_of("x")});
  planes.deliver_all();
  for (int rank = 0; rank < 3; ++rank) {
    ASSERT_EQ(planes[rank].responses.size(), 1u);
    EXPECT_EQ(planes[rank].last().kind, Response::Kind::kExecute);
    EXPECT_EQ(planes[rank].last().call, 0u);
    EXPECT_EQ(planes[rank].names(), std::vector<std::string>{"x"});
  }
}

TEST(Controller, ARepeatedNameCostsAFewBytes) {
  Planes planes(2);
  planes.all_ask(request_of("a.name.of.some.length.as.layers.have.them", {3, 5, 7}));
  planes.deliver_all();
  const std::size_t first = planes.bytes_sent;
  planes.all_ask(request_of("a.name.of.some.length.as.layers.have.them", {3, 5, 7}));
  planes.deliver_all();
  EXPECT_LT(planes.bytes_sent - first, first - 60);
  for (int rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(planes[rank].controller.cache_hits().value(), 1);
    ASSERT_EQ(planes[rank].responses.size(), 2u);
    EXPECT_EQ(planes[rank].last().entries[0].name, "a.name.of.some.length.as.layers.have.them");
    EXPECT_EQ(planes[rank].last().entries[0].shape, (Shape{3, 5, 7}));
    EXPECT_EQ(planes[rank].last().call, 1u);
  }
}

TEST(Controller, AMismatchIsAnErrorForAllAndTakesNoCallNumber) {
  Planes planes(2);
  planes.ask(0, {request_of("x", {4})});
  planes.ask(1, {request_of("x", {5})});
  planes.deliver_all();
  for (int rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(planes[rank].last().kind, Response::Kind::kError);
    EXPECT_EQ(planes[rank].last().error, "allreduce 'x': mismatched shape: [4]: rank 0; [5]: rank 1");
  }
  planes.all_ask(request_of("x"));
  planes.deliver_all();
  for (int rank = 0; rank < 2; ++rank) EXPECT_EQ(planes[rank].last().call, 0u);
}

TEST(Controller, SetsHaveTheirOwnCallsAndMembersOnlyHearOfThem) {
  Planes planes(3);
  planes.add_set(1, {1, 2});
  for (const int rank : {1, 2}) planes.ask(rank, {request_of("x", {4}, 1)});
  planes.deliver_all();
  planes.all_ask(request_of("x"));
  planes.deliver_all();
  EXPECT_EQ(planes[0].responses.size(), 1u);
  for (const int rank : {1, 2}) {
    ASSERT_EQ(planes[rank].responses.size(), 2u);
    EXPECT_EQ(planes[rank].responses[0].process_set, 1);
    EXPECT_EQ(planes[rank].responses[0].call, 0u);
    EXPECT_EQ(planes[rank].responses[1].process_set, 0);
    EXPECT_EQ(planes[rank].responses[1].call, 0u);
  }
}

TEST(Controller, ARequestForASetThatIsNotThereIsAnErrorForItsSender) {
  Planes planes(2);
  planes.ask(1, {request_of("x", {4}, 9)});
  planes.deliver_all();
  ASSERT_EQ(planes[1].responses.size(), 1u);
  EXPECT_EQ(planes[1].last().error_code, StatusCode::kPrecondition);
  EXPECT_TRUE(planes[0].responses.empty());
}

// ---- company
// ---------------------------------------------------------------------------------------------------------

// Tells the coordinator that a call of its own is in flight, so that small tensors wait for company.
void keep_busy(Planes& planes) { planes.event(0, CallEnded{0, 1'000'000, {}, 1}); }

TEST(Controller, SmallTensorsWaitForCompanyWhileACallIsInFlightAndThenGoTogether) {
  Planes planes(2);
  keep_busy(planes);
  planes.all_ask(request_of("a"));
  planes.deliver_all();
  EXPECT_TRUE(planes[0].responses.empty());
  EXPECT_EQ(planes[0].look_again, planes.now() + 1ms);
  planes.all_ask(request_of("b"));
  planes.deliver_all();
  planes.pass(1ms);
  planes.deliver_all();
  for (int rank = 0; rank < 2; ++rank) {
    ASSERT_EQ(planes[rank].responses.size(), 1u);
    EXPECT_EQ(planes[rank].names(), (std::vector<std::string>{"a", "b"}));
  }
  EXPECT_EQ(planes[0].look_again, kNever);
}

TEST(Controller, WhatCannotBeFusedTakesThoseThatWaitWithIt) {
  Planes planes(2);
  keep_busy(planes);
  planes.all_ask(request_of("a"));
  planes.all_ask(request_of("b", {}, 0, OpKind::kBarrier));
  planes.deliver_all();
  EXPECT_EQ(planes[1].names(), (std::vector<std::string>{"a", "b"}));
}

TEST(Controller, CompanyEndsWhenNothingIsInFlightAnyMore) {
  Planes planes(2);
  keep_busy(planes);
  planes.all_ask(request_of("a"));
  planes.deliver_all();
  planes.event(0, CallEnded{0, 1'000'001, {}, 0});
  planes.deliver_all();
  EXPECT_EQ(planes[1].names(), std::vector<std::string>{"a"});
}

TEST(Controller, AResponseThatWaitsIsNotForgottenBeforeItIsSent) {
  CoordinatorSettings settings = usual_settings();
  settings.cache_capacity = 1;
  Planes planes(2, settings);
  planes.all_ask(request_of("a"));
  planes.deliver_all();
  keep_busy(planes);
  planes.all_ask(request_of("a"));  // as its id; waits
  planes.deliver_all();
  planes.all_ask(request_of("b"));  // there is room for one only
  planes.deliver_all();
  planes.pass(1ms);
  planes.deliver_all();
  planes.event(0, CallEnded{0, 1'000'001, {}, 0});
  for (int rank = 0; rank < 2; ++rank) EXPECT_EQ(planes[rank].names(), (std::vector<std::string>{"a", "a", "b"}));
  // Nobody has asked for anything that was not answered.
  for (int round = 0; round < 3; ++round) {
    for (const char* name : {"a", "b"}) {
      planes.ask(1, {request_of(name)});
      planes.deliver_all();
      const std::size_t before = planes[1].responses.size();
      EXPECT_EQ(planes[0].responses.size(), before) << "agreed before rank 0 had asked";
      planes.ask(0, {request_of(name)});
      planes.deliver_all();
      ASSERT_EQ(planes[1].responses.size(), before + 1) << name << " is never answered";
      ASSERT_EQ(planes[0].responses.size(), before + 1);
    }
  }
}

// Any order of requests on each rank, any order of messages, caches of any size, company or none: each request is
// answered once, and all ranks see the same calls in the same order.
TEST(Controller, EveryRequestIsAnsweredOnceInOneOrderWhateverTheOrderOfMessages) {
  std::mt19937_64 random = generator_of_this_run();
  for (int run = 0; run < 150; ++run) {
    const int size = static_cast<int>(random() % 4) + 1;
    CoordinatorSettings settings = usual_settings();
    settings.cache_capacity = std::array<std::size_t, 4>{0, 1, 2, 6}[random() % 4];
    if (random() % 3 == 0) settings.fusion.threshold_bytes = 0;
    Planes planes(size, settings);
    constexpr int names = 5;
    constexpr int rounds = 6;
    std::vector<std::vector<int>> asked(static_cast<std::size_t>(size), std::vector<int>(names));
    std::vector<std::size_t> seen(static_cast<std::size_t>(size));
    std::vector<std::vector<int>> answered = asked;
    int left = size * names * rounds;
    int idle = 0;
    while (left > 0 && idle < 1000) {
      ++idle;
      const int rank = static_cast<int>(random() % static_cast<std::uint64_t>(size));
      const auto r = static_cast<std::size_t>(rank);
      switch (random() % 6) {
        case 0:
        case 1: {  // a name that is not in flight here; its shape changes now and then
          const std::size_t n = random() % names;
          if (asked[r][n] == rounds || asked[r][n] > answered[r][n]) break;
          const std::int64_t rows = 1 + asked[r][n] / 4;
          planes.ask(rank, {request_of(fmt::format("n{}", n), {rows, static_cast<std::int64_t>(n)})});
          ++asked[r][n];
          break;
        }
        case 2:
          if (random() % 4 == 0) planes.event(0, CallEnded{0, 9'000'000, {}, static_cast<int>(random() % 2)});
          break;
        case 3:
          if (random() % 4 == 0) planes.pass(1ms);
          break;
        default:
          planes.deliver_one(random);
      }
      for (int one = 0; one < size; ++one) {
        const auto o = static_cast<std::size_t>(one);
        for (; seen[o] < planes[one].responses.size(); ++seen[o]) {
          const Response& response = planes[one].responses[seen[o]];
          ASSERT_EQ(response.kind, Response::Kind::kExecute) << response.error;
          for (const ResponseEntry& entry : response.entries) {
            const auto n = static_cast<std::size_t>(entry.name[1] - '0');
            ++answered[o][n];
            ASSERT_EQ(answered[o][n], asked[o][n]) << "rank " << one << " was answered what it had not asked";
            EXPECT_EQ(entry.shape[0], 1 + (asked[o][n] - 1) / 4);
            --left;
            idle = 0;
          }
        }
      }
    }
    ASSERT_EQ(left, 0) << "run " << run << ": requests are never answered (ranks " << size << ", capacity "
                       << settings.cache_capacity << ")";
    for (int rank = 1; rank < size; ++rank) {
      ASSERT_EQ(planes[rank].names(), planes[0].names());
      for (std::size_t i = 0; i < planes[0].responses.size(); ++i) {
        ASSERT_EQ(planes[rank].responses[i].call, planes[0].responses[i].call);
        ASSERT_EQ(planes[rank].responses[i].entries.size(), planes[0].responses[i].entries.size());
      }
    }
  }
}

// ---- process sets
// ----------------------------------------------------------------------------------------------------

TEST(Controller, SetsAreAddedAndRemovedOnAllRanksTogether) {
  Planes planes(3);
  planes.all_ask(request_of("add", {0, 2}, 0, OpKind::kProcessSetAdd));
  planes.deliver_all();
  for (int rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(planes[rank].last().new_process_set, 1);
    EXPECT_EQ(planes[rank].sets.find(1)->ranks, (std::vector<int>{0, 2}));
  }
  planes.all_ask(request_of("add", {0, 2}, 0, OpKind::kProcessSetAdd));
  planes.deliver_all();
  EXPECT_EQ(planes[1].last().kind, Response::Kind::kError);
  EXPECT_NE(planes[1].last().error.find("its id is 1"), std::string::npos) << planes[1].last().error;
  // In use: rank 2 waits in it.
  planes.ask(2, {request_of("x", {4}, 1)});
  planes.deliver_all();
  planes.all_ask(request_of("remove", {1}, 0, OpKind::kProcessSetRemove));
  planes.deliver_all();
  EXPECT_EQ(planes[1].last().kind, Response::Kind::kError) << "it is in use";
  planes.ask(0, {request_of("x", {4}, 1)});
  planes.deliver_all();
  planes.all_ask(request_of("remove", {1}, 0, OpKind::kProcessSetRemove));
  planes.deliver_all();
  for (int rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(planes[rank].last().kind, Response::Kind::kExecute) << planes[rank].last().error;
    EXPECT_EQ(planes[rank].sets.find(1), nullptr);
  }
  planes.all_ask(request_of("remove", {1}, 0, OpKind::kProcessSetRemove));
  planes.deliver_all();
  EXPECT_EQ(planes[2].last().kind, Response::Kind::kError);
}

TEST(Controller, ARememberedNameOfASetThatIsBeingRemovedIsAnswered) {
  Planes planes(2);
  planes.add_set(1, {0, 1});
  planes.all_ask(request_of("x", {4}, 1));
  planes.deliver_all();
  planes.ask(0, {request_of("remove", {1}, 0, OpKind::kProcessSetRemove)});
  planes.ask(1, {request_of("remove", {1}, 0, OpKind::kProcessSetRemove), request_of("x", {4}, 1)});
  planes.deliver_all();
  const auto& answers = planes[1].responses;
  const bool answered = std::any_of(answers.begin() + 1, answers.end(), [](const Response& response) {
    return response.kind == Response::Kind::kError && response.entries[0].name == "x";
  });
  EXPECT_TRUE(answered) << "it would wait for ever";
}

// ---- lost ranks
// ------------------------------------------------------------------------------------------------------

TEST(Controller, ALostWorkerFailsItsSetsOnAllRanksWhoeverNoticesIt) {
  for (const int witness : {0, 1}) {
    Planes planes(4);
    planes.add_set(1, {0, 1, 2});
    planes.add_set(2, {2, 3});
    planes.ask(0, {request_of("x")});
    planes.deliver_all();
    planes.kill(3);
    planes.event(witness, PeerLost{3, Status::internal("rank 3 is lost: seen")});
    planes.deliver_all();
    for (int rank = 0; rank < 3; ++rank) {
      SCOPED_TRACE(fmt::format("witness {}, rank {}", witness, rank));
      ASSERT_EQ(planes[rank].failed_sets.size(), 2u);
      EXPECT_EQ(planes[rank].failed_sets[0].process_set, 0);
      EXPECT_EQ(planes[rank].failed_sets[1].process_set, 2);
      EXPECT_EQ(planes[rank].failed_sets[0].reason.text(), "rank 3 is lost: seen");
      EXPECT_FALSE(planes[rank].sets.failure(0).ok());
      EXPECT_TRUE(planes[rank].sets.failure(1).ok());
    }
    planes.event(2, PeerLost{3, Status::internal("again")});  // told once
    planes.deliver_all();
    EXPECT_EQ(planes[2].failed_sets.size(), 2u);
    for (const int rank : {0, 1, 2}) planes.ask(rank, {request_of("y", {4}, 1)});
    planes.deliver_all();
    for (int rank = 0; rank < 3; ++rank) EXPECT_EQ(planes[rank].names(), std::vector<std::string>{"y"});
  }
}

TEST(Controller, ALostCoordinatorFailsEverySet) {
  Planes planes(3);
  planes.add_set(1, {1, 2});
  planes.kill(0);
  for (const int rank : {1, 2}) planes.event(rank, PeerLost{0, Status::internal("rank 0 is lost")});
  for (const int rank : {1, 2}) {
    EXPECT_EQ(planes[rank].failed_sets.size(), 2u);
    EXPECT_FALSE(planes[rank].sets.failure(1).ok()) << "later operations of this set would wait for ever";
  }
  planes.event(1, ShutdownWanted{});
  EXPECT_TRUE(planes[1].controller.job_has_ended()) << "there is nobody to negotiate the end with";
}

TEST(Controller, ARequestThatComesWhenItsSetHasFailedIsAnsweredAtOnce) {
  for (const int lost : {0, 2}) {
    Planes planes(3);
    planes.all_ask(request_of("known"));
    planes.deliver_all();
    planes.kill(lost);
    planes.event(1, PeerLost{lost, Status::internal("gone")});
    planes.deliver_all();
    planes.ask(1, {request_of("known"), request_of("new")});  // handed over just before the loss was published
    planes.deliver_all();
    ASSERT_EQ(planes[1].responses.size(), 3u) << "they wait for ever";
    for (std::size_t i = 1; i < 3; ++i) {
      EXPECT_EQ(planes[1].responses[i].kind, Response::Kind::kError);
      EXPECT_EQ(planes[1].responses[i].error, "gone");
    }
  }
}

TEST(Controller, ASetThatIsAddedWithALostRankHasFailedFromItsBeginning) {
  Planes planes(4);
  planes.all_ask(request_of("add", {1, 2}, 0, OpKind::kProcessSetAdd));
  // The response is on its way to rank 1 when that learns of the loss.
  planes.event(1, PeerLost{2, Status::internal("gone")});
  planes.deliver_all();
  if (planes[1].sets.find(1) != nullptr) {
    EXPECT_FALSE(planes[1].sets.failure(1).ok());
  }
}

TEST(Controller, AFailedCallIsToldToTheOtherMembersOnly) {
  Planes planes(4);
  planes.add_set(1, {1, 2, 3});
  for (const int origin : {2, 1}) {
    planes.event(origin, CallEnded{1, 17, Status::internal("why"), 0});
    planes.deliver_all();
  }
  EXPECT_EQ(planes[3].failed_calls.size(), 2u);
  EXPECT_EQ(planes[1].failed_calls.size(), 1u);
  ASSERT_EQ(planes[2].failed_calls.size(), 1u);
  EXPECT_EQ(planes[2].failed_calls[0].call, 17u);
  EXPECT_EQ(planes[2].failed_calls[0].process_set, 1);
  EXPECT_EQ(planes[2].failed_calls[0].reason.text(), "why");
  const int sent = planes.messages_sent;
  planes.event(2, CallEnded{1, 18, {}, 0});
  EXPECT_EQ(planes.messages_sent, sent) << "a success is no news";
}

// ---- stalls and the end
// ----------------------------------------------------------------------------------------------

TEST(Controller, TellsWhoIsMissing) {
  Planes planes(4);
  for (const int rank : {0, 2}) planes.ask(rank, {request_of("x")});
  planes.deliver_all();
  for (const int rank : {0, 2}) {
    planes.event(rank, StallNoticed{{{0, OpKind::kAllreduce, "x"}, {0, OpKind::kAllreduce, "unknown"}}});
    planes.deliver_all();
    ASSERT_EQ(planes[rank].stalls.size(), 1u);
    EXPECT_EQ(planes[rank].stalls[0].key.name, "x");
    EXPECT_EQ(planes[rank].stalls[0].missing, (std::vector<std::int64_t>{1, 3}));
  }
}

TEST(Controller, TellsWhatTheMissingRanksAskedForInstead) {
  const auto hint = [](const std::vector<Request>& of_rank_1) {
    Planes planes(2);
    planes.ask(0, {request_of("grad.3.weight")});
    planes.ask(1, of_rank_1);
    planes.deliver_all();
    planes.event(0, StallNoticed{{{0, OpKind::kAllreduce, "grad.3.weight"}}});
    return planes[0].stalls.empty() ? std::string("no line") : planes[0].stalls[0].hint;
  };
  EXPECT_EQ(hint({}), "rank 1 asked for nothing (as after the end of a loop: do all ranks have as much data?)");
  EXPECT_EQ(hint({request_of("something.else")}), "rank 1 asked for allreduce 'something.else', and no other rank did");
  const std::string of_many = hint({request_of("aaaa"), request_of("bbbb"), request_of("cccc"), request_of("dddd")});
  EXPECT_NE(of_many.find("'cccc'"), std::string::npos) << of_many;
  EXPECT_EQ(of_many.find("'dddd'"), std::string::npos) << of_many;
  EXPECT_NE(of_many.find("; and for 1 more of this kind"), std::string::npos) << of_many;
  EXPECT_EQ(hint({request_of("grad.3.weigth")}),
            "allreduce 'grad.3.weight' waits for rank 1, while rank 1 asked for allreduce 'grad.3.weigth' (a name that "
            "is nearly the same)");
  Request other = request_of("grad.3.weight");
  other.key.op = OpKind::kAllgather;
  EXPECT_NE(hint({other}).find("allgather 'grad.3.weight' (another operation under the same name)"), std::string::npos);
  other.key = {0, OpKind::kBarrier, "end"};
  EXPECT_NE(hint({other}).find("do all ranks have as much data?"), std::string::npos);
}

TEST(Controller, TellsARankInABarrierWhatTheOthersAskedFor) {
  Planes planes(2);
  Request barrier = request_of("end");
  barrier.key.op = OpKind::kBarrier;
  planes.ask(1, {barrier});
  planes.ask(0, {request_of("grad.3.weight")});
  planes.deliver_all();
  planes.event(1, StallNoticed{{barrier.key}});
  planes.deliver_all();
  ASSERT_EQ(planes[1].stalls.size(), 1u);
  EXPECT_EQ(planes[1].stalls[0].hint, "rank 0 asked for allreduce 'grad.3.weight', and no other rank did");
}

TEST(Controller, EndsTheJobWhenAStallHasItsLimitByTheClockAlone) {
  CoordinatorSettings settings = usual_settings();
  settings.stall_shutdown_time = 30s;
  Planes planes(2, settings);
  planes.ask(1, {request_of("x")});
  planes.deliver_all();
  ASSERT_NE(planes[0].look_again, kNever) << "nobody would look";
  EXPECT_GE(planes[0].look_again, planes.now() + 30s);
  planes.pass(30s);
  EXPECT_TRUE(planes[0].responses.empty());
  planes.pass(planes[0].look_again - planes.now());
  planes.deliver_all();
  for (int rank = 0; rank < 2; ++rank) {
    ASSERT_EQ(planes[rank].responses.size(), 1u);
    EXPECT_EQ(planes[rank].last().kind, Response::Kind::kShutdown);
    EXPECT_NE(planes[rank].last().error.find("'x' has waited for rank 0"), std::string::npos)
        << planes[rank].last().error;
    EXPECT_TRUE(planes[rank].controller.job_has_ended());
  }
  EXPECT_EQ(planes[0].look_again, kNever);
}

// Three ranks, and "x" stands on all of them; then ranks 0 and 1 begin the next use, and rank 2 answers no more.
std::unique_ptr<Planes> planes_with_a_silent_rank(CoordinatorSettings settings) {
  settings.standing_after = 2;
  settings.standing_limit_bytes = 100;
  auto planes = std::make_unique<Planes>(3, settings);
  for (int i = 0; i < 2; ++i) {
    planes->all_ask(request_of("x"));
    planes->deliver_all();
  }
  planes->ask(0, {request_of("x")});
  planes->ask(1, {request_of("x")});
  planes->pass(1s);
  planes->silence(2);
  planes->deliver_all();
  return planes;
}

TEST(Controller, TellsWhoIsMissingInAStandingCallThatARankNeitherBeginsNorEnds) {
  const std::unique_ptr<Planes> planes = planes_with_a_silent_rank(usual_settings());
  StallNoticed noticed;
  noticed.keys.push_back(request_of("x").key);
  (*planes).event(1, noticed);
  planes->deliver_all();
  ASSERT_EQ((*planes)[1].stalls.size(), 1u);
  EXPECT_EQ((*planes)[1].stalls.front().missing, std::vector<std::int64_t>{2});
}

TEST(Controller, EndsTheJobWhenAStandingCallHasItsLimit) {
  CoordinatorSettings settings = usual_settings();
  settings.stall_shutdown_time = 30s;
  const std::unique_ptr<Planes> planes = planes_with_a_silent_rank(settings);
  EXPECT_FALSE((*planes)[0].controller.job_has_ended());
  planes->pass(31s);
  planes->deliver_all();
  ASSERT_TRUE((*planes)[1].controller.job_has_ended());
  EXPECT_NE((*planes)[1].last().error.find("'x' has waited for rank 2"), std::string::npos)
      << (*planes)[1].last().error;
}

TEST(Controller, AStandingCallThatWasLateIsNotTakenForOneThatWaits) {
  CoordinatorSettings settings = usual_settings();
  settings.stall_shutdown_time = 30s;
  settings.standing_after = 2;
  settings.standing_limit_bytes = 100;
  Planes planes(2, settings);
  for (int i = 0; i < 3; ++i) {
    planes.all_ask(request_of("x"));
    planes.deliver_all();
  }
  const Response begun = planes[0].last();
  ASSERT_TRUE(is_standing_call(begun.call));
  planes.pass(1s);  // both have begun it, and both ask
  planes.deliver_all();
  for (int rank = 0; rank < 2; ++rank) planes.event(rank, CallEnded{0, begun.call, {}, 0});
  planes.deliver_all();
  planes.pass(60s);
  planes.deliver_all();
  for (int rank = 0; rank < 2; ++rank) EXPECT_FALSE(planes[rank].controller.job_has_ended());
  planes.all_ask(request_of("x"));
  planes.deliver_all();
  EXPECT_FALSE(is_standing_call(planes[1].last().call)) << "it is negotiated again";
}

TEST(Controller, ARankThatJoinsAsksFirstForWhatItHadBegun) {
  CoordinatorSettings settings = usual_settings();
  settings.standing_after = 2;
  settings.standing_limit_bytes = 100;
  Planes planes(2, settings);
  for (int i = 0; i < 2; ++i) {
    planes.all_ask(request_of("x"));
    planes.deliver_all();
  }
  const Request join = request_of(std::string(kJoinName), {}, 0, OpKind::kJoin);
  planes.ask(1, {request_of("x")});
  const Response begun = planes[1].last();
  ASSERT_TRUE(is_standing_call(begun.call));
  planes.ask(1, {join});
  planes.ask(0, {join});  // without another use of "x": it ends there
  planes.deliver_all();
  ASSERT_EQ(planes[1].last().call, begun.call) << "nothing is agreed while the use is in flight";
  planes.event(1, CallEnded{0, begun.call, {}, 0, /*withdrawn=*/true});
  planes.deliver_all();
  for (int rank = 0; rank < 2; ++rank) {
    const std::vector<Response>& responses = planes[rank].responses;
    ASSERT_GE(responses.size(), 2u);
    EXPECT_EQ(responses[responses.size() - 2].entries.front().name, "x");
    EXPECT_EQ(responses.back().op, OpKind::kJoin);
  }
}

// Ranks find what is in flight in memory that has room for one call (ops/transport/shared_blocks.h).
TEST(Controller, NoStandingCallBeginsBeforeThatOfAFailedSetHasEnded) {
  CoordinatorSettings settings = usual_settings();
  settings.standing_after = 2;
  settings.standing_limit_bytes = 100;
  Planes planes(3, settings);
  planes.add_set(1, {0, 1});
  planes.add_set(2, {0, 2});
  const Request x = request_of("x", {4}, 1);
  const Request y = request_of("y", {4}, 2);
  for (int i = 0; i < 2; ++i) {
    for (const int rank : {0, 1}) planes.ask(rank, {x});
    planes.deliver_all();
    for (const int rank : {0, 2}) planes.ask(rank, {y});
    planes.deliver_all();
  }
  planes.ask(0, {x});
  const Response begun = planes[0].last();
  ASSERT_TRUE(is_standing_call(begun.call));
  planes.event(0, PeerLost{1, Status::internal("gone")});
  planes.ask(0, {y});
  EXPECT_EQ(planes[0].last().call, begun.call) << "it is asked for, as the call of the set that failed is not over";
  planes.deliver_all();
  planes.event(0, CallEnded{1, begun.call, Status::internal("gone"), 0});
  planes.ask(2, {y});
  planes.deliver_all();
  EXPECT_EQ(planes[0].last().entries.front().name, "y");
  EXPECT_FALSE(is_standing_call(planes[0].last().call));
  for (int i = 0; i < 8 && !is_standing_call(planes[0].last().call); ++i) {
    for (const int rank : {0, 2}) planes.ask(rank, {y});
    planes.deliver_all();
  }
  EXPECT_TRUE(is_standing_call(planes[0].last().call)) << "once it is over, others stand again";
}

TEST(Controller, AnyRankMayEndTheJobAndItEndsOnce) {
  for (const int leaver : {0, 2}) {
    Planes planes(3);
    planes.ask(1, {request_of("x")});
    planes.deliver_all();
    planes.event(leaver, ShutdownWanted{});
    planes.event(1, ShutdownWanted{});
    planes.deliver_all();
    planes.event(leaver, ShutdownWanted{});
    planes.deliver_all();
    for (int rank = 0; rank < 3; ++rank) {
      ASSERT_EQ(planes[rank].responses.size(), 1u) << "rank " << rank;
      EXPECT_EQ(planes[rank].last().kind, Response::Kind::kShutdown);
    }
  }
}

TEST(Controller, WhatWasAgreedBeforeTheEndIsSentBeforeIt) {
  Planes planes(2);
  keep_busy(planes);
  planes.all_ask(request_of("a"));
  planes.deliver_all();
  planes.event(1, ShutdownWanted{});
  planes.deliver_all();
  ASSERT_EQ(planes[1].responses.size(), 2u);
  EXPECT_EQ(planes[1].responses[0].kind, Response::Kind::kExecute);
  EXPECT_EQ(planes[1].responses[1].kind, Response::Kind::kShutdown);
}

// ---- nonsense
// --------------------------------------------------------------------------------------------------------

TEST(Controller, APeerThatSendsNonsenseIsLost) {
  const std::vector<std::vector<std::byte>> to_coordinator{
      {}, {std::byte{99}}, {std::byte{1}, std::byte{200}}, encode(ResponsesMessage{})};
  for (const auto& message : to_coordinator) {
    Planes planes(3);
    planes.event(0, MessageArrived{1, message});
    planes.deliver_all();
    ASSERT_EQ(planes[0].failed_sets.size(), 1u);
    EXPECT_NE(planes[0].failed_sets[0].reason.text().find("rank 1 is lost"), std::string::npos)
        << planes[0].failed_sets[0].reason.text();
    EXPECT_EQ(planes[2].failed_sets.size(), 1u) << "the others are told";
  }
  for (const auto& message : {encode(RequestsMessage{}), encode_shutdown(), encode(StallQueryMessage{})}) {
    Planes planes(3);
    planes.event(1, MessageArrived{2, message});  // only the coordinator takes these
    EXPECT_EQ(planes[1].failed_sets.size(), 1u);
  }
  Planes planes(2);  // an id that was never announced
  ResponsesMessage unknown;
  unknown.responses.resize(1);
  unknown.responses[0].entries.push_back({"", {}, {}, 55, {}});
  unknown.as_cache_id = {true};
  planes.event(1, MessageArrived{0, encode(unknown)});
  ASSERT_EQ(planes[1].failed_sets.size(), 1u);
  EXPECT_NE(planes[1].failed_sets[0].reason.text().find("cannot be understood"), std::string::npos);
  EXPECT_TRUE(planes[1].responses.empty());
}

TEST(Controller, ANewProcessSetThatCannotBeEndsTheTrustInItsSender) {
  for (const Shape& ranks : {Shape{}, Shape{0, 9}, Shape{-1, 1}, Shape{1, 0}, Shape{1, 1}, Shape{1, 1ll << 40}}) {
    Planes planes(3);
    ResponsesMessage added;
    added.responses.resize(1);
    added.responses[0].op = OpKind::kProcessSetAdd;
    added.responses[0].new_process_set = 1;
    added.responses[0].entries.push_back({"add", ranks, {}, 0, {}});
    added.as_cache_id = {false};
    planes.event(1, MessageArrived{0, encode(added)});
    ASSERT_EQ(planes[1].failed_sets.size(), 1u) << shape_text(ranks);
    EXPECT_NE(planes[1].failed_sets[0].reason.text().find("cannot be understood"), std::string::npos);
    EXPECT_EQ(planes[1].sets.find(1), nullptr);
  }
  for (const ProcessSetId gone : {ProcessSetId{0}, ProcessSetId{7}}) {
    Planes planes(3);
    ResponsesMessage removed;
    removed.responses.resize(1);
    removed.responses[0].op = OpKind::kProcessSetRemove;
    removed.responses[0].new_process_set = gone;
    removed.responses[0].entries.push_back({"remove", Shape{gone}, {}, 0, {}});
    removed.as_cache_id = {false};
    planes.event(1, MessageArrived{0, encode(removed)});
    ASSERT_EQ(planes[1].failed_sets.size(), 1u) << gone;
  }
  Planes planes(3);
  ResponsesMessage empty;
  empty.responses.resize(1);
  planes.event(1, MessageArrived{0, encode(empty)});
  ASSERT_EQ(planes[1].failed_sets.size(), 1u);
}

TEST(Controller, ALossOfARankThatDoesNotExistOrOfOneselfIsNoLoss) {
  Planes planes(3);
  for (const int rank : {-1, 3, 1000, 1}) {
    planes.event(1, MessageArrived{0, encode(PeerLostMessage{rank, "nonsense"})});
  }
  EXPECT_TRUE(planes[1].sets.failure(0).ok());
  EXPECT_TRUE(planes[1].failed_sets.empty());
}

}  // namespace
}  // namespace hvd::testing
