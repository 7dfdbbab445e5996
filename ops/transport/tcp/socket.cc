#include "ops/transport/tcp/socket.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>

namespace hvd {
namespace {

constexpr int kBacklog = 4096;  // the kernel lowers it to net.core.somaxconn
constexpr int kKeepaliveIdleSeconds = 2;
constexpr int kKeepaliveIntervalSeconds = 1;
constexpr int kKeepaliveCount = 3;
constexpr unsigned kUserTimeoutMilliseconds = 4000;  // keepalive rests while data is unacknowledged; this does not

template <typename T>
Status set_option(int fd, int level, int option, T value, const char* what) {
  if (::setsockopt(fd, level, option, &value, sizeof value) != 0) return errno_status(what);
  return {};
}

sockaddr_in& as_v4(sockaddr_storage& storage) { return reinterpret_cast<sockaddr_in&>(storage); }
sockaddr_in6& as_v6(sockaddr_storage& storage) { return reinterpret_cast<sockaddr_in6&>(storage); }
const sockaddr_in& as_v4(const sockaddr_storage& storage) { return reinterpret_cast<const sockaddr_in&>(storage); }
const sockaddr_in6& as_v6(const sockaddr_storage& storage) { return reinterpret_cast<const sockaddr_in6&>(storage); }

SocketAddress any_address(int family) {
  sockaddr_storage storage{};
  storage.ss_family = static_cast<sa_family_t>(family);
  return {reinterpret_cast<const sockaddr*>(&storage), sizeof storage};
}

}  // namespace

Status errno_status(std::string_view what) {
  return Status::internal(fmt::format("{} failed: {}", what, std::strerror(errno)));
}

// ---- addresses ------------------------------------------------------------------------------------------------------

SocketAddress::SocketAddress(const sockaddr* address, socklen_t bytes) {
  std::memcpy(&storage_, address, std::min<std::size_t>(bytes, sizeof storage_));
}

Result<std::vector<SocketAddress>> SocketAddress::resolve(const std::string& host, std::uint16_t port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (const int error = ::getaddrinfo(host.c_str(), nullptr, &hints, &found); error != 0) {
    return Status::unavailable(fmt::format("the host name '{}' cannot be resolved: {}", host, ::gai_strerror(error)));
  }
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owner(found, ::freeaddrinfo);
  std::vector<SocketAddress> addresses;
  for (const addrinfo* each = found; each != nullptr; each = each->ai_next) {
    if (each->ai_family != AF_INET && each->ai_family != AF_INET6) continue;
    addresses.emplace_back(each->ai_addr, each->ai_addrlen);
    addresses.back().set_port(port);
  }
  return addresses;
}

std::uint16_t SocketAddress::port() const {
  return ntohs(family() == AF_INET6 ? as_v6(storage_).sin6_port : as_v4(storage_).sin_port);
}

void SocketAddress::set_port(std::uint16_t port) {
  (family() == AF_INET6 ? as_v6(storage_).sin6_port : as_v4(storage_).sin_port) = htons(port);
}

bool SocketAddress::is_loopback() const {
  if (family() == AF_INET6) return IN6_IS_ADDR_LOOPBACK(&as_v6(storage_).sin6_addr);
  return ntohl(as_v4(storage_).sin_addr.s_addr) >> 24 == 127;
}

bool SocketAddress::is_link_local() const {
  return family() == AF_INET6 && IN6_IS_ADDR_LINKLOCAL(&as_v6(storage_).sin6_addr);
}

socklen_t SocketAddress::bytes() const { return family() == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in); }

std::string SocketAddress::text() const {
  std::array<char, INET6_ADDRSTRLEN> host{};
  if (family() == AF_INET6) {
    ::inet_ntop(AF_INET6, &as_v6(storage_).sin6_addr, host.data(), host.size());
    return fmt::format("[{}]:{}", host.data(), port());
  }
  ::inet_ntop(AF_INET, &as_v4(storage_).sin_addr, host.data(), host.size());
  return fmt::format("{}:{}", host.data(), port());
}

void SocketAddress::write_to(WireWriter& writer) const {
  writer.fixed(static_cast<std::uint8_t>(family() == AF_INET6 ? 6 : 4));
  writer.fixed(port());
  if (family() == AF_INET6) {
    for (const std::uint8_t byte : as_v6(storage_).sin6_addr.s6_addr) writer.fixed(byte);
  } else {
    writer.fixed(as_v4(storage_).sin_addr.s_addr);
  }
}

Result<SocketAddress> SocketAddress::read_from(WireReader& reader) {
  const auto version = reader.fixed<std::uint8_t>();
  const auto port = reader.fixed<std::uint16_t>();
  SocketAddress address = any_address(version == 6 ? AF_INET6 : AF_INET);
  if (version == 6) {
    for (std::uint8_t& byte : as_v6(address.storage_).sin6_addr.s6_addr) byte = reader.fixed<std::uint8_t>();
  } else {
    as_v4(address.storage_).sin_addr.s_addr = reader.fixed<in_addr_t>();
  }
  address.set_port(port);
  if (!reader.ok() || (version != 4 && version != 6)) return Status::internal("received bytes that are no address");
  return address;
}

