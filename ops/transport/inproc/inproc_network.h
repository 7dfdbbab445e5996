// Many ranks inside one process: links are rings of ordinary memory, and a sleeper is woken through its poller.
// Each rank's transport runs under that rank's Turn; the network itself may be used from any thread.
#pragma once

#include <memory>
#include <vector>

#include "common/loop/poller.h"
#include "ops/transport/stream_transport.h"

namespace hvd {

class InprocNetwork {
 public:
  /// With `pulls`, large transfers are read straight from the memory of their sender. Blocks have slots of
  /// `slot_bytes`.
  explicit InprocNetwork(int size, std::size_t ring_bytes = std::size_t{256} << 10, bool pulls = false,
                         std::size_t slot_bytes = std::size_t{64} << 10);
  ~InprocNetwork();

  std::size_t slot_bytes() const { return slot_bytes_; }
  int size() const { return static_cast<int>(ranks_.size()); }

  /// The transport of one rank to all others. Destroying it looks to the others like the death of its process,
  /// unless it has said goodbye. `poller` is woken by peers while the transport lives.
  std::unique_ptr<StreamTransport> connect(int rank, Poller& poller, StreamTransport::Settings settings);

 private:
  friend class InprocLink;
  friend class InprocWakeup;
  struct Rank;
  struct Ring;
  struct Memory;

  std::size_t ring_bytes_;
  bool pulls_;
  std::size_t slot_bytes_;
  std::vector<std::shared_ptr<Rank>> ranks_;
  std::vector<std::shared_ptr<Ring>> rings_;
  std::shared_ptr<Memory> blocks_;  // of all ranks
};

}  // namespace hvd
