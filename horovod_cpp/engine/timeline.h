// The timeline of one rank: notes what happens to operations while it is on. One relaxed load while it is off; one
// short lock for each fact while it is on, and never a file: a thread of its own writes. Any thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "horovod_cpp/engine/control_plane.h"
#include "horovod_cpp/engine/tensor_queue.h"
#include "horovod_cpp/engine/timeline_writer.h"
#include "ops/activity.h"
#include "ops/membership.h"
#include "ops/transport/fabric.h"

namespace hvd {

class Timeline {
 public:
  Timeline(const Clock& clock, int rank, int size) : clock_(clock), rank_(rank), size_(size) {}
  /// Stops.
  ~Timeline();
  Timeline(const Timeline&) = delete;
  Timeline& operator=(const Timeline&) = delete;

  /// Records into the file at `path` from now on. "{rank}" in it stands for the number of this rank; without it only
  /// rank 0 records, and other ranks do nothing. While another file is written it is ended first; the same file goes
  /// on. kInvalidArgument with path and reason if the file cannot be written; what was recorded before then goes on.
  Status start(const std::string& path, bool mark_cycles);
  /// Ends the file. Nothing if the timeline is off. Waits until everything is in the file.
  void stop();

  bool on() const { return queue_.is_open(); }

  // ---- facts; to be told only while `on()` -------------------------------------------------------------------------

  /// The loop took these up.
  void taken_up(const RequestsEnqueued& fresh, const TensorQueue& queue);
  /// On the coordinator. `takes_part`: this rank is in the process set.
  void rank_ready(const OperationKey& key, int rank);
  void answered(const Response& response, bool takes_part);

  void call_agreed(const Response& response, const std::vector<TensorEntry>& entries, const Membership& membership,
                   const Fabric& fabric);
  void call_started(timeline::CallId call);
  void activity_begun(timeline::CallId call, ActivityKind kind, std::string_view algorithm);
  void activity_ended(timeline::CallId call);
  void call_ended(timeline::CallId call, const Status& status);
  /// The call of that operation ended with nothing done, and its negotiation begins.
  void call_withdrawn(timeline::CallId call, const OperationKey& key);
  /// An operation that was no part of a call.
  void operation_ended(const OperationKey& key, const Status& status);

 private:
  void note(decltype(timeline::Record::what) what);

  const Clock& clock_;
  const int rank_;
  const int size_;
  timeline::RecordQueue queue_;
  std::atomic<bool> marks_cycles_{false};
  std::mutex changing_;  // one start or stop at a time
  std::unique_ptr<timeline::Writer> writer_;
};

/// For those who may have no timeline at all.
inline bool is_on(const Timeline* timeline) { return timeline != nullptr && timeline->on(); }

/// Tells the timeline what a call does.
class CallActivities final : public ActivityListener {
 public:
  CallActivities() = default;
  CallActivities(Timeline* timeline, timeline::CallId call) : timeline_(timeline), call_(std::move(call)) {}

  void on_activity_begin(ActivityKind kind, std::string_view algorithm) override {
    if (is_on(timeline_)) timeline_->activity_begun(call_, kind, algorithm);
  }
  void on_activity_end() override {
    if (is_on(timeline_)) timeline_->activity_ended(call_);
  }

 private:
  Timeline* timeline_ = nullptr;
  timeline::CallId call_;
};

}  // namespace hvd
