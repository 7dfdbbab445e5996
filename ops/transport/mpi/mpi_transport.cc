#include "ops/transport/mpi/mpi_transport.h"

#include <fmt/format.h>

#include <cstring>
#include <limits>

#include "common/check.h"

namespace hvd {
namespace {

std::vector<std::byte> message_of(const MpiAnnouncement& announcement, std::span<const std::byte> payload) {
  const EncodedAnnouncement head = encode(announcement);
  std::vector<std::byte> message(head.size() + payload.size());
  std::memcpy(message.data(), head.data(), head.size());
  if (!payload.empty()) std::memcpy(message.data() + head.size(), payload.data(), payload.size());
  return message;
}

}  // namespace

MpiTransport::MpiTransport(MpiEndpoint& endpoint, MpiLife life, MpiLimits limits)
    : endpoint_(endpoint), life_(life), limits_(limits) {
  HVD_CHECK(limits.inline_bytes <= kMpiMailBytes - kMpiAnnouncementBytes);
  HVD_CHECK(limits.piece_bytes > 0 && limits.piece_bytes <= std::numeric_limits<int>::max());
  endpoint_.open(life_, *this);
}

MpiTransport::~MpiTransport() {
  if (endpoint_.finalized()) return;  // a result that a user keeps has kept the job's memory, and this with it
  for (const auto& [name, announced] : announced_) drop(announced.announcement);
  endpoint_.close(life_);
}

void MpiTransport::do_post(int /*peer*/, std::vector<std::byte> /*message*/, std::uint32_t /*crc*/) {
  HVD_CHECK(false && "control messages do not travel over MPI");
}

void MpiTransport::do_start(const TransferRef& transfer) {
  if (!failed_.ok()) {
    transfer->complete(failed_);
  } else if (transfer->direction == Transfer::Direction::kSend) {
    start_send(transfer);
  } else {
    start_receive(transfer);
  }
}

void MpiTransport::start_send(const TransferRef& transfer) {
  MpiAnnouncement announcement;
  announcement.life = life_;
  announcement.sender = endpoint_.rank();
  announcement.key = transfer->key;
  announcement.bytes = transfer->bytes;
  MpiMover& mover = endpoint_.mover();
  if (transfer->bytes <= limits_.inline_bytes) {
    announcement.carries_payload = true;
    transfer->complete(mover.mail(life_, transfer->peer, message_of(announcement, {transfer->data, transfer->bytes})));
    return;
  }
  const Result<int> tag = mover.lease_tag(transfer->peer);
  if (!tag) {
    transfer->complete(tag.status());
    return;
  }
  announcement.tag = tag.value();
  announcement.piece_bytes = limits_.piece_bytes;
  if (const Status status = mover.mail(life_, transfer->peer, message_of(announcement, {})); !status.ok()) {
    transfer->complete(status);
    return;
  }
  mover.send(life_, transfer, announcement.tag, announcement.piece_bytes);
}

void MpiTransport::start_receive(const TransferRef& transfer) {
  const Name name{transfer->peer, transfer->key};
  const auto found = announced_.find(name);
  if (found == announced_.end()) {
    HVD_CHECK(receives_.emplace(name, transfer).second);
    return;
  }
  const Announced announced = std::move(found->second);
  announced_.erase(found);
  fill(transfer, announced.announcement, announced.payload);
}

void MpiTransport::on_announcement(const MpiAnnouncement& announcement, std::span<const std::byte> payload) {
  const Name name{announcement.sender, announcement.key};
  if (abandoned_.erase(name) > 0) {
    drop(announcement);
    return;
  }
  const auto found = receives_.find(name);
  if (found == receives_.end()) {
    if (!announced_.emplace(name, Announced{announcement, {payload.begin(), payload.end()}}).second) {
      drop(announcement);
      on_failure(Status::internal(fmt::format("rank {} announced one transfer twice (channel {}/{}, number {}, mpi)",
                                              announcement.sender, announcement.key.process_set,
                                              announcement.key.channel, announcement.key.sequence)));
    }
    return;
  }
  const TransferRef transfer = std::move(found->second);
  receives_.erase(found);
  fill(transfer, announcement, payload);
}

void MpiTransport::fill(const TransferRef& transfer, const MpiAnnouncement& announcement,
                        std::span<const std::byte> payload) {
  if (announcement.bytes != transfer->bytes) {
    drop(announcement);
    transfer->complete(Status::internal(fmt::format("rank {} sent {} bytes where this rank expects {} (mpi)",
                                                    announcement.sender, announcement.bytes, transfer->bytes)));
  } else if (announcement.carries_payload) {
    transfer->deliver(payload);
    transfer->complete({});
  } else {
    endpoint_.mover().receive(transfer, announcement);
  }
}

void MpiTransport::drop(const MpiAnnouncement& announcement) {
  if (!announcement.carries_payload) endpoint_.mover().swallow(announcement);
}

void MpiTransport::cancel(const TransferRef& transfer, const Status& status) {
  if (transfer->done()) return;
  transfer->complete(status);
  if (transfer->direction == Transfer::Direction::kSend) return;  // goes on behind the scenes, its memory kept alive
  const Name name{transfer->peer, transfer->key};
  const auto found = receives_.find(name);
  if (found != receives_.end() && found->second == transfer) {
    receives_.erase(found);
    abandoned_.insert(name);
  } else {
    endpoint_.mover().detach(transfer);
  }
}

void MpiTransport::on_failure(const Status& status) {
  failed_ = status;
  for (auto& [name, transfer] : std::exchange(receives_, {})) transfer->complete(status);
}

bool MpiTransport::needs_polling() const { return !receives_.empty() || endpoint_.mover().wanted(life_); }

bool MpiTransport::flushed() const { return endpoint_.mover().flushed(life_); }

}  // namespace hvd
