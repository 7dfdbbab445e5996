// The network: from characters to the logits of the character that follows each.
#pragma once

#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/rnn.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace char_language_model {

struct WriterImpl : torch::nn::Module {
  torch::nn::Embedding embedding;
  torch::nn::GRU memory;
  torch::nn::Linear output;

  WriterImpl(std::int64_t characters, std::int64_t hidden)
      : embedding(register_module("embedding", torch::nn::Embedding(characters, 48))),
        memory(register_module("memory", torch::nn::GRU(torch::nn::GRUOptions(48, hidden).batch_first(true)))),
        output(register_module("output", torch::nn::Linear(hidden, characters))) {}

  /// Logits, and the state to go on from.
  std::pair<torch::Tensor, torch::Tensor> forward(const torch::Tensor& characters, const torch::Tensor& state = {}) {
    const auto [remembered, next] = memory->forward(embedding->forward(characters), state);
    return {output->forward(remembered), next};
  }
};
TORCH_MODULE(Writer);

/// Mean over all characters but the first of each stretch, in nats.
inline torch::Tensor loss_of(Writer& writer, const torch::Tensor& stretches) {
  const torch::Tensor logits = writer->forward(stretches.slice(1, 0, -1)).first;
  return torch::cross_entropy_loss(logits.flatten(0, 1), stretches.slice(1, 1).flatten());
}

/// `length` characters that the network makes up.
inline std::string write(Writer& writer, const std::string& alphabet, std::int64_t beginning, std::int64_t length) {
  const torch::NoGradGuard no_grad;
  std::string written;
  torch::Tensor state;
  torch::Tensor last = torch::full({1, 1}, beginning, torch::kInt64);
  for (std::int64_t i = 0; i < length; ++i) {
    const auto [logits, next] = writer->forward(last, state);
    state = next;
    last = torch::multinomial(torch::softmax(logits[0] / 0.7, 1), 1);  // what is likely becomes likelier
    written += alphabet[static_cast<std::size_t>(last.item<std::int64_t>())];
  }
  return written;
}

}  // namespace char_language_model
