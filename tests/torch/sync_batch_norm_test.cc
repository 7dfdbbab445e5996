// SyncBatchNorm on N ranks is torch's BatchNorm on the whole batch: float64, 1e-9.
#include <horovod_cpp/torch/sync_batch_norm.h>

#include <ATen/record_function.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <memory>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include <horovod_cpp/torch.h>

namespace {

using at::Tensor;
using hvd::ReduceOp;
using hvd::torch::SyncBatchNorm;
namespace nn = torch::nn;

constexpr std::int64_t kChannels = 6;

struct Batch {
  std::vector<Tensor> parts;  // of all ranks; rank 0 has no rows where there are several ranks

  Batch(std::vector<std::int64_t> shape, std::uint64_t seed) {
    torch::manual_seed(seed);
    shape.insert(shape.begin(), {0, kChannels});
    for (int rank = 0; rank < hvd::size(); ++rank) {
      shape[0] = rank == 0 && hvd::size() > 1 ? 0 : 3 + rank;
      parts.push_back(torch::randn(shape, torch::kFloat64) * 3 + 7);
    }
  }
  Tensor whole() const { return torch::cat(parts); }
  Tensor own() const { return parts[static_cast<std::size_t>(hvd::rank())]; }
  Tensor own_rows(const Tensor& of_whole) const { return of_whole.split_with_sizes(counts())[hvd::rank()]; }

 private:
  std::vector<std::int64_t> counts() const {
    std::vector<std::int64_t> counts;
    for (const Tensor& part : parts) counts.push_back(part.size(0));
    return counts;
  }
};

void expect_close(const Tensor& got, const Tensor& expected, const std::string& what = {}) {
  ASSERT_EQ(got.sizes(), expected.sizes()) << what;
  EXPECT_TRUE(got.allclose(expected, 1e-9, 1e-9)) << what << "\n" << got << "\n" << expected;
}

template <typename Left, typename Right>
void expect_same_tensors(const Left& got, const Right& expected) {
  ASSERT_EQ(got.size(), expected.size());
  for (const auto& item : expected) expect_close(got[item.key()], item.value(), item.key());
}

template <typename Layer>
void expect_whole_batch(const std::vector<std::int64_t>& shape, const nn::BatchNormOptions& options) {
  Layer whole(options);
  SyncBatchNorm layer(options);
  whole->to(torch::kFloat64);
  layer->to(torch::kFloat64);
  if (options.affine()) {
    const torch::NoGradGuard no_grad;
    for (const auto& [weight, bias] : {std::pair(whole->weight, whole->bias), std::pair(layer->weight, layer->bias)}) {
      weight.copy_(torch::linspace(-1, 2, kChannels));
      bias.copy_(torch::linspace(3, -1, kChannels));
    }
  }
  for (std::uint64_t seed = 0; seed < 3; ++seed) {
    const Batch batch(shape, seed);
    const Tensor all = batch.whole().requires_grad_();
    const Tensor own = batch.own().clone().requires_grad_();
    const Tensor expected = whole->forward(all);
    const Tensor got = layer->forward(own);
    expect_close(got, batch.own_rows(expected), "output");
    const Tensor factor = torch::randn_like(expected);
    (expected * factor).sum().backward();
    (got * batch.own_rows(factor)).sum().backward();
    expect_close(own.grad(), batch.own_rows(all.grad()), "gradient of the input");
  }
  for (const auto& item : whole->named_parameters()) {
    const Tensor sum = hvd::torch::allreduce(layer->named_parameters()[item.key()].grad(), {.op = ReduceOp::kSum});
    expect_close(sum, item.value().grad(), "gradient of " + item.key());
  }
  expect_same_tensors(layer->named_buffers(), whole->named_buffers());
  layer->eval();
  whole->eval();
  if (options.track_running_stats()) {
    const Tensor value = Batch(shape, 9).whole();
    expect_close(layer->forward(value), whole->forward(value), "evaluation");
  }
}

TEST(SyncBatchNorm, IsBatchNormOfTheWholeBatch) {
  const nn::BatchNormOptions plain(kChannels);
  for (const nn::BatchNormOptions& options :
       {plain, nn::BatchNormOptions(plain).momentum(std::nullopt), nn::BatchNormOptions(plain).affine(false),
        nn::BatchNormOptions(plain).track_running_stats(false), nn::BatchNormOptions(plain).eps(0.1).momentum(0.7)}) {
    expect_whole_batch<nn::BatchNorm1d>({}, options);
    expect_whole_batch<nn::BatchNorm1d>({5}, options);
    expect_whole_batch<nn::BatchNorm2d>({3, 4}, options);
    expect_whole_batch<nn::BatchNorm3d>({2, 3, 2}, options);
  }
}

TEST(SyncBatchNorm, HalfPrecisionIsNormalisedInSingle) {
  const Batch batch({3, 4}, 1);
  const Tensor expected = batch.own_rows(nn::BatchNorm2d(kChannels)->forward(batch.whole().to(torch::kFloat32)));
  for (const auto type : {torch::kFloat16, torch::kBFloat16}) {
    const Tensor got = SyncBatchNorm(kChannels)->forward(batch.own().to(type));
    EXPECT_EQ(got.scalar_type(), type);
    EXPECT_TRUE(got.to(torch::kFloat32).allclose(expected, 2e-2, 2e-2));
  }
}

// A module of a program's own.
struct BlockImpl : nn::Module {
  nn::Sequential body{nn::Linear(6, kChannels), nn::BatchNorm1d(kChannels)};
  nn::BatchNorm1d own{nullptr};

