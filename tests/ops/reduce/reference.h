// The plain serial reference of reductions, one element at a time in int64 and double, and inputs worth trying.
// Elements travel as their bits, zero-extended to 64.
#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <horovod_cpp/data_type.h>
#include <horovod_cpp/reduce_op.h>
#include <hwy/highway.h>

#include "common/half.h"
#include "tests/support/random_seed.h"

namespace hvd::testing {

using Bits = std::uint64_t;

inline constexpr std::array kCombiningOps{ReduceOp::kSum, ReduceOp::kMin, ReduceOp::kMax, ReduceOp::kProduct};

/// Instantiated for every instruction set that this machine can run.
class EveryInstructionSet : public ::testing::TestWithParam<std::int64_t> {
 protected:
  void SetUp() override { hwy::SetSupportedTargetsForTest(GetParam()); }
  void TearDown() override { hwy::SetSupportedTargetsForTest(0); }
};

inline std::string instruction_set_name(const ::testing::TestParamInfo<std::int64_t>& param) {
  return hwy::TargetName(param.param);
}

// ---- Values and bits ----

constexpr int mantissa_bits(DataType type) {
  switch (type) {
    case DataType::kFloat16:
      return 10;
    case DataType::kBfloat16:
      return 7;
    case DataType::kFloat32:
      return 23;
    default:
      return 52;
  }
}

constexpr Bits sign_bit(DataType type) { return Bits{1} << (8 * size_of(type) - 1); }
constexpr Bits quiet_bit(DataType type) { return Bits{1} << (mantissa_bits(type) - 1); }
constexpr Bits infinity_bits(DataType type) {
  return (sign_bit(type) - 1) & ~((Bits{1} << mantissa_bits(type)) - 1);  // All of the exponent.
}
constexpr bool is_nan(DataType type, Bits bits) {
  return is_floating_point(type) && (bits & (sign_bit(type) - 1)) > infinity_bits(type);
}

inline double to_double(DataType type, Bits bits) {
  switch (type) {
    case DataType::kFloat16:
      return static_cast<double>(float16_to_float(static_cast<std::uint16_t>(bits)));
    case DataType::kBfloat16:
      return static_cast<double>(bfloat16_to_float(static_cast<std::uint16_t>(bits)));
    case DataType::kFloat32:
      return static_cast<double>(std::bit_cast<float>(static_cast<std::uint32_t>(bits)));
    default:
      return std::bit_cast<double>(bits);
  }
}

/// Rounds once to float32 and, for the types of 16 bits, once more. The first rounding is that of float32 arithmetic
/// on its own: double has more than twice the digits.
inline Bits from_double(DataType type, double value) {
  switch (type) {
    case DataType::kFloat16:
      return float_to_float16(static_cast<float>(value));
    case DataType::kBfloat16:
      return float_to_bfloat16(static_cast<float>(value));
    case DataType::kFloat32:
      return std::bit_cast<std::uint32_t>(static_cast<float>(value));
    default:
      return std::bit_cast<Bits>(value);
  }
}

inline std::int64_t to_integer(DataType type, Bits bits) {
  switch (type) {
    case DataType::kInt8:
      return static_cast<std::int8_t>(bits);
    case DataType::kInt16:
      return static_cast<std::int16_t>(bits);
    case DataType::kInt32:
      return static_cast<std::int32_t>(bits);
    default:
      return static_cast<std::int64_t>(bits);
  }
}

/// What wraps around falls off.
constexpr Bits from_integer(DataType type, Bits value) { return value & (sign_bit(type) | (sign_bit(type) - 1)); }

// ---- The reference ----

inline Bits reference_of_integers(DataType type, ReduceOp op, Bits lhs, Bits rhs) {
  const bool right_is_less = to_integer(type, rhs) < to_integer(type, lhs);
  switch (op) {
    case ReduceOp::kMin:
      return right_is_less ? rhs : lhs;
    case ReduceOp::kMax:
      return right_is_less ? lhs : rhs;
    case ReduceOp::kProduct:
      return from_integer(type, lhs * rhs);
    default:
      return from_integer(type, lhs + rhs);
  }
}

inline Bits reference_of_floats(DataType type, ReduceOp op, Bits lhs, Bits rhs) {
  const bool selects = op == ReduceOp::kMin || op == ReduceOp::kMax;
  for (const Bits operand : {lhs, rhs}) {
    if (is_nan(type, operand)) return selects ? operand : operand | quiet_bit(type);
  }
  const double a = to_double(type, lhs);
  const double b = to_double(type, rhs);
  const bool right_is_less = b < a || (a == b && std::signbit(b) && !std::signbit(a));
  switch (op) {
    case ReduceOp::kMin:
      return right_is_less ? rhs : lhs;
    case ReduceOp::kMax:
      return right_is_less ? lhs : rhs;
    case ReduceOp::kProduct:
      return from_double(type, a * b);
    default:
      return from_double(type, a + b);
  }
}

inline Bits reference(DataType type, ReduceOp op, Bits lhs, Bits rhs) {
  if (is_floating_point(type)) return reference_of_floats(type, op, lhs, rhs);
  if (type != DataType::kBool) return reference_of_integers(type, op, lhs, rhs);
  const bool is_or = op == ReduceOp::kSum || op == ReduceOp::kMax;
  return is_or ? (lhs != 0 || rhs != 0) : (lhs != 0 && rhs != 0);
}

/// Equal bits, or both NaN where no operand was one: which NaN "infinity minus infinity" is, the processor says.
inline bool agrees(DataType type, Bits expected, Bits got, Bits lhs, Bits rhs) {
  const bool made_nan = is_nan(type, expected) && !is_nan(type, lhs) && !is_nan(type, rhs);
  return expected == got || (made_nan && is_nan(type, got));
}

// ---- Inputs ----

/// Zeros, units, subnormals, the ends of the range, ties of rounding, infinities and NaNs, each with both signs.
inline std::vector<Bits> special_values(DataType type) {
  if (type == DataType::kBool) return {0, 1, 2, 128, 255};
  const Bits sign = sign_bit(type);
  if (!is_floating_point(type)) return {0, 1, 2, 3, 7, 100, sign - 1, sign, sign + 1, sign | (sign - 1)};
  const Bits infinity = infinity_bits(type);
  const Bits smallest_normal = Bits{1} << mantissa_bits(type);
  const Bits one = from_double(type, 1.0);
  std::vector<Bits> values{0,
                           1,
                           2,
                           3,
                           smallest_normal - 1,
                           smallest_normal,
                           smallest_normal + 1,
                           one - 1,
                           one,
                           one + 1,
                           one + 2,
                           from_double(type, 3.0),
                           from_double(type, 0.1),
                           from_double(type, 0x1p-9),
                           from_double(type, 2048.0),
                           infinity - 2,
                           infinity - 1,
                           infinity,
                           infinity + 1,
                           infinity | quiet_bit(type),
                           infinity | quiet_bit(type) | 5,
                           sign - 1};
  const std::size_t positive = values.size();
  for (std::size_t i = 0; i < positive; ++i) values.push_back(values[i] | sign);
  return values;
}

/// Plain numbers, arbitrary bits and special values, mixed.
inline Bits random_element(DataType type, const std::vector<Bits>& specials, std::mt19937_64& random) {
  const Bits draw = random();
  switch (random() % 4) {
    case 0:
      return specials[draw % specials.size()];
    case 1:
      return from_integer(type, draw);
    default:
      if (!is_floating_point(type)) return from_integer(type, draw % 256);
      return from_double(type, static_cast<double>(static_cast<std::int64_t>(draw)) * 0x1p-58);
  }
}

inline std::vector<Bits> random_elements(DataType type, std::size_t count, std::mt19937_64& random) {
  const std::vector<Bits> specials = special_values(type);
  std::vector<Bits> elements(count);
  for (Bits& element : elements) element = random_element(type, specials, random);
  return elements;
}

/// Elements in memory, `offset` elements after an address that suits any vector, and nothing behind them, so that an
/// address sanitizer sees a step too far.
class Elements {
 public:
  Elements(DataType type, const std::vector<Bits>& values, std::size_t offset = 0)
      : bytes_(size_of(type)),
        count_(values.size()),
        offset_(offset),
        memory_(new (std::align_val_t{64}) unsigned char[(offset + values.size()) * bytes_]()) {
    for (std::size_t i = 0; i < count_; ++i) std::memcpy(data() + i * bytes_, &values[i], bytes_);
  }

  unsigned char* data() { return memory_.get() + offset_ * bytes_; }
  std::vector<Bits> values() const {
    std::vector<Bits> values(count_);
    for (std::size_t i = 0; i < count_; ++i) std::memcpy(&values[i], memory_.get() + (offset_ + i) * bytes_, bytes_);
    return values;
  }
  /// Whether what lies before the elements is as it was.
  bool front_is_untouched() const {
    for (std::size_t i = 0; i < offset_ * bytes_; ++i) {
      if (memory_[i] != 0) return false;
    }
    return true;
  }

 private:
  struct Free {
    void operator()(unsigned char* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
  };

  std::size_t bytes_;
  std::size_t count_;
  std::size_t offset_;
  std::unique_ptr<unsigned char[], Free> memory_;
};

}  // namespace hvd::testing
