#include "ops/staged_backend.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "common/loop/sleep.h"

namespace hvd {
namespace {

constexpr Duration kShortestNap = std::chrono::microseconds(10);
constexpr Duration kLongestNap = std::chrono::milliseconds(1);

}  // namespace

Task<Status> StagedBackend::begin(CollectiveContext& context) {
  if (!context.cancelled().ok()) co_return context.cancelled();
  if (settings_.captured) {
    co_return Status::precondition(
        "it goes through host memory (Adasum, or HOROVOD_GPU_OPERATIONS=host), which cannot become part of a CUDA "
        "graph");
  }
  Result<DeviceStream> stream = devices_.stream(settings_.device, /*captured=*/false);
  if (!stream) co_return stream.status();
  stream_ = *stream;
  has_stream_ = true;
  for (const DeviceMarkRef& mark : settings_.ready) {
    HVD_CO_RETURN_IF_ERROR(devices_.runtime().wait(settings_.device, stream_, mark->event));
  }
  settings_.ready.clear();
  co_return Status();
}

Result<MadeMemory> StagedBackend::make_output(std::size_t bytes) {
  Result<std::shared_ptr<DeviceBlock>> block = devices_.memory().lease(settings_.device, bytes, stream_);
  if (!block) return block.status();
  return made_of(std::move(block).value());
}

Result<DeviceMarkRef> StagedBackend::end(const Status& /*status*/, std::shared_ptr<void> held) {
  if (!has_stream_) return DeviceMarkRef();
  Result<DeviceMarkRef> mark = devices_.events().mark(settings_.device, stream_);
  if (mark) {
    devices_.keep(mark.value(), std::move(held));
  } else {
    devices_.keep_for_good(std::move(held));
  }
  return mark;
}

Result<std::byte*> StagedBackend::stand_in(const std::byte* device_memory, std::size_t bytes) {
  if (device_memory == nullptr) return static_cast<std::byte*>(nullptr);
  Result<std::shared_ptr<std::byte>> memory = devices_.memory().lease_pinned(bytes);
  if (!memory) return memory.status();
  pinned_.push_back(std::move(memory).value());
  return pinned_.back().get();
}

Result<std::byte*> StagedBackend::bring(const std::byte* device_memory, std::size_t bytes) {
  Result<std::byte*> place = stand_in(device_memory, bytes);
  if (place && place.value() != nullptr && bytes > 0) {
    HVD_RETURN_IF_ERROR(devices_.runtime().copy(settings_.device, place.value(), device_memory, bytes, stream_));
  }
  return place;
}

Status StagedBackend::take_back(std::byte* device_memory, const std::byte* from, std::size_t bytes) {
  if (device_memory == nullptr || bytes == 0) return {};
  return devices_.runtime().copy(settings_.device, device_memory, from, bytes, stream_);
}

Task<Status> StagedBackend::arrived(CollectiveContext& context) {
  Result<DeviceMarkRef> mark = devices_.events().mark(settings_.device, stream_);
  if (!mark) co_return mark.status();
  Duration nap = kShortestNap;
  for (;;) {
    const Result<bool> done = devices_.runtime().query(settings_.device, mark.value()->event);
    if (!done) co_return done.status();
    if (done.value()) co_return Status();
    if (!context.cancelled().ok()) co_return context.cancelled();
    co_await Sleep(loop_, nap, settings_.priority);
    nap = std::min(2 * nap, kLongestNap);
  }
}

Task<Status> StagedBackend::allreduce(CollectiveContext& context, AllreduceCall call) {
  AllreduceCall staged = call;
  const std::size_t element = size_of(call.dtype);
  for (AllreduceTensor& tensor : staged.tensors) {
    const std::size_t bytes = tensor.count * element;
    // A rank that has joined brings nothing; the host's code makes that up, and needs a place for it.
    Result<std::byte*> place = tensor.input != nullptr ? bring(tensor.input, bytes) : stand_in(tensor.output, bytes);
    if (!place) co_return place.status();
    if (tensor.input != nullptr) tensor.input = place.value();
    tensor.output = place.value();
  }
  HVD_CO_RETURN_IF_ERROR(co_await arrived(context));
  HVD_CO_RETURN_IF_ERROR(co_await host_.allreduce(context, staged));
  for (std::size_t i = 0; i < call.tensors.size(); ++i) {
    const AllreduceTensor& tensor = call.tensors[i];
    HVD_CO_RETURN_IF_ERROR(take_back(tensor.output, staged.tensors[i].output, tensor.count * element));
  }
  co_return Status();
}

Task<Status> StagedBackend::allgather(CollectiveContext& context, AllgatherCall call) {
  AllgatherCall staged = call;
  const auto own = static_cast<std::size_t>(context.rank());
  std::vector<std::size_t> totals;
  for (AllgatherTensor& tensor : staged.tensors) {
    totals.push_back(std::accumulate(tensor.bytes_by_rank.begin(), tensor.bytes_by_rank.end(), std::size_t{0}));
    Result<std::byte*> in = bring(tensor.input, tensor.bytes_by_rank[own]);
    if (!in) co_return in.status();
    Result<std::byte*> out = stand_in(tensor.output, totals.back());
    if (!out) co_return out.status();
    tensor.input = in.value();
    tensor.output = out.value();
  }
  HVD_CO_RETURN_IF_ERROR(co_await arrived(context));
  HVD_CO_RETURN_IF_ERROR(co_await host_.allgather(context, staged));
  for (std::size_t i = 0; i < call.tensors.size(); ++i) {
    HVD_CO_RETURN_IF_ERROR(take_back(call.tensors[i].output, staged.tensors[i].output, totals[i]));
  }
  co_return Status();
}

Task<Status> StagedBackend::broadcast(CollectiveContext& context, BroadcastCall call) {
  const bool is_root = context.rank() == call.root;
  Result<std::byte*> place = is_root ? bring(call.input, call.bytes) : stand_in(call.output, call.bytes);
  if (!place) co_return place.status();
  BroadcastCall staged = call;
  staged.input = place.value();
  staged.output = place.value();
  HVD_CO_RETURN_IF_ERROR(co_await arrived(context));
  HVD_CO_RETURN_IF_ERROR(co_await host_.broadcast(context, staged));
  co_return take_back(call.output, staged.output, call.bytes);
}

Task<Status> StagedBackend::reducescatter(CollectiveContext& context, ReducescatterCall call) {
  ReducescatterCall staged = call;
  const std::size_t element = size_of(call.dtype);
  std::vector<std::size_t> own;
  for (ReducescatterTensor& tensor : staged.tensors) {
    own.push_back(scattered_rows(tensor.rows, context.size(), context.rank()) * tensor.row_elements * element);
    Result<std::byte*> in = bring(tensor.input, tensor.rows * tensor.row_elements * element);
    if (!in) co_return in.status();
    Result<std::byte*> out = stand_in(tensor.output, own.back());
    if (!out) co_return out.status();
    tensor.input = in.value();
    tensor.output = out.value();
  }
  HVD_CO_RETURN_IF_ERROR(co_await arrived(context));
  HVD_CO_RETURN_IF_ERROR(co_await host_.reducescatter(context, staged));
  for (std::size_t i = 0; i < call.tensors.size(); ++i) {
    HVD_CO_RETURN_IF_ERROR(take_back(call.tensors[i].output, staged.tensors[i].output, own[i]));
  }
  co_return Status();
}

Task<Status> StagedBackend::alltoall(CollectiveContext& context, AlltoallCall call) {
  const std::size_t sent = std::accumulate(call.bytes_to.begin(), call.bytes_to.end(), std::size_t{0});
  const std::size_t received = std::accumulate(call.bytes_from.begin(), call.bytes_from.end(), std::size_t{0});
  Result<std::byte*> in = bring(call.input, sent);
  if (!in) co_return in.status();
  Result<std::byte*> out = stand_in(call.output, received);
  if (!out) co_return out.status();
  AlltoallCall staged = call;
  staged.input = in.value();
  staged.output = out.value();
  HVD_CO_RETURN_IF_ERROR(co_await arrived(context));
  HVD_CO_RETURN_IF_ERROR(co_await host_.alltoall(context, staged));
  co_return take_back(call.output, out.value(), received);
}

}  // namespace hvd
