#include "ops/transport/slow_transport.h"

#include <algorithm>
#include <cmath>

namespace hvd {

TimePoint TokenBucket::take(std::size_t bytes, TimePoint now) {
  const double seconds = static_cast<double>(bytes) / static_cast<double>(bytes_per_second_);
  free_at_ = std::max(free_at_, now) + Duration(std::llround(seconds * 1e9));
  return free_at_;
}

void SlowTransport::do_post(int peer, std::vector<std::byte> message, std::uint32_t crc) {
  hand_on(way(peer), peer, std::move(message), crc);
}

void SlowTransport::do_start(const TransferRef& transfer) {
  if (transfer->direction == Transfer::Direction::kReceive) {
    hand_on(way(transfer->peer), transfer);
    return;
  }
  held_.push_back({bucket_.take(transfer->bytes, clock_.now()), transfer});
}

bool SlowTransport::progress() {
  if (held_.empty()) return false;
  const TimePoint now = clock_.now();
  bool moved = false;
  while (!held_.empty() && held_.front().due <= now) {
    const TransferRef transfer = std::move(held_.front().transfer);
    held_.pop_front();
    hand_on(way(transfer->peer), transfer);
    moved = true;
  }
  return moved;
}

void SlowTransport::cancel(const TransferRef& transfer, const Status& status) {
  const std::size_t held = std::erase_if(held_, [&](const Held& one) { return one.transfer == transfer; });
  if (held > 0) {
    transfer->complete(status);
  } else {
    way(transfer->peer).cancel(transfer, status);
  }
}

void slow_down(Fabric& fabric, const Clock& clock, std::uint64_t bytes_per_second) {
  std::vector<Transport*> ways;
  for (int peer = 0; peer < fabric.size(); ++peer) {
    ways.push_back(peer == fabric.rank() ? nullptr : &fabric.data_route(peer));
  }
  Transport& slow = fabric.add(std::make_unique<SlowTransport>(std::move(ways), clock, bytes_per_second));
  for (int peer = 0; peer < fabric.size(); ++peer) {
    if (peer != fabric.rank()) fabric.route_data(peer, slow);
  }
}

}  // namespace hvd
