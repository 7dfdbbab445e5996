// How much of its communication a LibTorch program hides behind backward: the network and data of
// examples/cpp_fashion_mnist, one step after the other in three ways. Started by overlap.py, which says what is
// measured; rank 0 prints its times in JSON. Arguments: steps, batch, path of the timeline.
#include <torch/torch.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <horovod_cpp/torch.h>
#include "examples/cpp_fashion_mnist/fashion_mnist.h"

namespace {

using torch::optim::SGD, torch::optim::SGDOptions;
using Optimizer = hvd::torch::DistributedOptimizer<SGD>;
using Batch = torch::data::Example<>;

constexpr int kWarmUp = 5;
constexpr int kInTimeline = 5;

double now_us() {
  return std::chrono::duration<double, std::micro>(std::chrono::system_clock::now().time_since_epoch()).count();
}

/// One network; every way of doing a step has its own, as hooks stay with the parameters.
struct Network {
  torch::nn::Sequential layers = fashion_mnist::make_network();
  Network() { hvd::torch::broadcast_parameters(layers, 0); }
  torch::Tensor loss(const Batch& batch) {
    return torch::cross_entropy_loss(layers->forward(batch.data), batch.target);
  }
};

/// Epoch times in microseconds.
struct Times {
  double start = 0, backward_ended = 0, end = 0;
};

Times backward_alone(Network& network, SGD& sgd, const Batch& batch) {
  sgd.zero_grad();
  const torch::Tensor loss = network.loss(batch);
  hvd::barrier();
  Times times{.start = now_us()};
  loss.backward();
  times.backward_ended = times.end = now_us();
  return times;
}

/// Of the gradients that `from` has: all are handed over at once.
Times communication_alone(Network& network, Optimizer& sgd, const Network& from) {
  const auto parameters = network.layers->parameters();
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    parameters[i].mutable_grad() = from.layers->parameters()[i].grad().clone();
  }
  hvd::barrier();
  Times times{.start = now_us()};
  sgd.synchronize();
  times.end = now_us();
  return times;
}

Times both(Network& network, Optimizer& sgd, const Batch& batch) {
  sgd.zero_grad();
  const torch::Tensor loss = network.loss(batch);
  hvd::barrier();
  Times times{.start = now_us()};
  loss.backward();
  times.backward_ended = now_us();
  sgd.synchronize();
  times.end = now_us();
  const auto reduced = sgd.skip_synchronize();
  sgd.step();
  return times;
}

/// Milliseconds of each step on the rank that took longest.
std::vector<double> slowest(const std::vector<Times>& steps) {
  std::vector<double> took;
  for (const Times& times : steps) took.push_back((times.end - times.start) / 1e3);
  hvd::allreduce(took, {.op = hvd::ReduceOp::kMax});
  return took;
}

std::string json(const std::vector<double>& numbers) {
  std::string text;
  for (const double number : numbers) text += (text.empty() ? "[" : ", ") + std::to_string(number);
  return text + "]";
}

std::string json(const std::vector<Times>& steps) {
  std::string text;
  for (const Times& times : steps) {
    text += (text.empty() ? "[" : ", ") + json(std::vector<double>{times.start, times.backward_ended, times.end});
  }
  return text + "]";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: overlap STEPS BATCH TIMELINE\n");
    return 2;
  }
  const int steps = std::atoi(argv[1]);
  const hvd::Session session;
  torch::manual_seed(42);
  fashion_mnist::Images images("train", 10'000);
  auto sampler = hvd::torch::sharded_sampler<torch::data::samplers::DistributedRandomSampler>(*images.size());
  auto loader = torch::data::make_data_loader(images, sampler, std::strtoul(argv[2], nullptr, 10));

  Network plain, sent, overlapped;
  SGD plain_sgd(plain.layers->parameters(), SGDOptions(0.02));
  Optimizer sent_sgd(sent.layers->named_parameters(), SGDOptions(0.02));
  Optimizer overlapped_sgd(overlapped.layers->named_parameters(), SGDOptions(0.02));
  std::vector<Times> backward, communication, overlap, recorded;
  auto batch = loader->begin();
  const auto next_batch = [&] {
    if (++batch == loader->end()) batch = loader->begin();
    return *batch;
  };
  for (int step = -kWarmUp; step < steps; ++step) {
    const Batch examples = next_batch();
    const Times one = backward_alone(plain, plain_sgd, examples);
    const Times two = communication_alone(sent, sent_sgd, plain);
    const Times three = both(overlapped, overlapped_sgd, examples);
    if (step < 0) continue;
    backward.push_back(one);
    communication.push_back(two);
    overlap.push_back(three);
  }
  hvd_timeline_start(argv[3], /*mark_cycles=*/0);
  for (int step = 0; step < kInTimeline; ++step) recorded.push_back(both(overlapped, overlapped_sgd, next_batch()));
  hvd_timeline_stop();

  const std::string text = "{\"backward_ms\": " + json(slowest(backward)) +
                           ", \"communication_ms\": " + json(slowest(communication)) +
                           ", \"both_ms\": " + json(slowest(overlap)) + ", \"recorded\": " + json(recorded) + "}";
  if (hvd::rank() == 0) std::printf("%s\n", text.c_str());
}
