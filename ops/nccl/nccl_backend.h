// NCCL for one rank: a communicator for each process set and the devices that its ranks use together, and for
// hierarchical calls one of the ranks on this host, made at its first call, watched while work is pending, and aborted
// when a member is lost. What goes wrong once ends the set's calls on device memory for good; its calls on host memory
// go on. Runs under the Turn.
#pragma once

#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "common/counter.h"
#include "ops/backend.h"
#include "ops/device/device_engine.h"
#include "ops/device_call_settings.h"
#include "ops/nccl/nccl_api.h"
#include "ops/nccl/nccl_reaper.h"

namespace hvd {

class NcclBackend {
 public:
  /// Tells that a call failed which had ended well for this rank's engine; the other ranks do not know of it.
  using FailedLate = std::function<void(std::uint16_t process_set, std::uint64_t call, const Status& reason)>;

  struct Settings {
    Duration start_timeout{};
    std::size_t registered_bytes = 0;  ///< equal on all ranks: of registered memory for each set; 0: none
    bool hierarchical = false;         ///< equal on all ranks: allreduces may be
  };
  struct Statistics {
    Counter registered_bytes;  ///< at this moment
    Counter registrations_failed;
  };

  /// `api`: or why there is none; calls of one rank do not need it.
  NcclBackend(Loop& loop, DeviceEngine& devices, Result<const nccl::Api*> api, const Settings& settings,
              FailedLate failed_late);
  NcclBackend(const NcclBackend&) = delete;
  NcclBackend& operator=(const NcclBackend&) = delete;
  ~NcclBackend();

  std::unique_ptr<Backend> begin_call(DeviceCallSettings settings);

  /// The set's communicators end, whatever they are doing, and each later call with `reason`.
  void fail_set(std::uint16_t process_set, const Status& reason);
  void fail_all(const Status& reason);
  /// A rank is lost: what sets that are no more have in line with it ends, too, as others' work is behind it.
  void fail_rank(int rank, const Status& reason);
  /// Another member says that a call failed. Where it had ended well here, it is as above.
  void fail_call(std::uint16_t process_set, std::uint64_t call, const Status& reason);
  /// The sets whose calls fail from now on, and why.
  std::vector<std::pair<std::uint16_t, Status>> failed_sets() const;
  /// The set is no more. What its calls have put in line comes to its end.
  void forget_set(std::uint16_t process_set);
  /// Any thread.
  const Statistics& statistics() const { return statistics_; }

 private:
  friend class NcclCall;

  struct Communicator {
    std::uint64_t number = 0;  // of this rank's
    std::uint16_t process_set = 0;
    nccl::Comm comm = nullptr;
    int device = -1;
    std::shared_ptr<const std::vector<int>> ranks;  // of the set: global, ascending
    Status failed;
    std::deque<std::pair<std::uint64_t, std::weak_ptr<void>>> pending;  // calls in line, with what is kept for them
    NcclRegistered
        registered;  // what fused calls go through; none before the first of them, and where there can be none
    bool registered_tried = false;
    DeviceMarkRef registered_use;      // the last one
    std::deque<std::uint64_t> recent;  // calls that ended well for the engine: another rank may say that they failed
  };
  using CommunicatorRef = std::shared_ptr<Communicator>;
  /// On one device, while the rank has several communicators.
  struct LastLaunch {
    std::uint64_t communicator = 0;  // its number
    DeviceMarkRef mark;
  };

  // Process set, devices by rank, whether it is for hierarchical calls.
  using Key = std::tuple<std::uint16_t, std::vector<std::int64_t>, bool>;
  const CommunicatorRef& communicator_of(const DeviceCallSettings& settings);
  std::vector<CommunicatorRef> of_set(std::uint16_t process_set) const;
  bool has_several() const;
  void abort(Communicator& communicator);
  void fail(Communicator& communicator, const Status& reason);
  void end_retired();
  /// The error that NCCL has met in what is in line; none where nothing is.
  Status look_at(Communicator& communicator);
  LastLaunch& last_launch(int device) { return last_launches_[device]; }
  Task<Status> connect(CollectiveContext& context, Communicator& communicator, const DeviceCallSettings& settings);
  Task<Status> agree_on_id(CollectiveContext& context, nccl::UniqueId& id);
  /// Whether NCCL has put everything in line that it was given; an error where the communicator has met one.
  Result<bool> is_settled(const Communicator& communicator, std::string_view what) const;
  /// A call's error: it ends the set's calls, and the communicator also where it is of a set that is no more.
  Status end_with(Communicator& communicator, const Status& reason);
  /// Until a device has come to `mark`, which is behind work of the communicator.
  Task<Status> reach(CollectiveContext& context, Communicator& communicator, const DeviceCallSettings& settings,
                     DeviceMarkRef mark);
  /// Until NCCL has put everything in line that it was given.
  Task<Status> settle(CollectiveContext& context, Communicator& communicator, const DeviceCallSettings& settings,
                      std::string_view what);
  /// Makes the set's registered memory, once; none where a rank cannot have any.
  Task<Status> share_registered(CollectiveContext& context, Communicator& communicator,
                                const DeviceCallSettings& settings);
  Result<NcclRegistered> make_registered(const Communicator& communicator);
  void let_go_of_registered(Communicator& communicator);
  Status checked(nccl::Result result, nccl::Comm comm, std::string_view what) const;
  void watch();
  const nccl::Api& api() const { return *api_.value(); }

  Loop& loop_;
  DeviceEngine& devices_;
  Result<const nccl::Api*> api_;
  Settings settings_;
  FailedLate failed_late_;
  Statistics statistics_;
  bool registration_reported_ = false;  // one line in the log is enough
  std::unique_ptr<NcclReaper> reaper_;
  std::map<Key, CommunicatorRef> communicators_;
  std::uint64_t next_number_ = 0;
  std::map<std::uint16_t, Status> failed_;  // process sets
  std::vector<CommunicatorRef> retired_;    // of sets that are no more
  std::map<int, LastLaunch> last_launches_;
};

}  // namespace hvd
