#include "ops/host_backend.h"

#include <cstring>
#include <numeric>

#include "ops/algorithms/ring_schedule.h"

namespace hvd {
namespace {

// Where slice `part` of each tensor lies in a fused buffer. With chunks, the buffer holds slice 0 of each tensor, then
// slice 1 of each, and so on; so the slice an element is in, and with it its order of summation, does not depend on
// the company.
class FusedLayout {
 public:
  FusedLayout(const AllreduceCall& call, int parts) : call_(call), element_(size_of(call.dtype)), parts_(parts) {}

  std::vector<std::size_t> chunks() const {
    std::vector<std::size_t> bounds{0};
    for (int part = 0; part < parts_; ++part) {
      std::size_t end = bounds.back();
      for (const AllreduceTensor& tensor : call_.tensors) end += slice(tensor, part).bytes;
      bounds.push_back(end);
    }
    return bounds;
  }

  void pack() const {
    walk([&](const AllreduceTensor& tensor, std::size_t begin, std::size_t bytes, std::byte* place) {
      std::memcpy(place, tensor.input + begin, bytes);
    });
  }
  void unpack() const {
    walk([&](const AllreduceTensor& tensor, std::size_t begin, std::size_t bytes, const std::byte* place) {
      std::memcpy(tensor.output + begin, place, bytes);
    });
  }

 private:
  struct Slice {
    std::size_t begin;
    std::size_t bytes;
  };

  Slice slice(const AllreduceTensor& tensor, int part) const {
    const std::size_t begin = slice_begin(tensor.count, parts_, part) * element_;
    return {begin, slice_begin(tensor.count, parts_, part + 1) * element_ - begin};
  }

  template <typename Copy>
  void walk(Copy copy) const {
    std::byte* place = call_.fusion.data();
    for (int part = 0; part < parts_; ++part) {
      for (const AllreduceTensor& tensor : call_.tensors) {
        const Slice piece = slice(tensor, part);
        if (piece.bytes > 0) copy(tensor, piece.begin, piece.bytes, place);
        place += piece.bytes;
      }
    }
  }

  const AllreduceCall& call_;
  std::size_t element_;
  int parts_;
};

Status finish_scaling(const AllreduceCall& call, std::byte* data, std::size_t count, int size) {
  if (call.reduce_op == ReduceOp::kAverage) HVD_RETURN_IF_ERROR(divide(data, call.dtype, count, size));
  if (call.postscale != 1.0) HVD_RETURN_IF_ERROR(scale(data, call.dtype, count, call.postscale));
  return {};
}

}  // namespace

std::size_t fusion_bytes(const AllreduceCall& call) {
  if (call.tensors.size() < 2) return 0;
  return std::accumulate(
      call.tensors.begin(), call.tensors.end(), std::size_t{0},
      [&](std::size_t sum, const AllreduceTensor& tensor) { return sum + tensor.count * size_of(call.dtype); });
}

Task<Status> host_allreduce(CollectiveContext& context, AllreduceCall call) {
  Result<Reducer> reducer = find_reducer(call.dtype, call.reduce_op);
  if (!reducer) co_return reducer.status();
  const std::size_t element = reducer->element_bytes;
  const AllreduceAlgorithm& algorithm =
      select_allreduce({call.tensors.front().count * element, context.size(), call.small_limit_bytes});
  const int parts = algorithm.uses_chunks ? context.size() : 1;
  const FusedLayout layout(call, parts);
  const bool fused = call.tensors.size() > 1;
  ReduceBuffer buffer;
  if (fused) {
    layout.pack();
    buffer.input = buffer.output = call.fusion.data();
    buffer.bytes = fusion_bytes(call);
  } else {
    const AllreduceTensor& tensor = call.tensors.front();
    buffer.input = tensor.input;
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
  std::byte* const result = buffer.output;
  if (context.size() > 1) {
    HVD_CO_RETURN_IF_ERROR(co_await algorithm.run(context, std::move(buffer), *reducer));
  }
  HVD_CO_RETURN_IF_ERROR(finish_scaling(call, result, count, context.size()));
  if (fused) layout.unpack();
  co_return Status();
}

Task<Status> host_allgather(CollectiveContext& context, const std::byte* input, std::byte* output,
                            std::vector<std::size_t> bytes_by_rank) {
  GatherBuffer buffer{input, output, {0}};
  for (const std::size_t bytes : bytes_by_rank) buffer.blocks.push_back(buffer.blocks.back() + bytes);
  co_return co_await allgather_algorithms().front().run(context, std::move(buffer));
}

Task<Status> host_broadcast(CollectiveContext& context, const std::byte* input, std::byte* output, std::size_t bytes,
                            int root) {
  if (context.rank() == root && input != output && bytes > 0) std::memcpy(output, input, bytes);
  co_return co_await broadcast_algorithms().front().run(context, {output, bytes}, root);
}

Task<Status> host_barrier(CollectiveContext& context) { co_return co_await barrier_algorithms().front().run(context); }

}  // namespace hvd
