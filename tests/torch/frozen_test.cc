// Parameters that are frozen (requires_grad false) when the optimizer is made, or later, on every rank of a job.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <vector>

#include <horovod_cpp/torch.h>

namespace {

using at::Tensor;
using hvd::ReduceOp;
using hvd::torch::DistributedOptions;
using hvd::torch::NamedTensors;
using torch::optim::SGD, torch::optim::SGDOptions;
using Optimizer = hvd::torch::DistributedOptimizer<SGD>;

constexpr std::size_t kParameters = 6;

std::vector<Tensor> make_parameters() {
  std::vector<Tensor> all;
  for (std::size_t i = 0; i < kParameters; ++i) all.push_back(torch::ones({3}, torch::kFloat64).requires_grad_(i > 1));
  return all;
}

NamedTensors named(const std::vector<Tensor>& parameters) {
  NamedTensors all;
  for (const Tensor& parameter : parameters) all.emplace_back("p" + std::to_string(all.size()), parameter);
  return all;
}

SGDOptions moving() { return SGDOptions(0.125).momentum(0.5).weight_decay(0.25); }

std::int64_t operations_done() {
  hvd_statistics statistics;
  HVD_INIT_STRUCT(&statistics);
  EXPECT_EQ(hvd_get_statistics(&statistics), HVD_OK);
  return static_cast<std::int64_t>(statistics.operations_done);
}

// The first two are unfrozen after two steps, the second of them first; the third is frozen for two steps.
void freeze_for_step(const std::vector<Tensor>& parameters, int step) {
  parameters[1].requires_grad_(step >= 2);
  parameters[0].requires_grad_(step >= 3);
  parameters[2].requires_grad_(step < 1 || step > 2);
}

// Each gradient is `factor`, times the number of the parameter, in each pass.
template <typename Any>
void train(const std::vector<Tensor>& parameters, Any& optimizer, double factor, int passes) {
  for (int step = 0; step < 5; ++step) {
    freeze_for_step(parameters, step);
    const Tensor still = parameters[2].detach().clone();
    optimizer.zero_grad();
    for (int pass = 0; pass < passes; ++pass) {
      Tensor loss = torch::zeros({}, torch::kFloat64);
      for (std::size_t i = 0; i < parameters.size(); ++i)
        loss = loss + parameters[i].sum() * static_cast<double>(i + 1) * factor;
      loss.backward();
    }
    optimizer.step();
    EXPECT_EQ(parameters[2].equal(still), step == 1 || step == 2) << "step " << step;
    EXPECT_EQ(parameters[2].grad().defined(), step < 1 || step > 2) << "step " << step;
  }
}

void expect_same_as_one_process(DistributedOptions options) {
  const std::vector<Tensor> alone = make_parameters();
  SGD reference(alone, moving());
  train(alone, reference, hvd::size() * (hvd::size() + 1) / 2.0, options.backward_passes_per_step);
  const std::vector<Tensor> parameters = make_parameters();
  options.op = ReduceOp::kSum;
  Optimizer optimizer(named(parameters), moving(), options);
  train(parameters, optimizer, hvd::rank() + 1, options.backward_passes_per_step);
  for (std::size_t i = 0; i < kParameters; ++i) {
    EXPECT_TRUE(parameters[i].allclose(alone[i])) << i << ": " << parameters[i] << alone[i];
  }
}

void expect_adasum_to_agree() {
  const std::vector<Tensor> parameters = make_parameters();
  Optimizer optimizer(named(parameters), moving(), {.op = ReduceOp::kAdasum});
  train(parameters, optimizer, hvd::rank() + 1, /*passes=*/1);
  for (const Tensor& parameter : parameters) {
    EXPECT_TRUE(hvd::torch::broadcast(parameter.detach(), 0).equal(parameter)) << parameter;
    EXPECT_LT(parameter[0].item<double>(), 1.0);
  }
}

TEST(Frozen, ParametersAreReducedOnceTheyRequireAGradientAndStayWhileTheyDoNot) {
  expect_same_as_one_process({});
  expect_same_as_one_process({.backward_passes_per_step = 2});
  expect_same_as_one_process({.compression = hvd::torch::Compression::kBf16});
}
TEST(Frozen, InGroups) {
  expect_same_as_one_process({.group_count = 2});
  expect_same_as_one_process({.backward_passes_per_step = 2, .group_count = 1});
}
TEST(Frozen, InBuckets) {
  expect_same_as_one_process({.gradient_as_bucket_view = true});
  expect_same_as_one_process({.group_count = 3, .gradient_as_bucket_view = true});
}
TEST(Frozen, WithAdasum) { expect_adasum_to_agree(); }

TEST(Frozen, OnesOfAGroupThatIsAddedLater) {
  const Tensor first = torch::ones({3}, torch::kFloat64).requires_grad_();
  for (const bool views : {false, true}) {
    const Tensor late = torch::ones({3}, torch::kFloat64);
    Optimizer optimizer(named({first}), SGDOptions(0.0), {.op = ReduceOp::kSum, .gradient_as_bucket_view = views});
    optimizer.add_param_group(torch::optim::OptimizerParamGroup({late}, std::make_unique<SGDOptions>(0.0)));
    optimizer.step();
    EXPECT_FALSE(late.grad().defined());
    late.requires_grad_();
    (late.sum() * (hvd::rank() + 1)).backward();
    optimizer.step();
    EXPECT_EQ(late.grad()[0].item<double>(), hvd::size() * (hvd::size() + 1) / 2.0);
  }
}

TEST(Frozen, ANumberOfGroupsCountsWhatRequiresAGradient) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank has no groups";
  Optimizer optimizer(named(make_parameters()), SGDOptions(0.1), {.group_count = 3});
  hvd::barrier();
  const auto before = operations_done();
  optimizer.step();
  EXPECT_EQ(operations_done() - before, 3);
}

