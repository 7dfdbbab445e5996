// The message that goes before every transfer: which transfer it is, how long, and where its bytes are to be found.
// A small transfer travels inside it. Pure functions; any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include <horovod_cpp/status.h>

#include "ops/transport/frame.h"
#include "ops/transport/mpi/mpi_limits.h"
#include "ops/transport/transfer.h"

namespace hvd {

/// Numbers the transports of a process in the order of their making, alike on all ranks: the epoch of the last
/// allgather above the generation. What belongs to an older life is thrown away.
using MpiLife = std::uint64_t;
constexpr MpiLife mpi_life(std::uint32_t epoch, std::uint32_t generation) {
  return (MpiLife{epoch} << 32) | generation;
}

struct MpiAnnouncement {
  MpiLife life = 0;
  int sender = 0;  ///< global rank
  TransferKey key;
  std::uint64_t bytes = 0;        ///< of the transfer
  bool carries_payload = false;   ///< the bytes follow in this message; otherwise:
  int tag = 0;                    ///< the tag of its messages, which no other transfer has
  std::uint64_t piece_bytes = 0;  ///< length of each of them but the last
};

using EncodedAnnouncement = std::array<std::byte, kMpiAnnouncementBytes>;

EncodedAnnouncement encode(const MpiAnnouncement& announcement);

/// Reads what `sender` (as MPI says) sent. kInternal, with what is wrong, when it is no announcement or its numbers
/// cannot be: a payload that is not there, a tag or piece out of range.
Result<MpiAnnouncement> decode_announcement(std::span<const std::byte> message, int sender);

}  // namespace hvd
