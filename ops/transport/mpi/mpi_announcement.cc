#include "ops/transport/mpi/mpi_announcement.h"

#include <fmt/format.h>

#include <cstring>
#include <limits>

namespace hvd {
namespace {

// Behind the frame header: epoch, tag, bytes of a piece.
constexpr std::size_t kEpochAt = kFrameHeaderBytes;
constexpr std::size_t kTagAt = kEpochAt + 4;
constexpr std::size_t kPieceAt = kTagAt + 4;
static_assert(kPieceAt + 8 == kMpiAnnouncementBytes);

Status check(const MpiAnnouncement& announcement, std::size_t payload) {
  if (announcement.carries_payload) {
    if (payload == announcement.bytes) return {};
    return Status::internal(fmt::format("a transfer of {} bytes came with {}", announcement.bytes, payload));
  }
  constexpr std::uint64_t largest = std::numeric_limits<int>::max();
  if (payload != 0 || announcement.bytes == 0 || announcement.piece_bytes == 0 || announcement.piece_bytes > largest ||
      announcement.tag < kMpiFirstTransferTag) {
    return Status::internal(fmt::format("a transfer of {} bytes in pieces of {} under tag {} cannot be",
                                        announcement.bytes, announcement.piece_bytes, announcement.tag));
  }
  return {};
}

}  // namespace

EncodedAnnouncement encode(const MpiAnnouncement& announcement) {
  FrameHeader header;
  header.generation = static_cast<std::uint32_t>(announcement.life);
  header.kind = announcement.carries_payload ? FrameKind::kEager : FrameKind::kBulk;
  header.process_set = announcement.key.process_set;
  header.channel = announcement.key.channel;
  header.sequence = announcement.key.sequence;
  header.sender = static_cast<std::uint32_t>(announcement.sender);
  header.bytes = announcement.bytes;
  const EncodedHeader head = encode(header);
  const auto epoch = static_cast<std::uint32_t>(announcement.life >> 32);
  EncodedAnnouncement bytes;
  std::memcpy(bytes.data(), head.data(), head.size());
  std::memcpy(bytes.data() + kEpochAt, &epoch, sizeof epoch);
  std::memcpy(bytes.data() + kTagAt, &announcement.tag, sizeof announcement.tag);
  std::memcpy(bytes.data() + kPieceAt, &announcement.piece_bytes, sizeof announcement.piece_bytes);
  return bytes;
}

Result<MpiAnnouncement> decode_announcement(std::span<const std::byte> message, int sender) {
  if (message.size() < kMpiAnnouncementBytes) {
    return Status::internal(
        fmt::format("received a message of {} bytes, shorter than an announcement", message.size()));
  }
  const Result<FrameHeader> header = decode_header(message.first<kFrameHeaderBytes>());
  if (!header) return header.status();
  const FrameHeader& head = header.value();
  if (head.kind != FrameKind::kEager && head.kind != FrameKind::kBulk) {
    return Status::internal("received a frame that does not announce a transfer");
  }
  if (head.sender != static_cast<std::uint32_t>(sender)) {
    return Status::internal(fmt::format("received an announcement that says that rank {} sent it", head.sender));
  }
  std::uint32_t epoch = 0;
  MpiAnnouncement announcement;
  std::memcpy(&epoch, message.data() + kEpochAt, sizeof epoch);
  std::memcpy(&announcement.tag, message.data() + kTagAt, sizeof announcement.tag);
  std::memcpy(&announcement.piece_bytes, message.data() + kPieceAt, sizeof announcement.piece_bytes);
  announcement.life = mpi_life(epoch, head.generation);
  announcement.sender = sender;
  announcement.key = {head.process_set, head.channel, head.sequence};
  announcement.bytes = head.bytes;
  announcement.carries_payload = head.kind == FrameKind::kEager;
  HVD_RETURN_IF_ERROR(check(announcement, message.size() - kMpiAnnouncementBytes));
  return announcement;
}

}  // namespace hvd
