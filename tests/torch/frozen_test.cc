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
  const auto operations_done = [] {
    hvd_statistics statistics;
    HVD_INIT_STRUCT(&statistics);
    EXPECT_EQ(hvd_get_statistics(&statistics), HVD_OK);
    return statistics.operations_done;
  };
  Optimizer optimizer(named(make_parameters()), SGDOptions(0.1), {.group_count = 3});
  hvd::barrier();
  const auto before = operations_done();
  optimizer.step();
  EXPECT_EQ(operations_done() - before, 3);
}

// Run by tests/python/processes/test_mixed_ranks.py, which has the other half.
TEST(WithPython, DISABLED_ParametersAreFrozenAndUnfrozen) {
  expect_same_as_one_process({});
  expect_same_as_one_process({.group_count = 2});
  expect_same_as_one_process({.gradient_as_bucket_view = true});
  expect_same_as_one_process({.group_count = 2, .gradient_as_bucket_view = true});
  expect_adasum_to_agree();
  hvd::barrier();
}

}  // namespace
