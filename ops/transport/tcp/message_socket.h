// Whole messages over one socket while ranks meet: each has its length in front. Never blocks, and never reads a byte
// beyond the message it is at, so the socket can be handed on afterwards.
// One owner; any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "ops/transport/tcp/socket.h"

namespace hvd {

class MessageSocket {
 public:
  /// `socket` is non-blocking and connected, or about to be. Longer messages than `most_bytes` are refused.
  explicit MessageSocket(UniqueFd socket, std::uint64_t most_bytes = std::uint64_t{1} << 30)
      : socket_(std::move(socket)), most_bytes_(most_bytes) {}

  int fd() const { return socket_.get(); }
  UniqueFd take_socket() { return std::move(socket_); }
  /// What to poll for.
  short wanted() const { return static_cast<short>(POLLIN | (flushed() ? 0 : POLLOUT)); }
  bool flushed() const { return written_ == out_.size(); }

  void queue(std::span<const std::byte> message);
  /// Writes and reads what can be without waiting. kInternal when the other side has gone or sends nonsense.
  Status advance();
  /// Only writes: for the last message before the socket is handed on, as the answer may come at once.
  Status write();
  /// A message that has come whole; `advance` then reads the next.
  std::optional<std::vector<std::byte>> take();

 private:
  Status read();

  UniqueFd socket_;
  std::uint64_t most_bytes_;
  std::vector<std::byte> out_;
  std::size_t written_ = 0;
  std::vector<std::byte> length_;
  std::vector<std::byte> in_;
  std::size_t in_bytes_ = 0;
  bool complete_ = false;
};

/// What both sides of a new connection say first.
struct TcpGreeting {
  enum class Purpose : std::uint16_t { kRendezvous = 1, kLink = 2 };

  Purpose purpose = Purpose::kLink;
  std::int32_t rank = -1;
  std::int32_t size = 0;
  std::uint32_t generation = 0;
  std::string token;  ///< of the job: who does not know it is a stranger
};

inline constexpr std::uint64_t kMaxGreetingBytes = 8192;

std::vector<std::byte> encode_tcp_greeting(const TcpGreeting& greeting);
/// Nothing when the bytes are no greeting of this version.
std::optional<TcpGreeting> decode_tcp_greeting(std::span<const std::byte> bytes);
/// True when `heard` comes from this job; takes the same time wherever the token differs.
bool belongs(const TcpGreeting& heard, const TcpGreeting& own);

}  // namespace hvd
