// Conversions of float16 and bfloat16: all 65,536 values, and roundings at and around every tie.
#include "common/half.h"

#include "tests/ops/reduce/reference.h"

namespace hvd {
namespace {

struct Format {
  DataType type;
  float (*widen)(std::uint16_t);
  std::uint16_t (*narrow)(float);
};

constexpr std::array kFormats{Format{DataType::kFloat16, float16_to_float, float_to_float16},
                              Format{DataType::kBfloat16, bfloat16_to_float, float_to_bfloat16}};

/// The value of a half from its fields, in double.
double value_of_fields(DataType type, std::uint16_t half) {
  const int digits = testing::mantissa_bits(type);
  const int bias = type == DataType::kFloat16 ? 15 : 127;
  const int exponent = (half & 0x7fff) >> digits;
  const int mantissa = half & ((1 << digits) - 1);
  const double value = exponent == 0 ? std::ldexp(mantissa, 1 - bias - digits)
                                     : std::ldexp(mantissa + (1 << digits), exponent - bias - digits);
  return half & 0x8000 ? -value : value;
}

/// Floats that decide about roundings: every half, the middle to the next one, and the floats beside both.
std::vector<float> floats_to_round(const Format& format) {
  std::vector<float> floats;
  for (std::uint32_t half = 0; half < 0x10000u; ++half) {
    const auto bits = std::bit_cast<std::uint32_t>(format.widen(static_cast<std::uint16_t>(half)));
    const float next = format.widen(static_cast<std::uint16_t>(half + 1));
    const auto middle = std::bit_cast<std::uint32_t>((std::bit_cast<float>(bits) + next) / 2);
    for (const std::uint32_t base : {bits, middle}) {
      for (const std::uint32_t step : {~0u, 0u, 1u}) floats.push_back(std::bit_cast<float>(base + step));
    }
  }
  return floats;
}

TEST(Half, WidensEveryValueExactly) {
  for (const Format& format : kFormats) {
    for (std::uint32_t i = 0; i < 0x10000u; ++i) {
      const auto half = static_cast<std::uint16_t>(i);
      if ((half & 0x7fffu) >= testing::infinity_bits(format.type)) continue;
      const double expected = value_of_fields(format.type, half);
      const auto got = static_cast<double>(format.widen(half));
      ASSERT_EQ(std::bit_cast<std::uint64_t>(got), std::bit_cast<std::uint64_t>(expected)) << std::hex << half;
    }
  }
}

TEST(Half, ReturnsEveryValueAfterThereAndBackWithNansMadeQuiet) {
  for (const Format& format : kFormats) {
    for (std::uint32_t i = 0; i < 0x10000u; ++i) {
      const auto half = static_cast<std::uint16_t>(i);
      const auto quiet = testing::is_nan(format.type, half) ? testing::quiet_bit(format.type) : 0;
      ASSERT_EQ(format.narrow(format.widen(half)), half | quiet) << name_of(format.type) << std::hex << " " << half;
    }
  }
}

TEST(Half, RoundsToTheNearestOfTwoNeighboursAndTiesToEven) {
  for (const Format& format : kFormats) {
    for (const float value : floats_to_round(format)) {
      if (std::isnan(value)) continue;
      const std::uint16_t got = format.narrow(value);
      ASSERT_EQ((got & 0x8000u) != 0, std::signbit(value)) << value;
      if (std::isinf(value)) {
        ASSERT_EQ(got & 0x7fffu, testing::infinity_bits(format.type));
        continue;
      }
      // Infinity stands for the number that the next exponent would give.
      const auto magnitude = static_cast<std::uint16_t>(got & 0x7fffu);
      const double target = std::abs(static_cast<double>(value));
      const double distance = std::abs(value_of_fields(format.type, magnitude) - target);
      const auto up = static_cast<std::uint16_t>(magnitude + 1);
      const double up_distance = value_of_fields(format.type, up) - target;
      ASSERT_TRUE(distance < up_distance || (distance == up_distance && magnitude % 2 == 0) ||
                  magnitude == testing::infinity_bits(format.type))
          << value;
      if (magnitude == 0) continue;
      const auto down = static_cast<std::uint16_t>(magnitude - 1);
      const double down_distance = target - value_of_fields(format.type, down);
      ASSERT_TRUE(
          distance < down_distance || (distance == down_distance && magnitude % 2 == 0) ||
          (magnitude == testing::infinity_bits(format.type) && target > value_of_fields(format.type, magnitude)))
          << value;
    }
  }
}

TEST(Half, KeepsSignAndUpperPayloadOfNans) {
  EXPECT_EQ(float_to_float16(std::bit_cast<float>(0xff80'2001u)), 0xfe01u);
  EXPECT_EQ(float_to_float16(std::bit_cast<float>(0x7f80'0001u)), 0x7e00u);
  EXPECT_EQ(float_to_bfloat16(std::bit_cast<float>(0xff81'0001u)), 0xffc1u);
  EXPECT_EQ(float_to_bfloat16(std::bit_cast<float>(0x7fff'ffffu)), 0x7fffu);
}

#ifdef __FLT16_MAX__
__extension__ typedef _Float16 CompilerHalf;

TEST(Half, AgreesWithTheCompilersFloat16) {
  for (std::uint32_t i = 0; i < 0x10000u; ++i) {
    const auto half = static_cast<std::uint16_t>(i);
    const auto expected = static_cast<float>(std::bit_cast<CompilerHalf>(half));
    ASSERT_EQ(std::bit_cast<std::uint32_t>(float16_to_float(half)), std::bit_cast<std::uint32_t>(expected));
  }
  std::mt19937_64 random = testing::generator_of_this_run();
  std::vector<float> floats = floats_to_round(kFormats[0]);
  for (int i = 0; i < 200'000; ++i) floats.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(random())));
  for (const float value : floats) {
    const auto expected = std::bit_cast<std::uint16_t>(static_cast<CompilerHalf>(value));
    ASSERT_EQ(float_to_float16(value), expected) << value << std::hex << " " << std::bit_cast<std::uint32_t>(value);
  }
}
#endif

}  // namespace
}  // namespace hvd
