// Sparse tensors and sparse gradients: what the dense ones give, in float64, 1e-9.
#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <gtest/gtest.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/sgd.h>

#include <memory>
#include <regex>
#include <string>
#include <string_view>
#include <vector>

#include <horovod_cpp/torch.h>

namespace {

using at::Tensor;
using hvd::ReduceOp;
using hvd::torch::DistributedOptimizer;
using hvd::torch::DistributedOptions;
namespace optim = torch::optim;

// Of 20 rows a rank has some, one of them twice; rank 0 has one.
Tensor entries(int rank, at::ScalarType type, std::int64_t width) {
  at::manual_seed(static_cast<std::uint64_t>(rank));
  Tensor rows = at::randint(20, {3 * rank + 1}, at::kLong);
  rows = at::cat({rows, rows.narrow(0, 0, 1)});
  return at::sparse_coo_tensor(rows.unsqueeze(0), at::randint(-9, 10, {rows.size(0), width}, at::kLong).to(type),
                               {20, width});
}

using Sizes = std::vector<std::int64_t>;

// One entry of ones.
Tensor entry(std::int64_t index, const Sizes& shape, at::ScalarType type = at::kFloat) {
  Sizes of_values = shape;
  of_values.front() = 1;
  return at::sparse_coo_tensor(at::full({1, 1}, index, at::kLong), at::ones(of_values, type), shape);
}

TEST(Sparse, ASumIsTheSumOfTheDenseTensors) {
  for (const auto type : {at::kFloat, at::kDouble, at::kLong}) {
    Tensor total = at::zeros({20, 5}, at::kDouble);
    for (int rank = 0; rank < hvd::size(); ++rank) total += entries(rank, type, 5).to_dense();
    const Tensor sum = hvd::torch::sparse_allreduce(entries(hvd::rank(), type, 5), {.op = ReduceOp::kSum});
    EXPECT_TRUE(sum.is_sparse());
    EXPECT_EQ(sum.scalar_type(), type);
    EXPECT_TRUE(sum.to_dense().equal(total.to(type)));
    hvd::torch::SparseHandle handle =
        hvd::torch::sparse_allreduce_async(entries(hvd::rank(), type, 5), {.name = "mean"});
    const Tensor mean = handle.wait();
    EXPECT_FALSE(handle.valid());
    EXPECT_THROW(handle.wait(), hvd::PreconditionError);
    if (type != at::kLong) {
      EXPECT_TRUE(mean.to_dense().allclose((total / hvd::size()).to(type)));
    }
    EXPECT_EQ(mean.scalar_type(), type);
  }
}

TEST(Sparse, ComplexNumbersHalvesAndBoolsTravel) {
  const double ranks = hvd::size();
  const Tensor complex = at::complex(at::tensor({0.0, 1.0 * hvd::rank(), 0.0}), at::tensor({0.0, 1.0, 0.0}));
  const Tensor mean = hvd::torch::sparse_allreduce(complex.to_sparse().conj()).to_dense();
  EXPECT_TRUE(at::real(mean).equal(at::tensor({0.0, (ranks - 1) / 2, 0.0})));
  EXPECT_TRUE(at::imag(mean).equal(at::tensor({0.0, -1.0, 0.0})));
  for (const auto type : {at::kBFloat16, at::kHalf, at::kByte}) {
    const Tensor sum = hvd::torch::sparse_allreduce(entry(1, {3, 2}, type), {.op = ReduceOp::kSum});
    EXPECT_TRUE(sum.to_dense().equal(at::tensor({0.0, 0.0, ranks, ranks, 0.0, 0.0}).to(type).reshape({3, 2})));
  }
  for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kAverage}) {  // both are "or"
    Tensor mine = at::zeros({hvd::size() + 1}, at::kBool);
    mine[hvd::rank()] = true;
    const Tensor all = hvd::torch::sparse_allreduce(mine.to_sparse(), {.op = op});
    EXPECT_TRUE(all.to_dense().equal(at::arange(hvd::size() + 1) < hvd::size()));
  }
}

TEST(Sparse, NothingAndScalarsTravel) {
  for (const auto& shape : std::vector<Sizes>{{0}, {4}, {0, 3}, {4, 0}}) {
    const Tensor none = hvd::torch::sparse_allreduce(at::zeros(shape).to_sparse(1));
    EXPECT_TRUE(none.to_dense().equal(at::zeros(shape)));
  }
  const Tensor sum = hvd::torch::sparse_allreduce(at::ones({}).to_sparse(), {.op = ReduceOp::kSum});
  EXPECT_EQ(sum.to_dense().item<int>(), hvd::size());
}

