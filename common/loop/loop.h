// The ready queue and the timers of one rank: who is resumed next, and when to look again.
// Runs under the Turn; knows nothing of transports, ranks or tensors.
#pragma once

#include <coroutine>
#include <cstdint>
#include <functional>
#include <map>
#include <queue>
#include <unordered_map>
#include <vector>

#include "common/clock.h"
#include "common/loop/task.h"

namespace hvd {

/// Smaller is more urgent. A collective's priority is its place in the agreed order.
using Priority = std::uint64_t;

class Loop {
 public:
  using TimerId = std::uint64_t;

  explicit Loop(const Clock& clock) : clock_(clock) {}
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;
  /// Destroys the frames of tasks that have not finished.
  ~Loop();

  TimePoint now() const { return clock_.now(); }

  /// Starts `task` at once, on the caller's stack, and keeps it until it has finished. It must not throw.
  void spawn(Task<void> task);

  /// Resumes `coroutine` in a later `run_ready`.
  void make_ready(std::coroutine_handle<> coroutine, Priority priority);

  /// Calls `callback` once, in the first `run_timers` at or after `when`.
  TimerId call_at(TimePoint when, std::function<void()> callback);
  void cancel_timer(TimerId id);
  /// Resumes `coroutine` in a `run_ready` at or after `when`, or after `wake_sleepers`.
  void sleep_until(TimePoint when, std::coroutine_handle<> coroutine, Priority priority);
  /// Makes all that sleep ready, whatever they sleep for: they are to look whether they are still wanted. Returns how
  /// many.
  int wake_sleepers();

  /// Resumes up to `limit` ready coroutines, most urgent first. Returns how many.
  int run_ready(int limit);
  /// Runs the timers that are due. Returns how many.
  int run_timers();

  bool has_ready() const { return !ready_.empty(); }
  /// When the next timer is due; kNever without one.
  TimePoint next_timer() const { return timers_.empty() ? kNever : timers_.begin()->first; }
  /// Tasks that were spawned and have not finished.
  std::size_t unfinished() const { return tasks_.size(); }

 private:
  struct Ready {
    Priority priority;
    std::uint64_t order;  // first come, first served within a priority
    std::coroutine_handle<> coroutine;
    bool operator>(const Ready& other) const {
      return priority != other.priority ? priority > other.priority : order > other.order;
    }
  };
  struct Sleeper {
    std::coroutine_handle<> coroutine;
    Priority priority;
    TimerId timer;
  };
  struct Root;  // the coroutine that owns a spawned task
  friend struct Root;

  static Root run_root(Loop& loop, std::uint64_t id, Task<void> task);

  const Clock& clock_;
  std::uint64_t next_order_ = 0;
  std::uint64_t next_id_ = 1;
  std::priority_queue<Ready, std::vector<Ready>, std::greater<>> ready_;
  std::multimap<TimePoint, TimerId> timers_;
  struct Timer {
    std::multimap<TimePoint, TimerId>::iterator place;
    std::function<void()> callback;
  };
  std::unordered_map<TimerId, Timer> timer_callbacks_;
  std::vector<Sleeper> sleepers_;
  std::unordered_map<std::uint64_t, std::coroutine_handle<>> tasks_;
};

}  // namespace hvd
