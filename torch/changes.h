// What DistributedOptimizer does with ReduceOp::kAdasum: each rank steps by itself, and the changes of the parameters
// are reduced. One thread.
#pragma once

#include <functional>

#include <horovod_cpp/torch.h>

namespace hvd::torch::detail {

/// Does `local_step`, and replaces the change of each parameter by the reduction of all ranks' changes. Blocks. Where
/// the reduction throws, the parameters are as they were before.
at::Tensor step_and_reduce(const NamedTensors& parameters, const DistributedOptions& options, Site site,
                           const std::function<at::Tensor()>& local_step);

/// What travels in place of `tensor`.
at::Tensor compressed(const at::Tensor& tensor, Compression compression);

}  // namespace hvd::torch::detail