TEST(Sparse, WhatIsNotSparseOrCannotBeAddedUpIsRefused) {
  const Tensor mine = entries(hvd::rank(), at::kFloat, 2);
  EXPECT_THROW(hvd::torch::sparse_allreduce(at::ones({3})), hvd::InvalidArgument);
  EXPECT_THROW(hvd::torch::sparse_allreduce(Tensor()), hvd::InvalidArgument);
  EXPECT_THROW(hvd::torch::sparse_allreduce(mine, {.op = ReduceOp::kMax}), hvd::InvalidArgument);
  EXPECT_THROW(hvd::torch::sparse_allreduce(mine, {.prescale = 2}), hvd::InvalidArgument);
  EXPECT_EQ(hvd::allreduce(1, {.op = ReduceOp::kSum}), hvd::size());
}

// On all ranks; the operation and the job go on.
void expect_refused(const Tensor& mine, const hvd::ReduceOptions& options, const std::string& expected) {
  try {
    hvd::torch::sparse_allreduce(mine, options);
    FAIL() << expected;
  } catch (const hvd::InvalidArgument& error) {
    const std::string text =
        std::regex_replace(error.what(), std::regex(R"( [(\[][^ ()]*sparse_test\.cc:\d+[)\]])"), "@");
    EXPECT_EQ(text,
              "rank " + std::to_string(hvd::rank()) + ": sparse allreduce '" + options.name + "': " + expected + "@");
  }
  const Tensor zeros = hvd::torch::sparse_allreduce(at::zeros({3}).to_sparse(), {.name = options.name});
  EXPECT_TRUE(zeros.to_dense().equal(at::zeros({3})));
}

TEST(Sparse, RanksThatDisagreeAreNamedOnAllRanks) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank always agrees";
  const bool first = hvd::rank() == 0;
  const std::string here = ": rank 0@; ";
  const std::string others = hvd::size() == 2 ? ": rank 1@" : ": ranks 1-" + std::to_string(hvd::size() - 1) + "@";
  const auto shape = [&](const Sizes& own, const Sizes& other) { return first ? own : other; };
  expect_refused(entry(1, shape({3}, {5})), {.name = "rows"}, "mismatched shape: [3]" + here + "[5]" + others);
  expect_refused(entry(1, shape({3, 2}, {3, 4})), {.name = "widths"},
                 "mismatched shape: [3, 2]" + here + "[3, 4]" + others);
  expect_refused(entry(1, {3}), {.op = first ? ReduceOp::kSum : ReduceOp::kAverage, .name = "ops"},
                 "mismatched reduction: Sum" + here + "Average" + others);
  expect_refused(entry(1, {3}, first ? at::kFloat : at::kComplexFloat), {.name = "types"},
                 "mismatched data type: float32" + here + "complex64" + others);
  expect_refused(at::ones({2, 2}).to_sparse(first ? 2 : 1), {.name = "hybrid"},
                 "mismatched number of sparse dimensions: 2" + here + "1" + others);
  expect_refused(entry(1, shape({3}, {4, 2}), first ? at::kLong : at::kBFloat16), {.name = "both"},
                 "mismatched data type: int64" + here + "bfloat16" + others + "; mismatched shape: [3]" + here +
                     "[4, 2]" + others);
}

TEST(Sparse, AProcessSetNamesGlobalRanks) {
  if (hvd::size() < 3) GTEST_SKIP() << "a process set of some ranks";
  const int last = hvd::size() - 1;
  const hvd::ProcessSet two = hvd::add_process_set(std::vector<int>{last - 1, last});
  if (two.included()) {
    const ReduceOp op = hvd::rank() == last ? ReduceOp::kSum : ReduceOp::kAverage;
    try {
      hvd::torch::sparse_allreduce(entry(0, {3}), {.op = op, .process_set = two, .name = "set"});
      FAIL() << "ops differ";
    } catch (const hvd::InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find("Average: rank " + std::to_string(last - 1)), std::string::npos);
    }
    const Tensor mean = hvd::torch::sparse_allreduce(entry(0, {3}), {.process_set = two, .name = "set"});
    EXPECT_TRUE(mean.to_dense().equal(at::tensor({1.0F, 0.0F, 0.0F})));
  }
  hvd::barrier();
  hvd::remove_process_set(two);
}

