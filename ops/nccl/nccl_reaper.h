// Ends communicators, each on a thread of its own: NCCL may take its time for that, and nobody here waits for it. An
// abort waits until the communicator's kernels have left their streams, and one of them may stand behind a kernel of
// another communicator that has to be aborted, too: so no end waits for another one to be begun.
// Turn; what is held is let go by the threads.
#pragma once

#include <memory>

#include "ops/device/device_memory.h"
#include "ops/nccl/nccl_api.h"

namespace hvd {

/// Memory that a communicator knows. Its block has to outlive the registration, and that has to end before the
/// communicator does.
struct NcclRegistered {
  std::shared_ptr<DeviceBlock> block;  ///< nullptr: none
  void* registration = nullptr;
};

class NcclReaper {
 public:
  NcclReaper(const nccl::Api& api, DeviceRuntime& runtime);
  NcclReaper(const NcclReaper&) = delete;
  NcclReaper& operator=(const NcclReaper&) = delete;
  /// Waits for what was given to it, at most 5 s; what NCCL has not ended by then is left to the process.
  ~NcclReaper();

  /// Ends what the communicator is doing, wherever it is, and frees it; then lets go of what it had registered.
  void abort(nccl::Comm comm, int device, NcclRegistered registered);
  /// Lets what it is still doing come to its end, on all ranks, and frees it; aborts it after 5 s. Of this rank nothing
  /// may be in line any more.
  void finish(nccl::Comm comm, int device, NcclRegistered registered);
  /// Lets go of `held` once everything that was given before has ended.
  void release_after(std::shared_ptr<void> held);

 private:
  struct State;
  struct Ending;
  void begin(Ending ending);

  std::shared_ptr<State> state_;  // also the threads': they may outlive this object
};

}  // namespace hvd
