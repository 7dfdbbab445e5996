// Sparse tensors and sparse gradients: what the dense ones give, in float64, 1e-9.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/sgd.h>

#include <string>
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

TEST(Sparse, WhatIsNotSparseOrCannotBeAddedUpIsRefused) {
  const Tensor mine = entries(hvd::rank(), at::kFloat, 2);
  EXPECT_THROW(hvd::torch::sparse_allreduce(at::ones({3})), hvd::InvalidArgument);
  EXPECT_THROW(hvd::torch::sparse_allreduce(Tensor()), hvd::InvalidArgument);
  EXPECT_THROW(hvd::torch::sparse_allreduce(mine, {.op = ReduceOp::kMax}), hvd::InvalidArgument);
  EXPECT_THROW(hvd::torch::sparse_allreduce(mine, {.prescale = 2}), hvd::InvalidArgument);
  if (hvd::size() == 1) GTEST_SKIP() << "one rank always agrees";
  try {
    const int width = hvd::rank() == 0 ? 2 : 3;
    hvd::torch::sparse_allreduce(entries(1, at::kFloat, width), {.name = "widths"});
    FAIL() << "widths differ";
  } catch (const hvd::InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("'widths.values'"), std::string::npos) << error.what();
  }
  EXPECT_EQ(hvd::allreduce(1, {.op = ReduceOp::kSum}), hvd::size());
}

TEST(Sparse, RowsOutsideOfTheOwnShapeAreAnError) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank always agrees";
  const std::int64_t rows = hvd::rank() == 0 ? 3 : 9;  // which an allgather of entries cannot see
  const Tensor last = at::sparse_coo_tensor(at::full({1, 1}, rows - 1, at::kLong), at::ones({1}), {rows});
  if (hvd::rank() == 0) {
    EXPECT_THROW(hvd::torch::sparse_allreduce(last), hvd::InvalidArgument);
  } else {
    EXPECT_EQ(hvd::torch::sparse_allreduce(last, {.op = ReduceOp::kSum}).to_dense()[2].item<float>(), 1.0F);
  }
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

}  // namespace
