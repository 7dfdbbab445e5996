// In which order the dimensions of a dense tensor lie in memory, as a number that ranks can compare.
// Values; any thread.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <horovod_cpp/status.h>

namespace hvd {

/// The dimensions from the slowest to the fastest: for each the place that it has among those still to come, in 4 bits,
/// the slowest in the lowest. Dimensions of size 1 do not count, as they lie anywhere; nor does a tensor without
/// elements. So 0 is C order (the last dimension fastest), and equal numbers of equal shapes are equal memory.
using MemoryOrder = std::uint64_t;
inline constexpr MemoryOrder kCOrder = 0;

/// So many dimensions of more than one element may lie in an order other than C order.
inline constexpr std::size_t kMostOrderedDimensions = 16;

/// `strides` in elements, as many as `shape` has sizes, which have been checked. kInvalidArgument, with both, where
/// they are not those of one dense block without gaps and overlaps.
Result<MemoryOrder> memory_order(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides);

/// The strides, in elements, of a tensor of `shape` in an order that `memory_order` has given for it.
std::vector<std::int64_t> strides_of(std::span<const std::int64_t> shape, MemoryOrder order);

}  // namespace hvd
