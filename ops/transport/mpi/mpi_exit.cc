#include "ops/transport/mpi/mpi_exit.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>

#include "common/unique_fd.h"
#include "ops/transport/mpi/mpi_wait.h"

namespace hvd {
namespace {

// Ranks may exit far apart: one writes a last checkpoint while the others are done.
constexpr std::chrono::minutes kLongestWait{30};
constexpr std::chrono::milliseconds kLookAround{200};

bool alive(std::int64_t pid) {
  const UniqueFd process(static_cast<int>(::syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0u)));
  if (process.get() < 0) return errno != ESRCH;
  pollfd exited{process.get(), POLLIN, 0};  // readable: it has ended, even if nobody has collected its status
  return ::poll(&exited, 1, 0) <= 0;
}

enum class Exit { kTogether, kAlone };

// The log may be gone at exit, hence stderr.
Exit meet_at_exit(MpiProcess& process) {
  const MpiApi& api = *process.api;
  MpiRequest barrier{};
  if (!process.unusable.ok() || !process.endpoint || api.barrier(&barrier) != 0) return Exit::kAlone;
  TimePoint look = std::chrono::steady_clock::now() + kLookAround;
  int dead = -1;
  int tries = 100;  // after a death was seen: what the dead one sent before may still be on its way
  bool passed = false;
  const auto ended = [&] {
    MpiOutcome outcome{};
    int finished = 0;
    if (api.test(&barrier, 1, &outcome, &finished) != 0) return true;
    passed = finished == 1 && outcome.error == 0;
    if (finished == 1 || (dead >= 0 && --tries == 0)) return true;
    if (dead < 0 && std::chrono::steady_clock::now() >= look) {
      dead = dead_neighbour(process.seats, process.rank);
      look = std::chrono::steady_clock::now() + kLookAround;
    }
    return false;
  };
  if (!wait_for_mpi(std::chrono::steady_clock::now() + kLongestWait, ended) || !passed) {
    const char* reason = dead >= 0 ? "a rank of this host has died" : "not all ranks have come to their exit";
    std::fprintf(stderr, "horovod_cpp: rank %d exits without MPI_Finalize: %s\n", process.rank, reason);
    return Exit::kAlone;
  }
  return Exit::kTogether;
}

}  // namespace

int dead_neighbour(std::span<const MpiSeat> seats, int rank) {
  const MpiSeat nobody;
  for (std::size_t i = 0; i < seats.size(); ++i) {
    const MpiSeat& own = seats[static_cast<std::size_t>(rank)];
    if (static_cast<int>(i) == rank || seats[i].host != own.host || own.host == nobody.host) continue;
    if (!alive(seats[i].pid)) return static_cast<int>(i);
  }
  return -1;
}

void finalize_mpi(MpiProcess& process) {
  int finalized = 0;
  if (process.api->finalized(&finalized) != 0 || finalized != 0) return;
  if (meet_at_exit(process) == Exit::kTogether) process.api->finalize();
}

}  // namespace hvd
