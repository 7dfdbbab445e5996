// <horovod_cpp/torch.h> on every rank of a job. What a job of any size computes is compared with what one process does
// alone with all of the data: float64, no batch normalisation, 1e-9.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <array>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include <horovod_cpp/torch.h>

namespace {

using at::Tensor;
using hvd::ReduceOp;
using hvd::torch::DistributedOptimizer;
using hvd::torch::DistributedOptions;
namespace nn = torch::nn;
namespace optim = torch::optim;

constexpr std::int64_t kExamples = 24;  // a multiple of every number of ranks

nn::Sequential make_model(std::uint64_t seed) {
  torch::manual_seed(seed);
  nn::Sequential model(nn::Linear(6, 8), nn::Tanh(), nn::Linear(8, 3));
  model->to(torch::kFloat64);
  return model;
}

struct Data {
  Tensor inputs, targets;
  Data() {
    torch::manual_seed(17);
    inputs = torch::randn({kExamples, 6}, torch::kFloat64);
    targets = torch::randn({kExamples, 3}, torch::kFloat64);
  }
  Data shard() const {
    Data mine(*this);
    mine.inputs = inputs.chunk(hvd::size())[hvd::rank()];
    mine.targets = targets.chunk(hvd::size())[hvd::rank()];
    return mine;
  }
};

Tensor loss_of(nn::Sequential& model, const Data& data) {
  return torch::mse_loss(model->forward(data.inputs), data.targets);
}

template <typename Optimizer>
void train(nn::Sequential& model, Optimizer& optimizer, const Data& data, int steps) {
  for (int step = 0; step < steps; ++step) {
    const auto closure = [&] {
      optimizer.zero_grad();
      Tensor loss = loss_of(model, data);
      loss.backward();
      return loss;
    };
    if constexpr (std::is_base_of_v<optim::LBFGS, Optimizer>) {
      optimizer.step(closure);
    } else {
      closure();
      optimizer.step();
    }
  }
}

double distance(const nn::Sequential& a, const nn::Sequential& b) {
  double most = 0;
  for (std::size_t i = 0; i < a->parameters().size(); ++i) {
    most = std::max(most, (a->parameters()[i] - b->parameters()[i]).abs().max().item<double>());
  }
  return most;
}

// The root's parameters on all ranks, which have others before.
nn::Sequential broadcast_model() {
  nn::Sequential model = make_model(hvd::rank() == 0 ? 1 : 100 + hvd::rank());
  hvd::torch::broadcast_parameters(model, 0);
  return model;
}

template <typename Inner, typename Options>
void expect_same_as_one_process(Options inner, DistributedOptions options = {}, double limit = 1e-9) {
  nn::Sequential alone = make_model(1);
  Inner reference(alone->parameters(), inner);
  train(alone, reference, Data(), 12);

  nn::Sequential model = broadcast_model();
  DistributedOptimizer<Inner> optimizer(model->named_parameters(), inner, options);
  train(model, optimizer, Data().shard(), 12);
  EXPECT_LT(distance(alone, model), limit);
  EXPECT_GT(distance(make_model(1), model), 1e-3);
}

TEST(Training, EqualsOneProcessWithSgd) {
  expect_same_as_one_process<optim::SGD>(optim::SGDOptions(0.1).momentum(0.9).weight_decay(0.01));
}
TEST(Training, EqualsOneProcessWithAdam) { expect_same_as_one_process<optim::Adam>(optim::AdamOptions(0.05)); }
TEST(Training, EqualsOneProcessWithAdamW) { expect_same_as_one_process<optim::AdamW>(optim::AdamWOptions(0.05)); }
TEST(Training, EqualsOneProcessWithRmsprop) {
  expect_same_as_one_process<optim::RMSprop>(optim::RMSpropOptions(0.01).momentum(0.5));
}
TEST(Training, EqualsOneProcessWithAdagrad) { expect_same_as_one_process<optim::Adagrad>(optim::AdagradOptions(0.1)); }
TEST(Training, EqualsOneProcessWithLbfgs) {
  expect_same_as_one_process<optim::LBFGS>(optim::LBFGSOptions(0.2).max_iter(4));
  expect_same_as_one_process<optim::LBFGS>(optim::LBFGSOptions(1).max_iter(3).line_search_fn("strong_wolfe"));
}

TEST(Training, OptionsOfTheReductionChangeNothingButHowItIsDone) {
  const optim::SGDOptions inner = optim::SGDOptions(0.1).momentum(0.9);
  expect_same_as_one_process<optim::SGD>(inner, {.gradient_predivide_factor = 4.0});
  expect_same_as_one_process<optim::SGD>(inner, {.group_count = 3});
  expect_same_as_one_process<optim::SGD>(inner, {.gradient_as_bucket_view = true});
  expect_same_as_one_process<optim::SGD>(
      inner, {.gradient_predivide_factor = 4.0, .group_count = 3, .gradient_as_bucket_view = true});
  expect_same_as_one_process<optim::SGD>(
      inner, {.compression = hvd::torch::Compression::kFp16, .gradient_as_bucket_view = true}, 0.05);
  expect_same_as_one_process<optim::Adam>(optim::AdamOptions(0.05), {.gradient_as_bucket_view = true});
  expect_same_as_one_process<optim::LBFGS>(optim::LBFGSOptions(0.2).max_iter(4), {.gradient_as_bucket_view = true});
  expect_same_as_one_process<optim::SGD>(inner, {.compression = hvd::torch::Compression::kFp16}, 0.05);
  expect_same_as_one_process<optim::SGD>(inner, {.compression = hvd::torch::Compression::kBf16}, 0.2);
  // A sum is an average with a rate that is as many times smaller as there are ranks.
  nn::Sequential alone = make_model(1);
  optim::SGD reference(alone->parameters(), 0.1);
  train(alone, reference, Data(), 5);
  nn::Sequential model = broadcast_model();
  DistributedOptimizer<optim::SGD> optimizer(model->named_parameters(), optim::SGDOptions(0.1 / hvd::size()),
                                             {.op = ReduceOp::kSum});
  train(model, optimizer, Data().shard(), 5);
  EXPECT_LT(distance(alone, model), 1e-9);
}

TEST(Training, AReadyOptimizerKeepsGroupsAndState) {
  nn::Sequential alone = make_model(1);
  nn::Sequential model = broadcast_model();
  const auto make = [](nn::Sequential& of) {
    std::vector<optim::OptimizerParamGroup> groups;
    groups.emplace_back(of[0]->parameters(), std::make_unique<optim::AdamOptions>(0.01));
    groups.emplace_back(of[2]->parameters(), std::make_unique<optim::AdamOptions>(0.2));
    optim::Adam made(groups, optim::AdamOptions(0.5));
    train(of, made, Data(), 2);  // all ranks the same, alone
    return made;
  };
  optim::Adam reference = make(alone);
  const std::vector<std::vector<Tensor>> groups{{model->parameters()[3], model->parameters()[0]}};
  DistributedOptimizer<optim::Adam> optimizer(make(model), model->named_parameters(), {.groups = groups});
  train(alone, reference, Data(), 5);
  train(model, optimizer, Data().shard(), 5);
  EXPECT_LT(distance(alone, model), 1e-9);
}

TEST(Training, SeveralBackwardPassesAreSummedUpBeforeAStep) {
  nn::Sequential alone = make_model(1);
  optim::SGD reference(alone->parameters(), 0.1);
  nn::Sequential model = broadcast_model();
  DistributedOptimizer<optim::SGD> optimizer(model->named_parameters(), optim::SGDOptions(0.1),
                                             {.backward_passes_per_step = 2});
  for (int step = 0; step < 4; ++step) {
    reference.zero_grad();
    optimizer.zero_grad();
    for (int pass = 0; pass < 2; ++pass) {
      loss_of(alone, Data()).backward();
      loss_of(model, Data().shard()).backward();
    }
    reference.step();
    optimizer.step();
  }
  EXPECT_LT(distance(alone, model), 1e-9);
  if (hvd::size() == 1) return;
  loss_of(model, Data().shard()).backward();
  loss_of(model, Data().shard()).backward();
  EXPECT_THROW(loss_of(model, Data().shard()).backward(), hvd::PreconditionError);
  EXPECT_THROW(optimizer.zero_grad(), hvd::PreconditionError);
  optimizer.synchronize();
}

// Gives no gradient to its input.
struct Dropping : torch::autograd::Function<Dropping> {
  static Tensor forward(torch::autograd::AutogradContext*, const Tensor& input) { return input.clone(); }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext*, const torch::autograd::tensor_list&) {
    return {Tensor()};
  }
};

