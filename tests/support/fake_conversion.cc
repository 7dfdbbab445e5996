#include "tests/support/fake_conversion.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include <fmt/format.h>

#include "common/check.h"
#include "ops/reduce/reducer.h"

namespace hvd::testing {

void convert_piece(const DeviceConversion& conversion, const DevicePiece& piece) {
  const std::size_t from_bytes = size_of(conversion.from_type);
  const std::size_t to_bytes = size_of(conversion.to_type);
  auto* to = static_cast<std::byte*>(piece.to);
  if (piece.from == nullptr) {
    for (std::size_t i = 0; i < piece.count; ++i) std::memcpy(to + i * to_bytes, &conversion.fill, to_bytes);
    return;
  }
  std::vector<std::byte> values(piece.count * from_bytes);
  std::memcpy(values.data(), piece.from, values.size());
  HVD_CHECK(scale(values.data(), conversion.from_type, piece.count, conversion.factor).ok());
  HVD_CHECK(divide(values.data(), conversion.from_type, piece.count, conversion.divisor).ok());
  if (conversion.from_type == conversion.to_type) {
    std::memcpy(to, values.data(), values.size());
    return;
  }
  for (std::size_t i = 0; i < piece.count; ++i) {
    std::int32_t wide = 0;
    std::int16_t narrow = 0;
    if (conversion.from_type == DataType::kInt16) {
      std::memcpy(&narrow, values.data() + i * from_bytes, from_bytes);
      wide = narrow;
      std::memcpy(to + i * to_bytes, &wide, to_bytes);
    } else {
      std::memcpy(&wide, values.data() + i * from_bytes, from_bytes);
      narrow = static_cast<std::int16_t>(wide);
      std::memcpy(to + i * to_bytes, &narrow, to_bytes);
    }
  }
}

bool is_supported(const DeviceConversion& conversion) {
  const DataType from = conversion.from_type;
  const DataType to = conversion.to_type;
  if (size_of(from) == 0 || size_of(to) == 0 || conversion.divisor < 1) return false;
  if (from == to) return true;
  const bool is_plain = conversion.factor == 1.0 && conversion.divisor == 1;
  return is_plain &&
         ((from == DataType::kInt16 && to == DataType::kInt32) || (from == DataType::kInt32 && to == DataType::kInt16));
}

std::string find_overlap(const std::vector<ByteRange>& reads, std::vector<ByteRange> writes) {
  const auto by_begin = [](const ByteRange& a, const ByteRange& b) { return std::less<>()(a.begin, b.begin); };
  std::ranges::sort(writes, by_begin);
  for (std::size_t i = 1; i < writes.size(); ++i) {
    if (overlap(writes[i - 1], writes[i])) return fmt::format("two pieces write to {}", writes[i].begin);
  }
  for (const ByteRange& read : reads) {
    for (auto write = std::ranges::lower_bound(writes, read, by_begin);; --write) {
      const bool in_place = write != writes.end() && write->begin == read.begin && write->bytes == read.bytes;
      if (write != writes.end() && overlap(*write, read) && !in_place) {
        return fmt::format("a piece reads from {} what is written from {}", read.begin, write->begin);
      }
      if (write == writes.begin() || (write != writes.end() && write->begin < read.begin)) break;
    }
  }
  return {};
}

}  // namespace hvd::testing
