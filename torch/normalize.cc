#include "torch/normalize.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/rsqrt.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <sstream>
#include <vector>

#include <horovod_cpp/torch.h>

namespace hvd::torch::detail {
namespace {

using ::torch::autograd::AutogradContext;
using ::torch::autograd::tensor_list;

constexpr const char* kForwardName = "sync_batch_norm.forward";  // those of the Python package
constexpr const char* kBackwardName = "sync_batch_norm.backward";

// In the type in which sums of it are made.
at::Tensor wide(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? tensor : tensor.to(at::kFloat);
}

std::vector<std::int64_t> all_but_channels(const at::Tensor& tensor) {
  std::vector<std::int64_t> dimensions{0};
  for (std::int64_t dimension = 2; dimension < tensor.dim(); ++dimension) dimensions.push_back(dimension);
  return dimensions;
}

// One value a channel, to be combined with `like`.
at::Tensor channels(const at::Tensor& values, const at::Tensor& like) {
  std::vector<std::int64_t> shape(static_cast<std::size_t>(like.dim()), 1);
  shape[1] = values.numel();
  return values.to(like.scalar_type()).reshape(shape);
}

std::int64_t own_count(const at::Tensor& values) { return values.numel() / std::max<std::int64_t>(values.size(1), 1); }

// The statistics of the ranks are put together by the update of Chan, Golub and LeVeque ("Algorithms for Computing the
// Sample Variance", 1983), in double precision.
ChannelStatistics statistics_of(const at::Tensor& values, const Normalization& how) {
  const std::vector<std::int64_t> dimensions = all_but_channels(values);
  const std::int64_t width = values.size(1);
  const std::int64_t count = own_count(values);
  const at::Tensor own_mean = values.sum(dimensions).to(at::kDouble).div(std::max<std::int64_t>(count, 1));
  const at::Tensor own_squares = (values - channels(own_mean, values)).square().sum(dimensions).to(at::kDouble);
  const at::Tensor packed =
      at::cat({own_mean, own_squares, at::full({1}, static_cast<double>(count), own_mean.options())});
  const at::Tensor rows =
      allgather(packed.unsqueeze(0), {.process_set = how.process_set, .name = kForwardName}, how.site);
  const at::Tensor means = rows.narrow(1, 0, width);
  const at::Tensor counts = rows.narrow(1, 2 * width, 1);
  const at::Tensor total = counts.sum();
  const at::Tensor divisor = total.clamp_min(1);
  const at::Tensor mean = (means * counts).sum(0) / divisor;
  const at::Tensor squares = (rows.narrow(1, width, width) + counts * (means - mean).square()).sum(0);
  return {mean, squares / divisor, total};
}

void check(const at::Tensor& input, const ChannelStatistics& found, const Normalization& how) {
  std::ostringstream reason;
  if (input.size(1) != how.channels) {
    reason << "the layer has " << how.channels << " channels, the input of shape " << input.sizes() << " has "
           << input.size(1);
  } else if (own_count(input) < 2 && found.count.item<double>() < 2) {
    // The count of all is not less than that of a rank, so others need not read it.
    reason << "more than 1 value a channel is needed to train; the input of shape " << input.sizes()
           << " on this rank is part of " << found.count.item<double>() << " on all";
  } else {
    return;
  }
  refuse_batch(reason.str(), how.site);
}

// What is asked for derivatives of these gradients fails, instead of getting none.
tensor_list once(tensor_list gradients) {
  if (!at::GradMode::is_enabled()) return gradients;
  for (at::Tensor& gradient : gradients) {
    if (gradient.defined()) gradient = gradient.detach().requires_grad_();
  }
  const auto count = static_cast<std::int64_t>(gradients.size());
  const auto error = std::make_shared<::torch::autograd::DelayedError>("SyncBatchNorm has no second derivative", count);
  return (*error)(std::move(gradients));
}

struct Normalize : ::torch::autograd::Function<Normalize> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, const Normalization& how,
                            ChannelStatistics* statistics) {
    const at::Tensor values = wide(input);
    *statistics = statistics_of(values, how);
    check(input, *statistics, how);
    const at::Tensor scale = at::rsqrt(statistics->variance + how.eps);
    at::Tensor output = (values - channels(statistics->mean, values)) * channels(scale, values);
    if (weight && bias) output = output * channels(*weight, values) + channels(*bias, values);
    context->save_for_backward({input, weight.value_or(at::Tensor()), statistics->mean, scale, statistics->count});
    context->saved_data["process_set"] = static_cast<std::int64_t>(how.process_set.id());
    return output.to(input.scalar_type());
  }

  static tensor_list backward(AutogradContext* context, const tensor_list& incoming) {
    tensor_list gradients;
    {
      const at::NoGradGuard no_grad;
      gradients = gradients_of(*context, wide(incoming[0]));
    }
    return once(std::move(gradients));
  }

 private:
  static tensor_list gradients_of(AutogradContext& context, const at::Tensor& gradient) {
    const tensor_list saved = context.get_saved_variables();
    const at::Tensor& input = saved[0];
    const at::Tensor& weight = saved[1];
    const at::Tensor values = wide(input);
    const at::Tensor scale = channels(saved[3], values);
    const at::Tensor normalized = (values - channels(saved[2], values)) * scale;
    const std::vector<std::int64_t> dimensions = all_but_channels(input);
    const at::Tensor sums =
        at::cat({gradient.sum(dimensions), (gradient * normalized).sum(dimensions)}).to(at::kDouble);
    at::Tensor of_input;
    if (context.needs_input_grad(0)) {
      const at::Tensor means = total(context, sums) / saved[4];
      const std::vector<at::Tensor> parts = means.chunk(2);
      of_input = (gradient - channels(parts[0], values) - normalized * channels(parts[1], values)) * scale;
      if (weight.defined()) of_input = of_input * channels(weight, values);
      of_input = of_input.to(input.scalar_type());
    }
    if (!weight.defined()) return {of_input, {}, {}, {}, {}};
    const std::vector<at::Tensor> own = sums.to(weight.scalar_type()).chunk(2);
    return {of_input, own[1], own[0], {}, {}};
  }

  static at::Tensor total(AutogradContext& context, const at::Tensor& sums) {
    const ProcessSet process_set(static_cast<int>(context.saved_data["process_set"].toInt()));
    return allreduce(sums, {.op = ReduceOp::kSum, .process_set = process_set, .name = kBackwardName});
  }
};

std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

}  // namespace

at::Tensor normalize(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                     const Normalization& normalization, ChannelStatistics& statistics) {
  return Normalize::apply(input, if_defined(weight), if_defined(bias), normalization, &statistics);
}

void refuse_batch(const std::string& reason, const std::source_location& site) {
  hvd::detail::raise(StatusCode::kInvalidArgument, "SyncBatchNorm", reason, site);
}

}  // namespace hvd::torch::detail
