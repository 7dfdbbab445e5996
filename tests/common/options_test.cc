// Options from the environment, and faults from their text.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <set>

#include "common/env_options.h"
#include "common/fault.h"
#include "common/log.h"

namespace hvd::testing {
namespace {

// A variable for the time of a test.
class Variable {
 public:
  Variable(const char* name, const char* value) : name_(name) { ::setenv(name, value, 1); }
  ~Variable() { ::unsetenv(name_); }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;

 private:
  const char* name_;
};

class EnvOptions : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const Knob& knob : knobs()) ::unsetenv(std::string(knob.name).c_str());
  }
  static Options read() {
    const Result<Options> options = options_from_environment();
    EXPECT_TRUE(options.ok()) << options.status().text();
    return options.ok() ? options.value() : Options();
  }
  static std::string refusal_of(const char* name, const char* value) {
    const Variable variable(name, value);
    const Result<Options> options = options_from_environment();
    EXPECT_EQ(options.status().code(), StatusCode::kInvalidArgument) << name << "=" << value;
    return options.status().text();
  }
};

TEST_F(EnvOptions, AreTheDefaultsWhenNothingIsSet) {
  const Options options = read();
  const Options defaults;
  EXPECT_EQ(options.fusion_threshold_bytes, defaults.fusion_threshold_bytes);
  EXPECT_EQ(options.cycle_time, defaults.cycle_time);
  EXPECT_EQ(options.transport, "auto");
}

TEST_F(EnvOptions, WhatTheProgramGivesComesBeforeTheEnvironment) {
  const Variable a("HOROVOD_FUSION_THRESHOLD", "17");
  const Variable b("HOROVOD_CACHE_CAPACITY", "junk that nobody reads");
  const std::vector<Setting> given{{"HOROVOD_CACHE_CAPACITY", "5"}, {"HOROVOD_CYCLE_TIME", "2.5"}};
  const Result<Options> options = options_from_environment(given);
  ASSERT_TRUE(options.ok()) << options.status().text();
  EXPECT_EQ(options.value().fusion_threshold_bytes, 17u);
  EXPECT_EQ(options.value().cache_capacity, 5u);
  const std::vector<Setting> unknown{{"HOROVOD_FUSION", "5"}, {"HOROVOD_CACHE_CAPACITY", "5"}};
  EXPECT_NE(options_from_environment(unknown).status().text().find("HOROVOD_FUSION is no option"), std::string::npos);
  const std::vector<Setting> junk{{"HOROVOD_CACHE_CAPACITY", "five"}};
  EXPECT_NE(options_from_environment(junk).status().text().find("HOROVOD_CACHE_CAPACITY='five'"), std::string::npos);
}

