#include "ops/memory_order.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <ranges>

namespace hvd {
namespace {

constexpr unsigned kBitsEach = 4;
constexpr MemoryOrder kMask = (1u << kBitsEach) - 1;

// The dimensions of more than one element; none where the tensor has no elements.
std::vector<std::size_t> counted_dimensions(std::span<const std::int64_t> shape) {
  std::vector<std::size_t> counted;
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return counted;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] > 1) counted.push_back(i);
  }
  return counted;
}

}  // namespace

Result<MemoryOrder> memory_order(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides) {
  std::vector<std::size_t> remaining = counted_dimensions(shape);
  std::vector<std::size_t> slowest_first = remaining;
  std::stable_sort(slowest_first.begin(), slowest_first.end(),
                   [&](std::size_t a, std::size_t b) { return strides[a] > strides[b]; });
  std::int64_t block = 1;
  for (const std::size_t dimension : std::views::reverse(slowest_first)) {
    if (strides[dimension] != block) {
      return Status::invalid_argument(
          fmt::format("strides [{}] of shape [{}] are not those of one block without gaps and overlaps",
                      fmt::join(strides, ", "), fmt::join(shape, ", ")));
    }
    block *= shape[dimension];
  }
  if (slowest_first == remaining) return kCOrder;
  if (remaining.size() > kMostOrderedDimensions) {
    return Status::invalid_argument(
        fmt::format("strides [{}] of shape [{}] are not in C order, which more than {} dimensions have to be",
                    fmt::join(strides, ", "), fmt::join(shape, ", "), kMostOrderedDimensions));
  }
  MemoryOrder order = kCOrder;
  for (unsigned i = 0; i < slowest_first.size(); ++i) {
    const auto place = std::find(remaining.begin(), remaining.end(), slowest_first[i]);
    order |= static_cast<MemoryOrder>(place - remaining.begin()) << (i * kBitsEach);
    remaining.erase(place);
  }
  return order;
}

std::vector<std::int64_t> strides_of(std::span<const std::int64_t> shape, MemoryOrder order) {
  std::vector<std::size_t> remaining = counted_dimensions(shape);
  std::vector<std::size_t> slowest_first;
  for (MemoryOrder left = order; !remaining.empty(); left >>= kBitsEach) {
    const auto place = remaining.begin() + static_cast<std::ptrdiff_t>(left & kMask);
    slowest_first.push_back(*place);
    remaining.erase(place);
  }
  std::vector<std::int64_t> strides(shape.size(), 1);
  std::int64_t block = 1;
  for (const std::size_t dimension : std::views::reverse(slowest_first)) {
    strides[dimension] = block;
    block *= shape[dimension];
  }
  return strides;
}

}  // namespace hvd
