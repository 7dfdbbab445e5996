// Reduces the gradients of one DistributedOptimizer: in hooks, as backward makes them, one by one, in groups or in
// buckets. Threads as in reduction_state.h.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "torch/changes.h"
#include "torch/distributed_options.h"
#include "torch/reduction_state.h"

namespace hvd::torch::detail {
namespace slot = ::torch::autograd::impl;

// Calls what was in the parameter's only place for such a hook, too. Does not keep the optimizer alive.
class GradientReduction::State::Hook final : public PostAccumulateGradHook {
 public:
  Hook(std::weak_ptr<State> state, Gradient& gradient, std::unique_ptr<PostAccumulateGradHook> previous)
      : state_(std::move(state)), gradient_(gradient), previous_(std::move(previous)) {}
  void operator()(const at::Tensor& parameter) override {
    if (previous_) (*previous_)(parameter);
    if (const std::shared_ptr<State> alive = state_.lock()) alive->on_accumulated(gradient_);
  }
  // Of the optimizer that was made before for the same parameter; null if there is none.
  const Hook* previous() const { return dynamic_cast<const Hook*>(previous_.get()); }
  // Whether an optimizer that is alive has begun to reduce its gradient.
  bool is_reducing() const {
    const std::shared_ptr<State> alive = state_.lock();
    if (!alive) return false;
    const std::scoped_lock lock(alive->mutex);
    return gradient_.reduced.defined();
  }
  std::unique_ptr<PostAccumulateGradHook> take_previous() { return std::move(previous_); }

