#include "ops/transport/mpi/mpi_endpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "common/check.h"
#include "ops/transport/mpi/mpi_text.h"
#include "ops/transport/mpi/mpi_wait.h"

namespace hvd {

MpiEndpoint::MpiEndpoint(const MpiApi& api, int rank, int size, int largest_tag)
    : api_(api), rank_(rank), size_(size), mover_(api, size, largest_tag) {}

void MpiEndpoint::resume() {
  if (receiving_) return;
  receiving_ = true;
  next_ = 0;
  for (Slot& slot : slots_) {
    if (failed_.ok()) failed_ = post_slot(slot);
  }
}

void MpiEndpoint::stop() {
  if (!receiving_) return;
  receiving_ = false;
  if (!failed_.ok()) return;
  for (Slot& slot : slots_) static_cast<void>(api_.cancel(&slot.request));
  for (std::size_t i = 0; i < slots_.size() && failed_.ok(); ++i) {
    if (!stop_slot(slots_[(next_ + i) % slots_.size()])) {
      fail(Status::internal("MPI does not give a receive back"));
    }
  }
}

// The cancellation may have come too late for the slots in front: they hold messages.
bool MpiEndpoint::stop_slot(Slot& slot) {
  MpiOutcome outcome{};
  int finished = 0;
  const auto ended = [&] { return api_.test(&slot.request, 1, &outcome, &finished) != 0 || finished == 1; };
  const TimePoint limit = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
  if (!wait_for_mpi(limit, ended)) return false;
  if (finished == 0 || outcome.cancelled != 0) return true;
  if (const Status status = take_message(outcome, slot.message); !status.ok()) fail(status);
  return true;
}

Status MpiEndpoint::post_slot(Slot& slot) {
  const int error = api_.receive(slot.message.data(), slot.message.size(), kMpiAnySource, kMpiMailTag, &slot.request);
  if (error == 0) return {};
  return Status::internal(fmt::format("MPI cannot receive any more: {}", mpi_error_text(api_, error)));
}

void MpiEndpoint::open(MpiLife life, Receiver& receiver) {
  HVD_CHECK(open_.emplace(life, &receiver).second);
  newest_ = std::max(newest_, life);
  if (!failed_.ok()) receiver.on_failure(failed_);
  for (const Early& early : std::exchange(early_, {})) dispatch(early.announcement, early.payload);
}

void MpiEndpoint::close(MpiLife life) {
  open_.erase(life);
  mover_.detach(life);
}

bool MpiEndpoint::finalized() const {
  int finalized = 0;
  return api_.finalized(&finalized) != 0 || finalized != 0;
}

bool MpiEndpoint::progress() {
  const bool received = receiving_ && failed_.ok() && take_mail();
  const bool moved = mover_.progress();
  return received || moved;
}

bool MpiEndpoint::take_mail() {
  bool received = false;
  // One round at most, so that a talkative peer cannot keep this rank here.
  for (std::size_t taken = 0; taken < slots_.size(); ++taken) {
    Slot& slot = slots_[next_];
    MpiOutcome outcome{};
    int finished = 0;
    const int error = api_.test(&slot.request, 1, &outcome, &finished);
    if (error == 0 && finished == 0) break;
    received = true;
    if (error != 0) outcome.error = error;
    Status status = take_message(outcome, slot.message);
    if (status.ok()) status = post_slot(slot);
    if (!status.ok()) {
      fail(status);
      break;
    }
    next_ = (next_ + 1) % slots_.size();
  }
  return received;
}

Status MpiEndpoint::take_message(const MpiOutcome& outcome, std::span<const std::byte> message) {
  if (outcome.error != 0) {
    return Status::internal(fmt::format("MPI failed to receive: {}", mpi_error_text(api_, outcome.error)));
  }
  message = message.first(static_cast<std::size_t>(outcome.bytes));
  const Result<MpiAnnouncement> announcement = decode_announcement(message, outcome.source);
  if (!announcement) {
    return Status::internal(fmt::format("rank {} (mpi): {}", outcome.source, announcement.status().text()));
  }
  dispatch(announcement.value(), message.subspan(kMpiAnnouncementBytes));
  return {};
}

void MpiEndpoint::dispatch(const MpiAnnouncement& announcement, std::span<const std::byte> payload) {
  if (const auto found = open_.find(announcement.life); found != open_.end()) {
    found->second->on_announcement(announcement, payload);
  } else if (announcement.life > newest_) {  // the sender is ahead: this rank is still making its transport
    early_.push_back({announcement, {payload.begin(), payload.end()}});
  } else if (!announcement.carries_payload) {
    mover_.swallow(announcement);
  }
}

void MpiEndpoint::fail(const Status& status) {
  failed_ = status;
  for (const auto& [life, receiver] : open_) receiver->on_failure(status);
}

}  // namespace hvd
