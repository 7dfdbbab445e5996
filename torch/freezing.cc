#include "torch/freezing.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string_view>

#include "torch/reduction_state.h"

namespace hvd::torch::detail {

bool is_still(const at::Tensor& parameter) { return !parameter.requires_grad() && !parameter.grad().defined(); }

bool another_asks(const std::exception& error) {
  const std::string_view text = error.what();
  return text.find("mismatched") != std::string_view::npos && text.find("uint8") != std::string_view::npos;
}

void Question::ask(ProcessSet process_set, Site site) {
  const at::Tensor told = at::empty({static_cast<std::int64_t>(members_.size())}, at::kByte);
  auto* const bytes = told.mutable_data_ptr<std::uint8_t>();
  for (std::size_t i = 0; i < members_.size(); ++i) bytes[i] = members_[i]->told ? 1 : 0;
  if (is_sparse_) {
    handle_ = allgather_async(told, {.process_set = process_set, .name = name_}, site);
  } else {
    handle_ = allreduce_async_(told, {.op = ReduceOp::kMin, .process_set = process_set, .name = name_}, site);
  }
}

bool Question::is_answered(Site site) {
  at::Tensor answer;
  try {
    answer = handle_.wait(site);
  } catch (const InvalidArgument& error) {
    if (!another_asks(error)) throw;
    return false;
  }
  const auto* const bytes = answer.const_data_ptr<std::uint8_t>();
  const auto count = static_cast<std::size_t>(answer.numel());
  for (Gradient* member : members_) member->at_rest = true;
  for (std::size_t i = 0; i < count; ++i) {
    if (bytes[i] == 0) members_[i % members_.size()]->at_rest = false;
  }
  return true;
}

bool Question::all_at_rest() const {
  return std::all_of(members_.begin(), members_.end(), [](const Gradient* member) { return member->at_rest; });
}

std::vector<Question> settle(std::vector<Question> asked, std::vector<Question> refused, ProcessSet process_set,
                             Site site) {
  std::vector<Question> answered;
  for (Question& question : asked) {
    std::vector<Question>& place = question.is_answered(site) ? answered : refused;
    place.push_back(std::move(question));
  }
  for (Question& question : refused) question.ask(process_set, site);
  for (Question& question : refused) {
    if (!question.is_answered(site)) {
      hvd::detail::raise(StatusCode::kInvalidArgument, "synchronize", kOutOfTurn, site);
    }
  }
  std::move(refused.begin(), refused.end(), std::back_inserter(answered));
  return answered;
}

const void* GradientReduction::State::unit_of(const Gradient& gradient) {
  if (gradient.group != nullptr) return gradient.group;
  if (gradient.bucket != nullptr) return gradient.bucket;
  return &gradient;
}

// About what is reduced with it.
Question GradientReduction::State::question_about(Gradient& gradient) const {
  if (gradient.group != nullptr) return {gradient.group->members, gradient.group->name, /*is_sparse=*/false};
  if (gradient.bucket == nullptr) return {{&gradient}, gradient.name, gradient.sparse_dimensions > 0};
  std::vector<Gradient*> members;
  for (const std::unique_ptr<Gradient>& other : gradients) {
    if (other->bucket == gradient.bucket) members.push_back(other.get());
  }
  std::sort(members.begin(), members.end(), [](const Gradient* a, const Gradient* b) { return a->place < b->place; });
  return {members, gradient.bucket->name(), /*is_sparse=*/false};
}

// Finds what is still among that for which nothing has been reduced yet; to ask about what has become so.
std::vector<Question> GradientReduction::State::questions_about(const std::vector<Gradient*>& missing) {
  std::vector<Question> questions;
  if (missing.empty() && !has_told) return questions;
  std::set<const Gradient*> still;
  for (const Gradient* gradient : missing) {
    if (is_still(gradient->parameter)) still.insert(gradient);
  }
  for (const std::unique_ptr<Gradient>& gradient : gradients) {
    if (!gradient->told || still.contains(gradient.get())) continue;
    gradient->told = gradient->at_rest = false;
    at_rest.erase(unit_of(*gradient));
  }
  std::set<const void*> units;
  for (Gradient* gradient : missing) {
    if (!still.contains(gradient) || gradient->told) continue;
    if (units.insert(unit_of(*gradient)).second) questions.push_back(question_about(*gradient));
    gradient->told = has_told = true;
  }
  return questions;
}

// Reduces what is not at rest everywhere, now that all ranks know what is.
void GradientReduction::State::start_settled(const std::vector<Question>& questions) {
  for (const Question& question : questions) {
    const std::vector<Gradient*>& members = question.members();
    if (!question.all_at_rest()) {
      start_again(members);
      continue;
    }
    at_rest.insert(unit_of(*members.front()));
    for (Gradient* member : members) reset_one(*member);
    if (members.front()->bucket != nullptr) members.front()->bucket->reset();
  }
}

// Hands over what was not, as this rank has asked, or what was refused, as another one has.
void GradientReduction::State::start_again(const std::vector<Gradient*>& members) {
  const at::NoGradGuard no_grad;
  Gradient& first = *members.front();
  if (first.bucket != nullptr && first.bucket->operation() != nullptr) return start_bucket(*first.bucket);
  if (first.bucket == nullptr && first.sparse) {
    first.sparse =
        start_sparse(first.reduced, {.op = options.op, .process_set = options.process_set, .name = first.name}, site);
    return;
  }
  if (first.bucket == nullptr && first.operation) {
    return first.group != nullptr ? start_group(*first.group) : start_alone(first);
  }
  for (Gradient* member : members) {
    if (!member->reduced.defined()) start(*member);
  }
}

// Takes the gradients away that stood for those of parameters at rest: the step must not move these.
void GradientReduction::State::leave_at_rest() {
  if (!has_told) return;
  for (const std::unique_ptr<Gradient>& gradient : gradients) {
    if (gradient->at_rest) gradient->parameter.mutable_grad() = at::Tensor();
  }
}

}  // namespace hvd::torch::detail
