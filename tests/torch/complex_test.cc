// Complex numbers, which ranks reduce part by part.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/optim/sgd.h>

#include <string>
#include <vector>

#include <horovod_cpp/torch.h>

namespace {

using at::Tensor;
using hvd::ReduceOp;

constexpr auto kType = at::kComplexDouble;

Tensor values(int rank, at::IntArrayRef shape = {3, 5}) {
  at::manual_seed(static_cast<std::uint64_t>(rank));
  return at::randn(shape, kType);
}
Tensor mine(at::IntArrayRef shape = {3, 5}) { return values(hvd::rank(), shape); }
Tensor total(at::IntArrayRef shape = {3, 5}) {
  Tensor sum = at::zeros(shape, kType);
  for (int rank = 0; rank < hvd::size(); ++rank) sum = sum + values(rank, shape);
  return sum;
}
void expect_close(const Tensor& got, const Tensor& expected) {
  ASSERT_EQ(got.sizes(), expected.sizes());
  EXPECT_EQ(got.scalar_type(), kType);
  EXPECT_TRUE(got.allclose(expected, 1e-9, 1e-9)) << got << "\n" << expected;
}

TEST(Complex, SumsAndAverages) {
  const hvd::ReduceOptions sum{.op = ReduceOp::kSum};
  expect_close(hvd::torch::allreduce(mine(), sum), total());
  expect_close(hvd::torch::allreduce(mine().t(), {.postscale = 2}), 2 * total().t() / hvd::size());
  expect_close(hvd::torch::allreduce(mine().conj(), sum), total().conj());
  expect_close(hvd::torch::allreduce(mine({}), sum), total({}));
  const Tensor in_single = hvd::torch::allreduce(mine().to(at::kComplexFloat), sum);
  EXPECT_EQ(in_single.scalar_type(), at::kComplexFloat);
  EXPECT_TRUE(in_single.allclose(total().to(at::kComplexFloat), 1e-5, 1e-5));
}

TEST(Complex, InPlaceResultsComeBackToViews) {
  const hvd::ReduceOptions sum{.op = ReduceOp::kSum};
  const Tensor contiguous = mine();
  EXPECT_TRUE(hvd::torch::allreduce_(contiguous, sum).is_same(contiguous));
  expect_close(contiguous, total());
  const Tensor transposed = mine();
  hvd::torch::allreduce_(transposed.t(), sum);
  expect_close(transposed, total());
  const Tensor conjugated = mine();
  hvd::torch::allreduce_(conjugated.conj(), sum);
  expect_close(conjugated, total());
  const Tensor root = mine();
  hvd::torch::broadcast_(root, hvd::size() - 1);
  expect_close(root, values(hvd::size() - 1));
}

TEST(Complex, WhatTheLibraryMakesIsComplex) {
  std::vector<Tensor> parts;
  for (int rank = 0; rank < hvd::size(); ++rank) parts.push_back(values(rank, {rank + 1, 2}));
  expect_close(hvd::torch::allgather(mine({hvd::rank() + 1, 2})), at::cat(parts));
  expect_close(hvd::torch::broadcast(mine(), 0), values(0));
  const std::vector<std::int64_t> shape{2 * static_cast<std::int64_t>(hvd::size()), 3};
  const std::int64_t first = 2 * static_cast<std::int64_t>(hvd::rank());
  expect_close(hvd::torch::reducescatter(mine(shape), {.op = ReduceOp::kSum}), total(shape).narrow(0, first, 2));
  const Tensor exchanged = hvd::torch::alltoall(mine(shape));
  expect_close(exchanged.narrow(0, 0, 2), values(0, shape).narrow(0, first, 2));
  const std::vector<Tensor> group =
      hvd::torch::grouped_allreduce({mine(), at::ones({2}), mine().t()}, {.op = ReduceOp::kSum});
  expect_close(group[0], total());
  EXPECT_TRUE(group[1].equal(at::full({2}, hvd::size(), at::kFloat)));
  expect_close(group[2], total().t());
}

TEST(Complex, GradientsFlow) {
  const Tensor input = mine().requires_grad_();
  const Tensor sum = hvd::torch::allreduce(input, {.op = ReduceOp::kSum});
  const Tensor gradient = torch::autograd::grad({sum.abs().square().sum()}, {input})[0];
  expect_close(gradient, 2 * hvd::size() * total());
}

TEST(Complex, ParametersTrainAsInOneProcess) {
  const auto made = [] { return values(50, {4}).requires_grad_(); };
  const auto loss = [](const Tensor& weight, const Tensor& inputs) {
    return inputs.matmul(weight).abs().square().mean();
  };
  for (const int group_count : {0, 1}) {
    const Tensor weight = made();
    const hvd::torch::NamedTensors named{{"complex.weight", weight}};
    hvd::torch::DistributedOptimizer<torch::optim::SGD> optimizer(named, torch::optim::SGDOptions(0.05),
                                                                  {.group_count = group_count});
    const Tensor expected = made();
    torch::optim::SGD plain({expected}, torch::optim::SGDOptions(0.05));
    for (int step = 0; step < 5; ++step) {
      const Tensor inputs = values(100 + step, {3 * static_cast<std::int64_t>(hvd::size()), 4});
      plain.zero_grad();
      loss(expected, inputs).backward();
      plain.step();
      optimizer.zero_grad();
      loss(weight, inputs.narrow(0, 3 * static_cast<std::int64_t>(hvd::rank()), 3)).backward();
      optimizer.step();
    }
    expect_close(weight, expected);
    EXPECT_FALSE(weight.allclose(made(), 1e-3, 1e-3));
  }
}

TEST(Complex, WhatHasNoOrderOrNoRowsIsRefused) {
  for (const ReduceOp op : {ReduceOp::kMin, ReduceOp::kMax, ReduceOp::kProduct, ReduceOp::kAdasum}) {
    try {
      hvd::torch::allreduce(mine(), {.op = op});
      FAIL() << "complex numbers have no such reduction";
    } catch (const hvd::InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find("can be summed and averaged only"), std::string::npos) << error.what();
    }
  }
  EXPECT_THROW(hvd::torch::grouped_reducescatter({mine()}, {.op = ReduceOp::kMax}), hvd::InvalidArgument);
  EXPECT_THROW(hvd::torch::allgather(mine({})), hvd::InvalidArgument);
  EXPECT_THROW(hvd::torch::alltoall(mine({})), hvd::InvalidArgument);
  if (hvd::size() > 1) {
    const auto type = hvd::rank() == 0 ? at::kComplexFloat : at::kComplexDouble;
    EXPECT_THROW(hvd::torch::allreduce(mine().to(type), {.name = "types"}), hvd::InvalidArgument);
  }
  EXPECT_EQ(hvd::allreduce(1, {.op = ReduceOp::kSum}), hvd::size());
}

}  // namespace
