#include "ops/transport/stream_transport.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/check.h"
#include "ops/transport/byte_ring.h"

namespace hvd {
namespace {

constexpr std::size_t kInlinePayload = 1024;  // up to here a payload is copied behind its header: one write
constexpr std::size_t kPullPiece = std::size_t{64} << 10;  // is combined while it lies in the cache
constexpr std::array<std::byte, kFrameAlignment> kPadding{};
static_assert((kRingShiftBytes + kFrameHeaderBytes) % kFrameAlignment == 0, "payloads are to be aligned");

TransferKey key_of(const FrameHeader& header) { return {header.process_set, header.channel, header.sequence}; }

Status size_mismatch(int sender, std::uint64_t sent, std::size_t expected) {
  return Status::internal(fmt::format("rank {} sent {} bytes where this rank expects {}", sender, sent, expected));
}

std::vector<std::byte> head_with_payload(const FrameHeader& header, std::span<const std::byte> payload) {
  const EncodedHeader encoded = encode(header);
  std::vector<std::byte> head(encoded.size() + payload.size() + padding_after(payload.size()));
  std::memcpy(head.data(), encoded.data(), encoded.size());
  if (!payload.empty()) std::memcpy(head.data() + encoded.size(), payload.data(), payload.size());
  return head;
}

std::vector<std::byte> head_alone(const FrameHeader& header) {
  const EncodedHeader encoded = encode(header);
  return {encoded.begin(), encoded.end()};
}

}  // namespace

StreamTransport::StreamTransport(Settings settings, std::unique_ptr<Wakeup> wakeup)
    : settings_(std::move(settings)), wakeup_(std::move(wakeup)), peers_(static_cast<std::size_t>(settings_.size)) {}

StreamTransport::~StreamTransport() {
  for (Peer* peer : active_) {
    if (peer->lost.ok() && !peer->offered.empty()) peer->link->close();  // before the memory is let go
  }
}

void StreamTransport::add_peer(int rank, std::unique_ptr<Link> link) {
  auto peer = std::make_unique<Peer>();
  peer->rank = rank;
  peer->link = std::move(link);
  active_.push_back(peer.get());
  peers_[static_cast<std::size_t>(rank)] = std::move(peer);
}

FrameHeader StreamTransport::header_for(FrameKind kind, const TransferKey& key, std::uint64_t bytes) const {
  FrameHeader header;
  header.generation = settings_.generation;
  header.kind = kind;
  header.process_set = key.process_set;
  header.channel = key.channel;
  header.sender = static_cast<std::uint32_t>(settings_.rank);
  header.sequence = key.sequence;
  header.bytes = bytes;
  return header;
}

// ---- going out ------------------------------------------------------------------------------------------------------

void StreamTransport::do_post(int rank, std::vector<std::byte> message, std::uint32_t crc) {
  Peer& peer = peer_of(rank);
  if (!peer.lost.ok() || peer.left) return;
  FrameHeader header = header_for(FrameKind::kControl, {}, message.size());
  header.payload_crc = crc;
  peer.control_out.push_back({head_with_payload(header, message), nullptr});
  write(peer);
}

void StreamTransport::say_goodbye(int rank) {
  Peer& peer = peer_of(rank);
  if (!peer.lost.ok() || peer.said_goodbye) return;
  peer.said_goodbye = true;
  std::vector<std::byte> head = head_with_payload(header_for(FrameKind::kGoodbye, {}, 0), {});
  if (!passes(FaultPoint::kGoodbyeSend, rank, head)) return;
  peer.data_out.push_back({std::move(head), nullptr});
  write(peer);
}

bool StreamTransport::flushed() const {
  return std::all_of(active_.begin(), active_.end(), [](const Peer* peer) {
    return !peer->lost.ok() ||
           (!peer->current && peer->control_out.empty() && peer->data_out.empty() && peer->offered.empty());
  });
}

void StreamTransport::do_start(const TransferRef& transfer) {
  Peer& peer = peer_of(transfer->peer);
  if (transfer->notice && (peer.lost.ok() || transfer->notice->stage == BlockStage::kSlotFree)) {
    await_notice(peer, transfer);
    return;
  }
  if (!peer.lost.ok()) {
    transfer->complete(peer.lost);
    return;
  }
  if (transfer->direction == Transfer::Direction::kReceive) {
    start_receive(peer, transfer);
    return;
  }
  if (is_pulled(peer, *transfer)) {
    offer(peer, transfer);
    return;
  }
  if (transfer->bytes <= settings_.eager_limit_bytes) {
    queue_data(peer, FrameKind::kEager, transfer);
    return;
  }
  const auto credit = peer.credits_without_send.find(transfer->key);
  if (credit == peer.credits_without_send.end()) {
    if (peer.left) {
      transfer->complete(lost_status(peer, Status::internal("it has left the job")));
      return;
    }
    peer.sends_without_credit.emplace(transfer->key, transfer);
    return;
  }
  const std::uint64_t credited = credit->second;
  peer.credits_without_send.erase(credit);
  peer.sends_without_credit.emplace(transfer->key, transfer);
  send_credited(peer, transfer->key, credited);
}

// What a peer has shown stays there when it has gone.
void StreamTransport::await_notice(Peer& peer, const TransferRef& transfer) {
  blocks_->await(transfer);
  if (!transfer->done() && peer.left && transfer->notice->stage != BlockStage::kSlotFree) {
    blocks_->cancel(transfer);
    transfer->complete(lost_status(peer, Status::internal("it has left the job")));
  }
}

// Who was lost by what others say may be stopped in the middle of reading. Its end frees a slot.
void StreamTransport::look_for_ended_readers() {
  for (const Peer* peer : active_) {
    if (!peer->lost.ok() && peer->link->peer_has_ended()) blocks_->gone(peer->rank);
  }
}

void StreamTransport::nudge(int rank) {
  Peer& peer = peer_of(rank);
  if (!peer.lost.ok()) return;
  peer.nudged = true;
  if (!holds_bells_) ring(peer);
}

void StreamTransport::offer(Peer& peer, const TransferRef& transfer) {
  if (peer.left) {
    transfer->complete(lost_status(peer, Status::internal("it has left the job")));
    return;
  }
  peer.offered.emplace(transfer->key, transfer);
  const auto address = reinterpret_cast<std::uint64_t>(transfer->data);
  queue_control(peer, FrameKind::kOffer, transfer->key, transfer->bytes, std::as_bytes(std::span(&address, 1)));
}

// What of the transfer comes before `begin` has gone another way.
void StreamTransport::queue_data(Peer& peer, FrameKind kind, const TransferRef& transfer, std::size_t begin) {
  const std::size_t bytes = transfer->bytes - begin;
  const FrameHeader header = header_for(kind, transfer->key, bytes);
  if (bytes <= kInlinePayload) {
    peer.data_out.push_back({head_with_payload(header, {transfer->data + begin, bytes}), nullptr});
    transfer->complete({});
  } else {
    peer.data_out.push_back({head_alone(header), transfer, begin, padding_after(bytes)});
  }
  write(peer);
}

void StreamTransport::queue_control(Peer& peer, FrameKind kind, const TransferKey& key, std::uint64_t bytes,
                                    std::span<const std::byte> payload) {
  std::vector<std::byte> head = head_with_payload(header_for(kind, key, bytes), payload);
  if (kind == FrameKind::kOffer && !passes(FaultPoint::kOfferSend, peer.rank, head)) return;
  if (kind == FrameKind::kTaken && !passes(FaultPoint::kTakenSend, peer.rank, head)) return;
  peer.control_out.push_back({std::move(head), nullptr});
  write(peer);
}

void StreamTransport::send_credited(Peer& peer, const TransferKey& key, std::uint64_t credited) {
  if (const auto refused = peer.offered.find(key); refused != peer.offered.end()) {
    const TransferRef transfer = std::move(refused->second);
    peer.offered.erase(refused);
    if (credited > transfer->bytes) {
      transfer->complete(Status::internal(
          fmt::format("rank {} asks for {} bytes of {} that it was offered", peer.rank, credited, transfer->bytes)));
    } else {
      queue_data(peer, FrameKind::kBulk, transfer, transfer->bytes - static_cast<std::size_t>(credited));
    }
    return;
  }
  const auto waiting = peer.sends_without_credit.find(key);
  if (waiting == peer.sends_without_credit.end()) {
    peer.credits_without_send[key] = credited;
    return;
  }
  const TransferRef transfer = std::move(waiting->second);
  peer.sends_without_credit.erase(waiting);
  if (credited != transfer->bytes) {
    transfer->complete(
        Status::internal(fmt::format("rank {} expects {} bytes where this rank sends {} (channel {}/{})", peer.rank,
                                     credited, transfer->bytes, key.process_set, key.channel)));
    return;
  }
  queue_data(peer, FrameKind::kBulk, transfer);
}

bool StreamTransport::write(Peer& peer) {
  std::size_t budget = settings_.budget_bytes;
  bool moved = false;
  while (budget > 0) {
    if (!peer.current) {
      std::deque<Outgoing>& queue = peer.control_out.empty() ? peer.data_out : peer.control_out;
      if (queue.empty()) break;
      peer.current = std::move(queue.front());
      queue.pop_front();
    }
    if (!write_current(peer, budget)) break;
    moved = true;
  }
  if (moved && !holds_bells_) ring(peer);
  return moved;
}

// Writes one stretch of the current frame. False when the link took nothing.
bool StreamTransport::write_current(Peer& peer, std::size_t& budget) {
  Outgoing& out = *peer.current;
  std::span<const std::byte> stretch;
  if (out.written < out.head.size()) {
    stretch = std::span<const std::byte>(out.head).subspan(out.written);
  } else if (const std::size_t sent = out.written - out.head.size(); sent < out.body()) {
    stretch = {out.transfer->data + out.begin + sent, out.body() - sent};
  } else {
    stretch = std::span(kPadding).first(out.total() - out.written);
  }
  const std::size_t count = peer.link->write_some(stretch.first(std::min(stretch.size(), budget)));
  if (count == 0) return false;
  budget -= std::min(budget, count);
  out.written += count;
  if (out.written == out.total()) {
    const TransferRef sent = std::move(out.transfer);
    peer.current.reset();
    if (sent) sent->complete({});
  }
  return true;
}

// ---- coming in ------------------------------------------------------------------------------------------------------

void StreamTransport::start_receive(Peer& peer, const TransferRef& transfer) {
  if (adopt_frame_under_way(peer, transfer)) return;
  const auto arrived = peer.unexpected.find(transfer->key);
  if (arrived != peer.unexpected.end()) {
    const std::vector<std::byte> bytes = std::move(arrived->second);
    peer.unexpected.erase(arrived);
    if (bytes.size() != transfer->bytes) {
      transfer->complete(size_mismatch(peer.rank, bytes.size(), transfer->bytes));
      return;
    }
    transfer->deliver(bytes);
    transfer->complete({});
    return;
  }
  if (const auto offered = peer.offers.find(transfer->key); offered != peer.offers.end()) {
    const Offer offer = offered->second;
    peer.offers.erase(offered);
    match_offer(peer, offer, transfer);
    return;
  }
  if (peer.left) {
    transfer->complete(lost_status(peer, Status::internal("it has left the job")));
    return;
  }
  peer.receives.emplace(transfer->key, transfer);
  if (transfer->bytes > settings_.eager_limit_bytes && !is_pulled(peer, *transfer)) {
    queue_control(peer, FrameKind::kCredit, transfer->key, transfer->bytes);
  }
}

// ---- pulled ---------------------------------------------------------------------------------------------------------

Status StreamTransport::take_offer(Peer& peer, const FrameHeader& header, std::span<const std::byte> payload) {
  if (!peer.link->can_pull()) return Status::internal("it offers memory that cannot be read from here");
  Offer offer{0, header.bytes};
  std::memcpy(&offer.address, payload.data(), sizeof offer.address);
  const TransferKey key = key_of(header);
  if (const auto posted = peer.receives.find(key); posted != peer.receives.end()) {
    const TransferRef transfer = std::move(posted->second);
    peer.receives.erase(posted);
    match_offer(peer, offer, transfer);
  } else if (peer.abandoned.erase(key) > 0) {
    queue_control(peer, FrameKind::kTaken, key, 0);
  } else {
    peer.offers.emplace(key, offer);
  }
  return {};
}

void StreamTransport::match_offer(Peer& peer, const Offer& offer, const TransferRef& transfer) {
  if (offer.bytes == transfer->bytes) {
    peer.pulls.push_back({transfer, offer.address});
    return;
  }
  queue_control(peer, FrameKind::kTaken, transfer->key, 0);
  transfer->complete(size_mismatch(peer.rank, offer.bytes, transfer->bytes));
}

bool StreamTransport::pull(Peer& peer) {
  std::size_t budget = settings_.budget_bytes;
  const bool any = !peer.pulls.empty();
  while (budget > 0 && !peer.pulls.empty()) {
    const Pull current = peer.pulls.front();
    const std::size_t left = current.transfer->bytes - current.transfer->delivered();
    const bool combines = current.transfer->arrival.combine != nullptr;
    // Whole elements are combined; what the budget has left may end within one.
    const std::size_t bytes = std::min(left, combines ? kPullPiece : budget);
    switch (pull_piece(peer, current, bytes)) {
      case Pulled::kAll:
        budget -= std::min(budget, bytes);
        if (bytes < left) continue;
        peer.pulls.pop_front();
        queue_control(peer, FrameKind::kTaken, current.transfer->key, 0);
        current.transfer->complete({});
        break;
      case Pulled::kRefused:
        peer.pulls.pop_front();
        peer.receives.emplace(current.transfer->key, current.transfer);
        queue_control(peer, FrameKind::kCredit, current.transfer->key, left);
        break;
      case Pulled::kGone:
        lose(peer, Status::internal("it ended while its memory was read"));
        return true;
    }
  }
  if (any && !holds_bells_) ring(peer);
  return any;
}

Pulled StreamTransport::pull_piece(Peer& peer, const Pull& pull, std::size_t bytes) {
  Transfer& transfer = *pull.transfer;
  const std::uint64_t address = pull.address + transfer.delivered();
  const bool combines = transfer.arrival.combine != nullptr;
  if (combines) pulled_.resize(kPullPiece);
  const std::span<std::byte> place(combines ? pulled_.data() : transfer.arrival.out + transfer.delivered(), bytes);
  const Pulled result = peer.link->pull(address, place);
  if (result != Pulled::kAll) return result;
  count_pulled(bytes);
  if (combines) {
    transfer.deliver(place);
  } else {
    transfer.skip(bytes);
  }
  return result;
}

// ---- coming in by the stream ----------------------------------------------------------------------------------------

// The message may have begun to arrive before anybody asked for it: its rest then goes straight to its place.
bool StreamTransport::adopt_frame_under_way(Peer& peer, const TransferRef& transfer) {
  Incoming& in = peer.in;
  const bool is_this = in.in_frame() && in.header.kind == FrameKind::kEager && !in.discard && !in.transfer &&
                       key_of(in.header) == transfer->key;
  if (!is_this) return false;
  if (in.header.bytes != transfer->bytes) {
    transfer->complete(size_mismatch(peer.rank, in.header.bytes, transfer->bytes));
    in.discard = true;
  } else {
    transfer->deliver(in.buffered);
    in.transfer = transfer;
  }
  in.buffered.clear();
  return true;
}

bool StreamTransport::read(Peer& peer) {
  std::size_t budget = settings_.budget_bytes;
  bool moved = false;
  while (budget > 0) {
    if (const std::size_t placed = read_payload_in_place(peer); placed > 0) {
      budget -= std::min(budget, placed);
      moved = true;
    }
    std::span<const std::byte> bytes = peer.link->peek();
    if (bytes.empty()) break;
    bytes = bytes.first(std::min(bytes.size(), budget));
    budget -= bytes.size();
    moved = true;
    std::span<const std::byte> rest = bytes;
    Status status;
    while (!rest.empty() && status.ok() && peer.lost.ok()) {
      if (!peer.in.in_frame()) {
        status = read_header(peer, rest);
        continue;
      }
      const std::size_t payload = static_cast<std::size_t>(std::min<std::uint64_t>(rest.size(), peer.in.payload_left));
      take_payload(peer, rest.first(payload));
      rest = rest.subspan(payload);
      const std::size_t padding = std::min(rest.size(), peer.in.padding_left);
      peer.in.padding_left -= padding;
      rest = rest.subspan(padding);
      if (peer.in.payload_left == 0 && peer.in.padding_left == 0) status = end_frame(peer);
    }
    peer.link->consume(bytes.size());
    if (!peer.lost.ok()) return true;  // what came set something off that ended the trust in the peer
    if (!status.ok()) {
      lose(peer, status);
      return true;
    }
  }
  if (moved && !holds_bells_) ring(peer);
  return moved;
}

Status StreamTransport::read_header(Peer& peer, std::span<const std::byte>& bytes) {
  Incoming& in = peer.in;
  const std::size_t count = std::min(kFrameHeaderBytes - in.header_bytes, bytes.size());
  std::memcpy(in.encoded.data() + in.header_bytes, bytes.data(), count);
  in.header_bytes += count;
  bytes = bytes.subspan(count);
  if (!in.in_frame()) return {};
  Result<FrameHeader> header = decode_header(in.encoded);
  if (!header) return header.status();
  in.header = *header;
  return begin_frame(peer);
}

Status StreamTransport::begin_frame(Peer& peer) {
  Incoming& in = peer.in;
  const FrameHeader& header = in.header;
  if (header.sender != static_cast<std::uint32_t>(peer.rank)) {
    return Status::internal(fmt::format("a frame says that rank {} sent it", header.sender));
  }
  in.payload_left = payload_bytes(header);
  in.padding_left = padding_after(in.payload_left);
  in.discard = header.generation != settings_.generation;
  if (!in.discard) {
    if (header.kind == FrameKind::kControl || header.kind == FrameKind::kOffer) {
      in.buffered.reserve(static_cast<std::size_t>(in.payload_left));
    } else if (header.kind == FrameKind::kEager || header.kind == FrameKind::kBulk) {
      HVD_RETURN_IF_ERROR(begin_transfer(peer, key_of(header)));
    }
  }
  if (in.payload_left == 0 && in.padding_left == 0) return end_frame(peer);
  return {};
}

Status StreamTransport::begin_transfer(Peer& peer, const TransferKey& key) {
  Incoming& in = peer.in;
  const auto posted = peer.receives.find(key);
  if (posted != peer.receives.end()) {
    in.transfer = std::move(posted->second);
    peer.receives.erase(posted);
    if (in.transfer->bytes - in.transfer->delivered() == in.header.bytes) return {};
    in.transfer->complete(size_mismatch(peer.rank, in.header.bytes, in.transfer->bytes));
    in.transfer.reset();
    in.discard = true;
    return {};
  }
  if (peer.abandoned.erase(key) > 0) {
    in.discard = true;
    return {};
  }
  if (in.header.kind == FrameKind::kEager) {
    if (in.header.bytes > settings_.eager_limit_bytes) {
      return Status::internal(
          fmt::format("an eager frame of {} bytes; the limit is {}", in.header.bytes, settings_.eager_limit_bytes));
    }
    return {};
  }
  return Status::internal("it sent a payload that was not asked for");
}

void StreamTransport::take_payload(Peer& peer, std::span<const std::byte> piece) {
  Incoming& in = peer.in;
  in.payload_left -= piece.size();
  if (in.discard) return;
  if (in.transfer) {
    in.transfer->deliver(piece);
  } else {
    in.buffered.insert(in.buffered.end(), piece.begin(), piece.end());
  }
}

// A large payload that is only copied goes from the link to its place at once, where the link can do that.
std::size_t StreamTransport::read_payload_in_place(Peer& peer) {
  constexpr std::uint64_t worthwhile = 16 << 10;
  Incoming& in = peer.in;
  if (!in.transfer || in.payload_left < worthwhile || in.transfer->done() || in.transfer->arrival.combine != nullptr) {
    return 0;
  }
  const auto wanted = static_cast<std::size_t>(std::min<std::uint64_t>(in.payload_left, settings_.budget_bytes));
  const std::size_t count = peer.link->read_into({in.transfer->arrival.out + in.transfer->delivered(), wanted});
  in.transfer->skip(count);
  in.payload_left -= count;
  if (count > 0 && in.payload_left == 0 && in.padding_left == 0) {
    [[maybe_unused]] const Status never_fails = end_frame(peer);
  }
  return count;
}

Status StreamTransport::end_frame(Peer& peer) {
  // The state is reset first: what the frame sets off may come back here through the owner.
  Incoming in = std::exchange(peer.in, Incoming());
  if (in.discard) return {};
  switch (in.header.kind) {
    case FrameKind::kControl:
      return deliver_control(peer.rank, in.buffered, in.header.payload_crc);
    case FrameKind::kEager:
    case FrameKind::kBulk:
      if (in.transfer) {
        in.transfer->complete({});
      } else {
        peer.unexpected[key_of(in.header)] = std::move(in.buffered);
      }
      return {};
    case FrameKind::kCredit:
      send_credited(peer, key_of(in.header), in.header.bytes);
      return {};
    case FrameKind::kOffer:
      return take_offer(peer, in.header, in.buffered);
    case FrameKind::kTaken:
      if (const auto taken = peer.offered.find(key_of(in.header)); taken != peer.offered.end()) {
        const TransferRef transfer = std::move(taken->second);
        peer.offered.erase(taken);
        transfer->complete({});
      }
      return {};
    case FrameKind::kWithdrawn:
      // What has found its receive is answered when that has ended.
      if (peer.offers.erase(key_of(in.header)) > 0) queue_control(peer, FrameKind::kTaken, key_of(in.header), 0);
      return {};
    case FrameKind::kGoodbye:
      peer.left = true;  // it still reads: what is on its way out goes on, our own goodbye at the latest
      end_awaited(peer, lost_status(peer, Status::internal("it has left the job")));
      events().on_goodbye(peer.rank);
      return {};
  }
  return {};
}

// ---- life and death -------------------------------------------------------------------------------------------------

bool StreamTransport::progress() {
  wakeup_->refresh();
  if (blocks_ != nullptr && blocks_->waits_for_slot()) look_for_ended_readers();
  // Before anybody is found to have ended: what that one showed before counts.
  bool moved = blocks_ != nullptr && blocks_->deliver();
  for (Peer* peer : active_) {
    if (!peer->lost.ok()) continue;
    if (read(*peer)) moved = true;
    if (!peer->lost.ok()) continue;
    if (pull(*peer)) moved = true;
    if (!peer->lost.ok()) continue;
    if (write(*peer)) moved = true;
    if (const Status failure = peer->link->failure(); !failure.ok()) {
      lose(*peer, failure);
      moved = true;
    }
  }
  return moved;
}

void StreamTransport::ring() {
  for (Peer* peer : active_) {
    if (peer->lost.ok()) ring(*peer);
  }
}

// Bells were held: by now the peer may have come by itself, and sleep for another reason.
void StreamTransport::ring(Peer& peer) {
  if (std::exchange(peer.nudged, false) && blocks_->may_wait_for_this(peer.rank)) peer.link->nudge();
  peer.link->ring();
}

bool StreamTransport::arm() {
  holds_bells_ = false;
  ring();
  wakeup_->set_sleeping(true);
  // What is left to write, because a budget was used up, goes on now; only a link that is full wakes the sleeper.
  bool wrote = false;
  for (Peer* peer : active_) {
    if (peer->lost.ok() && write(*peer)) wrote = true;
  }
  if (wrote || (blocks_ != nullptr && blocks_->has_news())) return false;
  return std::none_of(active_.begin(), active_.end(),
                      [](Peer* peer) { return peer->lost.ok() && (!peer->pulls.empty() || peer->link->has_news()); });
}

void StreamTransport::disarm() { wakeup_->set_sleeping(false); }

Status StreamTransport::lost_status(const Peer& peer, const Status& cause) const {
  return Status::internal(fmt::format("rank {} is lost ({}): {}", peer.rank, settings_.name, cause.text()));
}

void StreamTransport::lose(Peer& peer, const Status& cause) { lose_as(peer, lost_status(peer, cause)); }

void StreamTransport::lose_as(Peer& peer, const Status& lost) {
  peer.lost = lost;
  if (blocks_ != nullptr && peer.link->peer_has_ended()) blocks_->gone(peer.rank);
  peer.link->close();  // a peer that lives must not wait for what this rank sends no more
  end_transfers(peer, peer.lost);
  if (!peer.left) events().on_peer_lost(peer.rank, peer.lost);
}

void StreamTransport::give_up(int rank, const Status& reason) {
  if (!has_peer(rank) || !peer_of(rank).lost.ok()) return;
  lose_as(peer_of(rank), reason);  // who saw it has said which rank, and how it showed
}

// Ends what waits for something that the peer would have to send.
void StreamTransport::end_awaited(Peer& peer, const Status& status) {
  std::vector<TransferRef> ended;
  for (auto& [key, transfer] : peer.receives) ended.push_back(transfer);
  for (auto& [key, transfer] : peer.sends_without_credit) ended.push_back(transfer);
  for (auto& [key, transfer] : peer.offered) ended.push_back(transfer);
  for (const Pull& pull : peer.pulls) ended.push_back(pull.transfer);
  if (peer.in.transfer) ended.push_back(peer.in.transfer);
  peer.receives.clear();
  peer.sends_without_credit.clear();
  peer.offered.clear();
  peer.offers.clear();
  peer.pulls.clear();
  if (blocks_ != nullptr) {
    blocks_->deliver();  // what it showed before
    blocks_->end(peer.rank, status);
  }
  for (const TransferRef& transfer : ended) transfer->complete(status);
}

void StreamTransport::end_transfers(Peer& peer, const Status& status) {
  end_awaited(peer, status);
  std::vector<TransferRef> ended;
  for (Outgoing& out : peer.data_out) {
    if (out.transfer) ended.push_back(out.transfer);
  }
  if (peer.current && peer.current->transfer) ended.push_back(peer.current->transfer);
  peer.data_out.clear();
  peer.control_out.clear();
  peer.current.reset();
  for (const TransferRef& transfer : ended) transfer->complete(status);
}

void StreamTransport::cancel(const TransferRef& transfer, const Status& status) {
  if (transfer->done()) return;
  Peer& peer = peer_of(transfer->peer);
  if (transfer->notice) {
    blocks_->cancel(transfer);
  } else if (transfer->direction == Transfer::Direction::kReceive) {
    if (peer.receives.erase(transfer->key) > 0) peer.abandoned.insert(transfer->key);
    if (std::erase_if(peer.pulls, [&](const Pull& pull) { return pull.transfer == transfer; }) > 0) {
      queue_control(peer, FrameKind::kTaken, transfer->key, 0);
    }
  } else {
    peer.sends_without_credit.erase(transfer->key);
    std::erase_if(peer.data_out, [&](const Outgoing& out) { return out.transfer == transfer; });
    if (peer.offered.contains(transfer->key)) queue_control(peer, FrameKind::kWithdrawn, transfer->key, 0);
  }
  transfer->complete(status);  // a frame that is half-way out keeps the transfer, and so its memory, until it is out
}

}  // namespace hvd
