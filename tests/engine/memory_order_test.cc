// Tensors in other orders of memory than C order, each rank a thread of this process: alike on all ranks, and not.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "tests/support/rank_threads.h"

namespace hvd::testing {
namespace {

// Where element `i` of C order lies in the memory of a tensor of `shape` in `order`.
std::vector<std::size_t> places_of(const Shape& shape, MemoryOrder order) {
  const std::vector<std::int64_t> strides = strides_of(shape, order);
  std::vector<std::size_t> places(static_cast<std::size_t>(element_count(shape).value()));
  for (std::size_t i = 0; i < places.size(); ++i) {
    auto left = static_cast<std::int64_t>(i);
    for (std::size_t d = shape.size(); d-- > 0; left /= shape[d]) {
      places[i] += static_cast<std::size_t>(left % shape[d] * strides[d]);
    }
  }
  return places;
}

MemoryOrder order_by(const Shape& shape, const std::vector<std::int64_t>& strides) {
  return memory_order(shape, strides).value();
}

MemoryOrder reversed(const Shape& shape) {
  std::vector<std::int64_t> strides;
  std::int64_t block = 1;
  for (const std::int64_t size : shape) {
    strides.push_back(block);
    block *= size;
  }
  return order_by(shape, strides);
}

MemoryOrder channels_last(const Shape& shape) {  // of four dimensions
  return order_by(shape, {shape[1] * shape[2] * shape[3], 1, shape[3] * shape[1], shape[1]});
}

// A tensor whose element number i is i % 97 + rank.
struct Tensor {
  Tensor(Shape sizes, MemoryOrder laid_out, int rank)
      : shape(std::move(sizes)), order(laid_out), places(places_of(shape, order)), memory(places.size()) {
    for (std::size_t i = 0; i < places.size(); ++i) {
      memory[places[i]] = static_cast<float>(i % 97) + static_cast<float>(rank);
    }
    output.assign(memory.size(), -1.0f);
  }
  TensorEntry entry(OpKind op, const std::string& name, bool in_place) {
    std::vector<float>& result = in_place ? memory : output;
    TensorEntry made = make_entry(op, name, DataType::kFloat32, shape, memory.data(), result.data());
    made.request.order = order;
    return made;
  }
  void expect_sum(int size, bool in_place) const { expect(static_cast<float>(size), size * (size - 1) / 2, in_place); }
  void expect_of_rank(int rank, bool in_place) const { expect(1.0f, rank, in_place); }
  void expect(float factor, int sum, bool in_place) const {
    const std::vector<float>& result = in_place ? memory : output;
    for (std::size_t i = 0; i < places.size(); ++i) {
      ASSERT_EQ(result[places[i]], static_cast<float>(i % 97) * factor + static_cast<float>(sum))
          << "element " << i << " of " << shape_text(shape) << " in order " << order;
    }
  }

