// The stream protocol against a peer that the test plays by hand: bytes come in pieces of any size, in any state of the
// receiver, and some of them are nonsense.

#include "ops/transport/stream_transport.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <bit>

#include "ops/reduce/reducer.h"
#include "tests/ops/transport/transport_ends.h"

namespace hvd::testing {
namespace {

// What the peer has sent and what of it has arrived; what it was sent.
struct Wire {
  Bytes in;                     // the peer's bytes
  std::size_t arrived = 0;      // of these
  std::size_t consumed = 0;     // of these
  Bytes out;                    // to the peer
  std::size_t room = SIZE_MAX;  // bytes that still fit
  Status failure;
  int rings = 0;
  bool reads_in_place = false;
  bool closed = false;  // by this rank
  bool can_pull = false;
  Bytes memory;                         // the peer's; an address is a place in it
  std::size_t refused_from = SIZE_MAX;  // places of it that cannot be read
  bool gone = false;                    // the peer has let go of it
};

class ScriptedLink final : public Link {
 public:
  explicit ScriptedLink(Wire& wire) : wire_(wire) {}
  std::size_t write_some(std::span<const std::byte> bytes) override {
    const std::size_t count = std::min(bytes.size(), wire_.room);
    wire_.out.insert(wire_.out.end(), bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(count));
    wire_.room -= count;
    return count;
  }
  std::span<const std::byte> peek() override {
    return std::span<const std::byte>(wire_.in).subspan(wire_.consumed, wire_.arrived - wire_.consumed);
  }
  void consume(std::size_t count) override {
    ASSERT_LE(wire_.consumed + count, wire_.arrived);
    wire_.consumed += count;
  }
  std::size_t read_into(std::span<std::byte> place) override {
    if (!wire_.reads_in_place) return 0;
    const std::span<const std::byte> here = peek();
    const std::size_t count = std::min(here.size(), place.size());
    if (count > 0) std::memcpy(place.data(), here.data(), count);
    wire_.consumed += count;
    return count;
  }
  bool can_pull() const override { return wire_.can_pull; }
  Pulled pull(std::uint64_t address, std::span<std::byte> place) override {
    if (wire_.gone) return Pulled::kGone;
    const std::size_t readable = std::min(wire_.memory.size(), wire_.refused_from);
    if (address > readable || place.size() > readable - address) return Pulled::kRefused;
    if (!place.empty()) std::memcpy(place.data(), wire_.memory.data() + address, place.size());
    return Pulled::kAll;
  }
  void ring() override { ++wire_.rings; }
  bool has_news() override { return wire_.arrived > wire_.consumed || !wire_.failure.ok(); }
  Status failure() override { return wire_.arrived > wire_.consumed ? Status() : wire_.failure; }
  void close() override { wire_.closed = true; }

 private:
  Wire& wire_;
};

class NoWakeup final : public Wakeup {
 public:
  int fd() const override { return -1; }
  void set_sleeping(bool /*sleeping*/) override {}
  void refresh() override {}
};

constexpr std::size_t kEagerLimit = 4096;
constexpr std::uint32_t kGeneration = 7;

class StreamTransportTest : public ::testing::Test {
 protected:
  StreamTransportTest() {
    StreamTransport::Settings settings;
    settings.name = "scripted";
    settings.rank = 0;
    settings.size = 2;
    settings.generation = kGeneration;
    settings.eager_limit_bytes = kEagerLimit;
    auto transport = std::make_unique<StreamTransport>(settings, std::make_unique<NoWakeup>());
    transport->add_peer(1, std::make_unique<ScriptedLink>(wire_));
    end_.use(std::move(transport));
  }

