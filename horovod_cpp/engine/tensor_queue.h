// Operations of this rank from enqueue until their call begins. Framework threads push; the holder of the Turn drains.
// Any thread.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "common/clock.h"
#include "common/guarded.h"
#include "common/recycled.h"
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

/// Where the user called, for messages; an empty file: not known.
struct CallSite {
  std::string_view file;
  int line = 0;
};

class TensorQueue {
 public:
  /// A blank entry, with room in its strings and vectors where there was one to reuse.
  TensorEntry blank();
  /// Keeps the room that an entry has which is done.
  void reuse(TensorEntry entry);

  /// Takes the entry in; an empty name becomes "noname.<n>", counted per process set and operation.
  /// kInvalidArgument, with the age of the first, when that name is in flight; kPrecondition while a join waits; the
  /// closing reason after `close`.
  Status push(TensorEntry entry, const CallSite& call_site);

  /// What was pushed since the last time. Empty vectors when nothing was. The holder of the Turn.
  RequestsEnqueued drain();
  bool has_new() const { return has_new_.load(); }

  /// Whether an entry of that key waits.
  bool has(const OperationKey& key) const;
  /// When the entry of that key was handed over, if it waits.
  std::optional<TimePoint> enqueued(const OperationKey& key) const;
  /// The device that a waiting join names; -1: none.
  int join_device() const;
  /// All ranks have joined: unnamed operations are counted from the start again, alike on all.
  void begin_epoch();

  /// A copy without the handle, for a call that may yet be withdrawn: the entry goes on waiting, and `close` leaves it
  /// until it is taken or given back. Nothing when there is none.
  std::optional<TensorEntry> lend(const OperationKey& key);
  /// The call was withdrawn. The closing reason after `close`: the entry is then still lent, and has to be ended.
  Status give_back(const OperationKey& key);

  /// Removes an entry that was drained before; nothing when there is none.
  std::optional<TensorEntry> take(const OperationKey& key);
  std::vector<TensorEntry> take_set(ProcessSetId process_set);
  /// Those of a set that are on device memory.
  std::vector<TensorEntry> take_on_devices(ProcessSetId process_set);
  /// Everything but what is lent; later pushes get `reason`.
  std::vector<TensorEntry> close(const Status& reason);

  /// Why later pushes are refused; kOk before `close`.
  Status closing_reason() const;

  /// Keys that wait since before `time`. Not of a join, which may well wait for long.
  std::vector<OperationKey> waiting_since_before(TimePoint time) const;
  /// When the oldest but a join was enqueued; kNever when nothing waits.
  TimePoint oldest() const;

 private:
  struct ByKey {
    using is_transparent = void;
    bool operator()(const TensorEntry& a, const TensorEntry& b) const { return a.request.key < b.request.key; }
    bool operator()(const TensorEntry& a, const OperationKey& b) const { return a.request.key < b; }
    bool operator()(const OperationKey& a, const TensorEntry& b) const { return a < b.request.key; }
  };
  struct ByPlace {
    using is_transparent = void;
    template <typename A, typename B>
    bool operator()(const A& a, const B& b) const {
      return std::pair(a.second, std::string_view(a.first)) < std::pair(b.second, std::string_view(b.first));
    }
  };
  using Waiting = std::set<TensorEntry, ByKey>;

  struct State {
    Waiting waiting;
    std::vector<Waiting::const_iterator> fresh;
    std::vector<Waiting::const_iterator> lent;
    std::vector<CallSiteDefinition> fresh_call_sites;
    std::map<std::pair<std::string, int>, std::uint32_t, ByPlace> call_sites;
    std::map<std::pair<ProcessSetId, OpKind>, std::uint64_t> unnamed;
    std::uint64_t epoch = 0;
    bool joining = false;  // a join waits: meanwhile nothing else is taken in
    Status closed;
  };

  static std::uint32_t intern(State& state, const CallSite& call_site);
  /// Takes an entry out, and keeps what it lay in for the next one.
  TensorEntry take_out(State& state, Waiting::const_iterator place);
  /// Takes out the entries that `wanted` says yes to.
  template <typename Wanted>
  std::vector<TensorEntry> take_if(State& state, Wanted wanted);

  Guarded<State> state_;
  Spares<Waiting::node_type> spare_nodes_;  // with nothing in them
  Spares<TensorEntry> spare_entries_;
  std::atomic<bool> has_new_{false};               // fresh is not empty; changes with the lock held
  std::vector<Waiting::const_iterator> taken_up_;  // by drain(), which keeps its room
};

}  // namespace hvd
