// Ends communicators on a thread of its own: NCCL may take its time for that, and nobody here waits for it.
// Turn; the thread touches nothing else.
#pragma once

#include <memory>

#include "ops/nccl/nccl_api.h"

namespace hvd {

class NcclReaper {
 public:
  explicit NcclReaper(const nccl::Api& api);
  NcclReaper(const NcclReaper&) = delete;
  NcclReaper& operator=(const NcclReaper&) = delete;
  /// Waits for what was given to it, at most 5 s; what NCCL has not ended by then is left to the process.
  ~NcclReaper();

  /// Ends what the communicator is doing, wherever it is, and frees it.
  void abort(nccl::Comm comm);

 private:
  struct State;
  std::shared_ptr<State> state_;  // also the thread's: it may outlive this object
};

}  // namespace hvd
