#include "torch/sparse.h"

#include <ATen/ops/_validate_sparse_coo_tensor_args.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sparse_coo_tensor.h>

#include <array>
#include <utility>

#include "torch/tensors.h"

namespace hvd::torch {
namespace detail {
namespace {

std::shared_ptr<hvd::detail::Operation> start_gather(const Place& place, const Submission& gather) {
  return std::make_shared<hvd::detail::Operation>(submit(gather, {place.source}, {}));
}

}  // namespace

SparseReduction start_sparse(const at::Tensor& tensor, const ReduceOptions& options, Site site) {
  const Submission whole = submission(HVD_ALLGATHER, "sparse allreduce", options, /*waits=*/false, site);
  if (!tensor.defined() || tensor.layout() != at::kSparse) {
    refuse(whole, "takes COO tensors; this one is " + tensor.toString());
  }
  if (options.op != ReduceOp::kAverage && options.op != ReduceOp::kSum) refuse(whole, "op must be Average or Sum");
  if (options.prescale != 1.0 || options.postscale != 1.0) refuse(whole, "takes no factors");
  const at::Tensor entries = tensor.detach().coalesce();  // one entry for each place travels
  const auto part = [&](const char* what) { return options.name.empty() ? std::string() : options.name + what; };
  const CollectiveOptions of_indices{.process_set = options.process_set, .name = part(".indices")};
  const CollectiveOptions of_values{.process_set = options.process_set, .name = part(".values")};
  const Submission indices = submission(HVD_ALLGATHER, "allgather", of_indices, /*waits=*/false, site);
  const Submission values = submission(HVD_ALLGATHER, "allgather", of_values, /*waits=*/false, site);
  SparseReduction made;
  made.place_of_indices = place(entries.indices().t(), indices, Output::kMadeByLibrary);
  made.place_of_values = place(entries.values(), values, Output::kMadeByLibrary);
  made.shape = tensor.sizes().vec();
  made.divisor = options.op == ReduceOp::kAverage ? options.process_set.size(site) : 1;
  made.text = hvd::detail::operation_text("sparse allreduce", options.name);
  made.site = site;
  made.indices = start_gather(made.place_of_indices, indices);
  made.values = start_gather(made.place_of_values, values);
  return made;
}

at::Tensor finish_sparse(const SparseReduction& reduction) {
  const std::array handles{reduction.indices->get(), reduction.values->get()};
  hvd_handles_wait(handles.data(), static_cast<std::int32_t>(handles.size()), /*limit_nanoseconds=*/-1);
  reduction.indices->wait();
  reduction.values->wait();
  let_stream_wait(handles, reduction.place_of_values.source);
  const at::Tensor indices = result(reduction.place_of_indices, reduction.indices).t();
  at::Tensor values = result(reduction.place_of_values, reduction.values);
  if (reduction.divisor > 1) {
    const bool exact = values.is_floating_point() || values.is_complex();
    values = exact ? values.div(reduction.divisor) : values.div(reduction.divisor, "trunc");
  }
  try {
    // Ranks may have had shapes that differ where an allgather does not look.
    at::_validate_sparse_coo_tensor_args(indices, values, reduction.shape);
  } catch (const c10::Error& error) {
    const std::string reason = std::string("ranks have tensors of different shapes: ") + error.what_without_backtrace();
    hvd::detail::raise(StatusCode::kInvalidArgument, reduction.text, reason, reduction.site);
  }
  return at::sparse_coo_tensor(indices, values, reduction.shape, values.options().layout(at::kSparse));
}

at::Tensor sparse_zeros(const at::Tensor& like, std::int64_t sparse_dimensions) {
  std::vector<std::int64_t> shape = like.sizes().slice(static_cast<std::size_t>(sparse_dimensions)).vec();
  shape.insert(shape.begin(), 0);
  return at::sparse_coo_tensor(at::empty({sparse_dimensions, 0}, like.options().dtype(at::kLong)),
                               at::empty(shape, like.options()), like.sizes(), like.options().layout(at::kSparse));
}

}  // namespace detail

SparseHandle::SparseHandle(detail::SparseReduction reduction)
    : reduction_(std::make_shared<detail::SparseReduction>(std::move(reduction))) {}

bool SparseHandle::done(Site site) const {
  return detail::in_flight(reduction_ ? reduction_->indices : nullptr, site).done() && reduction_->values->done();
}

at::Tensor SparseHandle::wait(Site site) {
  detail::in_flight(reduction_ ? reduction_->indices : nullptr, site);
  return detail::finish_sparse(*std::exchange(reduction_, nullptr));
}

SparseHandle sparse_allreduce_async(const at::Tensor& tensor, const ReduceOptions& options, Site site) {
  return SparseHandle(detail::start_sparse(tensor, options, site));
}
at::Tensor sparse_allreduce(const at::Tensor& tensor, const ReduceOptions& options, Site site) {
  return detail::finish_sparse(detail::start_sparse(tensor, options, site));
}

}  // namespace hvd::torch
