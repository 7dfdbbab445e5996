#include "ops/transport/frame.h"

#include <fmt/format.h>
#include <zlib.h>

#include <algorithm>
#include <cstring>

namespace hvd {
namespace {

constexpr std::uint32_t kMagic = 0x31445648;  // "HVD1"
constexpr std::uint16_t kVersion = 2;
constexpr std::size_t kCheckedBytes = 40;  // what the header checksum covers

// Little-endian memory order on every machine that the project supports.
class Cursor {
 public:
  explicit Cursor(std::byte* place) : place_(place) {}
  template <typename T>
  void put(T value) {
    std::memcpy(place_, &value, sizeof value);
    place_ += sizeof value;
  }

 private:
  std::byte* place_;
};

class ConstCursor {
 public:
  explicit ConstCursor(const std::byte* place) : place_(place) {}
  template <typename T>
  void get(T& value) {
    std::memcpy(&value, place_, sizeof value);
    place_ += sizeof value;
  }

 private:
  const std::byte* place_;
};

}  // namespace

std::uint32_t checksum(std::span<const std::byte> bytes) {
  uLong crc = ::crc32(0, nullptr, 0);
  while (!bytes.empty()) {
    const std::size_t piece = std::min<std::size_t>(bytes.size(), 1u << 30);
    crc = ::crc32(crc, reinterpret_cast<const Bytef*>(bytes.data()), static_cast<uInt>(piece));
    bytes = bytes.subspan(piece);
  }
  return static_cast<std::uint32_t>(crc);
}

EncodedHeader encode(FrameHeader header) {
  EncodedHeader bytes{};
  Cursor cursor(bytes.data());
  cursor.put(kMagic);
  cursor.put(header.generation);
  cursor.put(kVersion);
  cursor.put(header.kind);
  cursor.put(header.process_set);
  cursor.put(header.channel);
  cursor.put(header.sender);
  cursor.put(header.sequence);
  cursor.put(header.bytes);
  cursor.put(header.payload_crc);
  cursor.put(std::uint32_t{0});
  cursor.put(checksum(std::span(bytes).first(kCheckedBytes)));
  return bytes;
}

Result<FrameHeader> decode_header(std::span<const std::byte, kFrameHeaderBytes> bytes) {
  FrameHeader header;
  std::uint32_t reserved = 0;
  std::uint32_t header_crc = 0;
  ConstCursor cursor(bytes.data());
  cursor.get(header.magic);
  cursor.get(header.generation);
  cursor.get(header.version);
  cursor.get(header.kind);
  cursor.get(header.process_set);
  cursor.get(header.channel);
  cursor.get(header.sender);
  cursor.get(header.sequence);
  cursor.get(header.bytes);
  cursor.get(header.payload_crc);
  cursor.get(reserved);
  cursor.get(header_crc);
  if (header.magic != kMagic) return Status::internal("received bytes that are no frame (wrong magic number)");
  if (header.version != kVersion) {
    return Status::internal(
        fmt::format("received a frame of version {}, this is version {}", header.version, kVersion));
  }
  if (header_crc != checksum(bytes.first(kCheckedBytes))) {
    return Status::internal("received a frame header with a wrong checksum");
  }
  const auto kind = static_cast<std::uint16_t>(header.kind);
  if (kind < static_cast<std::uint16_t>(FrameKind::kControl) ||
      kind > static_cast<std::uint16_t>(FrameKind::kGoodbye)) {
    return Status::internal(fmt::format("received a frame of unknown kind {}", kind));
  }
  if (header.kind == FrameKind::kControl && header.bytes > kMaxControlBytes) {
    return Status::internal(
        fmt::format("received a control message of {} bytes; the limit is {}", header.bytes, kMaxControlBytes));
  }
  return header;
}

}  // namespace hvd
