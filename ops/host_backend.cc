#include "ops/host_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "ops/algorithms/ring_schedule.h"
#include "ops/reduce/neutral.h"

namespace hvd {
namespace {

// Where slice `part` of each tensor lies in a fused buffer. With chunks, the buffer holds slice 0 of each tensor, then
// slice 1 of each, and so on; so the slice an element is in, and with it its order of summation, does not depend on
// the company.
class FusedLayout {
 public:
  /// A tensor is cut between items: elements, or rows of them.
  struct Items {
    std::size_t count;
    std::size_t bytes;  // of one
  };
  struct Piece {
    std::size_t tensor;
    std::size_t begin;  // within the tensor, in bytes
    std::size_t bytes;
    std::size_t place;  // within the buffer
  };

  FusedLayout(std::vector<Items> tensors, int parts) : tensors_(std::move(tensors)), parts_(parts) {}

  std::vector<std::size_t> chunks() const {
    std::vector<std::size_t> bounds{0};
    for (int part = 0; part < parts_; ++part) {
      std::size_t end = bounds.back();
      for (const Items& items : tensors_) end += slice(items, part).bytes;
      bounds.push_back(end);
    }
    return bounds;
  }

  template <typename Visit>
  void for_each_piece(Visit visit) const {
    std::size_t place = 0;
    for (int part = 0; part < parts_; ++part) {
      for (std::size_t i = 0; i < tensors_.size(); ++i) {
        const Slice piece = slice(tensors_[i], part);
        if (piece.bytes > 0) visit(Piece{i, piece.begin, piece.bytes, place});
        place += piece.bytes;
      }
    }
  }

 private:
  struct Slice {
    std::size_t begin;
    std::size_t bytes;
  };

  Slice slice(const Items& items, int part) const {
    const std::size_t begin = slice_begin(items.count, parts_, part) * items.bytes;
    return {begin, slice_begin(items.count, parts_, part + 1) * items.bytes - begin};
  }

