// What every transport has to do, on each of them: in-process, shared memory, TCP, the first two also where receivers
// read the memory of senders. The ranks of shared memory and TCP
// meet as they do in a job, but inside this process.

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <poll.h>

#include <array>
#include <map>
#include <optional>
#include <thread>

#include "ops/reduce/reducer.h"
#include "ops/transport/inproc/inproc_network.h"
#include "ops/transport/shm/shm_connector.h"
#include "ops/transport/tcp/tcp_connector.h"
#include "tests/ops/transport/transport_ends.h"

namespace hvd::testing {
namespace {

const std::size_t kEager = StreamTransport::Settings().eager_limit_bytes;

using SettingsOf = std::function<StreamTransport::Settings(int rank)>;

// The ranks meet through what `make` gives, each in a thread of its own, as meeting blocks.
template <typename Connector, typename Connect>
void meet(Ends& ends, std::vector<std::unique_ptr<Connector>> connectors, Connect connect) {
  std::vector<Bytes> addresses;
  for (const auto& connector : connectors) addresses.push_back(connector->address());
  std::vector<std::jthread> threads;
  for (int rank = 0; rank < ends.size(); ++rank) {
    threads.emplace_back(
        [&, rank] { ends[rank].use(connect(*connectors[static_cast<std::size_t>(rank)], addresses, rank)); });
  }
}

TimePoint in_a_minute() { return SteadyClock().now() + std::chrono::seconds(60); }

void connect_in_process(Ends& ends, const SettingsOf& settings) {
  InprocNetwork network(ends.size(), std::size_t{64} << 10, true);  // transports may outlive it
  for (int rank = 0; rank < ends.size(); ++rank) {
    ends[rank].use(network.connect(rank, ends[rank].poller, settings(rank)));
  }
}

void connect_shared_memory(Ends& ends, const SettingsOf& settings) {
  std::vector<std::unique_ptr<ShmConnector>> connectors;
  for (int rank = 0; rank < ends.size(); ++rank) {
    auto made = ShmConnector::create(rank, ends.size(), "a token", std::size_t{64} << 10);
    ASSERT_TRUE(made.ok()) << made.status().text();
    connectors.push_back(std::move(made).value());
  }
  meet(ends, std::move(connectors), [&](ShmConnector& connector, const std::vector<Bytes>& addresses, int rank) {
    ShmConnector::Shared shared = connector.connect(addresses, settings(rank), in_a_minute());
    EXPECT_EQ(static_cast<int>(shared.peers.size()), ends.size() - 1) << "not all ranks share memory";
    return std::move(shared.transport);
  });
}

void connect_tcp(Ends& ends, const SettingsOf& settings) {
  std::vector<std::unique_ptr<TcpConnector>> connectors;
  for (int rank = 0; rank < ends.size(); ++rank) {
    TcpConnector::Settings tcp;
    tcp.job_token = "a token";
    tcp.loopback_only = true;
    auto made = TcpConnector::create(rank, ends.size(), tcp);
    ASSERT_TRUE(made.ok()) << made.status().text();
    connectors.push_back(std::move(made).value());
  }
  meet(ends, std::move(connectors), [&](TcpConnector& connector, const std::vector<Bytes>& addresses, int rank) {
    std::vector<int> peers;
    for (int peer = 0; peer < ends.size(); ++peer) {
      if (peer != rank) peers.push_back(peer);
    }
    StreamTransport::Settings mine = settings(rank);
    const std::uint32_t generation = std::exchange(mine.generation, 0);
    // Ranks of different generations refuse each other when they meet: what is to be tried is what comes later.
    EXPECT_EQ(generation, 0u) << "use another transport for frames of other generations";
    auto transport = connector.connect(addresses, peers, mine, in_a_minute());
    EXPECT_TRUE(transport.ok()) << transport.status().text();
    return std::move(transport).value();
  });
}

struct TransportKind {
  std::string name;
  void (*connect)(Ends& ends, const SettingsOf& settings);
  bool has_descriptor;  // otherwise it wakes through the poller
  bool agrees_on_generation;
  bool pulls = false;  // what is larger than an eager message
  bool has_blocks = false;
};

constexpr bool kAlways = true;

const std::vector<TransportKind>& transport_kinds() {
  static const std::vector<TransportKind> kinds{
      {"InProcess", connect_in_process, false, !kAlways, false, true},
      {"SharedMemory", connect_shared_memory, true, !kAlways, false, true},
      {"Tcp", connect_tcp, true, kAlways},
      {"InProcessPulled", connect_in_process, false, !kAlways, true, true},
      {"SharedMemoryPulled", connect_shared_memory, true, !kAlways, true, true},
  };
  return kinds;
}

class TransportConformance : public ::testing::TestWithParam<TransportKind> {
 protected:
  void connect(Ends& ends, const SettingsOf& settings = [](int) { return StreamTransport::Settings(); }) {
    GetParam().connect(ends, settings);
    for (int rank = 0; rank < ends.size(); ++rank) {
      ASSERT_NE(ends[rank].transport, nullptr);
      if (GetParam().pulls) ends[rank].pull_from = kEager + 1;
    }
  }

  // Whether something rang `end` since it armed; waits for it.
  bool is_rung(End& end, int wakes_before) {
    if (!GetParam().has_descriptor) return end.poller.wakes() > wakes_before;
    pollfd place{end.transport->wake_fd(), POLLIN, 0};
    return ::poll(&place, 1, 60'000) == 1;
  }

  std::mt19937_64 random_ = generator_of_this_run();
};

std::vector<std::size_t> sizes_of_transfers() {
  return {
      0, 1, 7, 15, 16, 17, 1024, 1025, 4096, kEager - 1, kEager, kEager + 1, 102'407, (1u << 20) + 3, (5u << 20) + 1};
}

// ---- control messages
// ------------------------------------------------------------------------------------------------

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
// -------------------------------------------------------------------------------------------------------

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
// ------------------------------------------------------------------------------------------------------

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

// ---- the end
// ---------------------------------------------------------------------------------------------------------

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

// ---- threads
// ---------------------------------------------------------------------------------------------------------

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

// ---- blocks
// ----------------------------------------------------------------------------------------------------------------------

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

// ---- faults and counts
// -----------------------------------------------------------------------------------------------

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
INSTANTIATE_TEST_SUITE_P(Transports, BlockConformance, ::testing::ValuesIn(transport_kinds()),
                         [](const auto& param) { return param.param.name; });

}  // namespace
}  // namespace hvd::testing
