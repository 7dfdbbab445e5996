// What a rank holds of one peer on its host: the memory that the two share, and the descriptors that wake and watch
// the peer. Runs under the Turn.
#pragma once

#include <sys/socket.h>
#include <sys/types.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "common/unique_fd.h"
#include "ops/transport/byte_ring.h"
#include "ops/transport/shared_blocks.h"
#include "ops/transport/shm/shm_memory.h"

namespace hvd {

using ShmNonce = std::array<std::byte, 16>;

/// In front of the memory of each rank that all its peers map: that a rank sleeps is one store, however many peers it
/// has. The rank's block (ops/transport/shared_blocks.h) lies one page behind.
struct ShmPresence {
  alignas(64) std::atomic<std::uint64_t> sleeps{0};  ///< odd while the rank sleeps; a new number for each sleep
  alignas(64) std::atomic<std::uint64_t> rings{0};   ///< of its doorbell, counted once that is up
};
inline constexpr std::size_t kPresencePageBytes = 4096;
static_assert(sizeof(ShmPresence) <= kPresencePageBytes);
constexpr std::size_t presence_bytes(std::size_t slot_bytes) { return kPresencePageBytes + block_bytes(slot_bytes); }

inline std::span<std::byte> block_of(const SharedMapping& presence) {
  return presence.bytes().subspan(kPresencePageBytes);
}

/// The last page of a pair's memory. Before it lie the two rings, so that they can be on huge pages.
struct ShmPairControl {
  ByteRingControl to_higher;
  ByteRingControl to_lower;
  ShmNonce from_higher{};  ///< written by the one rank and looked up by the other, to see that they share this
  ShmNonce from_lower{};
  // The rank lets go of memory that it had offered.
  std::atomic<std::uint32_t> higher_closed{0};
  std::atomic<std::uint32_t> lower_closed{0};
};
inline constexpr std::size_t kPairControlBytes = 4096;
static_assert(sizeof(ShmPairControl) <= kPairControlBytes);

constexpr std::size_t pair_memory_bytes(std::size_t ring_bytes) { return 2 * ring_bytes + kPairControlBytes; }

/// As the pidfd of a process that has ended is.
bool is_readable(const UniqueFd& fd);

struct ShmPeer {
  ShmPeer(int peer_rank, UniqueFd peer_socket) : rank(peer_rank), socket(std::move(peer_socket)) {}
  ShmPeer(const ShmPeer&) = delete;
  ShmPeer& operator=(const ShmPeer&) = delete;
  /// The peer sees the end at once, even while a forked child still holds a copy of the socket. In that child the
  /// socket is not its own to end.
  ~ShmPeer() {
    if (socket && owner == ::getpid()) ::shutdown(socket.get(), SHUT_RDWR);
  }

  ShmPairControl& control() const { return *reinterpret_cast<ShmPairControl*>(pair.bytes().data() + 2 * ring_bytes); }
  std::span<std::byte> ring_to_higher() const { return pair.bytes().first(ring_bytes); }
  std::span<std::byte> ring_to_lower() const { return pair.bytes().subspan(ring_bytes, ring_bytes); }

  int rank;         ///< -1 until it has said so
  pid_t pid = 0;    ///< 0: in a PID namespace that is not visible from here
  UniqueFd socket;  ///< ends when the peer lets go of the transport, or ends itself
  UniqueFd
      process;  ///< pidfd, readable once the peer has ended, whoever holds copies of its socket; -1 before Linux 5.3
  UniqueFd doorbell;  ///< eventfd that wakes the peer
  SharedMapping presence;
  SharedMapping pair;
  std::size_t ring_bytes = 0;
  ShmNonce probe{};       ///< of this rank, which the peer tries to read here
  bool can_pull = false;  ///< each of the two may read the other's memory
  bool gone = false;      ///< it will write nothing more
  bool ended = false;     ///< gone, and so is its process
  pid_t owner = ::getpid();
};

}  // namespace hvd
