// The kernel's arithmetic, run on the host, against scale() and divide(): equal bits for every element.
#include "ops/device/cuda/element_math.h"

#include "ops/reduce/reducer.h"
#include "tests/ops/reduce/reference.h"

namespace hvd::cuda {
namespace {

using testing::Bits;
using testing::Elements;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr std::array kFactors{1.0,   0.0,  -0.0,  0.5,       1.0 / 3.0, 0.1,   -1.5,          3e10,
                              -3e38, 1e40, 1e-30, kInfinity, kNan,      -kNan, 1.0 + 0x1p-50, 0.125};
constexpr std::array kDivisors{1, 2, 3, 7, 8, 64, 255, 1031, 65'537, 1 << 30, std::numeric_limits<int>::max()};

template <class From, class To, Mode kMode>
std::vector<Bits> computed(const DeviceConversion& conversion, const std::vector<Bits>& values) {
  const Convert<From, To, kMode> convert(conversion);
  std::vector<Bits> results;
  for (const Bits value : values) {
    From element;
    std::memcpy(&element, &value, sizeof element);
    const To result = convert(element);
    std::memcpy(&results.emplace_back(0), &result, sizeof result);
  }
  return results;
}

template <class From, class To = From>
std::vector<Bits> computed_in_mode(const DeviceConversion& conversion, const std::vector<Bits>& values) {
  switch (mode_of(conversion)) {
    case Mode::kMove:
      return computed<From, To, Mode::kMove>(conversion, values);
    case Mode::kScale:
      return computed<From, To, Mode::kScale>(conversion, values);
    case Mode::kDivide:
      return computed<From, To, Mode::kDivide>(conversion, values);
    case Mode::kScaleAndDivide:
      return computed<From, To, Mode::kScaleAndDivide>(conversion, values);
  }
  return {};
}

/// What a launch gives for these elements.
std::vector<Bits> converted(const DeviceConversion& given, const std::vector<Bits>& values) {
  const DeviceConversion conversion = simplest(given);
  switch (conversion.from_type) {
    case DataType::kUint8:
      return computed_in_mode<std::uint8_t>(conversion, values);
    case DataType::kInt8:
      return computed_in_mode<std::int8_t>(conversion, values);
    case DataType::kInt16:
      return conversion.to_type == DataType::kInt32 ? computed_in_mode<std::int16_t, std::int32_t>(conversion, values)
                                                    : computed_in_mode<std::int16_t>(conversion, values);
    case DataType::kInt32:
      return conversion.to_type == DataType::kInt16 ? computed_in_mode<std::int32_t, std::int16_t>(conversion, values)
                                                    : computed_in_mode<std::int32_t>(conversion, values);
    case DataType::kInt64:
      return computed_in_mode<std::int64_t>(conversion, values);
    case DataType::kFloat16:
      return computed_in_mode<Float16>(conversion, values);
    case DataType::kFloat32:
      return computed_in_mode<float>(conversion, values);
    case DataType::kFloat64:
      return computed_in_mode<double>(conversion, values);
    case DataType::kBool:
      return computed_in_mode<Bool>(conversion, values);
    case DataType::kBfloat16:
      return computed_in_mode<Bfloat16>(conversion, values);
  }
  return {};
}

std::vector<Bits> on_the_host(const DeviceConversion& conversion, const std::vector<Bits>& values) {
  Elements elements(conversion.from_type, values);
  EXPECT_TRUE(scale(elements.data(), conversion.from_type, values.size(), conversion.factor).ok());
  EXPECT_TRUE(divide(elements.data(), conversion.from_type, values.size(), conversion.divisor).ok());
  std::vector<Bits> results = elements.values();
  if (conversion.from_type == conversion.to_type) return results;
  for (Bits& bits : results) {
    bits =
        testing::from_integer(conversion.to_type, static_cast<Bits>(testing::to_integer(conversion.from_type, bits)));
  }
  return results;
}

/// Every value of the small types; special and random ones of the others.
std::vector<Bits> values_of(DataType type, std::mt19937_64& random) {
  if (size_of(type) > 2) {
    std::vector<Bits> values = testing::random_elements(type, 3000, random);
    for (const Bits special : testing::special_values(type)) values.push_back(special);
    return values;
  }
  std::vector<Bits> values(std::size_t{1} << (8 * size_of(type)));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = i;
  return values;
}

void expect_equal(const DeviceConversion& conversion, const std::vector<Bits>& values) {
  const std::vector<Bits> expected = on_the_host(conversion, values);
  const std::vector<Bits> got = converted(conversion, values);
  for (std::size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(expected[i], got[i]) << name_of(conversion.from_type) << " to " << name_of(conversion.to_type)
                                   << ", bits " << std::hex << values[i] << " times " << conversion.factor << " by "
                                   << std::dec << conversion.divisor;
  }
}

TEST(ElementMath, GivesTheBitsOfTheHost) {
  std::mt19937_64 random = testing::generator_of_this_run();
  for (const DataTypeInfo& row : kDataTypes) {
    const std::vector<Bits> values = values_of(row.type, random);
    for (const double factor : kFactors) {
      for (const int divisor : kDivisors) {
        ASSERT_NO_FATAL_FAILURE(expect_equal({row.type, row.type, factor, divisor}, values));
      }
    }
  }
}

TEST(ElementMath, WidensAndNarrowsIntegers) {
  std::mt19937_64 random = testing::generator_of_this_run();
  const std::pair<DataType, DataType> pairs[] = {{DataType::kInt16, DataType::kInt32},
                                                 {DataType::kInt32, DataType::kInt16}};
  for (const auto& [from, to] : pairs) {
    const std::vector<Bits> values = values_of(from, random);
    for (const double factor : {1.0, 0.5, -3e10}) {
      for (const int divisor : {1, 3}) {
        ASSERT_NO_FATAL_FAILURE(expect_equal({from, to, factor, divisor}, values));
      }
    }
  }
}

TEST(ElementMath, FillsWithTheBitsOfOneElement) {
  DeviceConversion conversion;
  conversion.fill = 0x1122'3344'5566'7788;
  EXPECT_EQ(Fill<std::uint8_t>(conversion)(), 0x88);
  EXPECT_EQ(Fill<std::int16_t>(conversion)(), 0x7788);
  EXPECT_EQ(Fill<std::uint64_t>(conversion)(), 0x1122'3344'5566'7788u);
}

}  // namespace
}  // namespace hvd::cuda
