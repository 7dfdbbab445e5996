// What comes into the controller and what goes out of it, as values: the interface of a state machine that knows no
// thread, clock or transport.
#pragma once

#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "common/clock.h"
#include "horovod_cpp/engine/request_response.h"

namespace hvd {

struct RequestsEnqueued {
  std::vector<Request> requests;
  std::vector<CallSiteDefinition> call_sites;
};
struct MessageArrived {
  int peer = -1;
  std::span<const std::byte> bytes;  ///< valid during the event
};
struct PeerLost {
  int rank = -1;
  Status reason;
};
struct ShutdownWanted {};
/// A call ended on this rank; a failure is told to the other members.
struct CallEnded {
  ProcessSetId process_set = 0;
  std::uint64_t call = 0;
  Status status;
  int in_flight = 0;       ///< calls that still are, on this rank
  bool withdrawn = false;  ///< a standing one, whose operation waits as before
};
/// Operations of this rank that have waited for longer than the stall check time.
struct StallNoticed {
  std::vector<OperationKey> keys;
};
struct TimePassed {};

using Event =
    std::variant<RequestsEnqueued, MessageArrived, PeerLost, ShutdownWanted, CallEnded, StallNoticed, TimePassed>;

struct FailedSet {
  ProcessSetId process_set = 0;
  Status reason;
};
struct LostRank {
  int rank = -1;
  Status reason;
};
struct FailedCall {
  ProcessSetId process_set = 0;
  std::uint64_t call = 0;
  Status reason;
};

struct WithdrawnCall {
  ProcessSetId process_set = 0;
  std::uint64_t call = 0;
};

/// What the owner does, in the order of the members.
struct Actions {
  std::vector<std::pair<int, std::vector<std::byte>>> messages;  ///< to peers
  std::vector<LostRank> lost_ranks;      ///< calls in flight with that rank end with the reason, also of a removed set
  std::vector<FailedSet> failed_sets;    ///< everything of the set, pending or in flight, ends with the reason
  std::vector<WithdrawnCall> withdrawn;  ///< standing calls in flight that are to be withdrawn
  std::vector<Response> responses;       ///< to carry out, in this order
  std::vector<Response> discards;        ///< standing calls that are not begun here: what peers sent for them may go
  std::vector<FailedCall> failed_calls;
  std::vector<StallReportMessage::Line> stalls;  ///< answers to StallNoticed
  TimePoint look_again = kNever;                 ///< send TimePassed then
};

}  // namespace hvd
