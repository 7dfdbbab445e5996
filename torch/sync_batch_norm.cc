// The module SyncBatchNorm, and how it comes into a network that is there.
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include <horovod_cpp/error.h>
#include <horovod_cpp/torch/sync_batch_norm.h>

#include "torch/normalize.h"

namespace hvd::torch {
namespace {

namespace nn = ::torch::nn;

constexpr const char* kWeight = "weight";
constexpr const char* kBias = "bias";
constexpr const char* kRunningMean = "running_mean";
constexpr const char* kRunningVar = "running_var";
constexpr const char* kNumBatchesTracked = "num_batches_tracked";

template <typename Layer>
std::shared_ptr<SyncBatchNormImpl> replacement(const Layer& layer, ProcessSet process_set,
                                               const std::source_location& site) {
  const SyncBatchNormImpl::Tensors tensors{layer.weight, layer.bias, layer.running_mean, layer.running_var,
                                           layer.num_batches_tracked};
  auto made = std::make_shared<SyncBatchNormImpl>(layer.options, tensors, process_set, site);
  made->train(layer.is_training());
  return made;
}

// Null for what is no batch normalisation.
std::shared_ptr<SyncBatchNormImpl> replacement(const nn::Module& module, ProcessSet process_set,
                                               const std::source_location& site) {
  if (const auto* layer = module.as<nn::BatchNorm1d>()) return replacement(*layer, process_set, site);
  if (const auto* layer = module.as<nn::BatchNorm2d>()) return replacement(*layer, process_set, site);
  if (const auto* layer = module.as<nn::BatchNorm3d>()) return replacement(*layer, process_set, site);
  return nullptr;
}

// Finds all before it changes one, so that a refusal leaves the network as it was.
class Converter {
 public:
  Converter(ProcessSet process_set, const std::source_location& site) : process_set_(process_set), site_(site) {}

  void find(nn::Module& module, const std::string& path) {
    if (replacement(module, process_set_, site_)) refuse(path);
    auto* const sequential = module.as<nn::SequentialImpl>();
    for (const auto& child : module.named_children()) {
      if (sequential != nullptr && note(*child.value())) {
        places_.push_back({sequential, child.key(), child.value()});
      } else {
        find(*child.value(), path.empty() ? child.key() : path + "." + child.key());
      }
    }
  }

  std::size_t exchange() {
    for (const auto& [sequential, name, layer] : places_) {
      const std::shared_ptr<SyncBatchNormImpl>& by = made_.at(layer.get());
      for (nn::AnyModule& any : *sequential) {
        if (any.ptr() == layer) any = nn::AnyModule(by);
      }
      sequential->replace_module(name, by);
    }
    return made_.size();
  }

 private:
  struct Place {
    nn::SequentialImpl* sequential;
    std::string name;
    std::shared_ptr<nn::Module> layer;
  };

  // Whether it is to be replaced: by one, also where it is in several places.
  bool note(const nn::Module& module) {
    if (made_.contains(&module)) return true;
    auto by = replacement(module, process_set_, site_);
    if (!by) return false;
    made_.emplace(&module, std::move(by));
    return true;
  }
  [[noreturn]] void refuse(const std::string& path) const {
    const std::string which = path.empty() ? "the module itself" : "'" + path + "'";
    hvd::detail::raise(StatusCode::kInvalidArgument, "convert_sync_batchnorm",
                       which +
                           " is a batch normalisation outside of a Sequential, which is called by its type; "
                           "declare it as hvd::torch::SyncBatchNorm",
                       site_);
  }

