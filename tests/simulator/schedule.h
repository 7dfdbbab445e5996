// Virtual time: a clock that stands still, and the list of what happens next. One thread.
#pragma once

#include <cstdint>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

#include "common/clock.h"

namespace hvd::simulator {

class VirtualClock final : public Clock {
 public:
  TimePoint now() const override { return now_; }
  void set(TimePoint now) { now_ = now; }

 private:
  TimePoint now_{std::chrono::seconds(1)};
};

/// What happens at one instant happens in the order in which it was planned.
class Schedule {
 public:
  explicit Schedule(VirtualClock& clock) : clock_(clock) {}

  TimePoint now() const { return clock_.now(); }
  bool empty() const { return events_.empty(); }
  std::uint64_t events_run() const { return events_run_; }

  void at(TimePoint when, std::function<void()> action) {
    events_.push({std::max(when, now()), next_order_++, std::move(action)});
  }
  void after(Duration delay, std::function<void()> action) { at(now() + delay, std::move(action)); }

  void run_next() {
    // The action may plan further events, so it leaves the queue before it runs.
    const std::function<void()> action = std::move(const_cast<Event&>(events_.top()).action);
    clock_.set(events_.top().when);
    events_.pop();
    ++events_run_;
    action();
  }

 private:
  struct Event {
    TimePoint when;
    std::uint64_t order;
    std::function<void()> action;
    bool operator>(const Event& other) const { return when != other.when ? when > other.when : order > other.order; }
  };

  VirtualClock& clock_;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
  std::uint64_t next_order_ = 0;
  std::uint64_t events_run_ = 0;
};

}  // namespace hvd::simulator
