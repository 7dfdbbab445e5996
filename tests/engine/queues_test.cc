// What framework threads and the loop hand to each other: the tensor queue, handles, memory to be released, the Turn;
// and the inspector that looks at what waits.

#include <gtest/gtest.h>

#include <atomic>
#include <latch>
#include <thread>

#include "horovod_cpp/engine/release_queue.h"
#include "horovod_cpp/engine/stall_inspector.h"
#include "horovod_cpp/engine/turn.h"

namespace hvd::testing {
namespace {

using namespace std::chrono_literals;

constexpr TimePoint kStart{1000s};

TensorEntry entry_of(const std::string& name, TimePoint enqueued = kStart, ProcessSetId set = 0,
                     OpKind op = OpKind::kAllreduce) {
  TensorEntry entry;
  entry.request.key = {set, op, name};
  entry.enqueued = enqueued;
  entry.handle = std::make_shared<HandleState>();
  return entry;
}

TEST(TensorQueue, GivesOutWhatIsNewOnceAndKeepsItUntilItIsTaken) {
  TensorQueue queue;
  EXPECT_FALSE(queue.has_new());
  ASSERT_TRUE(queue.push(entry_of("b"), {}).ok());
  ASSERT_TRUE(queue.push(entry_of("a"), {}).ok());
  EXPECT_TRUE(queue.has_new());
  const RequestsEnqueued drained = queue.drain();
  ASSERT_EQ(drained.requests.size(), 2u);
  EXPECT_EQ(drained.requests[0].key.name, "b") << "in the order of the calls";
  EXPECT_FALSE(queue.has_new());
  EXPECT_TRUE(queue.drain().requests.empty());
  EXPECT_TRUE(queue.take({0, OpKind::kAllreduce, "a"}).has_value());
  EXPECT_FALSE(queue.take({0, OpKind::kAllreduce, "a"}).has_value());
  EXPECT_FALSE(queue.take({0, OpKind::kBroadcast, "b"}).has_value());
}

TEST(TensorQueue, RefusesANameInFlightWithTheAgeOfTheFirst) {
  TensorQueue queue;
  ASSERT_TRUE(queue.push(entry_of("x"), {}).ok());
  const Status again = queue.push(entry_of("x", kStart + 1500ms), {});
  EXPECT_EQ(again.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(again.text().find("'x' was handed over 1500 ms ago"), std::string::npos) << again.text();
  EXPECT_TRUE(queue.push(entry_of("x", kStart, 1), {}).ok()) << "another set";
  EXPECT_TRUE(queue.push(entry_of("x", kStart, 0, OpKind::kBroadcast), {}).ok()) << "another operation";
  queue.drain();
  EXPECT_FALSE(queue.push(entry_of("x"), {}).ok());
  ASSERT_TRUE(queue.take({0, OpKind::kAllreduce, "x"}).has_value());
  EXPECT_TRUE(queue.push(entry_of("x"), {}).ok()) << "it has ended";
}

TEST(TensorQueue, NamesTheUnnamedByACounterOfTheirSetAndOperation) {
  TensorQueue queue;
  for (int i = 0; i < 2; ++i) ASSERT_TRUE(queue.push(entry_of(""), {}).ok());
  ASSERT_TRUE(queue.push(entry_of("", kStart, 3), {}).ok());
  ASSERT_TRUE(queue.push(entry_of("", kStart, 0, OpKind::kBarrier), {}).ok());
  const RequestsEnqueued drained = queue.drain();
  EXPECT_EQ(drained.requests[0].key.name, generated_name(0));
  EXPECT_EQ(drained.requests[1].key.name, generated_name(1));
  EXPECT_EQ(drained.requests[2].key.name, generated_name(0));
  EXPECT_EQ(drained.requests[3].key.name, generated_name(0));
}

TEST(TensorQueue, DefinesACallSiteOnce) {
  TensorQueue queue;
  ASSERT_TRUE(queue.push(entry_of("a"), {"train.py", 1}).ok());
  ASSERT_TRUE(queue.push(entry_of("b"), {"train.py", 2}).ok());
  ASSERT_TRUE(queue.push(entry_of("c"), {"train.py", 1}).ok());
  ASSERT_TRUE(queue.push(entry_of("d"), {}).ok());
  const RequestsEnqueued first = queue.drain();
  EXPECT_EQ(first.call_sites.size(), 2u);
  EXPECT_EQ(first.requests[0].call_site, first.requests[2].call_site);
  EXPECT_NE(first.requests[0].call_site, first.requests[1].call_site);
  EXPECT_EQ(first.requests[3].call_site, 0u);
  ASSERT_TRUE(queue.push(entry_of("e"), {"train.py", 2}).ok());
  const RequestsEnqueued second = queue.drain();
  EXPECT_TRUE(second.call_sites.empty());
  EXPECT_EQ(second.requests[0].call_site, first.requests[1].call_site);
}

TEST(TensorQueue, GivesUpASetOrEverything) {
  TensorQueue queue;
  ASSERT_TRUE(queue.push(entry_of("a"), {}).ok());
  ASSERT_TRUE(queue.push(entry_of("b", kStart, 1), {}).ok());
  ASSERT_TRUE(queue.push(entry_of("c", kStart, 1), {}).ok());
  EXPECT_EQ(queue.take_set(1).size(), 2u);
  EXPECT_EQ(queue.drain().requests.size(), 1u) << "what was given up is not asked for any more";
  EXPECT_EQ(queue.close(Status::internal("closed")).size(), 1u);
  EXPECT_FALSE(queue.has_new());
  EXPECT_EQ(queue.push(entry_of("d"), {}).text(), "closed");
}

TEST(TensorQueue, TakesFromSeveralThreads) {
  TensorQueue queue;
  std::atomic<int> refused{0};
  {
    std::vector<std::jthread> threads;
    for (int thread = 0; thread < 4; ++thread) {
      threads.emplace_back([&, thread] {
        for (int i = 0; i < 200; ++i) {
          if (!queue.push(entry_of(std::to_string(thread) + "." + std::to_string(i)), {"s", 1}).ok())
            refused.fetch_add(1);
          if (!queue.push(entry_of("the same"), {"s", 1}).ok()) refused.fetch_add(1);
        }
      });
    }
    for (std::size_t seen = 0; seen < 801;) seen += queue.drain().requests.size();
  }
  EXPECT_EQ(refused.load(), 4 * 200 - 1);
}

// ---- stalls
// ----------------------------------------------------------------------------------------------------------

TEST(StallInspector, AsksOncePerCheckTimeAndOnlyWhileSomethingWaits) {
  TensorQueue queue;
  StallInspector inspector(10s);
  EXPECT_EQ(inspector.next_look(queue), kNever);
  EXPECT_TRUE(inspector.look(queue, kStart).empty());
  ASSERT_TRUE(queue.push(entry_of("old"), {}).ok());
  ASSERT_TRUE(queue.push(entry_of("new", kStart + 5s), {}).ok());
  EXPECT_EQ(inspector.next_look(queue), kStart + 10s);
  EXPECT_TRUE(inspector.look(queue, kStart + 9s).empty());
  const std::vector<OperationKey> stalled = inspector.look(queue, kStart + 10s);
  ASSERT_EQ(stalled.size(), 1u);
  EXPECT_EQ(stalled[0].name, "old");
  EXPECT_EQ(inspector.next_look(queue), kStart + 20s);
  EXPECT_TRUE(inspector.look(queue, kStart + 19s).empty());
  EXPECT_EQ(inspector.look(queue, kStart + 20s).size(), 2u);
  queue.take_set(0);
  EXPECT_EQ(inspector.next_look(queue), kNever);
}

TEST(StallInspector, CanBeOff) {
  TensorQueue queue;
  ASSERT_TRUE(queue.push(entry_of("x"), {}).ok());
  StallInspector inspector(0s);
  EXPECT_EQ(inspector.next_look(queue), kNever);
  EXPECT_TRUE(inspector.look(queue, kStart + 1h).empty());
}

StallReportMessage::Line line_of(ProcessSetId set, OpKind op, const std::string& name,
                                 std::vector<std::int64_t> missing) {
  StallReportMessage::Line line;
  line.key = {set, op, name};
  line.missing = std::move(missing);
  return line;
}

TEST(StallInspector, ReportsWhoIsMissingForWhat) {
  std::vector<StallReportMessage::Line> lines;
  for (int i = 0; i < 8; ++i) lines.push_back(line_of(0, OpKind::kAllreduce, "t" + std::to_string(i), {1, 2, 3}));
  lines.push_back(line_of(4, OpKind::kBarrier, "b", {0}));
  lines.push_back(line_of(0, OpKind::kAllgather, "g", {}));
  lines[0].hint = lines[1].hint = "a hint";
  const std::string text = StallInspector::report(lines, 60s);
  EXPECT_NE(text.find("\nPerhaps: a hint"), std::string::npos) << text;
  EXPECT_EQ(text.find("a hint"), text.rfind("a hint")) << text;
  EXPECT_NE(text.find("more than 60 s"), std::string::npos) << text;
  EXPECT_NE(text.find("Missing ranks 1-3: allreduce 't0', allreduce 't1'"), std::string::npos) << text;
  EXPECT_NE(text.find("and 2 more"), std::string::npos) << text;
  EXPECT_NE(text.find("Missing rank 0: barrier 'b' (process set 4)"), std::string::npos) << text;
  EXPECT_NE(text.find("nobody"), std::string::npos) << text;
}

// ---- handles and memory
// ----------------------------------------------------------------------------------------------

TEST(HandleState, EndsItsWaiters) {
  HandleState handle;
  EXPECT_FALSE(handle.done());
  EXPECT_FALSE(handle.wait_until(SteadyClock().now()));
  std::atomic<int> ended{0};
  {
    std::vector<std::jthread> waiters;
    for (int i = 0; i < 4; ++i) {
      waiters.emplace_back([&, i] {
        EXPECT_TRUE(handle.wait_until(i % 2 == 0 ? kNever : SteadyClock().now() + 60s));
        EXPECT_EQ(handle.status().text(), "the end");
        EXPECT_EQ(handle.output().process_set, 5);
        ended.fetch_add(1);
      });
    }
    handle.output().process_set = 5;
    handle.complete(Status::internal("the end"));
  }
  EXPECT_EQ(ended.load(), 4);
  EXPECT_TRUE(handle.done());
  EXPECT_TRUE(handle.wait_until(TimePoint{}));
}

TEST(ReleaseQueue, ReleasesOnTheThreadThatCollects) {
  struct Owner {
    std::thread::id released_by;
    int times = 0;
  } owner;
  const auto release = [](void* place) {
    auto* mine = static_cast<Owner*>(place);
    mine->released_by = std::this_thread::get_id();
    ++mine->times;
  };
  auto queue = std::make_shared<ReleaseQueue>();
  std::shared_ptr<void> first = queue->guard(&owner, release);
  std::shared_ptr<void> second = first;
  first.reset();
  queue->collect();
  EXPECT_EQ(owner.times, 0) << "somebody still holds it";
  std::jthread([&second] { second.reset(); }).join();
  EXPECT_EQ(owner.times, 0) << "not by the thread that drops it";
  queue->collect();
  EXPECT_EQ(owner.times, 1);
  EXPECT_EQ(owner.released_by, std::this_thread::get_id());
  queue->collect();
  EXPECT_EQ(owner.times, 1);
  EXPECT_EQ(queue->guard(&owner, nullptr), nullptr) << "nothing to release";
}

TEST(ReleaseQueue, AReleaseMayQueueAnother) {
  auto queue = std::make_shared<ReleaseQueue>();
  struct Chain {
    std::shared_ptr<void> next;
    int released = 0;
  } last, first;
  const auto release = [](void* place) {
    auto* mine = static_cast<Chain*>(place);
    ++mine->released;
    mine->next.reset();
  };
  first.next = queue->guard(&last, release);
  queue->guard(&first, release).reset();
  queue->collect();
  EXPECT_EQ(first.released, 1);
  EXPECT_EQ(last.released, 0);
  queue->collect();
  EXPECT_EQ(last.released, 1);
}

TEST(Turn, IsHeldByOneAtATime) {
  Turn turn;
  EXPECT_FALSE(turn.held_by_caller());
  turn.take();
  EXPECT_TRUE(turn.held_by_caller());
  std::jthread([&] {
    EXPECT_FALSE(turn.held_by_caller());
    EXPECT_FALSE(turn.try_take());
  }).join();
  turn.give();
  EXPECT_FALSE(turn.held_by_caller());
  std::jthread([&] {
    EXPECT_TRUE(turn.try_take());
    turn.give();
  }).join();
}

}  // namespace
}  // namespace hvd::testing
