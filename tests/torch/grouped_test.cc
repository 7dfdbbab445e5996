// Grouped collectives on tensors: what one operation for each tensor gives, in one.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <string>
#include <vector>

#include <horovod_cpp/hvd.h>
#include <horovod_cpp/torch/collectives.h>

namespace {

using at::Tensor;
using hvd::ReduceOp;

std::int64_t collective_calls() {
  hvd_statistics statistics;
  HVD_INIT_STRUCT(&statistics);
  hvd_get_statistics(&statistics);
  return statistics.collective_calls;
}

double sum_of_ranks() { return hvd::size() * (hvd::size() - 1) / 2.0; }

TEST(GroupedTensors, AllreduceReducesEachInOneOperation) {
  const Tensor whole = at::ones({4, 4}, at::kDouble);
  const std::vector<Tensor> tensors{at::full({2, 3}, hvd::rank(), at::kDouble), at::full({5}, hvd::rank(), at::kLong),
                                    whole.t().select(0, 1), at::empty({0})};
  const std::int64_t before = collective_calls();
  const std::vector<Tensor> sums = hvd::torch::grouped_allreduce(tensors, {.op = ReduceOp::kSum, .postscale = 2});
  if (hvd::size() > 1) {
    EXPECT_EQ(collective_calls(), before + 1);
  }
  ASSERT_EQ(sums.size(), 4U);
  EXPECT_TRUE(sums[0].equal(at::full({2, 3}, 2 * sum_of_ranks(), at::kDouble)));
  EXPECT_TRUE(sums[1].equal(at::full({5}, 2 * sum_of_ranks(), at::kLong)));
  EXPECT_TRUE(sums[2].equal(at::full({4}, 2.0 * hvd::size(), at::kDouble)));
  EXPECT_EQ(whole.sum().item<double>(), 16.0) << "the inputs stay";

  hvd::torch::GroupHandle handle = hvd::torch::grouped_allreduce_async_(tensors, {.op = ReduceOp::kSum});
  const std::vector<Tensor> in_place = handle.wait();
  for (std::size_t i = 0; i < tensors.size(); ++i) EXPECT_TRUE(in_place[i].is_same(tensors[i])) << i;
  EXPECT_EQ(whole.sum().item<double>(), 12.0 + 4.0 * hvd::size());
  EXPECT_FALSE(handle.valid());
  EXPECT_THROW(static_cast<void>(handle.done()), hvd::PreconditionError);
  hvd::torch::grouped_allreduce_(tensors);
  EXPECT_EQ(whole.sum().item<double>(), 12.0 + 4.0 * hvd::size());
}

TEST(GroupedTensors, AllgatherAndReducescatterMakeOutputsThatLive) {
  std::vector<Tensor> gathered = hvd::torch::grouped_allgather(
      {at::full({hvd::rank(), 2}, hvd::rank(), at::kDouble), at::full({1}, hvd::rank(), at::kInt)});
  EXPECT_EQ(gathered[0].size(0), sum_of_ranks());
  EXPECT_TRUE(gathered[1].equal(at::arange(hvd::size(), at::kInt)));
  const Tensor kept = gathered[1];
  gathered.clear();
  hvd::barrier();
  EXPECT_EQ(kept.sum().item<double>(), sum_of_ranks());

  hvd::torch::GroupHandle handle = hvd::torch::grouped_reducescatter_async(
      {at::ones({2 * hvd::size(), 3}, at::kDouble), at::ones({hvd::size()})}, {.op = ReduceOp::kSum});
  const std::vector<Tensor> shares = handle.wait();
  EXPECT_TRUE(shares[0].equal(at::full({2, 3}, hvd::size(), at::kDouble)));
  EXPECT_TRUE(shares[1].equal(at::full({1}, hvd::size(), at::kFloat)));
}

TEST(GroupedTensors, OneThatDiffersFailsThemAllOnAllRanks) {
  EXPECT_THROW(hvd::torch::grouped_allreduce(std::vector<Tensor>()), hvd::InvalidArgument);
  EXPECT_THROW(hvd::torch::grouped_allreduce({at::ones({1}), Tensor()}), hvd::InvalidArgument);
  if (hvd::size() == 1) GTEST_SKIP() << "one rank always agrees";
  const Tensor good = at::ones({2});
  const auto type = hvd::rank() == 0 ? at::kFloat : at::kDouble;
  try {
    hvd::torch::grouped_allreduce_({good, at::ones({3}, type)}, {.op = ReduceOp::kSum, .name = "types"});
    FAIL() << "types differ";
  } catch (const hvd::InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("'types'"), std::string::npos) << error.what();
  }
  EXPECT_TRUE(good.equal(at::ones({2}))) << "none is reduced";
  EXPECT_THROW(hvd::torch::grouped_allgather(std::vector<Tensor>(hvd::rank() == 0 ? 1 : 2, good)),
               hvd::InvalidArgument);
  EXPECT_EQ(hvd::allreduce(1, {.op = ReduceOp::kSum}), hvd::size());
}

