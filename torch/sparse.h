// Reductions of sparse tensors: their entries are gathered, and entries of one place add up. Any thread.
//
// What travels is one group of three flat tensors, the same that ranks in Python send (horovod_cpp/torch/sparse.py):
// what ranks have to bring alike, the indices, and the bytes of the values. So the library finds nothing to compare,
// and the ranks compare what their users gave.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <horovod_cpp/collectives.h>
#include <horovod_cpp/torch/collectives.h>

namespace hvd::torch::detail {

/// One reduction in flight, and what makes a tensor of its results.
struct SparseReduction {
  std::shared_ptr<hvd::detail::Operation> operation;
  std::vector<Place> places;  ///< of the attributes, the indices and the values
  at::ScalarType type = at::kFloat;
  std::vector<std::int64_t> shape;
  std::int64_t sparse_dimensions = 0;
  std::vector<int> ranks;  ///< of the process set
  std::int64_t divisor = 1;
  std::string text;  ///< for messages
  Site site;
};

/// Does not block. Throws InvalidArgument for what is not sparse or cannot be added up.
SparseReduction start_sparse(const at::Tensor& tensor, const ReduceOptions& options, Site site);

/// Blocks. A COO tensor that is not coalesced. Throws InvalidArgument, on all ranks, where they disagree.
at::Tensor finish_sparse(const SparseReduction& reduction);

/// Without entries; the shape and type of `like`.
at::Tensor sparse_zeros(const at::Tensor& like, std::int64_t sparse_dimensions);

}  // namespace hvd::torch::detail
