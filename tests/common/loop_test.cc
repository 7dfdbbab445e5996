// Coroutines, the loop that resumes them, and the poller that it sleeps in.

#include "common/loop/loop.h"
#include "common/loop/sleep.h"

#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <stdexcept>
#include <string>
#include <thread>

#include "common/loop/poller.h"
#include "tests/support/manual_clock.h"

namespace hvd::testing {
namespace {

using namespace std::chrono_literals;

// Suspends until the loop resumes it.
struct Turnstile {
  Loop& loop;
  Priority priority;
  bool await_ready() const { return false; }
  void await_suspend(std::coroutine_handle<> waiter) { loop.make_ready(waiter, priority); }
  void await_resume() const {}
};

struct NoteEnd {
  bool& ended;
  ~NoteEnd() { ended = true; }
};

Task<int> add(int a, int b) { co_return a + b; }

Task<int> add_slowly(Loop& loop, int a, int b) {
  co_await Turnstile{loop, 0};
  const int sum = co_await add(a, b);
  co_await Turnstile{loop, 0};
  co_return sum;
}

Task<void> keep(Loop& loop, int& place) { place = co_await add_slowly(loop, 20, 22); }

Task<void> note(Loop& loop, Priority priority, std::string& order, char name) {
  co_await Turnstile{loop, priority};
  order += name;
}

Task<void> never_ends(bool& destroyed) {
  const NoteEnd end{destroyed};
  co_await std::suspend_always();
}

Task<int> throws() {
  throw std::runtime_error("thrown");
  co_return 0;
}

Task<void> catches(std::string& text) {
  try {
    co_await throws();
  } catch (const std::exception& error) {
    text = error.what();
  }
}

Task<void> sleeps(Loop& loop, Duration duration, std::string& order, char letter) {
  co_await Sleep(loop, duration, 0);
  order += letter;
}

class LoopTest : public ::testing::Test {
 protected:
  ManualClock clock_;
  Loop loop_{clock_};
};

TEST_F(LoopTest, ASpawnedTaskRunsAtOnceAndGoesOnWhenItIsResumed) {
  int place = 0;
  loop_.spawn(keep(loop_, place));
  EXPECT_EQ(loop_.unfinished(), 1u);
  EXPECT_TRUE(loop_.has_ready());
  EXPECT_EQ(loop_.run_ready(1), 1);
  EXPECT_EQ(place, 0);
  EXPECT_EQ(loop_.run_ready(10), 1);
  EXPECT_EQ(place, 42);
  EXPECT_EQ(loop_.unfinished(), 0u);
  EXPECT_EQ(loop_.run_ready(10), 0);
}

TEST_F(LoopTest, TheMostUrgentIsResumedFirstAndEqualOnesInTheirOrder) {
  std::string order;
  loop_.spawn(note(loop_, 5, order, 'c'));
  loop_.spawn(note(loop_, 1, order, 'a'));
  loop_.spawn(note(loop_, 5, order, 'd'));
  loop_.spawn(note(loop_, 2, order, 'b'));
  EXPECT_EQ(loop_.run_ready(3), 3);
  EXPECT_EQ(order, "abc");
  loop_.spawn(note(loop_, 0, order, 'x'));
  EXPECT_EQ(loop_.run_ready(100), 2);
  EXPECT_EQ(order, "abcxd");
}

TEST_F(LoopTest, DestroysWhatHasNotFinished) {
  bool destroyed = false;
  {
    Loop loop(clock_);
    loop.spawn(never_ends(destroyed));
    EXPECT_EQ(loop.unfinished(), 1u);
    EXPECT_FALSE(destroyed);
  }
  EXPECT_TRUE(destroyed);
}

TEST_F(LoopTest, ATaskThatIsNeverAwaitedNeverRuns) {
  bool destroyed = false;
  {
    const Task<void> task = never_ends(destroyed);
  }
  EXPECT_FALSE(destroyed) << "its body did not begin";
}

TEST_F(LoopTest, AnExceptionReachesWhoeverAwaits) {
  std::string text;
  loop_.spawn(catches(text));
  EXPECT_EQ(text, "thrown");
}

TEST_F(LoopTest, TimersRunOnceWhenTheyAreDueAndInTheOrderOfTheirTimes) {
  std::string order;
  const TimePoint start = clock_.now();
  EXPECT_EQ(loop_.next_timer(), kNever);
  loop_.call_at(start + 30ms, [&] { order += 'c'; });
  loop_.call_at(start + 10ms, [&] { order += 'a'; });
  const Loop::TimerId cancelled = loop_.call_at(start + 15ms, [&] { order += 'X'; });
  loop_.call_at(start + 20ms, [&] { order += 'b'; });
  EXPECT_EQ(loop_.next_timer(), start + 10ms);
  EXPECT_EQ(loop_.run_timers(), 0);
  loop_.cancel_timer(cancelled);
  loop_.cancel_timer(cancelled);
  clock_.advance(20ms);
  EXPECT_EQ(loop_.run_timers(), 2);
  EXPECT_EQ(order, "ab");
  EXPECT_EQ(loop_.run_timers(), 0);
  EXPECT_EQ(loop_.next_timer(), start + 30ms);
  clock_.advance(1h);
  EXPECT_EQ(loop_.run_timers(), 1);
  EXPECT_EQ(order, "abc");
  EXPECT_EQ(loop_.next_timer(), kNever);
}

TEST_F(LoopTest, WhatSleepsWakesInTimeOrWhenAllAreWoken) {
  std::string order;
  loop_.spawn(sleeps(loop_, 30ms, order, 'c'));
  loop_.spawn(sleeps(loop_, 10ms, order, 'a'));
  loop_.call_at(clock_.now() + 40ms, [&] { order += 't'; });
  clock_.advance(10ms);
  EXPECT_EQ(loop_.run_timers(), 1);
  EXPECT_EQ(loop_.run_ready(10), 1);
  EXPECT_EQ(order, "a");
  loop_.spawn(sleeps(loop_, 1h, order, 'd'));
  EXPECT_EQ(loop_.wake_sleepers(), 2);
  EXPECT_EQ(loop_.wake_sleepers(), 0);
  EXPECT_EQ(loop_.run_ready(10), 2);
  EXPECT_EQ(order, "acd");
  clock_.advance(2h);
  EXPECT_EQ(loop_.run_timers(), 1) << "of a timer that nobody sleeps for";
  EXPECT_EQ(loop_.run_ready(10), 0) << "nobody is woken twice";
  EXPECT_EQ(order, "acdt");
}

TEST_F(LoopTest, ATimerMaySetAndCancelTimers) {
  int runs = 0;
  Loop::TimerId other = 0;
  loop_.call_at(clock_.now(), [&] {
    ++runs;
    loop_.cancel_timer(other);
    loop_.call_at(clock_.now() + 5ms, [&] { ++runs; });
  });
  other = loop_.call_at(clock_.now(), [&] { runs += 100; });
  EXPECT_EQ(loop_.run_timers(), 1);
  clock_.advance(5ms);
  EXPECT_EQ(loop_.run_timers(), 1);
  EXPECT_EQ(runs, 2);
}

// ---- the poller
// ------------------------------------------------------------------------------------------------------

class PollerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    Result<std::unique_ptr<EpollPoller>> made = EpollPoller::create(clock_);
    ASSERT_TRUE(made.ok()) << made.status().text();
    poller_ = std::move(made).value();
  }
  SteadyClock clock_;
  std::unique_ptr<EpollPoller> poller_;
};

