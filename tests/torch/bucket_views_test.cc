// Gradients that are views of buckets (DistributedOptions::gradient_as_bucket_view), on every rank of a job.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <string>
#include <utility>
#include <vector>

#include <horovod_cpp/torch.h>

namespace {

using at::Tensor;
using hvd::ReduceOp;
using hvd::torch::DistributedOptimizer;
using hvd::torch::DistributedOptions;
using hvd::torch::NamedTensors;
using torch::optim::SGD, torch::optim::SGDOptions;
using Optimizer = DistributedOptimizer<SGD>;

Tensor parameter(const std::vector<std::int64_t>& shape, at::ScalarType type = torch::kFloat64) {
  return torch::ones(shape, type).requires_grad_();
}

NamedTensors named(const std::vector<Tensor>& parameters) {
  NamedTensors all;
  for (const Tensor& parameter : parameters) all.emplace_back("p" + std::to_string(all.size()), parameter);
  return all;
}

// Of each parameter a gradient of rank + 1.
void backward(const std::vector<Tensor>& parameters) {
  Tensor loss = torch::zeros({}, torch::kFloat64);
  for (const Tensor& parameter : parameters) loss = loss + parameter.sum().to(torch::kFloat64) * (hvd::rank() + 1);
  loss.backward();
}

double sum_of_ranks() { return hvd::size() * (hvd::size() + 1) / 2.0; }

void expect_gradients(const std::vector<Tensor>& parameters, double value) {
  for (const Tensor& parameter : parameters) {
    EXPECT_TRUE(parameter.grad().allclose(torch::full_like(parameter, value))) << parameter.sizes();
  }
}

std::int64_t operations_done() {
  hvd_statistics statistics;
  HVD_INIT_STRUCT(&statistics);
  EXPECT_EQ(hvd_get_statistics(&statistics), HVD_OK);
  return static_cast<std::int64_t>(statistics.operations_done);
}

TEST(BucketViews, LieSideBySideAndStayWhereTheyAre) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank reduces nothing";
  const Tensor channels_last =
      torch::ones({2, 3, 4, 5}, torch::kFloat64).contiguous(torch::MemoryFormat::ChannelsLast).requires_grad_();
  const std::vector<Tensor> parameters{parameter({5}), channels_last, parameter({3, 2})};
  Optimizer optimizer(named(parameters), SGDOptions(0.1), {.op = ReduceOp::kSum, .gradient_as_bucket_view = true});
  std::vector<void*> addresses;
  for (const bool set_to_none : {true, true, false, false}) {
    optimizer.zero_grad(set_to_none);
    hvd::barrier();
    const std::int64_t before = operations_done();
    backward(parameters);
    optimizer.synchronize();
    EXPECT_EQ(operations_done() - before, 1) << "a bucket is one operation";
    expect_gradients(parameters, sum_of_ranks());
    std::vector<void*> now;
    for (const Tensor& each : parameters) now.push_back(each.grad().data_ptr());
    if (!addresses.empty()) {
      EXPECT_EQ(now, addresses);
    }
    addresses = now;
    const auto guard = optimizer.skip_synchronize();
    optimizer.step();
  }
  // The last parameter lies first. 64 bytes are 8 elements.
  const auto* const begin = parameters[2].grad().data_ptr<double>();
  EXPECT_EQ(parameters[1].grad().data_ptr<double>() - begin, 8);
  EXPECT_EQ(parameters[0].grad().data_ptr<double>() - begin, 8 + 120);
  EXPECT_EQ(parameters[1].grad().strides(), channels_last.strides());
}

TEST(BucketViews, MissingOnesAreZerosAndTheUsersOwnAreTakenIn) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank reduces nothing";
  const std::vector<Tensor> parameters{parameter({5}), parameter({3, 2}), parameter({4})};
  Optimizer optimizer(named(parameters), SGDOptions(0.1), {.op = ReduceOp::kSum, .gradient_as_bucket_view = true});
  for (int step = 0; step < 2; ++step) {
    optimizer.zero_grad();
    backward({parameters[0]});
    parameters[2].mutable_grad() = torch::full({4}, 2.0, torch::kFloat64);
    parameters[0].mutable_grad() = Tensor();  // what is handed over comes back
    optimizer.synchronize();
    expect_gradients({parameters[0]}, sum_of_ranks());
    expect_gradients({parameters[1]}, 0.0);
    expect_gradients({parameters[2]}, 2.0 * hvd::size());
  }
}