TEST(Training, ParametersWithoutAGradientCountWithZeros) {
  std::vector<Tensor> parameters;
  for (int i = 0; i < 3; ++i) parameters.push_back(torch::ones({2}, torch::kFloat64).requires_grad_());
  const hvd::torch::NamedTensors named{{"used", parameters[0]}, {"by one", parameters[1]}, {"dropped", parameters[2]}};
  DistributedOptimizer<optim::SGD> optimizer(named, optim::SGDOptions(1.0), {.op = ReduceOp::kSum});
  Tensor sum = parameters[0].sum() + Dropping::apply(parameters[2]).sum();
  if (hvd::rank() == hvd::size() - 1) sum = sum + parameters[1].sum();
  sum.backward();
  optimizer.step();
  EXPECT_EQ(parameters[0][0].item<double>(), 1.0 - hvd::size());
  EXPECT_EQ(parameters[1][0].item<double>(), 0.0);
  EXPECT_EQ(parameters[2][0].item<double>(), 1.0);
}

TEST(Training, SchedulersChangeTheRate) {
  nn::Sequential alone = make_model(1);
  nn::Sequential model = broadcast_model();
  optim::SGD reference(alone->parameters(), 0.5);
  DistributedOptimizer<optim::SGD> optimizer(model->named_parameters(), optim::SGDOptions(0.5));
  optim::StepLR reference_scheduler(reference, 2, 0.1);
  optim::StepLR scheduler(optimizer, 2, 0.1);
  for (int epoch = 0; epoch < 6; ++epoch) {
    train(alone, reference, Data(), 1);
    train(model, optimizer, Data().shard(), 1);
    reference_scheduler.step();
    scheduler.step();
  }
  EXPECT_LT(optimizer.param_groups()[0].options().get_lr(), 0.1);
  EXPECT_LT(distance(alone, model), 1e-9);
}

