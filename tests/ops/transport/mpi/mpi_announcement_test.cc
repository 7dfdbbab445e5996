// What goes before a transfer over MPI, as bytes: nothing that arrives is taken for what it is not.

#include "ops/transport/mpi/mpi_announcement.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "tests/ops/transport/transport_ends.h"

namespace hvd::testing {
namespace {

constexpr int kSender = 5;

MpiAnnouncement announcement_of(std::uint64_t bytes, bool carries_payload) {
  MpiAnnouncement made;
  made.life = mpi_life(3, 9);
  made.sender = kSender;
  made.key = {7, 11, 13};
  made.bytes = bytes;
  made.carries_payload = carries_payload;
  if (!carries_payload) {
    made.tag = 4711;
    made.piece_bytes = 1000;
  }
  return made;
}

Bytes message_of(const MpiAnnouncement& announcement, std::size_t payload) {
  const EncodedAnnouncement head = encode(announcement);
  Bytes message(head.begin(), head.end());
  message.resize(head.size() + payload);
  return message;
}

TEST(MpiAnnouncement, ComesBackAsItWas) {
  for (const bool carries_payload : {true, false}) {
    const MpiAnnouncement given = announcement_of(77, carries_payload);
    const Bytes message = message_of(given, carries_payload ? 77 : 0);
    Result<MpiAnnouncement> read = decode_announcement(message, kSender);
    ASSERT_TRUE(read.ok()) << read.status().text();
    EXPECT_EQ(read->life, given.life);
    EXPECT_EQ(read->sender, kSender);
    EXPECT_EQ(read->key, given.key);
    EXPECT_EQ(read->bytes, 77u);
    EXPECT_EQ(read->carries_payload, carries_payload);
    EXPECT_EQ(read->tag, given.tag);
    EXPECT_EQ(read->piece_bytes, given.piece_bytes);
  }
}

TEST(MpiAnnouncement, EveryTruncationIsAnError) {
  for (const bool carries_payload : {true, false}) {
    const Bytes message = message_of(announcement_of(77, carries_payload), carries_payload ? 77 : 0);
    for (std::size_t size = 0; size < message.size(); ++size) {
      const Bytes cut(message.begin(),
                      message.begin() + static_cast<std::ptrdiff_t>(size));  // so that memory ends there
      EXPECT_EQ(decode_announcement(cut, kSender).status().code(), StatusCode::kInternal) << size;
    }
    Bytes longer = message;
    longer.emplace_back();
    EXPECT_FALSE(decode_announcement(longer, kSender).ok());
  }
}

TEST(MpiAnnouncement, RandomBytesAreAnError) {
  std::mt19937_64 random = generator_of_this_run();
  for (int i = 0; i < 20'000; ++i) {
    Bytes junk(random() % 200);
    for (std::byte& byte : junk) byte = static_cast<std::byte>(random());
    EXPECT_FALSE(decode_announcement(junk, kSender).ok());
  }
}

TEST(MpiAnnouncement, AnyBitThatFlipsInItsHeaderIsSeen) {
  constexpr std::size_t checked = 44;  // the header's fields and their checksum
  const Bytes message = message_of(announcement_of(77, false), 0);
  for (std::size_t bit = 0; bit < 8 * message.size(); ++bit) {
    Bytes flipped = message;
    flipped[bit / 8] ^= static_cast<std::byte>(1 << bit % 8);
    const bool read = decode_announcement(flipped, kSender).ok();  // behind it at least nothing breaks
    EXPECT_FALSE(read && bit < 8 * checked) << "bit " << bit;
  }
}

TEST(MpiAnnouncement, NumbersThatCannotBeAreAnError) {
  const auto refused = [](const MpiAnnouncement& announcement, std::size_t payload) {
    return !decode_announcement(message_of(announcement, payload), kSender).ok();
  };
  ASSERT_FALSE(refused(announcement_of(77, false), 0));
  EXPECT_TRUE(refused(announcement_of(77, true), 76));
  EXPECT_TRUE(refused(announcement_of(77, true), 78));
  EXPECT_TRUE(refused(announcement_of(77, false), 77)) << "bytes that are also to come under a tag";
  EXPECT_TRUE(refused(announcement_of(0, false), 0)) << "no bytes, for which a receiver would wait";
  for (const int tag : {-1, kMpiBootstrapTag, kMpiMailTag, std::numeric_limits<int>::min()}) {
    MpiAnnouncement wrong = announcement_of(77, false);
    wrong.tag = tag;
    EXPECT_TRUE(refused(wrong, 0)) << tag;
  }
  for (const std::uint64_t piece : {std::uint64_t{0}, std::uint64_t{1} << 31, ~std::uint64_t{0}}) {
    MpiAnnouncement wrong = announcement_of(77, false);
    wrong.piece_bytes = piece;
    EXPECT_TRUE(refused(wrong, 0)) << piece;
  }
  EXPECT_FALSE(decode_announcement(message_of(announcement_of(77, false), 0), kSender + 1).ok()) << "of another rank";
  FrameHeader header;
  header.kind = FrameKind::kControl;
  header.sender = kSender;
  Bytes control(kMpiAnnouncementBytes);
  std::memcpy(control.data(), encode(header).data(), kFrameHeaderBytes);
  EXPECT_FALSE(decode_announcement(control, kSender).ok()) << "another frame";
}

}  // namespace
}  // namespace hvd::testing
