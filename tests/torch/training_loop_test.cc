// Training loops of <horovod_cpp/torch.h> under a sanitizer, where LibTorch itself is not instrumented. Short, and with
// narrow headers, as a sanitizer doubles what they take to compile; what training computes is the matter of
// training_test.cc.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mse_loss.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tanh.h>
#include <gtest/gtest.h>
#include <torch/optim/sgd.h>

#include <latch>
#include <thread>
#include <vector>

#include <horovod_cpp/torch.h>

namespace {

using at::Tensor;
using hvd::torch::DistributedOptions;
using torch::optim::SGD, torch::optim::SGDOptions;
using Optimizer = hvd::torch::DistributedOptimizer<SGD>;

constexpr std::int64_t kExamples = 8;

// Large enough that its gradients travel in several segments, and small enough that others are fused.
struct Network {
  Tensor first = at::randn({400, 6}, at::kDouble);
  Tensor bias = at::randn({400}, at::kDouble);
  Tensor second = at::randn({3, 400}, at::kDouble);
  Network() {
    for (Tensor* parameter : {&first, &bias, &second}) parameter->mul_(0.1).requires_grad_();
  }
  hvd::torch::NamedTensors named() const { return {{"first", first}, {"bias", bias}, {"second", second}}; }
  Tensor loss(const Tensor& inputs, const Tensor& targets) const {
    return at::mse_loss(at::linear(at::tanh(at::linear(inputs, first, bias)), second), targets);
  }
};

// The same on all ranks.
struct Data {
  Tensor inputs = at::randn({kExamples, 6}, at::kDouble);
  Tensor targets = at::randn({kExamples, 3}, at::kDouble);
  Data() { hvd::torch::broadcast_tensors({{"inputs", inputs}, {"targets", targets}}, 0); }
  Tensor loss(const Network& network) const { return network.loss(inputs, targets); }
  Tensor loss_of_my_part(const Network& network) const {
    return network.loss(inputs.chunk(hvd::size())[hvd::rank()], targets.chunk(hvd::size())[hvd::rank()]);
  }
};

void expect_loops_to_agree(const DistributedOptions& options) {
  const Data data;
  Network network, alone;
  hvd::torch::broadcast_tensors(network.named(), 0);
  {
    const at::NoGradGuard no_grad;
    for (const auto& [mine, shared] : {std::pair(alone.first, network.first), std::pair(alone.bias, network.bias),
                                       std::pair(alone.second, network.second)}) {
      mine.copy_(shared);
    }
  }
  SGD reference(std::vector<Tensor>{alone.first, alone.bias, alone.second}, SGDOptions(0.05).momentum(0.9));
  Optimizer optimizer(network.named(), SGDOptions(0.05).momentum(0.9), options);
  for (int step = 0; step < 6; ++step) {
    reference.zero_grad();
    optimizer.zero_grad();
    for (int pass = 0; pass < options.backward_passes_per_step; ++pass) {
      data.loss(alone).backward();
      data.loss_of_my_part(network).backward();
    }
    reference.step();
    optimizer.step();
  }
  EXPECT_LT((network.first - alone.first).abs().max().item<double>(), 1e-9);
  EXPECT_LT((network.second - alone.second).abs().max().item<double>(), 1e-9);
}

TEST(TrainingLoop, ReducesGradientsOneByOne) { expect_loops_to_agree({}); }
TEST(TrainingLoop, ReducesGradientsInGroups) { expect_loops_to_agree({.group_count = 2}); }
TEST(TrainingLoop, ReducesGradientsInBuckets) { expect_loops_to_agree({.gradient_as_bucket_view = true}); }
TEST(TrainingLoop, SumsUpSeveralBackwardPasses) { expect_loops_to_agree({.backward_passes_per_step = 2}); }

TEST(TrainingLoop, SeveralThreadsRunBackward) {
  Tensor one = at::ones({40'000}, at::kDouble).requires_grad_();
  Tensor other = at::ones({40'000}, at::kDouble).requires_grad_();
  const hvd::torch::NamedTensors named{{"one", one}, {"other", other}};
  for (const bool views : {false, true}) {
    Optimizer optimizer(named, SGDOptions(0.1),
                        {.op = hvd::ReduceOp::kSum, .group_count = 1, .gradient_as_bucket_view = views});
    for (int step = 0; step < 40; ++step) {  // hooks that come one after the other are no race: some have to meet
      optimizer.zero_grad();
      std::latch both(2);
      const auto backward = [&both](const Tensor& parameter) {
        const Tensor sum = parameter.sum();
        both.arrive_and_wait();
        sum.backward();
      };
      {
        const std::jthread first(backward, one);
        const std::jthread second(backward, other);
      }
      optimizer.synchronize();
      EXPECT_EQ(one.grad()[0].item<double>(), hvd::size());
      EXPECT_EQ(other.grad()[39'999].item<double>(), hvd::size());
      const auto reduced = optimizer.skip_synchronize();
      optimizer.step();
    }
  }
}

TEST(TrainingLoop, AnOptimizerMayEndWhileItsGradientsAreInFlight) {
  const Data data;
  const Network network;
  {
    const Optimizer optimizer(network.named(), SGDOptions(0.05));
    data.loss_of_my_part(network).backward();
  }
  data.loss_of_my_part(network).backward();  // its hooks are gone
  hvd::barrier();
}

TEST(TrainingLoop, TensorsTravelBesideTheGradients) {
  static_cast<void>(hvd::torch::allreduce_async_(at::ones({50'000}), {.name = "dropped"}));
  Tensor gathered = hvd::torch::allgather(at::ones({hvd::rank() + 1, 3}).requires_grad_());
  gathered.sum().backward();
  EXPECT_EQ(gathered.size(0), hvd::size() * (hvd::size() + 1) / 2);
}

}  // namespace
