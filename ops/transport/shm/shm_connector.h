// Brings ranks of one host together over shared memory: each listens at a socket with a random name, publishes it, and
// calls the ranks below it. What cannot be reached or does not share memory is simply not on this host.
// Used at init, by the thread that calls it.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "ops/transport/shm/shm_handshake.h"
#include "ops/transport/stream_transport.h"

namespace hvd {

class ShmConnector {
 public:
  struct Shared {
    std::unique_ptr<StreamTransport> transport;
    std::vector<int> peers;  ///< ranks reached, ascending; each of them has reached this rank too
  };

  /// Opens the socket. kUnavailable when descriptors or memory have run out: then this rank shares with nobody.
  static Result<std::unique_ptr<ShmConnector>> create(int rank, int size, std::string job_token,
                                                      std::size_t ring_bytes = std::size_t{256} << 10);

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
