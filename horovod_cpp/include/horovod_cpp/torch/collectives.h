// Collectives on at::Tensor, with their gradients; <horovod_cpp/torch.h> has them, too. Link HorovodCpp::torch.
//
// Shapes are those of the tensors; data types: uint8, int8, int16, int32, int64, float16, bfloat16, float32, float64,
// bool, and complex64 and complex128, which can be summed and averaged only. Memory is dense on the CPU or a CUDA
// device; what is not contiguous is copied. Errors are those of <horovod_cpp/collectives.h>. A function may be called
// by any thread and blocks, unless it says otherwise.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <source_location>
#include <span>
#include <utility>
#include <vector>

#include <horovod_cpp/collectives.h>

namespace hvd::torch {

using Site = std::source_location;

namespace detail {

struct SparseReduction;

/// Where one tensor of an operation is read and written.
struct Place {
  at::Tensor source;    ///< what the library reads
  at::Tensor target;    ///< what it writes; undefined: it makes the output
  at::Tensor in_place;  ///< the caller's tensor that is the result; undefined: the result is a new one
};

}  // namespace detail

/// An operation on tensors in flight. Move-only; any thread, one at a time. The library keeps the tensors, so a handle
/// may be dropped; the operation goes on then.
class [[nodiscard]] Handle {
 public:
  Handle() = default;
  Handle(hvd::detail::Operation operation, detail::Place place)
      : operation_(std::make_shared<hvd::detail::Operation>(std::move(operation))), place_(std::move(place)) {}

  bool valid() const { return operation_ != nullptr; }
  /// Whether wait() would not block.
  bool done(Site site = Site::current()) const;
  /// Blocks until the operation is done (on CUDA: in line on the device) and gives its result, once: the tensor itself
  /// for an in-place operation, a new one otherwise. On CUDA record_stream() does nothing for a result that the library
  /// makes (allgather, reducescatter, alltoall): read on another stream than the current one, it has to be kept until
  /// that has waited for the reader.
  at::Tensor wait(Site site = Site::current());
  /// After wait(), of an alltoall: rows that came from each rank of the set.
  const std::vector<std::int64_t>& received_splits() const { return received_splits_; }

 private:
  std::shared_ptr<hvd::detail::Operation> operation_;  // shared with the tensor, where the library made the output
  detail::Place place_;
  std::vector<std::int64_t> received_splits_;
};

/// Reduces `tensor` over all ranks of the set into a new tensor; with `_` in place. `_async` ones do not block;
/// `tensor` stays untouched until they are done. No gradient flows through.
at::Tensor allreduce(const at::Tensor& tensor, const ReduceOptions& options = {}, Site site = Site::current());
at::Tensor allreduce_(const at::Tensor& tensor, const ReduceOptions& options = {}, Site site = Site::current());
Handle allreduce_async(const at::Tensor& tensor, const ReduceOptions& options = {}, Site site = Site::current());
Handle allreduce_async_(const at::Tensor& tensor, const ReduceOptions& options = {}, Site site = Site::current());

/// Concatenates along dimension 0: (n_i, d1, ...) of each rank to (sum of n_i, d1, ...), in the order of ranks.
/// Gradient: this rank's rows of the *average* of all gradients.
at::Tensor allgather(const at::Tensor& tensor, const CollectiveOptions& options = {}, Site site = Site::current());
Handle allgather_async(const at::Tensor& tensor, const CollectiveOptions& options = {}, Site site = Site::current());

/// The tensor of the *global* rank `root_rank`, as a new one; with `_` it overwrites `tensor`. Gradient: the
/// average of all gradients on the root, zeros elsewhere.
at::Tensor broadcast(const at::Tensor& tensor, int root_rank, const CollectiveOptions& options = {},
                     Site site = Site::current());
at::Tensor broadcast_(const at::Tensor& tensor, int root_rank, const CollectiveOptions& options = {},
                      Site site = Site::current());
Handle broadcast_async(const at::Tensor& tensor, int root_rank, const CollectiveOptions& options = {},
                       Site site = Site::current());
Handle broadcast_async_(const at::Tensor& tensor, int root_rank, const CollectiveOptions& options = {},
                        Site site = Site::current());

/// Reduces, and gives each rank its rows: n / ranks of n, the first n % ranks ranks one more. Gradient: those of all
/// ranks, one behind the other; of a sum, times the number of ranks.
at::Tensor reducescatter(const at::Tensor& tensor, const ReduceOptions& options = {}, Site site = Site::current());
Handle reducescatter_async(const at::Tensor& tensor, const ReduceOptions& options = {}, Site site = Site::current());

/// Sends `splits[i]` rows to rank i of the set; equal shares where there are no splits. What comes is concatenated in
/// the order of ranks.
at::Tensor alltoall(const at::Tensor& tensor, std::span<const std::int64_t> splits = {},
                    const CollectiveOptions& options = {}, Site site = Site::current());
Handle alltoall_async(const at::Tensor& tensor, std::span<const std::int64_t> splits = {},
                      const CollectiveOptions& options = {}, Site site = Site::current());

// ---- grouped --------------------------------------------------------------------------------------------------------

/// Several tensors that are one operation in flight. As Handle.
class [[nodiscard]] GroupHandle {
 public:
  GroupHandle() = default;
  GroupHandle(hvd::detail::Operation operation, std::vector<detail::Place> places)
      : operation_(std::make_shared<hvd::detail::Operation>(std::move(operation))), places_(std::move(places)) {}

