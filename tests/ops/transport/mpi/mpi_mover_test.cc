// Tags, pieces that are not as announced, and errors of MPI: each ends the transfer that it strikes, and says whose.

#include "ops/transport/mpi/mpi_mover.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstring>

#include "tests/ops/transport/mpi/mpi_job.h"

namespace hvd::testing {
namespace {

using Call = FakeMpi::Call;
using When = FakeMpi::When;

class MpiMoverTest : public ::testing::Test {
 protected:
  std::mt19937_64 random_ = generator_of_this_run();
  const Bytes given_ = pattern(3 * kPiece + 1, 1);
  Bytes place_ = Bytes(given_.size());
};

// ---- tags

TEST_F(MpiMoverTest, ATagIsTakenOnceUntilItsTransferHasEndedAndPeersHaveTheirOwn) {
  const int largest = kMpiFirstTransferTag + 2;
  const auto job = MpiJob::opened(3, random_, largest);
  std::vector<TransferRef> sends;
  for (std::uint32_t i = 0; i < 3; ++i) sends.push_back((*job)[0].send(1, {0, 0, i}, given_));
  const TransferRef refused = (*job)[0].send(1, {0, 0, 3}, given_);
  ASSERT_TRUE(refused->done());
  EXPECT_TRUE(says(refused->status(), "3 transfers to rank 1 are in flight, as many as MPI has tags for"));
  const TransferRef small = (*job)[0].send(1, {0, 0, 4}, std::span(given_).first(kInline));  // needs no tag
  const TransferRef other = (*job)[0].send(2, {0, 0, 0}, given_);
  const TransferRef at_other = (*job)[2].receive(0, {0, 0, 0}, place_);
  ASSERT_TRUE(job->drive_until_done({small, other, at_other}));
  EXPECT_TRUE(place_ == given_);
  // One that ends gives its tag back, again and again.
  for (std::uint32_t i = 0; i < 20; ++i) {
    Bytes place(given_.size());
    const std::uint32_t oldest = i < 3 ? i : i + 2;
    const TransferRef receive = (*job)[1].receive(0, {0, 0, oldest}, place);
    ASSERT_TRUE(job->drive_until_done({receive, sends[i]}));
    EXPECT_TRUE(place == given_) << "transfer " << i;
    sends.push_back((*job)[0].send(1, {0, 0, 5 + i}, given_));
    EXPECT_FALSE(sends.back()->done()) << sends.back()->status().text();
  }
}

TEST_F(MpiMoverTest, ATagStaysTakenWhenItsSendHasFailed) {
  const auto job = MpiJob::opened(2, random_, kMpiFirstTransferTag);
  job->mpi.inject({Call::kSendMatched, When::kEnd, 0});
  const TransferRef failed = (*job)[0].send(1, {0, 0, 0}, given_);
  ASSERT_TRUE(job->drive_until_done({failed}));
  EXPECT_TRUE(says(failed->status(), "a transfer with rank 1 failed in MPI: fake error 7"));
  EXPECT_TRUE(says((*job)[0].send(1, {0, 0, 1}, given_)->status(), "1 transfers to rank 1 are in flight"));
}

// ---- pieces

TEST_F(MpiMoverTest, APieceThatIsNotAsAnnouncedIsAnErrorOfItsTransfer) {
  for (const auto& [sent, text] : {std::pair(kPiece - 1, "rank 0 sent 999 bytes where it had announced 1000 (mpi)"),
                                   std::pair(kPiece + 1, "a transfer with rank 0 failed in MPI: fake error 8")}) {
    for (const bool combine : {false, true}) {
      const auto job = MpiJob::opened(2, random_);
      MpiAnnouncement announcement;
      announcement.life = 1;
      announcement.bytes = given_.size();
      announcement.tag = 9;
      announcement.piece_bytes = kPiece;
      const EncodedAnnouncement head = encode(announcement);
      ASSERT_TRUE(job->endpoint(0).mover().mail(1, 1, {head.begin(), head.end()}).ok());
      MpiRequest request{};
      ASSERT_EQ(job->mpi.api(0).send_matched(given_.data(), sent, 1, 9, &request), 0);
      Arrival arrival{place_.data(), place_.data(), nullptr, 1, false};
      if (combine) arrival.combine = [](void*, const void*, const void*, std::size_t) {};
      const TransferRef receive = (*job)[1].receive(0, {}, given_.size(), arrival);
      ASSERT_TRUE(job->drive_until_done({receive}));
      EXPECT_TRUE(says(receive->status(), text));
    }
  }
}

TEST_F(MpiMoverTest, AnAnnouncementThatComesTwiceEndsWhatWaits) {
  const auto job = MpiJob::opened(2, random_);
  MpiAnnouncement announcement;
  announcement.life = 1;
  announcement.carries_payload = true;
  const EncodedAnnouncement head = encode(announcement);
  for (int i = 0; i < 2; ++i) ASSERT_TRUE(job->endpoint(0).mover().mail(1, 1, {head.begin(), head.end()}).ok());
  const TransferRef waits = (*job)[1].receive(0, {0, 1, 0}, place_);
  ASSERT_TRUE(job->drive_until_done({waits}));
  EXPECT_TRUE(says(waits->status(), "rank 0 announced one transfer twice (channel 0/0, number 0, mpi)"));
  EXPECT_TRUE(says((*job)[1].receive(0, {0, 2, 0}, place_)->status(), "twice")) << "from then on";
}

TEST_F(MpiMoverTest, WhatIsNoAnnouncementEndsWhatWaitsAndNamesItsSender) {
  const auto job = MpiJob::opened(2, random_);
  const TransferRef waits = (*job)[1].receive(0, {0, 1, 0}, place_);
  MpiRequest request{};
  ASSERT_EQ(job->mpi.api(0).send(given_.data(), 200, 1, kMpiMailTag, &request), 0);
  ASSERT_TRUE(job->drive_until_done({waits}));
  EXPECT_TRUE(says(waits->status(), "rank 0 (mpi): received bytes that are no frame"));
  EXPECT_TRUE(says((*job)[1].receive(0, {0, 2, 0}, place_)->status(), "rank 0 (mpi)"));
}

// ---- errors of MPI

TEST_F(MpiMoverTest, AnErrorOfASendEndsItAndNamesThePeer) {
  const std::string text = "a transfer with rank 1 failed in MPI: fake error 7";
  for (const FakeMpi::Fault& fault :
       {FakeMpi::Fault{Call::kSend, When::kStart, 0},  // the announcement
        FakeMpi::Fault{Call::kSend, When::kEnd, 0}, FakeMpi::Fault{Call::kSendMatched, When::kStart, 0},
        FakeMpi::Fault{Call::kSendMatched, When::kEnd, 0},
        FakeMpi::Fault{Call::kSendMatched, When::kStart, 0, 2},  // a later piece
        FakeMpi::Fault{Call::kSendMatched, When::kEnd, 0, 2}}) {
    SCOPED_TRACE(fmt::format("call {}, at its {}, after {}", static_cast<int>(fault.call),
                             fault.when == When::kStart ? "start" : "end", fault.after));
    const auto job = MpiJob::opened(2, random_);
    job->mpi.inject(fault);
    const TransferRef receive = (*job)[1].receive(0, {0, 0, 0}, place_);
    const TransferRef send = (*job)[0].send(1, {0, 0, 0}, given_);
    ASSERT_TRUE(job->drive_until_done({send}));
    EXPECT_TRUE(says(send->status(), text));
    job->step(200);
    EXPECT_FALSE(receive->done()) << receive->status().text();
    (*job)[1].transport->cancel(receive, Status::internal("told by the sender"));
    EXPECT_TRUE(says(receive->status(), "told by the sender"));
    job->step(200);
  }
}

// Its transfer may have ended long ago, and its receiver waits in vain: it must not pass unseen.
TEST_F(MpiMoverTest, AnAnnouncementThatIsLostEndsAllThatIsSentFromThenOn) {
  const auto job = MpiJob::opened(2, random_);
  job->mpi.inject({Call::kSend, When::kEnd, 0});
  const TransferRef small = (*job)[0].send(1, {0, 0, 0}, std::span(given_).first(10));
  EXPECT_TRUE(small->done() && small->status().ok());
  job->step(200);
  for (const std::size_t size : {std::size_t{10}, given_.size()}) {
    const TransferRef later = (*job)[0].send(1, {0, 1, 0}, std::span(given_).first(size));
    ASSERT_TRUE(later->done());
    EXPECT_TRUE(says(later->status(), "a transfer with rank 1 failed in MPI: fake error 7"));
  }
}

TEST_F(MpiMoverTest, AnAnnouncementOfAnEarlierLifeMayBeLost) {
  const auto job = MpiJob::opened(2, random_);
  job->mpi.inject({Call::kSend, When::kEnd, 0});
  (*job)[0].send(1, {0, 0, 0}, std::span(given_).first(10));
  for (const int rank : {0, 1}) job->close(rank);
  for (const int rank : {0, 1}) job->open(rank, 2);
  job->step(200);
  const TransferRef send = (*job)[0].send(1, {0, 0, 0}, given_);
  const TransferRef receive = (*job)[1].receive(0, {0, 0, 0}, place_);
  ASSERT_TRUE(job->drive_until_done({send, receive}));
  EXPECT_TRUE(place_ == given_);
}

TEST_F(MpiMoverTest, AnErrorOfAReceiveEndsItAndNamesThePeer) {
  for (const When when : {When::kStart, When::kEnd}) {
    for (const int pieces_before : {0, 1, 3}) {
      for (const bool combine : {false, true}) {
        SCOPED_TRACE(fmt::format("{} pieces before, combine {}", pieces_before, combine));
        const auto job = MpiJob::opened(2, random_);
        Arrival arrival{place_.data(), place_.data(), nullptr, 1, false};
        if (combine) arrival.combine = [](void*, const void*, const void*, std::size_t) {};
        job->mpi.hold_transfers(true);
        const TransferRef send = (*job)[0].send(1, {0, 0, 0}, given_);
        job->step(100);  // the announcement is here
        job->mpi.inject({Call::kReceive, when, 1, pieces_before});
        const TransferRef receive = (*job)[1].receive(0, {0, 0, 0}, given_.size(), arrival);
        job->mpi.hold_transfers(false);
        ASSERT_TRUE(job->drive_until_done({receive}));
        EXPECT_TRUE(says(receive->status(), "a transfer with rank 0 failed in MPI: fake error 7"));
      }
    }
  }
}

TEST_F(MpiMoverTest, WhenMpiFailsAltogetherEverythingEnds) {
  const auto job = MpiJob::opened(2, random_);
  job->mpi.hold_transfers(true);
  const TransferRef send = (*job)[0].send(1, {0, 0, 0}, given_);
  const TransferRef announced = (*job)[0].receive(1, {0, 0, 0}, place_);
  (*job)[1].send(0, {0, 0, 0}, given_);
  Bytes place(given_.size());
  const TransferRef waits = (*job)[0].receive(1, {0, 1, 0}, place);
  job->step(200);
  EXPECT_FALSE(send->done() || announced->done() || waits->done());
  EXPECT_TRUE((*job)[0].transport->needs_polling());
  job->mpi.break_tests(0, true);
  job->step(2);
  for (const TransferRef& one : {send, announced, waits}) {
    ASSERT_TRUE(one->done());
    EXPECT_TRUE(says(one->status(), "fake error 7"));
  }
  EXPECT_TRUE(says((*job)[0].send(1, {0, 2, 0}, given_)->status(), "fake error 7"));
  EXPECT_TRUE(says((*job)[0].send(1, {0, 3, 0}, std::span(given_).first(1))->status(), "fake error 7"));
  EXPECT_TRUE(says((*job)[0].receive(1, {0, 2, 0}, place)->status(), "fake error 7"));
  EXPECT_FALSE((*job)[0].transport->needs_polling()) << "nothing is waited for any more";
  EXPECT_TRUE((*job)[0].transport->flushed());
  EXPECT_GT(job->endpoint(0).mover().held(), 0u) << "what MPI may still touch is kept";
}

}  // namespace
}  // namespace hvd::testing
