#include "common/loop/loop.h"

#include <exception>
#include <utility>

#include "common/check.h"

namespace hvd {

struct Loop::Root {
  struct promise_type {
    Root get_return_object() { return {std::coroutine_handle<promise_type>::from_promise(*this)}; }
    std::suspend_always initial_suspend() noexcept { return {}; }
    std::suspend_never final_suspend() noexcept { return {}; }  // frees its own frame
    void return_void() {}
    void unhandled_exception() { std::terminate(); }  // spawn() asks for tasks that do not throw
  };
  std::coroutine_handle<promise_type> handle;
};

Loop::Root Loop::run_root(Loop& loop, std::uint64_t id, Task<void> task) {
  co_await std::move(task);
  loop.tasks_.erase(id);
}

Loop::~Loop() {
  for (auto& [id, frame] : tasks_) frame.destroy();
}

void Loop::spawn(Task<void> task) {
  const std::uint64_t id = next_id_++;
  const Root root = run_root(*this, id, std::move(task));
  tasks_.emplace(id, root.handle);
  root.handle.resume();
}

void Loop::make_ready(std::coroutine_handle<> coroutine, Priority priority) {
  ready_.push({priority, next_order_++, coroutine});
}

Loop::TimerId Loop::call_at(TimePoint when, std::function<void()> callback) {
  const TimerId id = next_id_++;
  timer_callbacks_.emplace(id, Timer{timers_.emplace(when, id), std::move(callback)});
  return id;
}

void Loop::cancel_timer(TimerId id) {
  const auto found = timer_callbacks_.find(id);
  if (found == timer_callbacks_.end()) return;
  timers_.erase(found->second.place);
  timer_callbacks_.erase(found);
}

void Loop::sleep_until(TimePoint when, std::coroutine_handle<> coroutine, Priority priority) {
  const TimerId timer = call_at(when, [this, coroutine, priority] {
    std::erase_if(sleepers_, [&](const Sleeper& one) { return one.coroutine == coroutine; });
    make_ready(coroutine, priority);
  });
  sleepers_.push_back({coroutine, priority, timer});
}

int Loop::wake_sleepers() {
  const std::vector<Sleeper> woken = std::exchange(sleepers_, {});
  for (const Sleeper& sleeper : woken) {
    cancel_timer(sleeper.timer);
    make_ready(sleeper.coroutine, sleeper.priority);
  }
  return static_cast<int>(woken.size());
}

int Loop::run_ready(int limit) {
  int resumed = 0;
  while (resumed < limit && !ready_.empty()) {
    const std::coroutine_handle<> coroutine = ready_.top().coroutine;
    ready_.pop();
    ++resumed;
    coroutine.resume();
  }
  return resumed;
}

int Loop::run_timers() {
  if (timers_.empty()) return 0;
  const TimePoint now = clock_.now();
  int ran = 0;
  while (!timers_.empty() && timers_.begin()->first <= now) {
    const auto found = timer_callbacks_.find(timers_.begin()->second);
    const std::function<void()> callback = std::move(found->second.callback);
    timers_.erase(timers_.begin());
    timer_callbacks_.erase(found);
    callback();
    ++ran;
  }
  return ran;
}

}  // namespace hvd