  bool valid() const { return operation_ != nullptr; }
  /// Whether wait() would not block.
  bool done(Site site = Site::current()) const;
  /// Blocks until the operation is done and gives its results, in the order of the tensors, once. On CUDA as
  /// Handle::wait().
  std::vector<at::Tensor> wait(Site site = Site::current());

 private:
  std::shared_ptr<hvd::detail::Operation> operation_;
  std::vector<detail::Place> places_;
};

/// The operations above on several tensors at once: one name, agreed and done for all of them or for none. The tensors
/// lie on one device, and may differ in shape and type; all ranks give as many, in the same order. Gradients flow as
/// through the forms for one tensor, in one operation as well.
std::vector<at::Tensor> grouped_allreduce(at::TensorList tensors, const ReduceOptions& options = {},
                                          Site site = Site::current());
std::vector<at::Tensor> grouped_allreduce_(at::TensorList tensors, const ReduceOptions& options = {},
                                           Site site = Site::current());
GroupHandle grouped_allreduce_async(at::TensorList tensors, const ReduceOptions& options = {},
                                    Site site = Site::current());
GroupHandle grouped_allreduce_async_(at::TensorList tensors, const ReduceOptions& options = {},
                                     Site site = Site::current());
std::vector<at::Tensor> grouped_allgather(at::TensorList tensors, const CollectiveOptions& options = {},
                                          Site site = Site::current());
GroupHandle grouped_allgather_async(at::TensorList tensors, const CollectiveOptions& options = {},
                                    Site site = Site::current());
std::vector<at::Tensor> grouped_reducescatter(at::TensorList tensors, const ReduceOptions& options = {},
                                              Site site = Site::current());
GroupHandle grouped_reducescatter_async(at::TensorList tensors, const ReduceOptions& options = {},
                                        Site site = Site::current());

// ---- sparse ---------------------------------------------------------------------------------------------------------

/// A reduction of a sparse tensor in flight. As Handle.
class [[nodiscard]] SparseHandle {
 public:
  SparseHandle() = default;
  explicit SparseHandle(detail::SparseReduction reduction);

  bool valid() const { return reduction_ != nullptr; }
  /// Whether wait() would not block.
  bool done(Site site = Site::current()) const;
  /// Blocks until the reduction is done and gives its result, once.
  at::Tensor wait(Site site = Site::current());

 private:
  std::shared_ptr<detail::SparseReduction> reduction_;
};

/// Adds up or averages sparse tensors (COO) of one shape and type, of which each rank has entries of its own: all
/// entries are gathered, as one operation that meets the sparse allreduce of that name of ranks in Python. Gives a COO
/// tensor that is not coalesced; of bools, sum and average are both "or". No gradient flows through. `options` have no
/// factors. All ranks throw InvalidArgument, with the values and who gave them, where they differ in shape, type,
/// number of sparse dimensions or op.
at::Tensor sparse_allreduce(const at::Tensor& tensor, const ReduceOptions& options = {}, Site site = Site::current());
SparseHandle sparse_allreduce_async(const at::Tensor& tensor, const ReduceOptions& options = {},
                                    Site site = Site::current());

}  // namespace hvd::torch
