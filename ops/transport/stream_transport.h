// The transport protocol over byte streams, one Link a peer: control messages, small transfers sent eagerly, large
// ones when the receiver has given credit, or pulled by the receiver where its link can read the memory of the peer.
// In-process memory, shared memory and TCP differ only in their links. Runs under the Turn.
//
// Credit keeps a stream free of bytes that nobody has asked for, so a call that waits never blocks another one
// behind it; it also lets payloads go straight to (or be reduced into) their place.
//
//   sender                                      receiver
//   offer: address and length            ->     copies, once it has a receive for it
//   lets go of the memory                <-     taken
// A receiver that cannot read that memory gives credit for what is left, which then comes by the stream. A sender that
// is cancelled withdraws its offer and keeps the memory until that was answered; a link that ends says so before its
// sender lets go of any, and what was pulled meanwhile is not delivered.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "ops/transport/frame.h"
#include "ops/transport/link.h"
#include "ops/transport/transport.h"

namespace hvd {

class StreamTransport final : public Transport {
 public:
  struct Settings {
    std::string name;                                       ///< for messages and statistics
    int rank = 0;                                           ///< global rank of the owner
    int size = 1;                                           ///< ranks of the job
    std::uint32_t generation = 0;                           ///< of the membership; frames of another one are refused
    std::size_t eager_limit_bytes = std::size_t{64} << 10;  ///< equal on all ranks
    std::size_t budget_bytes = std::size_t{256} << 10;      ///< a peer and direction, per `progress`
  };

  StreamTransport(Settings settings, std::unique_ptr<Wakeup> wakeup);
  ~StreamTransport() override;

  /// Before the first `progress` that is to use it.
  void add_peer(int peer, std::unique_ptr<Link> link);
  bool has_peer(int peer) const { return peers_[static_cast<std::size_t>(peer)] != nullptr; }

  /// Blocks of this rank and of peers that have links here; before the first call that uses them.
  void share_blocks(std::unique_ptr<SharedBlocks> blocks) { blocks_ = std::move(blocks); }

  std::string_view name() const override { return settings_.name; }
  SharedBlocks* blocks() override { return blocks_.get(); }
  void cancel(const TransferRef& transfer, const Status& status) override;
  bool progress() override;
  void hold_bells() override { holds_bells_ = true; }
  void ring() override;
  bool arm() override;
  void disarm() override;
  int wake_fd() const override { return wakeup_->fd(); }
  void say_goodbye(int peer) override;
  void give_up(int peer, const Status& reason) override;
  bool flushed() const override;

 protected:
  void do_post(int peer, std::vector<std::byte> message, std::uint32_t crc) override;
  void do_start(const TransferRef& transfer) override;
  void nudge(int peer) override;

 private:
  // A frame on its way out: `head` holds the header and perhaps the payload, `transfer` the payload otherwise.
  struct Outgoing {
    std::vector<std::byte> head;
    TransferRef transfer;
    std::size_t begin = 0;  // of what is sent of it
    std::size_t padding = 0;
    std::size_t written = 0;
    std::size_t body() const { return transfer ? transfer->bytes - begin : 0; }
    std::size_t total() const { return head.size() + body() + padding; }
  };
  // Where the payload of the frame that is arriving goes.
  struct Incoming {
    std::size_t header_bytes = 0;
    EncodedHeader encoded{};
    FrameHeader header;
    std::uint64_t payload_left = 0;
    std::size_t padding_left = 0;
    TransferRef transfer;             // a posted receive, or
    std::vector<std::byte> buffered;  // a control message or a transfer that nobody has asked for yet
    bool discard = false;
    bool in_frame() const { return header_bytes == kFrameHeaderBytes; }
  };
  // What the peer has offered.
  struct Offer {
    std::uint64_t address = 0;
    std::uint64_t bytes = 0;
  };
  // An offer that has found its receive.
  struct Pull {
    TransferRef transfer;
    std::uint64_t address = 0;
  };
  struct Peer {
    int rank = -1;
    std::unique_ptr<Link> link;
    std::optional<Outgoing> current;
    std::deque<Outgoing> control_out;  // goes before data_out
    std::deque<Outgoing> data_out;
    std::map<TransferKey, TransferRef> receives;
    std::map<TransferKey, std::vector<std::byte>> unexpected;
    std::map<TransferKey, TransferRef> sends_without_credit;
    std::map<TransferKey, std::uint64_t> credits_without_send;
    std::map<TransferKey, TransferRef> offered;  // sends; one that has ended keeps its memory until it is answered
    std::map<TransferKey, Offer> offers;         // that nobody has asked for yet
    std::deque<Pull> pulls;
    std::set<TransferKey> abandoned;  // receives that were cancelled; what still comes for them is dropped
    Incoming in;
    bool nudged = false;  // since the last ring
    bool said_goodbye = false;
    bool left = false;
    Status lost;  // not ok: the peer is gone
  };

  Peer& peer_of(int rank) { return *peers_[static_cast<std::size_t>(rank)]; }
  FrameHeader header_for(FrameKind kind, const TransferKey& key, std::uint64_t bytes) const;
  bool write(Peer& peer);
  void ring(Peer& peer);
  bool write_current(Peer& peer, std::size_t& budget);
  bool read(Peer& peer);
  Status read_header(Peer& peer, std::span<const std::byte>& bytes);
  Status begin_frame(Peer& peer);
  Status begin_transfer(Peer& peer, const TransferKey& key);
  Status end_frame(Peer& peer);
  void take_payload(Peer& peer, std::span<const std::byte> piece);
  std::size_t read_payload_in_place(Peer& peer);
  void send_credited(Peer& peer, const TransferKey& key, std::uint64_t credited);
  void queue_data(Peer& peer, FrameKind kind, const TransferRef& transfer, std::size_t begin = 0);
  static bool is_pulled(const Peer& peer, const Transfer& transfer) {
    return transfer.may_be_pulled && peer.link->can_pull();
  }
  void queue_control(Peer& peer, FrameKind kind, const TransferKey& key, std::uint64_t bytes,
                     std::span<const std::byte> payload = {});
  void await_notice(Peer& peer, const TransferRef& transfer);
  void look_for_ended_readers();
  void offer(Peer& peer, const TransferRef& transfer);
  Status take_offer(Peer& peer, const FrameHeader& header, std::span<const std::byte> payload);
  void match_offer(Peer& peer, const Offer& offer, const TransferRef& transfer);
  bool pull(Peer& peer);
  Pulled pull_piece(Peer& peer, const Pull& pull, std::size_t bytes);
  bool adopt_frame_under_way(Peer& peer, const TransferRef& transfer);
  void start_receive(Peer& peer, const TransferRef& transfer);
  void lose(Peer& peer, const Status& cause);
  void lose_as(Peer& peer, const Status& lost);
  void end_awaited(Peer& peer, const Status& status);
  void end_transfers(Peer& peer, const Status& status);
  Status lost_status(const Peer& peer, const Status& cause) const;

  Settings settings_;
  std::unique_ptr<Wakeup> wakeup_;
  std::unique_ptr<SharedBlocks> blocks_;
  std::vector<std::unique_ptr<Peer>> peers_;  // by global rank; nullptr: not reached by this transport
  std::vector<Peer*> active_;
  std::vector<std::byte> pulled_;  // the last piece that has to be combined
  bool holds_bells_ = false;
};

}  // namespace hvd
