// Suspends a coroutine for a while: `co_await Sleep(loop, duration, priority)`.
// Runs under the Turn. A coroutine that sleeps is destroyed with its loop alone.
#pragma once

#include "common/loop/loop.h"

namespace hvd {

class Sleep {
 public:
  Sleep(Loop& loop, Duration duration, Priority priority) : loop_(loop), duration_(duration), priority_(priority) {}

  bool await_ready() const noexcept { return false; }
  void await_suspend(std::coroutine_handle<> coroutine) {
    loop_.sleep_until(loop_.now() + duration_, coroutine, priority_);
  }
  void await_resume() const noexcept {}

 private:
  Loop& loop_;
  Duration duration_;
  Priority priority_;
};

}  // namespace hvd
