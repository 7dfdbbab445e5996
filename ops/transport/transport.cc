#include "ops/transport/transport.h"

#include <fmt/format.h>

#include <utility>

#include "ops/transport/frame.h"

namespace hvd {
namespace {

void flip_one_bit(std::span<std::byte> message) {
  if (!message.empty()) message[message.size() / 2] ^= std::byte{0x10};
}

Status injected_fault(int peer) {
  return Status::internal(fmt::format("a fault was injected into a transfer with rank {} (HOROVOD_FAULT)", peer));
}

}  // namespace

bool Transport::passes(FaultPoint point, int peer, std::span<std::byte> message) {
  switch (fault_at(point, peer)) {
    case FaultAction::kDrop:
    case FaultAction::kFail:
      return false;
    case FaultAction::kCorrupt:
      flip_one_bit(message);
      break;
    case FaultAction::kPass:
      break;
  }
  return true;
}

void Transport::post(int peer, std::vector<std::byte> message) {
  const std::uint32_t crc = checksum(message);  // before the fault, which stands for one of the way
  if (!passes(FaultPoint::kControlSend, peer, message)) return;
  statistics_.control_messages_sent.add(1);
  statistics_.control_bytes_sent.add(static_cast<std::int64_t>(message.size()));
  do_post(peer, std::move(message), crc);
}

void Transport::start(const TransferRef& transfer) {
  const bool sends = transfer->direction == Transfer::Direction::kSend;
  switch (fault_at(sends ? FaultPoint::kSegmentSend : FaultPoint::kSegmentReceive, transfer->peer)) {
    case FaultAction::kDrop:
      return;
    case FaultAction::kFail:
      transfer->complete(injected_fault(transfer->peer));
      return;
    case FaultAction::kCorrupt:  // nothing would find it; a fault plan refuses it
    case FaultAction::kPass:
      break;
  }
  if (sends) statistics_.data_bytes_sent.add(static_cast<std::int64_t>(transfer->bytes));
  do_start(transfer);
}

Status Transport::show(std::span<const int> peers, BlockStage stage, std::size_t bytes) {
  bool vanishes = false;  // for all, since all look at the same
  for (const int peer : peers) {
    switch (fault_at(FaultPoint::kSegmentSend, peer)) {
      case FaultAction::kDrop:
        vanishes = true;
        break;
      case FaultAction::kFail:
        return injected_fault(peer);
      case FaultAction::kCorrupt:
      case FaultAction::kPass:
        break;
    }
  }
  statistics_.data_bytes_sent.add(static_cast<std::int64_t>(bytes));
  if (vanishes) return {};
  blocks()->show(stage);
  for (const int peer : peers) {
    if (blocks()->is_in_call(peer)) nudge(peer);
  }
  return {};
}

const std::byte* Transport::look_for(int peer, BlockStage stage) {
  return fault_ == nullptr ? blocks()->find(peer, stage) : nullptr;  // the hook is asked when a transfer starts
}

void Transport::leave_block(std::span<const int> peers) {
  blocks()->leave();
  for (const int peer : peers) {
    if (blocks()->wants_slot(peer)) nudge(peer);
  }
}

Status Transport::deliver_control(int peer, std::span<std::byte> message, std::uint32_t crc) {
  if (!passes(FaultPoint::kControlReceive, peer, message)) return {};
  if (checksum(message) != crc) return Status::internal("a control message has a wrong checksum");
  events_->on_control(peer, message);
  return {};
}

}  // namespace hvd