TEST(BucketViews, EachTypeAndGroupIsABucket) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank reduces nothing";
  const std::vector<Tensor> parameters{parameter({5}), parameter({5}, torch::kFloat32), parameter({7}),
                                       parameter({7}, torch::kComplexDouble)};
  const auto operations = [&](DistributedOptions options) {
    options.op = ReduceOp::kSum;
    options.gradient_as_bucket_view = true;
    Optimizer optimizer(named(parameters), SGDOptions(0.1), options);
    optimizer.zero_grad();
    hvd::barrier();
    const std::int64_t before = operations_done();
    for (int pass = 0; pass < options.backward_passes_per_step; ++pass) {
      backward({parameters[0], parameters[1], parameters[2]});
      (torch::real(parameters[3]).sum() * (hvd::rank() + 1)).backward();
    }
    optimizer.synchronize();
    expect_gradients(parameters, sum_of_ranks() * options.backward_passes_per_step);
    return operations_done() - before;
  };
  EXPECT_EQ(operations({}), 3);
  EXPECT_EQ(operations({.backward_passes_per_step = 2}), 3);
  EXPECT_EQ(operations({.compression = hvd::torch::Compression::kBf16}), 3);
  EXPECT_EQ(operations({.group_count = 2}), 4);
  EXPECT_EQ(operations({.groups = {{parameters[2], parameters[0]}}}), 3);
  EXPECT_EQ(operations({.groups = {{parameters[2]}}}), 4);
}

TEST(BucketViews, SparseGradientsAreMadeDenseOrRefused) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank reduces nothing";
  torch::nn::Embedding table(torch::nn::EmbeddingOptions(5, 2).sparse(true));
  const auto backward = [&] { table->forward(torch::full({1}, hvd::rank(), torch::kLong)).sum().backward(); };
  {
    Optimizer optimizer(table->named_parameters(), SGDOptions(0.1),
                        {.op = ReduceOp::kSum, .sparse_as_dense = true, .gradient_as_bucket_view = true});
    backward();
    optimizer.synchronize();
    const Tensor gradient = table->weight.grad();
    EXPECT_TRUE(gradient.slice(0, 0, hvd::size()).allclose(torch::ones({hvd::size(), 2})));
    EXPECT_EQ(gradient.sum().item<float>(), 2.0F * static_cast<float>(hvd::size()));
  }
  Optimizer optimizer(table->named_parameters(), SGDOptions(0.1), {.gradient_as_bucket_view = true});
  optimizer.zero_grad();
  try {
    backward();
    ADD_FAILURE() << "taken";
  } catch (const hvd::InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("parameter 'weight' has a sparse gradient"), std::string::npos)
        << error.what();
  }
  optimizer.zero_grad();
  optimizer.step();
}

TEST(BucketViews, AGroupThatIsAddedLaterHasBucketsOfItsOwn) {
  const std::vector<Tensor> parameters{parameter({5})};
  const std::vector<Tensor> late{parameter({3}), parameter({2})};
  Optimizer optimizer(named(parameters), SGDOptions(1.0), {.gradient_as_bucket_view = true});
  optimizer.add_param_group(torch::optim::OptimizerParamGroup(late, std::make_unique<SGDOptions>(1.0)));
  for (int step = 0; step < 2; ++step) {
    optimizer.zero_grad();
    backward({parameters[0], late[0], late[1]});
    optimizer.step();
    expect_gradients({parameters[0], late[0], late[1]}, sum_of_ranks() / hvd::size());
  }
}

