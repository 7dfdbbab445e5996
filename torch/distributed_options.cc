#include "torch/distributed_options.h"

#include <algorithm>
#include <cstddef>
#include <string>

namespace hvd::torch::detail {

void check_options(const DistributedOptions& options, Site site) {
  const auto refuse = [&](const std::string& reason) {
    hvd::detail::raise(StatusCode::kInvalidArgument, "DistributedOptimizer", reason, site);
  };
  if (options.backward_passes_per_step < 1) refuse("backward_passes_per_step must be 1 or more");
  if (options.op == ReduceOp::kAdasum && (options.group_count != 0 || !options.groups.empty())) {
    refuse("groups are of gradients, which Adasum does not reduce");
  }
  if (options.op == ReduceOp::kAdasum && options.gradient_as_bucket_view) {
    refuse("gradient_as_bucket_view is about gradients, which Adasum does not reduce");
  }
  if (options.gradient_predivide_factor != 1.0 && options.op != ReduceOp::kAverage) {
    refuse("gradient_predivide_factor goes with an average only");
  }
  if (options.group_count < 0) refuse("group_count must be 0 or more");
  if (options.group_count > 0 && !options.groups.empty()) refuse("group_count and groups exclude each other");
}

std::vector<std::vector<at::Tensor>> parts_of(std::vector<at::Tensor> parameters, int wanted) {
  std::erase_if(parameters, [](const at::Tensor& parameter) { return !parameter.requires_grad(); });
  const std::size_t count = std::min(static_cast<std::size_t>(wanted), parameters.size());
  std::vector<std::vector<at::Tensor>> parts(count);
  auto at = parameters.begin();
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t size = parameters.size() / count + (i < parameters.size() % count ? 1 : 0);
    const auto end = at + static_cast<std::ptrdiff_t>(size);
    parts[i].assign(at, end);
    at = end;
  }
  return parts;
}

}  // namespace hvd::torch::detail
