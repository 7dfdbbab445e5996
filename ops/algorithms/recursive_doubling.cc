#include "ops/algorithms/recursive_doubling.h"

#include <bit>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace hvd {
namespace {

// The value so far lives in one of two places; a step combines into the other one, so that what is being sent stays
// as it is until it has gone.
class DoubleBuffer {
 public:
  DoubleBuffer(const ReduceBuffer& buffer, CollectiveContext& context)
      : scratch_(std::make_shared<std::vector<std::byte>>(buffer.bytes)), output_(buffer.output) {
    if (buffer.input != buffer.output && buffer.bytes > 0) std::memcpy(buffer.output, buffer.input, buffer.bytes);
    context.hold(scratch_);
  }
  std::span<std::byte> current() { return in_output_ ? output() : std::span<std::byte>(*scratch_); }
  std::span<std::byte> other() { return in_output_ ? std::span<std::byte>(*scratch_) : output(); }
  void swap() { in_output_ = !in_output_; }
  void finish() {
    if (!in_output_ && !scratch_->empty()) std::memcpy(output_, scratch_->data(), scratch_->size());
  }

 private:
  std::span<std::byte> output() { return {output_, scratch_->size()}; }

  std::shared_ptr<std::vector<std::byte>> scratch_;
  std::byte* output_;
  bool in_output_ = true;
};

}  // namespace

Task<Status> recursive_doubling_allreduce(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer) {
  const int rank = context.rank();
  const int size = context.size();
  const int paired = static_cast<int>(std::bit_floor(static_cast<unsigned>(size)));
  DoubleBuffer value(buffer, context);
  if (rank >= paired) {  // folded: hands its operand to a partner and gets the result
    HVD_CO_RETURN_IF_ERROR(co_await context.send(rank - paired, value.current()));
    HVD_CO_RETURN_IF_ERROR(co_await context.receive(rank - paired, value.current()));
    co_return Status();
  }
  if (rank + paired < size) {
    HVD_CO_RETURN_IF_ERROR(
        co_await context.receive_combine(rank + paired, value.other(), value.current().data(), reducer));
    value.swap();
  }
  for (int distance = 1; distance < paired; distance *= 2) {
    const int partner = rank ^ distance;
    const OperandOrder order = partner < rank ? OperandOrder::kIncomingFirst : OperandOrder::kOwnFirst;
    // NOLINTNEXTLINE(misc-const-correctness): co_await changes it
    Pending received = context.receive_combine(partner, value.other(), value.current().data(), reducer, order);
    HVD_CO_RETURN_IF_ERROR(co_await context.send(partner, value.current()));
    HVD_CO_RETURN_IF_ERROR(co_await received);
    value.swap();
  }
  if (rank + paired < size) HVD_CO_RETURN_IF_ERROR(co_await context.send(rank + paired, value.current()));
  value.finish();
  co_return Status();
}

}  // namespace hvd
