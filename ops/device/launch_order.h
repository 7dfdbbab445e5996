// Calls put their work in line one after the other, in the order in which they came: work on devices has to begin in
// one order on all ranks. Runs under the Turn.
#pragma once

#include <coroutine>
#include <deque>
#include <utility>

#include "common/loop/loop.h"

namespace hvd {

class LaunchOrder {
 public:
  explicit LaunchOrder(Loop& loop) : loop_(loop) {}
  LaunchOrder(const LaunchOrder&) = delete;
  LaunchOrder& operator=(const LaunchOrder&) = delete;

  /// `co_await order.enter(priority)`: until all that entered before have left. Then it is the caller's until `leave`.
  auto enter(Priority priority) {
    struct Awaiter {
      bool await_ready() const noexcept { return !std::exchange(order.busy_, true); }
      void await_suspend(std::coroutine_handle<> coroutine) { order.waiting_.push_back({coroutine, priority}); }
      void await_resume() const noexcept {}
      LaunchOrder& order;
      Priority priority;
    };
    return Awaiter{*this, priority};
  }
  void leave() {
    if (waiting_.empty()) {
      busy_ = false;
      return;
    }
    const Waiting next = waiting_.front();
    waiting_.pop_front();
    loop_.make_ready(next.coroutine, next.priority);
  }

 private:
  struct Waiting {
    std::coroutine_handle<> coroutine;
    Priority priority;
  };
  Loop& loop_;
  bool busy_ = false;
  std::deque<Waiting> waiting_;
};

}  // namespace hvd
