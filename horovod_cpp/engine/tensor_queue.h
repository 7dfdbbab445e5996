// Operations of this rank from enqueue until their call begins. Framework threads push; the holder of the Turn drains.
// Any thread.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "common/clock.h"
#include "common/guarded.h"
#include "horovod_cpp/engine/control_plane.h"
#include "horovod_cpp/engine/handle_state.h"
#include "ops/device/device_events.h"

namespace hvd {

struct TensorEntry {
  struct Memory {
    const std::byte* input = nullptr;
    std::byte* output = nullptr;
  };
  Request request;
  const std::byte* input = nullptr;  ///< nullptr with a handle of nullptr: of a rank that has joined
  std::byte* output = nullptr;
  std::vector<Memory> more;   ///< a group: of the tensors after the first
  int device = -1;            ///< of device memory; of a join: where to put what stands in for tensors, -1: anywhere
  bool caller_waits = false;  ///< of device memory: the caller goes on on the same stream once it is in line
  DeviceStream producer = nullptr;  ///< of device memory: the stream that makes the inputs, until `ready` stands for it
  DeviceMarkRef ready;
  HandleRef handle;
  std::shared_ptr<void> keep_alive;
  TimePoint enqueued;
};

class TensorQueue {
 public:
  /// Takes the entry in; an empty name becomes "noname.<n>", counted per process set and operation.
  /// kInvalidArgument, with the age of the first, when that name is in flight; kPrecondition while a join waits; the
  /// closing reason after `close`.
  Status push(TensorEntry entry, const std::string& call_site);

  /// What was pushed since the last time. Empty vectors when nothing was.
  RequestsEnqueued drain();
  bool has_new() const;

  /// Whether an entry of that key waits.
  bool has(const OperationKey& key) const;
  /// When the entry of that key was handed over, if it waits.
  std::optional<TimePoint> enqueued(const OperationKey& key) const;
  /// The device that a waiting join names; -1: none.
  int join_device() const;
  /// All ranks have joined: unnamed operations are counted from the start again, alike on all.
  void begin_epoch();

  /// Removes an entry that was drained before; nothing when there is none.
  std::optional<TensorEntry> take(const OperationKey& key);
  std::vector<TensorEntry> take_set(ProcessSetId process_set);
  /// Those of a set that are on device memory.
  std::vector<TensorEntry> take_on_devices(ProcessSetId process_set);
  /// Everything; later pushes get `reason`.
  std::vector<TensorEntry> close(const Status& reason);

  /// Keys that wait since before `time`. Not of a join, which may well wait for long.
  std::vector<OperationKey> waiting_since_before(TimePoint time) const;
  /// When the oldest but a join was enqueued; kNever when nothing waits.
  TimePoint oldest() const;

 private:
  struct State {
    std::map<OperationKey, TensorEntry> waiting;
    std::vector<OperationKey> fresh;
    std::vector<CallSiteDefinition> fresh_call_sites;
    std::unordered_map<std::string, std::uint32_t> call_sites;
    std::map<std::pair<ProcessSetId, OpKind>, std::uint64_t> unnamed;
    std::uint64_t epoch = 0;
    bool joining = false;  // a join waits: meanwhile nothing else is taken in
    Status closed;
  };

  /// Takes out the entries that `wanted` says yes to.
  template <typename Wanted>
  static std::vector<TensorEntry> take_if(State& state, Wanted wanted);

  Guarded<State> state_;
};

}  // namespace hvd
