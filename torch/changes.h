// What DistributedOptimizer does with ReduceOp::kAdasum: each rank steps by itself, and the changes of the parameters
// are reduced. One thread.
#pragma once

#include <horovod_cpp/torch.h>

namespace hvd::torch::detail {

/// What travels in place of `tensor`.
at::Tensor compressed(const at::Tensor& tensor, Compression compression);

}  // namespace hvd::torch::detail
