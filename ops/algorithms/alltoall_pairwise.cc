#include "ops/algorithms/alltoall_pairwise.h"

#include <algorithm>
#include <cstring>
#include <deque>

#include "ops/algorithms/ring_schedule.h"

namespace hvd {
namespace {

constexpr std::size_t kRoundWindow = 4;  // rounds of segments that are under way

std::span<const std::byte> block_to(const ExchangeBuffer& buffer, int rank) {
  const auto i = static_cast<std::size_t>(rank);
  return {buffer.input + buffer.to[i], buffer.to[i + 1] - buffer.to[i]};
}

std::span<std::byte> block_from(const ExchangeBuffer& buffer, int rank) {
  const auto i = static_cast<std::size_t>(rank);
  return {buffer.output + buffer.from[i], buffer.from[i + 1] - buffer.from[i]};
}

// Round `index` of a block; empty where the block has ended.
template <typename Byte>
std::span<Byte> segment(std::span<Byte> block, std::size_t index, std::size_t bytes) {
  const std::size_t begin = std::min(index * bytes, block.size());
  return block.subspan(begin, std::min(bytes, block.size() - begin));
}

}  // namespace

Task<Status> pairwise_alltoall(CollectiveContext& context, ExchangeBuffer buffer) {
  const int rank = context.rank();
  const int size = context.size();
  const std::size_t bytes = std::max<std::size_t>(context.segment_bytes(), 1);
  const std::span<std::byte> kept = block_from(buffer, rank);
  if (!kept.empty()) std::memcpy(kept.data(), block_to(buffer, rank).data(), kept.size());
  std::size_t largest = 0;
  for (int peer = 0; peer < size; ++peer) {
    if (peer != rank) largest = std::max({largest, block_to(buffer, peer).size(), block_from(buffer, peer).size()});
  }
  // A rank waits for the transfers of a round only after it has begun the next ones. The rank that is furthest behind
  // therefore waits for what its peers have begun, and nobody waits for ever.
  std::deque<std::vector<Pending>> rounds;
  for (std::size_t i = 0; i * bytes < largest; ++i) {
    std::vector<Pending> round;
    for (int k = 1; k < size; ++k) {
      const int from = wrap(rank - k, size);
      const int to = wrap(rank + k, size);
      if (const auto in = segment(block_from(buffer, from), i, bytes); !in.empty()) {
        round.push_back(context.receive(from, in));
      }
      if (const auto out = segment(block_to(buffer, to), i, bytes); !out.empty())
        round.push_back(context.send(to, out));
    }
    rounds.push_back(std::move(round));
    if (rounds.size() < kRoundWindow) continue;
    for (Pending& one : rounds.front()) HVD_CO_RETURN_IF_ERROR(co_await one);
    rounds.pop_front();
  }
  for (; !rounds.empty(); rounds.pop_front()) {
    for (Pending& one : rounds.front()) HVD_CO_RETURN_IF_ERROR(co_await one);
  }
  co_return Status();
}

}  // namespace hvd
