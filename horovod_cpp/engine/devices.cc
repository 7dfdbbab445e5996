#include "horovod_cpp/engine/devices.h"

#include <fmt/format.h>

#include <utility>

#include "ops/hierarchy.h"
#include "ops/staged_backend.h"

namespace hvd {

Devices::Parts::Parts(Loop& loop, DeviceRuntime& runtime, Result<const nccl::Api*> api, const Options& options,
                      NcclBackend::FailedLate failed_late)
    : engine(loop, runtime),
      nccl(loop, engine, std::move(api),
           {options.start_timeout, options.nccl_registered_bytes, options.hierarchical_allreduce},
           std::move(failed_late)) {}

Devices::Devices(Loop& loop, DeviceSource* source, const Options& options, NcclBackend::FailedLate failed_late)
    : loop_(loop), source_(source), options_(options), failed_late_(std::move(failed_late)) {}

Devices::~Devices() = default;

Result<Devices::Parts*> Devices::parts() {
  if (Parts* made = parts_.load(std::memory_order_acquire)) return made;  // acquire: pairs with the store below
  if (source_ == nullptr) return Status::unavailable("this engine has no devices");
  // Loaded before the lock is taken: it takes time, and the source remembers.
  Result<DeviceRuntime*> runtime = source_->runtime();
  if (!runtime) return runtime.status();
  Result<const nccl::Api*> api = source_->nccl();
  const std::scoped_lock lock(making_);
  if (owned_) return owned_.get();
  owned_ = std::make_unique<Parts>(loop_, *runtime.value(), std::move(api), options_, failed_late_);
  parts_.store(owned_.get(), std::memory_order_release);
  return owned_.get();
}

Status Devices::receive(TensorEntry& entry) {
  Result<Parts*> here = parts();
  if (!here) return here.status();
  DeviceEngine& engine = here.value()->engine;
  const int count = engine.runtime().device_count();
  if (entry.device < 0 || entry.device >= count) {
    return Status::invalid_argument(fmt::format("device {} is not there: this process sees {}", entry.device, count));
  }
  Result<bool> captured = engine.runtime().is_capturing(entry.device, entry.producer);
  if (!captured) return captured.status();
  entry.request.device = entry.device;
  entry.request.memory = captured.value() ? MemoryKind::kDeviceCaptured : MemoryKind::kDevice;
  if (entry.caller_waits) {
    entry.ready = DeviceEvents::place(entry.device, entry.producer, captured.value());
    return {};
  }
  Result<DeviceMarkRef> mark = engine.events().mark(entry.device, entry.producer, captured.value());
  if (!mark) return mark.status();
  entry.ready = std::move(mark).value();
  return {};
}

Status Devices::wait_for(const DeviceMarkRef& mark, DeviceStream stream) {
  if (mark->event == nullptr && mark->stream == stream) return {};
  Result<Parts*> here = parts();
  if (!here) return here.status();
  DeviceEngine& engine = here.value()->engine;
  Result<DeviceMarkRef> recorded = engine.events().recorded(mark);
  if (!recorded) return recorded.status();
  return engine.runtime().wait(mark->device, stream, recorded.value()->event);
}

Result<std::unique_ptr<Backend>> Devices::begin_call(const Response& response, const MembershipRef& membership,
                                                     const std::vector<TensorEntry>& entries, Priority priority) {
  Result<Parts*> here = parts();
  if (!here) return here.status();
  DeviceCallSettings settings;
  settings.process_set = response.process_set;
  settings.call = response.call;
  settings.ranks = {membership, &membership->ranks};
  settings.devices = response.entries.front().devices;
  settings.priority = priority;
  settings.captured = response.memory == MemoryKind::kDeviceCaptured;
  settings.device = entries.front().device;
  settings.hierarchical = is_hierarchical(response, *membership);
  const bool staged = is_staged(response);
  const DeviceMarkRef& first = entries.front().ready;
  settings.on_producer = !staged && entries.size() == 1 && first && first->event == nullptr;
  if (settings.on_producer) settings.producer = first->stream;
  for (const TensorEntry& entry : entries) {
    if (!entry.ready) continue;  // stands in for a tensor of a rank that has joined
    if (entry.device != settings.device) {
      return Status::internal(
          fmt::format("tensors of one call lie on devices {} and {}", settings.device, entry.device));
    }
    if (settings.on_producer) continue;
    Result<DeviceMarkRef> mark = here.value()->engine.events().recorded(entry.ready);
    if (!mark) return mark.status();
    add_mark(settings.ready, mark.value());
  }
  // Of a rank that has joined, never had a tensor on a device, and did not say where to put what stands in.
  if (settings.device < 0) settings.device = last_device_;
  last_device_ = settings.device;
  if (!staged) return here.value()->nccl.begin_call(std::move(settings));
  return std::unique_ptr<Backend>(std::make_unique<StagedBackend>(loop_, here.value()->engine, std::move(settings)));
}

bool Devices::is_staged(const Response& response) const {
  return options_.gpu_operations == "host" || response.reduce_op == ReduceOp::kAdasum;
}

// Not under capture: the way between hosts cannot become part of a graph.
bool Devices::is_hierarchical(const Response& response, const Membership& membership) const {
  return options_.hierarchical_allreduce && response.op == OpKind::kAllreduce &&
         response.memory == MemoryKind::kDevice && !is_staged(response) && has_hierarchy(membership);
}

void Devices::call_failed(const Response& response, const Status& reason) {
  if (response.memory != MemoryKind::kHost && !is_staged(response)) fail_set(response.process_set, reason);
}

void Devices::fail_set(ProcessSetId process_set, const Status& reason) {
  if (Parts* made = parts_.load(std::memory_order_acquire)) made->nccl.fail_set(process_set, reason);
}

void Devices::fail_rank(int rank, const Status& reason) {
  if (Parts* made = parts_.load(std::memory_order_acquire)) made->nccl.fail_rank(rank, reason);
}

void Devices::fail_call(ProcessSetId process_set, std::uint64_t call, const Status& reason) {
  if (Parts* made = parts_.load(std::memory_order_acquire)) made->nccl.fail_call(process_set, call, reason);
}

std::vector<std::pair<ProcessSetId, Status>> Devices::failed_sets() const {
  const Parts* made = parts_.load(std::memory_order_acquire);
  if (made == nullptr) return {};
  return made->nccl.failed_sets();
}

void Devices::forget_set(ProcessSetId process_set) {
  if (Parts* made = parts_.load(std::memory_order_acquire)) made->nccl.forget_set(process_set);
}

NcclBackend::Statistics Devices::statistics() const {
  const Parts* made = parts_.load(std::memory_order_acquire);
  return made == nullptr ? NcclBackend::Statistics() : made->nccl.statistics();
}

bool Devices::pending() const {
  const Parts* made = parts_.load(std::memory_order_acquire);
  return made != nullptr && made->engine.pending();
}

void Devices::abandon(const Status& reason) {
  Parts* made = parts_.load(std::memory_order_acquire);
  if (made == nullptr) return;
  made->nccl.fail_all(reason);
  made->engine.abandon();
}

}  // namespace hvd
