// What the timeline is told: facts about operations and calls, as values on their way to the thread that writes them.
// Any thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "common/clock.h"
#include "horovod_cpp/engine/request_response.h"
#include "ops/activity.h"

namespace hvd::timeline {

/// A call by its process set and its number there.
using CallId = std::pair<ProcessSetId, std::uint64_t>;

/// An operation and what it works on.
struct Operand {
  OperationKey key;
  DataType dtype = DataType::kUint8;
  Shape shape;              ///< of the first tensor
  std::size_t tensors = 1;  ///< above 1: a group
  std::size_t bytes = 0;    ///< of all its tensors
};

/// Of this rank. Its time is when the user called.
struct Enqueued {
  OperationKey key;
};
/// On the coordinator: a rank has asked for the operation.
struct RankReady {
  OperationKey key;
  int rank = 0;
};
/// On the coordinator, if it takes part: all ranks have asked and agree.
struct Agreed {
  Operand operand;
};
/// The answer is here: these operations are one call.
struct CallAgreed {
  CallId call;
  std::vector<Operand> operands;
  std::string transports;  ///< that carry data to its members; empty: it has one member
};
struct CallStarted {
  CallId call;
};
struct ActivityBegun {
  CallId call;
  ActivityKind kind = ActivityKind::kPack;
  std::string_view algorithm;
};
struct ActivityEnded {
  CallId call;
};
struct CallFinished {
  CallId call;
  std::string error;  ///< empty: it ended well
};
/// An operation ended that never became a call of this rank.
struct OperationEnded {
  OperationKey key;
  std::string error;
};
/// The loop took up new operations.
struct CycleStarted {};

struct Record {
  TimePoint time;
  std::variant<Enqueued, RankReady, Agreed, CallAgreed, CallStarted, ActivityBegun, ActivityEnded, CallFinished,
               OperationEnded, CycleStarted>
      what;
};

}  // namespace hvd::timeline
