#include "ops/transport/shm/shm_socket.h"

#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>

#include "common/check.h"

namespace hvd {
namespace {

constexpr int kSocketType = SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK;  // keeps packets whole

struct AbstractAddress {
  explicit AbstractAddress(const std::string& name) {
    HVD_CHECK(name.size() < sizeof place.sun_path);
    place.sun_family = AF_UNIX;
    std::memcpy(place.sun_path + 1, name.data(), name.size());  // the zero byte in front makes it abstract
    length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&place); }

  sockaddr_un place{};
  socklen_t length = 0;
};

union ControlBuffer {
  cmsghdr aligned;
  char bytes[CMSG_SPACE(kMaxDescriptors * sizeof(int))];
};

void take_descriptors(msghdr& message, std::vector<UniqueFd>& descriptors) {
  for (cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr; part = CMSG_NXTHDR(&message, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
      descriptors.emplace_back(fd);
    }
  }
}

}  // namespace

Result<UniqueFd> listen_at(const std::string& name, int backlog) {
  UniqueFd socket(::socket(AF_UNIX, kSocketType, 0));
  const AbstractAddress address(name);
  if (!socket || ::bind(socket.get(), address.get(), address.length) != 0 || ::listen(socket.get(), backlog) != 0) {
    return Status::unavailable(fmt::format("no Unix socket to listen on: {}", std::strerror(errno)));
  }
  return socket;
}

ShmDial dial(const std::string& name, UniqueFd& socket) {
  if (!socket) socket = UniqueFd(::socket(AF_UNIX, kSocketType, 0));
  const AbstractAddress address(name);
  if (socket && ::connect(socket.get(), address.get(), address.length) == 0) return ShmDial::kConnected;
  return socket && (errno == EAGAIN || errno == EINTR) ? ShmDial::kBusy : ShmDial::kNobody;
}

Result<UniqueFd> accept_from(int listener) {
  UniqueFd socket(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (socket || errno == EAGAIN || errno == EINTR || errno == ECONNABORTED) return socket;
  return Status::unavailable(fmt::format("accepting a connection failed: {}", std::strerror(errno)));
}

std::optional<ShmCredentials> credentials_of(int socket) {
  ucred credentials{};
  socklen_t length = sizeof credentials;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) return std::nullopt;
  return ShmCredentials{credentials.pid, credentials.uid};
}

ShmSent send_packet(int socket, std::span<const std::byte> bytes, std::span<const int> descriptors) {
  HVD_CHECK(bytes.size() <= kMaxPacketBytes && descriptors.size() <= kMaxDescriptors);
  iovec piece{const_cast<std::byte*>(bytes.data()), bytes.size()};
  ControlBuffer control{};
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  if (!descriptors.empty()) {
    message.msg_control = control.bytes;
    message.msg_controllen = CMSG_SPACE(descriptors.size_bytes());
    cmsghdr* part = CMSG_FIRSTHDR(&message);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(descriptors.size_bytes());
    std::memcpy(CMSG_DATA(part), descriptors.data(), descriptors.size_bytes());
  }
  if (::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0) return ShmSent::kYes;
  // ETOOMANYREFS: a user may have as many descriptors under way as one process may have open; many ranks that start
  // at once come to that limit, and below it again as the others take theirs in.
  const bool later = errno == EAGAIN || errno == EINTR || errno == ENOBUFS || errno == ETOOMANYREFS;
  return later ? ShmSent::kLater : ShmSent::kNo;
}

ShmReceived receive_packet(int socket, ShmPacket& packet) {
  packet.bytes.resize(kMaxPacketBytes);
  packet.descriptors.clear();
  iovec piece{packet.bytes.data(), packet.bytes.size()};
  ControlBuffer control{};
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  message.msg_control = control.bytes;
  message.msg_controllen = sizeof control;
  const ssize_t got = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got < 0) return errno == EAGAIN || errno == EINTR ? ShmReceived::kNothing : ShmReceived::kClosed;
  take_descriptors(message, packet.descriptors);
  packet.bytes.resize(static_cast<std::size_t>(got));
  const bool whole = (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) == 0;
  return got > 0 && whole ? ShmReceived::kPacket : ShmReceived::kClosed;
}

}  // namespace hvd