 private:
  std::weak_ptr<State> state_;
  Gradient& gradient_;  // of the state
  std::unique_ptr<PostAccumulateGradHook> previous_;
};

namespace {

std::map<Parameter, std::string> names_of(const NamedTensors& named, Site site) {
  std::map<Parameter, std::string> names;
  std::set<std::string> seen;
  for (const auto& [name, tensor] : named) {
    if (!seen.insert(name).second) {
      hvd::detail::raise(StatusCode::kInvalidArgument, "DistributedOptimizer", "two parameters are named " + name,
                         site);
    }
    names.emplace(key(tensor), name);
  }
  return names;
}

void warn_of_change(const std::string& name) {
  TORCH_WARN("The gradient of parameter '", name,
             "' was changed after backward(), which has begun to reduce it: nobody can tell how much of the change is "
             "in the result. Call optimizer.synchronize() before gradients are clipped or unscaled, and "
             "optimizer.step() while the guard of optimizer.skip_synchronize() lives.");
}

}  // namespace

GradientReduction::GradientReduction(const NamedTensors& named, const std::vector<at::Tensor>& parameters,
                                     const DistributedOptions& options, Site site)
    : state_(std::make_shared<State>()) {
  check_options(options, site);
  const std::map<Parameter, std::string> names = names_of(named, site);
  state_->options = options;
  state_->site = site;
  state_->active = options.process_set.included(site) && options.process_set.size(site) > 1;
  std::vector<at::Tensor> different;  // named_parameters() lists a shared module as often as it is used
  std::set<Parameter> known;
  for (const at::Tensor& parameter : parameters) {
    if (!known.insert(key(parameter)).second) continue;
    different.push_back(parameter);
    const auto found = names.find(key(parameter));
    if (found == names.end()) {
      state_->refuse(StatusCode::kInvalidArgument, "DistributedOptimizer",
                     "a parameter of the optimizer has no name: " + parameter.toString());
    }
    add(found->second, parameter);
  }
  if (!state_->active) return;
  const auto groups = options.group_count > 0 ? parts_of(different, options.group_count) : options.groups;
  state_->make_groups(groups);
  if (!options.gradient_as_bucket_view) return;
  state_->make_buckets_of_groups();
  state_->make_buckets_of_rest(/*one_each=*/!groups.empty());
}

void GradientReduction::add(const std::string& name, const at::Tensor& parameter) {
  if (!state_->active) return;
  const std::scoped_lock lock(state_->mutex);
  if (!parameter.requires_grad()) {
    state_->frozen.emplace_back(name, parameter);
    return;
  }
  Gradient& gradient = *state_->gradients.emplace_back(std::make_unique<Gradient>());
  gradient.name = name;
  gradient.parameter = parameter;
  gradient.passes_left = state_->options.backward_passes_per_step;
  if (is_of_changes()) return;
  auto hook = std::make_unique<State::Hook>(state_, gradient, std::move(slot::post_acc_grad_hooks(parameter)));
  gradient.hook = hook.get();
  slot::set_post_acc_grad_hooks(parameter, std::move(hook));
}

void GradientReduction::arrange_added() {
  const std::scoped_lock lock(state_->mutex);
  if (state_->options.gradient_as_bucket_view) state_->make_buckets_of_rest(/*one_each=*/false);
}

void GradientReduction::add_unfrozen() {
  NamedTensors unfrozen;
  {
    const std::scoped_lock lock(state_->mutex);
    const auto is_frozen = [](const auto& named) { return !named.second.requires_grad(); };
    const auto first = std::stable_partition(state_->frozen.begin(), state_->frozen.end(), is_frozen);
    unfrozen.assign(first, state_->frozen.end());
    state_->frozen.erase(first, state_->frozen.end());
  }
  if (unfrozen.empty()) return;
  for (const auto& [name, parameter] : unfrozen) add(name, parameter);
  arrange_added();
}

GradientReduction::State::~State() {
  for (const std::unique_ptr<Gradient>& gradient : gradients) {
    if (gradient->hook == nullptr) continue;
    std::unique_ptr<PostAccumulateGradHook>& there = slot::post_acc_grad_hooks(gradient->parameter);
    if (there.get() != gradient->hook) continue;  // somebody else's is in its place, and calls ours, which does nothing
    slot::set_post_acc_grad_hooks(gradient->parameter, static_cast<Hook&>(*there).take_previous());
  }
}

Submission GradientReduction::State::submission(const std::string& name, bool group) const {
  return {.op = HVD_ALLREDUCE,
          .kind = "allreduce",
          .name = name,
          .process_set = options.process_set,
          .reduce_op = options.op,
          .prescale = 1.0 / options.gradient_predivide_factor,
          .postscale = options.gradient_predivide_factor,
          .group = group,
          .site = site};
}

void GradientReduction::State::make_groups(const std::vector<std::vector<at::Tensor>>& wanted) {
  std::map<Parameter, Gradient*> known;
  for (const std::unique_ptr<Gradient>& gradient : gradients) known.emplace(key(gradient->parameter), gradient.get());
  for (std::size_t number = 0; number < wanted.size(); ++number) {
    auto group = std::make_unique<Group>();
    for (const at::Tensor& parameter : wanted[number]) {
      if (!parameter.requires_grad()) continue;
      const auto found = known.find(key(parameter));
      if (found == known.end() || found->second->group != nullptr) {
        refuse(StatusCode::kInvalidArgument, "DistributedOptimizer",
               "an entry of groups is in two of them, or no parameter of the optimizer: " + parameter.toString());
      }
      found->second->group = group.get();
      group->members.push_back(found->second);
    }
    if (group->members.empty()) continue;
    group->name = "group." + std::to_string(number) + "." + group->members.front()->name;
    groups.push_back(std::move(group));
  }
}

void GradientReduction::State::on_accumulated(Gradient& gradient) {
  if (!gradient.parameter.grad().defined()) return;  // a function of the user's gave none: zeros, at synchronize
  require_own(gradient);
  const std::scoped_lock lock(mutex);
  if (gradient.passes_left <= 0) {
    gradient.version.reset();  // this is told of
    refuse(StatusCode::kPrecondition, "backward",
           "more than backward_passes_per_step (" + std::to_string(options.backward_passes_per_step) +
               ") backward passes before step(); parameter '" + gradient.name + "'");
  }
  // While it is in the caches, and before it is counted: what is refused is as if it had not been.
  if (gradient.bucket != nullptr) gradient.bucket->take_in(gradient.place, site);
  if (--gradient.passes_left == 0) start(gradient);
}

// Throws for a gradient that cannot be reduced in place, as others need it as it is. Not under the mutex: it asks the
// other optimizers.
void GradientReduction::State::require_own(const Gradient& gradient) const {
  const auto* hook = dynamic_cast<const Hook*>(slot::post_acc_grad_hooks(gradient.parameter).get());
  for (; hook != nullptr; hook = hook->previous()) {
    if (hook == gradient.hook || !hook->is_reducing()) continue;
    refuse(StatusCode::kPrecondition, "backward",
           "two DistributedOptimizers have parameter '" + gradient.name +
               "', and both reduce its gradient, which one of them has begun. Make one DistributedOptimizer for each "
               "parameter, or destroy the former first.");
  }
  if (!gradient.parameter.grad().requires_grad()) return;
  refuse(StatusCode::kPrecondition, "backward",
         "the gradient of parameter '" + gradient.name +
             "' requires a gradient itself (create_graph), and cannot be reduced in place. Make what is differentiated "
             "twice with torch::autograd::grad and create_graph, and call backward() without create_graph.");
}

// Hands the gradient over, zeros where there is none.
void GradientReduction::State::start(Gradient& gradient) {
  const at::NoGradGuard no_grad;
  if (gradient.bucket != nullptr) return start_in_bucket(gradient);
  at::Tensor& grad = gradient.parameter.mutable_grad();
  if (!grad.defined()) {
    // The others have a sparse gradient again, presumably.
    grad = gradient.sparse_dimensions > 0 ? sparse_zeros(gradient.parameter, gradient.sparse_dimensions)
                                          : at::zeros_like(gradient.parameter);
  }
  const bool made_now = gradient.passes_left == 0;  // by the backward pass that runs
  gradient.passes_left = 0;
  gradient.version.reset();
  if (stays_sparse(gradient, grad)) {
    gradient.sparse_dimensions = grad.sparse_dim();
    gradient.sparse =
        start_sparse(grad, {.op = options.op, .process_set = options.process_set, .name = gradient.name}, site);
    gradient.reduced = grad;
    return;
  }
  if (grad.layout() != at::kStrided) grad = grad.to_dense();
  at::Tensor own = grad;
  if (grad.storage().use_count() > 1) {
    // In place it would be reduced as often as it is the gradient of a parameter.
    own = grad.clone();
    // Autograd gave one memory to several, unless something was added: that lies where the program wants it.
    if (made_now && grad._version() == 0) grad = own;
  }
  if (made_now) gradient.version = grad._version();
  gradient.sent = plain(compressed(own, options.compression), submission(gradient.name, false));
  if (gradient.group == nullptr) {
    start_alone(gradient);
    gradient.reduced = grad;  // last: after a refusal synchronize() tries again
    return;
  }
  gradient.reduced = grad;
  gradient.group->producers.add(gradient.sent);
  if (++gradient.group->ready < gradient.group->members.size()) return;
  try {
    start_group(*gradient.group);
  } catch (...) {
    for (Gradient* member : gradient.group->members) member->reduced = at::Tensor();
    gradient.group->ready = 0;
    throw;
  }
}

void GradientReduction::State::start_alone(Gradient& gradient) const {
  gradient.operation = std::make_shared<hvd::detail::Operation>(
      submit(submission(gradient.name, false), {gradient.sent}, {gradient.sent}));
}

bool GradientReduction::State::stays_sparse(const Gradient& gradient, const at::Tensor& grad) const {
  return grad.layout() != at::kStrided && !options.sparse_as_dense && gradient.group == nullptr;
}

void GradientReduction::State::start_group(Group& group) {
  std::vector<at::Tensor> tensors;
  for (const Gradient* member : group.members) tensors.push_back(member->sent);
  group.producers.hand_over(tensors);
  const auto operation =
      std::make_shared<hvd::detail::Operation>(submit(submission(group.name, true), tensors, tensors));
  for (Gradient* member : group.members) member->operation = operation;
}

// What no backward pass has started, or what was refused there.
std::vector<Gradient*> GradientReduction::State::missing() const {
  std::vector<Gradient*> missing;
  for (const std::unique_ptr<Gradient>& gradient : gradients) {
    if (!gradient->reduced.defined()) missing.push_back(gradient.get());
  }
  return missing;
}

void GradientReduction::State::start_missing(const std::vector<Gradient*>& missing,
                                             const std::vector<Question>& asked) {
  std::set<const void*> left_out = at_rest;
  for (const Question& question : asked) left_out.insert(unit_of(*question.members().front()));
  for (Gradient* gradient : missing) {
    if (!left_out.contains(unit_of(*gradient))) start(*gradient);
  }
  for (const std::unique_ptr<Bucket>& bucket : buckets) {
    if (bucket->operation() == nullptr && !left_out.contains(bucket.get())) start_bucket(*bucket);
  }
}

// Puts what is reduced into its place. Gives questions about what is not, as another rank asks about it.
std::vector<Question> GradientReduction::State::finish_all() {
  std::map<const void*, Gradient*> refused;
  for (const std::unique_ptr<Gradient>& gradient : gradients) {
    const bool is_first_of_bucket = gradient->bucket != nullptr && gradient->place == 0;
    if (!is_first_of_bucket && !gradient->operation && !gradient->sparse) continue;
    try {
      if (!is_first_of_bucket) {
        finish(*gradient);
      } else if (gradient->bucket->operation() != nullptr) {
        gradient->bucket->finish();
      }
    } catch (const InvalidArgument& error) {
      if (!another_asks(error)) throw;
      refused.emplace(unit_of(*gradient), gradient.get());
    }
  }
  std::vector<Question> questions;
  for (const auto& [unit, gradient] : refused) questions.push_back(question_about(*gradient));
  return questions;
}

// Once all is reduced.
void GradientReduction::State::conclude() {
  for (const std::unique_ptr<Gradient>& gradient : gradients) {
    if (gradient->bucket != nullptr && !at_rest.contains(gradient->bucket)) {
      gradient->parameter.mutable_grad() = gradient->bucket->view(gradient->place);
    }
    reset_one(*gradient);
  }
  for (const std::unique_ptr<Bucket>& bucket : buckets) bucket->reset();
  leave_at_rest();
}

// The name of a gradient that the program has changed while it is in flight, empty if there is none. Once is enough.
std::string GradientReduction::State::changed() {
  if (warned) return {};
  for (const std::unique_ptr<Gradient>& gradient : gradients) {
    if (!gradient->reduced.defined() || !gradient->version) continue;
    warned = gradient->reduced._version() != *gradient->version;
    if (warned) return gradient->name;
  }
  return {};
}

// Puts the reduced gradient, which is done, into its place.
void GradientReduction::State::finish(Gradient& gradient) const {
  if (gradient.sparse) {
    gradient.parameter.mutable_grad() = finish_sparse(*gradient.sparse);
    reset_one(gradient);
    return;
  }
  gradient.operation->wait();
  const at::Tensor reduced = std::exchange(gradient.reduced, {});
  const at::Tensor sent = std::exchange(gradient.sent, {});
  reset_one(gradient);
  claim(sent);
  if (sent.data_ptr() == reduced.data_ptr()) {
    gradient.parameter.mutable_grad() = reduced;
  } else if (reduced.is_non_overlapping_and_dense()) {
    reduced.detach().copy_(sent);
    gradient.parameter.mutable_grad() = reduced;
  } else {
    gradient.parameter.mutable_grad() = sent.to(reduced.scalar_type());
  }
}

void GradientReduction::State::reset_one(Gradient& gradient) const {
  gradient.operation = nullptr;
  gradient.sparse.reset();
  gradient.reduced = gradient.sent = at::Tensor();
  gradient.passes_left = options.backward_passes_per_step;
  if (gradient.group == nullptr) return;
  gradient.group->ready = 0;
  gradient.group->producers.clear();
}

// The handles of each device.
std::unordered_map<at::Device, std::vector<hvd_handle*>> GradientReduction::State::in_flight() const {
  std::unordered_map<at::Device, std::vector<hvd_handle*>> all;
  for (const std::unique_ptr<Bucket>& bucket : buckets) {
    if (bucket->operation() != nullptr) all[bucket->device()].push_back(bucket->operation()->get());
  }
  for (const std::unique_ptr<Gradient>& gradient : gradients) {
    if (gradient->bucket != nullptr) continue;
    const Group* group = gradient->group;
    const at::Device device = gradient->parameter.device();
    if (gradient->sparse) {
      all[device].push_back(gradient->sparse->operation->get());
    } else if (gradient->operation && (group == nullptr || group->members.front() == gradient.get())) {
      all[device].push_back(gradient->operation->get());
    }
  }
  return all;
}

void GradientReduction::synchronize() {
  State& state = *state_;
  if (is_of_changes()) return;
  add_unfrozen();
  if (state.gradients.empty()) return;
  std::string changed;
  try {
    std::vector<Question> questions;
    {
      const std::scoped_lock lock(state.mutex);
      changed = state.changed();
      const std::vector<Gradient*> missing = state.missing();
      questions = state.questions_about(missing);
      for (Question& question : questions) question.ask(state.options.process_set, state.site);
      state.start_missing(missing, questions);
    }
    if (!changed.empty()) warn_of_change(changed);
    std::vector<Question> refused = finish_in_flight();
    if (!questions.empty() || !refused.empty()) {
      questions = settle(std::move(questions), std::move(refused), state.options.process_set, state.site);
      {
        const std::scoped_lock lock(state.mutex);
        state.start_settled(questions);
      }
      if (!finish_in_flight().empty()) state.refuse(StatusCode::kInvalidArgument, "synchronize", kOutOfTurn);
    }
    const at::NoGradGuard no_grad;
    const std::scoped_lock lock(state.mutex);
    state.conclude();
  } catch (...) {
    reset();
    throw;
  }
}

std::vector<Question> GradientReduction::finish_in_flight() {
  std::unordered_map<at::Device, std::vector<hvd_handle*>> in_flight;
  {
    const std::scoped_lock lock(state_->mutex);
    in_flight = state_->in_flight();
  }
  for (const auto& [device, handles] : in_flight) {
    hvd_handles_wait(handles.data(), static_cast<std::int32_t>(handles.size()), /*limit_nanoseconds=*/-1);
  }
  const at::NoGradGuard no_grad;
  const std::scoped_lock lock(state_->mutex);
  for (const auto& [device, handles] : in_flight) let_stream_wait(handles, device);
  return state_->finish_all();
}

void GradientReduction::reset() {
  const std::scoped_lock lock(state_->mutex);
  for (const std::unique_ptr<Gradient>& gradient : state_->gradients) {
    state_->reset_one(*gradient);
    // Zeros that stood for one.
    if (gradient->told && !gradient->parameter.requires_grad()) gradient->parameter.mutable_grad() = at::Tensor();
  }
  for (const std::unique_ptr<Bucket>& bucket : state_->buckets) bucket->reset();
}

bool GradientReduction::is_of_changes() const { return state_->active && state_->options.op == ReduceOp::kAdasum; }

at::Tensor GradientReduction::step_and_reduce(const std::function<at::Tensor()>& local_step) {
  add_unfrozen();
  return state_->reduced_step(local_step);
}

bool GradientReduction::in_progress() const {
  const std::scoped_lock lock(state_->mutex);
  return std::any_of(state_->gradients.begin(), state_->gradients.end(), [&](const auto& gradient) {
    return gradient->passes_left != state_->options.backward_passes_per_step;
  });
}

at::Tensor GradientReduction::reduce_loss(const at::Tensor& loss) const {
  if (state_->gradients.empty() || !loss.defined()) return loss;
  const std::string name = "loss." + state_->gradients.front()->name;
  const at::NoGradGuard no_grad;
  return allreduce(loss.detach(), {.op = state_->options.op, .process_set = state_->options.process_set, .name = name},
                   state_->site);
}

void GradientReduction::refuse(const char* operation, const char* text) const {
  state_->refuse(StatusCode::kPrecondition, operation, text);
}

}  // namespace hvd::torch::detail
