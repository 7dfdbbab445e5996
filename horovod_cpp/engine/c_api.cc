// The C ABI over a session. Holds the one process-wide variable of the engine: the current session.

#include <horovod_cpp/c_api.h>

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "common/recycled.h"
#include "horovod_cpp/engine/c_api_errors.h"
#include "horovod_cpp/engine/c_api_operation.h"
#include "horovod_cpp/engine/session.h"

struct hvd_handle {
  hvd::HandleRef state;
  std::shared_ptr<hvd::Session> session;
  hvd::c_api::CallerOutputs outputs;
};

namespace {

using hvd::Status;
using hvd::c_api::guarded;

// init, shutdown and the pointer to the session. Operations hold the session itself, so a shutdown in another thread
// cannot take it from under them.
struct Current {
  std::mutex changing;  // one init or shutdown at a time
  hvd::Guarded<std::shared_ptr<hvd::Session>> session;
};

Current& current() {
  static auto* instance = new Current;  // never destroyed: handles may outlive static destructors
  return *instance;
}

using SpareHandles = hvd::Spares<std::unique_ptr<hvd_handle>>;

SpareHandles& spare_handles() {
  static auto* instance = new SpareHandles;  // as `current`
  return *instance;
}

std::shared_ptr<hvd::Session> session() {
  return current().session.with([](const auto& session) { return session; });
}

Status not_initialised() { return Status::precondition("Horovod has not been initialized; use hvd.init()."); }

template <typename Body>
int with_session(Body body) noexcept {
  return guarded([&]() -> Status {
    const std::shared_ptr<hvd::Session> here = session();
    return here ? body(here) : not_initialised();
  });
}

// The part of a caller's struct that both sides know.
template <typename Struct>
Struct read_struct(const Struct* given) {
  Struct known{};
  if (given != nullptr) std::memcpy(&known, given, std::min<std::size_t>(given->struct_bytes, sizeof known));
  return known;
}

template <typename Struct>
void write_struct(Struct* place, Struct filled) {
  filled.struct_bytes = place->struct_bytes;
  std::memcpy(place, &filled, std::min<std::size_t>(place->struct_bytes, sizeof filled));
}

Status enqueue(const std::shared_ptr<hvd::Session>& here, const hvd_operation& operation, hvd_handle** handle) {
  hvd::TensorEntry entry = here->runtime().blank_entry();
  HVD_RETURN_IF_ERROR(hvd::c_api::read_request(operation, entry.request));
  std::unique_ptr<hvd_handle> made = spare_handles().take().value_or(nullptr);
  if (!made) made = std::make_unique<hvd_handle>();
  made->state = std::allocate_shared<hvd::HandleState>(hvd::Recycled<hvd::HandleState>());
  made->session = here;
  hvd::c_api::take_memory(operation, entry, made->outputs);
  entry.handle = made->state;
  const bool names_device = operation.op == HVD_JOIN && operation.input.memory_kind == HVD_CUDA;
  if (names_device) entry.device = operation.input.device;
  const std::shared_ptr<hvd::ReleaseQueue::Guard> guard =
      here->releases().guard(operation.keep_alive, operation.release);
  entry.keep_alive = guard;
  hvd::CallSite call_site;
  if (operation.call_site_file != nullptr) call_site = {operation.call_site_file, operation.call_site_line};
  // A device works beside the processor: what is for it need not wait for a free core.
  const bool for_device = entry.request.memory != hvd::MemoryKind::kHost;
  hvd::Status taken = here->runtime().enqueue(std::move(entry), call_site);
  if (!taken.ok()) {
    if (guard) guard->disarm();  // a refused operation releases nothing: it has taken nothing over
    return taken;
  }
  if (operation.caller_waits == 0) here->loop().notify(for_device);
  *handle = made.release();
  return {};
}

// A collective of the engine's own.
Status start_set_operation(const std::shared_ptr<hvd::Session>& here, hvd::OpKind op, hvd::Shape ranks,
                           hvd_handle** handle) {
  if (!here->runtime().options().dynamic_process_sets) {
    return Status::precondition(
        "Set HOROVOD_DYNAMIC_PROCESS_SETS=1 to allow adding/removing process sets after Horovod initialization.");
  }
  hvd::TensorEntry entry;
  entry.request.key.op = op;
  entry.request.shape = std::move(ranks);
  auto made = std::make_unique<hvd_handle>();
  made->session = here;
  made->state = std::make_shared<hvd::HandleState>();
  entry.handle = made->state;
  HVD_RETURN_IF_ERROR(here->runtime().enqueue(std::move(entry), {}));
  here->loop().notify();
  *handle = made.release();
  return {};
}

// Until all are done; a handle may be of an earlier session.
Status wait_for(std::span<hvd_handle* const> handles, std::int64_t limit_nanoseconds) {
  hvd::TimePoint deadline = hvd::kNever;
  std::vector<hvd::HandleState*> together;
  while (!handles.empty()) {
    hvd::Session& session = *handles.front()->session;
    if (limit_nanoseconds >= 0 && deadline == hvd::kNever) {
      deadline = session.runtime().clock().now() + hvd::Duration(limit_nanoseconds);
    }
    together.clear();
    while (!handles.empty() && handles.front()->session.get() == &session) {
      together.push_back(handles.front()->state.get());
      handles = handles.subspan(1);
    }
    const bool done = session.loop().wait(together, deadline);
    session.releases().collect();
    if (!done) return Status::deadline_exceeded("the operation has not ended yet");
  }
  return {};
}

// The results of a call come behind those of the calls before it, so one wait is enough for each stream of the engine.
Status let_stream_wait(std::span<hvd_handle* const> handles, void* stream) {
  std::vector<std::pair<hvd::Session*, std::vector<hvd::DeviceMarkRef>>> marks;
  for (hvd_handle* const handle : handles) {
    if (!handle->state->done()) return Status::precondition("the operation has not ended yet; wait for its handle");
    hvd::OperationOutput& output = handle->state->output();
    for (const hvd::OutputTensor& tensor : output.tensors) {
      if (tensor.block) tensor.block->add_consumer(stream);
    }
    if (!output.launched) continue;
    if (marks.empty() || marks.back().first != handle->session.get()) marks.push_back({handle->session.get(), {}});
    hvd::add_mark(marks.back().second, output.launched);
  }
  for (const auto& [session, latest] : marks) {
    for (const hvd::DeviceMarkRef& mark : latest) {
      HVD_RETURN_IF_ERROR(session->runtime().let_stream_wait(mark, stream));
    }
  }
  return {};
}

std::vector<int> sorted(const hvd_rank_list& list) {
  std::vector<int> ranks(list.ranks, list.ranks + std::max(list.count, 0));
  std::sort(ranks.begin(), ranks.end());
  return ranks;
}

}  // namespace

