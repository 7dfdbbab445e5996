// What DistributedOptions may say, and the groups that a number of groups stands for. Any thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include <horovod_cpp/torch.h>

namespace hvd::torch::detail {

/// Throws InvalidArgument for values out of range and for options that exclude each other.
void check_options(const DistributedOptions& options, Site site);

/// At most `wanted` parts of nearly the same size, in the order of the parameters, of those that require a gradient.
std::vector<std::vector<at::Tensor>> parts_of(std::vector<at::Tensor> parameters, int wanted);

}  // namespace hvd::torch::detail
