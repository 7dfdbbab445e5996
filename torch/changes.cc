#include "torch/changes.h"

#include <ATen/core/grad_mode.h>

#include <vector>

namespace hvd::torch::detail {
namespace {

void reduce_changes(const NamedTensors& parameters, const std::vector<at::Tensor>& starts,
                    const DistributedOptions& options, Site site) {
  std::vector<Handle> handles;
  for (const auto& [name, parameter] : parameters) {
    // Memory of its own: what is in flight when an error comes must not reach the parameter.
    const at::Tensor change = parameter.detach().sub(starts[handles.size()]);
    handles.push_back(allreduce_async_(compressed(change, options.compression),
                                       {.op = options.op, .process_set = options.process_set, .name = name}, site));
  }
  std::vector<at::Tensor> changes;
  for (Handle& handle : handles) changes.push_back(handle.wait(site));
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor parameter = parameters[i].second.detach();
    parameter.copy_(starts[i].add(changes[i].to(parameter.scalar_type())));
  }
}

}  // namespace

at::Tensor step_and_reduce(const NamedTensors& parameters, const DistributedOptions& options, Site site,
                           const std::function<at::Tensor()>& local_step) {
  std::vector<at::Tensor> starts;
  starts.reserve(parameters.size());
  for (const auto& [name, parameter] : parameters) starts.push_back(parameter.detach().clone());
  at::Tensor loss = local_step();
  const at::NoGradGuard no_grad;
  try {
    reduce_changes(parameters, starts, options, site);
  } catch (...) {
    for (std::size_t i = 0; i < parameters.size(); ++i) parameters[i].second.detach().copy_(starts[i]);
    throw;
  }
  return loss;
}

at::Tensor compressed(const at::Tensor& tensor, Compression compression) {
  if (compression == Compression::kNone || !tensor.is_floating_point()) return tensor;
  return tensor.to(compression == Compression::kFp16 ? at::kHalf : at::kBFloat16);
}

}  // namespace hvd::torch::detail
