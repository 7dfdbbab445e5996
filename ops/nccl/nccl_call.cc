#include "ops/nccl/nccl_call.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

#include "common/loop/sleep.h"
#include "ops/activity.h"
#include "ops/nccl/nccl_reduction.h"

namespace hvd {
namespace {

// Tensors in a fusion buffer begin where 16-byte accesses can.
constexpr std::size_t kAlignment = 16;

constexpr std::size_t kRecentCalls = 4096;  // more than ranks can be apart
constexpr Duration kNapWhileCrowded = std::chrono::microseconds(200);

std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

// ---- begin and end --------------------------------------------------------------------------------------------------

Task<Status> NcclCall::begin(CollectiveContext& context) {
  co_await backend_.devices_.order().enter(settings_.priority);
  in_turn_ = true;
  while (context.cancelled().ok() && !settings_.captured && backend_.devices_.crowded()) {
    co_await Sleep(backend_.loop_, kNapWhileCrowded, settings_.priority);
    backend_.devices_.look();
  }
  if (!context.cancelled().ok()) co_return context.cancelled();
  if (context.size() > 1) {
    HVD_CO_RETURN_IF_ERROR(co_await connect(context));
  }
  if (settings_.on_producer) {
    stream_ = settings_.producer;
  } else {
    Result<DeviceStream> stream = backend_.devices_.stream(settings_.device, settings_.captured);
    if (!stream) co_return stream.status();
    stream_ = *stream;
  }
  has_stream_ = true;
  HVD_CO_RETURN_IF_ERROR(follow_other_communicators());
  for (const DeviceMarkRef& mark : settings_.ready) {
    HVD_CO_RETURN_IF_ERROR(runtime().wait(settings_.device, stream_, mark->event));
  }
  settings_.ready.clear();
  co_return Status();
}

Task<Status> NcclCall::connect(CollectiveContext& context) {
  return backend_.connect(context, *communicator_, settings_);
}

// Kernels of two communicators that are on a device at once may each wait for room that the other one has, in another
// order on another rank. In the agreed order, one after the other, they cannot.
Status NcclCall::follow_other_communicators() {
  if (settings_.captured || !has_company()) return {};
  std::vector<DeviceMarkRef> before;
  const NcclBackend::LastLaunch& last = backend_.last_launch(settings_.device);
  if (!last.mark) {  // so far there was one communicator, and no need to mark what it did
    before = backend_.devices_.in_line(settings_.device);
  } else if (last.communicator != communicator_->number) {
    before.push_back(last.mark);
  }
  for (const DeviceMarkRef& mark : before) {
    const bool is_own = mark->stream == stream_ && !settings_.on_producer;  // a caller's may be a new one there
    if (is_own) continue;
    HVD_RETURN_IF_ERROR(runtime().wait(settings_.device, stream_, mark->event));
  }
  return {};
}

// A caller's stream may be gone when another communicator's call has to follow: that needs an event now.
Result<DeviceMarkRef> NcclCall::mark_end() {
  const bool needs_event = !settings_.on_producer || (has_company() && !settings_.captured);
  Result<DeviceMarkRef> mark =
      needs_event ? backend_.devices_.events().mark(settings_.device, stream_, settings_.captured)
                  : Result<DeviceMarkRef>(DeviceEvents::place(settings_.device, stream_, settings_.captured));
  if (mark && !settings_.captured) {
    NcclBackend::LastLaunch& last = backend_.last_launch(settings_.device);
    last = has_company() ? NcclBackend::LastLaunch{communicator_->number, mark.value()} : NcclBackend::LastLaunch();
  }
  return mark;
}

Result<DeviceMarkRef> NcclCall::end(const Status& status, std::shared_ptr<void> held) {
  Result<DeviceMarkRef> mark = has_stream_ ? mark_end() : Result<DeviceMarkRef>(DeviceMarkRef());
  if (!mark) backend_.devices_.keep_for_good(held);  // there is no telling when the device is done with it
  // NCCL may be about to put its work in line, until the abort that a failure brings has come to its end.
  if (!status.ok() && has_stream_ && backend_.reaper_) backend_.reaper_->release_after(held);
  if (status.ok() && communicator_->comm != nullptr) {
    communicator_->recent.push_back(settings_.call);
    if (communicator_->recent.size() > kRecentCalls) communicator_->recent.pop_front();
  }
  if (mark && mark.value()) {
    std::weak_ptr<void> kept = backend_.devices_.keep(mark.value(), std::move(held));
    if (status.ok() && communicator_->comm != nullptr && !settings_.captured) {
      communicator_->pending.emplace_back(settings_.call, std::move(kept));
    }
  }
  if (std::exchange(in_turn_, false)) backend_.devices_.order().leave();
  return mark;
}

// ---- memory and small work ------------------------------------------------------------------------------------------

Result<std::shared_ptr<DeviceBlock>> NcclCall::lease(std::size_t bytes) {
  DeviceMemory& memory = backend_.devices_.memory();
  return settings_.captured ? memory.lease_fresh(settings_.device, bytes)
                            : memory.lease(settings_.device, bytes, stream_);
}

Result<std::byte*> NcclCall::scratch(std::size_t bytes) {
  Result<std::shared_ptr<DeviceBlock>> block = lease(bytes);
  if (!block) return block.status();
  std::byte* const place = block.value()->memory;
  scratch_.push_back(std::move(block).value());
  return place;
}

// One call after the other has it, on whichever streams they are: which ranks have a free one may not decide whether a
// call uses it.
Result<std::byte*> NcclCall::enter_registered() {
  const DeviceMarkRef last = communicator_->registered_use;
  if (last && last->stream != stream_) {
    Result<DeviceMarkRef> recorded = backend_.devices_.events().recorded(last);
    if (!recorded) return recorded.status();
    HVD_RETURN_IF_ERROR(runtime().wait(settings_.device, stream_, recorded.value()->event));
  }
  scratch_.push_back(communicator_->registered.block);
  return scratch_.back()->memory;
}

// The engine's own stream is there for the next one to be marked; a caller's may not be.
Status NcclCall::leave_registered() {
  if (!settings_.on_producer) {
    communicator_->registered_use = DeviceEvents::place(settings_.device, stream_, /*captured=*/false);
    return {};
  }
  Result<DeviceMarkRef> mark = backend_.devices_.events().mark(settings_.device, stream_);
  if (!mark) return mark.status();
  communicator_->registered_use = std::move(mark).value();
  return {};
}

Result<MadeMemory> NcclCall::make_output(std::size_t bytes) {
  Result<std::shared_ptr<DeviceBlock>> block = lease(bytes);
  if (!block) return block.status();
  return made_of(std::move(block).value());
}

Status NcclCall::convert(const DeviceConversion& conversion, std::span<const DevicePiece> pieces) {
  if (pieces.empty()) return {};
  return runtime().convert(settings_.device, conversion, pieces, stream_);
}

Status NcclCall::copy(std::byte* to, const std::byte* from, std::size_t bytes) {
  if (to == from || bytes == 0) return {};
  return runtime().copy(settings_.device, to, from, bytes, stream_);
}

Status NcclCall::scale(std::byte* data, DataType dtype, std::size_t count, int divisor, double factor) {
  const std::array whole{DevicePiece{data, data, count}};
  DeviceConversion conversion{dtype, dtype};
  // One launch does "times factor, by divisor"; here the division comes first.
  if (divisor != 1) {
    conversion.divisor = divisor;
    HVD_RETURN_IF_ERROR(convert(conversion, whole));
    conversion.divisor = 1;
  }
  if (factor == 1.0) return {};
  conversion.factor = factor;
  return convert(conversion, whole);
}

// Before they change their type: in the new one the product might be another.
Status NcclCall::scale_apart(DataType dtype, double factor, std::vector<DevicePiece>& pieces) {
  DeviceConversion conversion{dtype, dtype};
  conversion.factor = factor;
  std::vector<DevicePiece> scaled;
  for (DevicePiece& piece : pieces) {
    if (piece.from == nullptr) continue;
    Result<std::byte*> copied = scratch(piece.count * size_of(dtype));
    if (!copied) return copied.status();
    scaled.push_back({piece.from, *copied, piece.count});
    piece.from = *copied;
  }
  return convert(conversion, scaled);
}

// ---- collectives ----------------------------------------------------------------------------------------------------

Status NcclCall::all_reduce_in_line(const std::byte* input, std::byte* output, std::size_t count, DataType dtype,
                                    ReduceOp op) {
  HVD_RETURN_IF_ERROR(communicator_->failed);  // while the call waited for something else
  const NcclReduction reduction = nccl_reduction(dtype, op);
  const CurrentDevice current(runtime(), settings_.device);
  HVD_RETURN_IF_ERROR(current.status());
  return checked(api().all_reduce(input, output, count, reduction.type, reduction.op, comm(), stream_), "allreduce");
}

Task<Status> NcclCall::reduce(CollectiveContext& context, const AllreduceCall& call, AllreduceTensor whole) {
  const Activity moving(context.activities(), ActivityKind::kCommunicate, "nccl");
  HVD_CO_RETURN_IF_ERROR(all_reduce_in_line(whole.input, whole.output, whole.count, call.dtype, call.reduce_op));
  co_return co_await settle(context, "allreduce");
}

Task<Status> NcclCall::allreduce(CollectiveContext& context, AllreduceCall call) {
  const AllreduceTensor& first = call.tensors.front();
  const bool as_it_is = nccl_reduction(call.dtype, call.reduce_op).as == call.dtype;
  if (call.tensors.size() == 1 && first.input != nullptr && context.size() > 1 && as_it_is) {
    co_return co_await allreduce_one(context, call);
  }
  if (context.size() == 1) co_return allreduce_alone(call);
  co_return co_await allreduce_packed(context, call);
}

// One rank: nothing is reduced, what remains is done in one launch.
Status NcclCall::allreduce_alone(const AllreduceCall& call) {
  std::vector<DevicePiece> pieces;
  std::vector<DevicePiece> results;
  for (const AllreduceTensor& tensor : call.tensors) {
    if (tensor.count == 0 || tensor.input == nullptr) continue;
    results.push_back({tensor.output, tensor.output, tensor.count});
    if (call.prescale != 1.0 || tensor.input != tensor.output) {
      pieces.push_back({tensor.input, tensor.output, tensor.count});
    }
  }
  if (call.tensors.size() == 1 && pieces.size() == 1 && call.prescale == 1.0) {
    const AllreduceTensor& tensor = call.tensors.front();
    HVD_RETURN_IF_ERROR(copy(tensor.output, tensor.input, tensor.count * size_of(call.dtype)));
    pieces.clear();
  }
  DeviceConversion conversion{call.dtype, call.dtype};
  conversion.factor = call.prescale;
  HVD_RETURN_IF_ERROR(convert(conversion, pieces));
  conversion.factor = call.postscale;
  return call.postscale == 1.0 ? Status() : convert(conversion, results);
}

// Straight from the caller's memory into the caller's memory.
Task<Status> NcclCall::allreduce_one(CollectiveContext& context, const AllreduceCall& call) {
  const AllreduceTensor& tensor = call.tensors.front();
  AllreduceTensor whole = tensor;
  if (tensor.count == 0) co_return Status();
  if (call.prescale != 1.0) {
    const std::array piece{DevicePiece{tensor.input, tensor.output, tensor.count}};
    DeviceConversion conversion{call.dtype, call.dtype};
    conversion.factor = call.prescale;
    HVD_CO_RETURN_IF_ERROR(convert(conversion, piece));
    whole.input = tensor.output;
  }
  HVD_CO_RETURN_IF_ERROR(co_await reduce(context, call, whole));
  const int divisor = call.reduce_op == ReduceOp::kAverage ? context.size() : 1;
  co_return scale(tensor.output, call.dtype, tensor.count, divisor, call.postscale);
}

// Several tensors, or one that NCCL cannot take as it lies: through a fusion buffer.
Task<Status> NcclCall::allreduce_packed(CollectiveContext& context, const AllreduceCall& call) {
  const NcclReduction reduction = nccl_reduction(call.dtype, call.reduce_op);
  const std::size_t element = size_of(reduction.as);
  // Nothing is added behind the last one: a single tensor is as long here as for a rank that takes it as it lies.
  std::size_t bytes = 0;
  for (const AllreduceTensor& tensor : call.tensors) bytes = aligned(bytes) + tensor.count * element;
  if (bytes == 0) co_return Status();
  // Registered memory is for calls that are packed on all ranks: who stands in packs a single tensor that others use as
  // it lies. A graph would keep it for good.
  const bool all_pack = call.tensors.size() > 1 || reduction.as != call.dtype;
  bool registered =
      all_pack && uses_registered() && !settings_.captured && bytes <= backend_.settings_.registered_bytes;
  if (registered) {
    HVD_CO_RETURN_IF_ERROR(co_await backend_.share_registered(context, *communicator_, settings_));
    registered = communicator_->registered.block != nullptr;
  }
  Result<std::byte*> buffer = registered ? enter_registered() : scratch(bytes);
  if (!buffer) co_return buffer.status();

  std::vector<DevicePiece> in;
  std::vector<DevicePiece> out;
  std::size_t at = 0;
  for (const AllreduceTensor& tensor : call.tensors) {
    std::byte* const place = *buffer + aligned(at);
    if (tensor.count > 0) in.push_back({tensor.input, place, tensor.count});
    if (tensor.count > 0 && tensor.output != nullptr) out.push_back({place, tensor.output, tensor.count});
    at = aligned(at) + tensor.count * element;
  }
  // One launch packs and scales, and one unpacks and divides; what a launch cannot do as well has one of its own.
  const bool changes_type = reduction.as != call.dtype;
  DeviceConversion packing{call.dtype, reduction.as};
  packing.fill = neutral_bits(call.dtype, reduction, call.reduce_op);
  if (!changes_type) packing.factor = call.prescale;
  if (changes_type && call.prescale != 1.0) {
    HVD_CO_RETURN_IF_ERROR(scale_apart(call.dtype, call.prescale, in));
  }
  HVD_CO_RETURN_IF_ERROR(convert(packing, in));
  const AllreduceTensor whole{*buffer, *buffer, bytes / element};
  HVD_CO_RETURN_IF_ERROR(co_await reduce(context, call, whole));
  std::vector<DevicePiece> results;
  for (const DevicePiece& piece : out) results.push_back({piece.to, piece.to, piece.count});
  DeviceConversion unpacking{reduction.as, call.dtype};
  DeviceConversion dividing{call.dtype, call.dtype};
  DeviceConversion scaling{call.dtype, call.dtype};
  if (call.reduce_op == ReduceOp::kAverage) (changes_type ? dividing : unpacking).divisor = context.size();
  const bool divides_at_once = unpacking.divisor != 1;
  (changes_type || divides_at_once ? scaling : unpacking).factor = call.postscale;
  HVD_CO_RETURN_IF_ERROR(convert(unpacking, out));
  if (dividing.divisor != 1) {
    HVD_CO_RETURN_IF_ERROR(convert(dividing, results));
  }
  if (scaling.factor != 1.0) {
    HVD_CO_RETURN_IF_ERROR(convert(scaling, results));
  }
  co_return registered ? leave_registered() : Status();
}

Task<Status> NcclCall::allgather(CollectiveContext& context, AllgatherCall call) {
  const Activity moving(context.activities(), ActivityKind::kCommunicate, "nccl");
  if (context.size() == 1) {
    for (const AllgatherTensor& tensor : call.tensors) {
      HVD_CO_RETURN_IF_ERROR(copy(tensor.output, tensor.input, tensor.bytes_by_rank.front()));
    }
    co_return Status();
  }
  const Status issued = in_group("allgather", [&]() -> Status {
    for (const AllgatherTensor& tensor : call.tensors) {
      const std::vector<std::size_t>& blocks = tensor.bytes_by_rank;
      const bool even = std::adjacent_find(blocks.begin(), blocks.end(), std::not_equal_to<>()) == blocks.end();
      if (even) {
        if (blocks.front() == 0) continue;
        HVD_RETURN_IF_ERROR(checked(
            api().all_gather(tensor.input, tensor.output, blocks.front(), nccl::kUint8, comm(), stream_), "allgather"));
        continue;
      }
      std::byte* place = tensor.output;
      for (int rank = 0; rank < context.size(); ++rank) {
        const std::size_t bytes = blocks[static_cast<std::size_t>(rank)];
        if (bytes > 0) {
          const void* from = rank == context.rank() ? static_cast<const void*>(tensor.input) : place;
          HVD_RETURN_IF_ERROR(
              checked(api().broadcast(from, place, bytes, nccl::kUint8, rank, comm(), stream_), "allgather"));
        }
        place += bytes;
      }
    }
    return {};
  });
  if (!issued.ok()) co_return issued;
  co_return co_await settle(context, "allgather");
}

Task<Status> NcclCall::broadcast(CollectiveContext& context, BroadcastCall call) {
  const Activity moving(context.activities(), ActivityKind::kCommunicate, "nccl");
  if (call.bytes == 0) co_return Status();
  if (context.size() == 1) co_return copy(call.output, call.input, call.bytes);
  const Status issued = in_group("broadcast", [&] {
    return checked(api().broadcast(call.input, call.output, call.bytes, nccl::kUint8, call.root, comm(), stream_),
                   "broadcast");
  });
  if (!issued.ok()) co_return issued;
  co_return co_await settle(context, "broadcast");
}

Task<Status> NcclCall::reducescatter(CollectiveContext& context, ReducescatterCall call) {
  const Activity moving(context.activities(), ActivityKind::kCommunicate, "nccl");
  const NcclReduction reduction = nccl_reduction(call.dtype, call.reduce_op);
  const bool widens = reduction.as != call.dtype && context.size() > 1;
  const std::size_t from_bytes = size_of(call.dtype);
  const std::size_t as_bytes = size_of(widens ? reduction.as : call.dtype);
  const DataType as = widens ? reduction.as : call.dtype;
  struct Place {
    const std::byte* input;
    std::byte* output;
    std::size_t own;  // elements of this rank's rows
  };
  std::vector<Place> places;
  for (const ReducescatterTensor& tensor : call.tensors) {
    Place place{tensor.input, tensor.output,
                scattered_rows(tensor.rows, context.size(), context.rank()) * tensor.row_elements};
    const std::size_t count = tensor.rows * tensor.row_elements;
    if (count > 0 && (widens || call.prescale != 1.0)) {  // the input is not to be changed
      Result<std::byte*> copied = scratch(count * as_bytes);
      if (!copied) co_return copied.status();
      std::vector<DevicePiece> whole{{tensor.input, *copied, count}};
      DeviceConversion conversion{call.dtype, as};
      if (widens && call.prescale != 1.0) {
        HVD_CO_RETURN_IF_ERROR(scale_apart(call.dtype, call.prescale, whole));
      } else if (!widens) {
        conversion.factor = call.prescale;
      }
      HVD_CO_RETURN_IF_ERROR(convert(conversion, whole));
      place.input = *copied;
    }
    if (place.own > 0 && widens) {
      Result<std::byte*> wide = scratch(place.own * as_bytes);
      if (!wide) co_return wide.status();
      place.output = *wide;
    }
    places.push_back(place);
  }
  if (context.size() == 1) {
    for (const Place& place : places) {
      HVD_CO_RETURN_IF_ERROR(copy(place.output, place.input, place.own * from_bytes));
    }
  } else {
    const Status issued = in_group("reducescatter", [&]() -> Status {
      for (std::size_t i = 0; i < places.size(); ++i) {
        const ReducescatterTensor& tensor = call.tensors[i];
        if (tensor.rows * tensor.row_elements == 0) continue;
        if (tensor.rows % static_cast<std::size_t>(context.size()) == 0) {
          HVD_RETURN_IF_ERROR(checked(api().reduce_scatter(places[i].input, places[i].output, places[i].own,
                                                           reduction.type, reduction.op, comm(), stream_),
                                      "reducescatter"));
          continue;
        }
        const std::byte* from = places[i].input;
        for (int rank = 0; rank < context.size(); ++rank) {
          const std::size_t count = scattered_rows(tensor.rows, context.size(), rank) * tensor.row_elements;
          if (count > 0) {
            HVD_RETURN_IF_ERROR(checked(
                api().reduce(from, places[i].output, count, reduction.type, reduction.op, rank, comm(), stream_),
                "reducescatter"));
          }
          from += count * as_bytes;
        }
      }
      return {};
    });
    if (!issued.ok()) co_return issued;
    HVD_CO_RETURN_IF_ERROR(co_await settle(context, "reducescatter"));
  }
  const int divisor = call.reduce_op == ReduceOp::kAverage ? context.size() : 1;
  for (std::size_t i = 0; i < places.size(); ++i) {
    if (places[i].own == 0) continue;
    if (widens) {
      const std::array narrow{DevicePiece{places[i].output, call.tensors[i].output, places[i].own}};
      HVD_CO_RETURN_IF_ERROR(convert({as, call.dtype}, narrow));
    }
    HVD_CO_RETURN_IF_ERROR(scale(call.tensors[i].output, call.dtype, places[i].own, divisor, call.postscale));
  }
  co_return Status();
}

Task<Status> NcclCall::alltoall(CollectiveContext& context, AlltoallCall call) {
  const Activity moving(context.activities(), ActivityKind::kCommunicate, "nccl");
  const auto own = static_cast<std::size_t>(context.rank());
  const auto begin_of = [](const std::vector<std::size_t>& bytes, std::size_t rank) {
    return std::accumulate(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(rank), std::size_t{0});
  };
  HVD_CO_RETURN_IF_ERROR(copy(call.output + begin_of(call.bytes_from, own), call.input + begin_of(call.bytes_to, own),
                              call.bytes_to[own]));
  if (context.size() == 1) co_return Status();
  const Status issued = in_group("alltoall", [&]() -> Status {
    const std::byte* from = call.input;
    std::byte* to = call.output;
    for (int rank = 0; rank < context.size(); ++rank) {
      const std::size_t sent = call.bytes_to[static_cast<std::size_t>(rank)];
      const std::size_t received = call.bytes_from[static_cast<std::size_t>(rank)];
      if (rank != context.rank() && sent > 0) {
        HVD_RETURN_IF_ERROR(checked(api().send(from, sent, nccl::kUint8, rank, comm(), stream_), "alltoall"));
      }
      if (rank != context.rank() && received > 0) {
        HVD_RETURN_IF_ERROR(checked(api().receive(to, received, nccl::kUint8, rank, comm(), stream_), "alltoall"));
      }
      from += sent;
      to += received;
    }
    return {};
  });
  if (!issued.ok()) co_return issued;
  co_return co_await settle(context, "alltoall");
}

}  // namespace hvd
