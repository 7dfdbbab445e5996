// Every algorithm of the table, on 1 to 8 ranks, against a serial reference. A new row of the table is tested without a
// new test.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <set>
#include <string>

#include "ops/algorithms/algorithm_table.h"
#include "ops/algorithms/ring_schedule.h"
#include "tests/ops/algorithms/elements.h"
#include "tests/ops/algorithms/stepped_ranks.h"

namespace hvd::testing {
namespace {

constexpr int kMostRanks = 8;
constexpr std::size_t kSegment = 256;

// How messages go.
struct Way {
  std::string_view name;
  std::size_t eager_limit;
  std::size_t pull_from;

  SteppedRanks::Settings settings(std::size_t ring_bytes = std::size_t{16} << 10) const {
    return {eager_limit, ring_bytes, kSegment, pull_from};
  }
};
constexpr Way kAllEager{"all eager", std::size_t{32} << 10, 0};
constexpr Way kCredit{"whole segments wait for credit", 128, 0};
constexpr Way kPulled{"pulled", std::size_t{32} << 10, 1};
constexpr std::array kWays{kAllEager, kCredit, kPulled};

// How messages go does not depend on what is computed from them: one reduction of each type goes the other ways.
std::vector<ReduceOp> reductions(const Way& way) {
  if (way.name != kAllEager.name) return {ReduceOp::kSum};
  return {ReduceOp::kSum, ReduceOp::kMin, ReduceOp::kMax, ReduceOp::kProduct};
}

// On one rank there is nothing to reduce: the caller has put the operand in its place (host_allreduce).
std::vector<bool> places(int ranks) {
  if (ranks == 1) return {true};
  return {true, false};
}

std::vector<std::size_t> counts_for(int ranks, std::size_t element_bytes) {
  const std::size_t per_segment = kSegment / element_bytes;
  const std::size_t all = static_cast<std::size_t>(ranks) * per_segment;  // each chunk is one segment
  std::set<std::size_t> counts{0,
                               1,
                               static_cast<std::size_t>(ranks - 1),
                               97,
                               per_segment - 1,
                               per_segment,
                               per_segment + 1,
                               all - 1,
                               all,
                               all + 1,
                               5 * all + 3};
  return {counts.begin(), counts.end()};
}

std::string case_text(std::string_view algorithm, DataType type, ReduceOp op, int ranks, std::size_t count,
                      bool in_place, const Way& way) {
  return fmt::format("{} {} {} on {} ranks, {} elements, {}, {}", algorithm, name_of(type), name_of(op), ranks, count,
                     in_place ? "in place" : "out of place", way.name);
}

void expect_all_ok(const std::vector<Status>& ends) {
  for (std::size_t rank = 0; rank < ends.size(); ++rank) {
    EXPECT_TRUE(ends[rank].ok()) << "rank " << rank << ": " << ends[rank].text();
  }
}

// Operands and results of all ranks for one allreduce.
struct Operands {
  Operands(DataType type, int ranks, std::size_t count, bool in_place) : dtype(type), elements(count), same(in_place) {
    for (int rank = 0; rank < ranks; ++rank) {
      inputs.emplace_back(count * size_of(type));
      outputs.emplace_back(count * size_of(type));
    }
  }
  template <typename Draw>
  void fill(Draw draw) {
    for (GuardedBytes& input : inputs) {
      for (std::size_t i = 0; i < elements; ++i) store_element(dtype, input.data(), i, draw());
    }
    given = inputs;
    if (same) outputs = inputs;
  }
  std::vector<double> of_element(std::size_t index) const {
    std::vector<double> values;
    for (const GuardedBytes& input : given) values.push_back(load_element(dtype, input.data(), index));
    return values;
  }
  ReduceBuffer buffer(int rank, int parts) {
    const auto i = static_cast<std::size_t>(rank);
    ReduceBuffer made;
    made.output = outputs[i].data();
    made.input = same ? made.output : inputs[i].data();
    made.bytes = outputs[i].size();
    made.chunks = chunk_bounds(elements, size_of(dtype), parts);
    return made;
  }
  void expect_nothing_else_was_touched() const {
    for (std::size_t rank = 0; rank < inputs.size(); ++rank) {
      EXPECT_TRUE(outputs[rank].guards_are_whole()) << "rank " << rank << " wrote beside its output";
      EXPECT_TRUE(same || inputs[rank] == given[rank]) << "rank " << rank << " changed its input";
    }
  }
  void expect_equal_on_all_ranks() const {
    for (std::size_t rank = 1; rank < outputs.size(); ++rank) {
      EXPECT_TRUE(outputs[rank] == outputs[0]) << "rank " << rank << " has other bits than rank 0";
    }
  }

