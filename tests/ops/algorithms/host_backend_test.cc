// Agreed calls on host memory: packing, scaling and averaging around the algorithms, and the choice between them.

#include "ops/host_backend.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <string>

#include "ops/algorithms/ring_schedule.h"
#include "tests/ops/algorithms/elements.h"
#include "tests/ops/algorithms/stepped_ranks.h"

namespace hvd::testing {
namespace {

constexpr std::size_t kSmallLimit = 1024;

// The tensors of one call on all ranks.
struct Tensors {
  Tensors(DataType type, int ranks, std::vector<std::size_t> element_counts, bool in_place)
      : dtype(type), counts(std::move(element_counts)), same(in_place) {
    for (int rank = 0; rank < ranks; ++rank) {
      inputs.emplace_back();
      for (const std::size_t count : counts) inputs.back().emplace_back(count * size_of(type));
    }
    outputs = inputs;
  }
  template <typename Draw>
  void fill(Draw draw) {
    for (auto& of_rank : inputs) {
      for (std::size_t t = 0; t < counts.size(); ++t) {
        for (std::size_t i = 0; i < counts[t]; ++i) store_element(dtype, of_rank[t].data(), i, draw());
      }
    }
    given = inputs;
    if (same) outputs = inputs;
  }
  AllreduceCall call(int rank, ReduceOp op) {
    const auto i = static_cast<std::size_t>(rank);
    AllreduceCall made;
    made.dtype = dtype;
    made.reduce_op = op;
    made.small_limit_bytes = kSmallLimit;
    for (std::size_t t = 0; t < counts.size(); ++t) {
      made.tensors.push_back({same ? outputs[i][t].data() : inputs[i][t].data(), outputs[i][t].data(), counts[t]});
    }
    return made;
  }
  double operand(int rank, std::size_t tensor, std::size_t index) const {
    return load_element(dtype, given[static_cast<std::size_t>(rank)][tensor].data(), index);
  }
  double result(int rank, std::size_t tensor, std::size_t index) const {
    return load_element(dtype, outputs[static_cast<std::size_t>(rank)][tensor].data(), index);
  }
  int ranks() const { return static_cast<int>(inputs.size()); }

  DataType dtype;
  std::vector<std::size_t> counts;
  bool same;
  std::vector<std::vector<GuardedBytes>> inputs;
  std::vector<std::vector<GuardedBytes>> given;
  std::vector<std::vector<GuardedBytes>> outputs;
};

HostBackend& host_backend() {
  static HostBackend backend;
  return backend;
}

void run(SteppedRanks& ranks, Tensors& tensors, ReduceOp op, double prescale = 1.0, double postscale = 1.0) {
  const std::vector<Status> ends = ranks.run([&](CollectiveContext& context, int rank) {
    AllreduceCall call = tensors.call(rank, op);
    call.prescale = prescale;
    call.postscale = postscale;
    return host_backend().allreduce(context, std::move(call));
  });
  for (const Status& end : ends) ASSERT_TRUE(end.ok()) << end.text();
  for (std::size_t rank = 0; rank < tensors.outputs.size(); ++rank) {
    for (std::size_t t = 0; t < tensors.counts.size(); ++t) {
      ASSERT_TRUE(tensors.outputs[rank][t] == tensors.outputs[0][t]) << "rank " << rank << " has other bits";
      ASSERT_TRUE(tensors.outputs[rank][t].guards_are_whole());
      ASSERT_TRUE(tensors.same || tensors.inputs[rank][t] == tensors.given[rank][t]) << "an input was changed";
    }
  }
}

class HostAllreduce : public ::testing::Test {
 protected:
  static void expect_exact(const Tensors& tensors, ReduceOp op) {
    const DataType type = tensors.dtype;
    for (std::size_t t = 0; t < tensors.counts.size(); ++t) {
      for (std::size_t i = 0; i < tensors.counts[t]; ++i) {
        std::vector<double> operands;
        for (int rank = 0; rank < tensors.ranks(); ++rank) operands.push_back(tensors.operand(rank, t, i));
        double expected = as_stored(type, reduce_in_double(type, op, operands));
        if (op == ReduceOp::kAverage && type != DataType::kBool) {
          expected /= tensors.ranks();
          // One division in float32, rounded once more where the type is narrower.
          expected = is_floating_point(type) ? as_stored(type, expected) : std::trunc(expected);
        }
        double result = tensors.result(0, t, i);
        if (type == DataType::kBool && tensors.ranks() == 1) result = result != 0 ? 1 : 0;  // nothing was combined
        ASSERT_EQ(result, expected) << "tensor " << t << ", element " << i;
      }
    }
  }

