#include "tests/support/fake_nccl.h"

#include <algorithm>
#include <cstring>
#include <random>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "common/check.h"
#include "tests/support/fake_nccl_parts.h"

namespace hvd::testing {
namespace fake_nccl {

std::shared_ptr<FakeNccl::State>& current() {
  static std::shared_ptr<FakeNccl::State> state;
  return state;
}

void violation(std::string text) {
  if (!current()) return;
  current()->last_error = text;
  current()->violations.push_back(std::move(text));
}

const FakeNcclFault* find_fault(Kind kind, const Comm& comm, std::uint64_t call) {
  if (!current()) return nullptr;
  for (const FakeNcclFault& fault : current()->faults) {
    const bool fits = fault.kind == kind && (fault.group == FakeNcclFault::kAny || fault.group == comm.group->number) &&
                      (fault.rank == FakeNcclFault::kAny || fault.rank == comm.rank);
    // A launch hangs that has the call among its own; the other faults stay.
    const bool fits_call = fault.call <= call && (kind != Kind::kLaunchHangs || fault.call >= comm.calls);
    if (fits && fits_call) return &fault;
  }
  return nullptr;
}

std::string memory_text(Comm& comm, const CallRanges& ranges) {
  std::string text;
  for (const ByteRange& range : {ranges.read, ranges.write}) {
    const auto* const begin = static_cast<const std::byte*>(range.begin);
    for (const auto& [place, memory] : current()->memory) {
      if (range.bytes == 0 || begin < place || begin >= place + memory.bytes) continue;
      text += fmt::format(", registered at {}", begin - place);
      const bool known = std::ranges::any_of(memory.registrations,
                                             [&comm](const auto& entry) { return entry.second.lock().get() == &comm; });
      if (!known) violation(fmt::format("{} uses memory that is not registered with it", comm.name()));
    }
  }
  if (!text.empty()) {
    ++current()->registered_calls;
    comm.used_registered = true;
  }
  return text;
}

void end_registrations(const Comm& comm) {
  for (auto& [place, memory] : current()->memory) {
    std::erase_if(memory.registrations, [&comm](const auto& entry) { return entry.second.lock().get() == &comm; });
  }
}

namespace {

/// Calls inside group_start and group_end of this thread.
struct Grouped {
  int depth = 0;
  NcclResult error = nccl::kSuccess;
  std::vector<std::tuple<std::shared_ptr<Comm>, void*, Call>> calls;
};
thread_local Grouped grouped;

/// From 0 to `most`. Depends on seed and place alone, not on which thread comes first.
int draw(const Comm& comm, std::uint64_t what, int most) {
  std::seed_seq seeds{current()->settings.seed, static_cast<std::uint64_t>(comm.group->number),
                      static_cast<std::uint64_t>(comm.rank), what};
  return static_cast<int>(std::mt19937_64(seeds)() % static_cast<std::uint64_t>(most + 1));
}

/// The communicator of a handle that may still be used, or nullptr with a violation.
std::shared_ptr<Comm> find_comm(nccl::Comm handle, const char* function) {
  if (!current() || !current()->comms.contains(handle)) {
    violation(fmt::format("{}: no such communicator", function));
    return nullptr;
  }
  const std::shared_ptr<Comm>& comm = current()->comms[handle];
  if (comm->is_dead() || comm->aborting) {
    violation(fmt::format("{}: {} was {}", function, comm->name(),
                          comm->phase == Phase::kDestroyed ? "destroyed" : "aborted"));
    return nullptr;
  }
  return comm;
}

/// One launch per communicator and stream, as in NCCL.
NcclResult flush() {
  std::vector<std::pair<std::shared_ptr<Comm>, Launch>> launches;
  for (auto& [comm, stream, call] : std::exchange(grouped.calls, {})) {
    const auto same = std::ranges::find_if(launches, [&comm, s = stream](const auto& launch) {
      return launch.first == comm && launch.second.stream == s;
    });
    if (same != launches.end()) {
      same->second.calls.push_back(call);
    } else {
      launches.push_back({comm, {stream, {call}}});
    }
  }
  NcclResult result = std::exchange(grouped.error, nccl::kSuccess);
  if (result != nccl::kSuccess) return result;
  for (auto& [comm, launch] : launches) {
    const bool in_progress = !comm->launched || current()->settings.every_launch_in_progress;
    const bool hangs = find_fault(Kind::kLaunchHangs, *comm, comm->calls + launch.calls.size() - 1) != nullptr;
    comm->launched = true;
    if (in_progress) comm->polls = draw(*comm, comm->calls + 1, current()->settings.max_launch_polls);
    comm->stuck = comm->stuck || hangs;
    if (hangs || (in_progress && comm->polls > 0) || comm->phase == Phase::kLaunching) {
      comm->phase = Phase::kLaunching;
      comm->waiting.push_back(std::move(launch));
      if (result == nccl::kSuccess) result = nccl::kInProgress;
    } else if (const NcclResult error = enqueue(comm, launch); error != nccl::kSuccess) {
      result = error;
    }
  }
  return result;
}

NcclResult submit(nccl::Comm handle, void* stream, const Call& call) {
  const Lock lock(fake_mutex());
  const char* name = kCallNames[static_cast<std::size_t>(call.kind)];
  const auto check = [&](const std::shared_ptr<Comm>& comm) {
    if (!comm) return nccl::kInvalidArgument;
    if (comm->phase != Phase::kReady) {
      violation(
          fmt::format("{}: {} is not ready: a call before has not ended, or ended with an error", name, comm->name()));
      return nccl::kInvalidUsage;
    }
    if (!is_valid(call, comm->group->size)) {
      violation(fmt::format("{}: {}: bad type, operation or rank", name, comm->name()));
      return nccl::kInvalidArgument;
    }
    return nccl::kSuccess;
  };
  const std::shared_ptr<Comm> comm = find_comm(handle, name);
  if (const NcclResult error = check(comm); error != nccl::kSuccess) {
    if (grouped.depth > 0) grouped.error = error;
    return error;
  }
  if (call.count == 0 && !call.is_pair()) return nccl::kSuccess;  // NCCL drops empty collectives
  grouped.calls.emplace_back(comm, stream, call);
  return grouped.depth > 0 ? nccl::kSuccess : flush();
}

// The functions of the API.

NcclResult get_version(int* version) {
  const Lock lock(fake_mutex());
  *version = current() ? current()->settings.version : 0;
  return nccl::kSuccess;
}

NcclResult get_unique_id(nccl::UniqueId* id) {
  const Lock lock(fake_mutex());
  if (!current()) return nccl::kInternalError;
  id->bytes.fill('\0');
  const int number = current()->next_group++;
  std::memcpy(id->bytes.data(), &number, sizeof(number));
  current()->groups[number] = std::make_shared<Group>();
  current()->groups[number]->number = number;
  return nccl::kSuccess;
}

NcclResult comm_init_rank_config(nccl::Comm* handle, int ranks, nccl::UniqueId id, int rank, nccl::Config* config) {
  const Lock lock(fake_mutex());
  *handle = nullptr;
  if (!current()) return nccl::kInternalError;
  int number = 0;
  std::memcpy(&number, id.bytes.data(), sizeof(number));
  const auto group = current()->groups.find(number);
  if (group == current()->groups.end() || config == nullptr || config->blocking != 0 ||
      config->magic != nccl::Config{}.magic || rank < 0 || rank >= ranks) {
    violation(fmt::format("comm_init_rank_config: rank {} of {}: unknown id, bad rank, or a blocking communicator",
                          rank, ranks));
    return nccl::kInvalidArgument;
  }
  Group& of = *group->second;
  if ((of.size != 0 && of.size != ranks) || !of.ranks.insert(rank).second) {
    violation(fmt::format("comm_init_rank_config: rank {} of {} comes twice, or ranks disagree on the size {}", rank,
                          ranks, of.size));
    return nccl::kInvalidArgument;
  }
  of.size = ranks;
  auto comm = std::make_shared<Comm>();
  comm->group = group->second;
  comm->rank = rank;
  comm->device = fake_current();
  if (comm->device.owner == nullptr) comm->device.device = 0;  // as CUDA does
  if (const FakeNcclFault* fault = find_fault(Kind::kInitRefused, *comm)) {
    current()->last_error = fault->text;
    return nccl::kSystemError;
  }
  comm->polls = draw(*comm, 0, current()->settings.max_init_polls);
  *handle = comm.get();
  current()->comms[comm.get()] = comm;
  ++current()->alive;
  return nccl::kInProgress;
}

void fail_comm(Comm& comm, NcclResult failure, const std::string& text) {
  comm.phase = Phase::kFailed;
  comm.failure = failure;
  comm.text = text;
}

/// One step of what NCCL's own threads do for a communicator that is in progress.
void progress(const std::shared_ptr<Comm>& comm) {
  if (comm->polls > 0) {
    --comm->polls;
    return;
  }
  switch (comm->phase) {
    case Phase::kInit:
      if (find_fault(Kind::kInitHangs, *comm) != nullptr) return;
      if (const FakeNcclFault* fault = find_fault(Kind::kInitFails, *comm)) {
        fail_comm(*comm, nccl::kSystemError, fault->text);
      } else if (static_cast<int>(comm->group->ranks.size()) == comm->group->size) {
        comm->phase = Phase::kReady;
      }
      return;
    case Phase::kLaunching:
      if (comm->stuck) return;
      comm->phase = Phase::kReady;
      for (const Launch& launch : std::exchange(comm->waiting, {})) {
        if (const NcclResult error = enqueue(comm, launch); error != nccl::kSuccess) {
          fail_comm(*comm, error, "the launch failed");
        }
      }
      return;
    case Phase::kFinalizing:
      if (comm->pending == 0) comm->phase = Phase::kFinalized;
      return;
    default:
      return;
  }
}

NcclResult comm_get_async_error(nccl::Comm handle, NcclResult* error) {
  const Lock lock(fake_mutex());
  const std::shared_ptr<Comm> comm = find_comm(handle, "comm_get_async_error");
  if (!comm) return nccl::kInvalidArgument;
  progress(comm);
  if (comm->calls > 0) {
    if (const FakeNcclFault* fault = find_fault(Kind::kAsyncError, *comm, comm->calls - 1)) {
      fail_comm(*comm, nccl::kRemoteError, fault->text);
    }
  }
  const bool in_progress =
      comm->phase == Phase::kInit || comm->phase == Phase::kLaunching || comm->phase == Phase::kFinalizing;
  *error = in_progress ? nccl::kInProgress : comm->failure;
  return nccl::kSuccess;
}

NcclResult comm_finalize(nccl::Comm handle) {
  const Lock lock(fake_mutex());
  const std::shared_ptr<Comm> comm = find_comm(handle, "comm_finalize");
  if (!comm) return nccl::kInvalidArgument;
  if (comm->phase != Phase::kReady) {
    violation(fmt::format("comm_finalize: {} is not ready", comm->name()));
    return nccl::kInvalidUsage;
  }
  comm->phase = Phase::kFinalizing;
  comm->polls = draw(*comm, ~std::uint64_t{0}, current()->settings.max_launch_polls);
  return nccl::kInProgress;
}

NcclResult comm_destroy(nccl::Comm handle) {
  const Lock lock(fake_mutex());
  const std::shared_ptr<Comm> comm = find_comm(handle, "comm_destroy");
  if (!comm) return nccl::kInvalidArgument;
  if (comm->pending > 0 || !comm->waiting.empty()) {
    violation(fmt::format("comm_destroy: {} has work that is not done", comm->name()));
  }
  if (comm->phase == Phase::kInit || comm->phase == Phase::kLaunching || comm->phase == Phase::kFinalizing) {
    violation(fmt::format("comm_destroy: {} is in progress: abort it, or wait", comm->name()));
  }
  for (const auto& [place, memory] : current()->memory) {
    for (const auto& [number, of] : memory.registrations) {
      if (of.lock() == comm) violation(fmt::format("comm_destroy: {} has memory that is registered", comm->name()));
    }
  }
  comm->phase = Phase::kDestroyed;
  --current()->alive;
  fake_changed_locked();
  return nccl::kSuccess;
}

NcclResult comm_abort(nccl::Comm handle) {
  std::shared_ptr<FakeNccl::State> state;
  std::shared_ptr<Comm> comm;
  {
    const Lock lock(fake_mutex());
    comm = find_comm(handle, "comm_abort");
    if (!comm) return nccl::kInvalidArgument;
    state = current();
    state->abort_threads.push_back(std::this_thread::get_id());
    comm->aborting = true;
  }
  std::this_thread::sleep_for(state->settings.abort_takes);
  Lock lock(fake_mutex());
  comm->phase = Phase::kAborted;
  comm->waiting.clear();
  fake_changed_locked();
  if (state->settings.abort_waits && !fake_wait_locked(lock, [&comm] { return comm->pending == 0; })) {
    state->violations.push_back(fmt::format("comm_abort: the work of {} stayed on its stream for 60 s", comm->name()));
  }
  if (current() == state) end_registrations(*comm);
  --state->alive;
  return nccl::kSuccess;
}

NcclResult mem_alloc(void** memory, std::size_t bytes) {
  const FakeCurrent device = [] {
    const Lock lock(fake_mutex());
    return fake_current();
  }();
  if (device.owner == nullptr) {
    const Lock lock(fake_mutex());
    violation("mem_alloc: no device is current");
    return nccl::kInvalidUsage;
  }
  Result<void*> made = device.owner->allocate(device.device, bytes);
  if (!made) return nccl::kUnhandledCudaError;
  *memory = *made;
  const Lock lock(fake_mutex());
  if (current()) current()->memory[static_cast<std::byte*>(*memory)] = {bytes, device, {}};
  return nccl::kSuccess;
}

NcclResult mem_free(void* memory) {
  FakeCurrent device;
  {
    const Lock lock(fake_mutex());
    if (!current()) return nccl::kSuccess;
    const auto known = current()->memory.find(static_cast<std::byte*>(memory));
    if (known == current()->memory.end()) {
      violation("mem_free: no such memory");
      return nccl::kInvalidArgument;
    }
    for (const auto& [number, of] : known->second.registrations) {
      const std::shared_ptr<Comm> comm = of.lock();
      violation(fmt::format("mem_free: the memory is registered with {}", comm ? comm->name() : "a communicator"));
    }
    device = known->second.device;
    current()->memory.erase(known);
  }
  device.owner->free(device.device, memory);  // sees whether something in line still has to touch it
  return nccl::kSuccess;
}

NcclResult comm_register(nccl::Comm handle, void* memory, std::size_t bytes, void** registration) {
  const Lock lock(fake_mutex());
  const std::shared_ptr<Comm> comm = find_comm(handle, "comm_register");
  if (!comm) return nccl::kInvalidArgument;
  const auto known = current()->memory.find(static_cast<std::byte*>(memory));
  if (comm->phase != Phase::kReady || known == current()->memory.end() || known->second.bytes != bytes) {
    violation(fmt::format("comm_register: {} is not ready, or the memory is no block of mem_alloc", comm->name()));
    return nccl::kInvalidUsage;
  }
  if (const FakeNcclFault* fault = find_fault(Kind::kRegisterFails, *comm)) {
    current()->last_error = fault->text;
    return nccl::kSystemError;
  }
  const std::uintptr_t number = current()->next_registration++;
  known->second.registrations[number] = comm;
  *registration = reinterpret_cast<void*>(number);  // NOLINT(performance-no-int-to-ptr): a handle
  return nccl::kSuccess;
}

NcclResult comm_deregister(nccl::Comm handle, void* registration) {
  const Lock lock(fake_mutex());
  const std::shared_ptr<Comm> comm = find_comm(handle, "comm_deregister");
  if (!comm) return nccl::kInvalidArgument;
  if (comm->phase != Phase::kReady || (comm->used_registered && comm->pending > 0)) {
    violation(fmt::format("comm_deregister: {} may have work in line there, or was finalised", comm->name()));
  }
  for (auto& [place, memory] : current()->memory) {
    const auto found = memory.registrations.find(reinterpret_cast<std::uintptr_t>(registration));
    if (found == memory.registrations.end() || found->second.lock() != comm) continue;
    memory.registrations.erase(found);
    return nccl::kSuccess;
  }
  violation(fmt::format("comm_deregister: {} has no such registration", comm->name()));
  return nccl::kInvalidArgument;
}

const char* get_last_error(nccl::Comm handle) {
  const Lock lock(fake_mutex());
  if (!current()) return "";
  const auto comm = current()->comms.find(handle);
  if (comm != current()->comms.end() && !comm->second->text.empty()) return comm->second->text.c_str();
  return current()->last_error.c_str();
}

const char* get_error_string(NcclResult result) {
  constexpr std::array texts{"no error",
                             "unhandled cuda error",
                             "unhandled system error",
                             "internal error",
                             "invalid argument",
                             "invalid usage",
                             "remote process exited or there was a network error",
                             "NCCL operation in progress"};
  return result >= 0 && static_cast<std::size_t>(result) < texts.size() ? texts[result] : "unknown result code";
}

NcclResult group_start() {
  ++grouped.depth;
  return nccl::kSuccess;
}

NcclResult group_end() {
  const Lock lock(fake_mutex());
  if (grouped.depth == 0) {
    violation("group_end without group_start");
    return nccl::kInvalidUsage;
  }
  return --grouped.depth > 0 ? nccl::kSuccess : flush();
}

}  // namespace
}  // namespace fake_nccl

using namespace fake_nccl;

FakeNccl::FakeNccl(Settings settings) : state_(std::make_shared<State>()) {
  state_->settings = settings;
  const Lock lock(fake_mutex());
  HVD_CHECK(!current());
  current() = state_;
}

FakeNccl::~FakeNccl() {
  {
    const Lock lock(fake_mutex());
    current().reset();
  }
  for (const std::string& text : state_->violations) ADD_FAILURE() << "fake NCCL: " << text;
}

nccl::Api FakeNccl::api() {
  nccl::Api api;
  api.get_version = get_version;
  api.get_unique_id = get_unique_id;
  api.comm_init_rank_config = comm_init_rank_config;
  api.comm_get_async_error = comm_get_async_error;
  api.comm_finalize = comm_finalize;
  api.comm_destroy = comm_destroy;
  api.comm_abort = comm_abort;
  api.get_last_error = get_last_error;
  api.get_error_string = get_error_string;
  api.group_start = group_start;
  api.group_end = group_end;
  api.all_reduce = [](const void* send, void* receive, std::size_t count, ElementType type, RedOp op, nccl::Comm comm,
                      void* stream) {
    return submit(comm, stream, {CallKind::kAllReduce, send, receive, count, type, op});
  };
  api.all_gather = [](const void* send, void* receive, std::size_t count, ElementType type, nccl::Comm comm,
                      void* stream) {
    return submit(comm, stream, {CallKind::kAllGather, send, receive, count, type});
  };
  api.reduce_scatter = [](const void* send, void* receive, std::size_t count, ElementType type, RedOp op,
                          nccl::Comm comm, void* stream) {
    return submit(comm, stream, {CallKind::kReduceScatter, send, receive, count, type, op});
  };
  api.broadcast = [](const void* send, void* receive, std::size_t count, ElementType type, int root, nccl::Comm comm,
                     void* stream) {
    return submit(comm, stream, {CallKind::kBroadcast, send, receive, count, type, nccl::kSum, root});
  };
  api.reduce = [](const void* send, void* receive, std::size_t count, ElementType type, RedOp op, int root,
                  nccl::Comm comm, void* stream) {
    return submit(comm, stream, {CallKind::kReduce, send, receive, count, type, op, root});
  };
  api.send = [](const void* data, std::size_t count, ElementType type, int peer, nccl::Comm comm, void* stream) {
    return submit(comm, stream, {CallKind::kSend, data, nullptr, count, type, nccl::kSum, peer});
  };
  api.receive = [](void* place, std::size_t count, ElementType type, int peer, nccl::Comm comm, void* stream) {
    return submit(comm, stream, {CallKind::kReceive, nullptr, place, count, type, nccl::kSum, peer});
  };
  return api;
}

nccl::Api FakeNccl::api_with_memory() {
  nccl::Api api = FakeNccl::api();
  api.mem_alloc = mem_alloc;
  api.mem_free = mem_free;
  api.comm_register = comm_register;
  api.comm_deregister = comm_deregister;
  return api;
}

void FakeNccl::inject(FakeNcclFault fault) {
  const Lock lock(fake_mutex());
  state_->faults.push_back(std::move(fault));
}

void FakeNccl::clear_faults() {
  const Lock lock(fake_mutex());
  state_->faults.clear();
  fake_changed_locked();
}

std::size_t FakeNccl::alive_communicators() const {
  const Lock lock(fake_mutex());
  return state_->alive;
}

std::size_t FakeNccl::alive_memory() const {
  const Lock lock(fake_mutex());
  return state_->memory.size();
}

std::size_t FakeNccl::alive_registrations() const {
  const Lock lock(fake_mutex());
  std::size_t alive = 0;
  for (const auto& [place, memory] : state_->memory) alive += memory.registrations.size();
  return alive;
}

std::size_t FakeNccl::registered_calls() const {
  const Lock lock(fake_mutex());
  return state_->registered_calls;
}

std::size_t FakeNccl::concurrent_calls() const {
  const Lock lock(fake_mutex());
  return state_->concurrent_calls;
}

std::vector<std::thread::id> FakeNccl::abort_threads() const {
  const Lock lock(fake_mutex());
  return state_->abort_threads;
}

std::vector<std::string> FakeNccl::violations() const {
  const Lock lock(fake_mutex());
  return state_->violations;
}

std::vector<std::string> FakeNccl::take_violations() {
  const Lock lock(fake_mutex());
  return std::exchange(state_->violations, {});
}

}  // namespace hvd::testing
