#include "ops/algorithms/broadcast_binomial.h"

#include <algorithm>
#include <bit>
#include <deque>

#include "ops/algorithms/ring_schedule.h"

namespace hvd {
namespace {

constexpr std::size_t kSegmentWindow =
    4;  // segments asked for, and sends on their way, ahead of the one that is awaited

// The tree is numbered from the root: a rank's parent is its number without the lowest set bit.
struct TreePlace {
  int number;
  int size;

  int lowest_bit() const {
    return number == 0 ? static_cast<int>(std::bit_ceil(static_cast<unsigned>(size))) : number & -number;
  }
  int parent() const { return number & (number - 1); }
  // Farthest first: that subtree is the deepest.
  std::vector<int> children() const {
    std::vector<int> found;
    for (int bit = lowest_bit() / 2; bit > 0; bit /= 2) {
      if (number + bit < size) found.push_back(number + bit);
    }
    return found;
  }
};

}  // namespace

Task<Status> binomial_broadcast(CollectiveContext& context, std::span<std::byte> bytes, int root) {
  const int size = context.size();
  const TreePlace place{wrap(context.rank() - root, size), size};
  const std::vector<int> children = place.children();
  const std::size_t segment_bytes = std::max<std::size_t>(context.segment_bytes(), 1);
  const std::size_t segments = std::max<std::size_t>((bytes.size() + segment_bytes - 1) / segment_bytes, 1);
  const auto segment = [&](std::size_t i) {
    return bytes.subspan(i * segment_bytes, std::min(segment_bytes, bytes.size() - i * segment_bytes));
  };
  std::deque<Pending> receives;
  std::deque<Pending> sends;
  const int parent = (place.parent() + root) % size;
  for (std::size_t i = 0; i < segments; ++i) {
    if (place.number != 0) {
      for (std::size_t asked = i + receives.size(); asked < std::min(i + kSegmentWindow, segments); ++asked) {
        receives.push_back(context.receive(parent, segment(asked)));
      }
      HVD_CO_RETURN_IF_ERROR(co_await receives.front());
      receives.pop_front();
    }
    for (const int child : children) {
      if (sends.size() >= kSegmentWindow * children.size()) {
        HVD_CO_RETURN_IF_ERROR(co_await sends.front());
        sends.pop_front();
      }
      sends.push_back(context.send((child + root) % size, segment(i)));
    }
  }
  for (; !sends.empty(); sends.pop_front()) HVD_CO_RETURN_IF_ERROR(co_await sends.front());
  co_return Status();
}

}  // namespace hvd