  ProcessSet process_set_;
  std::source_location site_;
  std::map<const nn::Module*, std::shared_ptr<SyncBatchNormImpl>> made_;
  std::vector<Place> places_;
};

}  // namespace

SyncBatchNormImpl::SyncBatchNormImpl(nn::BatchNormOptions layer_options, ProcessSet process_set,
                                     std::source_location site)
    : options(layer_options), process_set_(process_set), site_(site) {
  SyncBatchNormImpl::reset();
}

SyncBatchNormImpl::SyncBatchNormImpl(nn::BatchNormOptions layer_options, const Tensors& tensors, ProcessSet process_set,
                                     std::source_location site)
    : options(layer_options), process_set_(process_set), site_(site) {
  const auto trains = [](const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); };
  weight = register_parameter(kWeight, tensors.weight, trains(tensors.weight));
  bias = register_parameter(kBias, tensors.bias, trains(tensors.bias));
  running_mean = register_buffer(kRunningMean, tensors.running_mean);
  running_var = register_buffer(kRunningVar, tensors.running_var);
  num_batches_tracked = register_buffer(kNumBatchesTracked, tensors.num_batches_tracked);
}

void SyncBatchNormImpl::reset() {
  const bool affine = options.affine();
  const auto made = [&](bool wanted) { return wanted ? at::empty({options.num_features()}) : at::Tensor(); };
  weight = register_parameter(kWeight, made(affine), affine);
  bias = register_parameter(kBias, made(affine), affine);
  const bool tracks = options.track_running_stats();
  running_mean = register_buffer(kRunningMean, made(tracks));
  running_var = register_buffer(kRunningVar, made(tracks));
  num_batches_tracked = register_buffer(kNumBatchesTracked, tracks ? at::zeros({}, at::kLong) : at::Tensor());
  reset_parameters();
}

void SyncBatchNormImpl::reset_running_stats() {
  if (!running_mean.defined()) return;
  running_mean.zero_();
  running_var.fill_(1);
  num_batches_tracked.zero_();
}

void SyncBatchNormImpl::reset_parameters() {
  reset_running_stats();
  if (!weight.defined()) return;
  const at::NoGradGuard no_grad;
  weight.fill_(1);
  bias.zero_();
}

at::Tensor SyncBatchNormImpl::forward(const at::Tensor& input) {
  if (!input.defined() || input.dim() < 2) {
    detail::refuse_batch("at least 2 dimensions are needed; the input is " + input.toString() + " of " +
                             (input.defined() ? std::to_string(input.dim()) : "no"),
                         site_);
  }
  if (!input.is_floating_point()) detail::refuse_batch("the input is " + input.toString() + ", no real numbers", site_);
  if (!is_training() && running_mean.defined()) {
    return at::batch_norm(input, weight, bias, running_mean, running_var, /*training=*/false, /*momentum=*/0.0,
                          options.eps(), at::globalContext().userEnabledCuDNN());
  }
  detail::ChannelStatistics found;
  at::Tensor output =
      detail::normalize(input, weight, bias, {options.num_features(), options.eps(), process_set_, site_}, found);
  if (is_training() && running_mean.defined()) {
    update_running_stats(found.mean, found.variance * (found.count / (found.count - 1)));
  }
  return output;
}

void SyncBatchNormImpl::update_running_stats(const at::Tensor& mean, const at::Tensor& unbiased_variance) {
  const at::NoGradGuard no_grad;
  num_batches_tracked.add_(1);
  for (const auto& [running, found] : {std::pair(running_mean, mean), std::pair(running_var, unbiased_variance)}) {
    const at::Tensor end = found.to(running.scalar_type());
    if (options.momentum()) {
      running.lerp_(end, *options.momentum());
    } else {
      running.lerp_(end, num_batches_tracked.to(at::kDouble).reciprocal().to(running.scalar_type()));
    }
  }
}

void SyncBatchNormImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "hvd::torch::SyncBatchNorm(" << options.num_features() << ", eps=" << options.eps()
         << ", momentum=";
  if (options.momentum()) {
    stream << *options.momentum();
  } else {
    stream << "none";
  }
  stream << ", affine=" << options.affine() << ", track_running_stats=" << options.track_running_stats() << ")";
}

std::size_t convert_sync_batchnorm(nn::Module& module, ProcessSet process_set, std::source_location site) {
  Converter converter(process_set, site);
  converter.find(module, "");
  return converter.exchange();
}

}  // namespace hvd::torch
