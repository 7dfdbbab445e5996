// The accelerators of one engine: made when the first tensor in device memory comes, and asked for a backend by each
// call on such tensors.
// `receive`, `wait_for` and `statistics` from any thread; everything else runs under the Turn.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include <horovod_cpp/options.h>

#include "horovod_cpp/engine/device_source.h"
#include "horovod_cpp/engine/tensor_queue.h"
#include "ops/nccl/nccl_backend.h"

namespace hvd {

class Devices {
 public:
  /// `source` may be nullptr: then there are none.
  Devices(Loop& loop, DeviceSource* source, const Options& options, NcclBackend::FailedLate failed_late);
  Devices(const Devices&) = delete;
  Devices& operator=(const Devices&) = delete;
  ~Devices();

  /// Takes in an operation on device memory: marks what its producer's stream has been given so far, and sees whether
  /// that is being captured. kInvalidArgument for a device that is not there, kUnavailable without a driver.
  Status receive(TensorEntry& entry);
  /// What `stream` is given from now on begins after `mark`.
  Status wait_for(const DeviceMarkRef& mark, DeviceStream stream);
  NcclBackend::Statistics statistics() const;

  /// For the tensors of `entries`, which lie in device memory as the response says.
  Result<std::unique_ptr<Backend>> begin_call(const Response& response, const MembershipRef& membership,
                                              const std::vector<TensorEntry>& entries, Priority priority);
  /// A call of several ranks failed on this one. Where NCCL carries it, they may be out of step from here on: this rank
  /// may not have given NCCL what the others have. So the set fails. Before the call's backend ends.
  void call_failed(const Response& response, const Status& reason);
  void fail_set(ProcessSetId process_set, const Status& reason);
  void fail_rank(int rank, const Status& reason);
  void fail_call(ProcessSetId process_set, std::uint64_t call, const Status& reason);
  /// The sets whose calls on device memory fail from now on, and why.
  std::vector<std::pair<ProcessSetId, Status>> failed_sets() const;
  void forget_set(ProcessSetId process_set);
  /// Whether a device is not done with what calls have put in line.
  bool pending() const;
  /// Everything ends with `reason`, whatever is in line.
  void abandon(const Status& reason);

 private:
  struct Parts {
    Parts(Loop& loop, DeviceRuntime& runtime, Result<const nccl::Api*> api, const Options& options,
          NcclBackend::FailedLate failed_late);
    DeviceEngine engine;
    NcclBackend nccl;
  };

  Result<Parts*> parts();
  bool is_staged(const Response& response) const;
  bool is_hierarchical(const Response& response, const Membership& membership) const;

  Loop& loop_;
  DeviceSource* source_;
  const Options& options_;
  NcclBackend::FailedLate failed_late_;
  std::mutex making_;
  std::unique_ptr<Parts> owned_;
  std::atomic<Parts*> parts_{nullptr};
  int last_device_ = 0;  // of this rank: where to put what stands in for tensors it does not have
};

}  // namespace hvd
