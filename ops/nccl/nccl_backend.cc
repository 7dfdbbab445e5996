#include "ops/nccl/nccl_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "common/log.h"
#include "common/loop/sleep.h"
#include "ops/host_backend.h"
#include "ops/nccl/nccl_call.h"

namespace hvd {
namespace {

constexpr Duration kShortestNap = std::chrono::microseconds(20);
constexpr Duration kLongestNap = std::chrono::milliseconds(1);

// Makes a device the thread's current one, as NCCL expects it at some calls.
class CurrentDevice {
 public:
  CurrentDevice(DeviceRuntime& runtime, int device) : runtime_(runtime), former_(runtime.exchange_current(device)) {}
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  ~CurrentDevice() {
    if (former_) static_cast<void>(runtime_.exchange_current(former_.value()));
  }
  Status status() const { return former_.status(); }

 private:
  DeviceRuntime& runtime_;
  Result<int> former_;
};

}  // namespace

NcclBackend::NcclBackend(Loop& loop, DeviceEngine& devices, Result<const nccl::Api*> api, Duration start_timeout,
                         FailedLate failed_late)
    : loop_(loop),
      devices_(devices),
      api_(std::move(api)),
      start_timeout_(start_timeout),
      failed_late_(std::move(failed_late)) {
  if (api_) reaper_ = std::make_unique<NcclReaper>(this->api());
  devices_.set_watch([this] { watch(); });
}

// Nothing is pending any more, on any rank, where the job ended well: everybody has said goodbye after its last call
// was done. So there is nothing to flush, and to abort is to free.
NcclBackend::~NcclBackend() {
  devices_.set_watch(nullptr);
  for (auto& [set, communicator] : communicators_) {
    if (communicator.comm != nullptr) reaper_->abort(communicator.comm);
  }
}

std::unique_ptr<Backend> NcclBackend::begin_call(DeviceCallSettings settings) {
  return std::make_unique<NcclCall>(*this, std::move(settings));
}

void NcclBackend::fail_set(std::uint16_t process_set, const Status& reason) {
  Communicator& communicator = communicators_[process_set];
  if (communicator.failed.ok()) communicator.failed = reason;
  communicator.pending.clear();
  if (communicator.comm != nullptr) reaper_->abort(std::exchange(communicator.comm, nullptr));
}

void NcclBackend::fail_all(const Status& reason) {
  for (auto& [set, communicator] : communicators_) fail_set(set, reason);
}

bool NcclBackend::fail_call(std::uint16_t process_set, std::uint64_t call, const Status& reason) {
  const auto found = communicators_.find(process_set);
  if (found == communicators_.end()) return false;
  const auto& pending = found->second.pending;
  if (std::none_of(pending.begin(), pending.end(), [call](const auto& one) { return one.first == call; })) return false;
  fail_set(process_set, reason);
  return true;
}

std::vector<std::pair<std::uint16_t, Status>> NcclBackend::failed_sets() const {
  std::vector<std::pair<std::uint16_t, Status>> failed;
  for (const auto& [set, communicator] : communicators_) {
    if (!communicator.failed.ok()) failed.emplace_back(set, communicator.failed);
  }
  return failed;
}

void NcclBackend::forget_set(std::uint16_t process_set) {
  const auto found = communicators_.find(process_set);
  if (found == communicators_.end()) return;
  if (found->second.comm != nullptr) reaper_->abort(found->second.comm);
  communicators_.erase(found);
}

Status NcclBackend::checked(nccl::Result result, nccl::Comm comm, std::string_view what) const {
  if (result == nccl::kSuccess || result == nccl::kInProgress) return {};
  const char* detail = api().get_last_error(comm);
  return Status::internal(fmt::format("NCCL: {}: {}{}{}", what, api().get_error_string(result),
                                      detail != nullptr && *detail != '\0' ? ": " : "",
                                      detail != nullptr ? detail : ""));
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

Task<Status> NcclBackend::connect(CollectiveContext& context, const DeviceCallSettings& settings) {
  if (!api_) co_return api_.status();
  // Found anew after each wait: other sets' entries come and go.
  const std::uint16_t set = settings.process_set;
  {
    const Communicator& known = communicators_[set];
    if (!known.failed.ok()) co_return known.failed;
    if (known.comm != nullptr && known.device != settings.device) {
      co_return Status::invalid_argument(fmt::format(
          "process set {} communicates from device {} of this rank, and a tensor lies on device {}: one device "
          "a rank and process set; use another process set for the other device",
          set, known.device, settings.device));
    }
    if (known.comm != nullptr) co_return Status();
  }
  if (settings.captured) {
    co_return Status::precondition(
        fmt::format("the first operation of process set {} on device memory was called under graph capture, and NCCL's "
                    "communicator cannot be made there; do one step before the capture begins",
                    set));
  }
  nccl::UniqueId id{};
  HVD_CO_RETURN_IF_ERROR(co_await agree_on_id(context, id));
  const TimePoint deadline = loop_.now() + start_timeout_;
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
      status = Status::internal(
          fmt::format("NCCL did not make a communicator of {} ranks within {} s (HOROVOD_START_TIMEOUT)",
                      context.size(), std::chrono::duration_cast<std::chrono::seconds>(start_timeout_).count()));
    }
    if (!status.ok()) break;
    co_await Sleep(loop_, nap, settings.priority);
    nap = std::min(2 * nap, kLongestNap);
  }
  // Once it is in use a failure of one rank shows on the others as wrong results; here it still is an error of the
  // call.
  if (status.ok()) status = co_await host_barrier(context);
  if (!status.ok()) {
    if (made != nullptr) reaper_->abort(made);
    co_return status;
  }
  Communicator& communicator = communicators_[set];
  if (!communicator.failed.ok()) {  // a member was lost meanwhile
    reaper_->abort(made);
    co_return communicator.failed;
  }
  communicator.comm = made;
  communicator.device = settings.device;
  co_return Status();
}

