// The ring of bytes between two threads, and what a peer that writes nonsense into it can do.

#include "ops/transport/byte_ring.h"

#include <gtest/gtest.h>

#include <thread>

#include "ops/transport/shm/shm_link.h"
#include "ops/transport/shm/shm_wakeup.h"
#include "tests/ops/transport/transport_ends.h"

namespace hvd::testing {
namespace {

TEST(ByteRing, BytesComeOutAsTheyWentInAroundTheEndOfItsMemory) {
  std::mt19937_64 random = generator_of_this_run();
  ByteRingControl control;
  alignas(64) std::array<std::byte, 64> memory{};
  ByteRingWriter writer(control, memory);
  ByteRingReader reader(control, memory);
  const Bytes stream = pattern(20'000, 1);
  std::size_t written = 0;
  std::size_t read = 0;
  while (read < stream.size()) {
    if (random() % 2 == 0) {
      const std::size_t wanted = std::min<std::size_t>(random() % 100, stream.size() - written);
      const std::size_t count = writer.write_some(std::span(stream).subspan(written, wanted));
      ASSERT_EQ(count, std::min(wanted, memory.size() - (written - read)));
      written += count;
    } else {
      const std::span<const std::byte> here = reader.peek();
      ASSERT_LE(here.size(), written - read);
      ASSERT_EQ(here.empty(), written == read);
      const std::size_t count = here.empty() ? 0 : random() % here.size() + 1;
      ASSERT_TRUE(std::equal(here.begin(), here.begin() + static_cast<std::ptrdiff_t>(count),
                             stream.begin() + static_cast<std::ptrdiff_t>(read)));
      reader.consume(count);
      read += count;
    }
  }
}

TEST(ByteRing, AWriterThatFindsNoRoomSaysSoUntilItHasFoundSome) {
  ByteRingControl control;
  alignas(64) std::array<std::byte, 32> memory{};
  ByteRingWriter writer(control, memory);
  ByteRingReader reader(control, memory);
  const Bytes bytes = pattern(40, 1);
  EXPECT_EQ(writer.write_some(std::span(bytes).first(32)), 32u);
  EXPECT_FALSE(reader.writer_is_blocked());
  EXPECT_EQ(writer.write_some(std::span(bytes).first(1)), 0u);
  EXPECT_TRUE(reader.writer_is_blocked());
  EXPECT_FALSE(writer.has_room());
  reader.consume(8);
  EXPECT_TRUE(writer.has_room());
  EXPECT_EQ(writer.write_some(std::span(bytes).first(8)), 8u);
  EXPECT_FALSE(reader.writer_is_blocked());
}

TEST(ByteRing, TwoThreadsSeeOneStream) {
  ByteRingControl control;
  std::vector<std::byte> memory(4096);
  const Bytes stream = pattern(3 << 20, 2);
  std::atomic<bool> wrong{false};
  std::jthread reading([&] {
    ByteRingReader reader(control, memory);
    for (std::size_t read = 0; read < stream.size();) {
      const std::span<const std::byte> here = reader.peek();
      if (!std::equal(here.begin(), here.end(), stream.begin() + static_cast<std::ptrdiff_t>(read))) {
        wrong.store(true);
        return;
      }
      if (here.empty()) std::this_thread::yield();
      read += here.size();
      reader.consume(here.size());
    }
  });
  ByteRingWriter writer(control, memory);
  for (std::size_t written = 0; written < stream.size() && !wrong.load();) {
    const std::size_t count =
        writer.write_some(std::span(stream).subspan(written, std::min<std::size_t>(1000, stream.size() - written)));
    if (count == 0) std::this_thread::yield();
    written += count;
  }
  reading.join();
  EXPECT_FALSE(wrong.load());
}

constexpr std::size_t kSlot = std::size_t{64} << 10;

// A pair of ranks with memory between them, of which the test plays rank 1 by writing into it.
class SharedPair : public ::testing::Test {
 protected:
  void SetUp() override {
    auto file = create_memory_file("test", pair_memory_bytes(kRing));
    ASSERT_TRUE(file.ok()) << file.status().text();
    auto pair = SharedMapping::map(file.value().get(), pair_memory_bytes(kRing));
    ASSERT_TRUE(pair.ok()) << pair.status().text();
    auto presence_file = create_memory_file("test", presence_bytes(kSlot));
    ASSERT_TRUE(presence_file.ok());
    auto presence = SharedMapping::map(presence_file.value().get(), presence_bytes(kSlot));
    ASSERT_TRUE(presence.ok());
    auto peer = std::make_unique<ShmPeer>(1, UniqueFd());
    peer->pair = std::move(pair).value();
    peer->presence = std::move(presence).value();
    peer->ring_bytes = kRing;
    std::construct_at(&peer->control());
    std::construct_at(reinterpret_cast<ShmPresence*>(peer->presence.bytes().data()));
    auto wakeup = ShmWakeup::create(kSlot);
    ASSERT_TRUE(wakeup.ok()) << wakeup.status().text();
    kept_ = &wakeup.value()->keep(std::move(peer));
    StreamTransport::Settings settings;
    settings.name = "shared memory";
    settings.size = 2;
    auto transport = std::make_unique<StreamTransport>(settings, std::move(wakeup).value());
    transport->add_peer(1, std::make_unique<ShmLink>(0, *kept_));
    end_.use(std::move(transport));
  }

  static constexpr std::size_t kRing = 4096;
  const ShmPeer* kept_ = nullptr;
  End end_{0};
};

TEST_F(SharedPair, PositionsThatCannotBeRightAreALostPeer) {
  for (int i = 0; i < 10; ++i) end_.transport->progress();
  EXPECT_TRUE(end_.lost.empty());
  kept_->control().to_lower.written.store(kRing + 1);  // more than fits
  for (int i = 0; i < 10; ++i) end_.transport->progress();
  ASSERT_EQ(end_.lost.size(), 1u);
  EXPECT_NE(end_.lost[0].second.text().find("positions"), std::string::npos) << end_.lost[0].second.text();
}

TEST_F(SharedPair, AWrittenPositionThatGoesBackIsALostPeer) {
  kept_->control().to_lower.written.store(~std::uint64_t{0} - 5);
  for (int i = 0; i < 10; ++i) end_.transport->progress();
  EXPECT_EQ(end_.lost.size(), 1u);
}

TEST_F(SharedPair, NonsenseAboutWhatWasConsumedNeverLeadsOutOfTheRing) {
  std::mt19937_64 random = generator_of_this_run();
  for (int round = 0; round < 200; ++round) {
    const std::uint64_t junk = round % 2 == 0 ? random() : ~std::uint64_t{0} - random() % 10'000;
    kept_->control().to_higher.consumed.store(junk);
    kept_->control().to_higher.writer_blocked.store(static_cast<std::uint32_t>(random()));
    end_.transport->post(1, pattern(random() % 20'000, 1));
    end_.transport->progress();
  }
  // The mapping ends behind the control page; address sanitizer and the nonce in that page see a write beyond a ring.
  EXPECT_EQ(kept_->control().from_higher, ShmNonce{});
  EXPECT_EQ(kept_->control().to_lower.written.load(), 0u);
  for (const std::byte byte : kept_->ring_to_lower()) ASSERT_EQ(byte, std::byte{0}) << "it wrote into the other ring";
}

}  // namespace
}  // namespace hvd::testing