TEST(Training, GradientsMayBeClippedBeforeTheStep) {
  nn::Sequential alone = make_model(1);
  nn::Sequential model = broadcast_model();
  optim::SGD reference(alone->parameters(), 0.5);
  DistributedOptimizer<optim::SGD> optimizer(model->named_parameters(), optim::SGDOptions(0.5));
  for (int step = 0; step < 4; ++step) {
    reference.zero_grad();
    optimizer.zero_grad();
    loss_of(alone, Data()).backward();
    loss_of(model, Data().shard()).backward();
    optimizer.synchronize();
    nn::utils::clip_grad_norm_(alone->parameters(), 0.1);
    nn::utils::clip_grad_norm_(model->parameters(), 0.1);
    reference.step();
    const auto guard = optimizer.skip_synchronize();
    optimizer.step();
  }
  EXPECT_LT(distance(alone, model), 1e-9);
}

TEST(Training, ThreadsMayRunBackwardAtOnce) {
  const Tensor parameter = torch::ones({1000}, torch::kFloat64).requires_grad_();
  const Tensor other = torch::ones({1000}, torch::kFloat64).requires_grad_();
  const hvd::torch::NamedTensors named{{"parameter", parameter}, {"other", other}};
  DistributedOptimizer<optim::SGD> optimizer(named, optim::SGDOptions(0.1), {.op = ReduceOp::kSum});
  for (int step = 0; step < 5; ++step) {
    optimizer.zero_grad();
    {
      const std::jthread first([&] { parameter.sum().backward(); });
      const std::jthread second([&] { other.sum().backward(); });
    }
    optimizer.synchronize();
    EXPECT_EQ(parameter.grad()[0].item<double>(), hvd::size());
    EXPECT_EQ(other.grad()[999].item<double>(), hvd::size());
  }
}