  Shape shape;
  MemoryOrder order;
  std::vector<std::size_t> places;
  std::vector<float> memory;
  std::vector<float> output;
};

const std::vector<Shape> kShapes{{1, 1, 1, 1}, {2, 3, 4, 5}, {3, 0, 2, 2}, {7, 16, 9, 17}, {31, 17, 1, 1}};

std::int64_t reordered(TestRank& hvd) { return hvd.runtime().statistics().executor.bytes_reordered.value(); }

TEST(MemoryOrders, AreUsedAsTheyLieWhereAllRanksHaveTheSame) {
  for (const int size : {1, 2, 3, 4}) {
    run_ranks(size, [size](TestRank& hvd) {
      for (const Shape& shape : kShapes) {
        for (const MemoryOrder order : {kCOrder, reversed(shape), channels_last(shape)}) {
          for (const bool in_place : {true, false}) {
            Tensor sum(shape, order, hvd.rank());
            ASSERT_TRUE(hvd.wait(hvd.enqueue(sum.entry(OpKind::kAllreduce, "sum", in_place))).ok());
            sum.expect_sum(size, in_place);
            Tensor sent(shape, order, hvd.rank());
            TensorEntry entry = sent.entry(OpKind::kBroadcast, "sent", in_place);
            entry.request.root_rank = size - 1;
            ASSERT_TRUE(hvd.wait(hvd.enqueue(std::move(entry))).ok());
            sent.expect_of_rank(size - 1, in_place);
          }
        }
      }
      EXPECT_EQ(reordered(hvd), 0);
    });
  }
}

TEST(MemoryOrders, AreTheirOwnOnEachRankAndTheResultIsRight) {
  for (const int size : {2, 3, 4}) {
    run_ranks(size, [size](TestRank& hvd) {
      std::int64_t bytes = 0;
      for (const Shape& shape : kShapes) {
        const std::vector<MemoryOrder> orders{kCOrder, channels_last(shape), reversed(shape)};
        for (int shift = 0; shift < 3; ++shift) {
          const auto of_rank = [&](int rank) { return orders[static_cast<std::size_t>(rank + shift) % orders.size()]; };
          const MemoryOrder order = of_rank(hvd.rank());
          bool differ = false;
          for (int rank = 1; rank < size; ++rank) differ = differ || of_rank(rank) != of_rank(0);
          for (const bool in_place : {true, false}) {
            Tensor sum(shape, order, hvd.rank());
            ASSERT_TRUE(hvd.wait(hvd.enqueue(sum.entry(OpKind::kAllreduce, "sum", in_place))).ok());
            sum.expect_sum(size, in_place);
            Tensor sent(shape, order, hvd.rank());
            TensorEntry entry = sent.entry(OpKind::kBroadcast, "sent", in_place);
            entry.request.root_rank = 1;
            ASSERT_TRUE(hvd.wait(hvd.enqueue(std::move(entry))).ok());
            sent.expect_of_rank(1, in_place);
            if (differ && order != kCOrder) {
              bytes += 2 * static_cast<std::int64_t>(sum.memory.size() * sizeof(float));
            }
          }
        }
      }
      EXPECT_EQ(reordered(hvd), bytes) << "what lies in C order, or alike on all ranks, is not copied";
    });
  }
}

TEST(MemoryOrders, MayChangeFromCallToCallUnderARememberedName) {
  run_ranks(3, [](TestRank& hvd) {
    const Shape shape{4, 3, 2, 5};
    const MemoryOrder other = channels_last(shape);
    // By call: in C order, alike, one rank differs, another one does, alike, in C order.
    const std::vector<std::vector<MemoryOrder>> calls{
        {kCOrder, kCOrder, kCOrder},     {other, other, other}, {other, kCOrder, other},    {kCOrder, kCOrder, other},
        {other, reversed(shape), other}, {other, other, other}, {kCOrder, kCOrder, kCOrder}};
    for (const std::vector<MemoryOrder>& orders : calls) {
      for (int repeat = 0; repeat < 3; ++repeat) {
        const std::int64_t before = reordered(hvd);
        const MemoryOrder own = orders[static_cast<std::size_t>(hvd.rank())];
        Tensor sum(shape, own, hvd.rank());
        ASSERT_TRUE(hvd.wait(hvd.enqueue(sum.entry(OpKind::kAllreduce, "x", /*in_place=*/true))).ok());
        sum.expect_sum(3, /*in_place=*/true);
        const bool alike = std::all_of(orders.begin(), orders.end(), [&](auto one) { return one == orders.front(); });
        EXPECT_EQ(reordered(hvd) > before, !alike && own != kCOrder);
      }
    }
    // Of three calls alike the later two are remembered.
    EXPECT_GE(hvd.runtime().statistics().cache_hits.value(), 8);
  });
}

TEST(MemoryOrders, OfFusedTensorsAndOfGroupsAreEachTheirOwn) {
  run_ranks(3, [](TestRank& hvd) {
    const Shape shape{2, 3, 4, 5};
    const std::vector<MemoryOrder> orders{kCOrder, channels_last(shape), reversed(shape)};
    for (int round = 0; round < 5; ++round) {
      std::vector<Tensor> tensors;
      for (std::size_t i = 0; i < 30; ++i) {
        const std::size_t own = i % 3 == 0 ? static_cast<std::size_t>(hvd.rank()) + i : i;  // a third of them differ
        tensors.emplace_back(shape, orders[own % 3], hvd.rank());
      }
      std::vector<Result<HandleRef>> handles;
      for (std::size_t i = 0; i < 20; ++i) {
        handles.push_back(hvd.enqueue(tensors[i].entry(OpKind::kAllreduce, fmt::format("t{}", i), i % 2 == 0)));
      }
      TensorEntry group = tensors[20].entry(OpKind::kAllreduce, "group", /*in_place=*/true);
      for (std::size_t i = 21; i < 30; ++i) {
        group.request.more.push_back({DataType::kFloat32, shape, tensors[i].order});
        const auto* input = reinterpret_cast<const std::byte*>(tensors[i].memory.data());
        auto* output = reinterpret_cast<std::byte*>(i % 2 == 0 ? tensors[i].memory.data() : tensors[i].output.data());
        group.more.push_back({input, output});
      }
      handles.push_back(hvd.enqueue(std::move(group)));
      for (const Result<HandleRef>& handle : handles) ASSERT_TRUE(hvd.wait(handle).ok()) << hvd.wait(handle).text();
      for (std::size_t i = 0; i < 30; ++i) tensors[i].expect_sum(3, /*in_place=*/i % 2 == 0);
    }
  });
}

TEST(MemoryOrders, ARankThatHasJoinedChangesNothing) {
  run_ranks(3, [](TestRank& hvd) {
    const Shape shape{4, 3, 2, 5};
    if (hvd.rank() != 2) {
      for (const bool differ : {false, true}) {
        Tensor sum(shape, differ && hvd.rank() == 0 ? reversed(shape) : channels_last(shape), hvd.rank());
        const std::string name = differ ? "differ" : "alike";
        ASSERT_TRUE(hvd.wait(hvd.enqueue(sum.entry(OpKind::kAllreduce, name, /*in_place=*/true))).ok());
        sum.expect_sum(2, /*in_place=*/true);
      }
    }
    TensorEntry join = make_entry(OpKind::kJoin, std::string(kJoinName), DataType::kUint8, {}, nullptr, nullptr);
    ASSERT_TRUE(hvd.wait(hvd.enqueue(std::move(join))).ok());
  });
}

TEST(MemoryOrders, OfOperationsThatNeedCOrderAreRefusedAtTheCall) {
  run_ranks(2, [](TestRank& hvd) {
    Tensor tensor({2, 3, 4, 5}, channels_last({2, 3, 4, 5}), hvd.rank());
    for (const OpKind op : {OpKind::kAllgather, OpKind::kReducescatter, OpKind::kAlltoall}) {
      const Result<HandleRef> refused = hvd.enqueue(tensor.entry(op, "x", /*in_place=*/true));
      EXPECT_EQ(refused.status().code(), StatusCode::kInvalidArgument);
      EXPECT_EQ(refused.status().text(),
                fmt::format("{} 'x': a tensor of shape [2, 3, 4, 5] has strides [60, 1, 15, 3], and has to lie in C "
                            "order for this operation",
                            name_of(op)));
    }
    TensorEntry on_device = tensor.entry(OpKind::kAllreduce, "x", /*in_place=*/true);
    on_device.request.memory = MemoryKind::kDevice;
    EXPECT_NE(hvd.enqueue(std::move(on_device)).status().text().find("in the memory of a device"), std::string::npos);
  });
}

TEST(MemoryOrders, AMismatchNamesShapesInTheOrderOfTheirDimensions) {
  run_ranks(2, [](TestRank& hvd) {
    const Shape shape{2, 3, 4, hvd.rank() == 0 ? 5 : 6};
    Tensor tensor(shape, hvd.rank() == 0 ? channels_last(shape) : kCOrder, hvd.rank());
    EXPECT_EQ(hvd.wait(hvd.enqueue(tensor.entry(OpKind::kAllreduce, "x", /*in_place=*/true))).text(),
              "allreduce 'x': mismatched shape: [2, 3, 4, 5]: rank 0; [2, 3, 4, 6]: rank 1");
  });
}

}  // namespace
}  // namespace hvd::testing