// A gradient of the rank, and one, in what is not frozen.
void backward(const std::vector<Tensor>& parameters) {
  Tensor loss = torch::zeros({}, torch::kFloat64);
  for (const Tensor& parameter : parameters) loss = loss + parameter.sum() * static_cast<double>(hvd::rank() + 1);
  loss.backward();
}

// The last rank freezes the second parameter before the others do; they all train it again.
void expect_zeros_of_who_froze(DistributedOptions options) {
  const std::vector<Tensor> parameters{torch::ones({3}, torch::kFloat64).requires_grad_(),
                                       torch::ones({3}, torch::kFloat64).requires_grad_()};
  const Tensor alone = torch::ones({3}, torch::kFloat64).requires_grad_();
  SGD reference({alone}, moving());
  options.op = ReduceOp::kSum;
  Optimizer optimizer(named(parameters), moving(), options);
  const Tensor& second = parameters[1];
  const double all = hvd::size() * (hvd::size() + 1) / 2.0;
  const double others = all - hvd::size();  // none with one rank
  const bool is_last = hvd::rank() == hvd::size() - 1;
  for (int step = 0; step < 8; ++step) {
    second.requires_grad_(step < (is_last ? 1 : 3) || step == 6 || step == 7);
    optimizer.zero_grad();
    backward(parameters);
    optimizer.step();
    const double expected = step < 1 || step > 5 ? all : step < 3 ? others : 0.0;
    EXPECT_EQ(second.grad().defined(), expected > 0) << "step " << step;
    if (expected > 0) {
      EXPECT_TRUE(second.grad().equal(torch::full({3}, expected, torch::kFloat64))) << step << second.grad();
      alone.mutable_grad() = torch::full({3}, expected, torch::kFloat64);
      reference.step();
    }
    EXPECT_TRUE(second.allclose(alone)) << "step " << step << second << alone;
    EXPECT_TRUE(parameters[0].grad().equal(torch::full({3}, all, torch::kFloat64)));
  }
}

void expect_adasum_of_who_froze() {
  const std::vector<Tensor> parameters{torch::ones({3}, torch::kFloat64).requires_grad_(),
                                       torch::ones({3}, torch::kFloat64).requires_grad_()};
  Optimizer optimizer(named(parameters), moving(), {.op = ReduceOp::kAdasum});
  const int last_moved = hvd::size() > 1 ? 2 : 0;
  for (int step = 0; step < 6; ++step) {
    parameters[1].requires_grad_(step < (hvd::rank() == 0 ? 1 : 3) || step == 5);
    const Tensor before = parameters[1].detach().clone();
    optimizer.zero_grad();
    backward(parameters);
    optimizer.step();
    EXPECT_EQ(parameters[1].equal(before), step > last_moved && step < 5) << "step " << step;
    for (const Tensor& parameter : parameters) {
      EXPECT_TRUE(hvd::torch::broadcast(parameter.detach(), 0).equal(parameter)) << step << parameter;
    }
  }
}

