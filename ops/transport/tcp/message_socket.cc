#include "ops/transport/tcp/message_socket.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace hvd {
namespace {

constexpr std::uint32_t kMagic = 0x54445648;  // "HVDT"
constexpr std::uint16_t kVersion = 1;
constexpr std::size_t kLengthBytes = sizeof(std::uint64_t);

bool is_for_later(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR || error == ENOTCONN; }

bool same_text(std::string_view a, std::string_view b) {
  volatile std::size_t difference = a.size() ^ b.size();  // volatile: the loop must not end early
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    difference = difference | static_cast<std::size_t>(static_cast<unsigned char>(a[i] ^ b[i]));
  }
  return difference == 0;
}

}  // namespace

void MessageSocket::queue(std::span<const std::byte> message) {
  const std::uint64_t length = message.size();
  const std::size_t place = out_.size();
  out_.resize(place + kLengthBytes + message.size());
  std::memcpy(out_.data() + place, &length, kLengthBytes);
  if (!message.empty()) std::memcpy(out_.data() + place + kLengthBytes, message.data(), message.size());
}

Status MessageSocket::advance() {
  HVD_RETURN_IF_ERROR(write());
  return read();
}

Status MessageSocket::write() {
  while (!flushed()) {
    const ssize_t count = ::send(fd(), out_.data() + written_, out_.size() - written_, MSG_NOSIGNAL);
    if (count < 0 && is_for_later(errno)) return {};
    if (count < 0) return errno_status("send");
    written_ += static_cast<std::size_t>(count);
  }
  out_.clear();
  written_ = 0;
  return {};
}

Status MessageSocket::read() {
  while (!complete_) {
    std::vector<std::byte>& part = length_.size() < kLengthBytes ? length_ : in_;
    const std::size_t have = &part == &length_ ? length_.size() : in_bytes_;
    const std::size_t wanted = (&part == &length_ ? kLengthBytes : in_.size()) - have;
    std::byte piece[kLengthBytes];
    std::byte* place = &part == &length_ ? piece : in_.data() + in_bytes_;
    const ssize_t count = wanted == 0 ? 0 : ::recv(fd(), place, wanted, 0);
    if (count < 0 && is_for_later(errno)) return {};
    if (count < 0) return errno_status("recv");
    if (count == 0 && wanted > 0) return Status::internal("it closed the connection");
    if (&part == &length_) {
      length_.insert(length_.end(), piece, piece + count);
      if (length_.size() < kLengthBytes) continue;
      std::uint64_t length = 0;
      std::memcpy(&length, length_.data(), kLengthBytes);
      if (length > most_bytes_) return Status::internal(fmt::format("it sent a message of {} bytes", length));
      in_.resize(static_cast<std::size_t>(length));
      in_bytes_ = 0;
    } else {
      in_bytes_ += static_cast<std::size_t>(count);
    }
    if (length_.size() == kLengthBytes && in_bytes_ == in_.size()) complete_ = true;
  }
  return {};
}

std::optional<std::vector<std::byte>> MessageSocket::take() {
  if (!complete_) return std::nullopt;
  complete_ = false;
  length_.clear();
  return std::exchange(in_, {});
}

std::vector<std::byte> encode_tcp_greeting(const TcpGreeting& greeting) {
  WireWriter out;
  out.fixed(kMagic);
  out.fixed(kVersion);
  out.fixed(greeting.purpose);
  out.fixed(greeting.rank);
  out.fixed(greeting.size);
  out.fixed(greeting.generation);
  out.text(greeting.token);
  return out.take();
}

std::optional<TcpGreeting> decode_tcp_greeting(std::span<const std::byte> bytes) {
  WireReader in(bytes);
  const bool ours = in.fixed<std::uint32_t>() == kMagic && in.fixed<std::uint16_t>() == kVersion;
  TcpGreeting greeting;
  greeting.purpose = in.fixed<TcpGreeting::Purpose>();
  greeting.rank = in.fixed<std::int32_t>();
  greeting.size = in.fixed<std::int32_t>();
  greeting.generation = in.fixed<std::uint32_t>();
  greeting.token = in.text();
  if (!ours || !in.ok() || !in.at_end()) return std::nullopt;
  return greeting;
}

bool belongs(const TcpGreeting& heard, const TcpGreeting& own) {
  const bool right_token = same_text(heard.token, own.token);
  return right_token && heard.purpose == own.purpose && heard.size == own.size && heard.generation == own.generation &&
         heard.rank >= 0 && heard.rank < own.size && heard.rank != own.rank;
}

}  // namespace hvd