  static FrameHeader header(FrameKind kind, const TransferKey& key, std::uint64_t bytes) {
    FrameHeader made;
    made.generation = kGeneration;
    made.kind = kind;
    made.process_set = key.process_set;
    made.channel = key.channel;
    made.sequence = key.sequence;
    made.sender = 1;
    made.bytes = bytes;
    return made;
  }
  static Bytes frame(const FrameHeader& head, std::span<const std::byte> payload) {
    const EncodedHeader encoded = encode(head);
    Bytes bytes(encoded.size() + payload.size() + padding_after(payload.size()));
    std::copy(encoded.begin(), encoded.end(), bytes.begin());
    std::copy(payload.begin(), payload.end(), bytes.begin() + kFrameHeaderBytes);
    return bytes;
  }
  static Bytes data_frame(FrameKind kind, const TransferKey& key, std::span<const std::byte> payload) {
    return frame(header(kind, key, payload.size()), payload);
  }
  static Bytes control_frame(std::span<const std::byte> payload) {
    FrameHeader head = header(FrameKind::kControl, {}, payload.size());
    head.payload_crc = checksum(payload);
    return frame(head, payload);
  }
  void peer_sends(const Bytes& bytes) { wire_.in.insert(wire_.in.end(), bytes.begin(), bytes.end()); }
  void let_arrive(std::size_t count) {
    wire_.arrived = std::min(wire_.in.size(), wire_.arrived + count);
    end_.transport->progress();
  }
  void let_all_arrive() {
    while (wire_.arrived < wire_.in.size() || wire_.consumed < wire_.arrived) {
      let_arrive(wire_.in.size());
      if (!end_.lost.empty()) return;
    }
    end_.transport->progress();
  }
  // The connection is given up, with a reason that has `text`, once, and stays so.
  void expect_lost(std::string_view text) {
    ASSERT_EQ(end_.lost.size(), 1u) << "wanted: " << text;
    EXPECT_EQ(end_.lost[0].first, 1);
    EXPECT_NE(end_.lost[0].second.text().find("rank 1 is lost"), std::string::npos) << end_.lost[0].second.text();
    EXPECT_NE(end_.lost[0].second.text().find(text), std::string::npos) << end_.lost[0].second.text();
    const std::size_t consumed = wire_.consumed;
    peer_sends(control_frame(bytes_of("too late")));
    let_arrive(1000);
    EXPECT_EQ(wire_.consumed, consumed) << "it was read on";
    EXPECT_EQ(end_.lost.size(), 1u);
    EXPECT_TRUE(wire_.closed) << "the peer is not told";
    EXPECT_TRUE(end_.transport->flushed());
  }

  // Both ends pull from the memory of the other from `bytes` on.
  void pull_from(std::size_t bytes) {
    wire_.can_pull = true;
    end_.pull_from = bytes;
  }
  void peer_offers(const TransferKey& key, std::uint64_t address, std::uint64_t bytes) {
    peer_sends(frame(header(FrameKind::kOffer, key, bytes), std::as_bytes(std::span(&address, 1))));
  }
  void peer_says(FrameKind kind, const TransferKey& key, std::uint64_t bytes = 0) {
    peer_sends(frame(header(kind, key, bytes), {}));
    let_all_arrive();
  }
  struct Sent {
    FrameHeader header;
    Bytes payload;
  };
  // Takes what was sent to the peer.
  std::vector<Sent> sent() {
    std::vector<Sent> frames;
    std::size_t place = 0;
    while (wire_.out.size() - place >= kFrameHeaderBytes) {
      Result<FrameHeader> head =
          decode_header(std::span<const std::byte, kFrameHeaderBytes>(wire_.out.data() + place, kFrameHeaderBytes));
      EXPECT_TRUE(head.ok());
      if (!head.ok()) break;
      const auto begin = wire_.out.begin() + static_cast<std::ptrdiff_t>(place + kFrameHeaderBytes);
      const auto bytes = static_cast<std::size_t>(payload_bytes(*head));
      frames.push_back({*head, Bytes(begin, begin + static_cast<std::ptrdiff_t>(bytes))});
      place += kFrameHeaderBytes + bytes + padding_after(bytes);
    }
    EXPECT_EQ(place, wire_.out.size());
    wire_.out.clear();
    return frames;
  }
  void expect_sent(FrameKind kind, const TransferKey& key, std::uint64_t bytes = 0) {
    const std::vector<Sent> frames = sent();
    ASSERT_EQ(frames.size(), 1u);
    EXPECT_EQ(frames[0].header.kind, kind);
    EXPECT_EQ(frames[0].header.channel, key.channel);
    EXPECT_EQ(frames[0].header.sequence, key.sequence);
    EXPECT_EQ(frames[0].header.bytes, bytes);
  }

