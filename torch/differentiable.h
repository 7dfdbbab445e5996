// The blocking collectives as functions that autograd records, with the gradients that the Python package has. Any
// thread.
#pragma once

#include <cstdint>
#include <source_location>
#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

#include <horovod_cpp/collectives.h>

namespace hvd::torch::detail {

/// Whether autograd has to know of an operation on `tensor`.
bool needs_gradient(const at::Tensor& tensor);

at::Tensor differentiable_allreduce(const at::Tensor& tensor, const ReduceOptions& options, std::source_location site);
at::Tensor differentiable_allgather(const at::Tensor& tensor, const CollectiveOptions& options,
                                    std::source_location site);
at::Tensor differentiable_broadcast(const at::Tensor& tensor, int root_rank, const CollectiveOptions& options,
                                    std::source_location site);
at::Tensor differentiable_reducescatter(const at::Tensor& tensor, const ReduceOptions& options,
                                        std::source_location site);
at::Tensor differentiable_alltoall(const at::Tensor& tensor, std::span<const std::int64_t> splits,
                                   const CollectiveOptions& options, std::source_location site);

std::vector<at::Tensor> differentiable_grouped_allreduce(at::TensorList tensors, const ReduceOptions& options,
                                                         std::source_location site);
std::vector<at::Tensor> differentiable_grouped_allgather(at::TensorList tensors, const CollectiveOptions& options,
                                                         std::source_location site);
std::vector<at::Tensor> differentiable_grouped_reducescatter(at::TensorList tensors, const ReduceOptions& options,
                                                             std::source_location site);

}  // namespace hvd::torch::detail
