#include "ops/algorithms/exchange.h"

#include <algorithm>
#include <array>

namespace hvd {
namespace {

// Segments asked for ahead: enough that a sender never waits for credit, few enough to bound what is in flight.
constexpr std::size_t kWindow = 4;

std::size_t segments(std::size_t bytes, std::size_t segment_bytes) {
  return (bytes + segment_bytes - 1) / segment_bytes;
}

template <typename Byte>
std::span<Byte> segment(std::span<Byte> bytes, std::size_t index, std::size_t segment_bytes) {
  const std::size_t begin = index * segment_bytes;
  return bytes.subspan(begin, std::min(segment_bytes, bytes.size() - begin));
}

Pending receive_segment(CollectiveContext& context, const IncomingStretch& incoming, std::size_t index,
                        std::size_t segment_bytes) {
  const std::span<std::byte> place = segment(incoming.bytes, index, segment_bytes);
  if (incoming.reducer == nullptr) return context.receive(incoming.from, place);
  const std::byte* own = incoming.own + (place.data() - incoming.bytes.data());
  return context.receive_combine(incoming.from, place, own, *incoming.reducer);
}

// A segment holds whole elements, so that both sides of an exchange cut alike whatever the element type.
constexpr std::size_t kSegmentAlignment = 64;

}  // namespace

Task<Status> exchange(CollectiveContext& context, OutgoingStretch outgoing, IncomingStretch incoming) {
  const std::size_t size = std::max(context.segment_bytes() / kSegmentAlignment, std::size_t{1}) * kSegmentAlignment;
  const std::size_t to_send = segments(outgoing.bytes.size(), size);
  const std::size_t to_receive = segments(incoming.bytes.size(), size);
  std::array<Pending, kWindow> receives;
  std::array<Pending, kWindow> sends;
  for (std::size_t i = 0; i < std::min(kWindow, to_receive); ++i) {
    receives[i] = receive_segment(context, incoming, i, size);
  }
  for (std::size_t i = 0; i < std::max(to_send, to_receive); ++i) {
    if (i < to_send) {
      if (i >= kWindow) HVD_CO_RETURN_IF_ERROR(co_await sends[i % kWindow]);
      sends[i % kWindow] = context.send(outgoing.to, segment(outgoing.bytes, i, size));
    }
    if (i < to_receive) {
      HVD_CO_RETURN_IF_ERROR(co_await receives[i % kWindow]);
      if (i + kWindow < to_receive) receives[i % kWindow] = receive_segment(context, incoming, i + kWindow, size);
    }
  }
  for (std::size_t i = to_send - std::min(kWindow, to_send); i < to_send; ++i) {
    HVD_CO_RETURN_IF_ERROR(co_await sends[i % kWindow]);
  }
  co_return Status();
}

}  // namespace hvd
