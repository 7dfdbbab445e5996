// The engine of one rank: owns everything, knows no thread. A process has one; a test makes thousands.
// `step` and what it calls run under the Turn; `enqueue` and the functions beside it may be called from any thread.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include <horovod_cpp/options.h>

#include "common/fault.h"
#include "common/guarded.h"
#include "common/loop/loop.h"
#include "horovod_cpp/engine/call_inspector.h"
#include "horovod_cpp/engine/controller.h"
#include "horovod_cpp/engine/executor.h"
#include "horovod_cpp/engine/stall_inspector.h"
#include "horovod_cpp/engine/tensor_queue.h"

namespace hvd {

struct RuntimeStatistics {
  ExecutorStatistics executor;
  TransportStatistics transport;
  Counter cache_hits;
  NcclBackend::Statistics nccl;
};

class Runtime final : private TransportEvents {
 public:
  struct Settings {
    MembershipRef everyone;
    std::vector<std::vector<int>> process_sets;  ///< static sets, ascending ranks; ids 1, 2, ...
    Options options;
    FaultHook* fault = nullptr;
    DeviceSource* devices = nullptr;  ///< nullptr: host memory only
    Timeline* timeline = nullptr;     ///< outlives the runtime
  };

  Runtime(std::unique_ptr<Fabric> fabric, const Clock& clock, Settings settings);
  ~Runtime() override;
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  int rank() const { return fabric_->rank(); }
  int size() const { return fabric_->size(); }
  int ranks_on_this_host() const;
  const Options& options() const { return settings_.options; }
  const Clock& clock() const { return clock_; }

  // ---- any thread ------------------------------------------------------------------------------------------------

  /// Hands an operation over. Checks what this rank can know; kInvalidArgument or kPrecondition at once, everything
  /// else through the handle. `entry.enqueued` is filled in.
  Status enqueue(TensorEntry entry, const CallSite& call_site);
  /// An entry to fill in: see TensorQueue::blank.
  TensorEntry blank_entry() { return queue_.blank(); }
  /// The members of a process set; nullptr for an unknown id.
  MembershipRef process_set(ProcessSetId id) const;
  std::vector<ProcessSetId> process_set_ids() const;
  /// Asks for the end of the job; `finished` becomes true in a later step.
  void request_shutdown() { shutdown_wanted_.store(true); }
  bool finished() const { return finished_.load(); }
  /// A rank has gone without a farewell.
  bool lost_a_peer() const { return lost_a_peer_.load(); }
  RuntimeStatistics statistics() const;
  /// Lets `stream` wait for the results of an operation on device memory that is done.
  Status let_stream_wait(const DeviceMarkRef& launched, DeviceStream stream) {
    return devices_.wait_for(launched, stream);
  }
  /// True when a framework thread has handed over something that no step has seen.
  bool has_new_work() const { return queue_.has_new() || shutdown_wanted_.load(); }

  // ---- the holder of the Turn ------------------------------------------------------------------------------------

  /// One turn of the loop: what was enqueued, what arrived, what is ready, what is due. Never waits.
  /// False when there was nothing to do.
  bool step();
  /// When the last step ended, about.
  TimePoint stepped_at() const { return stepped_at_; }
  /// The engine has thrown `what`, or something under it has, and nobody knows how far it came: ends all operations,
  /// and the job of this rank, which its peers see as a loss. Throws nothing.
  void break_down(const char* what) noexcept;
  /// Before sleeping; false when there is something to do after all.
  bool prepare_to_sleep() { return fabric_->arm() && !has_new_work() && !loop_.has_ready() && ended_calls_.empty(); }
  void woken() { fabric_->disarm(); }
  /// While somebody waits here and looks for progress, peers that sleep need not be woken at once: see Transport.
  void hold_bells() { fabric_->hold_bells(); }
  void ring() { fabric_->ring(); }
  /// When `step` has to be called at the latest.
  TimePoint next_deadline() const;
  /// Something is under way that other ranks will answer soon.
  bool busy() const { return !executor_.idle() || fabric_->needs_polling(); }
  Fabric& fabric() { return *fabric_; }

 private:
  void on_control(int peer, std::span<const std::byte> message) override;
  void on_peer_lost(int peer, const Status& status) override;
  void on_goodbye(int peer) override;

  void dispatch(const Event& event);
  void carry_out(Actions actions);
  void fail_set(const FailedSet& failed);
  bool take_enqueued();
  bool check_stalls(TimePoint now);
  bool check_calls(TimePoint now);
  void end_calls();
  void begin_closing(const Status& reason);
  bool continue_closing(TimePoint now);
  void publish_sets();

  const Clock& clock_;
  Settings settings_;
  std::unique_ptr<Fabric> fabric_;
  Loop loop_;
  TensorQueue queue_;
  ProcessSetTable sets_;
  Guarded<ProcessSetTable> published_sets_;  // a copy for other threads
  Controller controller_;
  Devices devices_;
  Executor executor_;
  StallInspector stalls_;
  CallInspector slow_calls_;
  std::vector<CallEnded> ended_calls_;  // told to the controller after the step that ended them
  TimePoint controller_deadline_ = kNever;
  TimePoint stepped_at_{};
  std::vector<bool> said_goodbye_;
  std::vector<bool> lost_;
  std::atomic<bool> shutdown_wanted_{false};
  bool shutdown_requested_ = false;
  bool closing_ = false;
  bool goodbyes_sent_ = false;
  TimePoint closing_deadline_ = kNever;
  TimePoint shutdown_deadline_ = kNever;
  std::atomic<bool> finished_{false};
  std::atomic<bool> lost_a_peer_{false};
};

}  // namespace hvd