// A minute is the deadline of the test: each of these waits is ended by something else, or the test takes that long.
constexpr auto kLongest = 60s;

TEST_F(PollerTest, AWakeBeforeTheWaitEndsIt) {
  poller_->wake();
  poller_->wake();
  const TimePoint start = clock_.now();
  poller_->wait(start + kLongest);
  EXPECT_LT(clock_.now(), start + kLongest);
}

TEST_F(PollerTest, AWakeFromAnotherThreadEndsTheWait) {
  for (int round = 0; round < 100; ++round) {
    std::jthread other([&] { poller_->wake(); });
    const TimePoint start = clock_.now();
    poller_->wait(start + kLongest);
    ASSERT_LT(clock_.now(), start + kLongest);
  }
}

TEST_F(PollerTest, AWakeLaterEndsTheWaitAfterItsDelay) {
  const TimePoint start = clock_.now();
  poller_->wake_later(5ms);
  poller_->wake_later(kLongest);  // the first counts
  poller_->wait(start + kLongest);
  EXPECT_GE(clock_.now(), start + 5ms);
  EXPECT_LT(clock_.now(), start + kLongest);
}

TEST_F(PollerTest, AWakeLaterThatWasTakenBackOrOvertakenEndsNoWait) {
  poller_->wake_later(1ms);
  poller_->cancel_wake_later();
  TimePoint start = clock_.now();
  poller_->wait(start + 20ms);
  EXPECT_GE(clock_.now(), start + 20ms);
  poller_->wake_later(1ms);
  poller_->wake();
  poller_->wait(start + kLongest);
  start = clock_.now();
  poller_->wait(start + 20ms);
  EXPECT_GE(clock_.now(), start + 20ms);
}

