// What every transport has to do, on each of them: messages, transfers, and what ranks count. See
// transport_conformance.h.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <poll.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ops/reduce/reducer.h"
#include "tests/ops/transport/transport_conformance.h"

namespace hvd::testing {
namespace {

std::vector<std::size_t> sizes_of_transfers() {
  return {
      0, 1, 7, 15, 16, 17, 1024, 1025, 4096, kEager - 1, kEager, kEager + 1, 102'407, (1u << 20) + 3, (5u << 20) + 1};
}

// ---- control messages

TEST_P(TransportConformance, ControlMessagesArriveWholeAndInOrderFromEveryPeer) {
  Ends ends(3);
  connect(ends);
  std::map<std::pair<int, int>, std::vector<Bytes>> sent;
  for (int i = 0; i < 200; ++i) {
    const int from = static_cast<int>(random_() % 3);
    const int to = (from + 1 + static_cast<int>(random_() % 2)) % 3;
    constexpr std::array<std::size_t, 7> sizes{0, 1, 16, 1000, 1025, 70'000, 300'000};
    Bytes message = pattern(sizes[random_() % sizes.size()], static_cast<std::size_t>(i));
    sent[{from, to}].push_back(message);
    ends[from].transport->post(to, std::move(message));
    if (random_() % 3 == 0) ends.step();
  }
  ASSERT_TRUE(ends.drive_until([&] {
    std::size_t arrived = 0;
    for (int rank = 0; rank < 3; ++rank) arrived += ends[rank].control.size();
    return arrived >= 200;
  }));
  std::map<std::pair<int, int>, std::vector<Bytes>> got;
  for (int rank = 0; rank < 3; ++rank) {
    for (auto& [from, message] : ends[rank].control) got[{from, rank}].push_back(std::move(message));
  }
  EXPECT_TRUE(got == sent);
  EXPECT_TRUE(ends.drive_until([&] { return ends[0].transport->flushed() && ends[1].transport->flushed(); }));
}

TEST_P(TransportConformance, AControlMessageWakesASleeper) {
  Ends ends(2);
  connect(ends);
  EXPECT_EQ(ends[0].transport->wake_fd() >= 0, GetParam().has_descriptor);
  EXPECT_FALSE(ends[0].transport->needs_polling());
  for (int round = 0; round < 20; ++round) {
    // Silent: now it may sleep.
    ASSERT_TRUE(ends.drive_until([&] { return !ends.step() && ends[0].transport->arm(); }));
    const int wakes = ends[0].poller.wakes();
    ends[1].transport->post(0, pattern(8, static_cast<std::size_t>(round)));
    ASSERT_TRUE(is_rung(ends[0], wakes)) << "round " << round;
    ends[0].transport->disarm();
    ASSERT_TRUE(ends.drive_until([&] { return !ends[0].control.empty(); }));
    EXPECT_EQ(ends[0].control[0].second, pattern(8, static_cast<std::size_t>(round)));
    ends[0].control.clear();
  }
}

TEST_P(TransportConformance, BellsThatAreHeldAreRungInTheEnd) {
  Ends ends(2);
  connect(ends);
  for (const bool by_arming : {false, true}) {
    ASSERT_TRUE(ends.drive_until([&] { return !ends.step() && ends[0].transport->arm(); }));
    const int wakes = ends[0].poller.wakes();
    ends[1].transport->hold_bells();
    ends[1].transport->post(0, pattern(8, 1));
    if (by_arming) {
      ends[1].transport->arm();
    } else {
      ends[1].transport->ring();
    }
    ASSERT_TRUE(is_rung(ends[0], wakes)) << (by_arming ? "by arm" : "by ring");
    ends[0].transport->disarm();
    ends[1].transport->disarm();
    ASSERT_TRUE(ends.drive_until([&] { return !ends[0].control.empty(); }));
    ends[0].control.clear();
  }
}

TEST_P(TransportConformance, WhoArmsWhenSomethingHasArrivedIsToldNotToSleep) {
  Ends ends(2);
  connect(ends);
  ASSERT_TRUE(ends.drive_until([&] { return !ends.step(); }));
  const int wakes = ends[0].poller.wakes();
  const bool silent = ends[0].transport->arm();
  ends[1].transport->post(0, pattern(8, 1));
  ASSERT_TRUE(!silent || is_rung(ends[0], wakes));
  // It looks again instead of going on, as somebody does who was woken by something else.
  if (GetParam().has_descriptor) is_rung(ends[0], wakes);
  ends[0].transport->disarm();
  ASSERT_TRUE(ends.drive_until([&] { return !ends[0].control.empty(); }));
}

TEST_P(TransportConformance, ASleeperWithAFullLinkIsWokenWhenThereIsRoomAgain) {
  Ends ends(2);
  connect(ends);
  const Bytes large = pattern(8 << 20, 5);  // more than any link takes in
  ends[0].transport->post(1, large);
  while (ends[0].transport->progress()) {
  }
  ASSERT_FALSE(ends[0].transport->flushed());
  if (ends[0].transport->arm()) {
    const int wakes = ends[0].poller.wakes();
    while (ends[1].transport->progress()) {
    }
    EXPECT_TRUE(is_rung(ends[0], wakes));
  }
  ends[0].transport->disarm();
  ASSERT_TRUE(ends.drive_until([&] { return !ends[1].control.empty(); }));
  EXPECT_TRUE(ends[1].control[0].second == large);
  // What did not fit once keeps nobody awake after it has gone.
  EXPECT_TRUE(ends.drive_until([&] { return !ends.step() && ends[0].transport->arm() && ends[1].transport->arm(); }));
}

// ---- transfers

enum class Posted { kReceiveFirst, kSendFirst, kWhileItArrives };

TEST_P(TransportConformance, TransfersOfEverySizeArriveWheneverTheReceiveIsPosted) {
  Ends ends(2);
  connect(ends, [](int) {
    StreamTransport::Settings settings;
    settings.budget_bytes = 3000;  // so that a message takes several steps, and is half-way in between them
    return settings;
  });
  std::uint32_t sequence = 0;
  for (const std::size_t size : sizes_of_transfers()) {
    for (const Posted posted : {Posted::kReceiveFirst, Posted::kSendFirst, Posted::kWhileItArrives}) {
      for (const bool combine : {false, true}) {
        if (combine && size % sizeof(float) != 0) continue;
        SCOPED_TRACE(fmt::format("{} bytes, posted {}, combine {}", size, static_cast<int>(posted), combine));
        const Bytes given = pattern(size, sequence);
        Bytes place(size, std::byte{0});
        const TransferKey key{3, 9, sequence++};
        const auto post_receive = [&] {
          if (!combine) return ends[1].receive(0, key, place);
          // Or-ing with zeros: any order of arrival gives what was sent.
          const Reducer reducer{[](void* out, const void* lhs, const void* rhs, std::size_t count) {
                                  auto* to = static_cast<unsigned char*>(out);
                                  const auto* a = static_cast<const unsigned char*>(lhs);
                                  const auto* b = static_cast<const unsigned char*>(rhs);
                                  for (std::size_t i = 0; i < 4 * count; ++i) to[i] = a[i] | b[i];
                                },
                                4};
          return ends[1].receive(0, key, size, {place.data(), place.data(), reducer.combine, 4, false});
        };
        TransferRef receive;
        if (posted == Posted::kReceiveFirst) receive = post_receive();
        const TransferRef send = ends[0].send(1, key, given);
        if (posted == Posted::kSendFirst) {
          for (int i = 0; i < 30; ++i) ends.step();  // an eager one arrives whole
        } else if (posted == Posted::kWhileItArrives) {
          ends.step();
        }
        if (!receive) receive = post_receive();
        ASSERT_TRUE(ends.drive_until_done({send, receive}));
        EXPECT_TRUE(send->status().ok()) << send->status().text();
        EXPECT_TRUE(receive->status().ok()) << receive->status().text();
        ASSERT_TRUE(place == given);
      }
    }
  }
}

TEST_P(TransportConformance, ManyTransfersInBothDirectionsPairUpByTheirKeysInAnyOrder) {
  Ends ends(3);
  connect(ends);
  const std::array<std::size_t, 7> sizes{0, 5, 1000, 1500, kEager, kEager + 1, 200'000};
  struct One {
    int from, to;
    TransferKey key;
    Bytes given, place;
  };
  for (int round = 0; round < 3; ++round) {
    std::vector<One> all;
    for (std::uint32_t i = 0; i < 150; ++i) {
      const int from = static_cast<int>(random_() % 3);
      const int to = (from + 1 + static_cast<int>(random_() % 2)) % 3;
      // Keys that differ in one part only, the same for several pairs and in both directions.
      const TransferKey key{static_cast<std::uint16_t>(i % 2), static_cast<std::uint16_t>(i / 2 % 3),
                            static_cast<std::uint32_t>(round) * 1000 + i / 6};
      const std::size_t size = sizes[random_() % sizes.size()];
      if (std::any_of(all.begin(), all.end(),
                      [&](const One& one) { return one.from == from && one.to == to && one.key == key; })) {
        continue;
      }
      all.push_back({from, to, key, pattern(size, random_() % 1000), Bytes(size)});
    }
    std::vector<std::pair<std::size_t, bool>> order;
    for (std::size_t i = 0; i < all.size(); ++i) {
      order.emplace_back(i, true);
      order.emplace_back(i, false);
    }
    std::shuffle(order.begin(), order.end(), random_);
    std::vector<TransferRef> transfers;
    for (const auto& [i, is_send] : order) {
      One& one = all[i];
      transfers.push_back(is_send ? ends[one.from].send(one.to, one.key, one.given)
                                  : ends[one.to].receive(one.from, one.key, one.place));
      if (random_() % 4 == 0) ends.step();
    }
    ASSERT_TRUE(ends.drive_until_done(transfers));
    for (const TransferRef& transfer : transfers) EXPECT_TRUE(transfer->status().ok()) << transfer->status().text();
    for (const One& one : all) ASSERT_TRUE(one.place == one.given) << one.given.size() << " bytes";
  }
}

TEST_P(TransportConformance, ATransferThatNobodyAsksForHoldsUpNothingElse) {
  Ends ends(2);
  connect(ends);
  const Bytes large = pattern(4 << 20, 1);
  const TransferRef waits = ends[0].send(1, {0, 1, 0}, large);
  const Bytes other = pattern(1 << 20, 2);
  Bytes place(other.size());
  const TransferRef receive = ends[1].receive(0, {0, 2, 0}, place);
  const TransferRef send = ends[0].send(1, {0, 2, 0}, other);
  ASSERT_TRUE(ends.drive_until_done({send, receive}));
  EXPECT_TRUE(place == other);
  EXPECT_TRUE(ends.all_hear_each_other());
  EXPECT_FALSE(waits->done());
  Bytes at_last(large.size());
  const TransferRef late = ends[1].receive(0, {0, 1, 0}, at_last);
  ASSERT_TRUE(ends.drive_until_done({waits, late}));
  EXPECT_TRUE(at_last == large);
}

TEST_P(TransportConformance, ASizeThatDoesNotMatchIsAnErrorOfThatTransferAlone) {
  Ends ends(2);
  connect(ends);
  const auto expect_error = [](const TransferRef& transfer, std::string_view first, std::string_view second) {
    EXPECT_EQ(transfer->status().code(), StatusCode::kInternal);
    EXPECT_NE(transfer->status().text().find(first), std::string::npos) << transfer->status().text();
    EXPECT_NE(transfer->status().text().find(second), std::string::npos) << transfer->status().text();
  };
  std::uint32_t sequence = 0;
  const Bytes given = pattern(100'000, 3);
  Bytes place(200'000);
  const auto of = [](auto& bytes, std::size_t size) { return std::span(bytes).first(size); };
  for (const bool receive_first : {true, false}) {
    for (const auto& [sent, expected] : std::vector<std::pair<std::size_t, std::size_t>>{
             {10, 11}, {11, 10}, {0, 1}, {1, 0}, {2000, 1999}, {kEager, 1}, {kEager, kEager + 1}}) {
      SCOPED_TRACE(fmt::format("{} sent, {} expected", sent, expected));
      const TransferKey key{0, 4, sequence++};
      TransferRef receive;
      if (receive_first) receive = ends[1].receive(0, key, of(place, expected));
      const TransferRef send = ends[0].send(1, key, of(given, sent));
      if (!receive_first) {
        ASSERT_TRUE(ends.drive_until_done({send}));
        ASSERT_TRUE(ends.all_hear_each_other());
        receive = ends[1].receive(0, key, of(place, expected));
      }
      ASSERT_TRUE(ends.drive_until_done({send, receive}));
      expect_error(receive, fmt::format("{} bytes", sent), fmt::format("expects {}", expected));
    }
  }
  // With credit it is the sender that sees it; what is pulled, its receiver.
  const TransferKey key{0, 4, sequence++};
  const TransferRef send = ends[0].send(1, key, of(given, 100'000));
  const TransferRef receive = ends[1].receive(0, key, of(place, 200'000));
  ASSERT_TRUE(ends.drive_until_done({send}));
  if (GetParam().pulls) {
    ASSERT_TRUE(ends.drive_until_done({receive}));
    expect_error(receive, "100000", "200000");
  } else {
    expect_error(send, "100000", "200000");
    ends[1].transport->cancel(receive, Status::internal("the sender failed"));
    EXPECT_EQ(receive->status().text(), "the sender failed");
  }
  // The connection is as good as before.
  const TransferKey next{0, 4, sequence++};
  const TransferRef good = ends[1].receive(0, next, of(place, 100'000));
  const TransferRef sent = ends[0].send(1, next, given);
  ASSERT_TRUE(ends.drive_until_done({good, sent}));
  EXPECT_TRUE(std::equal(given.begin(), given.end(), place.begin()));
  EXPECT_TRUE(ends.all_hear_each_other());
  EXPECT_TRUE(ends[0].lost.empty() && ends[1].lost.empty());
}

// ---- cancelling

TEST_P(TransportConformance, ACancelledTransferEndsAtOnceWithItsReasonAndHarmsNoOther) {
  Ends ends(2);
  connect(ends, [](int) {
    StreamTransport::Settings settings;
    settings.budget_bytes = 2000;
    return settings;
  });
  std::uint32_t sequence = 0;
  const Status reason = Status::internal("cancelled for the test");
  for (const std::size_t size : {std::size_t{0}, std::size_t{10}, std::size_t{20'000}, std::size_t{300'000}}) {
    const Bytes given = pattern(size, 4);
    for (const bool cancel_send : {false, true}) {
      for (const int steps_before : {0, 1, 2, 5}) {
        SCOPED_TRACE(
            fmt::format("{} bytes, cancel {} after {} steps", size, cancel_send ? "send" : "receive", steps_before));
        const TransferKey key{0, 5, sequence++};
        Bytes place(size, std::byte{0});
        const TransferRef receive = ends[1].receive(0, key, place);
        const TransferRef send = ends[0].send(1, key, given);
        for (int i = 0; i < steps_before; ++i) ends.step();
        const TransferRef& victim = cancel_send ? send : receive;
        const bool was_done = victim->done();
        End& owner = ends[cancel_send ? 0 : 1];
        owner.transport->cancel(victim, reason);
        ASSERT_TRUE(victim->done());
        EXPECT_EQ(victim->status().text(), was_done ? "" : reason.text());
        const Bytes at_cancel = place;
        ASSERT_TRUE(ends.all_hear_each_other());
        for (int i = 0; i < 400; ++i) ends.step();
        if (!cancel_send) {
          EXPECT_TRUE(place == at_cancel) << "memory was written after its receive had ended";
        }
        owner.transport->cancel(victim, Status::internal("again"));  // does nothing
        EXPECT_EQ(victim->status().text(), was_done ? "" : reason.text());
        if (!receive->done()) ends[1].transport->cancel(receive, reason);
        if (!send->done()) ends[0].transport->cancel(send, reason);
      }
    }
  }
  const Bytes given = pattern(300'000, 4);
  Bytes place(given.size());
  const TransferRef receive = ends[1].receive(0, {0, 5, sequence}, place);
  const TransferRef send = ends[0].send(1, {0, 5, sequence}, given);
  ASSERT_TRUE(ends.drive_until_done({receive, send}));
  EXPECT_TRUE(place == given);
  EXPECT_TRUE(ends[0].lost.empty() && ends[1].lost.empty());
}

TEST_P(TransportConformance, MemoryIsHeldUntilTheTransportHasLetGoOfIt) {
  Ends ends(2);
  connect(ends);
  auto memory = std::make_shared<Bytes>(pattern(16 << 20, 6));
  const std::weak_ptr<Bytes> watch = memory;
  const Bytes given = *memory;
  Bytes place(memory->size());
  TransferRef receive = ends[1].receive(0, {0, 0, 0}, place);
  TransferRef send = ends[0].send(1, {0, 0, 0}, *memory, memory);
  memory.reset();
  // Until a part of it is on its way: then the frame has to be finished, whoever cancels.
  ASSERT_TRUE(ends.drive_until([&] { return receive->delivered() > 0; }));
  ASSERT_FALSE(send->done());
  ends[0].transport->cancel(send, Status::internal("cancelled"));
  send.reset();
  EXPECT_FALSE(watch.expired()) << "the transport still reads this memory";
  ASSERT_TRUE(ends.drive_until_done({receive}));
  EXPECT_TRUE(place == given);
  ASSERT_TRUE(ends.drive_until([&] { return watch.expired(); })) << "the memory is never given back";
}

// ---- threads

// Each rank in a thread of its own, which sleeps whenever it has nothing to do: a ring that is missed shows as a sleep
// that only its deadline ends.
TEST_P(TransportConformance, RanksThatSleepBetweenMessagesMissNone) {
  constexpr int ranks = 3;
  constexpr std::uint32_t rounds = 60;
  Ends ends(ranks);
  connect(ends);
  const std::uint64_t seed = random_();
  const auto run = [&](int rank) {
    End& end = ends[rank];
    std::mt19937_64 random(seed);  // the same sizes on all ranks
    const auto sleeps_until = [&](const auto& condition) {
      const TimePoint deadline = in_a_minute();
      while (!condition()) {
        if (end.transport->progress()) continue;
        if (end.transport->arm()) {
          if (GetParam().has_descriptor) {
            pollfd place{end.transport->wake_fd(), POLLIN, 0};
            ::poll(&place, 1, 60'000);
          } else {
            end.poller.wait(deadline);
          }
        }
        end.transport->disarm();
        if (SteadyClock().now() > deadline) return false;
      }
      return true;
    };
    for (std::uint32_t round = 0; round < rounds; ++round) {
      constexpr std::array<std::size_t, 6> sizes{0, 10, 2000, kEager, kEager + 1, 700'000};
      const std::size_t size = sizes[random() % sizes.size()];
      std::vector<Bytes> given;
      std::vector<Bytes> places;
      std::vector<TransferRef> transfers;
      for (int peer = 0; peer < ranks; ++peer) {
        given.push_back(pattern(size, static_cast<std::size_t>(rank) * 100 + round));
        places.emplace_back(size);
      }
      for (int peer = 0; peer < ranks; ++peer) {
        if (peer == rank) continue;
        const TransferKey key{0, 0, round};
        const auto p = static_cast<std::size_t>(peer);
        if (round % 2 == 0) transfers.push_back(end.receive(peer, key, places[p]));
        transfers.push_back(end.send(peer, key, given[p]));
        if (round % 2 != 0) transfers.push_back(end.receive(peer, key, places[p]));
        end.transport->post(peer, bytes_of("round"));
      }
      ASSERT_TRUE(sleeps_until([&] {
        return std::all_of(transfers.begin(), transfers.end(), [](const TransferRef& one) { return one->done(); }) &&
               end.control.size() >= (ranks - 1) * (round + std::size_t{1});
      })) << "rank "
          << rank << " slept through round " << round;
      for (int peer = 0; peer < ranks; ++peer) {
        if (peer == rank) continue;
        ASSERT_TRUE(places[static_cast<std::size_t>(peer)] ==
                    pattern(size, static_cast<std::size_t>(peer) * 100 + round));
      }
    }
    for (int peer = 0; peer < ranks; ++peer) {
      if (peer != rank) end.transport->say_goodbye(peer);
    }
    EXPECT_TRUE(sleeps_until([&] { return end.goodbyes.size() == ranks - 1 && end.transport->flushed(); }));
    EXPECT_TRUE(end.lost.empty());
  };
  {
    std::vector<std::jthread> threads;
    for (int rank = 0; rank < ranks; ++rank) threads.emplace_back(run, rank);
  }
}

// ---- counts

TEST_P(TransportConformance, CountsWhatItSendsAndKnowsWhenAllIsOut) {
  Ends ends(2);
  connect(ends);
  const TransportStatistics& statistics = ends[0].transport->statistics();
  EXPECT_TRUE(ends[0].transport->flushed());
  ends[0].transport->post(1, Bytes(10));
  ends[0].transport->post(1, Bytes(0));
  const Bytes given = pattern(300'000, 1);
  const TransferRef send = ends[0].send(1, {0, 0, 0}, given);
  const TransferRef eager = ends[0].send(1, {0, 0, 1}, std::span(given).first(77));
  Bytes place(given.size());
  const TransferRef receive = ends[1].receive(0, {0, 0, 0}, place);
  ASSERT_TRUE(ends.drive_until_done({send, eager, receive}));
  ASSERT_TRUE(ends.drive_until([&] { return ends[0].transport->flushed() && ends[1].control.size() == 2; }));
  EXPECT_EQ(statistics.control_messages_sent.value(), 2);
  EXPECT_EQ(statistics.control_bytes_sent.value(), 10);
  EXPECT_EQ(statistics.data_bytes_sent.value(), 300'077);
  EXPECT_EQ(ends[1].transport->statistics().data_bytes_sent.value(), 0);
  EXPECT_EQ(ends[1].transport->statistics().data_bytes_pulled.value(), GetParam().pulls ? 300'000 : 0);
  const Bytes large = pattern(16 << 20, 2);
  ends[0].transport->post(1, large);
  EXPECT_FALSE(ends[0].transport->flushed());
  ASSERT_TRUE(ends.drive_until([&] { return ends[1].control.size() == 3; }));
  EXPECT_TRUE(ends[0].transport->flushed());
}

INSTANTIATE_TEST_SUITE_P(Transports, TransportConformance, ::testing::ValuesIn(transport_kinds()),
                         [](const auto& param) { return param.param.name; });

}  // namespace
}  // namespace hvd::testing