extern "C" {

int hvd_init(const hvd_init_options* options) {
  return guarded([&]() -> Status {
    const std::scoped_lock changing(current().changing);
    if (session()) return {};
    const hvd_init_options given = read_struct(options);
    hvd::Session::Settings settings;
    settings.members.assign(given.comm.ranks, given.comm.ranks + std::max(given.comm.count, 0));
    for (int i = 0; i < given.process_set_count; ++i) settings.process_sets.push_back(sorted(given.process_sets[i]));
    for (int i = 0; i < given.setting_count; ++i) {
      if (given.settings[i].name == nullptr || given.settings[i].value == nullptr) {
        return Status::invalid_argument(fmt::format("setting number {} has no name or no value", i));
      }
      settings.options.push_back({given.settings[i].name, given.settings[i].value});
    }
    hvd::Result<std::unique_ptr<hvd::Session>> started = hvd::Session::start(settings);
    if (!started) return started.status();
    std::shared_ptr<hvd::Session> here = std::move(started).value();
    current().session.with([&](auto& place) { place = std::move(here); });
    return {};
  });
}

int hvd_shutdown(void) {
  return guarded([]() -> Status {
    const std::scoped_lock changing(current().changing);
    const std::shared_ptr<hvd::Session> here =
        current().session.with([](auto& place) { return std::exchange(place, nullptr); });
    if (!here) return {};
    here->shut_down();
    here->releases().collect();
    return {};
  });
}

int hvd_is_initialized(void) { return session() ? 1 : 0; }

const char* hvd_last_error(void) { return hvd::c_api::last_error().c_str(); }

const char* hvd_version(void) { return HVD_VERSION_TEXT; }

int hvd_abi_version(void) { return HVD_ABI_VERSION; }

int hvd_get_topology(hvd_topology* topology) {
  return with_session([&](const auto& here) -> Status {
    const hvd::Topology& known = here->topology();
    hvd_topology filled{};
    filled.rank = known.rank;
    filled.size = known.size;
    filled.local_rank = known.local_rank;
    filled.local_size = known.local_size;
    filled.cross_rank = known.cross_rank;
    filled.cross_size = known.cross_size;
    filled.is_homogeneous = known.homogeneous ? 1 : 0;
    filled.mpi_enabled = known.mpi_enabled ? 1 : 0;
    filled.mpi_threads_supported = known.mpi_threads_supported ? 1 : 0;
    write_struct(topology, filled);
    return {};
  });
}

int hvd_process_set_add_async(const hvd_rank_list* ranks, hvd_handle** handle) {
  return with_session([&](const auto& here) {
    const std::vector<int> members = sorted(*ranks);
    return start_set_operation(here, hvd::OpKind::kProcessSetAdd, {members.begin(), members.end()}, handle);
  });
}

int hvd_process_set_remove_async(int32_t id, hvd_handle** handle) {
  return with_session(
      [&](const auto& here) { return start_set_operation(here, hvd::OpKind::kProcessSetRemove, {id}, handle); });
}

int hvd_process_set_add(const hvd_rank_list* ranks, int32_t* id) {
  hvd_handle* handle = nullptr;
  int code = hvd_process_set_add_async(ranks, &handle);
  if (code == HVD_OK) code = hvd_handle_wait(handle, /*limit_nanoseconds=*/-1);
  if (code == HVD_OK) *id = handle->state->output().process_set;
  hvd_handle_destroy(handle);
  return code;
}

int hvd_process_set_remove(int32_t id) {
  hvd_handle* handle = nullptr;
  int code = hvd_process_set_remove_async(id, &handle);
  if (code == HVD_OK) code = hvd_handle_wait(handle, /*limit_nanoseconds=*/-1);
  hvd_handle_destroy(handle);
  return code;
}

int hvd_process_set_ids(int32_t* ids, int32_t capacity, int32_t* count) {
  return with_session([&](const auto& here) -> Status {
    const std::vector<hvd::ProcessSetId> known = here->runtime().process_set_ids();
    *count = static_cast<int32_t>(known.size());
    for (int32_t i = 0; i < std::min(capacity, *count); ++i) ids[i] = known[static_cast<std::size_t>(i)];
    return {};
  });
}

int hvd_process_set_ranks(int32_t id, int32_t* ranks, int32_t capacity, int32_t* count) {
  return with_session([&](const auto& here) -> Status {
    const hvd::MembershipRef members =
        id < 0 || id > 0xffff ? nullptr : here->runtime().process_set(static_cast<hvd::ProcessSetId>(id));
    if (!members) return Status::invalid_argument(fmt::format("process set {} does not exist", id));
    *count = members->size();
    for (int32_t i = 0; i < std::min(capacity, *count); ++i) ranks[i] = members->ranks[static_cast<std::size_t>(i)];
    return {};
  });
}

int hvd_enqueue(const hvd_operation* operation, hvd_handle** handle) {
  return with_session([&](const auto& here) -> Status {
    here->releases().collect();
    return enqueue(here, read_struct(operation), handle);
  });
}

int hvd_handle_wait(hvd_handle* handle, int64_t limit_nanoseconds) {
  return guarded([&]() -> Status {
    HVD_RETURN_IF_ERROR(wait_for({&handle, 1}, limit_nanoseconds));
    return handle->state->status();
  });
}

int hvd_handles_wait(hvd_handle* const* handles, int32_t count, int64_t limit_nanoseconds) {
  return guarded([&] { return wait_for({handles, static_cast<std::size_t>(std::max(count, 0))}, limit_nanoseconds); });
}

int hvd_handle_poll(const hvd_handle* handle) {
  if (handle->state->done()) return 1;
  handle->session->loop().hurry();
  return 0;
}

int hvd_handle_stream_wait(hvd_handle* handle, void* stream) {
  return guarded([&] { return let_stream_wait({&handle, 1}, stream); });
}

int hvd_handles_stream_wait(hvd_handle* const* handles, int32_t count, void* stream) {
  return guarded([&] { return let_stream_wait({handles, static_cast<std::size_t>(std::max(count, 0))}, stream); });
}

int hvd_handle_output(hvd_handle* handle, hvd_output* output) { return hvd_handle_group_output(handle, 0, output); }

int hvd_handle_group_output(hvd_handle* handle, int32_t index, hvd_output* output) {
  return guarded([&]() -> Status {
    if (!handle->state->done()) return Status::precondition("the operation has not ended yet; wait for its handle");
    HVD_RETURN_IF_ERROR(handle->state->status());
    const hvd::OperationOutput& result = handle->state->output();
    const auto place = static_cast<std::size_t>(index);
    const bool given = place < handle->outputs.tensors.size();
    const bool made = place < result.tensors.size();
    if (index < 0 || (index > 0 && !given && !made)) {
      return Status::invalid_argument(fmt::format("the operation has no output number {}", index));
    }
    hvd_output filled{};
    if (given || made) {
      std::span<const std::int64_t> shape =
          given ? handle->outputs.shape(place) : std::span<const std::int64_t>(result.tensors[place].shape);
      const std::vector<bool>& is_complex = handle->outputs.is_complex;
      if (place < is_complex.size() && is_complex[place]) shape = shape.first(shape.size() - 1);  // without the parts
      filled.dimensions = static_cast<int32_t>(shape.size());
      filled.shape = shape.data();
      filled.data = given ? handle->outputs.tensors[place].data : result.tensors[place].memory.get();
      filled.bytes = static_cast<int64_t>(given ? handle->outputs.tensors[place].bytes : result.tensors[place].bytes);
    }
    if (made && result.tensors[place].block) {
      filled.memory_kind = HVD_CUDA;
      filled.device = result.tensors[place].block->device;
    }
    filled.received_splits = result.received.data();
    filled.received_split_count = static_cast<int32_t>(result.received.size());
    filled.last_joined_rank = result.last_joined;
    filled.process_set = result.process_set;
    write_struct(output, filled);
    return {};
  });
}

void hvd_handle_destroy(hvd_handle* handle) {
  if (handle == nullptr) return;
  std::unique_ptr<hvd_handle> owned(handle);
  owned->state.reset();
  owned->session.reset();
  owned->outputs.clear();
  spare_handles().keep(std::move(owned));
}

void hvd_collect_released(void) {
  if (const auto here = session()) here->releases().collect();
}

int hvd_get_statistics(hvd_statistics* statistics) {
  return with_session([&](const auto& here) -> Status {
    const hvd::RuntimeStatistics known = here->runtime().statistics();
    hvd_statistics filled{};
    filled.operations_done = known.executor.operations_done.value();
    filled.operations_failed = known.executor.operations_failed.value();
    filled.bytes_reduced = known.executor.bytes_reduced.value();
    filled.nccl_registered_bytes = known.nccl.registered_bytes.value();
    filled.nccl_registrations_failed = known.nccl.registrations_failed.value();
    filled.bytes_reordered = known.executor.bytes_reordered.value();
    filled.collective_calls = known.executor.collective_calls.value();
    filled.standing_calls = known.executor.standing_calls.value();
    filled.standing_calls_withdrawn = known.executor.standing_calls_withdrawn.value();
    filled.control_messages_sent = known.transport.control_messages_sent.value();
    filled.control_bytes_sent = known.transport.control_bytes_sent.value();
    filled.data_bytes_sent = known.transport.data_bytes_sent.value();
    filled.data_bytes_pulled = known.transport.data_bytes_pulled.value();
    filled.cache_hits = known.cache_hits.value();
    filled.background_cpu_nanoseconds = here->loop().cpu_time().count();
    filled.background_wakeups = here->loop().wakeups();
    write_struct(statistics, filled);
    return {};
  });
}

int hvd_timeline_start(const char* path, int32_t mark_cycles) {
  return with_session(
      [&](const auto& here) { return here->timeline().start(path != nullptr ? path : "", mark_cycles != 0); });
}

int hvd_timeline_stop(void) {
  return with_session([](const auto& here) -> Status {
    here->timeline().stop();
    return {};
  });
}

}  // extern "C"
