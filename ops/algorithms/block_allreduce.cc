#include "ops/algorithms/block_allreduce.h"

#include <algorithm>
#include <cstring>

#include "ops/algorithms/block_use.h"
#include "ops/algorithms/operands.h"
#include "ops/algorithms/ring_schedule.h"

namespace hvd {
namespace {

void copy_bytes(std::byte* to, const std::byte* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

enum class Order : std::uint8_t { kRecursiveDoubling, kRing };

// Piece by piece, so that what is on the way to a sum lies in the nearest cache.
constexpr std::size_t kPieceBytes = std::size_t{8} << 10;

// Room for the sums that are on the way, taken before anything is shown: who fails then fails before the others can
// end.
class Room {
 public:
  explicit Room(CollectiveContext& context)
      : count_(context.size() > 2 ? Operands::most_spares(context.size()) : 0),
        place_(count_ > 0 ? context.lease(kPieceBytes * static_cast<std::size_t>(count_)) : nullptr) {}

  Status status() const { return count_ == 0 || place_ != nullptr ? Status() : Status::internal("no memory for sums"); }
  void give_to(Operands& operands) const {
    for (int i = 0; i < count_; ++i) operands.add_spare(place_ + static_cast<std::size_t>(i) * kPieceBytes);
  }

 private:
  int count_;
  std::byte* place_;
};

// Sums what lies at `begin` of the operands of all ranks to the same place of `output`, and of `copy` unless that is
// nullptr.
void sum(CollectiveContext& context, const BlockUse& block, const Room& room, const ReduceBuffer& buffer,
         std::size_t begin, std::size_t bytes, std::byte* copy, const Reducer& reducer, Order order) {
  Operands operands(context.size(), 0);
  room.give_to(operands);
  for (const std::size_t end = begin + bytes; begin < end; begin += kPieceBytes) {
    operands.begin(std::min(kPieceBytes, end - begin));
    for (int rank = 0; rank < context.size(); ++rank) {
      operands.put(rank, (rank == context.rank() ? buffer.input : block.of(rank)) + begin);
    }
    if (order == Order::kRing) {
      operands.sum_as_ring(context.rank(), buffer.output + begin, reducer);
    } else {
      operands.sum_as_recursive_doubling(buffer.output + begin, reducer);
    }
    if (copy != nullptr) std::memcpy(copy + begin, buffer.output + begin, operands.bytes());
  }
}

Task<Status> scatter_and_gather(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer, Order order) {
  const int rank = context.rank();
  const int size = context.size();
  const auto begin_of = [&](int chunk) { return buffer.chunks[static_cast<std::size_t>(chunk)]; };
  const auto bytes_of = [&](int chunk) { return begin_of(chunk + 1) - begin_of(chunk); };
  const std::size_t own_bytes = bytes_of(rank);
  const Room room(context);
  HVD_CO_RETURN_IF_ERROR(room.status());
  BlockUse block(context);
  HVD_CO_RETURN_IF_ERROR(co_await block.begin());
  // Nobody else reads this rank's own chunk.
  copy_bytes(block.slot(), buffer.input, begin_of(rank));
  copy_bytes(block.slot() + begin_of(rank + 1), buffer.input + begin_of(rank + 1), buffer.bytes - begin_of(rank + 1));
  HVD_CO_RETURN_IF_ERROR(block.show(BlockStage::kOperand, buffer.bytes - own_bytes));
  HVD_CO_RETURN_IF_ERROR(co_await block.wait_for(BlockStage::kOperand));
  sum(context, block, room, buffer, begin_of(rank), own_bytes, block.slot(), reducer, order);
  HVD_CO_RETURN_IF_ERROR(block.show(BlockStage::kSum, own_bytes * static_cast<std::size_t>(size - 1)));
  HVD_CO_RETURN_IF_ERROR(co_await block.wait_for(BlockStage::kSum));
  for (int k = 1; k < size; ++k) {
    const int peer = wrap(rank + k, size);
    copy_bytes(buffer.output + begin_of(peer), block.of(peer) + begin_of(peer), bytes_of(peer));
  }
  co_return Status();
}

}  // namespace

Task<Status> block_allreduce(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer) {
  const Room room(context);
  HVD_CO_RETURN_IF_ERROR(room.status());
  BlockUse block(context);
  HVD_CO_RETURN_IF_ERROR(co_await block.begin());
  copy_bytes(block.slot(), buffer.input, buffer.bytes);
  HVD_CO_RETURN_IF_ERROR(block.show(BlockStage::kOperand, buffer.bytes * static_cast<std::size_t>(context.size() - 1)));
  HVD_CO_RETURN_IF_ERROR(co_await block.wait_for(BlockStage::kOperand));
  sum(context, block, room, buffer, 0, buffer.bytes, nullptr, reducer, Order::kRecursiveDoubling);
  co_return Status();
}

Task<Status> block_scatter_allreduce(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer) {
  return scatter_and_gather(context, std::move(buffer), reducer, Order::kRecursiveDoubling);
}

Task<Status> block_scatter_allreduce_as_ring(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer) {
  return scatter_and_gather(context, std::move(buffer), reducer, Order::kRing);
}

}  // namespace hvd
