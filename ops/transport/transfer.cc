#include "ops/transport/transfer.h"

#include <algorithm>
#include <cstring>

#include "common/check.h"

namespace hvd {

void Transfer::combine(const std::byte* incoming, std::size_t count) {
  std::byte* out = arrival.out + delivered_;
  const std::byte* own = arrival.own + delivered_;
  if (arrival.incoming_first) {
    arrival.combine(out, incoming, own, count);
  } else {
    arrival.combine(out, own, incoming, count);
  }
  delivered_ += count * arrival.element_bytes;
}

void Transfer::deliver(std::span<const std::byte> piece) {
  HVD_CHECK(delivered_ + carried_ + piece.size() <= bytes);
  if (done_) {  // cancelled meanwhile: the rest is swallowed, the memory is no longer ours
    delivered_ += piece.size();
    return;
  }
  if (arrival.combine == nullptr) {
    if (!piece.empty()) std::memcpy(arrival.out + delivered_, piece.data(), piece.size());
    delivered_ += piece.size();
    return;
  }
  if (carried_ > 0) {
    const std::size_t missing = std::min(arrival.element_bytes - carried_, piece.size());
    std::memcpy(carry_ + carried_, piece.data(), missing);
    carried_ += missing;
    piece = piece.subspan(missing);
    if (carried_ < arrival.element_bytes) return;
    carried_ = 0;
    combine(carry_, 1);
  }
  const std::size_t whole = piece.size() / arrival.element_bytes;
  if (whole > 0) combine(piece.data(), whole);
  const std::span<const std::byte> rest = piece.subspan(whole * arrival.element_bytes);
  if (!rest.empty()) std::memcpy(carry_, rest.data(), rest.size());
  carried_ = rest.size();
}

}  // namespace hvd
