// The grouped collectives of <horovod_cpp/torch.h>.
#include <algorithm>
#include <utility>

#include <horovod_cpp/torch/collectives.h>

#include "torch/differentiable.h"
#include "torch/streams.h"
#include "torch/tensors.h"

namespace hvd::torch {
namespace {

using detail::Output;
using detail::submission;
using detail::Submission;

GroupHandle start(Submission submission, at::TensorList tensors, Output output) {
  submission.group = true;
  if (tensors.empty()) detail::refuse(submission, "the group has no tensors");
  std::vector<detail::Place> places;
  std::vector<at::Tensor> sources;
  std::vector<at::Tensor> targets;
  for (const at::Tensor& tensor : tensors) {
    const detail::Place& place = places.emplace_back(detail::place(tensor, submission, output));
    if (place.source.device() != places.front().source.device()) {
      detail::refuse(submission, "the tensors are on several devices: " + places.front().source.device().str() +
                                     " and " + place.source.device().str());
    }
    sources.push_back(place.source);
    if (place.target.defined()) targets.push_back(place.target);
  }
  return {detail::submit(submission, sources, targets), std::move(places)};
}

GroupHandle start_allreduce(at::TensorList tensors, Output output, const ReduceOptions& options, bool waits,
                            Site site) {
  return start(submission(HVD_ALLREDUCE, "grouped allreduce", options, waits, site), tensors, output);
}
GroupHandle start_allgather(at::TensorList tensors, const CollectiveOptions& options, bool waits, Site site) {
  return start(submission(HVD_ALLGATHER, "grouped allgather", options, waits, site), tensors, Output::kMadeByLibrary);
}
GroupHandle start_reducescatter(at::TensorList tensors, const ReduceOptions& options, bool waits, Site site) {
  return start(submission(HVD_REDUCESCATTER, "grouped reducescatter", options, waits, site), tensors,
               Output::kMadeByLibrary);
}

bool need_gradient(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), detail::needs_gradient);
}

}  // namespace

bool GroupHandle::done(Site site) const { return detail::in_flight(operation_, site).done(); }

std::vector<at::Tensor> GroupHandle::wait(Site site) {
  const std::shared_ptr<hvd::detail::Operation> operation = detail::taken(operation_, site);
  const std::vector<detail::Place> places = std::exchange(places_, {});
  operation->wait();
  hvd_handle* const handle = operation->get();
  detail::let_stream_wait({&handle, 1}, places.front().source.device());
  std::vector<at::Tensor> results;
  for (const detail::Place& place : places) {
    results.push_back(detail::result(place, operation, static_cast<int>(results.size())));
  }
  return results;
}

std::vector<at::Tensor> grouped_allreduce(at::TensorList tensors, const ReduceOptions& options, Site site) {
  if (need_gradient(tensors)) return detail::differentiable_grouped_allreduce(tensors, options, site);
  return start_allreduce(tensors, Output::kNew, options, /*waits=*/true, site).wait();
}
std::vector<at::Tensor> grouped_allreduce_(at::TensorList tensors, const ReduceOptions& options, Site site) {
  return start_allreduce(tensors, Output::kInPlace, options, /*waits=*/true, site).wait();
}
GroupHandle grouped_allreduce_async(at::TensorList tensors, const ReduceOptions& options, Site site) {
  return start_allreduce(tensors, Output::kNew, options, /*waits=*/false, site);
}
GroupHandle grouped_allreduce_async_(at::TensorList tensors, const ReduceOptions& options, Site site) {
  return start_allreduce(tensors, Output::kInPlace, options, /*waits=*/false, site);
}

std::vector<at::Tensor> grouped_allgather(at::TensorList tensors, const CollectiveOptions& options, Site site) {
  if (need_gradient(tensors)) return detail::differentiable_grouped_allgather(tensors, options, site);
  return start_allgather(tensors, options, /*waits=*/true, site).wait();
}
GroupHandle grouped_allgather_async(at::TensorList tensors, const CollectiveOptions& options, Site site) {
  return start_allgather(tensors, options, /*waits=*/false, site);
}

std::vector<at::Tensor> grouped_reducescatter(at::TensorList tensors, const ReduceOptions& options, Site site) {
  if (need_gradient(tensors)) return detail::differentiable_grouped_reducescatter(tensors, options, site);
  return start_reducescatter(tensors, options, /*waits=*/true, site).wait();
}
GroupHandle grouped_reducescatter_async(at::TensorList tensors, const ReduceOptions& options, Site site) {
  return start_reducescatter(tensors, options, /*waits=*/false, site);
}

}  // namespace hvd::torch
