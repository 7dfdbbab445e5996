#include "ops/algorithms/operands.h"

#include <algorithm>
#include <bit>

#include "ops/algorithms/ring_schedule.h"

namespace hvd {

void Operands::begin(std::size_t bytes) {
  bytes_ = bytes;
  std::fill(room_.begin(), room_.end(), nullptr);
  spares_used_ = 0;
}

void Operands::sum_as_recursive_doubling(std::byte* output, const Reducer& reducer) {
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

void Operands::sum_as_ring(int rank, std::byte* output, const Reducer& reducer) {
  const auto size = static_cast<int>(value_.size());
  int sum = rank;
  for (int k = 1; k < size; ++k) {
    const int next = wrap(rank + k, size);
    combine(next, sum, k == size - 1 ? output : nullptr, reducer);
    sum = next;
  }
}

// Into `output`, or the room of one of the two, or a spare one; the result is then that of `left`.
void Operands::combine(int left, int right, std::byte* output, const Reducer& reducer) {
  const auto l = static_cast<std::size_t>(left);
  const auto r = static_cast<std::size_t>(right);
  std::byte* place = output != nullptr ? output : room_[l] != nullptr ? room_[l] : room_[r];
  if (place == nullptr) place = spare_[spares_used_++];
  reducer.combine(place, value_[l], value_[r], bytes_ / reducer.element_bytes);
  value_[l] = place;
  room_[l] = place;
}

}  // namespace hvd
