#include <fmt/format.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <optional>

#include "common/check.h"
#include "common/loop/poller.h"

namespace hvd {
namespace {

Status errno_status(const char* what) {
  return Status::internal(fmt::format("{} failed: {}", what, std::strerror(errno)));
}

Status add_to(int epoll, int fd) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.fd = fd;
  if (::epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) != 0) return errno_status("epoll_ctl");
  return {};
}

// epoll_pwait2 takes nanoseconds: transports that have to be asked repeatedly need naps far below a millisecond.
std::optional<timespec> time_until(TimePoint deadline, TimePoint now) {
  if (deadline == kNever) return std::nullopt;
  const Duration left = std::max(Duration::zero(), deadline - now);
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(left);
  return timespec{seconds.count(), (left - seconds).count()};
}

// Readable once, after `delay`; zero: never.
void set_timer(int timer, Duration delay) {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(delay);
  const itimerspec when{{}, {seconds.count(), (delay - seconds).count()}};
  ::timerfd_settime(timer, 0, &when, nullptr);
}

}  // namespace

Result<std::unique_ptr<EpollPoller>> EpollPoller::create(const Clock& clock) {
  UniqueFd epoll(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll) return errno_status("epoll_create1");
  UniqueFd wake_event(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!wake_event) return errno_status("eventfd");
  HVD_RETURN_IF_ERROR(add_to(epoll.get(), wake_event.get()));
  UniqueFd timer(::timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC));
  if (!timer) return errno_status("timerfd_create");
  HVD_RETURN_IF_ERROR(add_to(epoll.get(), timer.get()));
  return std::unique_ptr<EpollPoller>(
      new EpollPoller(clock, std::move(epoll), std::move(wake_event), std::move(timer)));
}

EpollPoller::EpollPoller(const Clock& clock, UniqueFd epoll, UniqueFd wake_event, UniqueFd timer)
    : clock_(clock), epoll_(std::move(epoll)), wake_event_(std::move(wake_event)), timer_(std::move(timer)) {}

Status EpollPoller::watch(int fd) { return add_to(epoll_.get(), fd); }

void EpollPoller::unwatch(int fd) { ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr); }

void EpollPoller::wait(TimePoint deadline) {
  std::array<epoll_event, 16> events;
  const std::optional<timespec> timeout = time_until(deadline, clock_.now());
  const int count = ::epoll_pwait2(epoll_.get(), events.data(), static_cast<int>(events.size()),
                                   timeout ? &*timeout : nullptr, nullptr);
  for (int i = 0; i < count; ++i) {
    if (events[static_cast<std::size_t>(i)].data.fd != wake_event_.get()) continue;
    std::uint64_t rings = 0;
    [[maybe_unused]] const ssize_t got = ::read(wake_event_.get(), &rings, sizeof rings);
    // release: pairs with the exchange in wake(); what was posted before that wake is seen after this wait
    wake_pending_.exchange(false);
  }
  cancel_wake_later();
}

void EpollPoller::wake() {
  if (wake_pending_.exchange(true)) return;
  const std::uint64_t ring = 1;
  [[maybe_unused]] const ssize_t put = ::write(wake_event_.get(), &ring, sizeof ring);
}

void EpollPoller::wake_later(Duration delay) {
  const std::scoped_lock lock(changing_timer_);
  if (!timer_set_.exchange(true)) set_timer(timer_.get(), std::max(delay, Duration(1)));
}

void EpollPoller::cancel_wake_later() {
  if (!timer_set_.load()) return;
  const std::scoped_lock lock(changing_timer_);
  if (timer_set_.exchange(false)) set_timer(timer_.get(), Duration::zero());
}

void EpollPoller::hurry() {
  if (timer_set_.load()) wake();
}

}  // namespace hvd
