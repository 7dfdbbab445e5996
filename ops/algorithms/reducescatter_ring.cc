#include "ops/algorithms/reducescatter_ring.h"

#include <algorithm>
#include <cstring>

#include "ops/algorithms/exchange.h"
#include "ops/algorithms/ring_schedule.h"

namespace hvd {
namespace {

std::span<const std::byte> chunk_of(const ScatterBuffer& buffer, int index) {
  const auto i = static_cast<std::size_t>(index);
  return {buffer.input + buffer.chunks[i], buffer.chunks[i + 1] - buffer.chunks[i]};
}

std::size_t largest_chunk(const ScatterBuffer& buffer) {
  std::size_t largest = 0;
  for (std::size_t i = 0; i + 1 < buffer.chunks.size(); ++i) {
    largest = std::max(largest, buffer.chunks[i + 1] - buffer.chunks[i]);
  }
  return largest;
}

}  // namespace

Task<Status> ring_reducescatter(CollectiveContext& context, ScatterBuffer buffer, Reducer reducer) {
  const int rank = context.rank();
  const int size = context.size();
  const int next = wrap(rank + 1, size);
  const int previous = wrap(rank - 1, size);
  if (size == 1) {
    const std::span<const std::byte> all = chunk_of(buffer, 0);
    if (!all.empty()) std::memcpy(buffer.output, all.data(), all.size());
    co_return Status();
  }
  const std::size_t largest = largest_chunk(buffer);
  std::byte* const partial = size > 2 ? context.lease(2 * largest) : nullptr;
  if (size > 2 && partial == nullptr) co_return Status::internal("no memory for the partial sums of a reducescatter");
  std::span<const std::byte> out = chunk_of(buffer, previous);
  for (int k = 0; k < size - 1; ++k) {
    // As in the allreduce, for a rank whose number is one less: it ends with the chunk of this rank.
    const std::span<const std::byte> own = chunk_of(buffer, reduce_scatter_step(previous, size, k).receive_chunk);
    const bool last = k == size - 2;
    const std::span<std::byte> in{last ? buffer.output : partial + static_cast<std::size_t>(k % 2) * largest,
                                  own.size()};
    HVD_CO_RETURN_IF_ERROR(co_await exchange(context, {next, out}, {previous, in, own.data(), &reducer}));
    out = in;
  }
  co_return Status();
}

}  // namespace hvd
