// Trains on Fashion-MNIST. Arguments: epochs (3), images (60000).
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>

#include <horovod_cpp/torch.h>
#include "fashion_mnist.h"

using torch::optim::SGD, torch::optim::SGDOptions;

int main(int argc, char** argv) {
  const hvd::Session session;
  const int epochs = argc > 1 ? std::atoi(argv[1]) : 3;
  const fashion_mnist::Images images("train", argc > 2 ? std::atoi(argv[2]) : 60'000);
  torch::manual_seed(42);
  torch::nn::Sequential net = fashion_mnist::make_network();
  hvd::torch::broadcast_parameters(net, /*root_rank=*/0);
  hvd::torch::DistributedOptimizer<SGD> sgd(net->named_parameters(), SGDOptions(0.02 * hvd::size()).momentum(0.9));
  for (int epoch = 0; epoch < epochs; ++epoch) {
    auto sampler = hvd::torch::sharded_sampler<torch::data::samplers::DistributedRandomSampler>(*images.size(), epoch);
    auto loader = torch::data::make_data_loader(images, sampler, /*options=*/64);
    for (const auto& batch : *loader) {
      sgd.zero_grad();
      torch::cross_entropy_loss(net->forward(batch.data), batch.target).backward();
      sgd.step();
    }
  }
  const double right = fashion_mnist::accuracy(net, fashion_mnist::Images("t10k", 10'000));
  if (hvd::rank() == 0) std::printf("test accuracy %.1f %%\n", 100 * right);
}
