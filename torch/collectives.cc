// The collectives of <horovod_cpp/torch.h>, and the functions for whole models.
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <fstream>
#include <sstream>
#include <stdexcept>
#include <utility>

#include <horovod_cpp/torch.h>

#include "torch/differentiable.h"
#include "torch/streams.h"
#include "torch/tensors.h"

namespace hvd::torch {
namespace {

using detail::Submission;
using detail::submission;

// Into memory of the caller: the tensor itself, or a new one.
Handle start_filling(const Submission& submission, const at::Tensor& tensor, bool in_place) {
  detail::Place place = detail::place(tensor, submission, in_place ? detail::Output::kInPlace : detail::Output::kNew);
  return {detail::submit(submission, {place.source}, {place.target}), std::move(place)};
}

// The library makes the output.
Handle start_making(const Submission& submission, const at::Tensor& tensor) {
  detail::Place place = detail::place(tensor, submission, detail::Output::kMadeByLibrary);
  return {detail::submit(submission, {place.source}, {}), std::move(place)};
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

bool Handle::done(Site site) const { return detail::in_flight(operation_, site).done(); }

at::Tensor Handle::wait(Site site) {
  const std::shared_ptr<hvd::detail::Operation> operation = detail::taken(operation_, site);
  const detail::Place place = std::exchange(place_, {});
  operation->wait();
  hvd_handle* const handle = operation->get();
  detail::let_stream_wait({&handle, 1}, place.source.device());
  const hvd_output output = operation->output();
  received_splits_.assign(output.received_splits, output.received_splits + output.received_split_count);
  return detail::result(place, operation);
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
