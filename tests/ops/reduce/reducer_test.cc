// Reductions against a serial reference, on every instruction set that this machine can run.
#include "ops/reduce/reducer.h"

#include "tests/ops/reduce/reference.h"

namespace hvd {
namespace {

using testing::Bits;
using testing::Elements;
using testing::EveryInstructionSet;

enum class Output { kSeparate, kIsLhs, kIsRhs };

CombineFunction combine_function(DataType type, ReduceOp op) { return find_reducer(type, op).value().combine; }

std::vector<Bits> combined(DataType type, ReduceOp op, const std::vector<Bits>& lhs, const std::vector<Bits>& rhs,
                           std::size_t offset = 0, Output output = Output::kSeparate) {
  Elements left(type, lhs, offset);
  Elements right(type, rhs, 2 * offset);
  Elements separate(type, std::vector<Bits>(lhs.size(), 0), 3 * offset);
  Elements& out = output == Output::kIsLhs ? left : output == Output::kIsRhs ? right : separate;
  combine_function(type, op)(out.data(), left.data(), right.data(), lhs.size());
  EXPECT_TRUE(out.front_is_untouched());
  EXPECT_TRUE(output == Output::kIsLhs || left.values() == lhs) << "changed the left operand";
  EXPECT_TRUE(output == Output::kIsRhs || right.values() == rhs) << "changed the right operand";
  return out.values();
}

std::string describe(DataType type, ReduceOp op) { return std::string(name_of(op)) + " of " + name_of(type).data(); }

void expect_reference(DataType type, ReduceOp op, const std::vector<Bits>& lhs, const std::vector<Bits>& rhs,
                      const std::vector<Bits>& got) {
  ASSERT_EQ(got.size(), lhs.size());
  for (std::size_t i = 0; i < lhs.size(); ++i) {
    const Bits expected = testing::reference(type, op, lhs[i], rhs[i]);
    ASSERT_TRUE(testing::agrees(type, expected, got[i], lhs[i], rhs[i]))
        << describe(type, op) << std::hex << ": " << lhs[i] << " with " << rhs[i] << " gave " << got[i] << ", not "
        << expected << std::dec << ", at " << i << " of " << lhs.size();
  }
}

/// Every pair of special values, as two lists.
std::pair<std::vector<Bits>, std::vector<Bits>> special_pairs(DataType type) {
  const std::vector<Bits> specials = testing::special_values(type);
  std::pair<std::vector<Bits>, std::vector<Bits>> pairs;
  for (const Bits lhs : specials) {
    for (const Bits rhs : specials) {
      pairs.first.push_back(lhs);
      pairs.second.push_back(rhs);
    }
  }
  return pairs;
}

template <class Test>
void for_each_reduction(Test test) {
  for (const DataTypeInfo& row : kDataTypes) {
    for (const ReduceOp op : testing::kCombiningOps) test(row.type, op);
  }
}

INSTANTIATE_TEST_SUITE_P(Reducer, EveryInstructionSet, ::testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         testing::instruction_set_name);

TEST_P(EveryInstructionSet, GivesTheReferenceForEverySizeOffsetAndOutput) {
  std::mt19937_64 random = testing::generator_of_this_run();
  for_each_reduction([&](DataType type, ReduceOp op) {
    for (const std::size_t count : {0, 1, 2, 3, 7, 16, 17, 31, 63, 64, 65, 127, 1000, 1031}) {
      for (const std::size_t offset : {0, 1, 3}) {
        for (const Output output : {Output::kSeparate, Output::kIsLhs, Output::kIsRhs}) {
          const std::vector<Bits> lhs = testing::random_elements(type, count, random);
          const std::vector<Bits> rhs = testing::random_elements(type, count, random);
          expect_reference(type, op, lhs, rhs, combined(type, op, lhs, rhs, offset, output));
          if (HasFatalFailure()) return;
        }
      }
    }
  });
}

TEST_P(EveryInstructionSet, GivesTheReferenceForEveryPairOfSpecialValues) {
  for_each_reduction([](DataType type, ReduceOp op) {
    const auto [lhs, rhs] = special_pairs(type);
    expect_reference(type, op, lhs, rhs, combined(type, op, lhs, rhs));
  });
}

TEST_P(EveryInstructionSet, TakesEveryValueOfSixteenBitsAgainstSpecialOnes) {
  std::vector<Bits> all(65'536);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = i;
  for (const DataType type : {DataType::kFloat16, DataType::kBfloat16}) {
    for (const ReduceOp op : testing::kCombiningOps) {
      for (const Bits other : testing::special_values(type)) {
        const std::vector<Bits> others(all.size(), other);
        expect_reference(type, op, all, others, combined(type, op, all, others));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(EveryInstructionSet, GivesEqualBitsWhereverTheElementsSit) {
  for_each_reduction([](DataType type, ReduceOp op) {
    const std::vector<Bits> specials = testing::special_values(type);
    for (const Bits lhs : specials) {
      for (const Bits rhs : specials) {
        // A body of vectors and a tail, for every width.
        const std::vector<Bits> got = combined(type, op, std::vector(191, lhs), std::vector(191, rhs), /*offset=*/1);
        ASSERT_EQ(got, std::vector(got.size(), got[0])) << describe(type, op) << std::hex << lhs << ", " << rhs;
      }
    }
  });
}

TEST_P(EveryInstructionSet, GivesTheBitsOfTheBestInstructionSet) {
  std::mt19937_64 random = testing::generator_of_this_run();
  for_each_reduction([&](DataType type, ReduceOp op) {
    auto [lhs, rhs] = special_pairs(type);
    for (const Bits element : testing::random_elements(type, 1000, random)) lhs.push_back(element);
    for (const Bits element : testing::random_elements(type, 1000, random)) rhs.push_back(element);
    hwy::SetSupportedTargetsForTest(GetParam());
    const std::vector<Bits> got = combined(type, op, lhs, rhs);
    hwy::SetSupportedTargetsForTest(0);
    ASSERT_EQ(got, combined(type, op, lhs, rhs)) << describe(type, op);
  });
}

TEST_P(EveryInstructionSet, LetsTheLeftNanWinInSumsWhicheverComesFirst) {
  const std::vector<Bits> a(5, 0x7fc0'0001);
  const std::vector<Bits> b(5, 0xffc0'0002);
  for (const ReduceOp op : testing::kCombiningOps) {
    EXPECT_EQ(combined(DataType::kFloat32, op, a, b), a) << name_of(op);
    EXPECT_EQ(combined(DataType::kFloat32, op, b, a), b) << name_of(op);
  }
}

TEST_P(EveryInstructionSet, WrapsIntegers) {
  const auto one = [](DataType type, ReduceOp op, Bits lhs, Bits rhs) { return combined(type, op, {lhs}, {rhs})[0]; };
  EXPECT_EQ(one(DataType::kUint8, ReduceOp::kSum, 200, 100), 44u);
  EXPECT_EQ(one(DataType::kInt8, ReduceOp::kSum, 127, 1), 128u);
  EXPECT_EQ(one(DataType::kInt8, ReduceOp::kProduct, 128, 255), 128u) << "-128 times -1";
  EXPECT_EQ(one(DataType::kInt16, ReduceOp::kProduct, 300, 300), 90'000u - 65'536u);
  EXPECT_EQ(one(DataType::kInt32, ReduceOp::kSum, 0x7fff'ffff, 1), 0x8000'0000u);
  EXPECT_EQ(one(DataType::kInt64, ReduceOp::kProduct, 0x7fff'ffff'ffff'ffff, 2), 0xffff'ffff'ffff'fffeu);
}

TEST_P(EveryInstructionSet, RoundsHalvesOnceToNearestEven) {
  const auto sum = [](DataType type, double lhs, double rhs) {
    const std::vector<Bits> a(3, testing::from_double(type, lhs));
    const std::vector<Bits> b(3, testing::from_double(type, rhs));
    return testing::to_double(type, combined(type, ReduceOp::kSum, a, b)[2]);
  };
  EXPECT_EQ(sum(DataType::kFloat16, 2048, 1), 2048);
  EXPECT_EQ(sum(DataType::kFloat16, 2048, 3), 2052);
  EXPECT_EQ(sum(DataType::kFloat16, 65'504, 15), 65'504);
  EXPECT_EQ(sum(DataType::kFloat16, 65'504, 16), std::numeric_limits<double>::infinity());
  EXPECT_EQ(sum(DataType::kBfloat16, 256, 1), 256);
  EXPECT_EQ(sum(DataType::kBfloat16, 256, 3), 260);
}

TEST(FindReducer, TellsTheSizeOfEveryElement) {
  for_each_reduction([](DataType type, ReduceOp op) {
    EXPECT_EQ(find_reducer(type, op).value().element_bytes, size_of(type)) << describe(type, op);
  });
}

TEST(FindReducer, ReducesAveragesLikeSums) {
  for (const DataTypeInfo& row : kDataTypes) {
    EXPECT_EQ(combine_function(row.type, ReduceOp::kAverage), combine_function(row.type, ReduceOp::kSum)) << row.name;
  }
}

TEST(FindReducer, TakesNullPointersForNoElements) {
  for_each_reduction([](DataType type, ReduceOp op) { combine_function(type, op)(nullptr, nullptr, nullptr, 0); });
}

TEST(FindReducer, RefusesAdasumAndNumbersOutsideTheEnumerations) {
  for (const DataTypeInfo& row : kDataTypes) {
    for (const int op : {2, 6, 255}) {
      const Status status = find_reducer(row.type, static_cast<ReduceOp>(op)).status();
      EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << row.name << ", reduction " << op;
    }
  }
  for (const int type : {2, 11, 255}) {
    const Status status = find_reducer(static_cast<DataType>(type), ReduceOp::kSum).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.text().find(std::to_string(type)), std::string::npos) << status.text();
  }
}

}  // namespace
}  // namespace hvd