// NCCL may go on connecting in threads of its own; only then does its work lie on the stream.
Task<Status> NcclBackend::settle(CollectiveContext& context, const DeviceCallSettings& settings,
                                 std::string_view what) {
  const TimePoint deadline = loop_.now() + start_timeout_;
  Duration nap = kShortestNap;
  for (;;) {
    Communicator& communicator = communicators_[settings.process_set];
    if (!communicator.failed.ok()) co_return communicator.failed;
    nccl::Result state = nccl::kSuccess;
    Status status = checked(api().comm_get_async_error(communicator.comm, &state), communicator.comm, what);
    if (status.ok()) status = checked(state, communicator.comm, what);
    if (status.ok() && state != nccl::kInProgress) co_return Status();
    if (status.ok()) status = context.cancelled();
    if (status.ok() && loop_.now() > deadline) {
      status =
          Status::internal(fmt::format("NCCL: {}: it was still connecting after {} s (HOROVOD_START_TIMEOUT)", what,
                                       std::chrono::duration_cast<std::chrono::seconds>(start_timeout_).count()));
    }
    if (!status.ok()) {
      fail_set(settings.process_set, status);
      co_return status;
    }
    co_await Sleep(loop_, nap, settings.priority);
    nap = std::min(2 * nap, kLongestNap);
  }
}

// Errors of the network come to light while a collective runs, long after its call has ended for the engine.
void NcclBackend::watch() {
  for (auto& [set, communicator] : communicators_) {
    auto& pending = communicator.pending;
    while (!pending.empty() && pending.front().second.expired()) pending.pop_front();
    if (pending.empty() || communicator.comm == nullptr) continue;
    nccl::Result state = nccl::kSuccess;
    Status status =
        checked(api().comm_get_async_error(communicator.comm, &state), communicator.comm, "a call in flight");
    if (status.ok()) status = checked(state, communicator.comm, "a call in flight");
    if (status.ok()) continue;
    const std::uint64_t call = pending.front().first;
    log::error("process set {}: {}", set, status.text());
    fail_set(set, status);
    failed_late_(set, call, status);
  }
}

}  // namespace hvd
