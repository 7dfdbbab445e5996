// Unix sockets in the abstract namespace: how ranks of one host find each other and hand over descriptors.
// Nothing here blocks. Any thread.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <horovod_cpp/status.h>

#include "common/unique_fd.h"

namespace hvd {

/// The process at the other end, by the kernel's word; `pid` is 0 when it is not visible from here.
struct ShmCredentials {
  pid_t pid = 0;
  uid_t uid = 0;
};

enum class ShmDial : std::uint8_t {
  kConnected,
  kBusy,    ///< somebody listens, but is behind with answering: try again
  kNobody,  ///< no such name in this network namespace, or no descriptor for the socket
};

enum class ShmSent : std::uint8_t {
  kYes,
  kLater,  ///< too much is under way: try again
  kNo,     ///< the other end is gone, or refuses
};

enum class ShmReceived : std::uint8_t { kPacket, kNothing, kClosed };

struct ShmPacket {
  std::vector<std::byte> bytes;
  std::vector<UniqueFd> descriptors;
};

/// Listens at `name`, without a file. `backlog`: connections that may wait to be accepted.
Result<UniqueFd> listen_at(const std::string& name, int backlog);
/// Opens `socket` to whoever listens at `name`.
ShmDial dial(const std::string& name, UniqueFd& socket);
/// The next connection, or none. kUnavailable when the process has no descriptor for it.
Result<UniqueFd> accept_from(int listener);

std::optional<ShmCredentials> credentials_of(int socket);

/// Sends one packet whole, with copies of `descriptors` (at most kMaxDescriptors).
ShmSent send_packet(int socket, std::span<const std::byte> bytes, std::span<const int> descriptors);
/// Takes one packet; one that is too long or lacks descriptors counts as kClosed.
ShmReceived receive_packet(int socket, ShmPacket& packet);

inline constexpr std::size_t kMaxDescriptors = 4;
inline constexpr std::size_t kMaxPacketBytes = 8192;

}  // namespace hvd