// ---- sockets --------------------------------------------------------------------------------------------------------

Result<UniqueFd> make_socket(int family) {
  UniqueFd fd(::socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd) return errno_status("socket");
  return fd;
}

Status adopt_socket(int fd) {
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0 || ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) return errno_status("fcntl(O_NONBLOCK)");
  if (::fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) return errno_status("fcntl(FD_CLOEXEC)");
  return {};
}

Status tune_connection(int fd) {
  HVD_RETURN_IF_ERROR(set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1, "setsockopt(TCP_NODELAY)"));
  HVD_RETURN_IF_ERROR(set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1, "setsockopt(SO_KEEPALIVE)"));
  HVD_RETURN_IF_ERROR(set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, kKeepaliveIdleSeconds, "setsockopt(TCP_KEEPIDLE)"));
  HVD_RETURN_IF_ERROR(
      set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, kKeepaliveIntervalSeconds, "setsockopt(TCP_KEEPINTVL)"));
  HVD_RETURN_IF_ERROR(set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, kKeepaliveCount, "setsockopt(TCP_KEEPCNT)"));
  return set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, kUserTimeoutMilliseconds, "setsockopt(TCP_USER_TIMEOUT)");
}

Result<UniqueFd> listen_on(const SocketAddress& address) {
  Result<UniqueFd> fd = make_socket(address.family());
  if (!fd) return fd;
  HVD_RETURN_IF_ERROR(set_option(fd->get(), SOL_SOCKET, SO_REUSEADDR, 1, "setsockopt(SO_REUSEADDR)"));
  if (address.family() == AF_INET6) {
    HVD_RETURN_IF_ERROR(set_option(fd->get(), IPPROTO_IPV6, IPV6_V6ONLY, 0, "setsockopt(IPV6_V6ONLY)"));
  }
  // A port that another socket has bound and not yet made listen is refused by listen, not by bind.
  if (::bind(fd->get(), address.data(), address.bytes()) != 0 || ::listen(fd->get(), kBacklog) != 0) {
    return Status::unavailable(fmt::format("cannot listen on {}: {}", address.text(), std::strerror(errno)));
  }
  return fd;
}

Result<UniqueFd> listen_everywhere() {
  Result<UniqueFd> both = listen_on(any_address(AF_INET6));
  if (both) return both;
  return listen_on(any_address(AF_INET));  // no IPv6 on this host
}

Result<SocketAddress> local_address(int fd) {
  sockaddr_storage storage{};
  socklen_t bytes = sizeof storage;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&storage), &bytes) != 0) return errno_status("getsockname");
  return SocketAddress(reinterpret_cast<const sockaddr*>(&storage), bytes);
}

std::string peer_text(int fd) {
  sockaddr_storage storage{};
  socklen_t bytes = sizeof storage;
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&storage), &bytes) != 0) return {};
  return SocketAddress(reinterpret_cast<const sockaddr*>(&storage), bytes).text();
}

int take_socket_error(int fd) {
  int error = 0;
  socklen_t bytes = sizeof error;
  if (::getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &bytes) != 0) return errno;
  return error;
}

Result<std::vector<SocketAddress>> interface_addresses(const std::vector<std::string>& interfaces) {
  ifaddrs* all = nullptr;
  if (::getifaddrs(&all) != 0) return errno_status("getifaddrs");
  const std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> owner(all, ::freeifaddrs);
  std::vector<SocketAddress> found;
  for (const ifaddrs* each = all; each != nullptr; each = each->ifa_next) {
    if (each->ifa_addr == nullptr || (each->ifa_flags & IFF_UP) == 0) continue;
    const int family = each->ifa_addr->sa_family;
    if (family != AF_INET && family != AF_INET6) continue;
    const bool named = std::find(interfaces.begin(), interfaces.end(), each->ifa_name) != interfaces.end();
    if (!interfaces.empty() && !named) continue;
    const SocketAddress address(each->ifa_addr, family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6));
    if (!address.is_link_local()) found.push_back(address);  // one of those needs a scope that peers do not share
  }
  std::stable_partition(found.begin(), found.end(), [](const SocketAddress& a) { return !a.is_loopback(); });
  return found;
}

// ---- waiting --------------------------------------------------------------------------------------------------------

std::size_t PollSet::add(int fd, short events) {
  fds_.push_back({fd, events, 0});
  return fds_.size() - 1;
}

void PollSet::wait(TimePoint until) {
  const TimePoint now = SteadyClock().now();
  timespec timeout{0, 0};
  if (until > now) {
    const auto left = std::min<Duration>(until - now, std::chrono::minutes(1));
    timeout.tv_sec = static_cast<time_t>(std::chrono::duration_cast<std::chrono::seconds>(left).count());
    timeout.tv_nsec = static_cast<long>((left % std::chrono::seconds(1)).count());
  }
  // An interrupted wait reports nothing: the caller looks at the time and comes back.
  if (::ppoll(fds_.data(), fds_.size(), &timeout, nullptr) < 0) {
    for (pollfd& each : fds_) each.revents = 0;
  }
}

}  // namespace hvd
