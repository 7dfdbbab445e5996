// A network in virtual time: every message, and every piece of a transfer, takes its own drawn time. Control messages
// of one peer stay in order, and so do the pieces of one transfer; all else overtakes freely, as the contract of
// ops/transport/transport.h allows. Checks that contract on the way. One thread.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "ops/transport/transport.h"
#include "tests/simulator/checker.h"
#include "tests/simulator/random.h"
#include "tests/simulator/schedule.h"
#include "tests/simulator/trace.h"

namespace hvd::simulator {

struct NetworkBehaviour {
  Duration shortest{};
  Duration longest{};
  int straggler_percent = 0;  ///< of messages, that take up to `straggler_longest`
  Duration straggler_longest{};
  std::size_t copied_limit_bytes = 0;  ///< up to here a send ends at once
  std::size_t eager_limit_bytes = 0;   ///< above, a send waits until its receive was asked for
  std::size_t slot_bytes = 0;          ///< of the blocks that ranks share; 0: they share none
  int cut_percent = 0;                 ///< chance that a transfer is cut at a random byte, again and again
};

/// A fault that no network of the product's contract has: tests plant it to see that the invariants are watched.
struct Sabotage {
  enum class Kind : std::uint8_t { kNone, kFlipDataBit, kLosePiece, kLoseControl, kSwapControl };
  Kind kind = Kind::kNone;
  std::uint64_t passage = 0;  ///< which piece or control message, counted from 1
};

class SimulatedTransport;

class SimulatedNetwork {
 public:
  /// Told of what a rank is handed, before it is.
  using ControlObserver = std::function<void(int rank, int peer, std::span<const std::byte> message)>;

  SimulatedNetwork(int size, NetworkBehaviour behaviour, Schedule& schedule, Random random, Trace& trace,
                   Checker& checker);

  /// The transport of a rank to all others; the network keeps pointing to it until it is destroyed.
  std::unique_ptr<Transport> connect(int rank);
  /// Calls `wake(rank)` whenever something has arrived for a rank.
  void on_arrival(std::function<void(int rank)> wake) { wake_ = std::move(wake); }
  void on_control(ControlObserver observer) { control_observer_ = std::move(observer); }

  void sabotage(Sabotage sabotage) { sabotage_ = sabotage; }

  /// The rank is dead from now on; each peer finds out at a time of its own.
  void kill(int rank);

  /// Empty when every send has met its receive; otherwise says what is left over.
  std::string unpaired() const;
  std::uint64_t control_messages() const { return control_messages_; }

 private:
  friend class SimulatedTransport;

  struct Packet {
    enum class Kind : std::uint8_t { kControl, kPiece, kCredit, kSendDone, kNudge, kGoodbye, kPeerLost };
    Kind kind = Kind::kControl;
    int peer = -1;
    TransferKey key;
    std::size_t total = 0;  // piece, credit: bytes of the whole transfer
    std::vector<std::byte> bytes;
    std::uint32_t crc = 0;  // of a control message
    TransferRef transfer;   // sent: what has ended
  };
  struct LinkTimes {
    TimePoint control;  // when the last control message arrives
    TimePoint any;      // when the last of all does
  };

  LinkTimes& link(int from, int to) {
    return links_[static_cast<std::size_t>(from) * static_cast<std::size_t>(size_) + static_cast<std::size_t>(to)];
  }
  std::span<std::byte> block(int rank);
  Duration draw_delay();
  bool sabotaged(Sabotage::Kind kind) { return sabotage_.kind == kind && --sabotage_.passage == 0; }
  void send_control(int from, int to, Packet packet);
  /// Arrives not before `earliest`; returns when.
  TimePoint send_data(int from, int to, Packet packet, TimePoint earliest);
  void deliver_at(TimePoint when, int to, Packet packet);

  int size_;
  NetworkBehaviour behaviour_;
  Schedule& schedule_;
  Random random_;
  Trace& trace_;
  Checker& checker_;
  std::function<void(int)> wake_;
  ControlObserver control_observer_;
  Sabotage sabotage_;
  std::vector<std::byte> blocks_;  // of all ranks
  std::vector<SimulatedTransport*> transports_;
  std::vector<LinkTimes> links_;
  std::vector<Packet> packets_;  // on their way; a slot is used again after the arrival
  std::vector<std::uint32_t> free_packets_;
  std::uint64_t control_messages_ = 0;
};

class SimulatedTransport final : public Transport {
 public:
  SimulatedTransport(SimulatedNetwork& network, int rank);
  ~SimulatedTransport() override;

  std::string_view name() const override { return "simulated"; }
  SharedBlocks* blocks() override { return blocks_ ? &*blocks_ : nullptr; }
  void cancel(const TransferRef& transfer, const Status& status) override;
  bool progress() override;
  bool arm() override {
    armed_ = inbox_.empty() && !(blocks_ && blocks_->has_news());
    return armed_;
  }
  void disarm() override { armed_ = false; }
  int wake_fd() const override { return -1; }
  void say_goodbye(int peer) override;
  bool flushed() const override { return writing_ == 0; }

 protected:
  void do_post(int peer, std::vector<std::byte> message, std::uint32_t crc) override;
  void do_start(const TransferRef& transfer) override;
  void nudge(int peer) override;

 private:
  friend class SimulatedNetwork;
  using Packet = SimulatedNetwork::Packet;
  using FlowKey = std::pair<int, TransferKey>;  // peer, message

  struct Outflow {
    TransferRef transfer;
    std::size_t written = 0;
    bool credited = false;  // the receiver has asked for it, or it needs no credit
    TimePoint last_arrival{};
  };
  struct Inflow {
    TransferRef receive;  // nullptr: nobody has asked for it yet
    std::size_t total = 0;
    std::size_t arrived = 0;
    bool begun = false;
    bool given_up = false;  // its receive was cancelled: what arrives is swallowed
    std::vector<std::byte> early;
  };

  void await_notice(const TransferRef& transfer);
  void start_send(const TransferRef& transfer);
  void start_receive(const TransferRef& transfer);
  void begin_writing(const FlowKey& flow);
  void plan_write(const FlowKey& flow);
  void write_piece(const FlowKey& flow);
  void take(Packet& packet);
  void take_piece(const Packet& packet);
  void finish_if_whole(const FlowKey& key);
  void lose(int peer);
  void end_transfers(int peer, const Status& status);
  Status lost_status(int peer, std::string_view how) const;
  bool gone(int peer) const { return gone_[static_cast<std::size_t>(peer)]; }
  bool left(int peer) const { return left_[static_cast<std::size_t>(peer)]; }

  SimulatedNetwork& network_;
  int rank_;
  bool dead_ = false;
  bool armed_ = false;
  std::optional<SharedBlocks> blocks_;  // seen by others at once, while news of it takes its time
  std::deque<Packet> inbox_;
  std::map<FlowKey, Outflow> outflows_;
  std::map<FlowKey, Inflow> inflows_;
  std::set<FlowKey> credits_;  // asked for by a peer before this rank sends
  std::vector<bool> gone_;     // lost peers
  std::vector<bool> left_;     // peers that said goodbye
  std::vector<bool> said_goodbye_;
  int writing_ = 0;  // outflows that may go out now
};

}  // namespace hvd::simulator
