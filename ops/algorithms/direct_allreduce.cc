#include "ops/algorithms/direct_allreduce.h"

#include <fmt/format.h>

#include <bit>
#include <vector>

#include "ops/algorithms/ring_schedule.h"

namespace hvd {
namespace {

// The same stretch of the operands of all ranks, that of this rank in its place, the others in room of their own.
class Operands {
 public:
  Operands(std::span<const std::byte> own, int rank, int size)
      : bytes_(own.size()), value_(static_cast<std::size_t>(size)), room_(value_.size()) {
    value_[static_cast<std::size_t>(rank)] = own.data();
  }

  /// Fails when there is no memory.
  Status make_room(CollectiveContext& context) {
    std::byte* next = context.lease(bytes_ * (value_.size() - 1));
    if (next == nullptr) return Status::internal(fmt::format("no memory for the operands of {} ranks", value_.size()));
    for (std::size_t i = 0; i < value_.size(); ++i) {
      if (value_[i] != nullptr) continue;
      value_[i] = room_[i] = next;
      next += bytes_;
    }
    return {};
  }
  std::span<std::byte> room_of(int rank) { return {room_[static_cast<std::size_t>(rank)], bytes_}; }

  /// The results take the room of operands, the last one goes to `output`.
  void sum_as_recursive_doubling(std::byte* output, const Reducer& reducer) {
    const auto size = static_cast<int>(value_.size());
    const int paired = static_cast<int>(std::bit_floor(static_cast<unsigned>(size)));
    int left = size - 1;
    for (int i = 0; i + paired < size; ++i) combine(i, i + paired, --left == 0 ? output : nullptr, reducer);
    for (int distance = 1; distance < paired; distance *= 2) {
      for (int i = 0; i < paired; i += 2 * distance) {
        combine(i, i + distance, --left == 0 ? output : nullptr, reducer);
      }
    }
  }
  /// A chunk that the ring begins to sum at `rank`.
  void sum_as_ring(int rank, std::byte* output, const Reducer& reducer) {
    const auto size = static_cast<int>(value_.size());
    int sum = rank;
    for (int k = 1; k < size; ++k) {
      const int next = wrap(rank + k, size);
      combine(next, sum, k == size - 1 ? output : nullptr, reducer);
      sum = next;
    }
  }

 private:
  // Into `output`, or into the room of one of the two; the result is then that of `left`.
  void combine(int left, int right, std::byte* output, const Reducer& reducer) {
    const auto l = static_cast<std::size_t>(left);
    const auto r = static_cast<std::size_t>(right);
    std::byte* const place = output != nullptr ? output : room_[l] != nullptr ? room_[l] : room_[r];
    reducer.combine(place, value_[l], value_[r], bytes_ / reducer.element_bytes);
    value_[l] = place;
    room_[l] = place;
  }

  std::size_t bytes_;
  std::vector<const std::byte*> value_;
  std::vector<std::byte*> room_;
};

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
  Operands operands({buffer.input + begin_of(rank), bytes_of(rank)}, rank, size);
  HVD_CO_RETURN_IF_ERROR(operands.make_room(context));
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
  Operands operands({buffer.input, buffer.bytes}, rank, size);
  HVD_CO_RETURN_IF_ERROR(operands.make_room(context));
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
