#include "ops/algorithms/direct_allreduce.h"

#include <fmt/format.h>

#include <vector>

#include "ops/algorithms/operands.h"
#include "ops/algorithms/ring_schedule.h"

namespace hvd {
namespace {

// Room for what the other ranks send; fails when there is no memory.
Status make_room(CollectiveContext& context, Operands& operands) {
  std::byte* next = context.lease(operands.bytes() * static_cast<std::size_t>(context.size() - 1));
  if (next == nullptr) return Status::internal(fmt::format("no memory for the operands of {} ranks", context.size()));
  for (int rank = 0; rank < context.size(); ++rank) {
    if (rank == context.rank()) continue;
    operands.put_in_room(rank, next);
    next += operands.bytes();
  }
  return {};
}

// Ends with the first failure.
Task<Status> all_of(std::vector<Pending> transfers) {
  for (Pending& transfer : transfers) HVD_CO_RETURN_IF_ERROR(co_await transfer);
  co_return Status();
}

enum class Order : std::uint8_t { kRecursiveDoubling, kRing };

Task<Status> scatter_and_gather(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer, Order order) {
  const int rank = context.rank();
  const int size = context.size();
  const auto begin_of = [&](int chunk) { return buffer.chunks[static_cast<std::size_t>(chunk)]; };
  const auto bytes_of = [&](int chunk) { return begin_of(chunk + 1) - begin_of(chunk); };
  Operands operands(size, bytes_of(rank));
  operands.put(rank, buffer.input + begin_of(rank));
  HVD_CO_RETURN_IF_ERROR(make_room(context, operands));
  std::vector<Pending> operand_transfers;
  std::vector<Pending> others;
  for (int k = 1; k < size; ++k) {
    const int peer = wrap(rank + k, size);
    others.push_back(context.send(peer, {buffer.input + begin_of(peer), bytes_of(peer)}));
    operand_transfers.push_back(context.receive(peer, operands.room_of(peer)));
    // A chunk that arrives has been summed from what everybody sent: by then nobody needs the input there.
    others.push_back(context.receive(peer, {buffer.output + begin_of(peer), bytes_of(peer)}));
  }
  HVD_CO_RETURN_IF_ERROR(co_await all_of(std::move(operand_transfers)));
  std::byte* const sum = buffer.output + begin_of(rank);
  if (order == Order::kRing) {
    operands.sum_as_ring(rank, sum, reducer);
  } else {
    operands.sum_as_recursive_doubling(sum, reducer);
  }
  for (int k = 1; k < size; ++k) others.push_back(context.send(wrap(rank + k, size), {sum, bytes_of(rank)}));
  co_return co_await all_of(std::move(others));
}

}  // namespace

Task<Status> direct_allreduce(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer) {
  const int rank = context.rank();
  const int size = context.size();
  Operands operands(size, buffer.bytes);
  operands.put(rank, buffer.input);
  HVD_CO_RETURN_IF_ERROR(make_room(context, operands));
  std::vector<Pending> transfers;
  for (int k = 1; k < size; ++k) {
    const int peer = wrap(rank + k, size);
    transfers.push_back(context.send(peer, {buffer.input, buffer.bytes}));
    transfers.push_back(context.receive(peer, operands.room_of(peer)));
  }
  HVD_CO_RETURN_IF_ERROR(co_await all_of(std::move(transfers)));
  operands.sum_as_recursive_doubling(buffer.output, reducer);
  co_return Status();
}

Task<Status> direct_scatter_allreduce(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer) {
  return scatter_and_gather(context, std::move(buffer), reducer, Order::kRecursiveDoubling);
}

Task<Status> direct_scatter_allreduce_as_ring(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer) {
  return scatter_and_gather(context, std::move(buffer), reducer, Order::kRing);
}

}  // namespace hvd