  Wire wire_;
  End end_{0};
  std::mt19937_64 random_ = generator_of_this_run();
};

// ---- pulled
// ----------------------------------------------------------------------------------------------------------

TEST_F(StreamTransportTest, WhatIsOfferedIsPulledToItsPlaceWheneverTheReceiveIsPosted) {
  pull_from(1);
  wire_.memory = pattern(600'000, 1);
  std::uint32_t sequence = 0;
  for (const bool receive_first : {false, true}) {
    for (const bool combine : {false, true}) {
      for (const std::size_t size :
           {std::size_t{4}, std::size_t{kEagerLimit}, std::size_t{65'540}, std::size_t{500'000}}) {
        SCOPED_TRACE(fmt::format("{} bytes, receive first {}, combine {}", size, receive_first, combine));
        const TransferKey key{1, 2, sequence++};
        const std::uint64_t address = 12;
        Bytes place(size, std::byte{0});
        TransferRef receive;
        const auto post = [&] {
          if (!combine) return end_.receive(1, key, place);
          const Reducer reducer = find_reducer(DataType::kInt32, ReduceOp::kSum).value();
          return end_.receive(1, key, size, {place.data(), place.data(), reducer.combine, 4, false});
        };
        if (receive_first) receive = post();
        peer_offers(key, address, size);
        let_all_arrive();
        if (!receive_first) {
          EXPECT_TRUE(sent().empty()) << "nobody has asked for it yet";
          receive = post();
          EXPECT_FALSE(end_.transport->arm()) << "it may not sleep on what it could pull";
          end_.transport->disarm();
        }
        while (end_.transport->progress()) {
        }
        ASSERT_TRUE(receive->done());
        EXPECT_TRUE(receive->status().ok()) << receive->status().text();
        EXPECT_TRUE(std::equal(place.begin(), place.end(), wire_.memory.begin() + address));
        expect_sent(FrameKind::kTaken, key);
      }
    }
  }
}

TEST_F(StreamTransportTest, PulledElementsAreCombinedWholeWhateverWasPulledBefore) {
  pull_from(1);
  wire_.memory = pattern(600'000, 8);
  Bytes odd(100'001);
  Bytes place(400'000, std::byte{0});
  const Reducer reducer = find_reducer(DataType::kInt32, ReduceOp::kSum).value();
  const TransferRef first = end_.receive(1, {1, 2, 0}, odd);
  const TransferRef second =
      end_.receive(1, {1, 3, 0}, place.size(), {place.data(), place.data(), reducer.combine, 4, false});
  peer_offers({1, 2, 0}, 0, odd.size());
  peer_offers({1, 3, 0}, 0, place.size());
  let_all_arrive();
  while (end_.transport->progress()) {
  }
  ASSERT_TRUE(first->done() && second->done());
  EXPECT_TRUE(std::equal(place.begin(), place.end(), wire_.memory.begin()));
}

TEST_F(StreamTransportTest, WhatCannotBeReadFromHereComesByTheStream) {
  pull_from(1);
  wire_.memory = pattern(600'000, 2);
  for (const std::size_t readable : {std::size_t{0}, std::size_t{300'000}}) {
    wire_.refused_from = readable;
    const TransferKey key{1, 2, static_cast<std::uint32_t>(readable)};
    Bytes place(wire_.memory.size());
    const TransferRef receive = end_.receive(1, key, place);
    peer_offers(key, 0, place.size());
    let_all_arrive();
    while (end_.transport->progress()) {
    }
    ASSERT_FALSE(receive->done());
    const std::size_t pulled = receive->delivered();
    EXPECT_EQ(pulled > 0, readable > 0);
    expect_sent(FrameKind::kCredit, key, place.size() - pulled);
    peer_sends(data_frame(FrameKind::kBulk, key, std::span(wire_.memory).subspan(pulled)));
    let_all_arrive();
    ASSERT_TRUE(receive->done());
    EXPECT_TRUE(receive->status().ok()) << receive->status().text();
    EXPECT_TRUE(place == wire_.memory);
  }
}

TEST_F(StreamTransportTest, AnOfferedSendEndsWhenItWasTakenAndSendsWhatThePeerCannotRead) {
  pull_from(1);
  const Bytes given = pattern(10'000, 3);
  const TransferKey taken{1, 2, 0};
  const TransferRef first = end_.send(1, taken, given);
  const std::vector<Sent> offer = sent();
  ASSERT_EQ(offer.size(), 1u);
  EXPECT_EQ(offer[0].header.kind, FrameKind::kOffer);
  EXPECT_EQ(offer[0].header.bytes, given.size());
  const auto address = reinterpret_cast<std::uint64_t>(given.data());
  EXPECT_TRUE(
      std::equal(offer[0].payload.begin(), offer[0].payload.end(), std::as_bytes(std::span(&address, 1)).begin()));
  EXPECT_FALSE(first->done());
  EXPECT_FALSE(end_.transport->flushed());
  peer_says(FrameKind::kTaken, taken);
  EXPECT_TRUE(first->done() && first->status().ok());
  EXPECT_TRUE(end_.transport->flushed());
  for (const std::size_t left : {given.size(), std::size_t{4000}, std::size_t{100}}) {
    const TransferKey refused{1, 2, static_cast<std::uint32_t>(left)};
    const TransferRef second = end_.send(1, refused, given);
    EXPECT_EQ(sent().size(), 1u);
    peer_says(FrameKind::kCredit, refused, left);
    const std::vector<Sent> rest = sent();
    ASSERT_EQ(rest.size(), 1u);
    EXPECT_EQ(rest[0].header.kind, FrameKind::kBulk);
    EXPECT_TRUE(
        std::equal(rest[0].payload.begin(), rest[0].payload.end(), given.end() - static_cast<long>(left), given.end()));
    EXPECT_TRUE(second->done() && second->status().ok());
  }
  const TransferKey nonsense{1, 2, 1};
  const TransferRef third = end_.send(1, nonsense, given);
  peer_says(FrameKind::kCredit, nonsense, given.size() + 1);
  ASSERT_TRUE(third->done());
  EXPECT_NE(third->status().text().find("10001 bytes of 10000"), std::string::npos) << third->status().text();
}

TEST_F(StreamTransportTest, ACancelledOfferKeepsItsMemoryUntilThePeerHasAnswered) {
  pull_from(1);
  const TransferKey key{1, 2, 0};
  auto memory = std::make_shared<Bytes>(pattern(10'000, 4));
  const std::weak_ptr<Bytes> watch = memory;
  TransferRef send = end_.send(1, key, *memory, memory);
  memory.reset();
  EXPECT_EQ(sent().size(), 1u);
  end_.transport->cancel(send, Status::internal("cancelled"));
  EXPECT_EQ(send->status().text(), "cancelled");
  send.reset();
  expect_sent(FrameKind::kWithdrawn, key);
  EXPECT_FALSE(watch.expired()) << "the peer may be reading this memory";
  EXPECT_FALSE(end_.transport->flushed());
  peer_says(FrameKind::kTaken, key);
  EXPECT_TRUE(watch.expired()) << "the memory is never given back";
  EXPECT_TRUE(end_.transport->flushed());
}

TEST_F(StreamTransportTest, AnOfferThatIsWithdrawnOrNotWantedIsAnsweredAndNotPulled) {
  pull_from(1);
  wire_.memory = pattern(600'000, 5);
  Bytes place(wire_.memory.size(), std::byte{0});
  // Nobody had asked for it.
  peer_offers({1, 2, 0}, 0, place.size());
  peer_says(FrameKind::kWithdrawn, {1, 2, 0});
  expect_sent(FrameKind::kTaken, {1, 2, 0});
  const TransferRef waits = end_.receive(1, {1, 2, 0}, place);
  while (end_.transport->progress()) {
  }
  EXPECT_FALSE(waits->done());
  // Its receive was cancelled before it came, or half-way.
  for (const bool half_way : {false, true}) {
    const TransferKey key{1, 2, half_way ? 1u : 2u};
    const TransferRef receive = end_.receive(1, key, place);
    if (half_way) {
      peer_offers(key, 0, place.size());
      let_arrive(1000);
      ASSERT_GT(receive->delivered(), 0u);
      ASSERT_FALSE(receive->done());
    }
    end_.transport->cancel(receive, Status::internal("cancelled"));
    const Bytes at_cancel = place;
    if (!half_way) peer_offers(key, 0, place.size());
    let_all_arrive();
    while (end_.transport->progress()) {
    }
    expect_sent(FrameKind::kTaken, key);
    EXPECT_TRUE(place == at_cancel) << "memory was written after its receive had ended";
  }
  // The answer and the withdrawal have crossed.
  peer_says(FrameKind::kWithdrawn, {1, 2, 1});
  EXPECT_TRUE(sent().empty());
  EXPECT_TRUE(end_.lost.empty());
}

TEST_F(StreamTransportTest, WhatWasPulledFromAPeerThatEndedMeanwhileIsNotDelivered) {
  pull_from(1);
  wire_.memory = pattern(600'000, 6);
  Bytes place(wire_.memory.size());
  const TransferRef receive = end_.receive(1, {1, 2, 0}, place);
  peer_offers({1, 2, 0}, 0, place.size());
  let_arrive(1000);
  ASSERT_FALSE(receive->done());
  wire_.gone = true;
  end_.transport->progress();
  ASSERT_TRUE(receive->done());
  EXPECT_FALSE(receive->status().ok());
  expect_lost("it ended while its memory was read");
}

TEST_F(StreamTransportTest, WhoEndsClosesTheLinkBeforeItLetsGoOfWhatItHasOffered) {
  struct Watch {
    const Wire& wire;
    bool& closed_before;
    ~Watch() { closed_before = wire.closed; }
  };
  pull_from(1);
  bool closed_before = false;
  const Bytes given = pattern(10'000, 7);
  end_.send(1, {1, 2, 0}, given, std::make_shared<Watch>(wire_, closed_before));
  end_.transport.reset();
  EXPECT_TRUE(closed_before);
}

TEST_F(StreamTransportTest, AnOfferOverALinkThatCannotPullIsALostPeer) {
  peer_offers({1, 2, 0}, 0, 100);
  let_all_arrive();
  expect_lost("memory that cannot be read");
}

// ---- pieces
// ----------------------------------------------------------------------------------------------------------

TEST_F(StreamTransportTest, AReceiveThatIsPostedAnywhereInAnArrivingEagerMessageGetsItAll) {
  std::uint32_t sequence = 0;
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{16}, std::size_t{17}, std::size_t{100}}) {
    for (const bool in_place : {false, true}) {
      const std::size_t whole = kFrameHeaderBytes + size + padding_after(size);
      for (std::size_t before = 0; before <= whole; ++before) {
        const TransferKey key{1, 2, sequence++};
        const Bytes given = pattern(size, before);
        wire_.reads_in_place = in_place;
        peer_sends(data_frame(FrameKind::kEager, key, given));
        let_arrive(before);
        Bytes place(size);
        const TransferRef receive = end_.receive(1, key, place);
        for (std::size_t left = whole - before; left > 0; --left) let_arrive(1);
        ASSERT_TRUE(receive->done()) << size << " bytes, posted after " << before;
        EXPECT_TRUE(receive->status().ok()) << receive->status().text();
        ASSERT_TRUE(place == given) << size << " bytes, posted after " << before;
      }
    }
  }
}

TEST_F(StreamTransportTest, AMismatchThatIsSeenHalfWayInEndsThatTransferAlone) {
  for (const std::size_t before : {std::size_t{48}, std::size_t{60}, std::size_t{148}}) {
    const TransferKey key{0, 0, static_cast<std::uint32_t>(before)};
    const Bytes given = pattern(100, before);
    peer_sends(data_frame(FrameKind::kEager, key, given));
    let_arrive(before);
    Bytes place(99);
    const TransferRef receive = end_.receive(1, key, place);
    ASSERT_TRUE(receive->done());
    EXPECT_EQ(receive->status().text(), "rank 1 sent 100 bytes where this rank expects 99");
    peer_sends(control_frame(bytes_of("next")));
    let_all_arrive();
    ASSERT_EQ(end_.control.size(), 1u);
    end_.control.clear();
  }
  EXPECT_TRUE(end_.lost.empty());
}

TEST_F(StreamTransportTest, PiecesOfAnySizeMakeTheSameMessages) {
  for (std::size_t piece = 1; piece < 200; piece += random_() % 7 + 1) {
    const TransferKey key{0, 1, static_cast<std::uint32_t>(piece)};
    const Bytes message = pattern(random_() % 500, piece);
    const Bytes given = pattern(random_() % kEagerLimit, piece + 1);
    const Bytes unexpected = pattern(random_() % kEagerLimit, piece + 2);
    Bytes place(given.size());
    const TransferRef receive = end_.receive(1, key, place);
    peer_sends(control_frame(message));
    peer_sends(data_frame(FrameKind::kEager, {0, 2, static_cast<std::uint32_t>(piece)}, unexpected));
    peer_sends(data_frame(FrameKind::kEager, key, given));
    while (wire_.consumed < wire_.in.size()) let_arrive(piece);
    ASSERT_EQ(end_.control.size(), 1u) << "pieces of " << piece;
    EXPECT_TRUE(end_.control[0].second == message);
    ASSERT_TRUE(receive->done() && receive->status().ok()) << "pieces of " << piece;
    EXPECT_TRUE(place == given);
    Bytes late(unexpected.size());
    EXPECT_TRUE(end_.receive(1, {0, 2, static_cast<std::uint32_t>(piece)}, late)->done());
    EXPECT_TRUE(late == unexpected);
    end_.control.clear();
  }
}

TEST_F(StreamTransportTest, WhatArrivesIsCombinedWhereverPiecesCutElements) {
  // Each reduction in both orders of its operands: subtraction would show a swap, so would a wrong element.
  const auto subtract = [](void* out, const void* lhs, const void* rhs, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      double a = 0;
      double b = 0;
      std::memcpy(&a, static_cast<const std::byte*>(lhs) + 8 * i, 8);
      std::memcpy(&b, static_cast<const std::byte*>(rhs) + 8 * i, 8);
      a -= b;
      std::memcpy(static_cast<std::byte*>(out) + 8 * i, &a, 8);
    }
  };
  std::uint32_t sequence = 0;
  for (const bool bulk : {false, true}) {
    for (const bool incoming_first : {false, true}) {
      for (const bool in_place : {false, true}) {
        for (const std::size_t piece : {1, 3, 7, 8, 9, 31, 64, 1000}) {
          const std::size_t count = bulk ? 700 : 97;  // beyond the eager limit, or below
          std::vector<double> incoming(count);
          std::vector<double> own(count);
          for (std::size_t i = 0; i < count; ++i) {
            incoming[i] = static_cast<double>(i) * 3.5;
            own[i] = static_cast<double>(random_() % 1000);
          }
          std::vector<double> out = in_place ? own : std::vector<double>(count);
          const TransferKey key{0, 3, sequence++};
          Arrival arrival;
          arrival.out = reinterpret_cast<std::byte*>(out.data());
          arrival.own = in_place ? arrival.out : reinterpret_cast<const std::byte*>(own.data());
          arrival.combine = subtract;
          arrival.element_bytes = 8;
          arrival.incoming_first = incoming_first;
          const TransferRef receive = end_.receive(1, key, 8 * count, arrival);
          peer_sends(data_frame(bulk ? FrameKind::kBulk : FrameKind::kEager, key, std::as_bytes(std::span(incoming))));
          while (wire_.consumed < wire_.in.size()) let_arrive(piece);
          ASSERT_TRUE(receive->done() && receive->status().ok()) << "pieces of " << piece;
          for (std::size_t i = 0; i < count; ++i) {
            ASSERT_EQ(out[i], incoming_first ? incoming[i] - own[i] : own[i] - incoming[i]) << "pieces of " << piece;
          }
        }
      }
    }
  }
}

TEST_F(StreamTransportTest, AReceiveThatIsCancelledHalfWayInLeavesItsMemoryAlone) {
  const Bytes given = pattern(2000, 1);
  for (const bool combine : {false, true}) {
    const TransferKey key{0, 0, combine ? 1u : 0u};
    Bytes place(given.size(), std::byte{0});
    Arrival arrival;
    arrival.out = place.data();
    arrival.own = place.data();
    if (combine) {
      arrival.element_bytes = 8;
      arrival.combine = find_reducer(DataType::kInt64, ReduceOp::kSum).value().combine;
    }
    const TransferRef receive = end_.receive(1, key, given.size(), arrival);
    peer_sends(data_frame(FrameKind::kEager, key, given));
    let_arrive(kFrameHeaderBytes + 1003);  // in the middle of an element
    end_.transport->cancel(receive, Status::internal("enough"));
    const Bytes at_cancel = place;
    peer_sends(control_frame(bytes_of("next")));
    let_all_arrive();
    EXPECT_TRUE(place == at_cancel);
    EXPECT_EQ(receive->status().text(), "enough");
  }
  EXPECT_EQ(end_.control.size(), 2u);
  EXPECT_TRUE(end_.lost.empty());
}

TEST_F(StreamTransportTest, NobodySleepsOnOutputThatOnlyABudgetHeldUp) {
  end_.transport->post(1, pattern(900'000, 1));  // more than is written at a time
  EXPECT_FALSE(end_.transport->flushed());
  int looks = 0;
  while (!end_.transport->arm() && looks < 100) ++looks;
  EXPECT_GT(looks, 0);
  EXPECT_TRUE(end_.transport->flushed()) << "the link takes everything, so nothing would wake the sleeper";
}

TEST_F(StreamTransportTest, WhatComesForACancelledReceiveIsNotKept) {
  for (const std::size_t size : {std::size_t{10}, kEagerLimit}) {
    const TransferKey key{0, 9, static_cast<std::uint32_t>(size)};
    Bytes place(size);
    end_.transport->cancel(end_.receive(1, key, place), Status::internal("the call failed"));
    peer_sends(data_frame(FrameKind::kEager, key, pattern(size, 1)));
    let_all_arrive();
    const TransferRef again = end_.receive(1, key, place);
    EXPECT_FALSE(again->done()) << "the message was kept";
    end_.transport->cancel(again, Status::internal("the end"));
  }
  EXPECT_TRUE(end_.lost.empty());
}

TEST_F(StreamTransportTest, ALinkThatTakesAByteAtATimeGetsTheSameBytes) {
  const Bytes message = pattern(50, 1);
  const Bytes small = pattern(100, 2);
  const Bytes eager = pattern(3000, 3);
  end_.transport->post(1, message);
  end_.send(1, {0, 0, 0}, small);
  end_.send(1, {0, 0, 1}, eager);
  const Bytes at_once = wire_.out;
  Wire slow;
  StreamTransport::Settings settings;
  settings.size = 2;
  settings.generation = kGeneration;
  settings.eager_limit_bytes = kEagerLimit;
  auto transport = std::make_unique<StreamTransport>(settings, std::make_unique<NoWakeup>());
  transport->add_peer(1, std::make_unique<ScriptedLink>(slow));
  End other(0);
  other.use(std::move(transport));
  slow.room = 0;
  other.transport->post(1, message);
  other.send(1, {0, 0, 0}, small);
  const TransferRef last = other.send(1, {0, 0, 1}, eager);
  for (std::size_t i = 0; i < at_once.size(); ++i) {
    EXPECT_FALSE(other.transport->flushed());
    slow.room = 1;
    other.transport->progress();
  }
  EXPECT_TRUE(slow.out == at_once);
  EXPECT_TRUE(last->done());
  EXPECT_TRUE(other.transport->flushed());
}

TEST_F(StreamTransportTest, ControlMessagesOvertakeDataThatHasNotBegun) {
  const Bytes eager = pattern(3000, 3);
  wire_.room = 10;  // the first frame is on its way
  end_.send(1, {0, 0, 0}, eager);
  end_.send(1, {0, 0, 1}, eager);
  end_.transport->post(1, bytes_of("urgent"));
  wire_.room = SIZE_MAX;
  end_.transport->progress();
  const std::size_t first = kFrameHeaderBytes + 3000 + padding_after(3000);
  const auto second = decode_header(std::span<const std::byte>(wire_.out).subspan(first).first<kFrameHeaderBytes>());
  ASSERT_TRUE(second.ok()) << second.status().text();
  EXPECT_EQ(second.value().kind, FrameKind::kControl);
}

// ---- nonsense
// --------------------------------------------------------------------------------------------------------

TEST_F(StreamTransportTest, AControlMessageWithAFlippedBitIsALostPeer) {
  Bytes bytes = control_frame(pattern(100, 1));
  bytes[kFrameHeaderBytes + 50] ^= std::byte{4};
  peer_sends(bytes);
  let_all_arrive();
  EXPECT_TRUE(end_.control.empty());
  expect_lost("a control message has a wrong checksum");
}

TEST(StreamTransportHeader, EveryFlippedBitOfAHeaderIsSeen) {
  FrameHeader header;
  header.kind = FrameKind::kEager;
  header.generation = 3;
  header.sender = 12;
  header.bytes = 77;
  const EncodedHeader good = encode(header);
  ASSERT_TRUE(decode_header(good).ok());
  for (std::size_t bit = 0; bit < 44 * 8; ++bit) {  // the last 4 bytes only fill the frame up to its alignment
    EncodedHeader bad = good;
    bad[bit / 8] ^= static_cast<std::byte>(1u << bit % 8);
    EXPECT_FALSE(decode_header(bad).ok()) << "bit " << bit;
  }
}

TEST(StreamTransportHeader, KeepsEveryField) {
  FrameHeader header;
  header.generation = 0xfedcba98;
  header.kind = FrameKind::kBulk;
  header.process_set = 65'535;
  header.channel = 65'534;
  header.sender = 4'000'000'000;
  header.sequence = 0xffff'ffff;
  header.bytes = std::uint64_t{1} << 60;
  header.payload_crc = 0x12345678;
  const Result<FrameHeader> back = decode_header(encode(header));
  ASSERT_TRUE(back.ok());
  EXPECT_EQ(back.value().generation, header.generation);
  EXPECT_EQ(back.value().kind, header.kind);
  EXPECT_EQ(back.value().process_set, header.process_set);
  EXPECT_EQ(back.value().channel, header.channel);
  EXPECT_EQ(back.value().sender, header.sender);
  EXPECT_EQ(back.value().sequence, header.sequence);
  EXPECT_EQ(back.value().bytes, header.bytes);
  EXPECT_EQ(back.value().payload_crc, header.payload_crc);
  for (const std::uint64_t bytes : {0, 1, 15, 16, 17, 4095})
    EXPECT_EQ((kFrameHeaderBytes + bytes + padding_after(bytes)) % kFrameAlignment, 0u);
}

TEST_F(StreamTransportTest, BytesThatAreNoFrameAreALostPeer) {
  peer_sends(Bytes(kFrameHeaderBytes, std::byte{0x41}));
  let_all_arrive();
  expect_lost("wrong magic number");
}

TEST_F(StreamTransportTest, AFrameInTheNameOfAnotherRankIsALostPeer) {
  FrameHeader head = header(FrameKind::kGoodbye, {}, 0);
  head.sender = 5;
  peer_sends(frame(head, {}));
  let_all_arrive();
  EXPECT_TRUE(end_.goodbyes.empty());
  expect_lost("a frame says that rank 5 sent it");
}

TEST_F(StreamTransportTest, AFrameOfAnUnknownKindIsALostPeer) {
  peer_sends(frame(header(static_cast<FrameKind>(9), {}, 0), {}));
  let_all_arrive();
  expect_lost("unknown kind 9");
}

TEST_F(StreamTransportTest, AnEagerFrameBeyondTheLimitThatNobodyAskedForIsALostPeer) {
  peer_sends(frame(header(FrameKind::kEager, {}, kEagerLimit + 1), {}));
  let_all_arrive();
  expect_lost("an eager frame of 4097 bytes");
}

TEST_F(StreamTransportTest, APayloadThatNobodyAskedForIsALostPeer) {
  peer_sends(frame(header(FrameKind::kBulk, {}, 100'000), {}));
  let_all_arrive();
  expect_lost("a payload that was not asked for");
}

TEST_F(StreamTransportTest, AControlMessageOfGigabytesIsRefusedBeforeItsMemoryIsTaken) {
  peer_sends(frame(header(FrameKind::kControl, {}, std::uint64_t{1} << 40), {}));
  let_all_arrive();
  expect_lost("the limit is");
}

TEST_F(StreamTransportTest, ACreditThatNobodyNeedsDoesNothing) {
  peer_sends(frame(header(FrameKind::kCredit, {0, 0, 4}, std::uint64_t{1} << 62), {}));
  peer_sends(control_frame(bytes_of("next")));
  let_all_arrive();
  EXPECT_EQ(end_.control.size(), 1u);
  EXPECT_TRUE(end_.lost.empty());
  EXPECT_TRUE(wire_.out.empty());
}

TEST_F(StreamTransportTest, FramesOfAnotherGenerationAreSkippedWhateverTheyHold) {
  for (const std::uint32_t generation : {0u, kGeneration - 1, kGeneration + 1, 0xffff'ffffu}) {
    for (const FrameKind kind : {FrameKind::kControl, FrameKind::kEager, FrameKind::kCredit, FrameKind::kBulk,
                                 FrameKind::kOffer, FrameKind::kTaken, FrameKind::kWithdrawn, FrameKind::kGoodbye}) {
      FrameHeader head = header(kind, {0, 0, 1}, 100);
      head.generation = generation;
      const Bytes payload = pattern(static_cast<std::size_t>(payload_bytes(head)), 1);
      peer_sends(frame(head, payload));  // with a wrong checksum, too
    }
  }
  Bytes place(100);
  const TransferRef receive = end_.receive(1, {0, 0, 1}, place);
  peer_sends(control_frame(bytes_of("of this generation")));
  let_all_arrive();
  ASSERT_EQ(end_.control.size(), 1u);
  EXPECT_EQ(end_.control[0].second, bytes_of("of this generation"));
  EXPECT_FALSE(receive->done());
  EXPECT_TRUE(end_.lost.empty() && end_.goodbyes.empty());
}

TEST_F(StreamTransportTest, RandomBytesNeverDoWorseThanLoseThePeer) {
  for (int round = 0; round < 300; ++round) {
    Wire wire;
    wire.can_pull = round % 2 == 0;
    wire.memory = pattern(5000, 3);
    StreamTransport::Settings settings;
    settings.size = 2;
    settings.generation = kGeneration;
    settings.eager_limit_bytes = kEagerLimit;
    auto transport = std::make_unique<StreamTransport>(settings, std::make_unique<NoWakeup>());
    transport->add_peer(1, std::make_unique<ScriptedLink>(wire));
    End end(0);
    end.use(std::move(transport));
    end.pull_from = 1000;
    Bytes place(3000);
    const TransferRef receive = end.receive(1, {0, 0, 0}, std::span(place).first(100));
    const TransferRef credited = end.receive(1, {0, 0, 1}, place);
    const TransferRef send = end.send(1, {0, 0, 2}, pattern(1, 1));
    // Frames that are right in themselves, of any kind and size, in any order, with junk behind some of them.
    for (int i = 0; i < 10; ++i) {
      FrameHeader head =
          header(static_cast<FrameKind>(random_() % 8 + 1), {0, 0, static_cast<std::uint32_t>(random_() % 4)},
                 random_() % 8 == 0 ? random_() : random_() % 5000);
      const std::size_t payload = static_cast<std::size_t>(std::min<std::uint64_t>(payload_bytes(head), 10'000));
      const Bytes bytes = frame(head, pattern(payload, 1));
      wire.in.insert(wire.in.end(), bytes.begin(), bytes.end());
      if (random_() % 6 == 0) wire.in.push_back(std::byte{1});
    }
    while (wire.arrived < wire.in.size() && end.lost.empty()) {
      wire.arrived = std::min<std::size_t>(wire.in.size(), wire.arrived + random_() % 3000);
      while (end.transport->progress()) {
      }
    }
    wire.failure = Status::internal("gone");
    while (wire.consumed < wire.arrived && end.transport->progress()) {
    }
    end.transport->progress();
    EXPECT_LE(end.lost.size(), 1u);
    if (!end.lost.empty() || !end.goodbyes.empty()) {
      EXPECT_TRUE(receive->done());
      EXPECT_TRUE(credited->done());
    }
  }
}

TEST_F(StreamTransportTest, ALinkThatFailsAfterItsLastBytesIsReadToTheEndFirst) {
  wire_.failure = Status::internal("the cable was cut");
  peer_sends(control_frame(bytes_of("last words")));
  let_all_arrive();
  end_.transport->progress();
  ASSERT_EQ(end_.control.size(), 1u);
  expect_lost("the cable was cut");
}

}  // namespace
}  // namespace hvd::testing
