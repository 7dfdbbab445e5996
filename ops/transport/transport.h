// Moves bytes between this rank and its peers: small control messages that wake their receiver, and transfers of
// bulk data. Knows ranks, bytes and channels; nothing of tensors, operations or negotiation.
// Everything runs under the Turn of the rank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include <horovod_cpp/status.h>

#include "common/clock.h"
#include "common/counter.h"
#include "common/fault.h"
#include "ops/transport/shared_blocks.h"
#include "ops/transport/transfer.h"

namespace hvd {

/// What a transport tells its owner, from inside `progress`.
class TransportEvents {
 public:
  virtual ~TransportEvents() = default;
  /// A control message, in the order in which `peer` posted it. `message` is valid during the call.
  virtual void on_control(int peer, std::span<const std::byte> message) = 0;
  /// The peer is gone without a farewell (`status` says how it showed), told once.
  virtual void on_peer_lost(int peer, const Status& status) = 0;
  /// The peer has said goodbye: it will send nothing more.
  virtual void on_goodbye(int peer) = 0;
};

struct TransportStatistics {
  Counter control_messages_sent;
  Counter control_bytes_sent;
  Counter data_bytes_sent;
  Counter data_bytes_pulled;  ///< read from the memory of peers; a part of what these have sent
};

class Transport {
 public:
  virtual ~Transport() = default;

  virtual std::string_view name() const = 0;

  /// Both must be set before the first other call and outlive the transport; `fault` may be nullptr.
  void set_events(TransportEvents& events) { events_ = &events; }
  void set_fault_hook(FaultHook* fault) { fault_ = fault; }

  /// Queues a control message; it reaches the peer in order, and wakes it. Never blocks, never fails: a peer that
  /// is lost is told through `on_peer_lost`.
  void post(int peer, std::vector<std::byte> message);

  /// Starts a transfer; it ends through `Transfer::complete`. The receive has exactly the bytes of the send.
  /// Sends and receives of one key pair up however far apart they start. The memory is the transport's until the
  /// transfer has ended *and* `keep_alive` was let go.
  void start(const TransferRef& transfer);

  /// Memory that peers read in place; nullptr where this transport has none.
  virtual SharedBlocks* blocks() { return nullptr; }
  /// Shows what this rank has put into its block, `bytes` of it to all `peers` together, and wakes those that sleep in
  /// the call. Fails where the fault hook says so.
  Status show(std::span<const int> peers, BlockStage stage, std::size_t bytes);
  /// Where `peer` has what it shows; nullptr when a transfer has to wait for it.
  const std::byte* look_for(int peer, BlockStage stage);
  /// Leaves the call of the block, and wakes those that have waited for that.
  void leave_block(std::span<const int> peers);

  /// Ends a transfer early with `status`. A send that is half-way is finished behind the scenes.
  virtual void cancel(const TransferRef& transfer, const Status& status) = 0;

  /// Moves what can be moved without waiting, at most about 256 KiB a peer. True when anything moved.
  virtual bool progress() = 0;

  /// Peers that sleep are not woken at once any more, but by `ring`, or by `arm` at the latest: the owner looks on for
  /// a while, and a peer may come by itself.
  virtual void hold_bells() {}
  /// Wakes the peers that sleep and have something to read, or room for what did not fit.
  virtual void ring() {}
  /// Before the owner sleeps: peers are rung, and from now on peers ring. False when something arrived meanwhile:
  /// progress again.
  virtual bool arm() = 0;
  /// The owner is awake: peers need not ring.
  virtual void disarm() = 0;
  /// Readable when `progress` has work; -1 for a transport that cannot wake a sleeper.
  virtual int wake_fd() const = 0;
  /// True while something is in flight that only repeated `progress` calls will move (MPI).
  virtual bool needs_polling() const { return false; }
  /// When `progress` has to be called though nothing arrives; kNever without such a time.
  virtual TimePoint next_deadline() const { return kNever; }
  /// Data moves without the processors of this host, as on a network: it pays to begin early though all of them
  /// compute.
  virtual bool needs_no_core() const { return false; }

  /// Says goodbye to `peer`; what was queued before still goes out.
  virtual void say_goodbye(int peer) = 0;
  /// Treats `peer` as lost, for a reason that came from elsewhere, and lets it see that. Nothing if it is lost already.
  virtual void give_up(int /*peer*/, const Status& /*reason*/) {}
  /// True when nothing waits to go out.
  virtual bool flushed() const = 0;

  /// Any thread.
  const TransportStatistics& statistics() const { return statistics_; }

 protected:
  /// `crc` travels with the message.
  virtual void do_post(int peer, std::vector<std::byte> message, std::uint32_t crc) = 0;
  virtual void do_start(const TransferRef& transfer) = 0;

  /// Wakes a peer that sleeps and finds its news in a block.
  virtual void nudge(int /*peer*/) {}

  /// For implementations: hands a control message to the owner, past the fault hook. kInternal when it does not have
  /// the checksum that came with it: what the peer sends is not to be trusted any more.
  Status deliver_control(int peer, std::span<std::byte> message, std::uint32_t crc);
  /// For implementations: asks the fault hook about a message, in which it may flip a bit. False: it is to vanish.
  bool passes(FaultPoint point, int peer, std::span<std::byte> message);
  TransportEvents& events() { return *events_; }
  void count_pulled(std::size_t bytes) { statistics_.data_bytes_pulled.add(static_cast<std::int64_t>(bytes)); }
  /// For a transport before another one: gives on what has passed the fault hook and was counted.
  static void hand_on(Transport& next, const TransferRef& transfer) { next.do_start(transfer); }
  static void hand_on(Transport& next, int peer, std::vector<std::byte> message, std::uint32_t crc) {
    next.do_post(peer, std::move(message), crc);
  }

 private:
  FaultAction fault_at(FaultPoint point, int peer) {
    return fault_ == nullptr ? FaultAction::kPass : fault_->at(point, peer);
  }

  TransportEvents* events_ = nullptr;
  FaultHook* fault_ = nullptr;
  TransportStatistics statistics_;
};

}  // namespace hvd
