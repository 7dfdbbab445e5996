#include "horovod_cpp/engine/background_loop.h"

#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <ctime>
#include <exception>

#include "common/log.h"

namespace hvd {
namespace {

// Looks that a spinning thread makes before it lets others run. Where ranks share cores, what it waits for may need
// this very core: it lets others run after each look, and as that costs them little, it looks for longer.
constexpr int kLooksPerYield = 16;
constexpr int kCrowdedPatience = 10;
// While no thread waits, the cores are wanted for computing: a nap and a ring cost less than looking longer.
constexpr Duration kSpinTimeWithoutWaiter = std::chrono::microseconds(5);

// A waiter lets this much time pass before it wakes a peer that has something to do. Most come by themselves, on their
// way to a wait of their own; a thread that is woken there would only take the core from them.
constexpr Duration kBellPatience = std::chrono::microseconds(20);

// Longer than most backward passes that fit a host of which all cores compute.
constexpr Duration kPatienceOnFullHost = std::chrono::milliseconds(10);

// That this process may use; "many" if the system does not say.
int usable_cores() {
  cpu_set_t usable;
  CPU_ZERO(&usable);
  return ::sched_getaffinity(0, sizeof usable, &usable) == 0 ? CPU_COUNT(&usable) : CPU_SETSIZE;
}

bool has_more_ranks_than_cores(const Runtime& runtime) { return runtime.ranks_on_this_host() > usable_cores(); }

bool leaves_no_core(Runtime& runtime) {
  if (runtime.fabric().needs_no_core()) return false;
  return runtime.ranks_on_this_host() == runtime.size() && runtime.size() >= usable_cores();
}

// The kernel's struct sched_attr; its header and <sched.h> exclude each other in glibc before 2.41.
struct SchedulingAttributes {
  std::uint32_t bytes = sizeof(SchedulingAttributes);
  std::uint32_t policy = SCHED_OTHER;
  std::uint64_t flags = 0;
  std::int32_t nice = 0;
  std::uint32_t priority = 0;
  std::uint64_t slice_nanoseconds = 0;
  std::uint64_t deadline = 0;
  std::uint64_t period = 0;
};

// Asks for short slices of processor time for the calling thread: it then comes before a thread that computes, which
// has a long one, instead of waiting until that has used it up. Linux 6.12 and later; others go on as before.
void ask_for_short_slices() {
  SchedulingAttributes attributes;
  if (::syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0) return;
  if (attributes.policy != SCHED_OTHER) return;  // somebody has chosen
  attributes.slice_nanoseconds = 100'000;        // the shortest there is
  ::syscall(SYS_sched_setattr, 0, &attributes, 0);
}

// Drops the ones at the end that are done: what was done once need not be looked at again.
bool all_done(std::span<HandleState* const>& handles) {
  while (!handles.empty() && handles.back()->done()) handles = handles.first(handles.size() - 1);
  return handles.empty();
}

class Spinner {
 public:
  explicit Spinner(bool crowded) : looks_per_yield_(crowded ? 1 : kLooksPerYield) {}

  void pause() {
    if (++looks_ % looks_per_yield_ == 0) {
      ::sched_yield();
    } else {
      __builtin_ia32_pause();
    }
  }