  explicit BlockImpl(bool with_own) {
    register_module("body", body);
    if (with_own) own = register_module("own", nn::BatchNorm1d(kChannels));
  }
  Tensor forward(const Tensor& input) { return body->forward(input); }
};
TORCH_MODULE(Block);

nn::Sequential network() {
  torch::manual_seed(3);
  nn::Sequential net(Block(false), nn::Tanh(), nn::BatchNorm1d(nn::BatchNormOptions(kChannels).momentum(std::nullopt)),
                     nn::Linear(kChannels, 2));
  net->to(torch::kFloat64);
  return net;
}

TEST(SyncBatchNorm, ANetworkThatIsConvertedTrainsAsOnOneRank) {
  nn::Sequential alone = network();
  nn::Sequential together = network();
  const std::vector<Tensor> parameters = together->parameters();
  hvd::torch::DistributedOptimizer<torch::optim::SGD> optimizer(together->named_parameters(),
                                                                torch::optim::SGDOptions(0.05).momentum(0.9));
  EXPECT_EQ(hvd::torch::convert_sync_batchnorm(together), 2U);
  EXPECT_EQ(hvd::torch::convert_sync_batchnorm(together), 0U);
  ASSERT_NE(together[2]->as<hvd::torch::SyncBatchNormImpl>(), nullptr);
  ASSERT_EQ(together->parameters().size(), parameters.size());
  for (std::size_t i = 0; i < parameters.size(); ++i) EXPECT_TRUE(parameters[i].is_same(together->parameters()[i]));

  torch::optim::SGD reference(alone->parameters(), torch::optim::SGDOptions(0.05).momentum(0.9));
  for (std::uint64_t step = 0; step < 10; ++step) {
    torch::manual_seed(step);
    const Tensor inputs = torch::randn({std::int64_t{4} * hvd::size(), 6}, torch::kFloat64);
    reference.zero_grad();
    alone->forward(inputs).square().mean().backward();
    reference.step();
    optimizer.zero_grad();
    together->forward(inputs.chunk(hvd::size())[hvd::rank()]).square().mean().backward();
    optimizer.step();
  }
  expect_same_tensors(together->named_parameters(), alone->named_parameters());
  expect_same_tensors(together->named_buffers(), alone->named_buffers());
}

TEST(SyncBatchNorm, WhatCannotBeConvertedIsNamedAndNothingIsChanged) {
  Block good(false);
  EXPECT_EQ(hvd::torch::convert_sync_batchnorm(good), 1U);
  EXPECT_NE(good->body[1]->as<hvd::torch::SyncBatchNormImpl>(), nullptr);

  nn::Sequential net({{"first", nn::BatchNorm1d(kChannels)}, {"block", Block(true)}});
  try {
    hvd::torch::convert_sync_batchnorm(net);
    FAIL() << "a member of C++ cannot be exchanged";
  } catch (const hvd::InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("'block.own'"), std::string::npos) << error.what();
  }
  EXPECT_NE(net[0]->as<nn::BatchNorm1dImpl>(), nullptr);
  EXPECT_THROW(hvd::torch::convert_sync_batchnorm(nn::BatchNorm2d(3)), hvd::InvalidArgument);
}

