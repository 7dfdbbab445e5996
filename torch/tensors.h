// Hands tensors to the C ABI: address, shape, data type and place go in, an operation comes out.
// The only file that knows how a tensor lies in memory. Any thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <source_location>
#include <span>
#include <string>
#include <vector>

#include <horovod_cpp/collectives.h>
#include <horovod_cpp/handle.h>
#include <horovod_cpp/torch/collectives.h>

namespace hvd::torch::detail {

/// What all operations on tensors have.
struct Submission {
  hvd_op op;
  const char* kind;  ///< for messages
  const std::string& name;
  ProcessSet process_set;
  bool caller_waits = false;
  ReduceOp reduce_op = ReduceOp::kSum;
  double prescale = 1.0;
  double postscale = 1.0;
  int root_rank = 0;
  std::span<const std::int64_t> splits{};
  bool group = false;  ///< one operation with several tensors
  std::source_location site;
};

Submission submission(hvd_op op, const char* kind, const ReduceOptions& options, bool waits, Site site);
Submission submission(hvd_op op, const char* kind, const CollectiveOptions& options, bool waits, Site site);

/// Throws InvalidArgument.
[[noreturn]] void refuse(const Submission& submission, const std::string& reason);

/// Contiguous memory that the library may use: the tensor itself or a copy. Throws InvalidArgument for what cannot
/// travel.
at::Tensor plain(const at::Tensor& tensor, const Submission& submission);

enum class Output : std::uint8_t { kInPlace, kNew, kMadeByLibrary };
Place place(const at::Tensor& tensor, const Submission& submission, Output output);
/// The tensor number `index` of an operation that is done, and that the current stream waits for.
at::Tensor result(const Place& place, const std::shared_ptr<hvd::detail::Operation>& operation, int index = 0);

/// Takes the operation out of a handle; throws PreconditionError for an empty one.
std::shared_ptr<hvd::detail::Operation> taken(std::shared_ptr<hvd::detail::Operation>& operation, const Site& site);
const hvd::detail::Operation& in_flight(const std::shared_ptr<hvd::detail::Operation>& operation, const Site& site);

/// Does not block. All tensors are plain and on one device; `outputs` may be empty. The library keeps them until it is
/// done.
hvd::detail::Operation submit(const Submission& submission, const std::vector<at::Tensor>& inputs,
                              const std::vector<at::Tensor>& outputs);

}  // namespace hvd::torch::detail