// A rank whose backward fails, its gradient's name being in flight, steps with the others once that is over.
TEST(Training, ARefusedReductionIsStartedByTheStep) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank reduces nothing";
  for (const int groups : {0, 1}) {
    Tensor weight = torch::ones({4}, torch::TensorOptions(torch::kFloat64).requires_grad(true));
    const hvd::torch::NamedTensors named{{"refused.weight", weight}};
    DistributedOptimizer<optim::SGD> optimizer(named, optim::SGDOptions(1.0), {.group_count = groups});
    const std::string name = groups == 0 ? "refused.weight" : "group.0.refused.weight";
    const auto backward = [&] { (weight * static_cast<double>(hvd::rank() + 1)).sum().backward(); };
    hvd::torch::Handle blocking;
    if (hvd::rank() == 0) {
      blocking = hvd::torch::allreduce_async(torch::ones({4}, torch::kFloat64), {.name = name});
      EXPECT_THROW(backward(), hvd::InvalidArgument);
    }
    hvd::barrier();
    if (hvd::rank() != 0) blocking = hvd::torch::allreduce_async(torch::ones({4}, torch::kFloat64), {.name = name});
    blocking.wait();
    EXPECT_THROW(static_cast<void>(blocking.done()), hvd::PreconditionError) << "its result has been taken";
    if (hvd::rank() != 0) backward();
    optimizer.step();
    const double mean = (hvd::size() + 1) / 2.0;
    EXPECT_NEAR(weight[0].item<double>(), 1.0 - mean, 1e-12) << groups << " groups";
  }
}

TEST(Training, BadOptionsAndNamesAreRefused) {
  nn::Sequential model = make_model(1);
  const auto make = [&](const DistributedOptions& options) {
    const DistributedOptimizer<optim::SGD> made(model->named_parameters(), optim::SGDOptions(0.1), options);
  };
  EXPECT_THROW(make({.backward_passes_per_step = 0}), hvd::InvalidArgument);
  EXPECT_THROW(make({.op = ReduceOp::kSum, .gradient_predivide_factor = 2}), hvd::InvalidArgument);
  EXPECT_THROW(make({.op = ReduceOp::kAdasum, .group_count = 1}), hvd::InvalidArgument);
  const hvd::torch::NamedTensors twice{{"a", model->parameters()[0]}, {"a", model->parameters()[1]}};
  EXPECT_THROW(DistributedOptimizer<optim::SGD>(twice, optim::SGDOptions(0.1)), hvd::InvalidArgument);
}

// Two ranks' optimizers are the same from here on: the same steps give the same parameters.
template <typename Inner, typename Options>
void expect_state_to_travel(Options at_root, Options elsewhere) {
  nn::Sequential alone = make_model(1);
  Inner reference(alone->parameters(), at_root);
  train(alone, reference, Data(), 6);

  nn::Sequential model = make_model(1);
  const bool is_root = hvd::rank() == 0;
  Inner local(model->parameters(), is_root ? at_root : elsewhere);
  if (is_root) train(model, local, Data(), 3);
  DistributedOptimizer<Inner> optimizer(std::move(local), model->named_parameters());
  hvd::torch::broadcast_parameters(*model, 0);
  hvd::torch::broadcast_optimizer_state(optimizer, 0);
  EXPECT_EQ(optimizer.state().size(), reference.state().size());
  train(model, optimizer, Data().shard(), 3);
  EXPECT_LT(distance(alone, model), 1e-9);
}

TEST(OptimizerState, TravelsFromTheRoot) {
  expect_state_to_travel<optim::SGD>(optim::SGDOptions(0.1).momentum(0.9), optim::SGDOptions(0.5));
  expect_state_to_travel<optim::Adam>(optim::AdamOptions(0.05).amsgrad(true), optim::AdamOptions(0.5));
  expect_state_to_travel<optim::AdamW>(optim::AdamWOptions(0.05), optim::AdamWOptions(0.5));
  expect_state_to_travel<optim::RMSprop>(optim::RMSpropOptions(0.01).momentum(0.5).centered(true),
                                         optim::RMSpropOptions(0.5));
  expect_state_to_travel<optim::Adagrad>(optim::AdagradOptions(0.1), optim::AdagradOptions(0.5));
  expect_state_to_travel<optim::LBFGS>(optim::LBFGSOptions(0.2).max_iter(4), optim::LBFGSOptions(1).max_iter(2));
}