TEST_F(EnvOptions, EachVariableSetsItsField) {
  const Variable a("HOROVOD_FUSION_THRESHOLD", "0");
  const Variable b("HOROVOD_FUSION_COPY_LIMIT", "1234");
  const Variable c("HOROVOD_CYCLE_TIME", "2.5");
  const Variable d("HOROVOD_CACHE_CAPACITY", "7");
  const Variable e("HOROVOD_SMALL_LIMIT", "99");
  const Variable f("HOROVOD_SEGMENT_BYTES", "64");
  const Variable g("HOROVOD_SPIN_TIME", "0");
  const Variable h("HOROVOD_STALL_CHECK_TIME_SECONDS", "5");
  const Variable i("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "6");
  const Variable j("HOROVOD_START_TIMEOUT", "8");
  const Variable k("HOROVOD_LOG_LEVEL", "DEBUG");
  const Variable l("HOROVOD_LOG_HIDE_TIME", "1");
  const Variable m("HOROVOD_DYNAMIC_PROCESS_SETS", "1");
  const Variable n("HOROVOD_TRANSPORT", "tcp");
  const Variable o("HOROVOD_FAULT", "kill@segment_send#17:rank=3");
  const Variable p("HOROVOD_TIMELINE", "/tmp/t.json");
  const Variable q("HOROVOD_TIMELINE_MARK_CYCLES", "1");
  const Variable r("HOROVOD_PULL_FROM_BYTES", "4321");
  const Variable s("HOROVOD_HIERARCHICAL_ALLREDUCE", "1");
  const Options options = read();
  EXPECT_EQ(options.fusion_threshold_bytes, 0u);
  EXPECT_EQ(options.fusion_copy_limit_bytes, 1234u);
  EXPECT_EQ(options.cycle_time.count(), 2500);
  EXPECT_EQ(options.cache_capacity, 7u);
  EXPECT_EQ(options.small_limit_bytes, 99u);
  EXPECT_EQ(options.segment_bytes, 64u);
  EXPECT_EQ(options.pull_from_bytes, 4321u);
  EXPECT_EQ(options.spin_time.count(), 0);
  EXPECT_EQ(options.stall_check_time.count(), 5);
  EXPECT_EQ(options.stall_shutdown_time.count(), 6);
  EXPECT_EQ(options.start_timeout.count(), 8);
  EXPECT_EQ(options.log_level, 1);
  EXPECT_TRUE(options.log_hide_time);
  EXPECT_TRUE(options.dynamic_process_sets);
  EXPECT_EQ(options.transport, "tcp");
  EXPECT_EQ(options.fault, "kill@segment_send#17:rank=3");
  EXPECT_EQ(options.timeline, "/tmp/t.json");
  EXPECT_TRUE(options.timeline_mark_cycles);
  EXPECT_TRUE(options.hierarchical_allreduce);
}

TEST_F(EnvOptions, WhatCarriesDeviceMemoryTakesHorovodsSpellings) {
  EXPECT_EQ(read().gpu_operations, "nccl");
  for (const auto& [given, meant] : {std::pair("NCCL", "nccl"), std::pair("Host", "host"), std::pair("MPI", "host")}) {
    const Variable variable("HOROVOD_GPU_OPERATIONS", given);
    EXPECT_EQ(read().gpu_operations, meant);
  }
  EXPECT_NE(refusal_of("HOROVOD_GPU_OPERATIONS", "gloo").find("one of nccl, host, mpi"), std::string::npos);
}

TEST_F(EnvOptions, TheStallCheckCanBeTurnedOff) {
  const Variable off("HOROVOD_STALL_CHECK_DISABLE", "1");
  const Variable time("HOROVOD_STALL_CHECK_TIME_SECONDS", "5");
  EXPECT_EQ(read().stall_check_time.count(), 0);
}

TEST_F(EnvOptions, JunkIsRefusedWithVariableValueAndRange) {
  EXPECT_EQ(
      refusal_of("HOROVOD_FUSION_THRESHOLD", "12x"),
      "HOROVOD_FUSION_THRESHOLD='12x' cannot be used: it has to be a whole number from 0 to 1099511627776 (bytes)");
  for (const char* value : {"", " 1", "1 ", "-1", "1.5", "0x10", "99999999999999999999"}) {
    EXPECT_NE(refusal_of("HOROVOD_CACHE_CAPACITY", value).find("HOROVOD_CACHE_CAPACITY"), std::string::npos);
  }
  for (const char* value : {"", "x", "-0.1", "60001", "nan", "inf"}) {
    EXPECT_NE(refusal_of("HOROVOD_CYCLE_TIME", value).find("milliseconds"), std::string::npos);
  }
  EXPECT_NE(refusal_of("HOROVOD_SEGMENT_BYTES", "63").find("from 64"), std::string::npos);
  EXPECT_NE(refusal_of("HOROVOD_LOG_LEVEL", "loud").find("trace, debug, info"), std::string::npos);
  EXPECT_NE(refusal_of("HOROVOD_TRANSPORT", "pigeon").find("auto, shm, mpi, tcp"), std::string::npos);
  EXPECT_NE(refusal_of("HOROVOD_DYNAMIC_PROCESS_SETS", "yes").find("0 or 1"), std::string::npos);
  EXPECT_NE(refusal_of("HOROVOD_HIERARCHICAL_ALLREDUCE", "on").find("0 or 1"), std::string::npos);
  EXPECT_NE(refusal_of("HOROVOD_TIMELINE_MARK_CYCLES", "often").find("0 or 1"), std::string::npos);
  EXPECT_EQ(refusal_of("HOROVOD_FAULT", "drop@control_send,boom@x:rank=3"),
            "HOROVOD_FAULT='drop@control_send,boom@x:rank=3' cannot be used: it has to be a list of faults "
            "action@point#n[:rank=r], with an action of kill, stop, exit, drop, corrupt, fail, slow, a point of "
            "control_send, control_receive, segment_send, segment_receive, goodbye_send, offer_send, taken_send, and n "
            "from 1; 'boom@x:rank=3' is none");
}

TEST_F(EnvOptions, EveryKnobHasANameAndAMeaningAndTheAgreedOnesAreInTheHandshake) {
  std::set<std::string> names;
  std::set<std::string> agreed;
  for (const Knob& knob : knobs()) {
    EXPECT_TRUE(knob.name.starts_with("HOROVOD_")) << knob.name;
    EXPECT_FALSE(knob.meaning.empty()) << knob.name;
    EXPECT_TRUE(names.insert(std::string(knob.name)).second) << knob.name << " twice";
    if (knob.agreed) agreed.insert(std::string(knob.name));
  }
  std::set<std::string> settings;
  for (const Setting& setting : agreed_settings(Options())) {
    EXPECT_FALSE(setting.value.empty()) << setting.name;
    settings.insert(setting.name);
  }
  EXPECT_EQ(settings, agreed);
}

TEST_F(EnvOptions, AChangedAgreedSettingShowsInTheHandshake) {
  const std::vector<Setting> before = agreed_settings(Options());
  Options changed;
  changed.fusion_threshold_bytes += 1;
  changed.fusion_copy_limit_bytes += 1;
  changed.cache_capacity += 1;
  changed.small_limit_bytes += 1;
  changed.pull_from_bytes += 1;
  changed.segment_bytes += 1;
  changed.dynamic_process_sets = true;
  changed.transport = "tcp";
  changed.gpu_operations = "host";
  changed.nccl_registered_bytes += 1;
  changed.hierarchical_allreduce = true;
  const std::vector<Setting> after = agreed_settings(changed);
  ASSERT_EQ(before.size(), after.size());
  for (std::size_t i = 0; i < before.size(); ++i) EXPECT_NE(before[i].value, after[i].value) << before[i].name;
}

// ---- faults
// ----------------------------------------------------------------------------------------------------------

TEST(FaultPlan, StrikesAtTheNthPassageOfItsPointOnItsRank) {
  const auto plan =
      FaultPlan::parse("drop@control_receive#2,fail@segment_send:rank=1,corrupt@control_send#1:rank=0", 1);
  ASSERT_TRUE(plan.ok()) << plan.status().text();
  FaultPlan& hook = *plan.value();
  EXPECT_FALSE(hook.empty());
  EXPECT_EQ(hook.at(FaultPoint::kControlSend, 0), FaultAction::kPass) << "it is meant for another rank";
  EXPECT_EQ(hook.at(FaultPoint::kControlReceive, 0), FaultAction::kPass);
  EXPECT_EQ(hook.at(FaultPoint::kSegmentSend, 0), FaultAction::kFail) << "the first, without a number";
  EXPECT_EQ(hook.at(FaultPoint::kSegmentSend, 0), FaultAction::kPass);
  EXPECT_EQ(hook.at(FaultPoint::kControlReceive, 0), FaultAction::kDrop);
  EXPECT_EQ(hook.at(FaultPoint::kControlReceive, 0), FaultAction::kPass);
  EXPECT_EQ(hook.at(FaultPoint::kSegmentReceive, 0), FaultAction::kPass);
}

TEST(FaultPlan, KnowsThePointsOfTheStreamsOwnMessages) {
  const auto plan = FaultPlan::parse("drop@goodbye_send,corrupt@offer_send,drop@taken_send#2", 0);
  ASSERT_TRUE(plan.ok()) << plan.status().text();
  EXPECT_EQ(plan.value()->at(FaultPoint::kGoodbyeSend, 1), FaultAction::kDrop);
  EXPECT_EQ(plan.value()->at(FaultPoint::kOfferSend, 1), FaultAction::kCorrupt);
  EXPECT_EQ(plan.value()->at(FaultPoint::kTakenSend, 1), FaultAction::kPass);
  EXPECT_EQ(plan.value()->at(FaultPoint::kTakenSend, 1), FaultAction::kDrop);
}

TEST(FaultPlan, AnEmptyTextIsNoFault) {
  const auto plan = FaultPlan::parse("", 0);
  ASSERT_TRUE(plan.ok());
  EXPECT_TRUE(plan.value()->empty());
}

TEST(FaultPlan, SlowIsARateAndNoEvent) {
  const auto plan = FaultPlan::parse("slow@segment_send#5000:rank=1,slow@segment_send#70:rank=0", 1);
  ASSERT_TRUE(plan.ok()) << plan.status().text();
  EXPECT_EQ(plan.value()->bytes_per_second(), 5000);
  EXPECT_TRUE(plan.value()->empty()) << "nothing has to be asked at each passage";
  EXPECT_EQ(FaultPlan::parse("drop@control_send", 0).value()->bytes_per_second(), std::nullopt);
}

TEST(FaultPlan, RefusesWhatItCannotReadAndNamesIt) {
  for (const char* text :
       {"boom@segment_send", "drop", "drop@nowhere", "drop@control_send#x", "drop@control_send#1:host=2",
        "drop@control_send#1:rank=x", "drop@control_send#-1", "drop@control_send#0", "boom@x:rank=1",
        "drop@nowhere:rank=1", "drop@control_send,,", "corrupt@segment_send", "corrupt@segment_receive#2:rank=1",
        "slow@segment_send", "slow@segment_send#0", "slow@control_send#9"}) {
    const auto plan = FaultPlan::parse(text, 2);
    EXPECT_EQ(plan.status().code(), StatusCode::kInvalidArgument) << text;
  }
  EXPECT_NE(FaultPlan::parse("drop@control_send,boom@x", 0).status().text().find("'boom@x'"), std::string::npos);
  EXPECT_NE(FaultPlan::parse("corrupt@segment_send", 0).status().text().find("no checksum"), std::string::npos);
}

TEST(FaultPlan, KillsStopsAndExitsItsOwnProcess) {
  const auto fate_of_child = [](const char* text) {
    const pid_t child = ::fork();
    if (child == 0) {
      auto plan = FaultPlan::parse(text, 0);
      plan.value()->at(FaultPoint::kSegmentSend, 1);
      ::_exit(7);
    }
    int status = 0;
    ::waitpid(child, &status, WUNTRACED);
    if (WIFSTOPPED(status)) {
      ::kill(child, SIGKILL);
      int end = 0;
      ::waitpid(child, &end, 0);
    }
    return status;
  };
  const int killed = fate_of_child("kill@segment_send");
  EXPECT_TRUE(WIFSIGNALED(killed) && WTERMSIG(killed) == SIGKILL);
  EXPECT_TRUE(WIFSTOPPED(fate_of_child("stop@segment_send")));
  const int exited = fate_of_child("exit@segment_send");
  EXPECT_TRUE(WIFEXITED(exited) && WEXITSTATUS(exited) == 0);
}

// ---- the log
// ---------------------------------------------------------------------------------------------------------

TEST(Log, ShowsWhatIsAtLeastAsUrgentAsItsLevelWithTheRank) {
  log::configure(log::Level::kWarning, /*hide_time=*/true, 3, 8);
  ::testing::internal::CaptureStderr();
  log::info("unseen {}", 1);
  log::warning("seen {}", 2);
  const std::string text = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(text.find("unseen"), std::string::npos) << text;
  EXPECT_NE(text.find("hvd rank 3/8 [warning] seen 2\n"), std::string::npos) << text;
  EXPECT_FALSE(log::enabled(log::Level::kInfo));
  log::configure(log::Level::kDebug, /*hide_time=*/false, 0, 1);
  EXPECT_TRUE(log::enabled(log::Level::kDebug));
  EXPECT_FALSE(log::enabled(log::Level::kTrace));
  log::configure(log::Level::kWarning, true, 0, 1);
}

}  // namespace
}  // namespace hvd::testing