TEST(Frozen, ZerosStandForTheGradientOfARankThatFreezesAlone) { expect_zeros_of_who_froze({}); }
TEST(Frozen, ZerosStandForItInGroupsAndBuckets) {
  for (const bool views : {false, true}) {
    expect_zeros_of_who_froze({.group_count = 1, .gradient_as_bucket_view = views});
    expect_zeros_of_who_froze({.group_count = 2, .gradient_as_bucket_view = views});
  }
  expect_zeros_of_who_froze({.gradient_as_bucket_view = true});
}
TEST(Frozen, ZerosStandForItWithCompression) {
  expect_zeros_of_who_froze({.compression = hvd::torch::Compression::kFp16});
}
TEST(Frozen, ARankThatFreezesAloneWithAdasum) { expect_adasum_of_who_froze(); }

TEST(Frozen, OneRankMayUseItInTheStepInWhichItBecomesFrozen) {
  for (const int groups : {0, 1, 2}) {
    const std::vector<Tensor> parameters{torch::ones({3}, torch::kFloat64).requires_grad_(),
                                         torch::ones({3}, torch::kFloat64).requires_grad_()};
    Optimizer optimizer(named(parameters), moving(), {.op = ReduceOp::kSum, .group_count = groups});
    for (int step = 0; step < 4; ++step) {
      optimizer.zero_grad();
      if (hvd::rank() > 0 && step == 1) parameters[1].requires_grad_(false);
      backward(parameters);
      if (hvd::rank() == 0 && step == 1) parameters[1].requires_grad_(false);
      optimizer.step();
      EXPECT_EQ(parameters[1].grad().defined(), step < 2) << "step " << step;
      if (step == 1) {
        EXPECT_EQ(parameters[1].grad()[0].item<double>(), 1.0);
      }
      EXPECT_TRUE(hvd::torch::broadcast(parameters[1].detach(), 0).equal(parameters[1])) << step;
    }
  }
}

TEST(Frozen, WhatIsFrozenOnAllRanksCostsNothing) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank reduces nothing";
  for (const bool views : {false, true}) {
    const std::vector<Tensor> parameters{torch::ones({3}, torch::kFloat64).requires_grad_(),
                                         torch::ones({3}, torch::kFloat64).requires_grad_()};
    Optimizer optimizer(named(parameters), moving(), {.group_count = 2, .gradient_as_bucket_view = views});
    const auto operations_of_a_step = [&] {
      hvd::barrier();
      const std::int64_t before = operations_done();
      optimizer.zero_grad();
      backward(parameters);
      optimizer.step();
      return operations_done() - before;
    };
    EXPECT_EQ(operations_of_a_step(), 2);
    parameters[1].requires_grad_(hvd::rank() != 0);
    operations_of_a_step();
    EXPECT_EQ(operations_of_a_step(), 2);  // zeros still go
    parameters[1].requires_grad_(false);
    operations_of_a_step();
    EXPECT_EQ(operations_of_a_step(), 1);
  }
}

TEST(Frozen, ASparseGradientOfARankThatFreezesAlone) {
  const Tensor table = torch::ones({4, 2}, torch::kFloat64).requires_grad_();
  Optimizer optimizer(named({table}), SGDOptions(0.5), {.op = ReduceOp::kSum});
  const int last_moved = hvd::size() > 1 ? 3 : 1;
  for (int step = 0; step < 6; ++step) {
    table.requires_grad_(step < (hvd::rank() == 0 ? 2 : 4));
    const Tensor before = table.detach().clone();
    optimizer.zero_grad();
    const Tensor index = torch::full({1}, hvd::rank() % 4, torch::kLong);
    const Tensor rows = torch::embedding(table, index, /*padding_idx=*/-1, /*scale_grad_by_freq=*/false,
                                         /*sparse=*/true);
    if (rows.requires_grad()) rows.sum().backward();
    optimizer.step();
    EXPECT_EQ(table.equal(before), step > last_moved) << "step " << step;
    EXPECT_EQ(table.grad().defined(), step <= last_moved) << "step " << step;
    EXPECT_TRUE(hvd::torch::broadcast(table.detach(), 0).equal(table)) << "step " << step;
  }
}

// Run by tests/python/processes/test_mixed_ranks.py, which has the other half.
TEST(WithPython, DISABLED_ParametersAreFrozenAndUnfrozen) {
  expect_same_as_one_process({});
  expect_same_as_one_process({.group_count = 2});
  expect_same_as_one_process({.gradient_as_bucket_view = true});
  expect_same_as_one_process({.group_count = 2, .gradient_as_bucket_view = true});
  expect_adasum_to_agree();
  expect_zeros_of_who_froze({});
  expect_zeros_of_who_froze({.group_count = 2});
  expect_zeros_of_who_froze({.gradient_as_bucket_view = true});
  expect_zeros_of_who_froze({.group_count = 2, .gradient_as_bucket_view = true});
  expect_adasum_of_who_froze();
  hvd::barrier();
}

}  // namespace
