// The thread that drives an engine, and the threads that wait for it. The thread sleeps without the Turn; a waiter that
// finds it free drives the engine itself for as long as things move, which saves two wake-ups on a synchronous call.
#pragma once

#include <atomic>
#include <thread>

#include "common/loop/poller.h"
#include "horovod_cpp/engine/runtime.h"
#include "horovod_cpp/engine/turn.h"

namespace hvd {

class BackgroundLoop {
 public:
  /// Starts the thread. `runtime` and `poller` outlive this object.
  BackgroundLoop(Runtime& runtime, Poller& poller);
  /// Ends the thread at once, whatever is in flight; `shut_down` first for a farewell.
  ~BackgroundLoop();
  BackgroundLoop(const BackgroundLoop&) = delete;
  BackgroundLoop& operator=(const BackgroundLoop&) = delete;

  // Any thread.

  /// Something was handed to the runtime: wakes the thread if it sleeps.
  void notify();
  /// Waits until the operation is done or `deadline` came; returns whether it is done. Drives the engine meanwhile
  /// when nobody else does.
  bool wait(HandleState& handle, TimePoint deadline);
  /// Asks for the end of the job and waits for it; bounded by Options::shutdown_timeout.
  void shut_down();
  /// Processor time of the thread so far.
  Duration cpu_time() const;
  std::int64_t wakeups() const { return wakeups_.load(std::memory_order_relaxed); }

 private:
  void run(const std::stop_token& stop);
  TimePoint work(const std::stop_token& stop);
  bool drive(HandleState& handle, TimePoint deadline);

  Runtime& runtime_;
  Poller& poller_;
  const bool crowded_;
  const Duration spin_time_;
  Turn turn_;
  std::atomic<bool> asleep_{false};
  std::atomic<TimePoint> sleeps_until_{kNever};
  std::atomic<int> waiters_{0};  // threads that sleep until a handle is done
  std::atomic<std::int64_t> wakeups_{0};
  HandleState ended_;  // done when the thread has ended
  std::jthread thread_;
};

}  // namespace hvd
