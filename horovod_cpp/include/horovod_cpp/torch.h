// LibTorch programs: collectives on at::Tensor, and what makes a training program one that runs on many ranks.
// Link HorovodCpp::torch (docs/cpp.md). Without <torch/torch.h>, which takes 20 s to compile. A function may be called
// by any thread and blocks, unless it says otherwise.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/optim/optimizer.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <horovod_cpp/collectives.h>
#include <horovod_cpp/hvd.h>
#include <horovod_cpp/torch/collectives.h>

namespace torch {
// Of <torch/serialize.h>, which a program that saves has included.
template <typename Value, typename... To>
void save(const Value& value, To&&... to);
template <typename Value, typename... From>
void load(Value& value, From&&... from);
}  // namespace torch

namespace hvd::torch {

// ---- a training program ---------------------------------------------------------------------------------------------

/// Where this rank computes: CUDA device number local_rank() where the machine has so many, otherwise the CPU.
at::Device device();

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// Overwrites the tensors of all ranks of the set with the root's; the same names and shapes on all ranks.
void broadcast_tensors(const NamedTensors& tensors, int root_rank, ProcessSet process_set = {},
                       Site site = Site::current());

namespace detail {

/// Of what torch gives as named_parameters(), or pairs.
template <typename Named>
NamedTensors named_tensors(const Named& named) {
  NamedTensors tensors;
  for (const auto& item : named) {
    if constexpr (requires { item.key(); }) {
      tensors.emplace_back(item.key(), item.value());
    } else {
      tensors.emplace_back(item.first, item.second);
    }
  }
  return tensors;
}
template <typename Named>
std::vector<at::Tensor> tensors_of(const Named& named) {
  std::vector<at::Tensor> tensors;
  for (auto& [name, tensor] : named_tensors(named)) tensors.push_back(tensor);
  return tensors;
}
/// A module, also where `module` is torch's holder of one.
template <typename Module>
auto& module_of(Module& module) {
  if constexpr (requires { module.named_parameters(); }) {
    return module;
  } else {
    return *module;
  }
}

/// Does `act` on the root and tells the others how it went: what it returns, or its failure, which all throw.
std::string on_root(const char* what, int root_rank, ProcessSet process_set, Site site,
                    const std::function<std::string()>& act);
std::string read_file(const std::string& path);
void write_file(const std::string& path, const std::string& content);

}  // namespace detail

/// Parameters of a module (or a holder of one): all ranks get the root's.
template <typename Module>
void broadcast_parameters(const Module& module, int root_rank, ProcessSet process_set = {},
                          Site site = Site::current()) {
  broadcast_tensors(detail::named_tensors(detail::module_of(module).named_parameters()), root_rank, process_set, site);
}
/// The same for its buffers, such as the statistics of batch normalisation.
template <typename Module>
void broadcast_buffers(const Module& module, int root_rank, ProcessSet process_set = {}, Site site = Site::current()) {
  broadcast_tensors(detail::named_tensors(detail::module_of(module).named_buffers()), root_rank, process_set, site);
}

/// Overwrites state and options of the optimizers of all ranks of the set with the root's. They are of the same type
/// (SGD, Adam, AdamW, RMSprop, Adagrad or LBFGS, or a DistributedOptimizer of these) and have the same parameters in
/// the same groups. State that a rank does not have yet is made, and none stays that the root does not have. Tensors
/// come to the device of the first parameter. Throws InvalidArgument where the optimizers do not fit.
void broadcast_optimizer_state(::torch::optim::Optimizer& optimizer, int root_rank, ProcessSet process_set = {},
                               Site site = Site::current());

/// This rank's part of a data set of that many examples, in an order of that epoch; `Sampler` is torch's
/// DistributedRandomSampler or DistributedSequentialSampler. `allow_duplicates`: ranks whose part is smaller get some
/// examples of others; otherwise a few examples are left out. All ranks have as many. Does not block.
template <typename Sampler>
Sampler sharded_sampler(std::size_t dataset_size, std::size_t epoch = 0, bool allow_duplicates = true,
                        Site site = Site::current()) {
  Sampler sampler(dataset_size, static_cast<std::size_t>(hvd::size(site)), static_cast<std::size_t>(hvd::rank(site)),
                  allow_duplicates);
  sampler.set_epoch(epoch);
  sampler.reset();  // takes up the epoch
  return sampler;
}

/// Does torch::save on the root alone; returns on all ranks when the file is there, and throws on all if it is not.
template <typename Value>
void save_on_root(const Value& value, const std::string& path, int root_rank = 0, Site site = Site::current()) {
  detail::on_root("save_on_root", root_rank, {}, site, [&] {
    std::ostringstream stream;
    ::torch::save(value, stream);
    detail::write_file(path, stream.str());
    return std::string();
  });
}
/// Does torch::load on all ranks, with what the root reads: the others need not see the file.
template <typename Value>
void load_from_root(Value& value, const std::string& path, int root_rank = 0, Site site = Site::current()) {
  std::istringstream stream(
      detail::on_root("load_from_root", root_rank, {}, site, [&] { return detail::read_file(path); }));
  ::torch::load(value, stream);
}

/// A mean over the examples of all ranks.
class MeanMetric {
 public:
  /// `value` is the mean of `count` examples. Does not block.
  void add(double value, double count = 1) {
    sum_ += value * count;
    count_ += count;
  }
  /// Of what all ranks have added so far; NaN if nothing. Every rank of the set calls.
  double mean(ProcessSet process_set = {}, Site site = Site::current()) const {
    double both[] = {sum_, count_};
    hvd::allreduce(both, {.op = ReduceOp::kSum, .process_set = process_set}, site);
    return both[0] / both[1];
  }

