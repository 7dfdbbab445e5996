// How elements of several ranks become one.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace hvd {

/// The numbers equal Horovod's Python constants and are part of the C ABI and of the wire format.
enum class ReduceOp : std::uint8_t { kAverage = 0, kSum = 1, kAdasum = 2, kMin = 3, kMax = 4, kProduct = 5 };

inline constexpr std::array<std::string_view, 6> kReduceOpNames{"Average", "Sum", "Adasum", "Min", "Max", "Product"};

constexpr bool is_valid(ReduceOp op) { return static_cast<std::size_t>(op) < kReduceOpNames.size(); }

constexpr std::string_view name_of(ReduceOp op) {
  return is_valid(op) ? kReduceOpNames[static_cast<std::size_t>(op)] : "unknown reduction";
}

}  // namespace hvd
