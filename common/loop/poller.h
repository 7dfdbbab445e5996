// Where a loop sleeps. The product sleeps in epoll_wait; tests sleep in virtual time.
#pragma once

#include <atomic>

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
};

class EpollPoller final : public Poller {
 public:
  /// Fails when the process has run out of descriptors.
  static Result<std::unique_ptr<EpollPoller>> create(const Clock& clock);

  Status watch(int fd) override;
  void unwatch(int fd) override;
  void wait(TimePoint deadline) override;
  void wake() override;

 private:
  EpollPoller(const Clock& clock, UniqueFd epoll, UniqueFd wake_event);

  const Clock& clock_;
  UniqueFd epoll_;
  UniqueFd wake_event_;
  std::atomic<bool> wake_pending_{false};  // spares the system call when a wake-up is already on its way
};

}  // namespace hvd
