// DistributedOptimizer with Adasum: every rank can replay the steps of all others. float64, 1e-9.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/optim/adam.h>
#include <torch/optim/sgd.h>

#include <memory>
#include <string>
#include <vector>

#include <horovod_cpp/torch.h>

namespace {

using at::Tensor;
using hvd::ReduceOp;
using hvd::torch::DistributedOptimizer;
using hvd::torch::DistributedOptions;
namespace optim = torch::optim;

const DistributedOptions kAdasum{.op = ReduceOp::kAdasum};

Tensor adasum(const Tensor& a, const Tensor& b) {
  const double dot = (a * b).sum().item<double>();
  const double of_a = a.square().sum().item<double>();
  const double of_b = b.square().sum().item<double>();
  return a * (of_a > 0 ? 1 - dot / (2 * of_a) : 1) + b * (of_b > 0 ? 1 - dot / (2 * of_b) : 1);
}

// The tree over ranks: those beyond a power of two first, then pairs of pairs.
Tensor adasum(std::vector<Tensor> of_ranks) {
  std::size_t paired = 1;
  while (2 * paired <= of_ranks.size()) paired *= 2;
  for (std::size_t i = paired; i < of_ranks.size(); ++i)
    of_ranks[i - paired] = adasum(of_ranks[i - paired], of_ranks[i]);
  for (std::size_t distance = 1; distance < paired; distance *= 2) {
    for (std::size_t i = 0; i < paired; i += 2 * distance) of_ranks[i] = adasum(of_ranks[i], of_ranks[i + distance]);
  }
  return of_ranks[0];
}

struct Model {
  Tensor weight, bias;
  Model() {
    at::manual_seed(5);
    weight = at::randn({6, 3}, at::kDouble).requires_grad_();
    bias = at::randn({3}, at::kDouble).requires_grad_();
  }
  std::vector<Tensor> parameters() const { return {weight, bias}; }
  hvd::torch::NamedTensors named() const { return {{"adasum.weight", weight}, {"adasum.bias", bias}}; }
  void backward(std::uint64_t batch) const {
    at::manual_seed(1000 + batch);
    (at::randn({4, 6}, at::kDouble).matmul(weight).tanh() + bias).square().sum().backward();
  }
};

// What all ranks together do in one step: `replicas` have the same parameters before and after.
template <typename Inner>
void replay(std::vector<Model>& replicas, std::vector<std::unique_ptr<Inner>>& optimizers, std::uint64_t first_batch) {
  std::vector<Tensor> starts;
  for (const Tensor& parameter : replicas[0].parameters()) starts.push_back(parameter.detach().clone());
  for (std::size_t rank = 0; rank < replicas.size(); ++rank) {
    optimizers[rank]->zero_grad();
    replicas[rank].backward(first_batch + rank);
    optimizers[rank]->step();
  }
  const at::NoGradGuard no_grad;
  for (std::size_t i = 0; i < starts.size(); ++i) {
    std::vector<Tensor> changes;
    for (const Model& replica : replicas) changes.push_back(replica.parameters()[i] - starts[i]);
    const Tensor changed = starts[i] + adasum(changes);
    for (const Model& replica : replicas) replica.parameters()[i].copy_(changed);
  }
}

template <typename Inner, typename Options>
void expect_steps_of_all(Options inner) {
  std::vector<Model> replicas(static_cast<std::size_t>(hvd::size()));
  std::vector<std::unique_ptr<Inner>> optimizers;
  for (const Model& replica : replicas) optimizers.push_back(std::make_unique<Inner>(replica.parameters(), inner));
  const Model model;
  DistributedOptimizer<Inner> optimizer(model.named(), inner, kAdasum);
  for (std::uint64_t step = 0; step < 4; ++step) {
    optimizer.zero_grad();
    model.backward(100 * step + static_cast<std::uint64_t>(hvd::rank()));
    optimizer.step();
    replay(replicas, optimizers, 100 * step);
  }
  for (std::size_t i = 0; i < 2; ++i) {
    EXPECT_TRUE(model.parameters()[i].allclose(replicas[0].parameters()[i], 1e-9, 1e-9)) << i;
    EXPECT_FALSE(model.parameters()[i].allclose(Model().parameters()[i], 1e-3, 1e-3)) << i;
  }
}

TEST(Adasum, TheStepsOfAllRanksAreReduced) {
  expect_steps_of_all<optim::SGD>(optim::SGDOptions(0.01).momentum(0.9));
  expect_steps_of_all<optim::Adam>(optim::AdamOptions(0.05));
}

TEST(Adasum, RanksThatDoTheSameStepAsOne) {
  const auto train = [](const Model& model, optim::Optimizer& optimizer) {
    for (std::uint64_t step = 0; step < 3; ++step) {
      optimizer.step([&] {
        const at::AutoGradMode enabled(true);
        optimizer.zero_grad();
        model.backward(step);
        return at::zeros({});
      });
    }
  };
  const Model alone;
  const Model together;
  optim::SGD reference(alone.parameters(), optim::SGDOptions(0.01));
  DistributedOptimizer<optim::SGD> optimizer(together.named(), optim::SGDOptions(0.01), kAdasum);
  train(alone, reference);
  train(together, optimizer);
  EXPECT_TRUE(together.weight.allclose(alone.weight, 1e-9, 1e-9));
  EXPECT_FALSE(together.weight.allclose(Model().weight, 1e-3, 1e-3));
}

TEST(Adasum, ChangesMayTravelCompressed) {
  const Model exact;
  const Model close;
  DistributedOptimizer<optim::SGD> in_full(exact.named(), optim::SGDOptions(0.01), kAdasum);
  DistributedOptimizer<optim::SGD> in_half(close.named(), optim::SGDOptions(0.01),
                                           {.op = ReduceOp::kAdasum, .compression = hvd::torch::Compression::kFp16});
  for (const Model* model : {&exact, &close}) model->backward(static_cast<std::uint64_t>(hvd::rank()));
  in_full.step();
  in_half.step();
  EXPECT_TRUE(close.weight.allclose(exact.weight, 1e-2, 1e-2));
  if (hvd::size() > 1) {
    EXPECT_FALSE(close.weight.equal(exact.weight));
  }
}

TEST(Adasum, RulesAroundTheStep) {
  const Model model;
  DistributedOptimizer<optim::SGD> optimizer(model.named(), optim::SGDOptions(0.1), kAdasum);
  model.backward(1);
  optimizer.zero_grad();  // no gradient is in flight
  optimizer.synchronize();
  if (hvd::size() > 1) {
    EXPECT_THROW(static_cast<void>(optimizer.skip_synchronize()), hvd::PreconditionError);
  }
  const std::vector<std::vector<Tensor>> groups{model.parameters()};
  EXPECT_THROW(DistributedOptimizer<optim::SGD>(model.named(), optim::SGDOptions(0.1),
                                                {.op = ReduceOp::kAdasum, .groups = groups}),
               hvd::InvalidArgument);
}

TEST(Adasum, AStepThatFailsLeavesTheParameters) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank agrees with itself";
  const Tensor good = at::ones({3}, at::kDouble).requires_grad_();
  const Tensor bad = at::ones({hvd::rank() == 0 ? 4 : 3}, at::kDouble).requires_grad_();
  const hvd::torch::NamedTensors named{{"adasum.good", good}, {"adasum.bad", bad}};
  DistributedOptimizer<optim::SGD> optimizer(named, optim::SGDOptions(1.0), kAdasum);
  (good.sum() + bad.sum()).backward();
  try {
    optimizer.step();
    FAIL() << "shapes differ";
  } catch (const hvd::InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("'adasum.bad'"), std::string::npos) << error.what();
  }
  EXPECT_TRUE(good.equal(at::ones_like(good)));
  EXPECT_TRUE(bad.equal(at::ones_like(bad)));
  EXPECT_EQ(hvd::allreduce(1, {.op = ReduceOp::kSum}), hvd::size());
}

}  // namespace
