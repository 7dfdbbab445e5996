// Gradients whose memory others have or need: they are reduced in place, and once. On every rank of a job.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <optional>
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

Tensor parameter(const std::vector<std::int64_t>& shape) { return torch::zeros(shape).requires_grad_(); }

double sum_of_ranks() { return hvd::size() * (hvd::size() + 1) / 2.0; }

TEST(GradientsInPlace, ThatAutogradPutsInOneMemoryAreReducedOnceEach) {
  const auto expect = [](DistributedOptions options) {
    options.op = ReduceOp::kSum;
    const Tensor weight = parameter({1 << 18, 3});  // too large to be fused by copying
    const Tensor change = parameter({1 << 18, 3});
    Optimizer optimizer(NamedTensors{{"weight", weight}, {"change", change}}, SGDOptions(1.0), options);
    for (int step = 1; step <= 2; ++step) {
      optimizer.zero_grad();
      torch::full({1, 3}, hvd::rank() + 1.0).to(torch::kFloat32).mm(weight.t() + change.t()).sum().backward();
      optimizer.step();
      for (const Tensor& each : {weight, change}) {
        EXPECT_TRUE(each.equal(torch::full_like(each, -step * sum_of_ranks()))) << each.slice(0, 0, 1);
      }
    }
  };
  expect({});
  expect({.group_count = 1});
  expect({.compression = hvd::torch::Compression::kBf16});
  expect({.gradient_as_bucket_view = true});
}

TEST(GradientsInPlace, ThatTheProgramKeepsInOneMemoryStayThere) {
  for (const int groups : {0, 1}) {
    const std::vector<Tensor> parameters{parameter({2, 3}), parameter({2, 3})};
    Optimizer optimizer(NamedTensors{{"first", parameters[0]}, {"second", parameters[1]}}, SGDOptions(1.0),
                        {.op = ReduceOp::kSum, .group_count = groups});
    const Tensor flat = torch::zeros({12});
    for (std::size_t i = 0; i < 2; ++i) parameters[i].mutable_grad() = flat.chunk(2)[i].view({2, 3});
    for (int step = 0; step < 2; ++step) {
      flat.zero_();
      flat.slice(0, 6) += 1;
      (parameters[0].sum() * (hvd::rank() + 1)).backward();
      optimizer.step();
      EXPECT_TRUE(flat.slice(0, 0, 6).equal(torch::full({6}, sum_of_ranks()).to(torch::kFloat32))) << flat;
      EXPECT_TRUE(flat.slice(0, 6).equal(torch::full({6}, hvd::size()).to(torch::kFloat32))) << flat;
      EXPECT_EQ(parameters[1].grad().data_ptr<float>(), flat.data_ptr<float>() + 6);
    }
  }
}

void expect_refused(const std::function<void()>& backward, const std::string& text) {
  try {
    backward();
    ADD_FAILURE() << "taken";
  } catch (const hvd::PreconditionError& error) {
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
  }
}

// Keeps what torch warns of while it lives.
class Warnings : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override { texts.push_back(warning.msg()); }

  std::vector<std::string> texts;

 private:
  const c10::WarningUtils::WarningHandlerGuard guard_{this};
};

TEST(GradientsInPlace, ThatAreChangedInFlightAreToldOfOnce) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank has nothing in flight";
  const std::vector<DistributedOptions> all{
      {},
      {.group_count = 1},
      {.gradient_as_bucket_view = true},
      {.compression = hvd::torch::Compression::kFp16},
      {.backward_passes_per_step = 2},
  };
  for (const DistributedOptions& options : all) {
    const std::vector<Tensor> parameters{parameter({3}), parameter({2})};
    Optimizer optimizer(NamedTensors{{"first", parameters[0]}, {"second", parameters[1]}}, SGDOptions(0.1), options);
    Warnings warnings;
    for (const int changes : {0, 1, 0, 1}) {
      optimizer.zero_grad();
      for (int pass = 0; pass < options.backward_passes_per_step; ++pass) {
        (parameters[0].sum() + parameters[1].sum()).backward();
      }
      if (changes > 0) parameters[0].mutable_grad().mul_(0.5);
      optimizer.step();
    }
    ASSERT_EQ(warnings.texts.size(), 1U);
    EXPECT_EQ(warnings.texts[0].find("The gradient of parameter 'first' was changed after backward()"), 0U)
        << warnings.texts[0];
  }
}

TEST(GradientsInPlace, OfTwoOptimizersAreRefused) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank reduces nothing";
  const std::vector<DistributedOptions> all{{}, {.group_count = 1}, {.gradient_as_bucket_view = true}};
  for (DistributedOptions options : all) {
    options.op = ReduceOp::kSum;
    const Tensor weight = parameter({2, 3});
    const NamedTensors named{{"weight", weight}};
    const auto backward = [&] { (weight.sum() * (hvd::rank() + 1)).backward(); };
    std::optional<Optimizer> first(std::in_place, named, SGDOptions(1.0), options);
    Optimizer second(named, SGDOptions(1.0), options);
    expect_refused(backward, "two DistributedOptimizers have parameter 'weight', and both reduce its gradient");
    first->synchronize();
    EXPECT_TRUE(weight.grad().equal(torch::full_like(weight, sum_of_ranks()))) << weight.grad();
    first.reset();
    for (int step = 1; step <= 2; ++step) {
      second.zero_grad();
      backward();
      second.step();
      EXPECT_TRUE(weight.equal(torch::full_like(weight, -step * sum_of_ranks()))) << weight;
      const Optimizer gone(named, SGDOptions(1.0), options);
    }
  }
}

TEST(GradientsInPlace, ThatRequireAGradientAreRefused) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank reduces nothing";
  for (const bool views : {false, true}) {
    const Tensor weight = parameter({3});
    Optimizer optimizer(NamedTensors{{"weight", weight}}, SGDOptions(1.0),
                        {.op = ReduceOp::kSum, .gradient_as_bucket_view = views});
    expect_refused([&] { weight.square().sum().backward({}, /*retain_graph=*/true, /*create_graph=*/true); },
                   "the gradient of parameter 'weight' requires a gradient itself");
    optimizer.zero_grad();
    // As the text says: a penalty on a gradient.
    const Tensor inputs = torch::ones({3}).requires_grad_();
    const Tensor slope = torch::autograd::grad({(weight * inputs).sum()}, {inputs}, {}, /*retain_graph=*/true,
                                               /*create_graph=*/true)[0];
    slope.sum().backward();
    optimizer.step();
    EXPECT_TRUE(weight.equal(torch::full_like(weight, -hvd::size()))) << weight;
  }
}

}  // namespace
