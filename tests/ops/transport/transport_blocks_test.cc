// Blocks that peers read in place, on every transport that has them. See transport_conformance.h.
#include <gtest/gtest.h>
#include <poll.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "tests/ops/transport/transport_conformance.h"

namespace hvd::testing {
namespace {

// A transport has blocks, or says that it has none.
class BlockConformance : public TransportConformance {
 protected:
  // Rank `self` begins call `call` with the other of two ranks.
  static void begin(Ends& ends, int self, std::uint64_t call) {
    SharedBlocks& blocks = *ends[self].transport->blocks();
    const std::array<int, 1> peers{1 - self};
    ASSERT_TRUE(blocks.enter(call, peers));
    ASSERT_FALSE(blocks.claim().has_value());
  }
  static Status show(Ends& ends, int self, BlockStage stage, std::size_t bytes = 0) {
    const std::array<int, 1> peers{1 - self};
    return ends[self].transport->show(peers, stage, bytes);
  }
  static TransferRef await(Ends& ends, int self, int peer, std::uint64_t call, BlockStage stage) {
    End& end = ends[self];
    auto transfer = std::make_shared<Transfer>(end.loop, 0);
    transfer->direction = Transfer::Direction::kReceive;
    transfer->peer = peer;
    transfer->notice = BlockNotice{call, stage};
    end.transport->start(transfer);
    return transfer;
  }
  void SetUp() override {
    if (!GetParam().has_blocks) GTEST_SKIP() << "it has no blocks";
  }
};

TEST_P(TransportConformance, HasBlocksOrSaysThatItHasNone) {
  Ends ends(2);
  connect(ends);
  EXPECT_EQ(ends[0].transport->blocks() != nullptr, GetParam().has_blocks);
}

TEST_P(BlockConformance, WhatIsShownIsSeenByThePeerAndWakesItInTheCall) {
  Ends ends(2);
  connect(ends);
  for (std::uint64_t call = 1; call <= 20; ++call) {
    begin(ends, 0, call);
    begin(ends, 1, call);
    const TransferRef notice = await(ends, 0, 1, call, BlockStage::kOperand);
    ASSERT_FALSE(notice->done());
    ASSERT_EQ(ends[0].transport->look_for(1, BlockStage::kOperand), nullptr);
    ASSERT_TRUE(ends.drive_until([&] { return !ends.step() && ends[0].transport->arm(); }));
    const int wakes = ends[0].poller.wakes();
    ends[1].transport->blocks()->slot()[5] = static_cast<std::byte>(call);
    ASSERT_TRUE(show(ends, 1, BlockStage::kOperand).ok());
    ASSERT_TRUE(is_rung(ends[0], wakes)) << "call " << call;
    ends[0].transport->disarm();
    ASSERT_TRUE(ends.drive_until_done({notice}));
    EXPECT_TRUE(notice->status().ok());
    ASSERT_NE(ends[0].transport->look_for(1, BlockStage::kOperand), nullptr);
    EXPECT_EQ(ends[0].transport->look_for(1, BlockStage::kOperand)[5], static_cast<std::byte>(call));
    // What comes while it is about to sleep keeps it awake.
    const TransferRef second = await(ends, 0, 1, call, BlockStage::kSum);
    ASSERT_TRUE(show(ends, 1, BlockStage::kSum).ok());
    EXPECT_FALSE(ends[0].transport->arm());
    ends[0].transport->disarm();
    ASSERT_TRUE(ends.drive_until_done({second}));
    for (const int self : {0, 1}) {
      const std::array<int, 1> peers{1 - self};
      ends[self].transport->leave_block(peers);
    }
  }
}

TEST_P(BlockConformance, WhoIsNotInTheCallSleepsOn) {
  Ends ends(2);
  connect(ends);
  ASSERT_TRUE(ends.drive_until([&] { return !ends.step() && ends[0].transport->arm(); }));
  const int wakes = ends[0].poller.wakes();
  begin(ends, 1, 1);
  ASSERT_TRUE(show(ends, 1, BlockStage::kOperand).ok());
  EXPECT_EQ(ends[0].poller.wakes(), wakes);
  pollfd place{ends[0].transport->wake_fd(), POLLIN, 0};
  if (GetParam().has_descriptor) {
    EXPECT_EQ(::poll(&place, 1, 0), 0);
  }
  ends[0].transport->disarm();
  begin(ends, 0, 1);
  EXPECT_TRUE(await(ends, 0, 1, 1, BlockStage::kOperand)->done()) << "it was shown before";
}

TEST_P(BlockConformance, WhoHasLeftTheCallByItselfIsNotRungWhenHeldBellsAre) {
  Ends ends(2);
  connect(ends);
  begin(ends, 0, 1);
  begin(ends, 1, 1);
  ends[1].transport->hold_bells();
  ASSERT_TRUE(show(ends, 1, BlockStage::kOperand).ok());
  ASSERT_NE(ends[0].transport->look_for(1, BlockStage::kOperand), nullptr);
  const std::array<int, 1> peers{1};
  ends[0].transport->leave_block(peers);
  ASSERT_TRUE(ends.drive_until([&] { return !ends[0].transport->progress() && ends[0].transport->arm(); }));
  const int wakes = ends[0].poller.wakes();
  ends[1].transport->ring();
  EXPECT_EQ(ends[0].poller.wakes(), wakes);
  pollfd place{ends[0].transport->wake_fd(), POLLIN, 0};
  if (GetParam().has_descriptor) {
    EXPECT_EQ(::poll(&place, 1, 0), 0);
  }
  ends[0].transport->disarm();
}

TEST_P(BlockConformance, WhoLeavesWakesAPeerThatWaitsForItsSlot) {
  Ends ends(3);
  connect(ends);
  for (const std::uint64_t call : {1u, 2u}) {  // given up by rank 1; rank 0 comes to the second
    begin(ends, 1, call);
    ASSERT_TRUE(show(ends, 1, BlockStage::kOperand).ok());
    ends[1].transport->blocks()->leave();
  }
  begin(ends, 0, 2);
  SharedBlocks& blocks = *ends[1].transport->blocks();
  const std::array<int, 1> peers{0};
  // Rank 0 reads one slot; the other one is free again and again, until rank 2 reads that.
  for (const std::uint64_t call : {3u, 4u}) {
    const std::array<int, 1> others{call == 3 ? 0 : 2};
    ASSERT_TRUE(blocks.enter(call, others));
    ASSERT_FALSE(blocks.claim().has_value()) << "call " << call;
    ASSERT_TRUE(ends[1].transport->show(others, BlockStage::kOperand, 0).ok());
    blocks.leave();
  }
  ASSERT_TRUE(ends[2].transport->blocks()->enter(4, std::array<int, 1>{1}));
  ASSERT_TRUE(blocks.enter(5, peers));
  const std::optional<int> reader = blocks.claim();
  ASSERT_TRUE(reader.has_value());
  const TransferRef left = await(ends, 1, *reader, 5, BlockStage::kSlotFree);
  ASSERT_FALSE(left->done());
  ASSERT_TRUE(ends.drive_until([&] { return !ends.step() && ends[1].transport->arm(); }));
  const int wakes = ends[1].poller.wakes();
  const std::array<int, 1> of_rank_0{1};
  ends[0].transport->leave_block(of_rank_0);
  ASSERT_TRUE(is_rung(ends[1], wakes));
  ends[1].transport->disarm();
  ASSERT_TRUE(ends.drive_until_done({left}));
  EXPECT_FALSE(blocks.claim().has_value());
}

TEST_P(BlockConformance, APeerThatWasGivenUpFreesItsSlotWhenItHasEnded) {
  Ends ends(3);
  connect(ends);
  SharedBlocks& blocks = *ends[0].transport->blocks();
  for (const int reader : {1, 2}) {  // each stays in a call, and is lost by what another rank says
    const auto call = static_cast<std::uint64_t>(reader);
    const std::array<int, 1> peers{reader};
    ASSERT_TRUE(blocks.enter(call, peers));
    ASSERT_FALSE(blocks.claim().has_value());
    ASSERT_TRUE(ends[0].transport->show(peers, BlockStage::kOperand, 0).ok());
    blocks.leave();
    ASSERT_TRUE(ends[reader].transport->blocks()->enter(call, std::array<int, 1>{0}));
    ends[0].transport->give_up(reader, Status::internal("rank 0 was told"));
  }
  ASSERT_TRUE(blocks.enter(3, std::array<int, 1>{1}));
  const std::optional<int> reader = blocks.claim();
  ASSERT_TRUE(reader.has_value()) << "they may still be reading";
  const TransferRef free = await(ends, 0, *reader, 3, BlockStage::kSlotFree);
  ends[0].transport->progress();
  EXPECT_FALSE(free->done());
  ends[1].transport.reset();
  ASSERT_TRUE(ends.drive_until_done({free}));
  EXPECT_TRUE(free->status().ok()) << "a loss must not fail calls of others";
  EXPECT_FALSE(blocks.claim().has_value());
}

TEST_P(BlockConformance, ALostPeerEndsWhatWaitsForItButNotWhatItHasShown) {
  Ends ends(2);
  connect(ends);
  begin(ends, 0, 1);
  begin(ends, 1, 1);
  const TransferRef shown = await(ends, 0, 1, 1, BlockStage::kOperand);
  const TransferRef never = await(ends, 0, 1, 1, BlockStage::kSum);
  ASSERT_TRUE(show(ends, 1, BlockStage::kOperand).ok());
  ends[1].transport.reset();
  ASSERT_TRUE(ends.drive_until_done({shown, never}));
  EXPECT_TRUE(shown->status().ok()) << shown->status().text();
  EXPECT_NE(never->status().text().find("rank 1 is lost"), std::string::npos) << never->status().text();
  ends[0].transport->blocks()->leave();
  for (const std::uint64_t call : {2u, 3u, 4u}) {  // a rank that is gone reads nothing
    const std::array<int, 1> peers{1};
    ASSERT_TRUE(ends[0].transport->blocks()->enter(call, peers));
    EXPECT_FALSE(ends[0].transport->blocks()->claim().has_value());
    ends[0].transport->blocks()->leave();
  }
}

TEST_P(BlockConformance, AGoodbyeEndsWhatWaitsForThePeerButNotWhatItHasShown) {
  Ends ends(2);
  connect(ends);
  begin(ends, 0, 1);
  begin(ends, 1, 1);
  const TransferRef shown = await(ends, 0, 1, 1, BlockStage::kOperand);
  const TransferRef never = await(ends, 0, 1, 1, BlockStage::kSum);
  ASSERT_TRUE(show(ends, 1, BlockStage::kOperand).ok());
  ends[1].transport->say_goodbye(0);
  ASSERT_TRUE(ends.drive_until([&] { return !ends[0].goodbyes.empty(); }));
  EXPECT_TRUE(shown->done() && shown->status().ok());
  EXPECT_TRUE(never->done() && !never->status().ok());
  const TransferRef later = await(ends, 0, 1, 1, BlockStage::kSum);
  EXPECT_TRUE(later->done() && !later->status().ok());
}

TEST_P(BlockConformance, ACancelledNoticeEndsAtOnceWithItsReason) {
  Ends ends(2);
  connect(ends);
  begin(ends, 0, 1);
  const TransferRef notice = await(ends, 0, 1, 1, BlockStage::kOperand);
  ends[0].transport->cancel(notice, Status::internal("given up"));
  EXPECT_EQ(notice->status().text(), "given up");
  begin(ends, 1, 1);
  ASSERT_TRUE(show(ends, 1, BlockStage::kOperand).ok());
  EXPECT_FALSE(ends[0].transport->blocks()->has_news());
  ends.step();
  EXPECT_EQ(notice->status().text(), "given up");
}

TEST_P(BlockConformance, TheFaultHookMayDropOrFailWhatIsShownAndWhatIsAwaited) {
  struct Hook final : FaultHook {
    FaultAction at(FaultPoint asked, int /*peer*/) override {
      return asked == point ? std::exchange(action, FaultAction::kPass) : FaultAction::kPass;
    }
    FaultPoint point = FaultPoint::kSegmentSend;
    FaultAction action = FaultAction::kPass;
  } hook;
  Ends ends(2);
  connect(ends);
  begin(ends, 0, 1);
  begin(ends, 1, 1);
  ends[1].transport->set_fault_hook(&hook);
  hook.action = FaultAction::kFail;
  EXPECT_NE(show(ends, 1, BlockStage::kOperand).text().find("HOROVOD_FAULT"), std::string::npos);
  hook.action = FaultAction::kDrop;
  EXPECT_TRUE(show(ends, 1, BlockStage::kOperand, 10).ok());
  EXPECT_EQ(ends[1].transport->statistics().data_bytes_sent.value(), 10);
  EXPECT_EQ(ends[0].transport->look_for(1, BlockStage::kOperand), nullptr);
  EXPECT_TRUE(show(ends, 1, BlockStage::kOperand, 20).ok());
  EXPECT_EQ(ends[1].transport->statistics().data_bytes_sent.value(), 30);
  EXPECT_NE(ends[0].transport->look_for(1, BlockStage::kOperand), nullptr);

  ASSERT_TRUE(show(ends, 0, BlockStage::kOperand).ok());
  hook.point = FaultPoint::kSegmentReceive;
  EXPECT_EQ(ends[1].transport->look_for(0, BlockStage::kOperand), nullptr) << "the hook is to be asked";
  hook.action = FaultAction::kFail;
  const TransferRef failed = await(ends, 1, 0, 1, BlockStage::kOperand);
  EXPECT_NE(failed->status().text().find("HOROVOD_FAULT"), std::string::npos) << failed->status().text();
  hook.action = FaultAction::kDrop;
  const TransferRef dropped = await(ends, 1, 0, 1, BlockStage::kOperand);
  ends.step();
  EXPECT_FALSE(dropped->done());
  EXPECT_TRUE(await(ends, 1, 0, 1, BlockStage::kOperand)->done());
  ends[1].transport->cancel(dropped, Status::internal("given up"));
  EXPECT_EQ(dropped->status().text(), "given up");
}

INSTANTIATE_TEST_SUITE_P(Transports, BlockConformance, ::testing::ValuesIn(transport_kinds()),
                         [](const auto& param) { return param.param.name; });

}  // namespace
}  // namespace hvd::testing
