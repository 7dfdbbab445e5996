// How transfers are cut into MPI messages, and which tags these have. Values; any thread.
#pragma once

#include <cstddef>

namespace hvd {

/// Bytes of an announcement before its payload (mpi_announcement.h).
inline constexpr std::size_t kMpiAnnouncementBytes = 64;
/// An announcement with its payload; within the eager limit of MPI libraries (4 KiB in Open MPI's shared memory).
inline constexpr std::size_t kMpiMailBytes = 4032;

/// Tags on our communicator. Each transfer in flight has a tag of its own from kMpiFirstTransferTag on.
inline constexpr int kMpiBootstrapTag = 0;
inline constexpr int kMpiMailTag = 1;
inline constexpr int kMpiFirstTransferTag = 2;

/// What a sender does; receivers learn it from the sender, so ranks may differ.
struct MpiLimits {
  /// A larger transfer goes as several messages. MPI counts are int: at most 2^31-1.
  std::size_t piece_bytes = std::size_t{1} << 30;
  /// Up to here a transfer travels with its announcement: one message. At most kMpiMailBytes - kMpiAnnouncementBytes.
  std::size_t inline_bytes = kMpiMailBytes - kMpiAnnouncementBytes;
};

}  // namespace hvd
