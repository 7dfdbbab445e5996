#include "torch/changes.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "torch/reduction_state.h"

namespace hvd::torch::detail {

// Does the optimizer's step, and reduces what that changes in each parameter that is not at rest. Where the reduction
// throws, the parameters are as they were before.
at::Tensor GradientReduction::State::reduced_step(const std::function<at::Tensor()>& local_step) {
  std::vector<Gradient*> all;
  for (const std::unique_ptr<Gradient>& gradient : gradients) all.push_back(gradient.get());
  std::vector<Question> questions = questions_about(all);
  std::vector<Change> changes;
  for (Gradient* gradient : all) {
    if (!at_rest.contains(gradient)) changes.push_back({gradient, gradient->parameter.detach().clone(), {}});
  }
  at::Tensor loss;
  try {
    loss = local_step();
  } catch (...) {
    for (Gradient* gradient : all) gradient->told = gradient->at_rest;  // nobody was asked
    throw;
  }
  const at::NoGradGuard no_grad;
  try {
    reduce_changes(changes, std::move(questions));
  } catch (...) {
    for (const Change& change : changes) change.gradient->parameter.detach().copy_(change.start);
    throw;
  }
  return loss;
}

void GradientReduction::State::reduce_changes(std::vector<Change>& changes, std::vector<Question> questions) {
  std::set<const Gradient*> asked;
  for (Question& question : questions) {
    question.ask(options.process_set, site);
    asked.insert(question.members().front());
  }
  for (Change& change : changes) {
    if (!asked.contains(change.gradient)) start_change(change);
  }
  std::vector<std::optional<at::Tensor>> reduced(changes.size());
  std::vector<Question> refused;
  for (std::size_t i = 0; i < changes.size(); ++i) {
    if (!changes[i].handle.valid()) continue;
    try {
      reduced[i] = changes[i].handle.wait(site);
    } catch (const InvalidArgument& error) {
      if (!another_asks(error)) throw;
      refused.push_back(question_about(*changes[i].gradient));
    }
  }
  for (const Question& question : settle(std::move(questions), std::move(refused), options.process_set, site)) {
    Gradient* const gradient = question.members().front();
    const auto change = std::find_if(changes.begin(), changes.end(),
                                     [gradient](const Change& one) { return one.gradient == gradient; });
    if (question.all_at_rest()) {
      at_rest.insert(gradient);
    } else {
      start_change(*change);
    }
  }
  for (std::size_t i = 0; i < changes.size(); ++i) {
    if (changes[i].handle.valid() && !reduced[i]) reduced[i] = changes[i].handle.wait(site);
  }
  for (std::size_t i = 0; i < changes.size(); ++i) {
    const at::Tensor parameter = changes[i].gradient->parameter.detach();
    if (reduced[i]) parameter.copy_(changes[i].start.add(reduced[i]->to(parameter.scalar_type())));
  }
}

void GradientReduction::State::start_change(Change& change) const {
  const Gradient& gradient = *change.gradient;
  // Memory of its own: what is in flight when an error comes must not reach the parameter.
  const at::Tensor made = gradient.parameter.detach().sub(change.start);
  change.handle = allreduce_async_(compressed(made, options.compression),
                                   {.op = options.op, .process_set = options.process_set, .name = gradient.name}, site);
}

at::Tensor compressed(const at::Tensor& tensor, Compression compression) {
  if (compression == Compression::kNone || !tensor.is_floating_point()) return tensor;
  return tensor.to(compression == Compression::kFp16 ? at::kHalf : at::kBFloat16);
}

}  // namespace hvd::torch::detail
