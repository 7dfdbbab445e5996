// What there is once a process and for its whole life: the MPI library, our communicator, and who else is there.
// Touched by the thread that runs init or shutdown, and at exit.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include <horovod_cpp/status.h>

#include "ops/transport/mpi/mpi_api.h"
#include "ops/transport/mpi/mpi_endpoint.h"

namespace hvd {

/// Where a rank runs, so that others of its host can see whether it is alive.
struct MpiSeat {
  std::int64_t pid = 0;
  std::array<char, 56> host{};  ///< boot and PID namespace: equal means that a pid means the same process
};

struct MpiProcess {
  const MpiApi* api = nullptr;
  bool ours = false;  ///< we have initialised MPI
  bool threads_multiple = false;
  int rank = 0;
  int size = 1;
  std::int64_t pid = 0;  ///< of the process that called open; a fork of it leaves MPI alone

  MpiRequest duplicating{};                          ///< until there is an endpoint
  std::unique_ptr<MpiEndpoint> endpoint;             ///< once our communicator is there
  std::uint32_t epoch = 0;                           ///< counts allgathers, alike on all ranks
  std::vector<MpiSeat> seats;                        ///< by rank, after an allgather
  Status unusable;                                   ///< not ok: the start or an allgather has failed
  std::vector<std::shared_ptr<void>> left_with_mpi;  ///< memory of an allgather that has failed
  int open_runtimes = 0;
};

}  // namespace hvd
