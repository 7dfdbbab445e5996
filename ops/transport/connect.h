// From nothing to a job: finds what launched this process, meets the other ranks, compares settings, and opens the
// transports. Used at init, by the thread that calls it; every wait has a deadline.
#pragma once

#include <memory>
#include <string>
#include <variant>
#include <vector>

#include <horovod_cpp/options.h>

#include "common/env_options.h"
#include "ops/transport/fabric.h"
#include "ops/transport/mpi/mpi_runtime.h"
#include "ops/transport/tcp/tcp_bootstrap.h"

namespace hvd {

struct MpiLaunch {};
struct SingleLaunch {};
using Launch = std::variant<SingleLaunch, TcpBootstrap::FromLauncher, MpiLaunch, TcpBootstrap::FromTorchrun>;

/// From the environment: hvdrun's variables, then an MPI launcher or an MPI that the program has initialised, then
/// torchrun's variables, then a single rank. kInvalidArgument names a variable that cannot be read.
Result<Launch> detect_launch();

/// The way to the other ranks. Outlives the transports.
class Joined {
 public:
  explicit Joined(std::unique_ptr<Bootstrap> bootstrap) : bootstrap_(std::move(bootstrap)) {}
  explicit Joined(std::unique_ptr<MpiRuntime> mpi) : mpi_(std::move(mpi)) {}

  Bootstrap& bootstrap() { return mpi_ ? mpi_->bootstrap() : *bootstrap_; }
  /// nullptr when the job was not joined through MPI.
  MpiRuntime* mpi() { return mpi_.get(); }
  const MpiRuntime* mpi() const { return mpi_.get(); }

 private:
  std::unique_ptr<MpiRuntime> mpi_;
  std::unique_ptr<Bootstrap> bootstrap_;
};

/// `members`: the ranks of the launch that form the job, numbered in this order; empty: all. kInvalidArgument when they
/// are not different ranks of the launch with this one among them. Ranks that are no members need not call, except that
/// MPI itself starts on all ranks only: there, the first time, all call, each with a list or none.
Result<std::unique_ptr<Joined>> join_job(const std::vector<int>& members, TimePoint deadline);

/// What all ranks must have alike, beside the library's version and the agreed options.
struct Handshake {
  std::vector<Setting> extra;
};

struct Connection {
  std::unique_ptr<Fabric> fabric;
  int rank = 0;
  int size = 1;
  std::vector<int> hosts;  ///< host number of each rank, in the order of their first ranks
  int local_rank = 0;
  int local_size = 1;
  int cross_rank = 0;
  int cross_size = 1;
  bool homogeneous = true;
};

inline constexpr std::uint32_t kFirstGeneration = 1;

/// Compares and connects. Settings that differ are kInvalidArgument with the same text on every rank, which names each
/// with its values and their ranks. Ranks that share memory use it; the others use TCP for control, and MPI (where the
/// job has it) or TCP for bulk data.
Result<Connection> connect_all(Joined& joined, const Options& options, const Handshake& handshake, TimePoint deadline);

/// For connect_all and tests: what differs between `settings` of all ranks; empty when nothing does.
std::string settings_differences(const std::vector<std::vector<Setting>>& by_rank);
/// Host numbers from who shares memory with whom (`reached`, by rank); a pair counts when both sides say so.
std::vector<int> hosts_of(const std::vector<std::vector<int>>& reached);
/// Fills the local and cross ranks from `hosts` and `rank`.
void place_on_hosts(Connection& connection);

}  // namespace hvd