TEST(SyncBatchNorm, ALayerInSeveralPlacesStaysOne) {
  const nn::BatchNorm1d shared(kChannels);
  nn::Sequential net(shared, nn::Tanh(), shared);
  EXPECT_EQ(hvd::torch::convert_sync_batchnorm(net), 1U);
  EXPECT_NE(net[0]->as<hvd::torch::SyncBatchNormImpl>(), nullptr);
  EXPECT_EQ(net[0], net[2]);
  EXPECT_EQ(net->children()[0], net[0]);
  EXPECT_EQ(net->children()[2], net[0]);
}

TEST(SyncBatchNorm, LoadsWhatBatchNormHasSavedAndIsCloned) {
  nn::BatchNorm2d saved(kChannels);
  saved->forward(torch::randn({4, kChannels, 2, 2}));
  std::stringstream file;
  torch::save(saved, file);
  SyncBatchNorm loaded(kChannels);
  torch::load(loaded, file);
  expect_same_tensors(loaded->named_buffers(), saved->named_buffers());
  const auto clone = std::dynamic_pointer_cast<hvd::torch::SyncBatchNormImpl>(loaded->clone());
  clone->eval();
  saved->eval();
  const Tensor input = torch::randn({2, kChannels, 2, 2});
  expect_close(clone->forward(input), saved->forward(input));
  std::ostringstream printed;
  printed << *loaded;
  EXPECT_EQ(printed.str(),
            "hvd::torch::SyncBatchNorm(6, eps=1e-05, momentum=0.1, affine=true, track_running_stats=true)");
}

std::int64_t collective_calls() {
  hvd_statistics statistics;
  HVD_INIT_STRUCT(&statistics);
  hvd_get_statistics(&statistics);
  return statistics.collective_calls;
}

TEST(SyncBatchNorm, OneCollectiveEachWay) {
  if (hvd::size() == 1) GTEST_SKIP() << "nothing is sent";
  SyncBatchNorm layer(kChannels);
  const Tensor input = torch::randn({4, kChannels}).requires_grad_();
  const std::int64_t before = collective_calls();
  const Tensor output = layer->forward(input);
  EXPECT_EQ(collective_calls(), before + 1);
  output.square().sum().backward();
  EXPECT_EQ(collective_calls(), before + 2);
}

// How often a number of a tensor was read, for which the host would stop on a GPU.
int readings = 0;
std::unique_ptr<at::ObserverContext> count_readings(const at::RecordFunction& function) {
  if (std::string_view(function.name()) == "aten::_local_scalar_dense") ++readings;
  return nullptr;
}

TEST(SyncBatchNorm, TheHostReadsNoNumberOfTheDevice) {
  const at::CallbackHandle counter = at::addThreadLocalCallback(at::RecordFunctionCallback(count_readings));
  for (const std::optional<double> momentum : {std::optional(0.1), std::optional<double>()}) {
    SyncBatchNorm layer(nn::BatchNormOptions(kChannels).momentum(momentum));
    const Tensor own = torch::randn({2, kChannels}).requires_grad_();
    readings = 0;
    layer->forward(own).sum().backward();
    EXPECT_EQ(readings, 0);
    // Too few values are an error, so a rank that has too few looks whether all have.
    if (hvd::size() > 1) layer->forward(own.narrow(0, 0, 1));
    EXPECT_EQ(readings, hvd::size() > 1 ? 1 : 0);
  }
  at::removeCallback(counter);
}