 private:
  double sum_ = 0;
  double count_ = 0;
};

// ---- the optimizer --------------------------------------------------------------------------------------------------

/// What travels in place of float32 and float64 gradients.
enum class Compression : std::uint8_t { kNone, kFp16, kBf16 };

struct DistributedOptions {
  /// Of the gradients. kAdasum: each rank does its own step, and what it changed in the parameters is reduced, which
  /// blocks in step(); learning rates need not grow with the ranks. It takes no groups.
  ReduceOp op = ReduceOp::kAverage;
  Compression compression = Compression::kNone;
  int backward_passes_per_step = 1;        ///< so many are summed up locally before their sum is reduced
  double gradient_predivide_factor = 1.0;  ///< divides before and multiplies after an average
  /// Above 0: the parameters that require a gradient are reduced in so many groups, in their order, each as one
  /// operation.
  int group_count = 0;
  std::vector<std::vector<at::Tensor>> groups{};  ///< or in these; what is in none of them is reduced by itself
  /// Sparse gradients are made dense before they are reduced, as they always are in a group. Otherwise their entries
  /// are gathered, whose number grows with the ranks; they can be averaged or summed only, and are not compressed. A
  /// rank that has had no gradient of such a parameter yet cannot know that it is sparse, and the ranks do not meet
  /// (the stall report names both): there, have them dense.
  bool sparse_as_dense = false;
  ProcessSet process_set{};  ///< a rank outside steps with its own gradients
  /// Gradients are views of buckets, each of which is one flat tensor that is reduced in place as one operation:
  /// nothing is packed or copied back. What backward makes is copied to its view at once; a gradient that is the view
  /// already (zero_grad(false), later passes) is not. Buckets are cut from the parameters' end, where backward begins,
  /// by the figures of <horovod_cpp/buckets.h>, or are the groups, in parts of one type; what is in none of these is by
  /// itself. Sparse gradients need sparse_as_dense, or a group: InvalidArgument from backward names others. All ranks
  /// have the same setting, in C++ and in Python; not with kAdasum. The model keeps its device and type from here on,
  /// its parameters have the same order of memory on all ranks, and a gradient that is kept beyond zero_grad() is
  /// cloned: its memory is used again. It pays where gradients are many and small.
  bool gradient_as_bucket_view = false;
};

namespace detail {

class Question;

/// Reduces gradients: in hooks, as backward makes them, one by one, in groups or in buckets. The hooks run on the
/// threads of backward passes; all else on the thread that calls the optimizer. Does nothing in a set of one rank.
class GradientReduction {
 public:
  GradientReduction(const NamedTensors& named, const std::vector<at::Tensor>& parameters,
                    const DistributedOptions& options, Site site);

  /// Reduces this parameter from now on, or from when it requires a gradient.
  void add(const std::string& name, const at::Tensor& parameter);
  /// Makes buckets of what has been added, where gradients are views of such.
  void arrange_added();
  /// Starts what no backward pass has started, with zeros for missing gradients, and waits for all. Takes up what
  /// requires a gradient by now, and leaves alone what is frozen and has none on all ranks.
  void synchronize();
  /// Forgets what is in flight; it goes on without us.
  void reset();
  /// Whether it is the changes of a step that are reduced (Adasum), in place of gradients.
  bool is_of_changes() const;
  /// Does the optimizer's own step and reduces what that changed. Where the reduction throws, the parameters are as
  /// they were before.
  at::Tensor step_and_reduce(const std::function<at::Tensor()>& local_step);
  /// Whether a backward pass came since the last synchronize.
  bool in_progress() const;
  at::Tensor reduce_loss(const at::Tensor& loss) const;
  [[noreturn]] void refuse(const char* operation, const char* text) const;

