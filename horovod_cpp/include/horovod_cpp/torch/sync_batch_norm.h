// Batch normalisation over the batches of all ranks, for LibTorch programs; link HorovodCpp::torch.
// In a header of its own: torch's modules take 13 s more to compile than <horovod_cpp/torch.h>. A program that has
// modules, or <torch/torch.h>, has paid for them already.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/options/batchnorm.h>
#include <torch/nn/pimpl.h>

#include <cstddef>
#include <memory>
#include <ostream>
#include <source_location>
#include <utility>

#include <horovod_cpp/process_set.h>

namespace hvd::torch {

/// Normalises with mean and variance of the batches of all ranks while it trains; in evaluation as torch's BatchNorm
/// does, with which it shares options and the names of parameters and buffers: one loads what the other has saved.
///
/// Input of shape (N, C, ...); N may differ between ranks, and be 0. All ranks run their layers in the same order, in
/// one thread of each process. One packed collective in forward and one in backward; both block. Gradients of weight
/// and bias are those of this rank's batch; DistributedOptimizer reduces them. Second derivatives are refused.
class SyncBatchNormImpl : public ::torch::nn::Cloneable<SyncBatchNormImpl> {
 public:
  /// What a batch normalisation learns and remembers.
  struct Tensors {
    at::Tensor weight, bias, running_mean, running_var, num_batches_tracked;
  };

  /// `process_set`: the ranks whose batches count as one. Does not communicate.
  explicit SyncBatchNormImpl(::torch::nn::BatchNormOptions layer_options, ProcessSet process_set = {},
                             std::source_location site = std::source_location::current());
  /// Made of tensors that are there: they stay the parameters and buffers that others know.
  SyncBatchNormImpl(::torch::nn::BatchNormOptions layer_options, const Tensors& tensors, ProcessSet process_set,
                    std::source_location site);

  /// Gives a tensor of the shape and type of `input`. Throws InvalidArgument for input of less than two dimensions or
  /// of numbers that are not real, and, on all ranks, where they differ in C, C is not num_features, or a batch has one
  /// value a channel in all.
  at::Tensor forward(const at::Tensor& input);

  void reset() override;
  void reset_parameters();
  void reset_running_stats();
  void pretty_print(std::ostream& stream) const override;

  ::torch::nn::BatchNormOptions options;
  /// Undefined where `options` says that there are none.
  at::Tensor weight, bias, running_mean, running_var, num_batches_tracked;

 private:
  void update_running_stats(const at::Tensor& mean, const at::Tensor& unbiased_variance);

  ProcessSet process_set_;
  std::source_location site_;
};

/// SyncBatchNormImpl, as torch holds its modules: `hvd::torch::SyncBatchNorm(64)`, also in a Sequential.
class SyncBatchNorm : public ::torch::nn::ModuleHolder<SyncBatchNormImpl> {
 public:
  using Impl = SyncBatchNormImpl;

  explicit SyncBatchNorm(::torch::nn::BatchNormOptions options, ProcessSet process_set = {},
                         std::source_location site = std::source_location::current())
      : ModuleHolder(std::make_shared<SyncBatchNormImpl>(options, process_set, site)) {}
  explicit SyncBatchNorm(std::shared_ptr<SyncBatchNormImpl> module) : ModuleHolder(std::move(module)) {}
  SyncBatchNorm(std::nullptr_t) : ModuleHolder(nullptr) {}  // NOLINT(google-explicit-constructor): as torch's are
};

/// Puts a SyncBatchNorm in the place of each BatchNorm1d, 2d and 3d that a Sequential has in it, at any depth of
/// `module`, with the same options, parameters and buffers: an optimizer that has them keeps them. Returns how many.
/// Does not communicate.
///
/// A member of C++ is called by its type, so a module that has a `torch::nn::BatchNorm2d` cannot be given another one:
/// declare the member as SyncBatchNorm there. Where `module` has such, or is one, InvalidArgument names it and nothing
/// is changed.
std::size_t convert_sync_batchnorm(::torch::nn::Module& module, ProcessSet process_set = {},
                                   std::source_location site = std::source_location::current());

template <typename Contained>
std::size_t convert_sync_batchnorm(const ::torch::nn::ModuleHolder<Contained>& holder, ProcessSet process_set = {},
                                   std::source_location site = std::source_location::current()) {
  return convert_sync_batchnorm(*holder.ptr(), process_set, site);
}

}  // namespace hvd::torch