  DataType dtype;
  std::size_t elements;
  bool same;
  std::vector<GuardedBytes> inputs;
  std::vector<GuardedBytes> given;
  std::vector<GuardedBytes> outputs;
};

class AllreduceConformance : public ::testing::TestWithParam<AllreduceAlgorithm> {
 protected:
  void run(SteppedRanks& ranks, Operands& operands, ReduceOp op) {
    const AllreduceAlgorithm& algorithm = GetParam();
    const Result<Reducer> reducer = find_reducer(operands.dtype, op);
    ASSERT_TRUE(reducer.ok()) << reducer.status().text();
    const int parts = algorithm.uses_chunks ? ranks.size() : 1;
    expect_all_ok(ranks.run([&](CollectiveContext& context, int rank) {
      return algorithm.run(context, operands.buffer(rank, parts), reducer.value());
    }));
    operands.expect_nothing_else_was_touched();
    operands.expect_equal_on_all_ranks();
  }

  static void expect_exact(const Operands& operands, ReduceOp op) {
    const DataType type = operands.dtype;
    for (std::size_t i = 0; i < operands.elements; ++i) {
      const std::vector<double> values = operands.of_element(i);
      // A bool that was combined with none is as it was given.
      const double expected = values.size() == 1 ? values[0] : as_stored(type, reduce_in_double(type, op, values));
      ASSERT_EQ(load_element(type, operands.outputs[0].data(), i), expected) << "element " << i;
    }
  }