TEST(Sparse, AnotherGroupByTheNameIsAnError) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank always agrees";
  if (hvd::rank() > 0) {
    expect_refused(entry(0, {3}), {.name = "stranger"}, "a rank has another operation by this name");
    return;
  }
  const Tensor bytes = at::zeros({3}, at::kByte);
  hvd::torch::grouped_allgather({bytes, at::zeros({3}, at::kLong), bytes}, {.name = "stranger"});
  hvd::torch::sparse_allreduce(at::zeros({3}).to_sparse(), {.name = "stranger"});
}

TEST(Sparse, AnIndexOutsideIsAnErrorOnAllRanks) {
  Tensor mine = entry(0, {3});
  if (hvd::rank() == hvd::size() - 1) mine._indices().fill_(7);  // which torch does not see
  try {
    hvd::torch::sparse_allreduce(mine, {.name = "outside"});
    FAIL() << "an index is outside";
  } catch (const hvd::InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("'outside': a rank has a bad index: "), std::string::npos) << error.what();
  }
  EXPECT_EQ(hvd::allreduce(1, {.op = ReduceOp::kSum}), hvd::size());
}

// Torch's check of indices reads from the device: it is for those that are bad.
int checks = 0;
std::unique_ptr<at::ObserverContext> count_checks(const at::RecordFunction& function) {
  if (std::string_view(function.name()) == "aten::_validate_sparse_coo_tensor_args") ++checks;
  return nullptr;
}

TEST(Sparse, GoodIndicesAreNotReadBack) {
  const at::CallbackHandle counter = at::addThreadLocalCallback(at::RecordFunctionCallback(count_checks));
  const Tensor mine = entry(2, {3});
  checks = 0;
  hvd::torch::sparse_allreduce(mine, {.name = "good"});
  EXPECT_EQ(checks, 0);
  at::removeCallback(counter);
}

// Two embeddings, of which one is not used by all.
struct Embedder {
  Tensor words = made(30, 1);
  Tensor rare = made(10, 2);

  static Tensor made(std::int64_t rows, std::uint64_t seed) {
    at::manual_seed(seed);
    return at::randn({rows, 4}, at::kDouble).requires_grad_();
  }
  std::vector<Tensor> parameters() const { return {words, rare}; }
  hvd::torch::NamedTensors named() const { return {{"embedder.words", words}, {"embedder.rare", rare}}; }
  Tensor loss(const Tensor& chosen, bool use_rare, bool sparse) const {
    Tensor hidden = at::embedding(words, chosen, /*padding_idx=*/-1, /*scale_grad_by_freq=*/false, sparse);
    if (use_rare) hidden = hidden * at::embedding(rare, chosen.remainder(10), -1, false, sparse);
    return hidden.sum(1).square().mean();
  }
};

template <typename Inner, typename Options>
void expect_same_as_one_process(Options inner, const DistributedOptions& options, int passes) {
  const Embedder alone;
  const Embedder together;
  Inner reference(alone.parameters(), inner);
  DistributedOptimizer<Inner> optimizer(together.named(), inner, options);
  for (std::uint64_t step = 0; step < 6; ++step) {
    at::manual_seed(step);
    reference.zero_grad();
    optimizer.zero_grad();
    for (int pass = 0; pass < passes; ++pass) {
      const Tensor chosen = at::randint(30, {4 * static_cast<std::int64_t>(hvd::size()), 6}, at::kLong);
      // In some steps one rank has no gradient of the second embedding.
      const auto uses_rare = [&](int rank) { return step % 2 == 0 || rank > 0 || hvd::size() == 1; };
      const std::vector<Tensor> parts = chosen.chunk(hvd::size());
      for (int rank = 0; rank < hvd::size(); ++rank) {
        (alone.loss(parts[static_cast<std::size_t>(rank)], uses_rare(rank), false) / hvd::size()).backward();
      }
      together.loss(parts[static_cast<std::size_t>(hvd::rank())], uses_rare(hvd::rank()), true).backward();
    }
    reference.step();
    optimizer.synchronize();
    const bool stays_sparse = !options.sparse_as_dense && options.group_count == 0;
    if (hvd::size() > 1) {
      EXPECT_EQ(together.rare.grad().is_sparse(), stays_sparse);
    }
    const auto guard = optimizer.skip_synchronize();
    optimizer.step();
  }
  for (std::size_t i = 0; i < 2; ++i) {
    EXPECT_TRUE(together.parameters()[i].allclose(alone.parameters()[i], 1e-9, 1e-9)) << i;
    EXPECT_FALSE(together.parameters()[i].allclose(Embedder().parameters()[i], 1e-3, 1e-3)) << i;
  }
}

