// Sockets as this library wants them (non-blocking, not inherited by exec, quick to notice a dead peer), addresses,
// and the poll() in which a start-up waits for many of them.
// Values and free functions; any thread.
#pragma once

#include <poll.h>
#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <vector>

#include <horovod_cpp/status.h>

#include "common/clock.h"
#include "common/unique_fd.h"
#include "common/wire.h"

namespace hvd {

/// "what failed: errno text", from errno.
Status errno_status(std::string_view what);

/// An IPv4 or IPv6 address with a port.
class SocketAddress {
 public:
  SocketAddress() = default;
  SocketAddress(const sockaddr* address, socklen_t bytes);

  /// Looks a host name or numeric address up; may block as long as the resolver does.
  static Result<std::vector<SocketAddress>> resolve(const std::string& host, std::uint16_t port);

  int family() const { return storage_.ss_family; }
  std::uint16_t port() const;
  void set_port(std::uint16_t port);
  bool is_loopback() const;
  bool is_link_local() const;

  const sockaddr* data() const { return reinterpret_cast<const sockaddr*>(&storage_); }
  socklen_t bytes() const;

  /// "192.0.2.1:80" or "[2001:db8::1]:80".
  std::string text() const;
  void write_to(WireWriter& writer) const;
  static Result<SocketAddress> read_from(WireReader& reader);

 private:
  sockaddr_storage storage_{};
};

Result<UniqueFd> make_socket(int family);
/// Prepares a socket of the caller (accepted or inherited) as `make_socket` does: non-blocking, closed by exec.
Status adopt_socket(int fd);
/// No Nagle delay; a silent peer is given up after about 5 s idle and 4 s of unacknowledged data.
Status tune_connection(int fd);
/// Listens on `address`; port 0 takes a free one. kUnavailable when the address is taken or not of this host.
Result<UniqueFd> listen_on(const SocketAddress& address);
/// Listens on a free port of all addresses of this host, IPv6 too where there is one.
Result<UniqueFd> listen_everywhere();
Result<SocketAddress> local_address(int fd);
/// Empty text when the socket is not connected.
std::string peer_text(int fd);
/// The pending error of a socket, 0 if none.
int take_socket_error(int fd);

/// Addresses of the interfaces that are up, with port 0, loopback ones last; those named only, unless none is.
Result<std::vector<SocketAddress>> interface_addresses(const std::vector<std::string>& interfaces);

/// The descriptors that one poll() waits for; made anew for each wait.
class PollSet {
 public:
  /// Returns where to look for the outcome.
  std::size_t add(int fd, short events);
  /// Waits until a descriptor is ready or `until` has come.
  void wait(TimePoint until);
  /// What happened to the descriptor; 0 if nothing.
  short ready(std::size_t slot) const { return fds_[slot].revents; }

 private:
  std::vector<pollfd> fds_;
};

}  // namespace hvd