 private:
  struct State;
  void add_unfrozen();
  std::vector<Question> finish_in_flight();
  std::shared_ptr<State> state_;
};

}  // namespace detail

/// `Inner`, one of torch's optimizers, that reduces the gradients of all ranks before each step. It is an
/// optimizer in every place that takes one: learning-rate schedulers change its rate, torch::save and torch::load work,
/// with files of Inner as well.
///
/// Reductions start in hooks while backward runs, so that they overlap with it; step() waits for them. A parameter that
/// took no part in a backward pass counts with zeros. One that is frozen when the optimizer is made is reduced from the
/// step on for which it requires a gradient; all ranks unfreeze alike. One that is frozen later, and has no gradient,
/// is left as it is once that is so on all ranks, and costs nothing from then on. As long as others have a gradient of
/// it, zeros stand for the missing one, and all ranks step with the result. Threads: several may run backward; all else
/// is for one at a time.
template <typename Inner>
class DistributedOptimizer : public Inner {
 public:
  using LossClosure = ::torch::optim::Optimizer::LossClosure;

  /// `named`: model->named_parameters(); the names are keys of the reductions, the same on all ranks.
  /// Throws InvalidArgument for bad options or names.
  template <typename Named, typename InnerOptions>
  DistributedOptimizer(const Named& named, InnerOptions inner_options, const DistributedOptions& options = {},
                       Site site = Site::current())
      : Inner(detail::tensors_of(named), std::move(inner_options)), reduction_(made(named, options, site)) {}
  /// From an optimizer that is ready, with its groups and state; every parameter has its name in `named`.
  template <typename Named>
  DistributedOptimizer(Inner&& ready, const Named& named, const DistributedOptions& options = {},
                       Site site = Site::current())
      : Inner(std::move(ready)), reduction_(made(named, options, site)) {}

  /// Waits for the reduced gradients, then steps. With a closure that is done after each of its calls; its loss is
  /// reduced as the gradients are, so that optimizers that decide by it (LBFGS) decide alike on all ranks.
  at::Tensor step(LossClosure closure = nullptr) override {
    if (reduction_.is_of_changes()) {
      return reduction_.step_and_reduce([&] { return Inner::step(std::move(closure)); });
    }
    if (skips_ > 0) return Inner::step(std::move(closure));
    if (!closure) {
      synchronize();
      return Inner::step(nullptr);
    }
    return Inner::step([this, &closure] {
      const at::Tensor loss = closure();
      synchronize();
      return reduction_.reduce_loss(loss);
    });
  }

  /// Waits for the reduced gradients; for what is done with them before the step, such as clipping. Nothing with
  /// Adasum, which has no gradients in flight.
  void synchronize() { reduction_.synchronize(); }

  /// While it lives, step() does not synchronize: synchronize(), clip, then step() under this guard. PreconditionError
  /// with Adasum: what it reduces does not exist before the step.
  class [[nodiscard]] SkipSynchronize {
   public:
    explicit SkipSynchronize(int& skips) : skips_(skips) { ++skips_; }
    ~SkipSynchronize() { --skips_; }
    SkipSynchronize(const SkipSynchronize&) = delete;
    SkipSynchronize& operator=(const SkipSynchronize&) = delete;

   private:
    int& skips_;
  };
  SkipSynchronize skip_synchronize() {
    if (reduction_.is_of_changes()) {
      reduction_.refuse("skip_synchronize", "with Adasum step() reduces what it has changed itself");
    }
    return SkipSynchronize(skips_);
  }

  /// PreconditionError while gradients are being reduced, which it would pull away.
  void zero_grad(bool set_to_none = true) {
    if (reduction_.in_progress()) {
      reduction_.refuse("zero_grad",
                        "gradients are being reduced; call step() or synchronize() after backward() first");
    }
    Inner::zero_grad(set_to_none);
  }

  /// Its parameters are reduced, too, under names made from their position.
  void add_param_group(const ::torch::optim::OptimizerParamGroup& group) {
    Inner::add_param_group(group);
    const std::string prefix = "allreduce.noname." + std::to_string(this->param_groups().size() - 1) + ".";
    std::size_t place = 0;
    for (const at::Tensor& parameter : group.params()) reduction_.add(prefix + std::to_string(place++), parameter);
    reduction_.arrange_added();
  }

  void load(::torch::serialize::InputArchive& archive) override {
    reduction_.reset();
    Inner::load(archive);
  }

 private:
  template <typename Named>
  detail::GradientReduction made(const Named& named, const DistributedOptions& options, Site site) {
    std::vector<at::Tensor> parameters;
    for (const ::torch::optim::OptimizerParamGroup& group : this->param_groups()) {
      parameters.insert(parameters.end(), group.params().begin(), group.params().end());
    }
    return {detail::named_tensors(named), parameters, options, site};
  }

  detail::GradientReduction reduction_;
  int skips_ = 0;
};

}  // namespace hvd::torch
