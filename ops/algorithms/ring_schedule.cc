#include "ops/algorithms/ring_schedule.h"

namespace hvd {

std::vector<std::size_t> chunk_bounds(std::size_t count, std::size_t element_bytes, int parts) {
  std::vector<std::size_t> bounds;
  bounds.reserve(static_cast<std::size_t>(parts) + 1);
  for (int i = 0; i <= parts; ++i) bounds.push_back(slice_begin(count, parts, i) * element_bytes);
  return bounds;
}

}  // namespace hvd
