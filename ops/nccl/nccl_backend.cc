#include "ops/nccl/nccl_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "common/env_options.h"
#include "common/log.h"
#include "common/loop/sleep.h"
#include "ops/host_backend.h"
#include "ops/nccl/current_device.h"
#include "ops/nccl/nccl_call.h"
#include "ops/nccl/nccl_hierarchical_call.h"

namespace hvd {
namespace {

constexpr Duration kShortestNap = std::chrono::microseconds(20);
constexpr Duration kLongestNap = std::chrono::milliseconds(1);

// Where the network may be at fault: a wrong interface is the usual reason.
std::string interface_text(nccl::Result result) {
  if (result != nccl::kSystemError && result != nccl::kRemoteError) return {};
  const std::optional<std::string> chosen = environment("NCCL_SOCKET_IFNAME");
  return fmt::format(" (network interface: {})",
                     chosen ? "NCCL_SOCKET_IFNAME=" + *chosen : "NCCL's choice, as NCCL_SOCKET_IFNAME is not set");
}

}  // namespace

NcclBackend::NcclBackend(Loop& loop, DeviceEngine& devices, Result<const nccl::Api*> api, const Settings& settings,
                         FailedLate failed_late)
    : loop_(loop), devices_(devices), api_(std::move(api)), settings_(settings), failed_late_(std::move(failed_late)) {
  if (api_) reaper_ = std::make_unique<NcclReaper>(this->api(), devices_.runtime());
  devices_.set_watch([this] { watch(); });
}

// Nothing is pending any more, on any rank, where the job ended well: everybody has said goodbye after its last call
// was done. So there is nothing to flush, and to abort is to free.
NcclBackend::~NcclBackend() {
  devices_.set_watch(nullptr);
  for (auto& [key, communicator] : communicators_) abort(*communicator);
  for (const CommunicatorRef& communicator : retired_) abort(*communicator);
}

std::unique_ptr<Backend> NcclBackend::begin_call(DeviceCallSettings settings) {
  CommunicatorRef communicator = communicator_of(settings);
  if (settings.hierarchical) {
    return std::make_unique<NcclHierarchicalCall>(*this, std::move(communicator), std::move(settings));
  }
  return std::make_unique<NcclCall>(*this, std::move(communicator), std::move(settings));
}

const NcclBackend::CommunicatorRef& NcclBackend::communicator_of(const DeviceCallSettings& settings) {
  CommunicatorRef& communicator = communicators_[{settings.process_set, settings.devices, settings.hierarchical}];
  if (communicator) return communicator;
  communicator = std::make_shared<Communicator>();
  communicator->number = next_number_++;
  communicator->process_set = settings.process_set;
  if (const auto failed = failed_.find(settings.process_set); failed != failed_.end()) {
    communicator->failed = failed->second;
  }
  return communicator;
}

std::vector<NcclBackend::CommunicatorRef> NcclBackend::of_set(std::uint16_t process_set) const {
  std::vector<CommunicatorRef> found;
  for (auto one = communicators_.lower_bound({process_set, {}, false});
       one != communicators_.end() && std::get<0>(one->first) == process_set; ++one) {
    found.push_back(one->second);
  }
  return found;
}

// Also of sets that are no more: they may have work in line.
bool NcclBackend::has_several() const {
  const auto is_there = [](const CommunicatorRef& one) { return one->comm != nullptr; };
  return std::count_if(communicators_.begin(), communicators_.end(),
                       [&](const auto& one) { return is_there(one.second); }) +
             std::count_if(retired_.begin(), retired_.end(), is_there) >
         1;
}

void NcclBackend::abort(Communicator& communicator) {
  communicator.pending.clear();
  if (communicator.comm == nullptr) return;
  let_go_of_registered(communicator);
  reaper_->abort(std::exchange(communicator.comm, nullptr), communicator.device,
                 std::exchange(communicator.registered, {}));
}

void NcclBackend::fail(Communicator& communicator, const Status& reason) {
  if (communicator.failed.ok()) communicator.failed = reason;
  abort(communicator);
}

void NcclBackend::fail_set(std::uint16_t process_set, const Status& reason) {
  failed_.try_emplace(process_set, reason);
  for (const CommunicatorRef& communicator : of_set(process_set)) fail(*communicator, reason);
}

void NcclBackend::fail_all(const Status& reason) {
  for (const auto& [key, communicator] : communicators_) fail_set(communicator->process_set, reason);
}

void NcclBackend::fail_rank(int rank, const Status& reason) {
  for (const CommunicatorRef& communicator : retired_) {
    const auto& ranks = communicator->ranks;
    if (ranks && std::binary_search(ranks->begin(), ranks->end(), rank)) fail(*communicator, reason);
  }
}

void NcclBackend::fail_call(std::uint16_t process_set, std::uint64_t call, const Status& reason) {
  const auto had_it = [&](const CommunicatorRef& one) {
    return one->process_set == process_set &&
           std::find(one->recent.begin(), one->recent.end(), call) != one->recent.end();
  };
  const std::vector<CommunicatorRef> now = of_set(process_set);
  if (std::any_of(now.begin(), now.end(), had_it)) fail_set(process_set, reason);
  for (const CommunicatorRef& communicator : retired_) {
    if (had_it(communicator)) fail(*communicator, reason);
  }
}

std::vector<std::pair<std::uint16_t, Status>> NcclBackend::failed_sets() const {
  return {failed_.begin(), failed_.end()};
}

void NcclBackend::forget_set(std::uint16_t process_set) {
  for (CommunicatorRef& communicator : of_set(process_set)) retired_.push_back(std::move(communicator));
  std::erase_if(communicators_, [process_set](const auto& one) { return std::get<0>(one.first) == process_set; });
  failed_.erase(process_set);
  end_retired();
}

// Once nothing of this rank needs them; the others' part may still be under way.
void NcclBackend::end_retired() {
  std::erase_if(retired_, [this](const CommunicatorRef& communicator) {
    auto& pending = communicator->pending;
    while (!pending.empty() && pending.front().second.expired()) pending.pop_front();
    if (!pending.empty() || communicator.use_count() > 1) return false;
    if (communicator->comm != nullptr) {
      let_go_of_registered(*communicator);
      reaper_->finish(std::exchange(communicator->comm, nullptr), communicator->device,
                      std::exchange(communicator->registered, {}));
    }
    return true;
  });
}

Status NcclBackend::checked(nccl::Result result, nccl::Comm comm, std::string_view what) const {
  if (result == nccl::kSuccess || result == nccl::kInProgress) return {};
  const char* detail = api().get_last_error(comm);
  return Status::internal(fmt::format("NCCL: {}: {}{}{}{}", what, api().get_error_string(result),
                                      detail != nullptr && *detail != '\0' ? ": " : "", detail != nullptr ? detail : "",
                                      interface_text(result)));
}

Task<Status> NcclBackend::agree_on_id(CollectiveContext& context, nccl::UniqueId& id) {
  std::byte* const place = context.lease(sizeof id);
  if (place == nullptr) co_return Status::internal("no memory for NCCL's id");
  if (context.rank() == 0) {
    HVD_CO_RETURN_IF_ERROR(checked(api().get_unique_id(&id), nullptr, "making a communicator's id"));
    std::memcpy(place, &id, sizeof id);
  }
  HVD_CO_RETURN_IF_ERROR(co_await host_broadcast(context, place, place, sizeof id, /*root=*/0));
  std::memcpy(&id, place, sizeof id);
  co_return Status();
}

Task<Status> NcclBackend::connect(CollectiveContext& context, Communicator& communicator,
                                  const DeviceCallSettings& settings) {
  if (!api_) co_return api_.status();
  const std::uint16_t set = settings.process_set;
  if (!communicator.failed.ok()) co_return communicator.failed;
  if (communicator.comm != nullptr) co_return Status();
  if (settings.captured) {
    co_return Status::precondition(fmt::format(
        "the first operation of process set {} on device memory was called under graph capture, and NCCL's "
        "communicator cannot be made there; do one {} before the capture begins",
        set, settings_.hierarchical ? "broadcast, as hierarchical steps use other communicators," : "step"));
  }
  nccl::UniqueId id{};
  HVD_CO_RETURN_IF_ERROR(co_await agree_on_id(context, id));
  const TimePoint deadline = loop_.now() + settings_.start_timeout;
  nccl::Comm made = nullptr;
  Status status;
  {
    const CurrentDevice current(devices_.runtime(), settings.device);
    status = current.status();
    if (status.ok()) {
      nccl::Config config;
      config.blocking = 0;
      status = checked(api().comm_init_rank_config(&made, context.size(), id, context.rank(), &config), nullptr,
                       "making a communicator");
    }
  }
  Duration nap = kShortestNap;
  while (status.ok()) {
    nccl::Result state = nccl::kSuccess;
    status = checked(api().comm_get_async_error(made, &state), made, "making a communicator");
    if (status.ok()) status = checked(state, made, "making a communicator");
    if (!status.ok() || state != nccl::kInProgress) break;
    if (!context.cancelled().ok()) status = context.cancelled();
    if (loop_.now() > deadline) {
      status = Status::internal(fmt::format(
          "NCCL did not make a communicator of {} ranks within {} s (HOROVOD_START_TIMEOUT)", context.size(),
          std::chrono::duration_cast<std::chrono::seconds>(settings_.start_timeout).count()));
    }
    if (!status.ok()) break;
    co_await Sleep(loop_, nap, settings.priority);
    nap = std::min(2 * nap, kLongestNap);
  }
  // Once it is in use a failure of one rank shows on the others as wrong results; here it still is an error of the
  // call.
  if (status.ok()) status = co_await host_barrier(context);
  if (!status.ok()) {
    if (made != nullptr) reaper_->abort(made, settings.device, {});
    co_return status;
  }
  if (!communicator.failed.ok()) {  // a member was lost meanwhile
    reaper_->abort(made, settings.device, {});
    co_return communicator.failed;
  }
  communicator.comm = made;
  communicator.device = settings.device;
  communicator.ranks = settings.ranks;
  co_return Status();
}

// ---- registered memory ----------------------------------------------------------------------------------------------

Result<NcclRegistered> NcclBackend::make_registered(const Communicator& communicator) {
  if (api().mem_alloc == nullptr || api().mem_free == nullptr || api().comm_register == nullptr ||
      api().comm_deregister == nullptr) {
    return Status::unavailable("this NCCL cannot register memory");
  }
  const int device = communicator.device;
  const CurrentDevice current(devices_.runtime(), device);
  HVD_RETURN_IF_ERROR(current.status());
  void* memory = nullptr;
  HVD_RETURN_IF_ERROR(checked(api().mem_alloc(&memory, settings_.registered_bytes), communicator.comm,
                              "allocating memory that can be registered"));
  NcclRegistered made;
  made.block = devices_.memory().adopt(device, memory, settings_.registered_bytes,
                                       [&nccl = api(), &runtime = devices_.runtime(), device](void* done) {
                                         const CurrentDevice there(runtime, device);
                                         nccl.mem_free(done);
                                       });
  HVD_RETURN_IF_ERROR(
      checked(api().comm_register(communicator.comm, memory, settings_.registered_bytes, &made.registration),
              communicator.comm, "registering memory"));
  return made;
}

void NcclBackend::let_go_of_registered(Communicator& communicator) {
  if (communicator.registered.block) {
    statistics_.registered_bytes.add(-static_cast<std::int64_t>(settings_.registered_bytes));
  }
  communicator.registered_use.reset();
}

// Where one rank of a call uses registered memory all have to, at one offset, or NCCL's result is undefined. So the set
// has one block on all ranks or on none, and they tell each other before any of them uses it.
Task<Status> NcclBackend::share_registered(CollectiveContext& context, Communicator& communicator,
                                           const DeviceCallSettings& settings) {
  if (std::exchange(communicator.registered_tried, true)) co_return Status();
  const Result<NcclRegistered> made = make_registered(communicator);
  std::vector<std::int64_t> told;
  std::vector<std::int64_t> own(static_cast<std::size_t>(context.size()), made.ok() ? 1 : 0);
  const Status exchanged = co_await host_exchange_counts(context, std::move(own), told);
  // The communicator may have ended meanwhile, and its registrations with it.
  const bool alive = communicator.comm != nullptr;
  const bool everywhere = std::find(told.begin(), told.end(), 0) == told.end();
  if (alive && exchanged.ok() && made.ok() && everywhere) {
    communicator.registered = made.value();
    statistics_.registered_bytes.add(static_cast<std::int64_t>(settings_.registered_bytes));
    co_return Status();
  }
  if (alive && made.ok()) {
    const CurrentDevice current(devices_.runtime(), communicator.device);
    api().comm_deregister(communicator.comm, made.value().registration);
  }
  if (!alive && made.ok()) reaper_->release_after(made.value().block);  // behind the abort
  if (!exchanged.ok()) co_return exchanged;
  if (!alive) co_return communicator.failed;
  if (!made.ok()) statistics_.registrations_failed.add(1);
  if (!std::exchange(registration_reported_, true)) {
    const auto first = std::find(told.begin(), told.end(), 0) - told.begin();
    const std::string whose = made.ok() ? fmt::format("rank {} of the set has none", first) : made.status().text();
    log::warning("process set {}: fused calls on devices go without memory that is registered with NCCL: {}",
                 settings.process_set, whose);
  }
  co_return Status();
}

// ---- what is in line ------------------------------------------------------------------------------------------------

Result<bool> NcclBackend::is_settled(const Communicator& communicator, std::string_view what) const {
  nccl::Result state = nccl::kSuccess;
  HVD_RETURN_IF_ERROR(checked(api().comm_get_async_error(communicator.comm, &state), communicator.comm, what));
  HVD_RETURN_IF_ERROR(checked(state, communicator.comm, what));
  return state != nccl::kInProgress;
}

Status NcclBackend::end_with(Communicator& communicator, const Status& reason) {
  fail_set(communicator.process_set, reason);
  fail(communicator, reason);
  return reason;
}

// NCCL may go on connecting in threads of its own; only then does its work lie on the stream.
Task<Status> NcclBackend::settle(CollectiveContext& context, Communicator& communicator,
                                 const DeviceCallSettings& settings, std::string_view what) {
  const TimePoint deadline = loop_.now() + settings_.start_timeout;
  Duration nap = kShortestNap;
  for (;;) {
    if (!communicator.failed.ok()) co_return communicator.failed;
    const Result<bool> settled = is_settled(communicator, what);
    if (settled.ok() && settled.value()) co_return Status();
    Status status = settled.ok() ? context.cancelled() : settled.status();
    if (status.ok() && loop_.now() > deadline) {
      status = Status::internal(
          fmt::format("NCCL: {}: it was still connecting after {} s (HOROVOD_START_TIMEOUT)", what,
                      std::chrono::duration_cast<std::chrono::seconds>(settings_.start_timeout).count()));
    }
    if (!status.ok()) co_return end_with(communicator, status);
    co_await Sleep(loop_, nap, settings.priority);
    nap = std::min(2 * nap, kLongestNap);
  }
}

Task<Status> NcclBackend::reach(CollectiveContext& context, Communicator& communicator,
                                const DeviceCallSettings& settings, DeviceMarkRef mark) {
  Duration nap = kShortestNap;
  for (;;) {
    const Result<bool> done = devices_.runtime().query(settings.device, mark->event);
    // Asked first, as a device goes on past what was aborted: what it has done is a result only without an error.
    if (!communicator.failed.ok()) co_return communicator.failed;
    const Result<bool> settled = is_settled(communicator, "a call in flight");
    Status status = settled.ok() ? context.cancelled() : settled.status();
    if (status.ok()) status = done.status();
    if (!status.ok()) co_return end_with(communicator, status);
    if (done.value()) co_return Status();
    co_await Sleep(loop_, nap, settings.priority);
    nap = std::min(2 * nap, kLongestNap);
  }
}

Status NcclBackend::look_at(Communicator& communicator) {
  auto& pending = communicator.pending;
  while (!pending.empty() && pending.front().second.expired()) pending.pop_front();
  if (pending.empty() || communicator.comm == nullptr) return {};
  nccl::Result state = nccl::kSuccess;
  HVD_RETURN_IF_ERROR(
      checked(api().comm_get_async_error(communicator.comm, &state), communicator.comm, "a call in flight"));
  return checked(state, communicator.comm, "a call in flight");
}

// Errors of the network come to light while a collective runs, long after its call has ended for the engine.
void NcclBackend::watch() {
  for (const CommunicatorRef& communicator : retired_) {
    const Status status = look_at(*communicator);
    if (status.ok()) continue;
    const std::uint64_t call = communicator->pending.front().first;
    log::error("process set {}, which was removed: {}", communicator->process_set, status.text());
    fail(*communicator, status);
    failed_late_(communicator->process_set, call, status);
  }
  end_retired();
  for (const auto& [key, communicator] : communicators_) {
    const Status status = look_at(*communicator);
    if (status.ok()) continue;
    const std::uint64_t call = communicator->pending.front().first;
    log::error("process set {}: {}", communicator->process_set, status.text());
    fail_set(communicator->process_set, status);
    failed_late_(communicator->process_set, call, status);
  }
}

}  // namespace hvd
