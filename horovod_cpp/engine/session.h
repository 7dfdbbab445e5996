// One membership of this process in a job: everything between hvd_init and hvd_shutdown, in the order in which it is
// built. Built and destroyed by the thread that calls init or shutdown; used from any thread.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "horovod_cpp/engine/background_loop.h"
#include "horovod_cpp/engine/release_queue.h"
#include "horovod_cpp/engine/timeline.h"
#include "ops/transport/connect.h"

namespace hvd {

struct Topology {
  int rank = 0;
  int size = 1;
  int local_rank = 0;
  int local_size = 1;
  int cross_rank = 0;
  int cross_size = 1;
  bool homogeneous = true;
  bool mpi_enabled = false;
  bool mpi_threads_supported = false;
};

class Session {
 public:
  struct Settings {
    std::vector<std::vector<int>> process_sets;  ///< static sets; ranks in any order
    std::vector<int> members;                    ///< ranks of the launch that form the job, in order; empty: all
    std::vector<Setting> options;                ///< before the environment, under the names of its variables
  };

  /// Reads the environment, meets the other ranks and starts the background thread. Blocks, bounded by
  /// HOROVOD_START_TIMEOUT. kInvalidArgument: junk in a variable or in `members`, or ranks whose settings differ.
  static Result<std::unique_ptr<Session>> start(const Settings& settings);
  ~Session();

  const Topology& topology() const { return topology_; }
  Runtime& runtime() { return *runtime_; }
  BackgroundLoop& loop() { return *loop_; }
  ReleaseQueue& releases() { return *releases_; }
  Timeline& timeline() { return *timeline_; }
  /// Ends the job with a farewell; later calls do nothing.
  void shut_down();

 private:
  explicit Session(Options options);
  void start_timeline();

  Options options_;
  SteadyClock clock_;
  std::shared_ptr<ReleaseQueue> releases_ = std::make_shared<ReleaseQueue>();
  std::unique_ptr<FaultPlan> fault_;
  std::unique_ptr<Joined> joined_;  // what keeps a launcher's library open
  Topology topology_;
  std::unique_ptr<EpollPoller> poller_;
  std::unique_ptr<Timeline> timeline_;
  std::unique_ptr<Runtime> runtime_;
  std::unique_ptr<BackgroundLoop> loop_;
};

}  // namespace hvd
