// Reductions of sparse tensors: their entries are gathered, and entries of one place add up. Any thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <horovod_cpp/collectives.h>
#include <horovod_cpp/torch/collectives.h>

namespace hvd::torch::detail {

/// The two operations of one reduction in flight, and what makes a tensor of their results.
struct SparseReduction {
  std::shared_ptr<hvd::detail::Operation> indices, values;
  Place place_of_indices, place_of_values;
  std::vector<std::int64_t> shape;
  std::int64_t divisor = 1;
  std::string text;  // for messages
  Site site;
};

/// Does not block. Throws InvalidArgument for what is not sparse or cannot be added up.
SparseReduction start_sparse(const at::Tensor& tensor, const ReduceOptions& options, Site site);

/// Blocks. A COO tensor that is not coalesced.
at::Tensor finish_sparse(const SparseReduction& reduction);

/// Without entries; the shape and type of `like`.
at::Tensor sparse_zeros(const at::Tensor& like, std::int64_t sparse_dimensions);

}  // namespace hvd::torch::detail