  std::mt19937_64 random_ = generator_of_this_run();
};

TEST_F(HostAllreduce, ReducesEveryTypeInEveryWayAloneAndFused) {
  constexpr std::array ops{ReduceOp::kSum, ReduceOp::kAverage, ReduceOp::kMin, ReduceOp::kMax, ReduceOp::kProduct};
  for (int size = 1; size <= 8; ++size) {
    SteppedRanks ranks(size, random_, {});
    for (const DataTypeInfo& type : kDataTypes) {
      const std::size_t small = kSmallLimit / type.bytes;
      const std::vector<std::vector<std::size_t>> calls{{0},
                                                        {1},
                                                        {small},
                                                        {small + 1},
                                                        {3 * small + 1},
                                                        {1, 0, small, static_cast<std::size_t>(size), 7},
                                                        {small + 1, 2 * small + 3, small + 9}};
      for (const ReduceOp op : ops) {
        for (const std::vector<std::size_t>& counts : calls) {
          for (const bool in_place : {false, true}) {
            SCOPED_TRACE(fmt::format("{} {} on {} ranks, {} tensors, first of {} elements, in place {}", type.name,
                                     name_of(op), size, counts.size(), counts[0], in_place));
            Tensors tensors(type.type, size, counts, in_place);
            tensors.fill([&] { return exact_operand(type.type, op, random_); });
            run(ranks, tensors, op);
            if (HasFatalFailure()) return;
            expect_exact(tensors, op);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST_F(HostAllreduce, ScalesBeforeAndAfter) {
  for (const int size : {1, 3}) {
    SteppedRanks ranks(size, random_, {});
    for (const bool in_place : {false, true}) {
      for (const std::vector<std::size_t>& counts : std::vector<std::vector<std::size_t>>{{5}, {2000}, {5, 6, 7}}) {
        Tensors tensors(DataType::kFloat32, size, counts, in_place);
        tensors.fill([&] { return exact_operand(DataType::kFloat32, ReduceOp::kSum, random_); });
        run(ranks, tensors, ReduceOp::kSum, 0.5, 4.0);
        if (HasFatalFailure()) return;
        for (std::size_t t = 0; t < counts.size(); ++t) {
          for (std::size_t i = 0; i < counts[t]; ++i) {
            double sum = 0;
            for (int rank = 0; rank < size; ++rank) sum += tensors.operand(rank, t, i);
            ASSERT_EQ(tensors.result(0, t, i), 2.0 * sum) << "tensor " << t << ", element " << i;
          }
        }
      }
    }
  }
}

// An element's order of summation is a matter of its own tensor, not of the company it is fused with.
TEST_F(HostAllreduce, GivesATensorTheSameBitsAloneAndInAnyCompany) {
  std::uniform_real_distribution<double> anything(-1.0, 1.0);
  for (const int size : {2, 3, 5, 8}) {
    SteppedRanks ranks(size, random_, {});
    for (const std::size_t count : {std::size_t{11}, std::size_t{1009}}) {  // both algorithms
      Tensors alone(DataType::kFloat32, size, {count}, false);
      alone.fill([&] { return anything(random_); });
      run(ranks, alone, ReduceOp::kSum);
      if (HasFatalFailure()) return;
      for (int company = 0; company < 5; ++company) {
        std::vector<std::size_t> counts;
        const std::size_t place = random_() % 4;
        for (std::size_t t = 0; t < 4; ++t)
          counts.push_back(t == place ? count : count < 256 ? random_() % 256 : 300 + random_() % 2000);
        Tensors fused(DataType::kFloat32, size, counts, company % 2 == 0);
        fused.fill([&] { return anything(random_); });
        for (int rank = 0; rank < size; ++rank) {
          const auto i = static_cast<std::size_t>(rank);
          fused.inputs[i][place] = fused.given[i][place] = alone.given[i][0];
          if (fused.same) fused.outputs[i][place] = alone.given[i][0];
        }
        run(ranks, fused, ReduceOp::kSum);
        if (HasFatalFailure()) return;
        EXPECT_TRUE(fused.outputs[0][place] == alone.outputs[0][0]) << size << " ranks, " << count << " elements";
      }
    }
  }
}

TEST_F(HostAllreduce, RefusesAReductionThatHasNoFunctionOnEveryRank) {
  SteppedRanks ranks(2, random_, {});
  Tensors tensors(DataType::kInt32, 2, {4}, false);
  tensors.fill([] { return 1.0; });
  const std::vector<Status> ends = ranks.run([&](CollectiveContext& context, int rank) {
    return host_backend().allreduce(context, tensors.call(rank, ReduceOp::kAdasum));
  });
  for (const Status& end : ends) EXPECT_EQ(end.code(), StatusCode::kInvalidArgument);
}

TEST(HostBackend, BroadcastsFromAnotherMemoryOfTheRootAndGathersOwnBlocks) {
  std::mt19937_64 random = generator_of_this_run();
  SteppedRanks ranks(3, random, {});
  std::vector<GuardedBytes> in(3, GuardedBytes(1000));
  std::vector<GuardedBytes> out(3, GuardedBytes(1000));
  for (std::byte& byte : in[1].span()) byte = static_cast<std::byte>(random());
  const GuardedBytes before = in[1];
  for (const Status& end : ranks.run([&](CollectiveContext& context, int rank) {
         const auto i = static_cast<std::size_t>(rank);
         return host_broadcast(context, in[i].data(), out[i].data(), 1000, 1);
       })) {
    EXPECT_TRUE(end.ok()) << end.text();
  }
  for (const GuardedBytes& one : out) EXPECT_TRUE(one == before);

  std::vector<GuardedBytes> all(3, GuardedBytes(1000 + 10 + 0));
  for (const Status& end : ranks.run([&](CollectiveContext& context, int rank) {
         const auto i = static_cast<std::size_t>(rank);
         return host_allgather(context, in[i].data(), all[i].data(), {10, 1000, 0});
       })) {
    EXPECT_TRUE(end.ok()) << end.text();
  }
  for (const GuardedBytes& one : all) {
    EXPECT_TRUE(std::equal(in[0].data(), in[0].data() + 10, one.data()));
    EXPECT_TRUE(std::equal(in[1].data(), in[1].data() + 1000, one.data() + 10));
    EXPECT_TRUE(one.guards_are_whole());
  }
}

// ---- pure parts
// ------------------------------------------------------------------------------------------------------

TEST(RingSchedule, CutsInSlicesThatDifferByAtMostOneAndCoverEverything) {
  for (int parts = 1; parts <= 9; ++parts) {
    for (std::size_t count = 0; count < 40; ++count) {
      EXPECT_EQ(slice_begin(count, parts, 0), 0u);
      EXPECT_EQ(slice_begin(count, parts, parts), count);
      for (int i = 0; i < parts; ++i) {
        const std::size_t size = slice_begin(count, parts, i + 1) - slice_begin(count, parts, i);
        EXPECT_LE(size, count / static_cast<std::size_t>(parts) + 1);
        EXPECT_GE(size, count / static_cast<std::size_t>(parts));
      }
      const std::vector<std::size_t> bounds = chunk_bounds(count, 8, parts);
      EXPECT_EQ(bounds.size(), static_cast<std::size_t>(parts) + 1);
      EXPECT_EQ(bounds.back(), 8 * count);
    }
  }
}

TEST(RingSchedule, WhatARankSendsIsWhatItsNeighbourAwaits) {
  for (int size = 2; size <= 9; ++size) {
    for (int k = 0; k < size - 1; ++k) {
      for (int rank = 0; rank < size; ++rank) {
        const int next = wrap(rank + 1, size);
        EXPECT_EQ(reduce_scatter_step(rank, size, k).send_chunk, reduce_scatter_step(next, size, k).receive_chunk);
        EXPECT_EQ(allgather_step(rank, size, k).send_chunk, allgather_step(next, size, k).receive_chunk);
      }
    }
    for (int rank = 0; rank < size; ++rank) {
      EXPECT_EQ(reduce_scatter_step(rank, size, size - 2).receive_chunk, wrap(rank + 1, size)) << "the finished chunk";
      EXPECT_EQ(allgather_step(rank, size, 0).send_chunk, wrap(rank + 1, size));
    }
  }
}

TEST(Membership, FindsRanksByTheirPlaceInTheSet) {
  const Membership members{3, {1, 4, 7}, {0, 0, 1}};
  EXPECT_EQ(members.size(), 3);
  EXPECT_EQ(members.first(), 1);
  EXPECT_EQ(members.index_of(1), 0);
  EXPECT_EQ(members.index_of(7), 2);
  for (const int stranger : {-1, 0, 2, 5, 8}) {
    EXPECT_FALSE(members.contains(stranger)) << stranger;
    EXPECT_EQ(members.index_of(stranger), std::nullopt);
  }
}

TEST(HostBuffers, AreAlignedAndGivenOutAgain) {
  HostBufferPool pool;
  std::byte* first = nullptr;
  {
    const std::shared_ptr<std::byte> buffer = pool.lease(1000);
    ASSERT_NE(buffer, nullptr);
    first = buffer.get();
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(first) % 64, 0u);
    std::fill_n(first, 1000, std::byte{1});
    EXPECT_NE(pool.lease(1000).get(), first) << "a leased buffer was given to somebody else";
  }
  const std::shared_ptr<std::byte> smaller = pool.lease(513);  // of the same power of two
  const std::shared_ptr<std::byte> again = pool.lease(1024);
  EXPECT_TRUE(smaller.get() == first || again.get() == first);
  EXPECT_NE(smaller.get(), again.get());
  EXPECT_NE(pool.lease(0), nullptr);
  EXPECT_NE(pool.lease(1), nullptr);
}

TEST(HostBuffers, OutliveTheirPool) {
  std::shared_ptr<std::byte> buffer;
  {
    HostBufferPool pool;
    buffer = pool.lease(100);
  }
  std::fill_n(buffer.get(), 100, std::byte{1});
}

TEST(HostBuffers, SayWhenThereIsNoMemory) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the sanitizer's allocator ends the process instead";
#endif
  EXPECT_EQ(allocate_host(std::size_t{1} << 60), nullptr);
}

}  // namespace
}  // namespace hvd::testing
