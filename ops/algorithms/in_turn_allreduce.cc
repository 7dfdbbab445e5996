#include "ops/algorithms/in_turn_allreduce.h"

#include <algorithm>
#include <vector>

#include "ops/algorithms/ring_schedule.h"

namespace hvd {
namespace {

// Where segments begin and end; all ranks cut a chunk alike.
class Segments {
 public:
  Segments(const ReduceBuffer& buffer, int ranks, std::size_t segment_bytes) : chunks_(buffer.chunks) {
    const std::size_t least = std::max(chunks_.back() / static_cast<std::size_t>(ranks) / kMost, kAlignment);
    bytes_ = (std::max(segment_bytes, least) + kAlignment - 1) / kAlignment * kAlignment;
  }

  std::size_t count(int chunk) const { return (size(chunk) + bytes_ - 1) / bytes_; }
  std::size_t begin(int chunk, std::size_t index) const { return chunks_[at(chunk)] + index * bytes_; }
  std::size_t bytes(int chunk, std::size_t index) const { return std::min(bytes_, size(chunk) - index * bytes_); }

 private:
  static constexpr std::size_t kAlignment = 64;  // whole elements, whatever the type
  static constexpr std::size_t kMost = 1024;     // of a chunk; all are in flight at once

  static std::size_t at(int chunk) { return static_cast<std::size_t>(chunk); }
  std::size_t size(int chunk) const { return chunks_[at(chunk) + 1] - chunks_[at(chunk)]; }

  const std::vector<std::size_t>& chunks_;
  std::size_t bytes_ = 0;
};

}  // namespace

Task<Status> in_turn_allreduce(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer) {
  const int rank = context.rank();
  const int size = context.size();
  const Segments segments(buffer, size, context.segment_bytes());
  std::vector<Pending> others;
  for (int k = 1; k < size; ++k) {
    const int peer = wrap(rank - k, size);  // the first of them asks for this rank's operand first
    for (std::size_t i = 0; i < segments.count(peer); ++i) {
      others.push_back(context.send(peer, {buffer.input + segments.begin(peer, i), segments.bytes(peer, i)}));
    }
  }
  // A segment is summed while it lies in the cache.
  for (std::size_t i = 0; i < segments.count(rank); ++i) {
    const std::size_t begin = segments.begin(rank, i);
    const std::span<std::byte> sum(buffer.output + begin, segments.bytes(rank, i));
    const std::byte* own = buffer.input + begin;
    for (int k = 1; k < size; ++k) {
      const Pending next =
          context.receive_combine(wrap(rank + k, size), sum, own, reducer, OperandOrder::kIncomingFirst);
      HVD_CO_RETURN_IF_ERROR(co_await next);
      own = sum.data();
    }
  }
  // What is sent from now on comes behind the operands, on all ranks. A sum that arrives is one of what everybody sent:
  // by then nobody needs the input there.
  for (int k = 1; k < size; ++k) {
    const int peer = wrap(rank - k, size);
    for (std::size_t i = 0; i < segments.count(rank); ++i) {
      others.push_back(context.send(peer, {buffer.output + segments.begin(rank, i), segments.bytes(rank, i)}));
    }
  }
  for (int k = 1; k < size; ++k) {
    const int peer = wrap(rank + k, size);
    for (std::size_t i = 0; i < segments.count(peer); ++i) {
      others.push_back(context.receive(peer, {buffer.output + segments.begin(peer, i), segments.bytes(peer, i)}));
    }
  }
  for (Pending& transfer : others) HVD_CO_RETURN_IF_ERROR(co_await transfer);
  co_return Status();
}

}  // namespace hvd
