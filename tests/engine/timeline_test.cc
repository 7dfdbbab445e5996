// The timeline: its text, its file, its writer, and what N ranks record.

#include "horovod_cpp/engine/timeline.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <thread>

#include "tests/support/rank_threads.h"
#include "tests/support/timeline_events.h"

namespace hvd::testing {
namespace {

using namespace std::chrono_literals;
using namespace timeline;

constexpr TimePoint kStart{1000s};

class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "hvd-timeline-XXXXXX").string();
    EXPECT_NE(::mkdtemp(name.data()), nullptr);
    path_ = name;
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

OperationKey key(const std::string& name, OpKind op = OpKind::kAllreduce, ProcessSetId set = 0) {
  return {set, op, name};
}

Operand operand(const OperationKey& of) { return {of, DataType::kFloat32, {2, 3}, 1, 24}; }

class TimelineText : public ::testing::Test {
 protected:
  template <typename Fact>
  void add(Fact fact, Duration after = {}) {
    text_.add({kStart + after, std::move(fact)});
  }
  TimelineEvents events() {
    all_ += (all_.empty() ? "" : ",\n") + text_.take();
    return TimelineEvents("[\n" + all_ + "\n]\n");
  }

  Text text_{{kStart, 1'700'000'000'000'000, 2, 4}};
  std::string all_;
};

TEST_F(TimelineText, TellsFromWhichRankAndWhenItIs) {
  const TimelineEvents here = events();
  EXPECT_EQ(here.lanes.at("0"), "rank 2 of 4");
  EXPECT_EQ(field(here.events[0], "start_time_since_epoch_in_micros"), "1700000000000000");
  EXPECT_EQ(text_.take(), "") << "nothing new";
}

TEST_F(TimelineText, TellsOfAnOperationFromTheFirstRequestToTheEnd) {
  add(Enqueued{key("x")}, 1us);
  add(RankReady{key("x"), 0}, 2us);
  add(RankReady{key("x"), 3}, 3us);
  add(Agreed{operand(key("x"))}, 4us);
  add(CallAgreed{{0, 7}, {operand(key("x"))}, "shm"}, 5us);
  add(CallStarted{{0, 7}}, 6us);
  add(ActivityBegun{{0, 7}, ActivityKind::kPack, {}}, 7us);
  add(ActivityEnded{{0, 7}}, 8us);
  add(ActivityBegun{{0, 7}, ActivityKind::kCommunicate, "ring"}, 9us);
  add(ActivityEnded{{0, 7}}, 10us);
  add(ActivityBegun{{0, 7}, ActivityKind::kUnpack, {}}, 11us);
  add(ActivityEnded{{0, 7}}, 12us);
  add(CallFinished{{0, 7}, ""}, 13'001ns);
  const TimelineEvents here = events();
  EXPECT_EQ(here.story("allreduce.x"),
            "NEGOTIATE_ALLREDUCE (0) (3) / ALLREDUCE QUEUE / MEMCPY_IN_FUSION_BUFFER / SHM_ALLREDUCE / "
            "MEMCPY_OUT_FUSION_BUFFER / /");
  EXPECT_TRUE(here.all_have_ended());
  EXPECT_EQ(field(here.event("allreduce.x", "NEGOTIATE_ALLREDUCE"), "ts"), "1.000");
  EXPECT_EQ(field(here.events.back(), "ts"), "13.001");
  const std::string operation = here.event("allreduce.x", "ALLREDUCE");
  EXPECT_EQ(field(operation, "dtype"), "float32");
  EXPECT_EQ(field(operation, "shape"), "[2, 3]");
  EXPECT_EQ(field(operation, "bytes"), "24");
  EXPECT_EQ(field(here.event("allreduce.x", "SHM_ALLREDUCE"), "algorithm"), "ring");
}

TEST_F(TimelineText, AWorkerKnowsOfNoOtherRank) {
  add(Enqueued{key("x", OpKind::kBroadcast, 3)});
  add(CallAgreed{{3, 0}, {operand(key("x", OpKind::kBroadcast, 3))}, "shared memory+TCP"});
  add(CallStarted{{3, 0}});
  add(ActivityBegun{{3, 0}, ActivityKind::kCommunicate, "binomial"});
  add(ActivityEnded{{3, 0}});
  add(CallFinished{{3, 0}, ""});
  EXPECT_EQ(events().story("broadcast.x (process set 3)"),
            "NEGOTIATE_BROADCAST / BROADCAST QUEUE / SHARED_MEMORY+TCP_BROADCAST / /");
}

TEST_F(TimelineText, FusedOperationsHaveALaneEach) {
  add(CallAgreed{{0, 1}, {operand(key("a")), operand(key("b"))}, ""});
  add(CallStarted{{0, 1}});
  add(ActivityBegun{{0, 1}, ActivityKind::kCommunicate, "ring"});
  add(ActivityEnded{{0, 1}});
  add(CallFinished{{0, 1}, ""});
  const TimelineEvents here = events();
  for (const char* lane : {"allreduce.a", "allreduce.b"}) {
    EXPECT_EQ(here.story(lane), "ALLREDUCE QUEUE / LOCAL_ALLREDUCE / /");
    EXPECT_EQ(field(here.event(lane, "LOCAL_ALLREDUCE"), "operations"), "2");
    EXPECT_EQ(field(here.event(lane, "LOCAL_ALLREDUCE"), "bytes"), "48");
  }
}

TEST_F(TimelineText, AnErrorIsAtTheEndOfItsOperation) {
  add(Enqueued{key("refused")});
  add(OperationEnded{key("refused"), "mismatched \"shape\""});
  add(CallAgreed{{0, 1}, {operand(key("broken"))}, "tcp"});
  add(CallStarted{{0, 1}});
  add(ActivityBegun{{0, 1}, ActivityKind::kCommunicate, "ring"});
  add(CallFinished{{0, 1}, "rank 3 is lost"});
  const TimelineEvents here = events();
  EXPECT_EQ(here.story("allreduce.refused"), "NEGOTIATE_ALLREDUCE /");
  EXPECT_EQ(here.story("allreduce.broken"), "ALLREDUCE QUEUE / TCP_ALLREDUCE / /");
  EXPECT_TRUE(here.all_have_ended());
  EXPECT_EQ(field(here.events.back(), "error"), "rank 3 is lost");
  const auto refused = [](const std::string& event) {
    return event.find(R"("error": "mismatched \"shape\"")") != std::string::npos;
  };
  EXPECT_EQ(std::count_if(here.events.begin(), here.events.end(), refused), 1);
}

TEST_F(TimelineText, WhatOverlapsUnderOneNameStandsInRowsOfItsOwn) {
  add(CallAgreed{{0, 1}, {operand(key("x"))}, "shm"});
  add(RankReady{key("x"), 1});  // a rank that is faster asks for the next one
  add(CallStarted{{0, 1}});
  add(CallFinished{{0, 1}, ""});
  add(RankReady{key("x"), 0});
  add(Agreed{operand(key("x"))});
  add(CallAgreed{{0, 2}, {operand(key("x"))}, "shm"});
  add(CallStarted{{0, 2}});
  add(CallFinished{{0, 2}, ""});
  const TimelineEvents here = events();
  EXPECT_TRUE(here.all_have_ended());
  EXPECT_EQ(here.begun_by_place.size(), 2u);
  EXPECT_EQ(field(here.event("allreduce.x", "NEGOTIATE_ALLREDUCE"), "tid"), "1");
}

TEST_F(TimelineText, UnnamedOperationsOfAKindShareALane) {
  for (std::uint64_t n = 0; n < 3; ++n) {
    const OperationKey unnamed = key(generated_name(n), OpKind::kAllgather);
    add(Enqueued{unnamed});
    add(CallAgreed{{0, n}, {operand(unnamed)}, "shm"});
    add(CallFinished{{0, n}, ""});
  }
  const TimelineEvents here = events();
  EXPECT_EQ(here.lanes.size(), 2u);
  EXPECT_EQ(here.begun_by_place.size(), 1u);
  EXPECT_NE(here.event("allgather.noname", "ALLGATHER").find(R"("name": "noname.0")"), std::string::npos);
}

TEST_F(TimelineText, WhatBeganBeforeTheTimelineIsLeftOut) {
  add(CallStarted{{0, 1}});
  add(ActivityBegun{{0, 1}, ActivityKind::kPack, {}});
  add(ActivityEnded{{0, 1}});
  add(CallFinished{{0, 1}, ""});
  add(OperationEnded{key("x"), "late"});
  EXPECT_EQ(events().events.size(), 2u) << "only the name of the process and its place";
  add(Enqueued{key("early")}, -5s);
  EXPECT_EQ(field(events().event("allreduce.early", "NEGOTIATE_ALLREDUCE"), "ts"), "0.000");
}

TEST_F(TimelineText, MarksCyclesAndWhatIsLost) {
  add(CycleStarted{}, 2us);
  text_.add_lost(17, kStart + 3us);
  const TimelineEvents here = events();
  EXPECT_EQ(field(here.events[2], "name"), "CYCLE_START");
  EXPECT_EQ(field(here.events[2], "ph"), "i");
  EXPECT_EQ(field(here.events[3], "name"), "17 RECORDS LOST");
}

TEST(TimelineJson, StringsMayHoldAnything) {
  EXPECT_EQ(json_string("plain"), "\"plain\"");
  EXPECT_EQ(json_string("\"\\\n\x01"), R"("\"\\\u000a\u0001")");
  EXPECT_EQ(json_string("gr\xc3\xb6\xc3\x9f"
                        "e \xe2\x82\xac \xf0\x9f\x90\x8e"),
            "\"gr\xc3\xb6\xc3\x9f"
            "e \xe2\x82\xac \xf0\x9f\x90\x8e\"");
  for (const char* bad : {"\xff", "\x80", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe2\x82", "\xf5"}) {
    EXPECT_EQ(json_string(bad), "\"" + std::string(std::string_view(bad).size(), '?') + "\"");
  }
}

// ---- the file -------------------------------------------------------------------------------------------------------

TEST(TimelineFile, IsAWholeArrayAfterEachWrite) {
  const Folder folder;
  const std::string path = folder / "trace.json";
  Result<File> file = File::create(path);
  ASSERT_TRUE(file.ok()) << file.status().text();
  EXPECT_EQ(TimelineEvents::read(path), "[\n]\n");
  ASSERT_TRUE(file->append("{\"a\": 1}").ok());
  EXPECT_EQ(TimelineEvents::read(path), "[\n{\"a\": 1}\n]\n");
  ASSERT_TRUE(file->append("{\"b\": 2}").ok());
  EXPECT_EQ(TimelineEvents::read(path), "[\n{\"a\": 1},\n{\"b\": 2}\n]\n");
  ASSERT_TRUE(File::create(path).ok());
  EXPECT_EQ(TimelineEvents::read(path), "[\n]\n") << "what was there before is gone";
}

TEST(TimelineFile, RefusesWhatCannotBeWrittenWithPathAndReason) {
  const Folder folder;
  const auto refusal = [](const std::string& path) {
    const Status status = File::create(path).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.text().find("'" + path + "'"), std::string::npos) << status.text();
    return status.text();
  };
  EXPECT_NE(refusal(folder / "").find("Is a directory"), std::string::npos);
  EXPECT_NE(refusal(folder / "missing/trace.json").find("No such file or directory"), std::string::npos);
  EXPECT_NE(refusal("/dev/full").find("No space left on device"), std::string::npos);
  const std::string pipe = folder / "pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_NE(refusal(pipe), "") << "and does not wait for a reader";
}

// ---- the writer -----------------------------------------------------------------------------------------------------

TEST(TimelineWriter, WritesWhatManyThreadsRecord) {
  constexpr int threads = 4;
  constexpr std::uint64_t calls = 2000;
  const Folder folder;
  const std::string path = folder / "trace.json";
  RecordQueue queue;
  queue.push({kStart, CycleStarted{}});  // closed: dropped
  queue.open();
  {
    Result<File> file = File::create(path);
    ASSERT_TRUE(file.ok());
    const Writer writer(queue, std::move(file).value(), {kStart, 0, 0, 1});
    {
      std::vector<std::jthread> all;
      for (int t = 0; t < threads; ++t) {
        all.emplace_back([&queue, t] {
          const auto set = static_cast<ProcessSetId>(t + 1);
          for (std::uint64_t n = 0; n < calls; ++n) {
            queue.push({kStart, CallAgreed{{set, n}, {operand(key("x", OpKind::kAllreduce, set))}, "shm"}});
            queue.push({kStart, CallFinished{{set, n}, ""}});
          }
        });
      }
    }
    queue.close();
    queue.push({kStart, CycleStarted{}});
  }
  const TimelineEvents here(TimelineEvents::read(path));
  EXPECT_TRUE(here.all_have_ended());
  EXPECT_EQ(here.events.size(), 2u + threads * (2 + 4 * calls));
}

TEST(TimelineWriter, CountsWhatItCannotKeep) {
  RecordQueue queue;
  queue.open();
  for (int i = 0; i < (1 << 18) + 5; ++i) queue.push({kStart, CycleStarted{}});
  RecordQueue::Batch batch;
  queue.swap(batch);
  EXPECT_EQ(batch.records.size(), std::size_t{1} << 18);
  EXPECT_EQ(batch.lost, 5u);
  queue.swap(batch);
  EXPECT_TRUE(batch.records.empty());
  EXPECT_EQ(batch.lost, 0u);
}

TEST(Timeline, IsOffUntilItIsStartedAndAfterItIsStopped) {
  const Folder folder;
  const SteadyClock clock;
  Timeline timeline(clock, 0, 1);
  EXPECT_FALSE(timeline.on());
  timeline.stop();
  for (const char* name : {"one", "two"}) {
    ASSERT_TRUE(timeline.start(folder / name, false).ok());
    EXPECT_TRUE(timeline.on());
    timeline.rank_ready(key(name), 0);
    timeline.stop();
    EXPECT_FALSE(timeline.on());
    timeline.stop();
    timeline.rank_ready(key("unseen"), 0);
  }
  for (const char* name : {"one", "two"}) {
    const TimelineEvents here(TimelineEvents::read(folder / name));
    EXPECT_EQ(here.story(std::string("allreduce.") + name), "NEGOTIATE_ALLREDUCE (0)");
    EXPECT_EQ(here.lanes.size(), 2u);
  }
}

TEST(Timeline, GoesOnInTheSameFileAndChangesToAnother) {
  const Folder folder;
  const SteadyClock clock;
  Timeline timeline(clock, 0, 1);
  ASSERT_TRUE(timeline.start(folder / "one", false).ok());
  timeline.rank_ready(key("first"), 0);
  ASSERT_TRUE(timeline.start(folder / "one", true).ok());
  timeline.rank_ready(key("second"), 0);
  EXPECT_FALSE(timeline.start(folder / "missing/two", false).ok());
  EXPECT_TRUE(timeline.on()) << "the old one is still good";
  timeline.rank_ready(key("third"), 0);
  ASSERT_TRUE(timeline.start(folder / "two", false).ok());
  timeline.rank_ready(key("fourth"), 0);
  timeline.stop();
  EXPECT_EQ(TimelineEvents(TimelineEvents::read(folder / "one")).lanes.size(), 4u);
  EXPECT_EQ(TimelineEvents(TimelineEvents::read(folder / "two")).lanes.size(), 2u);
}

TEST(Timeline, OtherRanksRecordOnlyWhereThePathNamesThem) {
  const Folder folder;
  const SteadyClock clock;
  Timeline timeline(clock, 3, 4);
  ASSERT_TRUE(timeline.start(folder / "trace.json", false).ok());
  EXPECT_FALSE(timeline.on());
  EXPECT_FALSE(std::filesystem::exists(folder / "trace.json"));
  ASSERT_TRUE(timeline.start(folder / "trace-{rank}-{rank}.json", false).ok());
  EXPECT_TRUE(timeline.on());
  timeline.stop();
  EXPECT_TRUE(std::filesystem::exists(folder / "trace-3-3.json"));
  EXPECT_EQ(timeline.start("", false).code(), StatusCode::kInvalidArgument);
}

// ---- engines --------------------------------------------------------------------------------------------------------

TEST(TimelineOfRanks, ShowsWhatEachRankDid) {
  for (const int size : {1, 2, 3, 4}) {
    const Folder folder;
    TestRank::Settings settings;
    settings.timeline = folder / "{rank}";
    settings.timeline_mark_cycles = true;
    run_ranks(
        size,
        [](TestRank& hvd) {
          for (int round = 0; round < 3; ++round) {
            std::vector<float> large(100'000, 1.0f);
            ASSERT_TRUE(hvd.allreduce("large", large, large).ok());
            std::vector<float> a(10);
            std::vector<float> b(20);
            const auto first = hvd.allreduce_async("a", a, a);
            const auto second = hvd.allreduce_async("b", b, b);
            ASSERT_TRUE(hvd.wait(first).ok() && hvd.wait(second).ok());
            ASSERT_TRUE(hvd.barrier("").ok());
            std::vector<float> wrong(hvd.rank() == 0 ? 5 : 4);
            EXPECT_EQ(hvd.allreduce("wrong", wrong, wrong).ok(), hvd.size() == 1);
          }
        },
        settings);
    for (int rank = 0; rank < size; ++rank) {
      const TimelineEvents here(TimelineEvents::read(folder / std::to_string(rank)));
      EXPECT_TRUE(here.all_have_ended());
      EXPECT_EQ(here.lanes.at("0"), "rank " + std::to_string(rank) + " of " + std::to_string(size));
      const std::string large = here.story("allreduce.large");
      EXPECT_NE(large.find(size > 1 ? "ALLREDUCE QUEUE / IN_PROCESS_ALLREDUCE / /" : "ALLREDUCE QUEUE / /"),
                std::string::npos)
          << large;
      for (int ready = 0; rank == 0 && ready < size; ++ready) {
        EXPECT_NE(large.find("(" + std::to_string(ready) + ")"), std::string::npos) << large;
      }
      EXPECT_EQ(large.find("(0)") != std::string::npos, rank == 0);
      EXPECT_NE(here.event("barrier.noname", "BARRIER"), "");
      EXPECT_EQ(field(here.event("allreduce.a", "ALLREDUCE"), "shape"), "[10]");
      const auto refused = [](const std::string& event) {
        return field(event, "error").find("mismatched shape") != std::string::npos;
      };
      EXPECT_EQ(std::count_if(here.events.begin(), here.events.end(), refused), size > 1 ? 3 : 0);
      const auto cycle = [](const std::string& event) { return field(event, "name") == "CYCLE_START"; };
      EXPECT_GE(std::count_if(here.events.begin(), here.events.end(), cycle), 9);
    }
  }
}

TEST(TimelineOfRanks, StartsAndStopsWhileOperationsAreInFlight) {
  const Folder folder;
  run_ranks(3, [&](TestRank& hvd) {
    std::jthread changing([&](const std::stop_token& stop) {
      for (int n = 0; !stop.stop_requested(); n = (n + 1) % 5) {
        EXPECT_TRUE(hvd.timeline().start(folder / (std::to_string(n) + ".{rank}"), n % 2 == 0).ok());
        std::this_thread::sleep_for(1ms);
        if (n % 2 == 1) hvd.timeline().stop();
      }
    });
    std::vector<std::vector<float>> values(8, std::vector<float>(300, 1.0f));
    for (int round = 0; round < 100; ++round) {
      std::vector<Result<HandleRef>> handles;
      for (std::size_t i = 0; i < values.size(); ++i) {
        handles.push_back(hvd.allreduce_async("t" + std::to_string(i), values[i], values[i], ReduceOp::kAverage));
      }
      for (const auto& handle : handles) ASSERT_TRUE(hvd.wait(handle).ok());
    }
    changing.request_stop();
    changing.join();
    hvd.timeline().stop();
  });
  for (const auto& entry : std::filesystem::directory_iterator(folder / "")) {
    const TimelineEvents here(TimelineEvents::read(entry.path()));
    EXPECT_FALSE(here.events.empty());
  }
}

}  // namespace
}  // namespace hvd::testing
