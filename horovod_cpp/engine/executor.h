// Carries out responses: finds the tensors, starts each call as a coroutine, and ends its handles. Many calls are in
// flight at once; they start in the agreed order. Runs under the Turn.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include <horovod_cpp/options.h>

#include "common/counter.h"
#include "common/loop/loop.h"
#include "horovod_cpp/engine/control_plane.h"
#include "horovod_cpp/engine/devices.h"
#include "horovod_cpp/engine/fusion_planner.h"
#include "horovod_cpp/engine/process_set_table.h"
#include "horovod_cpp/engine/reordering.h"
#include "horovod_cpp/engine/tensor_queue.h"
#include "horovod_cpp/engine/timeline.h"
#include "ops/collective_context.h"
#include "ops/host_backend.h"

namespace hvd {

struct ExecutorStatistics {
  Counter operations_done;
  Counter operations_failed;
  Counter bytes_reduced;
  Counter bytes_reordered;
  Counter collective_calls;
  Counter standing_calls;            ///< of these, begun without asking
  Counter standing_calls_withdrawn;  ///< of these, not begun by all ranks, and negotiated after all
};

/// A call that has begun and has not ended, for messages; also one that a device is not done with.
struct CallInFlight {
  ProcessSetId process_set = 0;
  std::uint64_t call = 0;
  OpKind op = OpKind::kAllreduce;
  std::string name;       ///< of its first operation
  std::size_t count = 0;  ///< of its operations
  TimePoint begun;
  std::vector<int> awaited;  ///< global ranks that have yet to send something, or to take it
  bool on_device = false;    ///< it has ended for this rank's host, and it is not known who is awaited
};

class Executor {
 public:
  Executor(Loop& loop, Fabric& fabric, const ProcessSetTable& sets, TensorQueue& queue, Devices& devices,
           const Options& options, std::function<void(CallEnded)> on_call_ended);

  /// Tells `timeline`, which may be nullptr, what happens. Before the first call.
  void record_in(Timeline* timeline) { timeline_ = timeline; }

  /// An execution starts a call, now or when earlier ones of its set have ended; an error ends its handles.
  void carry_out(Response response);
  /// A standing call that the other ranks do not all begin: its operation waits as if it had not begun.
  void withdraw(const WithdrawnCall& withdrawn);
  /// A standing call that does not begin here: what other ranks have sent for it goes nowhere.
  void discard(const Response& call);
  /// Ends what is in flight, or waits to start, in a process set.
  void fail_set(ProcessSetId process_set, const Status& reason);
  /// Ends what is in flight, or waits to start, with a lost rank: also in sets that have been removed meanwhile.
  void fail_rank(int rank, const Status& reason);
  /// Another member could not finish the call; it may not have started here yet.
  void fail_call(const FailedCall& failed);
  void fail_all(const Status& reason);
  /// Ends a call that is in flight; the other ranks are told as of any that fails.
  void give_up_call(const CallInFlight& call, const Status& reason);
  /// Ends entries that never became a call.
  void end_entries(std::vector<TensorEntry> entries, const Status& reason);

  int in_flight() const { return in_flight_; }
  /// When the oldest call that is in flight began; kNever when there is none.
  TimePoint oldest_call() const;
  std::vector<CallInFlight> calls_begun_before(TimePoint time) const;
  bool idle() const { return in_flight_ == 0 && queued_ == 0; }
  /// Any thread.
  const ExecutorStatistics& statistics() const { return statistics_; }

 private:
  // Everything that a call owns; transports keep it alive as long as they use its memory.
  struct Call {
    Response response;
    MembershipRef membership;
    std::vector<TensorEntry> entries;
    std::vector<std::shared_ptr<std::byte>> outputs;  // that the engine made, while the result may not be wanted
    Reordering reordering;
    CallActivities activities;
    std::unique_ptr<CollectiveContext> context;
    std::unique_ptr<Backend> of_device;  // what carries it out, where that is not the host's
    Backend* backend = nullptr;
    Priority priority = 0;
    TimePoint begun;
    bool withdrawn = false;
  };
  using CallRef = std::shared_ptr<Call>;
  // The calls of one process set.
  struct Lane {
    std::map<std::uint64_t, CallRef> running;   // by call number
    std::map<std::uint64_t, CallRef> standing;  // likewise
    std::deque<CallRef> waiting;
    std::deque<std::weak_ptr<Call>> in_line;  // ended here, and held by a device that may not be done with it
    std::map<std::uint64_t, Status> failed_early;
  };

  void carry_out_standing(Response response);
  void start_what_may(Lane& lane);
  void start(Lane& lane, CallRef call);
  CollectiveContext::Settings context_settings(const Call& call) const;
  Task<void> run(CallRef call);
  Task<Status> perform(CallRef call);
  Task<Status> perform_on_tensors(CallRef call);
  Status choose_backend(Call& call);
  Result<OutputTensor> make_output(Call& call, const TensorType& like, std::int64_t rows);
  Task<Status> allreduce(CallRef call);
  Task<Status> allgather(CallRef call);
  Task<Status> broadcast(CallRef call);
  Task<Status> reducescatter(CallRef call);
  Task<Status> alltoall(CallRef call);
  std::optional<TensorEntry> stand_in(const Response& response, const ResponseEntry& entry) const;
  Result<TensorEntry::Memory> memory_in_agreed_order(Call& call, std::size_t entry, std::size_t tensor, bool is_read);
  void bring_back(Call& call);
  FusionLimits limits() const;
  AllreduceCall allreduce_call(const Response& response) const;
  void finish(CallRef call, Status status);
  static void keep_in_line(Lane& lane, const CallRef& call);
  void end_entry(TensorEntry& entry, const Status& status);

  Loop& loop_;
  Fabric& fabric_;
  const ProcessSetTable& sets_;
  TensorQueue& queue_;
  Devices& devices_;
  const Options& options_;
  std::function<void(CallEnded)> on_call_ended_;
  Timeline* timeline_ = nullptr;
  HostBufferPool buffers_;
  HostBackend host_;
  std::map<ProcessSetId, Lane> lanes_;
  Priority next_priority_ = 0;
  int in_flight_ = 0;
  int queued_ = 0;
  ExecutorStatistics statistics_;
};

}  // namespace hvd
