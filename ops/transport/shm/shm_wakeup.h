// How a rank is woken by its peers on the same host, and learns that one of them has ended.
// Runs under the Turn.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "common/clock.h"
#include "common/unique_fd.h"
#include "ops/transport/link.h"
#include "ops/transport/shm/shm_memory.h"
#include "ops/transport/shm/shm_peer.h"

namespace hvd {

class ShmWakeup final : public Wakeup {
 public:
  /// kUnavailable when descriptors or memory have run out.
  static Result<std::unique_ptr<ShmWakeup>> create(std::size_t slot_bytes);

  /// The descriptors that every peer gets.
  int doorbell() const { return doorbell_.get(); }
  int presence_file() const { return presence_file_.get(); }
  std::size_t presence_bytes() const { return presence_.bytes().size(); }
  /// Of this rank, for its peers to read.
  std::span<std::byte> block() const { return block_of(presence_); }
  /// After all peers were given their copy.
  void close_presence_file() { presence_file_.reset(); }

  /// Watches the descriptors of `peer`, until `unwatch` or until they have said that it is gone.
  Status watch(ShmPeer& peer);
  void unwatch(const ShmPeer& peer);
  /// Keeps a watched peer for as long as this lives.
  const ShmPeer& keep(std::unique_ptr<ShmPeer> peer);

  int fd() const override { return epoll_.get(); }
  void set_sleeping(bool sleeping) override;
  /// Free while the rank is awake, but for one look a millisecond.
  void refresh() override;

 private:
  ShmWakeup(UniqueFd epoll, UniqueFd doorbell, UniqueFd presence_file, SharedMapping presence);
  void look();
  void take_leave(ShmPeer& peer, bool ended);

  UniqueFd epoll_;  // the doorbell and the descriptors of all peers that are there
  UniqueFd doorbell_;
  UniqueFd presence_file_;
  SharedMapping presence_;
  ShmPresence& shown_;
  std::uint64_t sleep_ = 0;  // what is in shown_.sleeps
  std::uint64_t rings_answered_ = 0;
  bool must_look_ = false;
  int calls_until_clock_ = 0;
  TimePoint next_look_{};
  std::vector<std::unique_ptr<ShmPeer>> peers_;
};

}  // namespace hvd
