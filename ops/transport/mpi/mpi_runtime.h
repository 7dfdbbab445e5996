// MPI as seen by the engine: found and opened at run time, a way to meet at init and a transport for bulk data.
// Used by the thread that runs init or shutdown; the transports that it makes run under the Turn.
//
// MPI can be started once a process, so the library, its communicator and what MPI still holds of our memory stay
// until the process ends; a MpiRuntime is a lease of them, and closing one and opening another is cheap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <horovod_cpp/status.h>

#include "ops/transport/bootstrap.h"
#include "ops/transport/mpi/mpi_limits.h"
#include "ops/transport/transport.h"

namespace hvd {

struct MpiProcess;

class MpiRuntime {
 public:
  /// Opens libmpi and our module, and initialises MPI unless the program has done so (which is then left to the
  /// program to finalise). Where we initialise it, blocks until all ranks of the job do the same.
  /// kUnavailable: no MPI, with where it was looked for and how to get it; kPrecondition: the program's MPI cannot be
  /// used (finalised, too low a thread level, started by another MPI's launcher).
  /// `members`: ranks of MPI_COMM_WORLD that `bootstrap` is for; empty: all. See checked_members.
  /// Members that cannot be used are told once all ranks have called, or at `deadline`: the others need this one first.
  static Result<std::unique_ptr<MpiRuntime>> open(const std::vector<int>& members, TimePoint deadline);

  /// True when this process has an MPI library loaded and MPI is initialised and not finalised. Loads nothing.
  static bool already_initialised();
  /// How many ranks an MPI launcher (mpirun, mpiexec, srun with PMI) has started, by the environment; nothing when
  /// none has started this process.
  static std::optional<int> launched_size();

  /// The job has failed: when this process exits, it leaves without MPI_Finalize, which would wait for lost ranks.
  /// Any thread; at any time; cannot be taken back.
  static void skip_finalize();

  MpiRuntime(const MpiRuntime&) = delete;
  MpiRuntime& operator=(const MpiRuntime&) = delete;
  /// After the transports that it made. Does not finalise MPI: that happens when the process exits, if we initialised
  /// it, no MpiRuntime is open, nothing has failed and all ranks come to their exit.
  ~MpiRuntime();
  /// What the destructor does, once the job has ended and nobody uses the transports any more: these may be destroyed
  /// later, also after MPI has been finalised.
  void close();

  /// Lives as long as the runtime. Its rank and size are those of MPI_COMM_WORLD, or among `members`. After an
  /// allgather that has failed every later one fails too: MPI cannot take back half a collective call.
  Bootstrap& bootstrap();

  /// Carries transfers only: `post` is a bug of the caller. Every rank of the job makes its own, with the rank and size
  /// of `bootstrap()` and the same `generation`, after the same allgather. Must be destroyed before the runtime; never
  /// blocks on a lost peer. Only where the job has all ranks.
  std::unique_ptr<Transport> make_transport(int rank, int size, std::uint32_t generation, MpiLimits limits = {});

  /// Whether the job has all ranks of MPI_COMM_WORLD, under the same numbers.
  bool has_all_ranks() const { return has_all_ranks_; }
  /// False: MPI_THREAD_SERIALIZED, where the program must not call MPI while horovod_cpp runs.
  bool threads_multiple() const;
  /// What the MPI library says of itself, such as "Open MPI v4.1.4, ...".
  std::string library_version() const;

 private:
  MpiRuntime(MpiProcess& process, std::vector<int> members);

  MpiProcess& process_;
  bool has_all_ranks_;
  bool closed_ = false;
  std::unique_ptr<Bootstrap> bootstrap_;
};

}  // namespace hvd
