// Notices operations that wait too long for other ranks, on every rank, while something waits; idle ranks have no
// timer. The coordinator is asked who is missing, and each rank tells its own user.
// Runs under the Turn.
#pragma once

#include <vector>

#include "horovod_cpp/engine/control_plane.h"
#include "horovod_cpp/engine/tensor_queue.h"

namespace hvd {

class StallInspector {
 public:
  explicit StallInspector(Duration check_time) : check_time_(check_time) {}

  /// Keys to ask about, once per check time; empty when it is not time or nothing stalls.
  std::vector<OperationKey> look(const TensorQueue& queue, TimePoint now);
  /// When to look again: kNever while nothing waits.
  TimePoint next_look(const TensorQueue& queue) const;

  /// "rank 3 is missing for: allreduce 'a', ..." for people.
  static std::string report(const std::vector<StallReportMessage::Line>& lines, Duration check_time);

 private:
  Duration check_time_;
  TimePoint nothing_due_until_ = TimePoint::min();  // spares a walk through the queue at every step of the loop
  TimePoint last_look_ = TimePoint::min();
};

}  // namespace hvd