TEST_F(PollerTest, HurryEndsOnlyAWaitThatAWakeLaterWouldEnd) {
  poller_->hurry();
  TimePoint start = clock_.now();
  poller_->wait(start + 5ms);
  EXPECT_GE(clock_.now(), start + 5ms);
  poller_->wake_later(kLongest);
  std::jthread other([&] { poller_->hurry(); });
  start = clock_.now();
  poller_->wait(start + kLongest);
  EXPECT_LT(clock_.now(), start + kLongest);
}

TEST_F(PollerTest, WakeLaterAndCancelOfSeveralThreadsLoseNoLaterWake) {
  {
    std::jthread sets([&] {
      for (int i = 0; i < 2000; ++i) poller_->wake_later(1us);
    });
    for (int i = 0; i < 2000; ++i) poller_->cancel_wake_later();
  }
  poller_->cancel_wake_later();
  const TimePoint start = clock_.now();
  poller_->wake_later(1ms);
  poller_->wait(start + kLongest);
  EXPECT_LT(clock_.now(), start + kLongest);
}

TEST_F(PollerTest, ADeadlineEndsTheWait) {
  const TimePoint start = clock_.now();
  poller_->wait(start + 2ms);
  EXPECT_GE(clock_.now(), start + 2ms);
  poller_->wait(start);  // in the past: at once
}

TEST_F(PollerTest, AWatchedDescriptorEndsTheWaitUntilItIsUnwatched) {
  const UniqueFd event(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  ASSERT_TRUE(poller_->watch(event.get()).ok());
  EXPECT_FALSE(poller_->watch(event.get()).ok()) << "twice";
  EXPECT_FALSE(poller_->watch(-1).ok());
  const std::uint64_t one = 1;
  ASSERT_EQ(::write(event.get(), &one, sizeof one), static_cast<ssize_t>(sizeof one));
  for (int round = 0; round < 2; ++round) {  // as long as it is readable
    const TimePoint start = clock_.now();
    poller_->wait(start + kLongest);
    EXPECT_LT(clock_.now(), start + kLongest);
  }
  poller_->unwatch(event.get());
  const TimePoint start = clock_.now();
  poller_->wait(start + 2ms);
  EXPECT_GE(clock_.now(), start + 2ms);
}

}  // namespace
}  // namespace hvd::testing
