// What every transport does when a peer leaves, is lost or is given up, and where a fault is injected. See
// transport_conformance.h.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "tests/ops/transport/transport_conformance.h"

namespace hvd::testing {
namespace {

// ---- the end

TEST_P(TransportConformance, AGoodbyeComesAfterWhatWasQueuedBeforeItAndIsNoLoss) {
  Ends ends(3);
  connect(ends);
  const Bytes eager = pattern(20'000, 7);
  const TransferRef send = ends[0].send(1, {0, 0, 0}, eager);
  for (std::size_t i = 0; i < 10; ++i) ends[0].transport->post(1, pattern(200'000, i));
  Bytes waits(100'000);
  const TransferRef never = ends[1].receive(0, {0, 1, 0}, waits);
  ends[0].transport->say_goodbye(1);
  ends[0].transport->say_goodbye(1);  // once is enough
  ends[0].transport->say_goodbye(2);
  ASSERT_TRUE(ends.drive_until([&] { return !ends[1].goodbyes.empty() && !ends[2].goodbyes.empty(); }));
  EXPECT_EQ(ends[1].goodbyes, std::vector<int>{0});
  EXPECT_EQ(ends[1].control.size(), 10u);
  EXPECT_TRUE(send->done());
  EXPECT_TRUE(never->done());
  EXPECT_NE(never->status().text().find("rank 0 is lost"), std::string::npos) << never->status().text();
  // What had arrived before can still be taken.
  Bytes place(eager.size());
  const TransferRef late = ends[1].receive(0, {0, 0, 0}, place);
  EXPECT_TRUE(late->done() && late->status().ok());
  EXPECT_TRUE(place == eager);
  // What would have to come after it ends at once.
  const TransferRef hopeless = ends[1].receive(0, {0, 2, 0}, place);
  EXPECT_TRUE(hopeless->done() && !hopeless->status().ok());
  EXPECT_TRUE(ends.drive_until([&] { return ends[0].transport->flushed(); }));
  ends[0].transport.reset();
  for (int i = 0; i < 100; ++i) ends.step();
  EXPECT_TRUE(ends[1].lost.empty()) << "who has said goodbye is not lost";
  EXPECT_EQ(ends[1].goodbyes, std::vector<int>{0});
  ends[1].transport->post(2, bytes_of("the others go on"));
  EXPECT_TRUE(ends.drive_until([&] { return !ends[2].control.empty(); }));
}

TEST_P(TransportConformance, WhoHasSaidGoodbyeStillHears) {
  Ends ends(2);
  connect(ends);
  // Far more than the link takes in, so that it is under way when the other's goodbye comes.
  const Bytes large = pattern(12 << 20, 8);
  ends[1].transport->post(0, large);
  ends[1].transport->post(0, bytes_of("last words"));
  ends[1].transport->say_goodbye(0);
  ends[0].transport->say_goodbye(1);
  ASSERT_TRUE(ends.drive_until([&] { return !ends[1].goodbyes.empty(); }));
  ASSERT_TRUE(ends.drive_until([&] { return !ends[0].goodbyes.empty(); })) << "its goodbye was dropped";
  ASSERT_EQ(ends[0].control.size(), 2u);
  EXPECT_TRUE(ends[0].control[0].second == large);
  EXPECT_EQ(ends[0].control[1].second, bytes_of("last words"));
  EXPECT_TRUE(ends[0].lost.empty() && ends[1].lost.empty());
  EXPECT_TRUE(ends.drive_until([&] { return ends[0].transport->flushed() && ends[1].transport->flushed(); }));
}

TEST_P(TransportConformance, ALostPeerEndsEveryTransferWithItsRankAndIsToldOnce) {
  Ends ends(3);
  connect(ends);
  const Bytes large = pattern(6 << 20, 9);
  Bytes place(large.size());
  Bytes other(large.size());
  std::vector<TransferRef> doomed{ends[0].send(1, {0, 0, 0}, large),     // without credit
                                  ends[0].receive(1, {0, 1, 0}, place),  // waits for credit to be used
                                  ends[0].receive(1, {0, 2, 0}, std::span(place).first(5)),  // waits for an eager one
                                  ends[0].send(1, {0, 3, 0}, large),                         // has credit
                                  ends[0].receive(1, {0, 4, 0}, other)};                     // half-way in
  const TransferRef gets = ends[1].receive(0, {0, 3, 0}, place);
  const TransferRef gives = ends[1].send(0, {0, 4, 0}, large);
  ASSERT_TRUE(ends.drive_until([&] { return gets->delivered() > 0 && doomed[4]->delivered() > 0; }));
  const Bytes good = pattern(1000, 1);
  Bytes good_place(good.size());
  ends[1].transport.reset();
  ASSERT_TRUE(ends.drive_until([&] { return !ends[0].lost.empty() && !ends[2].lost.empty(); }));
  for (std::size_t i = 0; i < doomed.size(); ++i) {
    SCOPED_TRACE(fmt::format("transfer {}", i));
    ASSERT_TRUE(doomed[i]->done());
    EXPECT_EQ(doomed[i]->status().code(), StatusCode::kInternal);
    EXPECT_NE(doomed[i]->status().text().find("rank 1 is lost"), std::string::npos) << doomed[i]->status().text();
  }
  ASSERT_EQ(ends[0].lost.size(), 1u);
  EXPECT_EQ(ends[0].lost[0].first, 1);
  EXPECT_NE(ends[0].lost[0].second.text().find("rank 1 is lost"), std::string::npos) << ends[0].lost[0].second.text();
  // Later ones end at once, posts go nowhere, and the other connection is as good as before.
  const TransferRef later = ends[0].send(1, {0, 9, 0}, large);
  EXPECT_TRUE(later->done() && !later->status().ok());
  const TransferRef later_receive = ends[0].receive(1, {0, 9, 0}, place);
  EXPECT_TRUE(later_receive->done() && !later_receive->status().ok());
  ends[0].transport->post(1, bytes_of("nobody hears"));
  ends[0].transport->say_goodbye(1);
  const TransferRef receive = ends[2].receive(0, {0, 0, 0}, good_place);
  const TransferRef send = ends[0].send(2, {0, 0, 0}, good);
  ASSERT_TRUE(ends.drive_until_done({receive, send}));
  EXPECT_TRUE(good_place == good);
  EXPECT_TRUE(ends.drive_until([&] { return ends[0].transport->flushed(); }));
  EXPECT_EQ(ends[0].lost.size(), 1u);
  EXPECT_EQ(ends[2].lost.size(), 1u);
  EXPECT_TRUE(ends[0].goodbyes.empty());
}

TEST_P(TransportConformance, ALostPeerWakesASleeper) {
  Ends ends(2);
  connect(ends);
  ASSERT_TRUE(ends.drive_until([&] { return !ends.step() && ends[0].transport->arm(); }));
  const int wakes = ends[0].poller.wakes();
  ends[1].transport.reset();
  EXPECT_TRUE(is_rung(ends[0], wakes));
  ends[0].transport->disarm();
  ASSERT_TRUE(ends.drive_until([&] { return !ends[0].lost.empty(); }));
  // A link that is gone keeps nobody awake.
  EXPECT_TRUE(ends.drive_until([&] { return !ends.step() && ends[0].transport->arm(); }));
}

TEST_P(TransportConformance, APeerThatVanishesAfterOurGoodbyeIsStillTold) {
  Ends ends(2);
  connect(ends);
  ends[0].transport->say_goodbye(1);
  ends[1].transport.reset();
  EXPECT_TRUE(ends.drive_until([&] { return !ends[0].lost.empty(); }))
      << "who waits for its farewell never learns of it";
}

TEST_P(TransportConformance, FramesOfAnotherGenerationAreDiscarded) {
  if (GetParam().agrees_on_generation) GTEST_SKIP() << "such ranks do not meet in the first place";
  Ends ends(2);
  connect(ends, [](int rank) {
    StreamTransport::Settings settings;
    settings.generation = static_cast<std::uint32_t>(rank);
    return settings;
  });
  const Bytes small = pattern(100, 1);
  const Bytes eager = pattern(20'000, 2);
  ends[0].transport->post(1, small);
  ends[0].send(1, {0, 0, 0}, small);
  ends[0].send(1, {0, 0, 1}, eager);
  ends[0].transport->say_goodbye(1);
  for (int i = 0; i < 1000; ++i) ends.step();
  Bytes place(eager.size());
  const TransferRef receive = ends[1].receive(0, {0, 0, 1}, place);
  for (int i = 0; i < 1000; ++i) ends.step();
  EXPECT_TRUE(ends[1].control.empty());
  EXPECT_TRUE(ends[1].goodbyes.empty());
  EXPECT_TRUE(ends[1].lost.empty());
  EXPECT_FALSE(receive->done());
  EXPECT_TRUE(ends[0].transport->flushed()) << "they were not even read";
}

// ---- faults

TEST_P(TransportConformance, TheFaultHookMayDropOrFailAtEachPoint) {
  struct Hook final : FaultHook {
    FaultAction at(FaultPoint asked, int asked_peer) override {
      peer = asked_peer;
      return asked == point ? std::exchange(action, FaultAction::kPass) : FaultAction::kPass;
    }
    FaultPoint point = FaultPoint::kControlSend;
    FaultAction action = FaultAction::kPass;
    int peer = -1;
  } hook;
  Ends ends(2);
  connect(ends);
  ends[0].transport->set_fault_hook(&hook);
  const auto strike = [&](FaultPoint point, FaultAction action) {
    hook.point = point;
    hook.action = action;
  };
  // Control messages, both ways through the struck rank.
  for (const FaultPoint point : {FaultPoint::kControlSend, FaultPoint::kControlReceive}) {
    const int from = point == FaultPoint::kControlSend ? 0 : 1;
    End& to = ends[1 - from];
    strike(point, FaultAction::kDrop);
    ends[from].transport->post(1 - from, bytes_of("dropped"));
    ends[from].transport->post(1 - from, bytes_of("next"));
    ASSERT_TRUE(ends.drive_until([&] { return !to.control.empty(); }));
    EXPECT_EQ(to.control[0].second, bytes_of("next"));
    to.control.clear();
    EXPECT_EQ(hook.peer, 1);
  }
  // Transfers.
  const Bytes given = pattern(100, 1);
  Bytes place(100);
  std::uint32_t sequence = 0;
  for (const FaultPoint point : {FaultPoint::kSegmentSend, FaultPoint::kSegmentReceive}) {
    const auto start = [&](const TransferKey& key) {
      return point == FaultPoint::kSegmentSend ? ends[0].send(1, key, given) : ends[0].receive(1, key, place);
    };
    strike(point, FaultAction::kFail);
    const TransferRef failed = start({0, 0, sequence++});
    EXPECT_TRUE(failed->done());
    EXPECT_NE(failed->status().text().find("HOROVOD_FAULT"), std::string::npos) << failed->status().text();
    strike(point, FaultAction::kDrop);
    const TransferRef dropped = start({0, 0, sequence++});
    ASSERT_TRUE(ends.all_hear_each_other());
    EXPECT_FALSE(dropped->done());
    ends[0].transport->cancel(dropped, Status::internal("given up"));
    EXPECT_EQ(dropped->status().text(), "given up");
  }
  EXPECT_TRUE(ends[0].lost.empty() && ends[1].lost.empty());
}

TEST_P(TransportConformance, ACorruptedControlMessageIsNotDeliveredAndItsSenderIsLost) {
  for (const FaultPoint corrupted : {FaultPoint::kControlSend, FaultPoint::kControlReceive}) {
    struct Hook final : FaultHook {
      FaultAction at(FaultPoint asked, int /*peer*/) override {
        return asked == point ? FaultAction::kCorrupt : FaultAction::kPass;
      }
      FaultPoint point = FaultPoint::kControlSend;
    } hook;
    hook.point = corrupted;
    Ends ends(2);
    connect(ends);
    const int sender = corrupted == FaultPoint::kControlSend ? 0 : 1;
    End& receiver = ends[1 - sender];
    ends[0].transport->set_fault_hook(&hook);
    ends[sender].transport->post(receiver.rank, bytes_of("corrupt"));
    ASSERT_TRUE(ends.drive_until([&] { return !receiver.lost.empty(); }));
    EXPECT_EQ(receiver.lost[0].first, sender);
    EXPECT_NE(receiver.lost[0].second.text().find("a control message has a wrong checksum"), std::string::npos)
        << receiver.lost[0].second.text();
    EXPECT_TRUE(receiver.control.empty());
    // The sender lives, and is told.
    ASSERT_TRUE(ends.drive_until([&] { return !ends[sender].lost.empty(); }));
    EXPECT_EQ(ends[sender].lost[0].first, receiver.rank);
  }
}

// What a stream says between messages is guarded by the checksum of its header.
TEST_P(TransportConformance, TheFaultHookMayDropOrCorruptWhatIsSaidBetweenMessages) {
  struct Hook final : FaultHook {
    FaultAction at(FaultPoint asked, int /*peer*/) override { return asked == point ? action : FaultAction::kPass; }
    FaultPoint point = FaultPoint::kGoodbyeSend;
    FaultAction action = FaultAction::kPass;
  };
  const Bytes given = pattern(kEager + 1, 1);
  const auto say = [&](Ends& ends, FaultPoint point, Bytes& place) {
    ends[0].send(1, {0, 0, 0}, given);
    ends[1].receive(0, {0, 0, 0}, place);
    for (int i = 0; i < 100; ++i) ends.step();
    if (point == FaultPoint::kGoodbyeSend) ends[0].transport->say_goodbye(1);
  };
  for (const FaultPoint point : {FaultPoint::kGoodbyeSend, FaultPoint::kOfferSend, FaultPoint::kTakenSend}) {
    if (point != FaultPoint::kGoodbyeSend && !GetParam().pulls) continue;
    SCOPED_TRACE(static_cast<int>(point));
    const int sender = point == FaultPoint::kTakenSend ? 1 : 0;
    for (const FaultAction action : {FaultAction::kDrop, FaultAction::kCorrupt}) {
      Hook hook;
      hook.point = point;
      hook.action = action;
      Bytes place(given.size());
      Ends ends(2);
      connect(ends);
      ends[sender].transport->set_fault_hook(&hook);
      say(ends, point, place);
      if (action == FaultAction::kDrop) {
        ASSERT_TRUE(ends.all_hear_each_other());
        EXPECT_TRUE(ends[0].lost.empty() && ends[1].lost.empty());
        EXPECT_TRUE(ends[1].goodbyes.empty());
        EXPECT_EQ(place == given, point != FaultPoint::kOfferSend);
      } else {
        End& receiver = ends[1 - sender];
        ASSERT_TRUE(ends.drive_until([&] { return !receiver.lost.empty(); }));
        EXPECT_NE(receiver.lost[0].second.text().find("a frame header with a wrong checksum"), std::string::npos)
            << receiver.lost[0].second.text();
      }
    }
  }
}

TEST_P(TransportConformance, APeerThatIsGivenUpLosesThisRank) {
  Ends ends(2);
  connect(ends);
  Bytes place(100'000);
  const TransferRef receive = ends[0].receive(1, {0, 0, 0}, place);
  ends[0].transport->give_up(1, Status::internal("another rank has lost it"));
  ends[0].transport->give_up(1, Status::internal("said twice"));
  ASSERT_EQ(ends[0].lost.size(), 1u);
  EXPECT_NE(ends[0].lost[0].second.text().find("another rank has lost it"), std::string::npos);
  EXPECT_TRUE(receive->done() && !receive->status().ok());
  ASSERT_TRUE(ends.drive_until([&] { return !ends[1].lost.empty(); }));
  EXPECT_EQ(ends[1].lost[0].first, 0);
}

}  // namespace
}  // namespace hvd::testing
