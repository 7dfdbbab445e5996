// Scaling and division in place against a serial reference, on every instruction set that this machine can run.
#include "ops/reduce/reducer.h"
#include "tests/ops/reduce/reference.h"

namespace hvd {
namespace {

using testing::Bits;
using testing::Elements;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
const double kNanOfOnes = std::bit_cast<double>(0x7fff'ffff'ffff'ffff);  // One carry away from -0 if it were rounded.
constexpr std::array<std::size_t, 10> kCounts{0, 1, 2, 7, 17, 64, 65, 127, 1000, 1031};

class Scaling : public testing::EveryInstructionSet {};

INSTANTIATE_TEST_SUITE_P(Reducer, Scaling, ::testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         testing::instruction_set_name);

std::vector<Bits> scaled(DataType type, const std::vector<Bits>& values, double factor, std::size_t offset = 0) {
  Elements elements(type, values, offset);
  EXPECT_TRUE(scale(elements.data(), type, values.size(), factor).ok());
  EXPECT_TRUE(elements.front_is_untouched());
  return elements.values();
}

std::vector<Bits> divided(DataType type, const std::vector<Bits>& values, int divisor, std::size_t offset = 0) {
  Elements elements(type, values, offset);
  EXPECT_TRUE(divide(elements.data(), type, values.size(), divisor).ok());
  EXPECT_TRUE(elements.front_is_untouched());
  return elements.values();
}

/// Truncates and saturates in long double, which holds every int64.
Bits truncated(DataType type, double value) {
  if (std::isnan(value)) return 0;
  const bool is_unsigned = type == DataType::kUint8 || type == DataType::kBool;
  const Bits sign = testing::sign_bit(type);
  const Bits highest = type == DataType::kBool ? 1 : is_unsigned ? sign | (sign - 1) : sign - 1;
  const long double lowest = is_unsigned ? 0.0L : -static_cast<long double>(sign);
  if (value >= static_cast<long double>(highest)) return highest;
  if (value <= lowest) return testing::from_integer(type, static_cast<Bits>(static_cast<std::int64_t>(lowest)));
  return testing::from_integer(type, static_cast<Bits>(static_cast<std::int64_t>(value)));
}

/// A factor or divisor as floats of `type` meet it.
double as_operand(DataType type, double value) {
  return type == DataType::kFloat64 ? value : static_cast<double>(static_cast<float>(value));
}

Bits reference_scale(DataType type, Bits element, double factor) {
  if (factor == 1.0) return element;
  if (type == DataType::kBool) return truncated(type, (element != 0 ? 1.0 : 0.0) * factor);
  if (!is_floating_point(type)) {
    return truncated(type, static_cast<double>(testing::to_integer(type, element)) * factor);
  }
  if (testing::is_nan(type, element)) return element | testing::quiet_bit(type);
  return testing::from_double(type, testing::to_double(type, element) * as_operand(type, factor));
}

Bits reference_divide(DataType type, Bits element, int divisor) {
  if (divisor == 1 || type == DataType::kBool) return element;
  if (!is_floating_point(type)) {
    return testing::from_integer(type, static_cast<Bits>(testing::to_integer(type, element) / divisor));
  }
  if (testing::is_nan(type, element)) return element | testing::quiet_bit(type);
  return testing::from_double(type, testing::to_double(type, element) / as_operand(type, divisor));
}

TEST_P(Scaling, MultipliesEveryElement) {
  std::mt19937_64 random = testing::generator_of_this_run();
  for (const DataTypeInfo& row : kDataTypes) {
    for (const double factor :
         {1.0, 0.0, -0.0, 0.5, -1.5, 1.0 / 3.0, 0.1, 3e10, -3e38, 1e-30, kInfinity, kNan, kNanOfOnes}) {
      for (const std::size_t count : kCounts) {
        const std::vector<Bits> values = testing::random_elements(row.type, count, random);
        const std::vector<Bits> got = scaled(row.type, values, factor, /*offset=*/count % 4);
        for (std::size_t i = 0; i < values.size(); ++i) {
          const Bits expected = reference_scale(row.type, values[i], factor);
          ASSERT_TRUE(testing::agrees(row.type, expected, got[i], values[i], 0))
              << row.name << " " << std::hex << values[i] << " times " << factor << " gave " << got[i] << ", not "
              << expected;
        }
      }
    }
  }
}

TEST_P(Scaling, DividesEveryElement) {
  std::mt19937_64 random = testing::generator_of_this_run();
  for (const DataTypeInfo& row : kDataTypes) {
    for (const int divisor : {1, 2, 3, 7, 64, 255, 1031, 65'537, std::numeric_limits<int>::max()}) {
      for (const std::size_t count : kCounts) {
        const std::vector<Bits> values = testing::random_elements(row.type, count, random);
        const std::vector<Bits> got = divided(row.type, values, divisor, /*offset=*/count % 4);
        for (std::size_t i = 0; i < values.size(); ++i) {
          const Bits expected = reference_divide(row.type, values[i], divisor);
          ASSERT_EQ(expected, got[i]) << row.name << " bits " << values[i] << " by " << divisor;
        }
      }
    }
  }
}

TEST_P(Scaling, TruncatesQuotientsThatAreNearlyIntegers) {
  for (const int divisor : {2, 3, 46'341, 1'000'003, 2'147'483'647}) {
    std::vector<Bits> values;
    std::vector<Bits> expected;
    for (std::int64_t quotient = 2'147'483'647 / divisor; quotient >= -2'147'483'647 / divisor;
         quotient -= 1 + 4'000'000 / divisor) {
      for (const std::int64_t step : {-1, 0, 1}) {
        const auto value = static_cast<std::int32_t>(quotient * divisor + step);
        values.push_back(static_cast<std::uint32_t>(value));
        expected.push_back(static_cast<std::uint32_t>(value / divisor));
      }
    }
    ASSERT_EQ(divided(DataType::kInt32, values, divisor), expected) << divisor;
  }
}

TEST_P(Scaling, GivesEqualBitsWhereverAnElementSits) {
  for (const DataTypeInfo& row : kDataTypes) {
    for (const Bits value : testing::special_values(row.type)) {
      for (const double factor : {0.1, kInfinity, kNan}) {
        const std::vector<Bits> got = scaled(row.type, std::vector(191, value), factor, /*offset=*/1);
        ASSERT_EQ(got, std::vector(got.size(), got[0])) << row.name << " bits " << value << " times " << factor;
      }
    }
  }
}

TEST_P(Scaling, SaturatesIntegers) {
  EXPECT_EQ(scaled(DataType::kUint8, {200, 7}, -1.0), (std::vector<Bits>{0, 0}));
  EXPECT_EQ(scaled(DataType::kInt8, {100, 156, 3}, 1.5), (std::vector<Bits>{127, 128, 4}));
  EXPECT_EQ(scaled(DataType::kInt64, {Bits{1} << 62, 5}, 2.0), (std::vector<Bits>{(Bits{1} << 63) - 1, 10}));
  EXPECT_EQ(scaled(DataType::kBool, {1, 0, 9}, 2.5), (std::vector<Bits>{1, 0, 1}));
}

TEST(Scale, LeavesEveryBitAloneForFactorAndDivisorOne) {
  const std::vector<Bits> signalling{0x7f80'0001, 0xff80'0001};
  EXPECT_EQ(scaled(DataType::kFloat32, signalling, 1.0), signalling);
  EXPECT_EQ(divided(DataType::kFloat32, signalling, 1), signalling);
}

TEST(Scale, TakesANullPointerForNoElements) {
  for (const DataTypeInfo& row : kDataTypes) {
    EXPECT_TRUE(scale(nullptr, row.type, 0, 0.5).ok()) << row.name;
    EXPECT_TRUE(divide(nullptr, row.type, 0, 3).ok()) << row.name;
  }
}

TEST(Scale, RefusesUnknownTypesAndDivisorsBelowOne) {
  float data = 1.0f;
  EXPECT_EQ(scale(&data, static_cast<DataType>(2), 1, 1.0).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(divide(&data, static_cast<DataType>(11), 1, 1).code(), StatusCode::kInvalidArgument);
  for (const int divisor : {0, -1}) {
    const Status status = divide(&data, DataType::kFloat32, 1, divisor);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.text().find("float32"), std::string::npos) << status.text();
  }
  EXPECT_EQ(data, 1.0f);
}

}  // namespace
}  // namespace hvd
