// The thread that drives an engine, and the threads that wait for it. The thread sleeps without the Turn; a waiter that
// finds it free drives the engine itself for as long as things move, which saves two wake-ups on a synchronous call.
//
// Where all ranks share one host and none has a core to spare, the thread could only take time from computing: data
// moves by copying, which no network does for it. There it lets new work lie until somebody waits for it, or asks for
// it, or a peer does, or kPatienceOnFullHost has passed.
#pragma once

#include <atomic>
#include <span>
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

  /// Something was handed to the runtime: wakes the thread if it sleeps; `at_once` also where it would let it lie.
  void notify(bool at_once = false);
  /// Somebody asks whether an operation is done: what lies is begun.
  void hurry();
  /// Waits until all operations are done or `deadline` came; returns whether they are done. Drives the engine meanwhile
  /// when no other waiter does.
  bool wait(std::span<HandleState* const> handles, TimePoint deadline);
  bool wait(HandleState& handle, TimePoint deadline) {
    HandleState* const awaited = &handle;
    return wait({&awaited, 1}, deadline);
  }
  /// Asks for the end of the job and waits for it; bounded by Options::shutdown_timeout. True: it has ended, and no
  /// thread steps the runtime any more. One thread at a time.
  bool shut_down();
  /// Processor time of the thread so far.
  Duration cpu_time() const;
  std::int64_t wakeups() const { return wakeups_.load(std::memory_order_relaxed); }

 private:
  void run(const std::stop_token& stop);
  bool work_and_prepare_to_sleep(const std::stop_token& stop);
  TimePoint work(const std::stop_token& stop);
  bool take_turn(std::span<HandleState* const> handles);
  bool drive(std::span<HandleState* const> handles, TimePoint deadline);

  Runtime& runtime_;
  Poller& poller_;
  const bool crowded_;    // more ranks than cores
  const bool full_host_;  // all ranks are here, and no core is left for this thread
  const Duration spin_time_;
  Turn turn_;
  bool left_for_waiter_ = false;  // the thread's own: it stopped working because a waiter wants the Turn
  std::atomic<bool> asleep_{false};
  std::atomic<TimePoint> sleeps_until_{kNever};
  std::atomic<int> wanting_{0};  // threads that want the Turn from this one
  std::atomic<int> waiters_{0};  // threads that sleep until a handle is done
  std::atomic<std::int64_t> wakeups_{0};
  HandleState ended_;  // done when the thread has ended
  std::jthread thread_;
};

}  // namespace hvd
