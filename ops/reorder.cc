#include "ops/reorder.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace hvd {
namespace {

struct Dimension {
  std::int64_t size;
  std::int64_t from;  // strides in bytes
  std::int64_t to;
};

// A plane is copied tile by tile: what one tile reads and writes stays in the first cache.
constexpr std::int64_t kTile = 16;

template <std::size_t kBytes>
void copy_plane(const std::byte* from, std::byte* to, const Dimension& rows, const Dimension& columns) {
  for (std::int64_t row = 0; row < rows.size; row += kTile) {
    const std::int64_t row_end = std::min(row + kTile, rows.size);
    for (std::int64_t column = 0; column < columns.size; column += kTile) {
      const std::int64_t column_end = std::min(column + kTile, columns.size);
      for (std::int64_t r = row; r < row_end; ++r) {
        for (std::int64_t c = column; c < column_end; ++c) {
          std::memcpy(to + r * rows.to + c * columns.to, from + r * rows.from + c * columns.from, kBytes);
        }
      }
    }
  }
}

using CopyPlane = void (*)(const std::byte* from, std::byte* to, const Dimension& rows, const Dimension& columns);

CopyPlane plane_copier(std::size_t element_bytes) {
  switch (element_bytes) {
    case 2:
      return copy_plane<2>;
    case 4:
      return copy_plane<4>;
    case 8:
      return copy_plane<8>;
    default:
      return copy_plane<1>;  // the other data types have one byte
  }
}

// Takes out the dimension that is `fastest` on one side.
Dimension take_fastest(std::vector<Dimension>& dimensions, std::int64_t Dimension::* side) {
  const auto fastest = std::min_element(dimensions.begin(), dimensions.end(),
                                        [&](const Dimension& a, const Dimension& b) { return a.*side < b.*side; });
  const Dimension taken = *fastest;
  dimensions.erase(fastest);
  return taken;
}

// The plane of what is read fastest and what is written fastest, for every place in the other dimensions.
void copy(const std::byte* from, std::byte* to, std::vector<Dimension> dimensions, std::size_t element_bytes) {
  constexpr Dimension kNone{1, 0, 0};
  const Dimension columns = dimensions.empty() ? kNone : take_fastest(dimensions, &Dimension::to);
  const Dimension rows = dimensions.empty() ? kNone : take_fastest(dimensions, &Dimension::from);
  const CopyPlane copy_one = plane_copier(element_bytes);
  std::vector<std::int64_t> place(dimensions.size());
  for (;;) {
    copy_one(from, to, rows, columns);
    std::size_t i = 0;
    for (; i < dimensions.size(); ++i) {
      from += dimensions[i].from;
      to += dimensions[i].to;
      if (++place[i] < dimensions[i].size) break;
      place[i] = 0;
      from -= dimensions[i].size * dimensions[i].from;
      to -= dimensions[i].size * dimensions[i].to;
    }
    if (i == dimensions.size()) return;
  }
}

// Dimensions that count, from the fastest of C order on.
std::vector<Dimension> dimensions_of(std::span<const std::int64_t> shape, MemoryOrder from, MemoryOrder to,
                                     std::size_t element_bytes) {
  const std::vector<std::int64_t> from_strides = strides_of(shape, from);
  const std::vector<std::int64_t> to_strides = strides_of(shape, to);
  const auto bytes = static_cast<std::int64_t>(element_bytes);
  std::vector<Dimension> dimensions;
  for (std::size_t i = shape.size(); i-- > 0;) {
    if (shape[i] > 1) dimensions.push_back({shape[i], from_strides[i] * bytes, to_strides[i] * bytes});
  }
  return dimensions;
}

bool is_empty(std::span<const std::int64_t> shape) { return std::find(shape.begin(), shape.end(), 0) != shape.end(); }

}  // namespace

void copy_to_c_order(const std::byte* from, MemoryOrder order, std::byte* to, std::span<const std::int64_t> shape,
                     std::size_t element_bytes) {
  if (is_empty(shape)) return;
  copy(from, to, dimensions_of(shape, order, kCOrder, element_bytes), element_bytes);
}

void copy_from_c_order(const std::byte* from, std::byte* to, MemoryOrder order, std::span<const std::int64_t> shape,
                       std::size_t element_bytes) {
  if (is_empty(shape)) return;
  copy(from, to, dimensions_of(shape, kCOrder, order, element_bytes), element_bytes);
}

}  // namespace hvd
