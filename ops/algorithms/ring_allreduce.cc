#include "ops/algorithms/ring_allreduce.h"

#include "ops/algorithms/exchange.h"
#include "ops/algorithms/ring_schedule.h"

namespace hvd {
namespace {

struct Chunk {
  std::size_t begin;
  std::size_t bytes;
};

Chunk chunk_of(const ReduceBuffer& buffer, int index) {
  const auto i = static_cast<std::size_t>(index);
  return {buffer.chunks[i], buffer.chunks[i + 1] - buffer.chunks[i]};
}

}  // namespace

Task<Status> ring_allreduce(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer) {
  const int rank = context.rank();
  const int size = context.size();
  const int next = wrap(rank + 1, size);
  const int previous = wrap(rank - 1, size);
  for (int k = 0; k < size - 1; ++k) {
    const RingStep step = reduce_scatter_step(rank, size, k);
    const Chunk out = chunk_of(buffer, step.send_chunk);
    const Chunk in = chunk_of(buffer, step.receive_chunk);
    // Each chunk is received once here, so its own operand is still the input; what is sent is the input first,
    // then the partial sums. That spares the copy of an out-of-place call.
    const std::byte* source = k == 0 ? buffer.input : buffer.output;
    HVD_CO_RETURN_IF_ERROR(
        co_await exchange(context, {next, {source + out.begin, out.bytes}},
                          {previous, {buffer.output + in.begin, in.bytes}, buffer.input + in.begin, &reducer}));
  }
  for (int k = 0; k < size - 1; ++k) {
    const RingStep step = allgather_step(rank, size, k);
    const Chunk out = chunk_of(buffer, step.send_chunk);
    const Chunk in = chunk_of(buffer, step.receive_chunk);
    HVD_CO_RETURN_IF_ERROR(co_await exchange(context, {next, {buffer.output + out.begin, out.bytes}},
                                             {previous, {buffer.output + in.begin, in.bytes}}));
  }
  co_return Status();
}

}  // namespace hvd
