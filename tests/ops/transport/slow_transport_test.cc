// A slowed transport in a time that the test sets: when data goes, what passes at once, and how a transfer ends early.

#include "ops/transport/slow_transport.h"

#include <gtest/gtest.h>

#include "ops/transport/inproc/inproc_network.h"
#include "tests/ops/transport/transport_ends.h"
#include "tests/support/manual_clock.h"

namespace hvd::testing {
namespace {

using namespace std::chrono_literals;

TEST(TokenBucket, GivesEachByteItsTime) {
  TokenBucket bucket(1000);
  const TimePoint start{1h};
  EXPECT_EQ(bucket.take(0, start), start);
  EXPECT_EQ(bucket.take(500, start), start + 500ms);
  EXPECT_EQ(bucket.take(1, start + 100ms), start + 501ms) << "it waits for those before it";
}

TEST(TokenBucket, SavesNothingForLater) {
  TokenBucket bucket(1000);
  const TimePoint start{1h};
  EXPECT_EQ(bucket.take(100, start), start + 100ms);
  EXPECT_EQ(bucket.take(100, start + 10s), start + 10s + 100ms);
}

// Rank 0 sends a thousand bytes a second, and rank 1 as much as it likes.
class SlowTransportTest : public ::testing::Test {
 protected:
  SlowTransportTest() {
    for (int rank = 0; rank < 2; ++rank) {
      End& end = ends_[rank];
      end.use(network_.connect(rank, end.poller, {}));
    }
    slow_ = std::make_unique<SlowTransport>(std::vector<Transport*>{nullptr, ends_[0].transport.get()}, clock_, 1000);
    slow_->set_events(ends_[0]);
  }

  TransferRef send(std::uint32_t sequence, const Bytes& bytes) {
    auto transfer = std::make_shared<Transfer>(ends_[0].loop, 0);
    transfer->peer = 1;
    transfer->key = {0, 1, sequence};
    transfer->bytes = bytes.size();
    transfer->data = bytes.data();
    slow_->start(transfer);
    return transfer;
  }
  void move_all() {
    while (slow_->progress() || ends_.step()) {
    }
  }

  ManualClock clock_{TimePoint(1h)};
  InprocNetwork network_{2};
  Ends ends_{2};
  std::unique_ptr<SlowTransport> slow_;
};

TEST_F(SlowTransportTest, HoldsDataUntilTheLastTokenIsThere) {
  const Bytes first = pattern(300, 1);
  const Bytes second = pattern(700, 2);
  Bytes got_first(first.size());
  Bytes got_second(second.size());
  const TransferRef sent = send(0, first);
  send(1, second);
  const TransferRef one = ends_[1].receive(0, {0, 1, 0}, got_first);
  const TransferRef two = ends_[1].receive(0, {0, 1, 1}, got_second);
  EXPECT_EQ(slow_->next_deadline(), clock_.now() + 300ms);
  EXPECT_TRUE(slow_->arm()) << "nothing is due: its owner may sleep until then";

  clock_.advance(299ms);
  move_all();
  EXPECT_FALSE(one->done() || sent->done());
  clock_.advance(1ms);
  EXPECT_FALSE(slow_->arm());
  move_all();
  EXPECT_TRUE(one->done() && sent->done());
  EXPECT_EQ(got_first, first);
  EXPECT_FALSE(two->done());

  EXPECT_EQ(slow_->next_deadline(), clock_.now() + 700ms);
  EXPECT_FALSE(slow_->flushed());
  clock_.advance(700ms);
  move_all();
  EXPECT_TRUE(two->done());
  EXPECT_EQ(got_second, second);
  EXPECT_EQ(slow_->next_deadline(), kNever);
  EXPECT_TRUE(slow_->flushed());
  EXPECT_EQ(slow_->statistics().data_bytes_sent.value(), 1000);
  EXPECT_EQ(ends_[0].transport->statistics().data_bytes_sent.value(), 0) << "each byte is counted once";
}

TEST_F(SlowTransportTest, ReceivesAreNotHeldBack) {
  const Bytes bytes = pattern(5000, 3);
  Bytes got(bytes.size());
  auto receive = std::make_shared<Transfer>(ends_[0].loop, 0);
  receive->direction = Transfer::Direction::kReceive;
  receive->peer = 1;
  receive->bytes = got.size();
  receive->arrival.out = got.data();
  slow_->start(receive);
  ends_[1].send(0, {}, bytes);
  move_all();
  EXPECT_TRUE(receive->done());
  EXPECT_EQ(got, bytes);
}

TEST_F(SlowTransportTest, WhatIsHeldCanBeCancelled) {
  const Bytes bytes = pattern(100, 4);
  const TransferRef held = send(0, bytes);
  slow_->cancel(held, Status::internal("given up"));
  EXPECT_EQ(held->status().text(), "given up");
  EXPECT_TRUE(slow_->flushed());

  const Bytes large = pattern(100'000, 5);  // waits for its receive, once it is through
  const TransferRef passed = send(1, large);
  clock_.advance(1h);
  move_all();
  EXPECT_FALSE(passed->done());
  slow_->cancel(passed, Status::internal("given up, too"));
  EXPECT_EQ(passed->status().text(), "given up, too");
}

TEST_F(SlowTransportTest, APeerThatIsLostEndsWhatIsHeld) {
  const Bytes bytes = pattern(100, 6);
  const TransferRef held = send(0, bytes);
  ends_[1].transport.reset();
  move_all();
  ASSERT_EQ(ends_[0].lost.size(), 1);
  clock_.advance(1s);
  move_all();
  EXPECT_EQ(held->status().code(), StatusCode::kInternal);
}

TEST_F(SlowTransportTest, StandsBeforeTheDataOfAFabric) {
  Fabric fabric(0, 2);
  Transport& direct = fabric.add(std::move(ends_[0].transport));
  fabric.route_control(1, direct);
  fabric.route_data(1, direct);
  EXPECT_FALSE(fabric.needs_no_core());
  slow_down(fabric, clock_, 1000);
  EXPECT_TRUE(fabric.needs_no_core());
  EXPECT_EQ(fabric.next_deadline(), kNever);

  const Bytes bytes = pattern(100, 7);
  auto transfer = std::make_shared<Transfer>(ends_[0].loop, 0);
  transfer->peer = 1;
  transfer->bytes = bytes.size();
  transfer->data = bytes.data();
  fabric.start(transfer);
  fabric.post(1, bytes_of("at once"));
  while (fabric.progress() || ends_[1].transport->progress()) {
  }
  ASSERT_EQ(ends_[1].control.size(), 1);
  EXPECT_FALSE(transfer->done());
  EXPECT_EQ(fabric.next_deadline(), clock_.now() + 100ms);
  clock_.advance(100ms);
  EXPECT_TRUE(fabric.progress());
  EXPECT_TRUE(transfer->done());
}

}  // namespace
}  // namespace hvd::testing