  std::mt19937_64 random_ = generator_of_this_run();
};

TEST_P(AllreduceConformance, GivesTheExactResultForEveryTypeReductionSizeAndNumberOfRanks) {
  for (int size = 1; size <= kMostRanks; ++size) {
    for (const Way& way : kWays) {
      SteppedRanks ranks(size, random_, way.settings());
      for (const DataTypeInfo& type : kDataTypes) {
        for (const ReduceOp op : reductions(way)) {
          for (const std::size_t count : counts_for(size, type.bytes)) {
            for (const bool in_place : places(size)) {
              SCOPED_TRACE(case_text(GetParam().name, type.type, op, size, count, in_place, way));
              Operands operands(type.type, size, count, in_place);
              operands.fill([&] { return exact_operand(type.type, op, random_); });
              run(ranks, operands, op);
              expect_exact(operands, op);
              if (HasFailure()) return;
            }
          }
        }
      }
    }
  }
}

TEST_P(AllreduceConformance, RoundsSumsOfAnyNumbersAlikeOnAllRanksAndWithinTheTolerance) {
  std::uniform_real_distribution<double> anything(-1.0, 1.0);
  for (int size = 1; size <= kMostRanks; ++size) {
    SteppedRanks ranks(size, random_, kAllEager.settings());
    for (const DataTypeInfo& type : kDataTypes) {
      if (!is_floating_point(type.type)) continue;
      for (const bool in_place : places(size)) {
        const std::size_t count = 1009;
        SCOPED_TRACE(case_text(GetParam().name, type.type, ReduceOp::kSum, size, count, in_place, kAllEager));
        Operands operands(type.type, size, count, in_place);
        operands.fill([&] { return anything(random_); });
        run(ranks, operands, ReduceOp::kSum);
        for (std::size_t i = 0; i < count; ++i) {
          const std::vector<double> values = operands.of_element(i);
          long double sum = 0;  // so that float64 has a reference that is better than itself
          long double magnitude = 0;
          for (const double value : values) {
            sum += value;
            magnitude += std::abs(value);
          }
          const long double error = std::abs(load_element(type.type, operands.outputs[0].data(), i) - sum);
          ASSERT_LE(error, static_cast<double>(size) * rounding_of(type.type) * magnitude) << "element " << i;
        }
        if (HasFailure()) return;
      }
    }
  }
}

// A fused call and a single one have to give the same bits: the order of summation is a matter of the chunks.
TEST_P(AllreduceConformance, GivesTheSameBitsHoweverRanksAreDriven) {
  std::uniform_real_distribution<double> anything(-1.0, 1.0);
  SteppedRanks ranks(5, random_, kCredit.settings(std::size_t{4} << 10));
  Operands first(DataType::kFloat32, 5, 4099, false);
  first.fill([&] { return anything(random_); });
  run(ranks, first, ReduceOp::kSum);
  for (int repeat = 0; repeat < 20 && !HasFailure(); ++repeat) {
    Operands again(DataType::kFloat32, 5, 4099, repeat % 2 == 0);
    again.inputs = first.given;
    again.given = first.given;
    if (again.same) again.outputs = first.given;
    run(ranks, again, ReduceOp::kSum);
    EXPECT_TRUE(again.outputs[0] == first.outputs[0]) << "repeat " << repeat;
  }
}

TEST_P(AllreduceConformance, EndsEverywhereWhenEachRankIsCancelled) {
  SteppedRanks ranks(4, random_, kCredit.settings(std::size_t{4} << 10));
  const Result<Reducer> reducer = find_reducer(DataType::kFloat32, ReduceOp::kSum);
  const int parts = GetParam().uses_chunks ? 4 : 1;
  Operands operands(DataType::kFloat32, 4, 10'007, false);
  operands.fill([] { return 1.0; });
  {
    SteppedRanks::Call call(ranks);
    for (int rank = 0; rank < 3; ++rank) {  // one never comes
      call.start(rank, [&](CollectiveContext& context, int index) {
        return GetParam().run(context, operands.buffer(index, parts), *Result<Reducer>(reducer));
      });
    }
    call.settle();
    for (int rank = 0; rank < 3; ++rank) {
      call.context(rank).cancel(Status::internal("a reason"));
      call.context(rank).cancel(Status::internal("a later reason"));
    }
    call.settle();
    for (int rank = 0; rank < 3; ++rank) {
      ASSERT_TRUE(call.done(rank)) << "rank " << rank;
      const Status end = call.ends()[static_cast<std::size_t>(rank)];
      EXPECT_TRUE(end.ok() || end.text() == "a reason") << end.text();
    }
    EXPECT_FALSE(call.ends()[0].ok());
  }
  // What it left behind on the way is never taken for a message of the next call.
  Operands next(DataType::kFloat32, 4, 10'007, true);
  next.fill([] { return 2.0; });
  run(ranks, next, ReduceOp::kSum);
  for (std::size_t i = 0; i < next.elements; ++i) {
    ASSERT_EQ(load_element(DataType::kFloat32, next.outputs[0].data(), i), 8.0) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Table, AllreduceConformance, ::testing::ValuesIn(allreduce_algorithms()),
                         [](const auto& param) { return std::string(param.param.name); });

TEST(AlgorithmTable, TheLastAllreduceFitsWhateverTheFacts) {
  const AllreduceAlgorithm& last = allreduce_algorithms().back();
  EXPECT_TRUE(last.fits({std::size_t{1} << 40, 1000, 0}));
  EXPECT_TRUE(last.fits({0, 1, 0}));
  EXPECT_EQ(select_allreduce({1024, 4, 1024}).name, "recursive_doubling");
  EXPECT_EQ(select_allreduce({1025, 4, 1024}).name, "ring");
}

TEST(AlgorithmTable, StandingCallsUseBlocksWhereTheseHaveRoom) {
  AlgorithmFacts facts{
      .tensor_bytes = 1024, .size = 4, .small_limit_bytes = 65536, .standing = true, .slot_bytes = 1 << 20};
  EXPECT_EQ(select_allreduce(facts).name, "block");
  facts.tensor_bytes = 65536;
  EXPECT_EQ(select_allreduce(facts).name, "block_scatter");
  facts.tensor_bytes = 1 << 20;
  EXPECT_EQ(select_allreduce(facts).name, "block_scatter_as_ring");
  facts.tensor_bytes += 1;
  EXPECT_EQ(select_allreduce(facts).name, "direct_scatter_as_ring");
  facts.slot_bytes = 0;
  facts.tensor_bytes = 1024;
  EXPECT_EQ(select_allreduce(facts).name, "direct");
  facts.standing = false;
  facts.slot_bytes = 1 << 20;
  EXPECT_EQ(select_allreduce(facts).name, "recursive_doubling");
}

// Bits of what `name` makes of the same operands.
std::vector<GuardedBytes> bits_by(std::string_view name, const Operands& given, int size, std::mt19937_64& random) {
  const auto algorithms = allreduce_algorithms();
  const auto row =
      std::find_if(algorithms.begin(), algorithms.end(), [&](const auto& one) { return one.name == name; });
  Operands operands = given;
  SteppedRanks ranks(size, random, kAllEager.settings());
  const Result<Reducer> reducer = find_reducer(operands.dtype, ReduceOp::kSum);
  expect_all_ok(ranks.run([&](CollectiveContext& context, int rank) {
    return row->run(context, operands.buffer(rank, row->uses_chunks ? size : 1), reducer.value());
  }));
  return operands.outputs;
}

// Whether a call stands, and where it finds its operands, is not to be seen in its result.
TEST(AlgorithmTable, TheBitsOfASumAreThoseOfTheAlgorithmThatIsTakenOtherwise) {
  std::mt19937_64 random = generator_of_this_run();
  std::uniform_real_distribution<double> anything(-1.0, 1.0);
  const std::array<std::pair<std::string_view, std::string_view>, 7> pairs{{{"block", "recursive_doubling"},
                                                                            {"block_scatter", "recursive_doubling"},
                                                                            {"direct", "recursive_doubling"},
                                                                            {"direct_scatter", "recursive_doubling"},
                                                                            {"block_scatter_as_ring", "ring"},
                                                                            {"direct_scatter_as_ring", "ring"},
                                                                            {"in_turn", "ring"}}};
  for (int size = 2; size <= kMostRanks; ++size) {
    for (const DataType type : {DataType::kFloat32, DataType::kFloat16, DataType::kFloat64}) {
      Operands operands(type, size, 5003, /*in_place=*/true);
      operands.fill([&] { return anything(random); });
      for (const auto& [one, other] : pairs) {
        SCOPED_TRACE(fmt::format("{} and {}, {} on {} ranks", one, other, name_of(type), size));
        ASSERT_TRUE(bits_by(one, operands, size, random) == bits_by(other, operands, size, random));
      }
    }
  }
}

// ---- reducescatter
// ----------------------------------------------------------------------------------------------------------

class ReducescatterConformance : public ::testing::TestWithParam<ReducescatterAlgorithm> {
 protected:
  // Each rank's share, one behind the other, is the result that an allreduce would have.
  void run(SteppedRanks& ranks, Operands& operands, ReduceOp op) {
    const Result<Reducer> reducer = find_reducer(operands.dtype, op);
    ASSERT_TRUE(reducer.ok()) << reducer.status().text();
    const std::vector<std::size_t> chunks = chunk_bounds(operands.elements, size_of(operands.dtype), ranks.size());
    std::vector<GuardedBytes> shares;
    for (std::size_t i = 0; i + 1 < chunks.size(); ++i) shares.emplace_back(chunks[i + 1] - chunks[i]);
    expect_all_ok(ranks.run([&](CollectiveContext& context, int rank) {
      const auto i = static_cast<std::size_t>(rank);
      return GetParam().run(context, {operands.inputs[i].data(), shares[i].data(), chunks}, reducer.value());
    }));
    whole_.clear();
    for (std::size_t i = 0; i < shares.size(); ++i) {
      EXPECT_TRUE(shares[i].guards_are_whole()) << "rank " << i << " wrote beside its output";
      EXPECT_TRUE(operands.inputs[i] == operands.given[i]) << "rank " << i << " changed its input";
      whole_.insert(whole_.end(), shares[i].data(), shares[i].data() + shares[i].size());
    }
  }

  std::mt19937_64 random_ = generator_of_this_run();
  std::vector<std::byte> whole_;
};

TEST_P(ReducescatterConformance, GivesEachRankItsExactShareForEveryTypeReductionSizeAndNumberOfRanks) {
  for (int size = 1; size <= kMostRanks; ++size) {
    for (const Way& way : kWays) {
      SteppedRanks ranks(size, random_, way.settings());
      for (const DataTypeInfo& type : kDataTypes) {
        for (const ReduceOp op : reductions(way)) {
          for (const std::size_t count : counts_for(size, type.bytes)) {
            SCOPED_TRACE(case_text(GetParam().name, type.type, op, size, count, false, way));
            Operands operands(type.type, size, count, false);
            operands.fill([&] { return exact_operand(type.type, op, random_); });
            run(ranks, operands, op);
            for (std::size_t i = 0; i < count && !HasFailure(); ++i) {
              const std::vector<double> values = operands.of_element(i);
              // A bool that was combined with none is as it was given.
              const double expected =
                  size == 1 ? values[0] : as_stored(type.type, reduce_in_double(type.type, op, values));
              ASSERT_EQ(load_element(type.type, whole_.data(), i), expected) << "element " << i;
            }
            if (HasFailure()) return;
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Table, ReducescatterConformance, ::testing::ValuesIn(reducescatter_algorithms()),
                         [](const auto& param) { return std::string(param.param.name); });

// ---- Adasum
// ---------------------------------------------------------------------------------------------------------------

class AdasumConformance : public ::testing::TestWithParam<AdasumAlgorithm> {};

std::vector<double> adasum(DataType type, const std::vector<double>& a, const std::vector<double>& b) {
  double aa = 0;
  double ab = 0;
  double bb = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    aa += a[i] * a[i];
    ab += a[i] * b[i];
    bb += b[i] * b[i];
  }
  std::vector<double> sum(a.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double of_a = aa > 0 ? (1 - ab / (2 * aa)) * a[i] : a[i];
    const double of_b = bb > 0 ? (1 - ab / (2 * bb)) * b[i] : b[i];
    sum[i] = as_stored(type, of_a + of_b);
  }
  return sum;
}

// The tree over whole vectors: first the ranks beyond a power of two, then pairs of pairs.
std::vector<double> adasum_of_all(DataType type, std::vector<std::vector<double>> vectors) {
  std::size_t paired = 1;
  while (2 * paired <= vectors.size()) paired *= 2;
  for (std::size_t i = paired; i < vectors.size(); ++i) {
    vectors[i - paired] = adasum(type, vectors[i - paired], vectors[i]);
  }
  for (std::size_t distance = 1; distance < paired; distance *= 2) {
    for (std::size_t i = 0; i < paired; i += 2 * distance) {
      vectors[i] = adasum(type, vectors[i], vectors[i + distance]);
    }
  }
  return vectors.front();
}

TEST_P(AdasumConformance, GivesTheTreeOfWholeVectorsOnAnyNumberOfRanks) {
  std::mt19937_64 random = generator_of_this_run();
  std::uniform_real_distribution<double> anything(-1.0, 1.0);
  for (int size = 1; size <= kMostRanks; ++size) {
    for (const Way& way : kWays) {
      SteppedRanks ranks(size, random, way.settings());
      for (const DataTypeInfo& type : kDataTypes) {
        if (!is_floating_point(type.type)) continue;
        for (const std::size_t count : counts_for(size, type.bytes)) {
          SCOPED_TRACE(case_text(GetParam().name, type.type, ReduceOp::kAdasum, size, count, true, way));
          Operands operands(type.type, size, count, true);
          const bool all_zero = random() % 8 == 0;
          operands.fill([&] { return all_zero ? 0.0 : anything(random); });
          std::vector<std::vector<double>> vectors(static_cast<std::size_t>(size), std::vector<double>(count));
          for (std::size_t rank = 0; rank < vectors.size(); ++rank) {
            for (std::size_t i = 0; i < count; ++i) {
              vectors[rank][i] = load_element(type.type, operands.given[rank].data(), i);
            }
          }
          expect_all_ok(ranks.run([&](CollectiveContext& context, int rank) {
            return GetParam().run(context, operands.outputs[static_cast<std::size_t>(rank)].span(), type.type);
          }));
          operands.expect_nothing_else_was_touched();
          operands.expect_equal_on_all_ranks();
          const std::vector<double> expected = adasum_of_all(type.type, vectors);
          for (std::size_t i = 0; i < count; ++i) {
            const double error = std::abs(load_element(type.type, operands.outputs[0].data(), i) - expected[i]);
            ASSERT_LE(error, 8 * static_cast<double>(rounding_of(type.type)) * static_cast<double>(size)) << i;
          }
          if (HasFailure()) return;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Table, AdasumConformance, ::testing::ValuesIn(adasum_algorithms()),
                         [](const auto& param) { return std::string(param.param.name); });

// ---- alltoall
// ---------------------------------------------------------------------------------------------------------------

class AlltoallConformance : public ::testing::TestWithParam<AlltoallAlgorithm> {};

TEST_P(AlltoallConformance, BringsUnevenAndEmptyBlocksToTheirRanks) {
  std::mt19937_64 random = generator_of_this_run();
  for (int size = 1; size <= kMostRanks; ++size) {
    for (const Way& way : kWays) {
      SteppedRanks ranks(size, random, way.settings(std::size_t{4} << 10));
      for (int round = 0; round < 12; ++round) {
        const auto n = static_cast<std::size_t>(size);
        std::vector<std::vector<std::size_t>> bytes(n, std::vector<std::size_t>(n));  // from, to
        for (auto& row : bytes) {
          for (std::size_t& block : row) {
            constexpr std::array<std::size_t, 6> sizes{0, 1, kSegment - 1, kSegment, kSegment + 1, 10 * kSegment + 7};
            block = round < 2 ? static_cast<std::size_t>(round) : sizes[random() % sizes.size()];
          }
        }
        std::vector<ExchangeBuffer> buffers(n);
        std::vector<GuardedBytes> inputs;
        std::vector<GuardedBytes> outputs;
        for (std::size_t rank = 0; rank < n; ++rank) {
          buffers[rank].to = buffers[rank].from = {0};
          for (std::size_t peer = 0; peer < n; ++peer) {
            buffers[rank].to.push_back(buffers[rank].to.back() + bytes[rank][peer]);
            buffers[rank].from.push_back(buffers[rank].from.back() + bytes[peer][rank]);
          }
          inputs.emplace_back(buffers[rank].to.back());
          for (std::byte& byte : inputs.back().span()) byte = static_cast<std::byte>(random());
          outputs.emplace_back(buffers[rank].from.back());
        }
        for (std::size_t rank = 0; rank < n; ++rank) {
          buffers[rank].input = inputs[rank].data();
          buffers[rank].output = outputs[rank].data();
        }
        expect_all_ok(ranks.run([&](CollectiveContext& context, int rank) {
          return GetParam().run(context, buffers[static_cast<std::size_t>(rank)]);
        }));
        for (std::size_t to = 0; to < n; ++to) {
          ASSERT_TRUE(outputs[to].guards_are_whole());
          for (std::size_t from = 0; from < n; ++from) {
            const std::byte* sent = inputs[from].data() + buffers[from].to[to];
            ASSERT_TRUE(std::equal(sent, sent + bytes[from][to], outputs[to].data() + buffers[to].from[from]))
                << size << " ranks, round " << round << ", from " << from << " to " << to;
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Table, AlltoallConformance, ::testing::ValuesIn(alltoall_algorithms()),
                         [](const auto& param) { return std::string(param.param.name); });

// ---- allgather, broadcast, barrier
// -----------------------------------------------------------------------------------

class AllgatherConformance : public ::testing::TestWithParam<AllgatherAlgorithm> {};

TEST_P(AllgatherConformance, GathersUnevenAndEmptyBlocksInTheOrderOfRanks) {
  std::mt19937_64 random = generator_of_this_run();
  for (int size = 1; size <= kMostRanks; ++size) {
    for (const Way& way : kWays) {
      SteppedRanks ranks(size, random, way.settings(std::size_t{4} << 10));
      for (int round = 0; round < 12; ++round) {
        // All empty, one byte each, then random ones, of which some are empty and some have several segments.
        std::vector<std::size_t> blocks{0};
        std::vector<std::byte> expected;
        std::vector<GuardedBytes> inputs;
        for (int rank = 0; rank < size; ++rank) {
          constexpr std::array<std::size_t, 6> sizes{0, 1, kSegment - 1, kSegment, kSegment + 1, 10 * kSegment + 7};
          const std::size_t bytes = round < 2 ? static_cast<std::size_t>(round) : sizes[random() % sizes.size()];
          blocks.push_back(blocks.back() + bytes);
          inputs.emplace_back(bytes);
          for (std::byte& byte : inputs.back().span()) byte = static_cast<std::byte>(random());
          expected.insert(expected.end(), inputs.back().data(), inputs.back().data() + bytes);
        }
        std::vector<GuardedBytes> outputs(static_cast<std::size_t>(size), GuardedBytes(expected.size()));
        expect_all_ok(ranks.run([&](CollectiveContext& context, int rank) {
          const auto i = static_cast<std::size_t>(rank);
          return GetParam().run(context, {inputs[i].data(), outputs[i].data(), blocks});
        }));
        for (GuardedBytes& output : outputs) {
          ASSERT_TRUE(std::equal(expected.begin(), expected.end(), output.data())) << size << " ranks, round " << round;
          ASSERT_TRUE(output.guards_are_whole());
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Table, AllgatherConformance, ::testing::ValuesIn(allgather_algorithms()),
                         [](const auto& param) { return std::string(param.param.name); });

class BroadcastConformance : public ::testing::TestWithParam<BroadcastAlgorithm> {};

TEST_P(BroadcastConformance, BringsTheBytesOfEveryRootToAll) {
  std::mt19937_64 random = generator_of_this_run();
  for (int size = 1; size <= kMostRanks; ++size) {
    for (const Way& way : kWays) {
      SteppedRanks ranks(size, random, way.settings(std::size_t{4} << 10));
      for (int root = 0; root < size; ++root) {
        for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, static_cast<std::size_t>(size - 1),
                                        std::size_t{97}, kSegment - 1, kSegment, kSegment + 1, 20 * kSegment + 3}) {
          std::vector<GuardedBytes> memory(static_cast<std::size_t>(size), GuardedBytes(bytes));
          GuardedBytes& source = memory[static_cast<std::size_t>(root)];
          for (std::byte& byte : source.span()) byte = static_cast<std::byte>(random());
          const GuardedBytes expected = source;
          expect_all_ok(ranks.run([&](CollectiveContext& context, int rank) {
            return GetParam().run(context, memory[static_cast<std::size_t>(rank)].span(), root);
          }));
          for (const GuardedBytes& one : memory) {
            ASSERT_TRUE(one == expected) << size << " ranks, root " << root << ", " << bytes << " bytes";
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Table, BroadcastConformance, ::testing::ValuesIn(broadcast_algorithms()),
                         [](const auto& param) { return std::string(param.param.name); });

class BarrierConformance : public ::testing::TestWithParam<BarrierAlgorithm> {};

TEST_P(BarrierConformance, NobodyLeavesBeforeTheLastHasCome) {
  std::mt19937_64 random = generator_of_this_run();
  for (int size = 1; size <= kMostRanks; ++size) {
    SteppedRanks ranks(size, random, {});
    for (int last = 0; last < size; ++last) {
      SteppedRanks::Call call(ranks);
      const auto barrier = [&](CollectiveContext& context, int /*rank*/) { return GetParam().run(context); };
      for (int rank = 0; rank < size; ++rank) {
        if (rank != last) call.start(rank, barrier);
      }
      call.settle();
      for (int rank = 0; rank < size; ++rank) {
        ASSERT_FALSE(call.done(rank)) << "rank " << rank << " left before rank " << last << " of " << size << " came";
      }
      call.start(last, barrier);
      call.settle();
      expect_all_ok(call.ends());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Table, BarrierConformance, ::testing::ValuesIn(barrier_algorithms()),
                         [](const auto& param) { return std::string(param.param.name); });

}  // namespace
}  // namespace hvd::testing
