// Transfers over MPI, from a few bytes to several pieces, under all that MPI may do meanwhile. What every transport has
// to do is asked here in the words of transport_conformance_test.cc; that one asks through control messages, which do
// not travel over MPI.

#include "ops/transport/mpi/mpi_transport.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <utility>

#include "tests/ops/transport/mpi/mpi_job.h"

namespace hvd::testing {
namespace {

class MpiTransportTest : public ::testing::Test {
 protected:
  std::mt19937_64 random_ = generator_of_this_run();
};

constexpr std::array<std::size_t, 14> kSizes{0,
                                             1,
                                             kInline - 1,
                                             kInline,
                                             kInline + 1,
                                             kPiece - 1,
                                             kPiece,
                                             kPiece + 1,
                                             2 * kPiece - 4,
                                             2 * kPiece,
                                             2 * kPiece + 1,
                                             5 * kPiece,
                                             5 * kPiece + 3,
                                             7 * kPiece - 4};

enum class Posted { kReceiveFirst, kSendFirst, kWhileItArrives };

TEST_F(MpiTransportTest, TransfersOfEverySizeArriveWheneverTheReceiveIsPosted) {
  MpiJob job(2, random_);
  job.open(0, 1, kPiece);
  job.open(1, 1, kPiece - 3);  // senders cut as they like; here also within elements
  std::uint32_t sequence = 0;
  for (const std::size_t size : kSizes) {
    for (const Posted posted : {Posted::kReceiveFirst, Posted::kSendFirst, Posted::kWhileItArrives}) {
      for (const int from : {0, 1}) {
        for (const bool combine : {false, true}) {
          if (combine && size % 4 != 0) continue;
          SCOPED_TRACE(
              fmt::format("{} bytes, posted {}, from {}, combine {}", size, static_cast<int>(posted), from, combine));
          const Bytes given = pattern(size, sequence);
          Bytes place(size, std::byte{0});
          const TransferKey key{3, 9, sequence++};
          Arrival arrival{place.data(), place.data(), nullptr, 1, false};
          if (combine) {
            arrival.element_bytes = 4;
            arrival.combine = [](void* out, const void* lhs, const void* rhs, std::size_t count) {
              for (std::size_t i = 0; i < 4 * count; ++i) {
                static_cast<unsigned char*>(out)[i] = static_cast<unsigned char>(
                    static_cast<const unsigned char*>(lhs)[i] | static_cast<const unsigned char*>(rhs)[i]);
              }
            };
          }
          TransferRef receive;
          if (posted == Posted::kReceiveFirst) receive = job[1 - from].receive(from, key, size, arrival);
          const TransferRef send = job[from].send(1 - from, key, given);
          job.step(posted == Posted::kSendFirst ? 60 : 2);
          if (!receive) receive = job[1 - from].receive(from, key, size, arrival);
          ASSERT_TRUE(job.drive_until_done({send, receive}));
          EXPECT_TRUE(send->status().ok()) << send->status().text();
          EXPECT_TRUE(receive->status().ok()) << receive->status().text();
          EXPECT_EQ(receive->delivered(), size);
          ASSERT_TRUE(place == given);
        }
      }
    }
  }
  ASSERT_TRUE(job.comes_to_rest());
  for (const int rank : {0, 1}) {
    EXPECT_TRUE(job[rank].transport->flushed());
    EXPECT_FALSE(job[rank].transport->needs_polling());
    EXPECT_TRUE(job[rank].transport->arm());
  }
}

TEST_F(MpiTransportTest, ASizeThatDoesNotMatchIsAnErrorOfThatTransferAlone) {
  const auto job = MpiJob::opened(2, random_);
  const Bytes given = pattern(10 * kPiece, 3);
  Bytes place(10 * kPiece);
  std::uint32_t sequence = 0;
  for (const bool receive_first : {true, false}) {
    for (const auto& [sent, expected] : std::vector<std::pair<std::size_t, std::size_t>>{{0, 1},
                                                                                         {1, 0},
                                                                                         {10, 11},
                                                                                         {kInline, kInline + 1},
                                                                                         {kInline + 1, kInline},
                                                                                         {kPiece, kPiece - 1},
                                                                                         {kPiece, kPiece + 1},
                                                                                         {kPiece + 1, kPiece},
                                                                                         {7 * kPiece, 2},
                                                                                         {2, 7 * kPiece}}) {
      SCOPED_TRACE(fmt::format("{} sent, {} expected", sent, expected));
      const TransferKey key{0, 4, sequence++};
      TransferRef receive;
      if (receive_first) receive = (*job)[1].receive(0, key, std::span(place).first(expected));
      const TransferRef send = (*job)[0].send(1, key, std::span(given).first(sent));
      if (!receive_first) {
        job->step(60);
        receive = (*job)[1].receive(0, key, std::span(place).first(expected));
      }
      ASSERT_TRUE(job->drive_until_done({send, receive}));
      EXPECT_TRUE(send->status().ok()) << "its bytes were taken and dropped: " << send->status().text();
      EXPECT_TRUE(says(receive->status(),
                       fmt::format("rank 0 sent {} bytes where this rank expects {} (mpi)", sent, expected)));
    }
  }
  const TransferRef good = (*job)[1].receive(0, {0, 4, sequence}, place);
  const TransferRef sent = (*job)[0].send(1, {0, 4, sequence}, given);
  ASSERT_TRUE(job->drive_until_done({good, sent}));
  EXPECT_TRUE(place == given);
  EXPECT_TRUE(job->comes_to_rest());
}

// ---- cancelling

// Bytes of a receive whose memory is gone as soon as the transport lets go of it: address sanitizer sees what comes
// after that.
struct CancelledReceive {
  CancelledReceive(MpiJob& job, const TransferKey& key, std::size_t bytes) : owner(job[1]) {
    auto memory = std::make_shared<Bytes>(bytes);
    watch = memory;
    transfer = owner.receive(0, key, *memory);
    transfer->keep_alive = std::move(memory);
  }
  void cancel() {
    owner.transport->cancel(transfer, Status::internal("cancelled for the test"));
    EXPECT_TRUE(says(transfer->status(), "cancelled for the test"));
    transfer.reset();
  }
  End& owner;
  std::weak_ptr<Bytes> watch;
  TransferRef transfer;
};

TEST_F(MpiTransportTest, ACancelledReceiveMayBeAtAnyStage) {
  constexpr std::size_t size = 3 * kPiece + 5;
  const Bytes given = pattern(size, 4);
  enum class Stage { kNothingSent, kAnnounced, kAnnouncedLate, kMet, kBetweenPieces, kArrivedInside };
  for (const Stage stage : {Stage::kNothingSent, Stage::kAnnounced, Stage::kAnnouncedLate, Stage::kMet,
                            Stage::kBetweenPieces, Stage::kArrivedInside}) {
    SCOPED_TRACE(fmt::format("stage {}", static_cast<int>(stage)));
    const auto job = MpiJob::opened(2, random_);
    const auto bytes = stage == Stage::kArrivedInside ? std::span(given).first(kInline) : std::span(given);
    CancelledReceive receive(*job, {0, 5, 0}, bytes.size());
    TransferRef send;
    const auto start = [&] { send = (*job)[0].send(1, {0, 5, 0}, bytes); };
    switch (stage) {
      case Stage::kNothingSent:
        receive.cancel();
        EXPECT_TRUE(receive.watch.expired());
        start();
        break;
      case Stage::kAnnounced:      // MPI gives the receive back
      case Stage::kAnnouncedLate:  // or it does not, though nothing has come yet
        job->mpi.hold_transfers(true);
        job->mpi.cancel_too_late(stage == Stage::kAnnouncedLate);
        start();
        ASSERT_TRUE(job->drive_until([&] { return job->endpoint(1).mover().held() == 1; }));
        receive.cancel();
        EXPECT_FALSE(receive.watch.expired()) << "MPI still has this memory";
        job->step(100);
        EXPECT_EQ(receive.watch.expired(), stage == Stage::kAnnounced);
        break;
      case Stage::kMet:  // its bytes are on their way: too late
        start();
        job->mpi.hold_bytes(false);
        ASSERT_TRUE(job->drive_until([&] { return job->endpoint(1).mover().held() == 1; }));
        job->mpi.hold_bytes(true);
        ASSERT_TRUE(job->drive_until([&] { return job->mpi.met() == 1; }));
        receive.cancel();
        job->step(100);
        EXPECT_FALSE(receive.watch.expired()) << "MPI still writes to this memory";
        break;
      case Stage::kBetweenPieces:
        start();
        ASSERT_TRUE(job->drive_until([&] { return receive.transfer->delivered() >= kPiece; }));
        receive.cancel();
        break;
      case Stage::kArrivedInside: {
        start();
        ASSERT_TRUE(job->drive_until_done({receive.transfer}));
        (*job)[1].transport->cancel(receive.transfer, Status::internal("too late"));
        EXPECT_TRUE(receive.transfer->status().ok());
        receive.transfer.reset();
        break;
      }
    }
    job->mpi.hold_transfers(false);
    job->mpi.hold_bytes(false);
    // Its sender comes to an end, nothing is left behind, and the next transfer gets its own bytes.
    ASSERT_TRUE(job->drive_until_done({send}));
    EXPECT_TRUE(send->status().ok()) << send->status().text();
    ASSERT_TRUE(job->comes_to_rest());
    EXPECT_TRUE(receive.watch.expired());
    const Bytes others = pattern(size, 5);
    Bytes place(size);
    const TransferRef next = (*job)[1].receive(0, {0, 5, 1}, place);
    const TransferRef sent = (*job)[0].send(1, {0, 5, 1}, others);
    ASSERT_TRUE(job->drive_until_done({next, sent}));
    EXPECT_TRUE(place == others);
  }
}

TEST_F(MpiTransportTest, ACancelledSendKeepsItsMemoryUntilItsBytesAreTaken) {
  const auto job = MpiJob::opened(2, random_);
  auto memory = std::make_shared<Bytes>(pattern(4 * kPiece, 6));
  const std::weak_ptr<Bytes> watch = memory;
  const Bytes given = *memory;
  TransferRef send = (*job)[0].send(1, {0, 0, 0}, *memory, memory);
  memory.reset();
  (*job)[0].transport->cancel(send, Status::internal("cancelled"));
  EXPECT_TRUE(says(send->status(), "cancelled"));
  send.reset();
  job->step(200);
  EXPECT_TRUE((*job)[0].transport->flushed()) << "nobody waits for it";
  EXPECT_FALSE(watch.expired()) << "MPI still reads this memory";
  Bytes place(given.size());
  const TransferRef receive = (*job)[1].receive(0, {0, 0, 0}, place);
  ASSERT_TRUE(job->drive_until_done({receive}));
  EXPECT_TRUE(place == given);
  ASSERT_TRUE(job->comes_to_rest());
  EXPECT_TRUE(watch.expired()) << "the memory is never given back";
}

// Everything at once, on several ranks: keys that differ in one part only, receives and sends that are given up, and an
// MPI that takes cancellations or does not.
TEST_F(MpiTransportTest, ManyTransfersPairUpByTheirKeysWhateverIsCancelled) {
  struct One {
    int from, to;
    TransferKey key;
    Bytes given;
    std::shared_ptr<Bytes> place;
    TransferRef send, receive;
    bool cancelled = false;
  };
  const auto job = MpiJob::opened(3, random_);
  for (std::uint32_t round = 0; round < 12; ++round) {
    job->mpi.cancel_too_late(round % 2 == 1);
    std::vector<One> all;
    for (std::uint32_t i = 0; i < 120; ++i) {
      const int from = static_cast<int>(random_() % 3);
      const int to = (from + 1 + static_cast<int>(random_() % 2)) % 3;
      const TransferKey key{static_cast<std::uint16_t>(i % 2), static_cast<std::uint16_t>(i / 2 % 3),
                            round * 1000 + i / 6};
      if (std::any_of(all.begin(), all.end(),
                      [&](const One& one) { return one.from == from && one.to == to && one.key == key; })) {
        continue;
      }
      const std::size_t size = kSizes[random_() % kSizes.size()];
      all.push_back({from, to, key, pattern(size, random_() % 1000), std::make_shared<Bytes>(size), {}, {}});
    }
    std::vector<std::pair<std::size_t, bool>> order;
    for (std::size_t i = 0; i < all.size(); ++i) {
      order.emplace_back(i, true);
      order.emplace_back(i, false);
    }
    std::shuffle(order.begin(), order.end(), random_);
    for (const auto& [i, is_send] : order) {
      One& one = all[i];
      if (is_send) {
        one.send = (*job)[one.from].send(one.to, one.key, one.given);
      } else {
        one.receive = (*job)[one.to].receive(one.from, one.key, *one.place);
        one.receive->keep_alive = one.place;
      }
      if (random_() % 4 == 0) job->step();
      if (random_() % 10 != 0) continue;
      One& victim = all[random_() % all.size()];
      const bool of_send = random_() % 2 == 0;
      const TransferRef& transfer = of_send ? victim.send : victim.receive;
      if (!transfer || transfer->done()) continue;
      (*job)[of_send ? victim.from : victim.to].transport->cancel(transfer, Status::internal("given up"));
      if (!of_send) {
        victim.cancelled = true;
        victim.place.reset();
      }
    }
    std::vector<TransferRef> transfers;
    for (const One& one : all) transfers.insert(transfers.end(), {one.send, one.receive});
    ASSERT_TRUE(job->drive_until_done(transfers));
    ASSERT_TRUE(job->comes_to_rest());
    for (const One& one : all) {
      if (one.cancelled) continue;
      ASSERT_TRUE(one.receive->status().ok()) << one.receive->status().text();
      ASSERT_TRUE(*one.place == one.given) << one.given.size() << " bytes";
    }
  }
}

// ---- lives, and the time between them

TEST_F(MpiTransportTest, WhatComesBeforeItsTransportIsKeptForItAndWhatComesAfterIsDropped) {
  MpiJob job(2, random_);
  const Bytes given = pattern(3 * kPiece, 7);
  const Bytes other = pattern(3 * kPiece, 8);
  const auto small = [](const Bytes& bytes) { return std::span(bytes).first(kInline); };
  job.open(0, 1);
  const TransferRef early = job[0].send(1, {0, 0, 0}, given);
  const TransferRef early_small = job[0].send(1, {0, 0, 1}, small(given));
  job.step(200);
  EXPECT_FALSE(early->done());
  job.open(1, 1);
  Bytes place(given.size());
  Bytes small_place(kInline);
  const TransferRef receive = job[1].receive(0, {0, 0, 0}, place);
  const TransferRef receive_small = job[1].receive(0, {0, 0, 1}, small_place);
  ASSERT_TRUE(job.drive_until_done({early, early_small, receive, receive_small}));
  EXPECT_TRUE(place == given);
  EXPECT_TRUE(std::equal(small_place.begin(), small_place.end(), given.begin()));

  // Sent to one that closes before it asks for it, and to one that is closed.
  std::vector<TransferRef> unwanted{job[0].send(1, {0, 1, 0}, given), job[0].send(1, {0, 1, 1}, small(given))};
  job.step(200);
  const TransferRef never = job[1].receive(0, {0, 9, 0}, place);
  job.close(1);
  EXPECT_FALSE(never->done()) << "whoever closes has ended what it waits for";
  unwanted.push_back(job[0].send(1, {0, 1, 2}, given));
  ASSERT_TRUE(job.drive_until_done(unwanted));
  for (const TransferRef& one : unwanted) EXPECT_TRUE(one->status().ok()) << one->status().text();
  ASSERT_TRUE(job.comes_to_rest());

  // The next life has the same names and gets its own bytes.
  job.open(1, 2);
  const TransferRef next = job[1].receive(0, {0, 1, 0}, place);
  const TransferRef late = job[0].send(1, {0, 1, 0}, given);  // of the first life
  ASSERT_TRUE(job.drive_until_done({late}));
  job.step(200);
  EXPECT_FALSE(next->done());
  job.close(0);
  job.open(0, 2);
  const TransferRef now = job[0].send(1, {0, 1, 0}, other);
  ASSERT_TRUE(job.drive_until_done({next, now}));
  EXPECT_TRUE(place == other);
  EXPECT_TRUE(job.comes_to_rest());
}

TEST_F(MpiTransportTest, ATransportThatClosesLeavesWhatIsMovingToTheEndpoint) {
  for (const bool too_late : {false, true}) {
    const auto job = MpiJob::opened(2, random_);
    job->mpi.cancel_too_late(too_late);
    auto memory = std::make_shared<Bytes>(pattern(3 * kPiece, 9));
    const std::weak_ptr<Bytes> watch = memory;
    const TransferRef send = (*job)[0].send(1, {0, 0, 0}, *memory, memory);
    const TransferRef back = (*job)[1].send(0, {0, 0, 0}, *memory, memory);
    memory.reset();
    job->mpi.hold_transfers(true);
    job->step(100);
    CancelledReceive receive(*job, {0, 0, 0}, 3 * kPiece);
    job->close(0);
    job->close(1);
    receive.transfer.reset();
    job->mpi.hold_transfers(false);
    ASSERT_TRUE(job->comes_to_rest());
    EXPECT_FALSE(send->done() || back->done()) << "their owner has gone";
    EXPECT_TRUE(receive.watch.expired());
    EXPECT_FALSE(watch.expired()) << "the transfers are here still";
  }
}

TEST_F(MpiTransportTest, AnEndpointThatIsStoppedLeavesNothingWithMpiAndLosesNothing) {
  const auto job = MpiJob::opened(2, random_);
  const Bytes given = pattern(2 * kPiece, 10);
  for (std::uint32_t round = 0; round < 40; ++round) {
    job->mpi.cancel_too_late(round % 2 == 1);
    std::vector<TransferRef> sends;
    for (std::uint32_t i = 0; i < 30; ++i) {  // more than it has receives for
      sends.push_back((*job)[0].send(1, {0, 0, 30 * round + i}, std::span(given).first(i % 3 == 0 ? 2 * kPiece : i)));
    }
    job->step(static_cast<int>(random_() % 20));
    job->endpoint(1).stop();
    EXPECT_EQ(job->mpi.unfinished(1), 0);
    job->step(20);
    job->endpoint(1).resume();
    std::vector<Bytes> places;
    std::vector<TransferRef> receives;
    for (std::uint32_t i = 0; i < 30; ++i) places.emplace_back(sends[i]->bytes);
    for (std::uint32_t i = 0; i < 30; ++i) receives.push_back((*job)[1].receive(0, {0, 0, 30 * round + i}, places[i]));
    ASSERT_TRUE(job->drive_until_done(receives));
    for (std::uint32_t i = 0; i < 30; ++i) {
      ASSERT_TRUE(receives[i]->status().ok()) << receives[i]->status().text();
      ASSERT_TRUE(std::equal(places[i].begin(), places[i].end(), given.begin()));
    }
    ASSERT_TRUE(job->comes_to_rest());
  }
}

TEST_F(MpiTransportTest, AnnouncementsOfOneSenderComeInTheirOrderAlsoToAnEndpointThatStops) {
  struct Recorder final : MpiEndpoint::Receiver {
    void on_announcement(const MpiAnnouncement& announcement, std::span<const std::byte> /*payload*/) override {
      sequences.push_back(announcement.key.sequence);
    }
    void on_failure(const Status& status) override { ADD_FAILURE() << status.text(); }
    std::vector<std::uint32_t> sequences;
  } recorder;
  MpiJob job(2, random_);
  job.open(0);
  job.endpoint(1).open(1, recorder);
  std::vector<std::uint32_t> sent;
  for (std::uint32_t i = 0; i < 200; ++i) {
    sent.push_back(i);
    job[0].send(1, {0, 0, i}, {});
    if (random_() % 2 == 0) job.step();
    if (random_() % 8 != 0) continue;
    job.mpi.cancel_too_late(random_() % 2 == 0);
    job.endpoint(1).stop();
    job.endpoint(1).resume();
  }
  ASSERT_TRUE(job.drive_until([&] { return recorder.sequences.size() >= sent.size(); }));
  EXPECT_EQ(recorder.sequences, sent);
  job.endpoint(1).close(1);
}

TEST_F(MpiTransportTest, ATransportThatOutlivesMpiTouchesItNoMore) {
  const auto job = MpiJob::opened(2, random_);
  const Bytes given = pattern(2 * kPiece, 11);
  (*job)[0].send(1, {0, 0, 0}, given);
  job->step(100);
  job->mpi.set_finalized(true);
  const int before = job->mpi.unfinished(1);
  job->close(1);  // would take in what was announced, and drop it
  EXPECT_EQ(job->mpi.unfinished(1), before);
}

TEST_F(MpiTransportTest, PollsWhileAReceiveIsWaitedForOrBytesMove) {
  const auto job = MpiJob::opened(2, random_);
  const Bytes given = pattern(2 * kPiece, 12);
  Bytes place(given.size());
  Transport& receiver = *(*job)[1].transport;
  Transport& sender = *(*job)[0].transport;
  EXPECT_TRUE(receiver.arm() && sender.arm());
  const TransferRef receive = (*job)[1].receive(0, {0, 0, 0}, place);
  EXPECT_FALSE(receiver.arm());
  job->mpi.hold_transfers(true);
  const TransferRef send = (*job)[0].send(1, {0, 0, 0}, given);
  job->step(100);
  EXPECT_FALSE(receiver.arm());
  EXPECT_FALSE(sender.arm());
  EXPECT_FALSE(sender.flushed());
  EXPECT_TRUE(receiver.flushed()) << "it sends nothing";
  job->mpi.hold_transfers(false);
  ASSERT_TRUE(job->drive_until_done({send, receive}));
  EXPECT_TRUE(receiver.arm() && sender.arm() && sender.flushed());
}

}  // namespace
}  // namespace hvd::testing
