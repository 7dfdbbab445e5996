// The header before everything that travels on a byte stream between two ranks. Pure functions; any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include <horovod_cpp/status.h>

namespace hvd {

enum class FrameKind : std::uint16_t {
  kControl = 1,    ///< a control message, checksummed
  kEager = 2,      ///< a small transfer, sent before it is asked for
  kCredit = 3,     ///< "my receive is posted, of which `bytes` are still to come": no payload
  kBulk = 4,       ///< a transfer that had its credit
  kOffer = 5,      ///< "`bytes` lie in my memory for you to pull": the payload is their address
  kTaken = 6,      ///< "your offer is used up": no payload
  kWithdrawn = 7,  ///< "of my offer nothing more is wanted": no payload, answered by kTaken
  kGoodbye = 8,    ///< the last frame
};

struct FrameHeader {
  std::uint32_t magic = 0;
  std::uint32_t generation = 0;  ///< of the membership
  std::uint16_t version = 0;
  FrameKind kind = FrameKind::kControl;
  std::uint16_t process_set = 0;
  std::uint16_t channel = 0;
  std::uint32_t sender = 0;  ///< global rank
  std::uint32_t sequence = 0;
  std::uint64_t bytes = 0;        ///< of the payload; of the transfer for a credit or an offer
  std::uint32_t payload_crc = 0;  ///< control messages; 0 otherwise
};

inline constexpr std::size_t kFrameHeaderBytes = 48;
/// Frames start at multiples of this on their stream, so that payloads are aligned in ring memory.
inline constexpr std::size_t kFrameAlignment = 64;
inline constexpr std::uint64_t kMaxControlBytes = std::uint64_t{256} << 20;

using EncodedHeader = std::array<std::byte, kFrameHeaderBytes>;

/// Fills magic, version and header checksum.
EncodedHeader encode(FrameHeader header);
/// kInternal when the bytes are not a header of this version or its checksum is wrong.
Result<FrameHeader> decode_header(std::span<const std::byte, kFrameHeaderBytes> bytes);

std::uint32_t checksum(std::span<const std::byte> bytes);

/// Zero bytes that follow a payload of `bytes`.
constexpr std::size_t padding_after(std::uint64_t bytes) {
  return static_cast<std::size_t>((kFrameAlignment - (kFrameHeaderBytes + bytes) % kFrameAlignment) % kFrameAlignment);
}

/// Payload bytes that follow the header itself.
constexpr std::uint64_t payload_bytes(const FrameHeader& header) {
  switch (header.kind) {
    case FrameKind::kControl:
    case FrameKind::kEager:
    case FrameKind::kBulk:
      return header.bytes;
    case FrameKind::kOffer:
      return sizeof(std::uint64_t);
    case FrameKind::kCredit:
    case FrameKind::kTaken:
    case FrameKind::kWithdrawn:
    case FrameKind::kGoodbye:
      return 0;
  }
  return 0;
}

}  // namespace hvd