// Of one gradient that differs by rank, in the tensors of a group and one by one.
template <typename Grouped, typename Single>
void expect_same_gradients(const std::vector<Tensor>& inputs, const Grouped& grouped, const Single& single) {
  const std::vector<Tensor> together = grouped(inputs);
  std::vector<Tensor> alone;
  std::vector<Tensor> incoming;
  for (const Tensor& input : inputs) {
    alone.push_back(single(input));
    const Tensor steps = at::arange(alone.back().numel(), at::kDouble).reshape(alone.back().sizes());
    incoming.push_back(steps * (hvd::rank() + 1) + 1);
    EXPECT_TRUE(together[alone.size() - 1].equal(alone.back()));
  }
  const auto got = torch::autograd::grad(together, inputs, incoming);
  const auto expected = torch::autograd::grad(alone, inputs, incoming);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    EXPECT_TRUE(got[i].allclose(expected[i], 1e-12, 1e-12)) << got[i] << expected[i];
    EXPECT_GT(got[i].abs().sum().item<double>(), 0);
  }
}

TEST(GroupedTensors, GradientsFlowAsThroughSingleOnes) {
  const auto rows = [](std::int64_t count) { return at::ones({count, 2}, at::kDouble).requires_grad_(); };
  const hvd::ReduceOptions sum{.op = ReduceOp::kSum, .prescale = 3};
  for (const hvd::ReduceOptions& options : {sum, hvd::ReduceOptions{}}) {
    expect_same_gradients(
        {rows(2 * hvd::size()), rows(hvd::size())},
        [&](const auto& inputs) { return hvd::torch::grouped_allreduce(inputs, options); },
        [&](const auto& input) { return hvd::torch::allreduce(input, options); });
    expect_same_gradients(
        {rows(2 * hvd::size()), rows(hvd::size())},
        [&](const auto& inputs) { return hvd::torch::grouped_reducescatter(inputs, options); },
        [&](const auto& input) { return hvd::torch::reducescatter(input, options); });
  }
  expect_same_gradients(
      {rows(1 + hvd::rank()), rows(5 - hvd::rank())},
      [](const auto& inputs) { return hvd::torch::grouped_allgather(inputs); },
      [](const auto& input) { return hvd::torch::allgather(input); });
  const at::NoGradGuard no_grad;
  EXPECT_FALSE(hvd::torch::grouped_allreduce({rows(1)})[0].requires_grad());
}

TEST(GroupedTensors, TheirNamesAreOfAProcessSet) {
  if (hvd::size() < 2) GTEST_SKIP() << "needs two ranks";
  const std::vector<int> first{0};
  const hvd::ProcessSet alone = hvd::add_process_set(first);
  if (alone.included()) {
    EXPECT_TRUE(
        hvd::torch::grouped_allgather({at::ones({2})}, {.process_set = alone, .name = "g"})[0].equal(at::ones({2})));
  } else {
    EXPECT_THROW(hvd::torch::grouped_allgather({at::ones({2})}, {.process_set = alone}), hvd::PreconditionError);
  }
  hvd::barrier();
  hvd::remove_process_set(alone);
}

}  // namespace
