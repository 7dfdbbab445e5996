// The collectives of <horovod_cpp/torch.h>, and the functions for whole models.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <fstream>
#include <optional>
#include <sstream>
#include <stdexcept>

#include <horovod_cpp/torch.h>

#include "torch/differentiable.h"
#include "torch/tensors.h"

namespace hvd::torch {
namespace {

using detail::Submission;

Submission submission(hvd_op op, const char* kind, const ReduceOptions& options, bool waits, Site site) {
  return {.op = op,
          .kind = kind,
          .name = options.name,
          .process_set = options.process_set,
          .caller_waits = waits,
          .reduce_op = options.op,
          .prescale = options.prescale,
          .postscale = options.postscale,
          .site = site};
}
Submission submission(hvd_op op, const char* kind, const CollectiveOptions& options, bool waits, Site site) {
  return {.op = op,
          .kind = kind,
          .name = options.name,
          .process_set = options.process_set,
          .caller_waits = waits,
          .site = site};
}

// Into memory of the caller: the tensor itself, or a new one.
Handle start_filling(const Submission& submission, const at::Tensor& tensor, bool in_place) {
  const at::Tensor source = detail::plain(tensor, submission);
  const bool copied = tensor.data_ptr() != source.data_ptr();
  const at::Tensor target = in_place || copied ? source : at::empty_like(source);
  return {detail::submit(submission, {source}, {target}), source, in_place && !copied ? tensor : target,
          in_place && copied ? tensor : at::Tensor()};
}

// The library makes the output.
Handle start_making(const Submission& submission, const at::Tensor& tensor) {
  const at::Tensor source = detail::plain(tensor, submission);
  return {detail::submit(submission, {source}, {}), source, {}, {}};
}

// A tensor in memory of the library, which it holds on to.
at::Tensor adopted(const hvd_output& output, const std::shared_ptr<hvd::detail::Operation>& operation,
                   const at::Tensor& source) {
  const at::IntArrayRef shape(output.shape, static_cast<std::size_t>(output.dimensions));
  if (output.bytes == 0) return at::empty(shape, source.options());
  return at::from_blob(output.data, shape, [operation](void*) {}, source.options());
}

Handle start_allreduce(const at::Tensor& tensor, bool in_place, const ReduceOptions& options, bool waits, Site site) {
  return start_filling(submission(HVD_ALLREDUCE, "allreduce", options, waits, site), tensor, in_place);
}
Handle start_broadcast(const at::Tensor& tensor, int root_rank, bool in_place, const CollectiveOptions& options,
                       bool waits, Site site) {
  Submission made = submission(HVD_BROADCAST, "broadcast", options, waits, site);
  made.root_rank = root_rank;
  return start_filling(made, tensor, in_place);
}
Handle start_alltoall(const at::Tensor& tensor, std::span<const std::int64_t> splits, const CollectiveOptions& options,
                      bool waits, Site site) {
  Submission made = submission(HVD_ALLTOALL, "alltoall", options, waits, site);
  made.splits = splits;
  return start_making(made, tensor);
}

}  // namespace

void Handle::require(const Site& site) const {
  if (valid()) return;
  hvd::detail::raise(StatusCode::kPrecondition, "wait", "the handle is empty: its result has been taken", site);
}

at::Tensor Handle::wait(Site site) {
  require(site);
  const std::shared_ptr<hvd::detail::Operation> operation = std::exchange(operation_, nullptr);
  operation->wait();
  hvd_handle* const handle = operation->get();
  detail::let_stream_wait({&handle, 1}, source_);
  at::Tensor result = target_;
  if (copy_to_.defined()) {
    result = copy_to_;
    result.detach().copy_(target_);
  } else if (!target_.defined()) {
    const hvd_output output = operation->output();
    received_splits_.assign(output.received_splits, output.received_splits + output.received_split_count);
    result = adopted(output, operation, source_);
  }
  source_ = target_ = copy_to_ = at::Tensor();
  return result;
}

Handle allreduce_async(const at::Tensor& tensor, const ReduceOptions& options, Site site) {
  return start_allreduce(tensor, /*in_place=*/false, options, /*waits=*/false, site);
}
Handle allreduce_async_(const at::Tensor& tensor, const ReduceOptions& options, Site site) {
  return start_allreduce(tensor, /*in_place=*/true, options, /*waits=*/false, site);
}
at::Tensor allreduce(const at::Tensor& tensor, const ReduceOptions& options, Site site) {
  if (detail::needs_gradient(tensor)) return detail::differentiable_allreduce(tensor, options, site);
  return start_allreduce(tensor, /*in_place=*/false, options, /*waits=*/true, site).wait();
}
at::Tensor allreduce_(const at::Tensor& tensor, const ReduceOptions& options, Site site) {
  return start_allreduce(tensor, /*in_place=*/true, options, /*waits=*/true, site).wait();
}

Handle allgather_async(const at::Tensor& tensor, const CollectiveOptions& options, Site site) {
  return start_making(submission(HVD_ALLGATHER, "allgather", options, /*waits=*/false, site), tensor);
}
at::Tensor allgather(const at::Tensor& tensor, const CollectiveOptions& options, Site site) {
  if (detail::needs_gradient(tensor)) return detail::differentiable_allgather(tensor, options, site);
  return start_making(submission(HVD_ALLGATHER, "allgather", options, /*waits=*/true, site), tensor).wait();
}

Handle broadcast_async(const at::Tensor& tensor, int root_rank, const CollectiveOptions& options, Site site) {
  return start_broadcast(tensor, root_rank, /*in_place=*/false, options, /*waits=*/false, site);
}
Handle broadcast_async_(const at::Tensor& tensor, int root_rank, const CollectiveOptions& options, Site site) {
  return start_broadcast(tensor, root_rank, /*in_place=*/true, options, /*waits=*/false, site);
}
at::Tensor broadcast(const at::Tensor& tensor, int root_rank, const CollectiveOptions& options, Site site) {
  if (detail::needs_gradient(tensor)) return detail::differentiable_broadcast(tensor, root_rank, options, site);
  return start_broadcast(tensor, root_rank, /*in_place=*/false, options, /*waits=*/true, site).wait();
}
at::Tensor broadcast_(const at::Tensor& tensor, int root_rank, const CollectiveOptions& options, Site site) {
  return start_broadcast(tensor, root_rank, /*in_place=*/true, options, /*waits=*/true, site).wait();
}

Handle reducescatter_async(const at::Tensor& tensor, const ReduceOptions& options, Site site) {
  return start_making(submission(HVD_REDUCESCATTER, "reducescatter", options, /*waits=*/false, site), tensor);
}
at::Tensor reducescatter(const at::Tensor& tensor, const ReduceOptions& options, Site site) {
  if (detail::needs_gradient(tensor)) return detail::differentiable_reducescatter(tensor, options, site);
  return start_making(submission(HVD_REDUCESCATTER, "reducescatter", options, /*waits=*/true, site), tensor).wait();
}

Handle alltoall_async(const at::Tensor& tensor, std::span<const std::int64_t> splits, const CollectiveOptions& options,
                      Site site) {
  return start_alltoall(tensor, splits, options, /*waits=*/false, site);
}
at::Tensor alltoall(const at::Tensor& tensor, std::span<const std::int64_t> splits, const CollectiveOptions& options,
                    Site site) {
  if (detail::needs_gradient(tensor)) return detail::differentiable_alltoall(tensor, splits, options, site);
  return start_alltoall(tensor, splits, options, /*waits=*/true, site).wait();
}

at::Device device() {
  const int place = hvd::local_rank();
  const auto* cuda = c10::impl::device_guard_impl_registry[static_cast<std::size_t>(at::DeviceType::CUDA)].load();
  const bool has_device = cuda != nullptr && place < cuda->deviceCount();
  return has_device ? at::Device(at::DeviceType::CUDA, static_cast<at::DeviceIndex>(place)) : at::Device(at::kCPU);
}

void broadcast_tensors(const NamedTensors& tensors, int root_rank, ProcessSet process_set, Site site) {
  std::vector<Handle> handles;
  handles.reserve(tensors.size());
  for (const auto& [name, tensor] : tensors) {
    handles.push_back(broadcast_async_(tensor, root_rank, {.process_set = process_set, .name = name}, site));
  }
  for (Handle& handle : handles) handle.wait(site);
}

namespace detail {

std::string on_root(const char* what, int root_rank, ProcessSet process_set, Site site,
                    const std::function<std::string()>& act) {
  std::string content;
  std::int64_t told[] = {0, 0};  // 1 for a failure, and bytes of the text
  if (hvd::rank(site) == root_rank) {
    try {
      content = act();
    } catch (const std::exception& error) {
      content = error.what();
      told[0] = 1;
    }
    told[1] = static_cast<std::int64_t>(content.size());
  }
  const CollectiveOptions options{.process_set = process_set, .name = what};
  hvd::broadcast(told, root_rank, options, site);
  content.resize(static_cast<std::size_t>(told[1]));
  hvd::broadcast(std::as_writable_bytes(std::span(content)), root_rank, options, site);
  if (told[0] != 0) {
    const std::string reason = "on rank " + std::to_string(root_rank) + ": " + content;
    hvd::detail::raise(StatusCode::kInvalidArgument, what, reason, site);
  }
  return content;
}

std::string read_file(const std::string& path) {
  const std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  if (!file || !(content << file.rdbuf())) throw std::runtime_error("cannot read " + path);
  return std::move(content).str();
}

void write_file(const std::string& path, const std::string& content) {
  std::ofstream file(path, std::ios::binary);
  if (!file.write(content.data(), static_cast<std::streamsize>(content.size())) || !file.flush()) {
    throw std::runtime_error("cannot write " + path);
  }
}

}  // namespace detail
}  // namespace hvd::torch
