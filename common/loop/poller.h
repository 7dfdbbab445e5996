// Where a loop sleeps. The product sleeps in epoll_wait; tests sleep in virtual time.
#pragma once

#include <atomic>
#include <mutex>

#include <horovod_cpp/status.h>

#include "common/clock.h"
#include "common/unique_fd.h"

namespace hvd {

class Poller {
 public:
  virtual ~Poller() = default;
  /// Makes `fd` becoming readable end a wait. The caller keeps the descriptor open while it is watched.
  virtual Status watch(int fd) = 0;
  virtual void unwatch(int fd) = 0;
  /// Sleeps until a watched descriptor is readable, `wake` was called, or `deadline` came. One thread at a time.
  virtual void wait(TimePoint deadline) = 0;
  /// Ends the current or the next wait. Any thread.
  virtual void wake() = 0;
  /// Ends the current or the next wait `delay` from now, if nothing ends it before; of several calls the first counts.
  /// A poller that knows no delay ends it at once. Any thread.
  virtual void wake_later(Duration /*delay*/) { wake(); }
  /// Takes `wake_later` back. Who calls it looks afterwards whether there is anything to be woken for. Any thread.
  virtual void cancel_wake_later() {}
  /// Turns a `wake_later` that is to come into a `wake`; nothing otherwise. Any thread.
  virtual void hurry() {}
};

class EpollPoller final : public Poller {
 public:
  /// Fails when the process has run out of descriptors.
  static Result<std::unique_ptr<EpollPoller>> create(const Clock& clock);

  Status watch(int fd) override;
  void unwatch(int fd) override;
  void wait(TimePoint deadline) override;
  void wake() override;
  void wake_later(Duration delay) override;
  void cancel_wake_later() override;
  void hurry() override;

 private:
  EpollPoller(const Clock& clock, UniqueFd epoll, UniqueFd wake_event, UniqueFd timer);

  const Clock& clock_;
  UniqueFd epoll_;
  UniqueFd wake_event_;
  UniqueFd timer_;  // of wake_later
  std::mutex changing_timer_;
  std::atomic<bool> timer_set_{false};
  std::atomic<bool> wake_pending_{false};  // spares the system call when a wake-up is already on its way
};

}  // namespace hvd
