// broadcast_optimizer_state, for the optimizers that LibTorch has. The root describes its options, numbers and shapes
// of tensors as bytes; the tensors themselves follow as tensors. (torch::save would do for most, but cannot save an
// LBFGS whose history is not full.)
#include <ATen/ops/empty.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/lbfgs.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <cstring>
#include <deque>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <type_traits>

#include <horovod_cpp/torch.h>

namespace hvd::torch {
namespace {

namespace optim = ::torch::optim;

// Both pass over the same fields in the same order; see `visit`.
class Writer {
 public:
  static constexpr bool kReads = false;

  void raw(void* data, std::size_t bytes) { bytes_.append(static_cast<const char*>(data), bytes); }
  void tensor(at::Tensor& tensor) {
    std::vector<std::int64_t> description{tensor.defined() ? 1 : 0};
    if (tensor.defined()) {
      description.push_back(static_cast<std::int64_t>(tensor.scalar_type()));
      description.push_back(tensor.is_cpu() ? 1 : 0);
      description.insert(description.end(), tensor.sizes().begin(), tensor.sizes().end());
      tensors_.push_back(tensor);
    }
    auto size = static_cast<std::int64_t>(description.size());
    raw(&size, sizeof size);
    raw(description.data(), description.size() * sizeof(std::int64_t));
  }

  std::string bytes_;
  std::vector<at::Tensor> tensors_;
};

class Reader {
 public:
  static constexpr bool kReads = true;

  Reader(std::string bytes, at::Device device) : bytes_(std::move(bytes)), device_(device) {}

  void raw(void* data, std::size_t bytes) {
    if (bytes > bytes_.size() - at_) throw std::runtime_error("the root's description is too short");
    std::memcpy(data, bytes_.data() + at_, bytes);
    at_ += bytes;
  }
  // Empty ones, which are filled later.
  void tensor(at::Tensor& tensor) {
    std::int64_t size = 0;
    raw(&size, sizeof size);
    std::vector<std::int64_t> description(static_cast<std::size_t>(size));
    raw(description.data(), description.size() * sizeof(std::int64_t));
    tensor = at::Tensor();
    if (description.front() == 0) return;
    const at::Device device = description[2] == 1 ? at::Device(at::kCPU) : device_;
    const auto type = static_cast<at::ScalarType>(description[1]);
    tensor = at::empty(at::IntArrayRef(description).slice(3), at::TensorOptions().dtype(type).device(device));
    tensors_.push_back(tensor);
  }

  std::vector<at::Tensor> tensors_;