 private:
  int looks_per_yield_;
  int looks_ = 0;
};

}  // namespace

BackgroundLoop::BackgroundLoop(Runtime& runtime, Poller& poller)
    : runtime_(runtime),
      poller_(poller),
      crowded_(has_more_ranks_than_cores(runtime)),
      full_host_(leaves_no_core(runtime)),
      spin_time_(runtime.options().spin_time * (crowded_ ? kCrowdedPatience : 1)) {
  thread_ = std::jthread([this](const std::stop_token& stop) { run(stop); });
  ::pthread_setname_np(thread_.native_handle(), "hvd-background");
}

BackgroundLoop::~BackgroundLoop() {
  thread_.request_stop();
  poller_.wake();
}

void BackgroundLoop::run(const std::stop_token& stop) {
  if (!full_host_) ask_for_short_slices();
  while (!stop.stop_requested() && !runtime_.finished()) {
    const bool may_sleep = work_and_prepare_to_sleep(stop);
    if (may_sleep && !stop.stop_requested()) {
      poller_.wait(sleeps_until_.load());
      wakeups_.fetch_add(1, std::memory_order_relaxed);
    }
    asleep_.store(false);
  }
  ended_.complete({});
}

bool BackgroundLoop::work_and_prepare_to_sleep(const std::stop_token& stop) {
  turn_.take();
  const Turn::Giver giver(turn_);
  try {
    sleeps_until_.store(work(stop));
    asleep_.store(true);
    // After `asleep_` is visible: who hands something over from now on rings; what came before is seen here. So is a
    // waiter that wanted the Turn and has given up: the work that was left for it is this thread's again.
    return !runtime_.finished() && (left_for_waiter_ ? wanting_.load() > 0 : runtime_.prepare_to_sleep());
  } catch (const std::exception& error) {
    runtime_.break_down(error.what());
    return false;
  }
}

// Works until nothing moves any more, and while an answer of others is due, a little longer. Returns when to be back.
TimePoint BackgroundLoop::work(const std::stop_token& stop) {
  runtime_.woken();
  Spinner spinner(crowded_);
  TimePoint last_move = runtime_.clock().now();
  left_for_waiter_ = false;
  while (!runtime_.finished() && !stop.stop_requested()) {
    const bool moved = runtime_.step();
    left_for_waiter_ = wanting_.load() > 0;
    if (left_for_waiter_) break;
    if (moved) {
      last_move = runtime_.stepped_at();
      continue;
    }
    const Duration patience = waiters_.load() > 0 ? spin_time_ : std::min(spin_time_, kSpinTimeWithoutWaiter);
    if (!runtime_.busy() || runtime_.stepped_at() - last_move > patience) break;
    spinner.pause();
  }
  return runtime_.next_deadline();
}

void BackgroundLoop::notify(bool at_once) {
  if (!asleep_.load()) return;
  if (!at_once && full_host_ && waiters_.load() == 0) {
    poller_.wake_later(kPatienceOnFullHost);
  } else {
    poller_.wake();
  }
}

void BackgroundLoop::hurry() { poller_.hurry(); }

bool BackgroundLoop::wait(std::span<HandleState* const> handles, TimePoint deadline) {
  if (all_done(handles)) return true;
  if (take_turn(handles)) {
    bool done = false;
    bool leaves_work = true;
    {
      const Turn::Giver giver(turn_);
      try {
        done = drive(handles, deadline);
        // What was left undone is the background thread's again. It sleeps with what it knew before: it must know of
        // new work and of earlier deadlines.
        poller_.cancel_wake_later();
        const bool quiet = runtime_.prepare_to_sleep();
        leaves_work = !quiet || runtime_.finished() || runtime_.next_deadline() < sleeps_until_.load();
      } catch (const std::exception& error) {
        runtime_.break_down(error.what());
      }
    }
    if (leaves_work) poller_.wake();
    if (done) return true;
  } else if (asleep_.load()) {
    poller_.wake();
  }
  waiters_.fetch_add(1);
  const bool done =
      std::all_of(handles.begin(), handles.end(), [&](HandleState* handle) { return handle->wait_until(deadline); });
  waiters_.fetch_sub(1);
  return done;
}

// The thread gives the Turn up soon after it is wanted; another waiter keeps it.
bool BackgroundLoop::take_turn(std::span<HandleState* const> handles) {
  if (turn_.try_take()) return true;
  wanting_.fetch_add(1);
  Spinner spinner(crowded_);
  const TimePoint end = runtime_.clock().now() + spin_time_;
  bool taken = false;
  while (!taken && !all_done(handles) && runtime_.clock().now() < end) {
    spinner.pause();
    taken = turn_.try_take();
  }
  wanting_.fetch_sub(1);
  return taken;
}

bool BackgroundLoop::drive(std::span<HandleState* const> handles, TimePoint deadline) {
  runtime_.woken();
  Spinner spinner(crowded_);
  TimePoint last_move = runtime_.clock().now();
  const Duration bell_patience = kBellPatience * (crowded_ ? kCrowdedPatience : 1);
  TimePoint last_ring = last_move;
  bool done = all_done(handles);
  runtime_.hold_bells();
  for (; !done && !runtime_.finished(); done = all_done(handles)) {
    const bool moved = runtime_.step();
    const TimePoint now = runtime_.stepped_at();
    if (now - last_ring > bell_patience) {  // however much moves: what is for one peer says nothing of another
      runtime_.ring();
      last_ring = now;
    }
    if (moved) {
      last_move = now;
      continue;
    }
    if (now - last_move > spin_time_ || now > deadline) break;
    spinner.pause();
  }
  return done;
}

bool BackgroundLoop::shut_down() {
  runtime_.request_shutdown();
  poller_.wake();
  const Duration most = 2 * Duration(runtime_.options().shutdown_timeout) + std::chrono::seconds(1);
  if (!ended_.wait_until(runtime_.clock().now() + most)) return false;
  turn_.take();  // a waiter that drives sees the end, too
  turn_.give();
  return true;
}

Duration BackgroundLoop::cpu_time() const {
  clockid_t clock{};
  timespec time{};
  auto& thread = const_cast<std::jthread&>(thread_);
  if (ended_.done() || ::pthread_getcpuclockid(thread.native_handle(), &clock) != 0) return Duration::zero();
  if (::clock_gettime(clock, &time) != 0) return Duration::zero();
  return std::chrono::seconds(time.tv_sec) + Duration(time.tv_nsec);
}

}  // namespace hvd