TEST(OptimizerState, NoneStaysThatTheRootDoesNotHave) {
  nn::Sequential model = broadcast_model();
  optim::Adam optimizer(model->parameters(), optim::AdamOptions(0.1));
  if (hvd::rank() != 0) train(model, optimizer, Data(), 2);
  hvd::torch::broadcast_optimizer_state(optimizer, 0);
  EXPECT_TRUE(optimizer.state().empty());
}

TEST(OptimizerState, OptimizersThatDifferAreRefused) {
  if (hvd::size() == 1) GTEST_SKIP() << "one rank always agrees";
  nn::Sequential model = broadcast_model();
  optim::Adam adam(model->parameters(), optim::AdamOptions(0.1));
  optim::SGD sgd(model->parameters(), optim::SGDOptions(0.1).momentum(0.9));
  train(model, sgd, Data(), 1);
  optim::Optimizer& mine = hvd::rank() == hvd::size() - 1 ? static_cast<optim::Optimizer&>(adam) : sgd;
  EXPECT_THROW(hvd::torch::broadcast_optimizer_state(mine, 0), hvd::InvalidArgument);  // on all ranks
}

// One model, trained by this and by Python ranks together; both compare with their own optimizer on all of the data.
template <typename Inner, typename Options>
void expect_one_model(Options inner) {
  nn::Sequential model = broadcast_model();
  nn::Sequential alone = make_model(1);
  {
    const torch::NoGradGuard no_grad;
    for (std::size_t i = 0; i < alone->parameters().size(); ++i) alone->parameters()[i].copy_(model->parameters()[i]);
  }
  Inner reference(alone->parameters(), inner);
  train(alone, reference, Data(), 12);
  DistributedOptimizer<Inner> optimizer(model->named_parameters(), inner);
  train(model, optimizer, Data().shard(), 12);
  EXPECT_LT(distance(alone, model), 1e-9);
}

// Run by tests/python/processes/test_mixed_ranks.py, which has the other half.
TEST(WithPython, DISABLED_OneModelIsTrained) {
  expect_one_model<optim::SGD>(optim::SGDOptions(0.1).momentum(0.9).weight_decay(0.01));
  expect_one_model<optim::Adam>(optim::AdamOptions(0.05));
  expect_one_model<optim::AdamW>(optim::AdamWOptions(0.05));
  expect_one_model<optim::RMSprop>(optim::RMSpropOptions(0.01).momentum(0.5));
  expect_one_model<optim::Adagrad>(optim::AdagradOptions(0.1));
  hvd::barrier();
}

