#include "ops/transport/mpi/mpi_runtime.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <cstdlib>
#include <optional>
#include <utility>

#include "common/check.h"
#include "common/env_options.h"
#include "common/log.h"
#include "ops/transport/members.h"
#include "ops/transport/mpi/mpi_bootstrap.h"
#include "ops/transport/mpi/mpi_exit.h"
#include "ops/transport/mpi/mpi_loader.h"
#include "ops/transport/mpi/mpi_process.h"
#include "ops/transport/mpi/mpi_text.h"
#include "ops/transport/mpi/mpi_transport.h"

namespace hvd {
namespace {

// There is one MPI in a process and it starts once, so this is a process-wide variable like MPI itself. Never
// destroyed: MPI may hold some of its memory until the very end.
MpiProcess* the_process = nullptr;
std::atomic<bool> skip_finalize_flag{false};

// Where launchers tell their ranks how many there are.
constexpr std::array kSizeVariables{"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"};

std::optional<int> size_in(const char* variable) {
  const auto text = environment(variable);
  int size = 0;
  if (!text || std::from_chars(text->data(), text->data() + text->size(), size).ec != std::errc()) return std::nullopt;
  return size;
}

// An MPI that is started by another one's launcher sees as many jobs of one rank, and says nothing.
Status check_launcher(const MpiProcess& process) {
  for (const char* variable : kSizeVariables) {
    const auto size = size_in(variable);
    if (!size || *size <= 1 || process.size != 1) continue;
    std::array<char, 512> version{};
    process.api->library_version(version.data(), version.size());
    return Status::precondition(fmt::format(
        "the launcher started {} ranks ({}={}) but MPI sees 1: it is the launcher of another MPI than the one in use "
        "('{}'); start the job with the mpirun of that MPI, or name the launcher's library in HOROVOD_MPI_LIBRARY",
        *size, variable, *size, version.data()));
  }
  return {};
}

Status check_threads(MpiProcess& process) {
  int level = kMpiThreadsNone;
  if (const int error = process.api->thread_level(&level); error != 0) {
    return Status::internal(fmt::format("MPI does not tell its thread level: {}", mpi_error_text(*process.api, error)));
  }
  process.threads_multiple = level == kMpiThreadsMultiple;
  if (level == kMpiThreadsNone) {
    return Status::precondition(fmt::format(
        "MPI was initialised for one thread, but horovod_cpp calls it from its own; {}",
        process.ours ? "this MPI library has no thread support: use another one"
                     : "let the program call MPI_Init_thread with MPI_THREAD_MULTIPLE, or let init() initialise MPI"));
  }
  if (level == kMpiThreadsSerialized) {
    log::warning("MPI runs with MPI_THREAD_SERIALIZED: the program must not call MPI between init and shutdown");
  }
  return {};
}

void at_exit() {
  MpiProcess* process = the_process;
  // A fork shares the connections of its parent; an open runtime may have a thread inside MPI.
  if (process == nullptr || process->pid != ::getpid() || process->open_runtimes > 0 || skip_finalize_flag) return;
  finalize_mpi(*process);
}

Status start_mpi(MpiProcess& process) {
  const MpiApi& api = *process.api;
  const auto check = [&api](int error, const char* what) {
    return error == 0
               ? Status()
               : Status::internal(fmt::format("MPI cannot be used: {} failed: {}", what, mpi_error_text(api, error)));
  };
  int initialized = 0;
  int finalized = 0;
  HVD_RETURN_IF_ERROR(check(api.initialized(&initialized), "MPI_Initialized"));
  HVD_RETURN_IF_ERROR(check(api.finalized(&finalized), "MPI_Finalized"));
  if (finalized != 0) {
    return Status::precondition(
        "the program has finalised MPI, which cannot be initialised again in this process; call "
        "init() before MPI_Finalize");
  }
  process.pid = ::getpid();
  if (initialized == 0) {
    HVD_RETURN_IF_ERROR(check(api.init(), "MPI_Init_thread"));
    process.ours = true;
    std::atexit(at_exit);
  }
  HVD_RETURN_IF_ERROR(check(api.rank_and_size(&process.rank, &process.size), "MPI_Comm_rank"));
  HVD_RETURN_IF_ERROR(check_launcher(process));
  HVD_RETURN_IF_ERROR(check_threads(process));
  return check(api.duplicate(&process.duplicating), "MPI_Comm_idup");
}

// The first open starts MPI; whatever it finds is the answer of later ones too, except that MPI was not there.
Status ensure_process() {
  if (the_process == nullptr) {
    Result<const MpiApi*> api = load_mpi(default_mpi_search());
    if (!api) return api.status();
    the_process = std::make_unique<MpiProcess>().release();
    the_process->api = *api;
    the_process->unusable = start_mpi(*the_process);
  }
  return the_process->unusable;
}

}  // namespace

Result<std::unique_ptr<MpiRuntime>> MpiRuntime::open(const std::vector<int>& members, TimePoint deadline) {
  HVD_RETURN_IF_ERROR(ensure_process());
  if (the_process->pid != ::getpid()) {
    return Status::precondition("this process is a fork of one that uses MPI; start it anew instead (spawn)");
  }
  int finalized = 0;
  if (the_process->api->finalized(&finalized) != 0 || finalized != 0) {
    return Status::precondition("the program has finalised MPI; call init() before MPI_Finalize");
  }
  Result<std::vector<int>> part = checked_members(members, the_process->rank, the_process->size);
  if (!part) {
    const Status done = MpiBootstrap(*the_process, {}).take_part_in_communicator(deadline);
    if (!done.ok()) log::warning("{}", done.text());
    return part.status();
  }
  return std::unique_ptr<MpiRuntime>(new MpiRuntime(*the_process, std::move(part).value()));
}

bool MpiRuntime::already_initialised() { return mpi_in_use(); }

std::optional<int> MpiRuntime::launched_size() {
  for (const char* variable : kSizeVariables) {
    if (const auto size = size_in(variable)) return size;
  }
  return std::nullopt;
}

void MpiRuntime::skip_finalize() { skip_finalize_flag = true; }

MpiRuntime::MpiRuntime(MpiProcess& process, std::vector<int> members)
    : process_(process),
      has_all_ranks_(members.empty()),
      bootstrap_(std::make_unique<MpiBootstrap>(process, std::move(members))) {
  ++process_.open_runtimes;
  if (process_.endpoint) process_.endpoint->resume();
}

MpiRuntime::~MpiRuntime() { close(); }

void MpiRuntime::close() {
  if (std::exchange(closed_, true)) return;
  if (--process_.open_runtimes == 0 && process_.endpoint) process_.endpoint->stop();
}

Bootstrap& MpiRuntime::bootstrap() { return *bootstrap_; }

std::unique_ptr<Transport> MpiRuntime::make_transport(int rank, int size, std::uint32_t generation, MpiLimits limits) {
  HVD_CHECK(process_.endpoint != nullptr);  // an allgather comes first
  HVD_CHECK(has_all_ranks_ && rank == process_.rank && size == process_.size);
  return std::make_unique<MpiTransport>(*process_.endpoint, mpi_life(process_.epoch, generation), limits);
}

bool MpiRuntime::threads_multiple() const { return process_.threads_multiple; }

std::string MpiRuntime::library_version() const {
  std::array<char, 16384> text{};
  process_.api->library_version(text.data(), text.size());
  return text.data();
}

}  // namespace hvd
