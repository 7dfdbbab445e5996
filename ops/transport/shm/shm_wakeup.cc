#include "ops/transport/shm/shm_wakeup.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

namespace hvd {
namespace {

// Reading the clock costs as much as looking at a few rings.
constexpr int kCallsPerClock = 16;
constexpr Duration kLookInterval = std::chrono::milliseconds(1);

Status errno_status(const char* what) {
  return Status::unavailable(fmt::format("{} failed: {}", what, std::strerror(errno)));
}

Status add_to(int epoll, int fd, std::uint32_t events, ShmPeer* peer) {
  epoll_event event{};
  event.events = events;
  event.data.ptr = peer;
  if (::epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) != 0) return errno_status("epoll_ctl");
  return {};
}

}  // namespace

bool is_readable(const UniqueFd& fd) {
  pollfd place{fd.get(), POLLIN, 0};
  return fd && ::poll(&place, 1, 0) == 1;
}

Result<std::unique_ptr<ShmWakeup>> ShmWakeup::create(std::size_t slot_bytes) {
  UniqueFd epoll(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll) return errno_status("epoll_create1");
  UniqueFd doorbell(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!doorbell) return errno_status("eventfd");
  HVD_RETURN_IF_ERROR(add_to(epoll.get(), doorbell.get(), EPOLLIN, nullptr));
  Result<UniqueFd> file = create_memory_file("horovod_cpp presence", hvd::presence_bytes(slot_bytes));
  if (!file) return file.status();
  Result<SharedMapping> presence = SharedMapping::map(file->get(), hvd::presence_bytes(slot_bytes));
  if (!presence) return presence.status();
  return std::unique_ptr<ShmWakeup>(
      new ShmWakeup(std::move(epoll), std::move(doorbell), std::move(*file), std::move(*presence)));
}

ShmWakeup::ShmWakeup(UniqueFd epoll, UniqueFd doorbell, UniqueFd presence_file, SharedMapping presence)
    : epoll_(std::move(epoll)),
      doorbell_(std::move(doorbell)),
      presence_file_(std::move(presence_file)),
      presence_(std::move(presence)),
      shown_(*std::construct_at(reinterpret_cast<ShmPresence*>(presence_.bytes().data()))) {
  std::construct_at(reinterpret_cast<BlockWords*>(block().data()));
}

Status ShmWakeup::watch(ShmPeer& peer) {
  if (peer.process) HVD_RETURN_IF_ERROR(add_to(epoll_.get(), peer.process.get(), EPOLLIN, &peer));
  // Only its end matters: nothing is sent on the socket any more.
  return add_to(epoll_.get(), peer.socket.get(), EPOLLRDHUP, &peer);
}

void ShmWakeup::unwatch(const ShmPeer& peer) {
  // By hand, since closing is not enough where a forked child holds copies.
  if (peer.process) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, peer.process.get(), nullptr);
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, peer.socket.get(), nullptr);
}

const ShmPeer& ShmWakeup::keep(std::unique_ptr<ShmPeer> peer) {
  peers_.push_back(std::move(peer));
  return *peers_.back();
}

void ShmWakeup::set_sleeping(bool sleeping) {
  const bool asleep = sleep_ % 2 != 0;
  if (!sleeping && !asleep) return;
  sleep_ += sleeping && asleep ? 2 : 1;
  shown_.sleeps.store(sleep_);
  // Most sleeps end before they have begun, when a waiter comes: they need no system call. What else may have woken the
  // sleeper, the end of a peer, is seen within the interval.
  if (const std::uint64_t rings = shown_.rings.load(); rings != rings_answered_) {
    rings_answered_ = rings;
    must_look_ = true;
  }
  calls_until_clock_ = 0;
}

void ShmWakeup::refresh() {
  if (!must_look_) {
    if (calls_until_clock_-- > 0) return;
    calls_until_clock_ = kCallsPerClock;
    if (std::chrono::steady_clock::now() < next_look_) return;
  }
  look();
}

void ShmWakeup::look() {
  must_look_ = false;
  next_look_ = std::chrono::steady_clock::now() + kLookInterval;
  std::array<epoll_event, 16> events;
  const int count = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), /*timeout=*/0);
  for (int i = 0; i < count; ++i) {
    const epoll_event& event = events[static_cast<std::size_t>(i)];
    if (event.data.ptr == nullptr) {
      std::uint64_t rings = 0;
      [[maybe_unused]] const ssize_t got = ::read(doorbell_.get(), &rings, sizeof rings);
    } else {
      take_leave(*static_cast<ShmPeer*>(event.data.ptr), (event.events & EPOLLIN) != 0);
    }
  }
}

void ShmWakeup::take_leave(ShmPeer& peer, bool ended) {
  if (peer.gone) return;
  peer.gone = true;
  peer.ended = ended || is_readable(peer.process);
  unwatch(peer);
}

}  // namespace hvd
