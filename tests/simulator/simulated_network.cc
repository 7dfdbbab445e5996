#include "tests/simulator/simulated_network.h"

#include <fmt/format.h>

#include <algorithm>

#include "ops/collective_context.h"

namespace hvd::simulator {
namespace {

constexpr int kPacketsPerProgress = 4;  // a few only, so that a rank's other work comes in between

std::uint64_t number_of(const TransferKey& key) {
  return static_cast<std::uint64_t>(key.process_set) << 48 | static_cast<std::uint64_t>(key.channel) << 32 |
         key.sequence;
}

std::string text_of(const TransferKey& key) {
  return fmt::format("set {} channel {} sequence {}", key.process_set, key.channel, key.sequence);
}

}  // namespace

// ---- the network
// -----------------------------------------------------------------------------------------------------

SimulatedNetwork::SimulatedNetwork(int size, NetworkBehaviour behaviour, Schedule& schedule, Random random,
                                   Trace& trace, Checker& checker)
    : size_(size),
      behaviour_(behaviour),
      schedule_(schedule),
      random_(random),
      trace_(trace),
      checker_(checker),
      transports_(static_cast<std::size_t>(size)),
      links_(static_cast<std::size_t>(size) * static_cast<std::size_t>(size)) {
  if (behaviour_.slot_bytes == 0) return;
  blocks_.resize(static_cast<std::size_t>(size) * block_bytes(behaviour_.slot_bytes) + alignof(BlockWords));
  for (int rank = 0; rank < size; ++rank) std::construct_at(reinterpret_cast<BlockWords*>(block(rank).data()));
}

std::span<std::byte> SimulatedNetwork::block(int rank) {
  void* place = blocks_.data();
  std::size_t room = blocks_.size();
  std::align(alignof(BlockWords), 1, place, room);
  const std::size_t bytes = block_bytes(behaviour_.slot_bytes);
  return {static_cast<std::byte*>(place) + static_cast<std::size_t>(rank) * bytes, bytes};
}

std::unique_ptr<Transport> SimulatedNetwork::connect(int rank) {
  auto transport = std::make_unique<SimulatedTransport>(*this, rank);
  transports_[static_cast<std::size_t>(rank)] = transport.get();
  return transport;
}

Duration SimulatedNetwork::draw_delay() {
  if (behaviour_.straggler_percent > 0 && random_.chance(behaviour_.straggler_percent)) {
    return random_.duration(behaviour_.longest, behaviour_.straggler_longest);
  }
  return random_.duration(behaviour_.shortest, behaviour_.longest);
}

void SimulatedNetwork::send_control(int from, int to, Packet packet) {
  LinkTimes& times = link(from, to);
  times.control = std::max(times.control, schedule_.now() + draw_delay());
  times.any = std::max(times.any, times.control);
  if (sabotaged(Sabotage::Kind::kLoseControl)) return;
  const bool swapped = sabotaged(Sabotage::Kind::kSwapControl);
  deliver_at(swapped ? times.control + std::chrono::milliseconds(1) : times.control, to, std::move(packet));
}

TimePoint SimulatedNetwork::send_data(int from, int to, Packet packet, TimePoint earliest) {
  LinkTimes& times = link(from, to);
  const TimePoint arrival = std::max(earliest, schedule_.now() + draw_delay());
  times.any = std::max(times.any, arrival);
  if (sabotaged(Sabotage::Kind::kLosePiece)) return arrival;
  if (!packet.bytes.empty() && sabotaged(Sabotage::Kind::kFlipDataBit)) packet.bytes.front() ^= std::byte{1};
  deliver_at(arrival, to, std::move(packet));
  return arrival;
}

void SimulatedNetwork::deliver_at(TimePoint when, int to, Packet packet) {
  std::uint32_t slot = 0;
  if (free_packets_.empty()) {
    slot = static_cast<std::uint32_t>(packets_.size());
    packets_.push_back(std::move(packet));
  } else {
    slot = free_packets_.back();
    free_packets_.pop_back();
    packets_[slot] = std::move(packet);
  }
  schedule_.at(when, [this, to, slot] {
    Packet arrived = std::move(packets_[slot]);
    free_packets_.push_back(slot);
    SimulatedTransport* const receiver = transports_[static_cast<std::size_t>(to)];
    if (receiver == nullptr || receiver->dead_) return;
    receiver->inbox_.push_back(std::move(arrived));
    wake_(to);
  });
}

void SimulatedNetwork::kill(int rank) {
  transports_[static_cast<std::size_t>(rank)]->dead_ = true;
  for (int peer = 0; peer < size_; ++peer) {
    if (peer == rank) continue;
    // Not later than a few delays on average, so news of the loss crosses what was sent before it.
    Packet lost;
    lost.kind = Packet::Kind::kPeerLost;
    lost.peer = rank;
    deliver_at(schedule_.now() + draw_delay() + draw_delay(), peer, std::move(lost));
  }
}

std::string SimulatedNetwork::unpaired() const {
  for (const SimulatedTransport* transport : transports_) {
    if (transport == nullptr) continue;
    const auto left_over = [&](std::string_view what, const SimulatedTransport::FlowKey& flow) {
      return fmt::format("rank {}: {} rank {} ({}) met no counterpart", transport->rank_, what, flow.first,
                         text_of(flow.second));
    };
    // A standing call that is withdrawn, or is not begun, gives up what a peer may never have sent.
    const auto is_of_standing_call = [](const SimulatedTransport::FlowKey& flow) {
      return flow.second.channel >= kFirstStandingChannel;
    };
    if (!transport->outflows_.empty()) return left_over("a send to", transport->outflows_.begin()->first);
    for (const auto& [flow, inflow] : transport->inflows_) {
      if (inflow.given_up && !inflow.begun && is_of_standing_call(flow)) continue;
      return left_over(inflow.receive ? "a receive from" : "what arrived from", flow);
    }
    for (const SimulatedTransport::FlowKey& flow : transport->credits_) {
      if (!is_of_standing_call(flow)) return left_over("a receive of", flow);
    }
  }
  return {};
}

// ---- one rank's end: going out
// ---------------------------------------------------------------------------------------

SimulatedTransport::SimulatedTransport(SimulatedNetwork& network, int rank)
    : network_(network),
      rank_(rank),
      gone_(static_cast<std::size_t>(network.size_)),
      left_(static_cast<std::size_t>(network.size_)),
      said_goodbye_(static_cast<std::size_t>(network.size_)) {
  if (network.behaviour_.slot_bytes == 0) return;
  blocks_.emplace(rank, network.size_, network.behaviour_.slot_bytes);
  for (int peer = 0; peer < network.size_; ++peer) blocks_->add(peer, network.block(peer));
}

SimulatedTransport::~SimulatedTransport() { network_.transports_[static_cast<std::size_t>(rank_)] = nullptr; }

void SimulatedTransport::do_post(int peer, std::vector<std::byte> message, std::uint32_t crc) {
  if (gone(peer) || left(peer)) return;
  if (said_goodbye_[static_cast<std::size_t>(peer)]) {
    network_.checker_.report(invariant::kTransportContract,
                             fmt::format("rank {} posts to rank {} after its goodbye", rank_, peer));
  }
  network_.trace_.note(Trace::What::kPost, rank_, peer, message.size(), 0);
  ++network_.control_messages_;
  Packet packet;
  packet.peer = rank_;
  packet.bytes = std::move(message);
  packet.crc = crc;
  network_.send_control(rank_, peer, std::move(packet));
}

void SimulatedTransport::say_goodbye(int peer) {
  if (gone(peer) || said_goodbye_[static_cast<std::size_t>(peer)]) return;
  said_goodbye_[static_cast<std::size_t>(peer)] = true;
  Packet packet;
  packet.kind = Packet::Kind::kGoodbye;
  packet.peer = rank_;
  // Behind everything that was sent before, control and data.
  SimulatedNetwork::LinkTimes& times = network_.link(rank_, peer);
  times.any = std::max(times.any, network_.schedule_.now() + network_.draw_delay());
  network_.deliver_at(times.any, peer, std::move(packet));
}

void SimulatedTransport::do_start(const TransferRef& transfer) {
  const bool sends = transfer->direction == Transfer::Direction::kSend;
  network_.trace_.note(sends ? Trace::What::kSend : Trace::What::kReceive, rank_, transfer->peer,
                       number_of(transfer->key), transfer->bytes);
  const bool waits_for_slot = transfer->notice && transfer->notice->stage == BlockStage::kSlotFree;
  if (gone(transfer->peer) && !waits_for_slot) {
    transfer->complete(lost_status(transfer->peer, "its process has gone"));
  } else if (transfer->notice) {
    await_notice(transfer);
  } else if (sends) {
    start_send(transfer);
  } else {
    start_receive(transfer);
  }
}

void SimulatedTransport::await_notice(const TransferRef& transfer) {
  blocks_->await(transfer);
  if (transfer->done() || !left(transfer->peer) || transfer->notice->stage == BlockStage::kSlotFree) return;
  blocks_->cancel(transfer);
  transfer->complete(lost_status(transfer->peer, "it has left the job"));
}

void SimulatedTransport::nudge(int peer) {
  if (gone(peer)) return;
  Packet packet;
  packet.kind = Packet::Kind::kNudge;
  packet.peer = rank_;
  network_.deliver_at(network_.schedule_.now() + network_.draw_delay(), peer, std::move(packet));
}

void SimulatedTransport::start_send(const TransferRef& transfer) {
  const FlowKey flow{transfer->peer, transfer->key};
  if (transfer->bytes <= network_.behaviour_.copied_limit_bytes) {
    Packet packet;
    packet.kind = Packet::Kind::kPiece;
    packet.peer = rank_;
    packet.key = transfer->key;
    packet.total = transfer->bytes;
    packet.bytes.assign(transfer->data, transfer->data + transfer->bytes);
    network_.send_data(rank_, transfer->peer, std::move(packet), {});
    transfer->complete({});
    return;
  }
  const auto [place, is_new] = outflows_.try_emplace(flow);
  if (!is_new) {
    network_.checker_.report(invariant::kTransportContract,
                             fmt::format("rank {} sends {} to rank {} twice", rank_, text_of(flow.second), flow.first));
    return;
  }
  place->second.transfer = transfer;
  if (transfer->bytes <= network_.behaviour_.eager_limit_bytes || credits_.erase(flow) > 0) begin_writing(flow);
}

void SimulatedTransport::begin_writing(const FlowKey& flow) {
  outflows_.at(flow).credited = true;
  ++writing_;
  plan_write(flow);
}

void SimulatedTransport::plan_write(const FlowKey& flow) {
  network_.schedule_.after(network_.random_.duration(Duration(0), network_.behaviour_.shortest + Duration(500)),
                           [network = &network_, rank = rank_, flow] {
                             SimulatedTransport* const self = network->transports_[static_cast<std::size_t>(rank)];
                             if (self != nullptr && !self->dead_) self->write_piece(flow);
                           });
}

// Reads the sender's memory only now, as a link does that had no room before.
void SimulatedTransport::write_piece(const FlowKey& flow) {
  const auto found = outflows_.find(flow);
  if (found == outflows_.end()) return;  // withdrawn meanwhile
  Outflow& out = found->second;
  const Transfer& transfer = *out.transfer;
  const std::size_t left = transfer.bytes - out.written;
  const bool cut = left > 1 && network_.random_.chance(network_.behaviour_.cut_percent);
  const std::size_t count = cut ? 1 + network_.random_.below(left - 1) : left;
  Packet piece;
  piece.kind = Packet::Kind::kPiece;
  piece.peer = rank_;
  piece.key = flow.second;
  piece.total = transfer.bytes;
  piece.bytes.assign(transfer.data + out.written, transfer.data + out.written + count);
  out.written += count;
  out.last_arrival = network_.send_data(rank_, flow.first, std::move(piece), out.last_arrival);
  if (out.written < transfer.bytes) {
    plan_write(flow);
    return;
  }
  Packet sent;
  sent.kind = Packet::Kind::kSendDone;
  sent.peer = flow.first;
  sent.transfer = std::move(out.transfer);
  outflows_.erase(found);
  --writing_;
  network_.deliver_at(network_.schedule_.now(), rank_, std::move(sent));
}

// ---- one rank's end: coming in
// ---------------------------------------------------------------------------------------

void SimulatedTransport::start_receive(const TransferRef& transfer) {
  const FlowKey flow{transfer->peer, transfer->key};
  Inflow& in = inflows_[flow];
  if (in.receive || in.given_up) {
    network_.checker_.report(invariant::kTransportContract, fmt::format("rank {} receives {} from rank {} twice", rank_,
                                                                        text_of(flow.second), flow.first));
    return;
  }
  if (!in.begun && left(transfer->peer)) {
    inflows_.erase(flow);
    transfer->complete(lost_status(transfer->peer, "it has left the job"));
    return;
  }
  in.receive = transfer;
  if (in.begun) {
    if (in.total == transfer->bytes) transfer->deliver(in.early);
    in.early.clear();
    finish_if_whole(flow);
  } else if (transfer->bytes > network_.behaviour_.eager_limit_bytes) {
    Packet credit;
    credit.kind = Packet::Kind::kCredit;
    credit.peer = rank_;
    credit.key = transfer->key;
    credit.total = transfer->bytes;
    network_.send_control(rank_, transfer->peer, std::move(credit));
  }
}

void SimulatedTransport::take_piece(const Packet& packet) {
  const FlowKey flow{packet.peer, packet.key};
  Inflow& in = inflows_[flow];
  network_.trace_.note(Trace::What::kPiece, rank_, packet.peer, number_of(packet.key), packet.bytes.size());
  network_.trace_.note_bytes(packet.bytes);
  in.begun = true;
  in.total = packet.total;
  in.arrived += packet.bytes.size();
  if (in.receive && in.receive->bytes == in.total) {
    in.receive->deliver(packet.bytes);
  } else if (!in.receive && !in.given_up) {
    in.early.insert(in.early.end(), packet.bytes.begin(), packet.bytes.end());
  }
  finish_if_whole(flow);
}

void SimulatedTransport::finish_if_whole(const FlowKey& flow) {
  const auto found = inflows_.find(flow);
  Inflow& in = found->second;
  if (in.arrived > in.total) {
    network_.checker_.report(invariant::kTransportContract,
                             fmt::format("rank {} sent {} to rank {} twice", flow.first, text_of(flow.second), rank_));
  }
  if (in.receive && in.receive->bytes != in.total) {
    network_.checker_.report(invariant::kTransportContract,
                             fmt::format("rank {} sent {} bytes as {} where rank {} expects {}", flow.first, in.total,
                                         text_of(flow.second), rank_, in.receive->bytes));
  }
  if (in.arrived < in.total || (!in.receive && !in.given_up)) return;
  const TransferRef receive = std::move(in.receive);
  inflows_.erase(found);
  if (receive) receive->complete({});
}

bool SimulatedTransport::progress() {
  const bool delivered = blocks_ && blocks_->deliver();
  if (inbox_.empty()) return delivered;
  for (int i = 0; i < kPacketsPerProgress && !inbox_.empty(); ++i) {
    Packet packet = std::move(inbox_.front());
    inbox_.pop_front();
    take(packet);
  }
  return true;
}

void SimulatedTransport::take(Packet& packet) {
  if (packet.kind == Packet::Kind::kSendDone) {
    packet.transfer->complete({});
    return;
  }
  if (gone(packet.peer) || left(packet.peer)) {
    if (packet.kind == Packet::Kind::kPeerLost && !gone(packet.peer)) lose(packet.peer);
    return;
  }
  switch (packet.kind) {
    case Packet::Kind::kControl:
      network_.trace_.note(Trace::What::kControl, rank_, packet.peer, packet.bytes.size(), 0);
      network_.trace_.note_bytes(packet.bytes);
      network_.control_observer_(rank_, packet.peer, packet.bytes);
      if (!deliver_control(packet.peer, packet.bytes, packet.crc).ok()) lose(packet.peer);
      return;
    case Packet::Kind::kPiece:
      take_piece(packet);
      return;
    case Packet::Kind::kCredit: {
      const FlowKey flow{packet.peer, packet.key};
      const auto waiting = outflows_.find(flow);
      if (waiting == outflows_.end()) {
        credits_.insert(flow);
      } else if (waiting->second.transfer->bytes != packet.total) {
        network_.checker_.report(
            invariant::kTransportContract,
            fmt::format("rank {} sends {} bytes as {} where rank {} expects {}", rank_, waiting->second.transfer->bytes,
                        text_of(flow.second), flow.first, packet.total));
      } else if (!waiting->second.credited) {
        begin_writing(flow);
      }
      return;
    }
    case Packet::Kind::kGoodbye:
      network_.trace_.note(Trace::What::kGoodbye, rank_, packet.peer, 0, 0);
      left_[static_cast<std::size_t>(packet.peer)] = true;
      end_transfers(packet.peer, lost_status(packet.peer, "it has left the job"));
      events().on_goodbye(packet.peer);
      return;
    case Packet::Kind::kPeerLost:
      lose(packet.peer);
      return;
    case Packet::Kind::kNudge:
    case Packet::Kind::kSendDone:
      return;
  }
}

// ---- the end of transfers and of peers
// -------------------------------------------------------------------------------

void SimulatedTransport::cancel(const TransferRef& transfer, const Status& status) {
  if (transfer->done()) return;
  const FlowKey flow{transfer->peer, transfer->key};
  network_.trace_.note(Trace::What::kCancel, rank_, transfer->peer, number_of(transfer->key), 0);
  if (transfer->notice) {
    blocks_->cancel(transfer);
  } else if (transfer->direction == Transfer::Direction::kReceive) {
    const auto found = inflows_.find(flow);
    if (found != inflows_.end() && found->second.receive == transfer) {
      found->second.receive.reset();
      found->second.given_up = true;
    }
  } else {
    const auto found = outflows_.find(flow);
    // What is half-way out goes out whole, with the memory that the transfer keeps alive.
    if (found != outflows_.end() && found->second.transfer == transfer && found->second.written == 0) {
      if (found->second.credited) --writing_;
      outflows_.erase(found);
    }
  }
  transfer->complete(status);
}

Status SimulatedTransport::lost_status(int peer, std::string_view how) const {
  return Status::internal(fmt::format("rank {} is lost (simulated): {}", peer, how));
}

void SimulatedTransport::lose(int peer) {
  network_.trace_.note(Trace::What::kPeerLost, rank_, peer, 0, 0);
  const bool expected = left(peer) || said_goodbye_[static_cast<std::size_t>(peer)];
  gone_[static_cast<std::size_t>(peer)] = true;
  if (blocks_) blocks_->gone(peer);
  const Status status = lost_status(peer, "its process has gone");
  end_transfers(peer, status);
  if (!expected) events().on_peer_lost(peer, status);
}

void SimulatedTransport::end_transfers(int peer, const Status& status) {
  if (blocks_) {
    blocks_->deliver();  // what it showed before
    blocks_->end(peer, status);
  }
  std::vector<TransferRef> ended;
  const auto of_peer = [&](const auto& flow) { return flow.first.first == peer; };
  for (const auto& entry : inflows_) {
    if (of_peer(entry) && entry.second.receive) ended.push_back(entry.second.receive);
  }
  for (const auto& entry : outflows_) {
    if (!of_peer(entry)) continue;
    ended.push_back(entry.second.transfer);
    if (entry.second.credited) --writing_;
  }
  // Whatever arrived from a peer that left stays to be asked for; a dead one's is of no use.
  std::erase_if(inflows_, [&](const auto& entry) { return of_peer(entry) && (entry.second.receive || gone(peer)); });
  std::erase_if(outflows_, of_peer);
  for (const TransferRef& transfer : ended) transfer->complete(status);
}

}  // namespace hvd::simulator
