#include "ops/algorithms/recursive_doubling.h"

#include <fmt/format.h>

#include <bit>
#include <cstring>
#include <utility>

namespace hvd {
namespace {

// Where the value so far lies, and where the next step puts it. What is still on its way to a partner stays as it is;
// a small message has left as soon as it was started, and then the next value takes its place. So a call begins where
// the operand is and ends in the output, mostly without a copy.
class Places {
 public:
  Places(const ReduceBuffer& buffer, CollectiveContext& context)
      : value_(buffer.input), output_(buffer.output), bytes_(buffer.bytes), context_(context) {}

  std::span<const std::byte> value() const { return {value_, bytes_}; }
  std::span<std::byte> output() const { return {output_, bytes_}; }

  /// Fails when there is no memory.
  Result<std::span<std::byte>> next(bool value_has_left) {
    if (value_ != output_ || value_has_left) return output();
    if (scratch_ == nullptr) {
      scratch_ = context_.lease(bytes_);
      if (scratch_ == nullptr) return Status::internal(fmt::format("no memory for {} bytes", bytes_));
    }
    return std::span<std::byte>(scratch_, bytes_);
  }
  /// The value now lies where `next` said.
  void step(std::span<std::byte> place) { value_ = place.data(); }
  void finish() {
    if (value_ != output_ && bytes_ > 0) std::memcpy(output_, value_, bytes_);
    value_ = output_;
  }

 private:
  const std::byte* value_;
  std::byte* output_;
  std::byte* scratch_ = nullptr;
  std::size_t bytes_;
  CollectiveContext& context_;
};

}  // namespace

Task<Status> recursive_doubling_allreduce(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer) {
  const int rank = context.rank();
  const int size = context.size();
  const int paired = static_cast<int>(std::bit_floor(static_cast<unsigned>(size)));
  const int folded = rank + paired;  // the rank whose operand is folded into this one's, if there is one
  Places places(buffer, context);
  if (rank >= paired) {  // hands its operand to a partner and gets the result
    HVD_CO_RETURN_IF_ERROR(co_await context.send(rank - paired, places.value()));
    HVD_CO_RETURN_IF_ERROR(co_await context.receive(rank - paired, places.output()));
    co_return Status();
  }
  if (folded < size) {
    HVD_CO_RETURN_IF_ERROR(co_await context.receive_combine(folded, places.output(), places.value().data(), reducer));
    places.step(places.output());
  }
  for (int distance = 1; distance < paired; distance *= 2) {
    const int partner = rank ^ distance;
    const OperandOrder order = partner < rank ? OperandOrder::kIncomingFirst : OperandOrder::kOwnFirst;
    Pending sent = context.send(partner, places.value());  // NOLINT(misc-const-correctness): co_await changes it
    Result<std::span<std::byte>> place = places.next(sent.done());
    if (!place) co_return place.status();
    // NOLINTNEXTLINE(misc-const-correctness): as above
    Pending received = context.receive_combine(partner, *place, places.value().data(), reducer, order);
    HVD_CO_RETURN_IF_ERROR(co_await sent);
    HVD_CO_RETURN_IF_ERROR(co_await received);
    places.step(*place);
  }
  places.finish();
  if (folded < size) HVD_CO_RETURN_IF_ERROR(co_await context.send(folded, places.value()));
  co_return Status();
}

}  // namespace hvd
