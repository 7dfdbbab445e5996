// Finalises MPI when the process exits: only when all ranks come to their exit, so that it cannot hang on a lost one.
// Called by exit(), by the thread that runs it.
#pragma once

#include <span>

#include "ops/transport/mpi/mpi_process.h"

namespace hvd {

/// Waits until all ranks exit, then calls MPI_Finalize. Without it, when a rank of this host has died or after 30
/// minutes (then a line on stderr says so); whoever started the job sees that MPI was not finalised, as after any
/// crash.
void finalize_mpi(MpiProcess& process);

/// A rank of this host whose process is gone, by what the seats say; -1 when all live. Ranks of other hosts count as
/// living.
int dead_neighbour(std::span<const MpiSeat> seats, int rank);

}  // namespace hvd