  std::vector<Items> tensors_;
  int parts_;
};

FusedLayout layout_of(const AllreduceCall& call, int parts) {
  std::vector<FusedLayout::Items> items;
  for (const AllreduceTensor& tensor : call.tensors) items.push_back({tensor.count, size_of(call.dtype)});
  return {std::move(items), parts};
}

FusedLayout layout_of(const ReducescatterCall& call, int parts) {
  std::vector<FusedLayout::Items> items;
  for (const ReducescatterTensor& tensor : call.tensors) {
    items.push_back({tensor.rows, tensor.row_elements * size_of(call.dtype)});
  }
  return {std::move(items), parts};
}

template <typename Call>
void pack(const Call& call, const FusedLayout& layout, std::byte* buffer) {
  layout.for_each_piece([&](const FusedLayout::Piece& piece) {
    const std::byte* input = call.tensors[piece.tensor].input;
    if (input != nullptr) std::memcpy(buffer + piece.place, input + piece.begin, piece.bytes);
  });
}

void unpack(const AllreduceCall& call, const FusedLayout& layout, const std::byte* buffer) {
  layout.for_each_piece([&](const FusedLayout::Piece& piece) {
    std::byte* output = call.tensors[piece.tensor].output;
    if (output != nullptr) std::memcpy(output + piece.begin, buffer + piece.place, piece.bytes);
  });
}

// After the prescale, which is not for them.
void fill_missing(const AllreduceCall& call, const FusedLayout& layout, std::byte* buffer) {
  const std::size_t element = size_of(call.dtype);
  layout.for_each_piece([&](const FusedLayout::Piece& piece) {
    if (call.tensors[piece.tensor].input != nullptr || element == 0) return;
    fill_neutral(buffer + piece.place, call.dtype, piece.bytes / element, call.reduce_op);
  });
}

std::size_t bytes_of(const AllreduceCall& call) {
  return std::accumulate(
      call.tensors.begin(), call.tensors.end(), std::size_t{0},
      [&](std::size_t sum, const AllreduceTensor& tensor) { return sum + tensor.count * size_of(call.dtype); });
}

template <typename Call>
Status finish_scaling(const Call& call, std::byte* data, std::size_t count, int size) {
  if (call.reduce_op == ReduceOp::kAverage) HVD_RETURN_IF_ERROR(divide(data, call.dtype, count, size));
  if (call.postscale != 1.0) HVD_RETURN_IF_ERROR(scale(data, call.dtype, count, call.postscale));
  return {};
}

}  // namespace

std::size_t fusion_bytes(const AllreduceCall& call) { return call.tensors.size() < 2 ? 0 : bytes_of(call); }

namespace {

AlgorithmFacts facts_of(const AllreduceCall& call, const CollectiveContext& context) {
  return {.tensor_bytes = call.tensors.front().count * size_of(call.dtype),
          .size = context.size(),
          .small_limit_bytes = call.small_limit_bytes,
          .standing = context.is_standing(),
          .slot_bytes = context.slot_bytes(),
          .pulls_on_one_host = context.pulls() && context.on_one_host()};
}

// One tensor: what it is fused with would change the result.
Task<Status> host_adasum(CollectiveContext& context, AllreduceCall call) {
  if (!is_floating_point(call.dtype)) {
    co_return Status::invalid_argument("Adasum is for floating-point tensors");
  }
  const AllreduceTensor& tensor = call.tensors.front();
  const std::size_t bytes = tensor.count * size_of(call.dtype);
  if (tensor.input == nullptr) {
    fill_neutral(tensor.output, call.dtype, tensor.count, call.reduce_op);
  } else if (tensor.input != tensor.output && bytes > 0) {
    std::memcpy(tensor.output, tensor.input, bytes);
  }
  HVD_CO_RETURN_IF_ERROR(scale(tensor.output, call.dtype, tensor.count, call.prescale));
  {
    const AdasumAlgorithm& algorithm = adasum_algorithms().front();
    const Activity moving(context.activities(), ActivityKind::kCommunicate, algorithm.name);
    HVD_CO_RETURN_IF_ERROR(co_await algorithm.run(context, {tensor.output, bytes}, call.dtype));
  }
  HVD_CO_RETURN_IF_ERROR(scale(tensor.output, call.dtype, tensor.count, call.postscale));
  co_return Status();
}

}  // namespace

Task<Status> host_allreduce(CollectiveContext& context, AllreduceCall call, std::span<std::byte> fusion) {
  if (call.reduce_op == ReduceOp::kAdasum) co_return co_await host_adasum(context, std::move(call));
  Result<Reducer> reducer = find_reducer(call.dtype, call.reduce_op);
  if (!reducer) co_return reducer.status();
  const std::size_t element = reducer->element_bytes;
  context.pull_if_large(bytes_of(call));
  const AllreduceAlgorithm& algorithm = select_allreduce(facts_of(call, context));
  const int parts = algorithm.uses_chunks ? context.size() : 1;
  const FusedLayout layout = layout_of(call, parts);
  const bool fused = call.tensors.size() > 1;
  const auto has_no_input = [](const AllreduceTensor& tensor) { return tensor.input == nullptr; };
  const bool some_missing = std::any_of(call.tensors.begin(), call.tensors.end(), has_no_input);
  ReduceBuffer buffer;
  if (fused) {
    const Activity packing(context.activities(), ActivityKind::kPack);
    pack(call, layout, fusion.data());
    buffer.input = buffer.output = fusion.data();
    buffer.bytes = fusion_bytes(call);
  } else {
    const AllreduceTensor& tensor = call.tensors.front();
    buffer.input = some_missing ? tensor.output : tensor.input;
    buffer.output = tensor.output;
    buffer.bytes = tensor.count * element;
  }
  buffer.chunks = layout.chunks();
  const std::size_t count = buffer.bytes / element;
  if (call.prescale != 1.0 || context.size() == 1) {
    if (buffer.input != buffer.output && buffer.bytes > 0) std::memcpy(buffer.output, buffer.input, buffer.bytes);
    buffer.input = buffer.output;
    HVD_CO_RETURN_IF_ERROR(scale(buffer.output, call.dtype, count, call.prescale));
  }
  if (some_missing) fill_missing(call, layout, buffer.output);
  std::byte* const result = buffer.output;
  if (context.size() > 1) {
    const Activity moving(context.activities(), ActivityKind::kCommunicate, algorithm.name);
    HVD_CO_RETURN_IF_ERROR(co_await algorithm.run(context, std::move(buffer), *reducer));
  }
  HVD_CO_RETURN_IF_ERROR(finish_scaling(call, result, count, context.size()));
  if (fused) {
    const Activity unpacking(context.activities(), ActivityKind::kUnpack);
    unpack(call, layout, result);
  }
  co_return Status();
}

// The first message of each rank; it goes no further without something of this one.
void discard_standing_allreduce(CollectiveContext& context, const AllreduceCall& call) {
  context.pull_if_large(bytes_of(call));  // as the others do
  const AllreduceAlgorithm& algorithm = select_allreduce(facts_of(call, context));
  if (!algorithm.sends) return;
  std::size_t bytes = call.tensors.front().count * size_of(call.dtype);
  if (algorithm.uses_chunks) {
    const std::vector<std::size_t> chunks = layout_of(call, context.size()).chunks();
    const auto own = static_cast<std::size_t>(context.rank());
    bytes = chunks[own + 1] - chunks[own];
  }
  std::byte* const place = context.lease(bytes);
  if (place == nullptr) return;  // what arrives then stays where it is
  for (int peer = 0; peer < context.size(); ++peer) {
    if (peer == context.rank()) continue;
    [[maybe_unused]] const Pending cancelled_at_once = context.receive(peer, {place, bytes});
  }
  context.cancel(Status::internal("the call was not begun here"));
}

std::size_t scattered_rows(std::size_t rows, int size, int index) {
  return slice_begin(rows, size, index + 1) - slice_begin(rows, size, index);
}

Task<Status> host_reducescatter(CollectiveContext& context, ReducescatterCall call) {
  Result<Reducer> reducer = find_reducer(call.dtype, call.reduce_op);
  if (!reducer) co_return reducer.status();
  const FusedLayout layout = layout_of(call, context.size());
  const bool fused = call.tensors.size() > 1;
  ScatterBuffer buffer{call.tensors.front().input, call.tensors.front().output, layout.chunks()};
  const std::size_t bytes = buffer.chunks.back();
  context.pull_if_large(bytes);
  const auto own = static_cast<std::size_t>(context.rank());
  const std::size_t own_bytes = buffer.chunks[own + 1] - buffer.chunks[own];
  if (fused || call.prescale != 1.0) {  // the input is not to be changed
    std::byte* const copy = context.lease(bytes);
    if (copy == nullptr) co_return Status::internal("no memory for a copy of what is to be reduced");
    {
      const Activity packing(context.activities(), ActivityKind::kPack);
      pack(call, layout, copy);
    }
    HVD_CO_RETURN_IF_ERROR(scale(copy, call.dtype, bytes / reducer->element_bytes, call.prescale));
    buffer.input = copy;
  }
  if (fused) {
    buffer.output = context.lease(own_bytes);
    if (buffer.output == nullptr) co_return Status::internal("no memory for the result of a fused reducescatter");
  }
  std::byte* const result = buffer.output;
  {
    const ReducescatterAlgorithm& algorithm = reducescatter_algorithms().front();
    const Activity moving(context.activities(), ActivityKind::kCommunicate, algorithm.name);
    HVD_CO_RETURN_IF_ERROR(co_await algorithm.run(context, std::move(buffer), *reducer));
  }
  HVD_CO_RETURN_IF_ERROR(finish_scaling(call, result, own_bytes / reducer->element_bytes, context.size()));
  if (fused) {
    const Activity unpacking(context.activities(), ActivityKind::kUnpack);
    const std::byte* place = result;
    for (const ReducescatterTensor& tensor : call.tensors) {
      const std::size_t share =
          scattered_rows(tensor.rows, context.size(), context.rank()) * tensor.row_elements * reducer->element_bytes;
      if (share > 0) std::memcpy(tensor.output, place, share);
      place += share;
    }
  }
  co_return Status();
}

Task<Status> host_alltoall(CollectiveContext& context, const std::byte* input, std::byte* output,
                           std::vector<std::size_t> bytes_to, std::vector<std::size_t> bytes_from) {
  ExchangeBuffer buffer{input, output, {0}, {0}};
  for (const std::size_t bytes : bytes_to) buffer.to.push_back(buffer.to.back() + bytes);
  for (const std::size_t bytes : bytes_from) buffer.from.push_back(buffer.from.back() + bytes);
  const AlltoallAlgorithm& algorithm = alltoall_algorithms().front();
  const Activity moving(context.activities(), ActivityKind::kCommunicate, algorithm.name);
  co_return co_await algorithm.run(context, std::move(buffer));
}

Task<Status> host_exchange_counts(CollectiveContext& context, std::vector<std::int64_t> to,
                                  std::vector<std::int64_t>& told) {
  const std::size_t bytes = to.size() * sizeof(std::int64_t);
  // Transports may need the memory for longer than this coroutine lives.
  std::byte* const memory = context.lease(2 * bytes);
  if (memory == nullptr) co_return Status::internal("no memory for the sizes of an alltoall");
  std::memcpy(memory, to.data(), bytes);
  const std::vector<std::size_t> each(to.size(), sizeof(std::int64_t));
  HVD_CO_RETURN_IF_ERROR(co_await host_alltoall(context, memory, memory + bytes, each, each));
  told.resize(to.size());
  std::memcpy(told.data(), memory + bytes, bytes);
  co_return Status();
}

Task<Status> host_allgather(CollectiveContext& context, const std::byte* input, std::byte* output,
                            std::vector<std::size_t> bytes_by_rank) {
  GatherBuffer buffer{input, output, {0}};
  for (const std::size_t bytes : bytes_by_rank) buffer.blocks.push_back(buffer.blocks.back() + bytes);
  context.pull_if_large(buffer.blocks.back());
  const AllgatherAlgorithm& algorithm = allgather_algorithms().front();
  const Activity moving(context.activities(), ActivityKind::kCommunicate, algorithm.name);
  co_return co_await algorithm.run(context, std::move(buffer));
}

Task<Status> host_broadcast(CollectiveContext& context, const std::byte* input, std::byte* output, std::size_t bytes,
                            int root) {
  if (context.rank() == root && input != output && bytes > 0) std::memcpy(output, input, bytes);
  context.pull_if_large(bytes);
  const BroadcastAlgorithm& algorithm = broadcast_algorithms().front();
  const Activity moving(context.activities(), ActivityKind::kCommunicate, algorithm.name);
  co_return co_await algorithm.run(context, {output, bytes}, root);
}

Task<Status> host_barrier(CollectiveContext& context) {
  const BarrierAlgorithm& algorithm = barrier_algorithms().front();
  const Activity moving(context.activities(), ActivityKind::kCommunicate, algorithm.name);
  co_return co_await algorithm.run(context);
}

// ---- as a backend ---------------------------------------------------------------------------------------------------

namespace {

Status no_memory(std::size_t bytes) { return Status::internal(fmt::format("no memory for {} bytes", bytes)); }

}  // namespace

Task<Status> HostBackend::begin(CollectiveContext& /*context*/) { co_return Status(); }

Result<MadeMemory> HostBackend::make_output(std::size_t bytes) {
  MadeMemory made{allocate_host(bytes), nullptr};
  if (!made.memory) return no_memory(bytes);
  return made;
}

Task<Status> HostBackend::allreduce(CollectiveContext& context, AllreduceCall call) {
  if (call.tensors.size() == 1 && call.tensors.front().output == nullptr) {
    const std::size_t unwanted = call.tensors.front().count * size_of(call.dtype);
    call.tensors.front().output = context.lease(unwanted);
    if (call.tensors.front().output == nullptr) co_return no_memory(unwanted);
  }
  std::span<std::byte> fusion;
  if (const std::size_t bytes = fusion_bytes(call); bytes > 0) {
    fusion = {context.lease(bytes), bytes};
    if (fusion.data() == nullptr) co_return no_memory(bytes);
  }
  co_return co_await host_allreduce(context, std::move(call), fusion);
}

// A small group goes round in one run: each rank's block holds its rows of all tensors, one behind the other.
Task<Status> HostBackend::allgather(CollectiveContext& context, AllgatherCall call) {
  const auto ranks = static_cast<std::size_t>(context.size());
  const auto own = static_cast<std::size_t>(context.rank());
  std::vector<std::size_t> blocks(ranks);  // of all tensors, by rank
  for (const AllgatherTensor& tensor : call.tensors) {
    for (std::size_t rank = 0; rank < ranks; ++rank) blocks[rank] += tensor.bytes_by_rank[rank];
  }
  const std::size_t total = std::accumulate(blocks.begin(), blocks.end(), std::size_t{0});
  if (call.tensors.size() == 1 || total > call.copy_limit_bytes) {
    for (AllgatherTensor& tensor : call.tensors) {
      HVD_CO_RETURN_IF_ERROR(
          co_await host_allgather(context, tensor.input, tensor.output, std::move(tensor.bytes_by_rank)));
    }
    co_return Status();
  }
  std::byte* const packed = context.lease(blocks[own]);
  std::byte* const gathered = context.lease(total);
  if (packed == nullptr || gathered == nullptr) co_return no_memory(total);
  {
    const Activity packing(context.activities(), ActivityKind::kPack);
    std::byte* place = packed;
    for (const AllgatherTensor& tensor : call.tensors) {
      if (tensor.bytes_by_rank[own] > 0) std::memcpy(place, tensor.input, tensor.bytes_by_rank[own]);
      place += tensor.bytes_by_rank[own];
    }
  }
  HVD_CO_RETURN_IF_ERROR(co_await host_allgather(context, packed, gathered, blocks));
  const Activity unpacking(context.activities(), ActivityKind::kUnpack);
  const std::byte* from = gathered;
  for (std::size_t rank = 0; rank < ranks; ++rank) {
    for (AllgatherTensor& tensor : call.tensors) {
      const std::size_t bytes = tensor.bytes_by_rank[rank];
      if (bytes > 0) std::memcpy(tensor.output, from, bytes);
      tensor.output += bytes;
      from += bytes;
    }
  }
  co_return Status();
}

Task<Status> HostBackend::broadcast(CollectiveContext& context, BroadcastCall call) {
  co_return co_await host_broadcast(context, call.input, call.output, call.bytes, call.root);
}

Task<Status> HostBackend::reducescatter(CollectiveContext& context, ReducescatterCall call) {
  co_return co_await host_reducescatter(context, std::move(call));
}

Task<Status> HostBackend::alltoall(CollectiveContext& context, AlltoallCall call) {
  co_return co_await host_alltoall(context, call.input, call.output, std::move(call.bytes_to),
                                   std::move(call.bytes_from));
}

// Transports hold what they need themselves.
Result<DeviceMarkRef> HostBackend::end(const Status& /*status*/, std::shared_ptr<void> /*held*/) {
  return DeviceMarkRef();
}

}  // namespace hvd