torch::IValue read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return torch::pickle_load(std::vector<char>(std::istreambuf_iterator<char>(file), {}));
}
void write_tensors(const std::string& path, const torch::IValue& tensors) {
  const std::vector<char> bytes = torch::pickle_save(tensors);
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

// Every rank begins with the weights of the file, and needs no broadcast; all of a rank's results go to a list.
template <typename Inner, typename Options>
void train_the_weights_of(const c10::impl::GenericDict& start, Options inner, std::vector<Tensor>& results) {
  const auto tensor = [&](const std::string& name) { return start.at(name).toTensor(); };
  nn::Sequential model = make_model(100 + hvd::rank());
  for (auto& named : model->named_parameters()) {
    const torch::NoGradGuard no_grad;
    named.value().copy_(tensor(named.key()));
  }
  Data data;
  data.inputs = tensor("inputs");
  data.targets = tensor("targets");
  DistributedOptimizer<Inner> optimizer(model->named_parameters(), inner);
  train(model, optimizer, data.shard(), 12);
  for (const Tensor& parameter : model->parameters()) results.push_back(parameter.detach());
}

// Run by tests/python/processes/test_mixed_ranks.py, in a folder that has the weights; it compares what comes out.
TEST(WithPython, DISABLED_TheWeightsOfAFileAreTrained) {
  const auto start = read_tensors(testing::TempDir() + "start.pt").toGenericDict();
  std::vector<Tensor> results;
  train_the_weights_of<optim::SGD>(start, optim::SGDOptions(0.1).momentum(0.9).weight_decay(0.01), results);
  train_the_weights_of<optim::Adam>(start, optim::AdamOptions(0.05), results);
  train_the_weights_of<optim::AdamW>(start, optim::AdamWOptions(0.05), results);
  train_the_weights_of<optim::RMSprop>(start, optim::RMSpropOptions(0.01).momentum(0.5), results);
  train_the_weights_of<optim::Adagrad>(start, optim::AdagradOptions(0.1), results);
  write_tensors(testing::TempDir() + "end." + std::to_string(hvd::rank()) + ".pt", results);
  hvd::barrier();
}

TEST(TrainingProgram, SamplersSplitTheData) {
  auto sampler = hvd::torch::sharded_sampler<torch::data::samplers::DistributedRandomSampler>(kExamples, 3);
  std::vector<std::int64_t> mine;
  while (const auto batch = sampler.next(5)) mine.insert(mine.end(), batch->begin(), batch->end());
  const auto all = hvd::allgather(mine);
  std::vector<std::int64_t> sorted(all.begin(), all.end());
  std::sort(sorted.begin(), sorted.end());
  ASSERT_EQ(sorted.size(), static_cast<std::size_t>(kExamples));
  for (std::size_t i = 0; i < sorted.size(); ++i) EXPECT_EQ(sorted[i], static_cast<std::int64_t>(i));
}

TEST(TrainingProgram, OneRankSavesAndAllLoad) {
  const std::string path = testing::TempDir() + "hvd_torch_test." + std::to_string(hvd::size()) + ".pt";
  nn::Sequential saved = make_model(hvd::rank() == 0 ? 5 : 6);
  hvd::torch::save_on_root(saved, path);
  nn::Sequential loaded = make_model(7);
  hvd::torch::load_from_root(loaded, path);
  EXPECT_EQ(distance(make_model(5), loaded), 0);
  hvd::barrier();
  if (hvd::rank() == 0) std::remove(path.c_str());
  hvd::barrier();
  EXPECT_THROW(hvd::torch::load_from_root(loaded, path), hvd::InvalidArgument);  // on all ranks
}

TEST(TrainingProgram, MeansAreOfAllExamples) {
  hvd::torch::MeanMetric metric;
  for (int i = 0; i <= hvd::rank(); ++i) metric.add(hvd::rank(), 2);
  double sum = 0;
  double count = 0;
  for (int rank = 0; rank < hvd::size(); ++rank) {
    sum += 2.0 * rank * (rank + 1);
    count += 2.0 * (rank + 1);
  }
  EXPECT_DOUBLE_EQ(metric.mean(), sum / count);
}

TEST(Tensors, AllTypesTravel) {
  for (const auto type : {torch::kUInt8, torch::kInt8, torch::kInt16, torch::kInt32, torch::kInt64, torch::kFloat16,
                          torch::kBFloat16, torch::kFloat32, torch::kFloat64}) {
    const Tensor reduced = hvd::torch::allreduce(torch::full({2, 3}, hvd::rank(), type), {.op = ReduceOp::kMax});
    EXPECT_TRUE(reduced.equal(torch::full({2, 3}, hvd::size() - 1, type))) << type;
  }
  EXPECT_THROW(hvd::torch::allreduce(torch::zeros({2}, torch::kUInt16)), hvd::InvalidArgument);
  EXPECT_THROW(hvd::torch::allreduce(torch::zeros({2, 2}).to_sparse()), hvd::InvalidArgument);
  EXPECT_THROW(hvd::torch::allreduce(Tensor()), hvd::InvalidArgument);
}

TEST(Tensors, InPlaceResultsComeBackToViews) {
  const Tensor whole = torch::ones({4, 4});
  const Tensor column = whole.select(1, 2);
  const Tensor result = hvd::torch::allreduce_(column, {.op = ReduceOp::kSum});
  EXPECT_EQ(result.data_ptr(), column.data_ptr());
  EXPECT_EQ(whole.sum().item<float>(), 12.0F + 4.0F * static_cast<float>(hvd::size()));
  EXPECT_EQ(hvd::torch::broadcast_(torch::full({}, hvd::rank()), 0).item<float>(), 0.0F);
}

TEST(Tensors, OutputsOfTheLibraryLiveAsTensors) {
  Tensor gathered = hvd::torch::allgather(torch::full({hvd::rank(), 2}, hvd::rank()));
  EXPECT_EQ(gathered.size(0), hvd::size() * (hvd::size() - 1) / 2);
  EXPECT_EQ(hvd::torch::reducescatter(torch::ones({2 * hvd::size(), 3}), {.op = ReduceOp::kSum}).size(0), 2);
  const std::vector<std::int64_t> splits(static_cast<std::size_t>(hvd::size()), 2);
  hvd::torch::Handle handle = hvd::torch::alltoall_async(torch::full({2 * hvd::size(), 1}, hvd::rank()), splits);
  const Tensor exchanged = handle.wait();
  EXPECT_EQ(handle.received_splits(), splits);
  EXPECT_FALSE(handle.valid());
  for (int rank = 0; rank < hvd::size(); ++rank) EXPECT_EQ(exchanged[2 * rank + 1][0].item<float>(), rank);
}

TEST(Gradients, FlowThroughCollectivesAsInPython) {
  const double ranks = hvd::size();
  const double rank = hvd::rank();
  const auto gradient = [](const Tensor& input, const Tensor& output, const Tensor& incoming) {
    return torch::autograd::grad({output}, {input}, {incoming})[0];
  };
  const Tensor input = torch::ones({2 * hvd::size(), 3}, torch::kFloat64).requires_grad_();
  const Tensor mine = torch::full_like(input, rank + 1).detach();  // a gradient that is another on each rank
  const double sum = ranks * (ranks + 1) / 2;

  EXPECT_TRUE(
      gradient(input, hvd::torch::allreduce(input, {.op = ReduceOp::kSum}), mine).equal(torch::full_like(mine, sum)));
  EXPECT_TRUE(gradient(input, hvd::torch::allreduce(input, {.postscale = 2}), mine)
                  .allclose(torch::full_like(mine, 2 * sum / ranks)));
  EXPECT_TRUE(gradient(input, hvd::torch::broadcast(input, 0), mine)
                  .allclose(torch::full_like(mine, hvd::rank() == 0 ? sum / ranks : 0)));

  const Tensor uneven = torch::ones({hvd::rank() + 1, 3}, torch::kFloat64).requires_grad_();
  const Tensor gathered = hvd::torch::allgather(uneven);
  const Tensor rows = torch::arange(gathered.size(0), torch::kFloat64).unsqueeze(1).expand_as(gathered);
  const std::int64_t first = hvd::rank() * (hvd::rank() + 1) / 2;
  EXPECT_TRUE(gradient(uneven, gathered, rows).allclose(rows.narrow(0, first, hvd::rank() + 1)));

  const Tensor scattered = hvd::torch::reducescatter(input, {.op = ReduceOp::kSum});
  EXPECT_EQ(gradient(input, scattered, mine.narrow(0, 0, 2))[2 * hvd::size() - 1][0].item<double>(), ranks * ranks);
  const Tensor exchanged = hvd::torch::alltoall(input);
  EXPECT_EQ(gradient(input, exchanged, mine)[2 * hvd::size() - 1][0].item<double>(), ranks);

  const torch::NoGradGuard no_grad;
  EXPECT_FALSE(hvd::torch::allreduce(input).requires_grad());
}

TEST(Tensors, ADroppedHandleIsHarmless) {
  static_cast<void>(hvd::torch::allreduce_async_(torch::ones({100'000}), {.name = "dropped"}));
  hvd::barrier();
}

TEST(Tensors, TheDeviceIsOneThatIsThere) {
  EXPECT_EQ(hvd::torch::device().is_cuda(), hvd::local_rank() < static_cast<int>(torch::cuda::device_count()));
}

}  // namespace