TEST(SyncBatchNorm, BadInputIsAnErrorOnEveryRank) {
  const auto text_of = [](const Tensor& input) {
    try {
      SyncBatchNorm(kChannels)->forward(input);
    } catch (const hvd::InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_NE(text_of(torch::ones({6})).find("at least 2 dimensions"), std::string::npos);
  EXPECT_NE(text_of(torch::ones({6, 6}, torch::kInt64)).find("no real numbers"), std::string::npos);
  EXPECT_NE(text_of(Tensor()).find("at least 2 dimensions"), std::string::npos);
  EXPECT_NE(text_of(torch::ones({hvd::rank() == 0 ? 1 : 0, 6})).find("more than 1 value a channel"), std::string::npos);
  EXPECT_NE(text_of(torch::ones({4, 5})).find("the layer has 6 channels"), std::string::npos);
  if (hvd::size() > 1) {
    EXPECT_NE(text_of(torch::ones({4, 6 + hvd::rank()})).find("'sync_batch_norm.forward'"), std::string::npos);
  }
  EXPECT_NE(text_of(torch::ones({4, 5})).find("sync_batch_norm_test.cc:"), std::string::npos);
  EXPECT_EQ(hvd::allreduce(1, {.op = ReduceOp::kSum}), hvd::size());
}

TEST(SyncBatchNorm, SecondDerivativesAreRefused) {
  SyncBatchNorm layer(kChannels);
  const Tensor input = torch::randn({4, kChannels}).requires_grad_();
  const Tensor output = layer->forward(input);
  const Tensor first = torch::autograd::grad({output.square().sum()}, {input}, {}, true, /*create_graph=*/true)[0];
  EXPECT_THROW(torch::autograd::grad({first.sum()}, {input}), c10::Error);
}

// Run by tests/python/processes/test_mixed_ranks.py, which has the other half.
TEST(WithPython, DISABLED_OneBatchIsNormalised) {
  torch::manual_seed(23);
  const Tensor all = torch::randn({24, kChannels}, torch::kFloat64).requires_grad_();
  const Tensor own = all.detach().chunk(hvd::size())[hvd::rank()].clone().requires_grad_();
  nn::BatchNorm1d whole(kChannels);
  SyncBatchNorm layer(kChannels);
  whole->to(torch::kFloat64);
  layer->to(torch::kFloat64);
  const Tensor expected = whole->forward(all);
  const Tensor got = layer->forward(own);
  expect_close(got, expected.chunk(hvd::size())[hvd::rank()]);
  expected.pow(3).sum().backward();
  got.pow(3).sum().backward();
  expect_close(own.grad(), all.grad().chunk(hvd::size())[hvd::rank()]);
  expect_same_tensors(layer->named_buffers(), whole->named_buffers());
  hvd::barrier();
}

TEST(SyncBatchNorm, RanksOutsideOfItsProcessSetDoNotCount) {
  if (hvd::size() < 3) GTEST_SKIP() << "needs a rank outside of a set of two";
  const std::vector<int> members{0, 2};
  const hvd::ProcessSet pair = hvd::add_process_set(members);
  const auto rows = [](int rank) { return torch::full({2 + rank, kChannels}, rank, torch::kFloat64); };
  if (pair.included()) {
    SyncBatchNorm layer(kChannels, pair);
    layer->to(torch::kFloat64);
    nn::BatchNorm1d reference(kChannels);
    reference->to(torch::kFloat64);
    const Tensor expected = reference->forward(torch::cat({rows(0), rows(2)}));
    expect_close(layer->forward(rows(hvd::rank())),
                 hvd::rank() == 0 ? expected.narrow(0, 0, 2) : expected.narrow(0, 2, 4));
  } else {
    EXPECT_THROW(SyncBatchNorm(kChannels, pair)->forward(rows(1)), hvd::PreconditionError);
  }
  hvd::barrier();
  hvd::remove_process_set(pair);
}

}  // namespace
