#include "ops/algorithms/allgather_ring.h"

#include <cstring>

#include "ops/algorithms/exchange.h"
#include "ops/algorithms/ring_schedule.h"

namespace hvd {
namespace {

std::span<std::byte> block_of(const GatherBuffer& buffer, int rank) {
  const auto i = static_cast<std::size_t>(rank);
  return {buffer.output + buffer.blocks[i], buffer.blocks[i + 1] - buffer.blocks[i]};
}

}  // namespace

Task<Status> ring_allgather(CollectiveContext& context, GatherBuffer buffer) {
  const int rank = context.rank();
  const int size = context.size();
  const std::span<std::byte> own = block_of(buffer, rank);
  if (!own.empty()) std::memcpy(own.data(), buffer.input, own.size());
  for (int k = 0; k < size - 1; ++k) {
    const std::span<std::byte> out = block_of(buffer, wrap(rank - k, size));
    const std::span<std::byte> in = block_of(buffer, wrap(rank - k - 1, size));
    HVD_CO_RETURN_IF_ERROR(co_await exchange(context, {wrap(rank + 1, size), out}, {wrap(rank - 1, size), in}));
  }
  co_return Status();
}

}  // namespace hvd
