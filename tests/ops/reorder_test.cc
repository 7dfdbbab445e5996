// Dense strides as an order, and copies between an order and C order, against index arithmetic.

#include "ops/reorder.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>

namespace hvd::testing {
namespace {

using Sizes = std::vector<std::int64_t>;

std::int64_t count_of(const Sizes& shape) {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

// The dense strides with the dimensions from the slowest to the fastest as `slowest_first` says.
Sizes strides_in(const Sizes& shape, const std::vector<std::size_t>& slowest_first) {
  Sizes strides(shape.size());
  std::int64_t block = 1;
  for (auto dimension = slowest_first.rbegin(); dimension != slowest_first.rend(); ++dimension) {
    strides[*dimension] = block;
    block *= shape[*dimension];
  }
  return strides;
}

// Calls visit(slowest_first, strides) for all orders of a shape.
template <typename Visit>
void for_each_order(const Sizes& shape, Visit visit) {
  std::vector<std::size_t> slowest_first(shape.size());
  std::iota(slowest_first.begin(), slowest_first.end(), std::size_t{0});
  do {
    visit(strides_in(shape, slowest_first));
  } while (std::next_permutation(slowest_first.begin(), slowest_first.end()));
}

TEST(MemoryOrder, IsZeroForCOrderAndAnotherNumberForEachOtherOrder) {
  const Sizes shape{2, 3, 4, 5};
  std::set<MemoryOrder> orders;
  for_each_order(shape, [&](const Sizes& strides) {
    Result<MemoryOrder> order = memory_order(shape, strides);
    ASSERT_TRUE(order.ok()) << order.status().text();
    EXPECT_EQ(strides_of(shape, *order), strides);
    orders.insert(*order);
  });
  EXPECT_EQ(orders.size(), 24u);
  EXPECT_EQ(memory_order(shape, Sizes{60, 20, 5, 1}).value(), kCOrder);
}

TEST(MemoryOrder, DimensionsOfSizeOneDoNotCount) {
  EXPECT_EQ(memory_order(Sizes{7, 1, 5}, Sizes{5, 999, 1}).value(), kCOrder);
  EXPECT_EQ(memory_order(Sizes{1, 7, 1, 5, 1}, Sizes{-3, 1, 0, 7, 12}).value(),
            memory_order(Sizes{7, 5}, Sizes{1, 7}).value());
  // channels_last of one channel is C order, and so is that of one pixel.
  EXPECT_EQ(memory_order(Sizes{2, 1, 3, 4}, Sizes{12, 1, 4, 1}).value(), kCOrder);
  EXPECT_EQ(memory_order(Sizes{2, 3, 1, 1}, Sizes{3, 1, 3, 3}).value(), kCOrder);
  EXPECT_EQ(memory_order(Sizes{}, Sizes{}).value(), kCOrder);
  EXPECT_EQ(memory_order(Sizes{1}, Sizes{17}).value(), kCOrder);
}

TEST(MemoryOrder, OfATensorWithoutElementsIsCOrder) {
  EXPECT_EQ(memory_order(Sizes{3, 0, 5}, Sizes{1, 99, -4}).value(), kCOrder);
}

TEST(MemoryOrder, RefusesGapsOverlapsAndBackwardStridesWithBothLists) {
  for (const Sizes& strides : {Sizes{8, 1}, Sizes{0, 1}, Sizes{1, 1}, Sizes{-4, 1}, Sizes{2, 3}, Sizes{4, 2}}) {
    const Result<MemoryOrder> order = memory_order(Sizes{3, 4}, strides);
    EXPECT_EQ(order.status().code(), StatusCode::kInvalidArgument);
    EXPECT_NE(order.status().text().find(fmt::format("strides [{}] of shape [3, 4]", fmt::join(strides, ", "))),
              std::string::npos)
        << order.status().text();
  }
}

TEST(MemoryOrder, TakesSixteenDimensionsInAnyOrderAndMoreInCOrder) {
  for (const std::size_t dimensions : {16u, 17u, 20u}) {
    const Sizes shape(dimensions, 2);
    std::vector<std::size_t> order(dimensions);
    std::iota(order.begin(), order.end(), std::size_t{0});
    EXPECT_EQ(memory_order(shape, strides_in(shape, order)).value(), kCOrder);
    std::reverse(order.begin(), order.end());
    Result<MemoryOrder> reversed = memory_order(shape, strides_in(shape, order));
    EXPECT_EQ(reversed.ok(), dimensions <= kMostOrderedDimensions);
    if (!reversed.ok()) continue;
    EXPECT_EQ(strides_of(shape, *reversed), strides_in(shape, order));
  }
}

// Bytes that tell elements apart.
std::vector<std::byte> numbered(std::size_t bytes) {
  std::vector<std::byte> values(bytes);
  for (std::size_t i = 0; i < bytes; ++i) values[i] = static_cast<std::byte>(i * 7 + i / 251);
  return values;
}

void check_copies(const Sizes& shape, const Sizes& strides, std::size_t element) {
  const auto count = static_cast<std::size_t>(count_of(shape));
  const std::vector<std::byte> memory = numbered(count * element);
  std::vector<std::byte> expected(memory.size());
  for (std::size_t i = 0; i < count; ++i) {
    auto left = static_cast<std::int64_t>(i);
    std::int64_t place = 0;
    for (std::size_t d = shape.size(); d-- > 0; left /= shape[d]) place += left % shape[d] * strides[d];
    std::copy_n(memory.begin() + place * static_cast<std::int64_t>(element), element,
                expected.begin() + static_cast<std::ptrdiff_t>(i * element));
  }
  const MemoryOrder order = memory_order(shape, strides).value();
  std::vector<std::byte> packed(memory.size(), std::byte{0xee});
  copy_to_c_order(memory.data(), order, packed.data(), shape, element);
  EXPECT_EQ(packed, expected) << fmt::format("shape {} strides {} element {}", shape, strides, element);
  std::vector<std::byte> back(memory.size(), std::byte{0xee});
  copy_from_c_order(packed.data(), back.data(), order, shape, element);
  EXPECT_EQ(back, memory) << fmt::format("shape {} strides {} element {}", shape, strides, element);
}

TEST(Reorder, GivesEveryOrderOfEveryElementSizeAndBack) {
  const std::vector<Sizes> shapes{{},      {1},       {17},         {1, 1},       {2, 1, 3}, {17, 31},
                                  {16, 5}, {2, 3, 5}, {7, 2, 1, 3}, {3, 4, 5, 2}, {0},       {4, 0, 3}};
  for (const Sizes& shape : shapes) {
    for (const std::size_t element : {1u, 2u, 4u, 8u}) {
      for_each_order(shape, [&](const Sizes& strides) { check_copies(shape, strides, element); });
    }
  }
}

TEST(Reorder, ChannelsLastOfFourAndFiveDimensions) {
  check_copies({3, 19, 5, 7}, strides_in({3, 19, 5, 7}, {0, 2, 3, 1}), 4);
  check_copies({2, 33, 3, 4, 5}, strides_in({2, 33, 3, 4, 5}, {0, 2, 3, 4, 1}), 2);
}

TEST(Reorder, TouchesNoMemoryWhereThereAreNoElements) {
  copy_to_c_order(nullptr, kCOrder, nullptr, Sizes{0, 3}, 4);
  copy_from_c_order(nullptr, nullptr, kCOrder, Sizes{3, 0}, 4);
}

}  // namespace
}  // namespace hvd::testing
