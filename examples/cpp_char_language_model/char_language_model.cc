// A recurrent network that learns to write like a text, with gradients that are clipped after they are reduced.
//
//   mpirun --bind-to none -np 2 build/char_language_model
//   mpirun --bind-to none -np 2 build/char_language_model --text some-novel.txt --steps 2000 --checkpoint novel.pt
//
// It prints how many bits the network needs for a character of the last tenth of the text, which it never trains on,
// before and after the training. Started again with the same checkpoint and more steps, it goes on from there.
#include <ATen/Parallel.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adam.h>
#include <torch/serialize.h>
#include <torch/utils.h>

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <numbers>
#include <stdexcept>
#include <string>
#include <vector>

#include <horovod_cpp/torch.h>

#include "arguments.h"
#include "text.h"
#include "writer.h"

namespace char_language_model {

/// All that a checkpoint has.
struct Training {
  torch::Tensor alphabet;
  Writer writer;
  hvd::torch::DistributedOptimizer<torch::optim::Adam> optimizer;
  std::int64_t step = 0;

  Training(const Text& text, const Arguments& arguments)
      : alphabet(torch::tensor(std::vector<std::int8_t>(text.alphabet.begin(), text.alphabet.end()))),
        writer(alphabet.size(0), arguments.hidden),
        optimizer(writer->named_parameters(), torch::optim::AdamOptions(arguments.learning_rate)) {}
};

torch::serialize::OutputArchive& operator<<(torch::serialize::OutputArchive& archive, const Training& training) {
  torch::serialize::OutputArchive writer(archive.compilation_unit()), optimizer(archive.compilation_unit());
  training.writer->save(writer);
  training.optimizer.save(optimizer);
  archive.write("alphabet", training.alphabet);
  archive.write("hidden", training.writer->memory->options.hidden_size());
  archive.write("writer", writer);
  archive.write("optimizer", optimizer);
  archive.write("step", training.step);
  return archive;
}

torch::serialize::InputArchive& operator>>(torch::serialize::InputArchive& archive, Training& training) {
  torch::Tensor alphabet;
  torch::IValue hidden, step;
  archive.read("alphabet", alphabet);
  archive.read("hidden", hidden);
  if (!alphabet.equal(training.alphabet) || hidden.toInt() != training.writer->memory->options.hidden_size()) {
    throw std::invalid_argument("the checkpoint is of a text with other characters, or of another --hidden");
  }
  torch::serialize::InputArchive writer, optimizer;
  archive.read("writer", writer);
  archive.read("optimizer", optimizer);
  training.writer->load(writer);
  training.optimizer.load(optimizer);
  archive.read("step", step);
  training.step = step.toInt();
  return archive;
}

/// Rank 0 alone sees the file.
void resume(Training& training, const std::string& checkpoint) {
  if (hvd::broadcast(hvd::rank() == 0 && std::filesystem::exists(checkpoint), /*root_rank=*/0)) {
    hvd::torch::load_from_root(training, checkpoint);
    if (hvd::rank() == 0) std::printf("resumes after step %" PRId64 " of %s\n", training.step, checkpoint.c_str());
  }
}

void set_rate(torch::optim::Optimizer& optimizer, double rate) {
  for (torch::optim::OptimizerParamGroup& group : optimizer.param_groups()) group.options().set_lr(rate);
}

/// A bar on the error output of rank 0.
void show_progress(std::int64_t step, std::int64_t steps, double bits) {
  constexpr int kWidth = 40;
  const auto done = static_cast<int>(kWidth * step / steps);
  std::fprintf(stderr, "\r[%.*s%*s] %" PRId64 "/%" PRId64 " steps, %.2f bits%s", done,
               "########################################", kWidth - done, "", step, steps, bits,
               step == steps ? "\n" : "");
}

/// One step of all ranks. Returns the loss on this rank's stretches, in bits.
double train_step(Training& training, const Text& text, const Arguments& arguments) {
  // Adam's rate grows with the root of the batch, rather than with the batch; it falls as training goes on.
  const double decay = std::sqrt(1.0 + static_cast<double>(training.step) / 50.0);
  set_rate(training.optimizer, arguments.learning_rate * std::sqrt(hvd::size()) / decay);
  const torch::Tensor stretches = text.stretches(arguments.seed, training.step, hvd::rank() * arguments.batch_size,
                                                 arguments.batch_size, arguments.length);
  training.optimizer.zero_grad();
  const torch::Tensor loss = loss_of(training.writer, stretches);
  loss.backward();
  // Clipped as one: a rank that clipped its own gradients before the reduction would change the direction of all.
  training.optimizer.synchronize();
  torch::nn::utils::clip_grad_norm_(training.writer->parameters(), arguments.clip);
  const auto reduced_already = training.optimizer.skip_synchronize();
  training.optimizer.step();
  ++training.step;
  return loss.item<double>() / std::numbers::ln2;
}

void train(Training& training, const Text& text, const Arguments& arguments) {
  while (training.step < arguments.steps) {
    const double bits = train_step(training, text, arguments);
    if (hvd::rank() == 0) show_progress(training.step, arguments.steps, bits);
    const bool saves = training.step % 100 == 0 || training.step == arguments.steps;
    if (saves && !arguments.checkpoint.empty()) hvd::torch::save_on_root(training, arguments.checkpoint);
  }
}

/// Each rank reads its share of the stretches.
double bits_per_character(Writer& writer, const torch::Tensor& text, std::int64_t length) {
  const torch::NoGradGuard no_grad;
  hvd::torch::MeanMetric nats;
  for (const torch::Tensor& batch :
       text.unfold(0, length + 1, length).slice(0, hvd::rank(), {}, hvd::size()).split(32)) {
    nats.add(loss_of(writer, batch).item<double>(), static_cast<double>(batch.size(0)));
  }
  return nats.mean() / std::numbers::ln2;
}

void run(const Arguments& arguments) {
  const hvd::Session session;
  at::set_num_threads(1);  // the ranks share the cores
  const Text text(read_text(arguments.text));
  if (text.test.size(0) <= hvd::size() * arguments.length) {
    throw std::invalid_argument(arguments.text + " is too short: its last tenth has no stretch for each rank");
  }
  torch::manual_seed(arguments.seed + hvd::rank());  // the ranks begin with different weights until the broadcast
  Training training(text, arguments);
  hvd::torch::broadcast_parameters(training.writer, /*root_rank=*/0);
  const double before = bits_per_character(training.writer, text.test, arguments.length);
  if (!arguments.checkpoint.empty()) resume(training, arguments.checkpoint);

  train(training, text, arguments);
  const double after = bits_per_character(training.writer, text.test, arguments.length);
  if (hvd::rank() != 0) return;
  torch::manual_seed(arguments.seed);
  std::printf("it writes: %s\n",
              write(training.writer, text.alphabet, text.train[0].item<std::int64_t>(), 300).c_str());
  std::printf("result: %.3f bits per character before, %.3f after %" PRId64 " steps\n", before, after, training.step);
}

}  // namespace char_language_model

int main(int argc, char** argv) {
  try {
    char_language_model::run(char_language_model::parse({argv + 1, argv + argc}));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
