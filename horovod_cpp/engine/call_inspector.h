// Notices calls that have begun and do not end, on every rank, while one is in flight: a rank has stopped, or its
// network. What waits for ranks that have not asked for it yet is the StallInspector's.
// Runs under the Turn.
#pragma once

#include <string>
#include <vector>

#include "horovod_cpp/engine/executor.h"

namespace hvd {

class CallInspector {
 public:
  /// Calls are slow from `check_time` on, and late from `most_time` on; 0: never.
  CallInspector(Duration check_time, Duration most_time) : check_time_(check_time), most_time_(most_time) {}

  struct Found {
    std::vector<CallInFlight> slow;  ///< to tell the user of; once per check time
    std::vector<CallInFlight> late;  ///< to give up
  };
  Found look(const Executor& executor, TimePoint now);
  /// When to look again: kNever while nothing is in flight.
  TimePoint next_look(const Executor& executor) const;

  static std::string report(const std::vector<CallInFlight>& slow, TimePoint now);
  static std::string late_text(const CallInFlight& call, TimePoint now);

 private:
  Duration check_time_;
  Duration most_time_;
  TimePoint nothing_due_until_ = TimePoint::min();  // spares a walk through the calls at every step of the loop
  TimePoint last_report_ = TimePoint::min();
};

}  // namespace hvd
