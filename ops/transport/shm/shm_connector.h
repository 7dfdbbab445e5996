// Brings ranks of one host together over shared memory: each listens at a socket with a random name, publishes it, and
// calls the ranks below it. What cannot be reached or does not share memory is simply not on this host.
// Used at init, by the thread that calls it.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ops/transport/shm/shm_handshake.h"
#include "ops/transport/stream_transport.h"

namespace hvd {

/// Of a ring, in a job of `ranks`: about what the cache of a core holds. In a smaller one each line that is written
/// still lies in the reader's cache and has to be taken from it, which costs more than all copies
/// (docs/performance.md). All rings of a rank together stay within 32 MiB as long as each has 128 KiB.
constexpr std::size_t ring_bytes_for(int ranks) {
  constexpr std::size_t smallest = std::size_t{128} << 10;
  constexpr std::size_t largest = std::size_t{1} << 20;
  constexpr std::size_t of_a_rank = std::size_t{32} << 20;
  return std::clamp(std::bit_floor(of_a_rank / (2 * static_cast<std::size_t>(std::max(ranks - 1, 1)))), smallest,
                    largest);
}

class ShmConnector {
 public:
  struct Shared {
    std::unique_ptr<StreamTransport> transport;
    std::vector<int> peers;  ///< ranks reached, ascending; each of them has reached this rank too
  };

  /// Opens the socket; rings have `ring_bytes`, or those of `ring_bytes_for`. kUnavailable when descriptors or memory
  /// have run out: then this rank shares with nobody.
  static Result<std::unique_ptr<ShmConnector>> create(int rank, int size, std::string job_token,
                                                      std::optional<std::size_t> ring_bytes = {});

  /// For the other ranks.
  std::vector<std::byte> address() const;

  /// Meets the ranks whose `addresses` (by rank; empty: takes no part) lie on this host. Once; blocks until all of them
  /// have answered, `deadline` at most. A rank that does not share is left out, on both sides.
  Shared connect(const std::vector<std::vector<std::byte>>& addresses, StreamTransport::Settings settings,
                 TimePoint deadline);

 private:
  ShmConnector(ShmSelf self, UniqueFd listener, std::string name);

  void invite(const std::vector<std::vector<std::byte>>& addresses);
  bool waiting() const;
  void accept_callers();
  void wait(TimePoint deadline);

  ShmSelf self_;
  UniqueFd listener_;
  std::string name_;
  std::vector<ShmHandshake> handshakes_;
};

}  // namespace hvd