TEST(Sparse, EmbeddingsTrainAsInOneProcess) {
  for (const int passes : {1, 2}) {
    const optim::SGDOptions sgd(0.1);
    expect_same_as_one_process<optim::SGD>(sgd, {.backward_passes_per_step = passes}, passes);
    expect_same_as_one_process<optim::SGD>(sgd, {.backward_passes_per_step = passes, .sparse_as_dense = true}, passes);
    expect_same_as_one_process<optim::SGD>(sgd, {.backward_passes_per_step = passes, .group_count = 1}, passes);
    expect_same_as_one_process<optim::Adagrad>(optim::AdagradOptions(0.1), {.backward_passes_per_step = passes},
                                               passes);
  }
}

TEST(Sparse, ASparseGradientHasNoMaximum) {
  if (hvd::size() == 1) GTEST_SKIP() << "nothing is reduced";
  const Embedder embedder;
  DistributedOptimizer<optim::SGD> optimizer(embedder.named(), optim::SGDOptions(0.1), {.op = ReduceOp::kMax});
  EXPECT_THROW(embedder.loss(at::zeros({2, 3}, at::kLong), false, true).backward(), hvd::InvalidArgument);
}

// Run by tests/python/processes/test_mixed_ranks.py: ranks in Python do the same.
TEST(WithPython, DISABLED_SparseTensorsAreAddedUp) {
  const int ranks = hvd::size();
  const auto mine = [&](at::ScalarType type) { return entry(hvd::rank() % 2, {3, 2}, type); };
  const Tensor total = at::tensor({(ranks + 1) / 2, ranks / 2, 0}).reshape({3, 1}).expand({3, 2}).to(at::kDouble);
  for (const auto type : {at::kFloat, at::kBFloat16, at::kLong, at::kComplexDouble}) {
    const Tensor sum = hvd::torch::sparse_allreduce(mine(type), {.op = ReduceOp::kSum, .name = "sum"});
    EXPECT_EQ(sum.scalar_type(), type);
    EXPECT_TRUE(sum.to_dense().equal(total.to(type))) << sum;
  }
  const Tensor mean = hvd::torch::sparse_allreduce(mine(at::kDouble), {.name = "mean"});
  EXPECT_TRUE(mean.to_dense().allclose(total / ranks));
  const Embedder embedder;
  DistributedOptimizer<optim::SGD> optimizer(embedder.named(), optim::SGDOptions(0.1), {.op = ReduceOp::kSum});
  for (const bool all_use_rare : {true, false}) {  // in the second step rank 0 has no gradient of it
    optimizer.zero_grad();
    const bool uses_rare = all_use_rare || hvd::rank() > 0;
    const Tensor chosen = at::arange(4).unsqueeze(0);
    Tensor hidden = at::embedding(embedder.words, chosen, -1, false, /*sparse=*/true);
    if (uses_rare) hidden = hidden + at::embedding(embedder.rare, chosen, -1, false, /*sparse=*/true);
    hidden.sum().backward();
    optimizer.synchronize();
    const auto is_sum = [](const Tensor& parameter, int of_ranks) {
      return parameter.grad().is_sparse() &&
             parameter.grad().to_dense().narrow(0, 0, 4).equal(at::full({4, 4}, of_ranks, at::kDouble));
    };
    EXPECT_TRUE(is_sum(embedder.words, ranks));
    EXPECT_TRUE(is_sum(embedder.rare, all_use_rare ? ranks : ranks - 1));
  }
  const auto text = [&](const Tensor& tensor, ReduceOp op) -> std::string {
    try {
      hvd::torch::sparse_allreduce(tensor, {.op = op, .name = "parted"});
    } catch (const hvd::InvalidArgument& error) {
      return error.what();
    }
    return "";
  };
  const bool first = hvd::rank() == 0;
  const std::string different =
      text(first ? entry(0, {3}, at::kHalf) : entry(0, {4, 2}, at::kBool), first ? ReduceOp::kSum : ReduceOp::kAverage);
  const std::regex expected_text(
      R"(.*sparse allreduce 'parted': mismatched data type: float16: rank 0 \(.*:\d+\); bool: rank.* \(.*:\d+\); )"
      R"(mismatched shape: \[3\]: rank 0 \(.*\); \[4, 2\]: rank.* \(.*\); )"
      R"(mismatched reduction: Sum: rank 0 \(.*\); Average: rank.* \(.*\) \[.*\])");
  EXPECT_TRUE(std::regex_match(different, expected_text)) << different;
  hvd::barrier();
}

}  // namespace