 private:
  std::string bytes_;
  std::size_t at_ = 0;
  at::Device device_;
};

template <typename Archive, typename T>
  requires std::is_arithmetic_v<T>
void pass(Archive& archive, T& value) {
  archive.raw(&value, sizeof value);
}
template <typename Archive>
void pass(Archive& archive, at::Tensor& tensor) {
  archive.tensor(tensor);
}
template <typename Archive>
void pass(Archive& archive, std::tuple<double, double>& values) {
  pass(archive, std::get<0>(values));
  pass(archive, std::get<1>(values));
}
// Strings, and lists of tensors.
template <typename Archive, typename List>
  requires requires(List list) { list.resize(1); }
void pass(Archive& archive, List& list) {
  auto size = static_cast<std::int64_t>(list.size());
  pass(archive, size);
  list.resize(static_cast<std::size_t>(size));
  for (auto& entry : list) pass(archive, entry);
}
template <typename Archive, typename T>
void pass(Archive& archive, std::optional<T>& value) {
  bool has_value = value.has_value();
  pass(archive, has_value);
  if (!has_value) return value.reset();
  if (!value) value.emplace();
  pass(archive, *value);
}
template <typename Archive, typename... Fields>
void pass_all(Archive& archive, Fields&... fields) {
  (pass(archive, fields), ...);
}

template <typename Archive>
void visit(Archive& archive, optim::SGDOptions& of) {
  pass_all(archive, of.lr(), of.momentum(), of.dampening(), of.weight_decay(), of.nesterov());
}
template <typename Archive>
void visit(Archive& archive, optim::SGDParamState& of) {
  pass_all(archive, of.momentum_buffer());
}
template <typename Archive>
void visit(Archive& archive, optim::AdamOptions& of) {
  pass_all(archive, of.lr(), of.betas(), of.eps(), of.weight_decay(), of.amsgrad());
}
template <typename Archive>
void visit(Archive& archive, optim::AdamParamState& of) {
  pass_all(archive, of.step(), of.exp_avg(), of.exp_avg_sq(), of.max_exp_avg_sq());
}
template <typename Archive>
void visit(Archive& archive, optim::AdamWOptions& of) {
  pass_all(archive, of.lr(), of.betas(), of.eps(), of.weight_decay(), of.amsgrad());
}
template <typename Archive>
void visit(Archive& archive, optim::AdamWParamState& of) {
  pass_all(archive, of.step(), of.exp_avg(), of.exp_avg_sq(), of.max_exp_avg_sq());
}
template <typename Archive>
void visit(Archive& archive, optim::RMSpropOptions& of) {
  pass_all(archive, of.lr(), of.alpha(), of.eps(), of.weight_decay(), of.momentum(), of.centered());
}
template <typename Archive>
void visit(Archive& archive, optim::RMSpropParamState& of) {
  pass_all(archive, of.step(), of.square_avg(), of.momentum_buffer(), of.grad_avg());
}
template <typename Archive>
void visit(Archive& archive, optim::AdagradOptions& of) {
  pass_all(archive, of.lr(), of.lr_decay(), of.weight_decay(), of.initial_accumulator_value(), of.eps());
}
template <typename Archive>
void visit(Archive& archive, optim::AdagradParamState& of) {
  pass_all(archive, of.step(), of.sum());
}
template <typename Archive>
void visit(Archive& archive, optim::LBFGSOptions& of) {
  pass_all(archive, of.lr(), of.max_iter(), of.max_eval(), of.tolerance_grad(), of.tolerance_change(),
           of.history_size(), of.line_search_fn());
}
template <typename Archive>
void visit(Archive& archive, optim::LBFGSParamState& of) {
  pass_all(archive, of.func_evals(), of.n_iter(), of.t(), of.prev_loss(), of.d(), of.H_diag(), of.prev_flat_grad(),
           of.old_dirs(), of.old_stps(), of.ro(), of.al());
}

// What must be the same on all ranks before anything is overwritten.
template <typename Archive>
void expect(Archive& archive, std::int64_t here, const char* what) {
  std::int64_t there = here;
  pass(archive, there);
  if (there == here) return;
  throw std::runtime_error(std::string(what) + ": " + std::to_string(there) + " on the root, " + std::to_string(here) +
                           " here");
}

template <typename State, typename Options, typename Archive>
void visit_all(Archive& archive, optim::Optimizer& optimizer) {
  expect(archive, static_cast<std::int64_t>(optimizer.param_groups().size()), "number of parameter groups");
  for (const optim::OptimizerParamGroup& group : optimizer.param_groups()) {
    expect(archive, static_cast<std::int64_t>(group.params().size()), "number of parameters in a group");
  }
  if constexpr (Archive::kReads) optimizer.state().clear();
  for (optim::OptimizerParamGroup& group : optimizer.param_groups()) {
    visit(archive, static_cast<Options&>(group.options()));
    for (const at::Tensor& parameter : group.params()) {
      const auto found = optimizer.state().find(parameter.unsafeGetTensorImpl());
      bool has_state = found != optimizer.state().end();
      pass(archive, has_state);
      if (!has_state) continue;
      std::unique_ptr<optim::OptimizerParamState>& state = optimizer.state()[parameter.unsafeGetTensorImpl()];
      if (!state) state = std::make_unique<State>();
      visit(archive, static_cast<State&>(*state));
    }
  }
}

template <typename Archive>
void visit_any(Archive& archive, optim::Optimizer& optimizer) {
  std::int64_t number = 0;
  // NOLINTNEXTLINE(readability-redundant-lambda-parameter-list): without it only from C++23 on
  const auto try_one = [&]<typename Known, typename State, typename Options>() {
    ++number;
    if (dynamic_cast<Known*>(&optimizer) == nullptr) return false;
    expect(archive, number, "type of the optimizer, as a number");
    visit_all<State, Options>(archive, optimizer);
    return true;
  };
  const bool known = try_one.template operator()<optim::SGD, optim::SGDParamState, optim::SGDOptions>() ||
                     try_one.template operator()<optim::Adam, optim::AdamParamState, optim::AdamOptions>() ||
                     try_one.template operator()<optim::AdamW, optim::AdamWParamState, optim::AdamWOptions>() ||
                     try_one.template operator()<optim::RMSprop, optim::RMSpropParamState, optim::RMSpropOptions>() ||
                     try_one.template operator()<optim::Adagrad, optim::AdagradParamState, optim::AdagradOptions>() ||
                     try_one.template operator()<optim::LBFGS, optim::LBFGSParamState, optim::LBFGSOptions>();
  if (!known) throw std::runtime_error("the optimizer is none of SGD, Adam, AdamW, RMSprop, Adagrad and LBFGS");
}

at::Device device_of(const optim::Optimizer& optimizer) {
  for (const optim::OptimizerParamGroup& group : optimizer.param_groups()) {
    if (!group.params().empty()) return group.params().front().device();
  }
  return {at::kCPU};
}

constexpr const char* kWhat = "broadcast_optimizer_state";

}  // namespace

void broadcast_optimizer_state(optim::Optimizer& optimizer, int root_rank, ProcessSet process_set, Site site) {
  std::vector<at::Tensor> tensors;
  const std::string description = detail::on_root(kWhat, root_rank, process_set, site, [&] {
    Writer writer;
    visit_any(writer, optimizer);
    tensors = writer.tensors_;
    return writer.bytes_;
  });
  std::string failure;
  if (hvd::rank(site) != root_rank) {
    Reader reader(description, device_of(optimizer));
    try {
      visit_any(reader, optimizer);
    } catch (const std::runtime_error& error) {
      failure = error.what();
    }
    tensors = reader.tensors_;
  }
  // The tensors travel only if all ranks take them.
  const ReduceOptions all{.op = ReduceOp::kMin, .process_set = process_set, .name = kWhat};
  if (!hvd::allreduce(failure.empty(), all, site)) {
    if (failure.empty()) failure = "the optimizer of another rank does not fit to that of the root";
    hvd::detail::raise(StatusCode::kInvalidArgument, kWhat, failure, site);
  }
  NamedTensors named;
  for (const at::Tensor& tensor : tensors) {
    std::string name = kWhat;
    name += "." + std::to_string(named.size());
    named.emplace_back(std::move(name), tensor);
  }
  broadcast_tensors(named, root_rank, process_set, site);
}

}  // namespace hvd::torch
