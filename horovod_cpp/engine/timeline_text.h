// Records as events of the Trace Event Format, which chrome://tracing and Perfetto load, with Horovod's names: each
// tensor is a "process", and what happens to it nests there.
// One thread: the one that writes the file.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "horovod_cpp/engine/timeline_record.h"

namespace hvd::timeline {

/// Where and when a timeline was started.
struct Origin {
  TimePoint start;  ///< time 0 of its events
  std::int64_t micros_since_epoch = 0;
  int rank = 0;
  int size = 1;
};

/// A string with its quotation marks as JSON has it. Bytes that are no UTF-8 become question marks.
std::string json_string(std::string_view text);

class Text {
 public:
  explicit Text(const Origin& origin);

  void add(const Record& record);
  /// Says that so many records were not kept.
  void add_lost(std::size_t records, TimePoint when);
  /// The events since the last time, with a comma and a newline between two; empty when there are none.
  std::string take();

 private:
  // An operation in flight: its place, and how many of its events have begun and not ended.
  struct Operation {
    OperationKey key;
    int lane = 0;
    std::size_t row = 0;
    int open = 0;
    bool agreed = false;
  };
  // A tensor, or all unnamed operations of a kind. It has as many rows as operations were in flight at once.
  struct Lane {
    int number = 0;
    std::vector<bool> taken;
  };
  struct Call {
    std::vector<Operation> operations;
    std::string transports;
    std::size_t bytes = 0;
  };

  void write(TimePoint time, const Enqueued& fact);
  void write(TimePoint time, const RankReady& fact);
  void write(TimePoint time, const Agreed& fact);
  void write(TimePoint time, const CallAgreed& fact);
  void write(TimePoint time, const CallStarted& fact);
  void write(TimePoint time, const ActivityBegun& fact);
  void write(TimePoint time, const ActivityEnded& fact);
  void write(TimePoint time, const CallFinished& fact);
  void write(TimePoint time, const OperationEnded& fact);
  void write(TimePoint time, const CycleStarted& fact);

  Operation place(const OperationKey& key);
  Operation& negotiated(TimePoint time, const OperationKey& key);
  void begin_agreed(TimePoint time, Operation& operation, const Operand& operand);
  void begin(TimePoint time, Operation& operation, std::string_view name, std::string_view arguments = {});
  void end(TimePoint time, Operation& operation, std::string_view arguments = {});
  void finish(TimePoint time, Operation& operation, std::string_view error);
  void name_lane(int number, std::string_view name);
  void event(std::string_view fields);
  std::string micros(TimePoint time) const;

  Origin origin_;
  std::string text_;
  std::map<std::string, Lane> lanes_;
  std::map<OperationKey, Operation> negotiating_;  // until its call, or its end
  std::map<CallId, Call> calls_;
};

}  // namespace hvd::timeline
