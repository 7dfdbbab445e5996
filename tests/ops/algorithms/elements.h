// Operands of reductions in memory, and what a reduction of them has to give, computed in double one element at a time.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <random>
#include <span>
#include <vector>

#include <horovod_cpp/data_type.h>
#include <horovod_cpp/reduce_op.h>

#include "common/half.h"

namespace hvd::testing {

/// Writes `value` as element `index`; integers wrap.
inline void store_element(DataType type, std::byte* memory, std::size_t index, double value) {
  const auto put = [&](auto element) { std::memcpy(memory + index * sizeof element, &element, sizeof element); };
  const auto whole = [&] { return static_cast<std::uint64_t>(static_cast<std::int64_t>(value)); };
  switch (type) {
    case DataType::kUint8:
    case DataType::kBool:
    case DataType::kInt8:
      return put(static_cast<std::uint8_t>(whole()));
    case DataType::kInt16:
      return put(static_cast<std::uint16_t>(whole()));
    case DataType::kInt32:
      return put(static_cast<std::uint32_t>(whole()));
    case DataType::kInt64:
      return put(whole());
    case DataType::kFloat16:
      return put(float_to_float16(static_cast<float>(value)));
    case DataType::kBfloat16:
      return put(float_to_bfloat16(static_cast<float>(value)));
    case DataType::kFloat32:
      return put(static_cast<float>(value));
    case DataType::kFloat64:
      return put(value);
  }
}

inline double load_element(DataType type, const std::byte* memory, std::size_t index) {
  const auto get = [&]<typename T>(T element) {
    std::memcpy(&element, memory + index * sizeof element, sizeof element);
    return element;
  };
  switch (type) {
    case DataType::kUint8:
    case DataType::kBool:
      return get(std::uint8_t{});
    case DataType::kInt8:
      return get(std::int8_t{});
    case DataType::kInt16:
      return get(std::int16_t{});
    case DataType::kInt32:
      return get(std::int32_t{});
    case DataType::kInt64:
      return static_cast<double>(get(std::int64_t{}));
    case DataType::kFloat16:
      return static_cast<double>(float16_to_float(get(std::uint16_t{})));
    case DataType::kBfloat16:
      return static_cast<double>(bfloat16_to_float(get(std::uint16_t{})));
    case DataType::kFloat32:
      return static_cast<double>(get(float{}));
    case DataType::kFloat64:
      return get(double{});
  }
  return 0;
}

/// What an element of `type` keeps of `value`.
inline double as_stored(DataType type, double value) {
  std::byte memory[8];
  store_element(type, memory, 0, value);
  return load_element(type, memory, 0);
}

/// Operands whose reductions over up to 8 ranks are exact in `type` whatever their order, so that results can be
/// compared bit for bit. Integers wrap.
inline double exact_operand(DataType type, ReduceOp op, std::mt19937_64& random) {
  const auto pick = [&](std::initializer_list<double> values) { return values.begin()[random() % values.size()]; };
  const auto whole = [&](std::int64_t low, std::int64_t high) {
    return static_cast<double>(low + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(high - low + 1)));
  };
  if (type == DataType::kBool) return pick({0, 1, 1, 2, 255});
  if (op == ReduceOp::kProduct) {
    if (type == DataType::kUint8) return pick({1, 2, 3, 5});
    return is_floating_point(type) ? pick({-1, 1, 0.5, 2}) : pick({-2, -1, 1, 2, 3});
  }
  switch (type) {
    case DataType::kUint8:
      return whole(0, 255);
    case DataType::kInt8:
      return whole(-128, 127);
    case DataType::kInt16:
      return whole(-32768, 32767);
    case DataType::kInt32:
      return whole(-2'000'000'000, 2'000'000'000);
    case DataType::kInt64:
      return whole(-(std::int64_t{1} << 40), std::int64_t{1} << 40);
    default:
      return whole(-16, 16);
  }
}

inline double reduce_in_double(DataType type, ReduceOp op, const std::vector<double>& operands) {
  double result = operands.front();
  if (type == DataType::kBool) result = result != 0 ? 1 : 0;
  for (std::size_t i = 1; i < operands.size(); ++i) {
    const double next = type == DataType::kBool ? (operands[i] != 0 ? 1 : 0) : operands[i];
    switch (op) {
      case ReduceOp::kSum:
      case ReduceOp::kAverage:
        result = type == DataType::kBool ? std::max(result, next) : result + next;
        break;
      case ReduceOp::kMin:
        result = std::min(result, next);
        break;
      case ReduceOp::kMax:
        result = std::max(result, next);
        break;
      case ReduceOp::kProduct:
        result = type == DataType::kBool ? std::min(result, next) : result * next;
        break;
      case ReduceOp::kAdasum:
        break;
    }
  }
  return result;
}

/// Half a unit in the last place of 1.
inline double rounding_of(DataType type) {
  switch (type) {
    case DataType::kFloat16:
      return 0x1p-11;
    case DataType::kBfloat16:
      return 0x1p-8;
    case DataType::kFloat32:
      return 0x1p-24;
    case DataType::kFloat64:
      return 0x1p-53;
    default:
      return 0;
  }
}

/// Memory with guards on both sides, which show a write beside it.
class GuardedBytes {
 public:
  explicit GuardedBytes(std::size_t bytes) : size_(bytes), memory_(bytes + 2 * kGuard, kMark) {}
  std::byte* data() { return memory_.data() + kGuard; }
  const std::byte* data() const { return memory_.data() + kGuard; }
  std::size_t size() const { return size_; }
  std::span<std::byte> span() { return {data(), size_}; }
  bool guards_are_whole() const {
    const auto is_mark = [](std::byte byte) { return byte == kMark; };
    return std::all_of(memory_.begin(), memory_.begin() + kGuard, is_mark) &&
           std::all_of(memory_.end() - kGuard, memory_.end(), is_mark);
  }
  bool operator==(const GuardedBytes&) const = default;

 private:
  static constexpr std::ptrdiff_t kGuard = 64;
  static constexpr std::byte kMark{0xa5};
  std::size_t size_;
  std::vector<std::byte> memory_;
};

}  // namespace hvd::testing