TEST(BucketViews, ARefusedReductionIsStartedByTheStep) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank reduces nothing";
  const std::vector<Tensor> parameters{parameter({4})};
  Optimizer optimizer(named(parameters), SGDOptions(1.0), {.op = ReduceOp::kSum, .gradient_as_bucket_view = true});
  const auto block = [] { return hvd::torch::allreduce_async(torch::ones({4}), {.name = "bucket.0.p0"}); };
  hvd::torch::Handle blocking;
  if (hvd::rank() == 0) {
    blocking = block();
    EXPECT_THROW(backward(parameters), hvd::InvalidArgument);
  }
  hvd::barrier();
  if (hvd::rank() != 0) blocking = block();
  blocking.wait();
  if (hvd::rank() != 0) backward(parameters);
  optimizer.synchronize();
  expect_gradients(parameters, sum_of_ranks());
}

TEST(BucketViews, ThatLieDifferentlyMeetAnErrorAndTrainingGoesOn) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank always agrees";
  Tensor weight = torch::ones({3, 2, 2, 2}, torch::kFloat64);
  if (hvd::rank() == 0) weight = weight.contiguous(torch::MemoryFormat::ChannelsLast);
  weight.requires_grad_();
  Optimizer optimizer(named({weight}), SGDOptions(1.0), {.gradient_as_bucket_view = true});
  weight.sum().backward();
  EXPECT_THROW(optimizer.step(), hvd::Error);
  hvd::barrier();
  const std::vector<Tensor> parameters{parameter({4})};
  Optimizer next(named(parameters), SGDOptions(1.0), {.op = ReduceOp::kSum, .gradient_as_bucket_view = true});
  backward(parameters);
  next.step();
  expect_gradients(parameters, sum_of_ranks());
}

TEST(BucketViews, AGradientThatSomebodyHasMovedIsReduced) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank reduces nothing";
  const std::vector<Tensor> parameters{parameter({4}), parameter({3})};
  Optimizer optimizer(named(parameters), SGDOptions(0.1), {.op = ReduceOp::kSum, .gradient_as_bucket_view = true});
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad(/*set_to_none=*/step == 1);
    backward(parameters);
    optimizer.synchronize();
    expect_gradients(parameters, sum_of_ranks());
    parameters[0].mutable_grad().set_data(torch::full({4}, 7.0, torch::kFloat64));  // the same object, other memory
  }
}

// named_parameters() lists a module that is used twice under both of its names.
TEST(BucketViews, AParameterOfTwoNamesHasOnePlace) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank reduces nothing";
  const Tensor shared = parameter({5});
  const std::vector<Tensor> parameters{parameter({3}), shared, parameter({2}), shared};
  for (const bool views : {false, true}) {
    Optimizer optimizer(named(parameters), SGDOptions(0.1), {.op = ReduceOp::kSum, .gradient_as_bucket_view = views});
    optimizer.zero_grad();
    backward(parameters);
    optimizer.synchronize();
    expect_gradients({parameters[0], parameters[2]}, sum_of_ranks());
    expect_gradients({shared}, 2 * sum_of_ranks());
  }
}

TEST(BucketViews, AreNotForAdasum) {
  EXPECT_THROW(
      Optimizer(named({parameter({2})}), SGDOptions(1.0), {.op = ReduceOp::kAdasum, .gradient_as_bucket_view = true}),
      hvd::InvalidArgument);
}

// Run by tests/python/processes/test_mixed_ranks.py, which has the other half. Several buckets of two types.
TEST(WithPython, DISABLED_BucketsAreCutAlike) {
  const Tensor channels_last =
      torch::ones({4, 3, 2, 2}, torch::kFloat64).contiguous(torch::MemoryFormat::ChannelsLast).requires_grad_();
  const std::vector<Tensor> parameters{parameter({5}),        parameter({1000, 1000}),
                                       channels_last,         parameter({1100, 1000}),
                                       parameter({0, 3}),     parameter({300, 2}, torch::kFloat32),
                                       parameter({700, 300}), parameter({})};
  Optimizer optimizer(named(parameters), SGDOptions(0.1), {.op = ReduceOp::kSum, .gradient_as_bucket_view = true});
  for (int step = 0; step < 2; ++step) {
    optimizer.zero_grad();
    hvd::barrier();
    const std::int64_t before = operations_done();
    backward(parameters);
    optimizer.synchronize();
    EXPECT_EQ(operations_done() - before, 4);
    expect_gradients(parameters, sum_of_ranks());
  }
  hvd::barrier();
}

}  // namespace
