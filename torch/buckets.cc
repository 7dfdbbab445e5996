#include "torch/buckets.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <map>
#include <ranges>
#include <set>
#include <string_view>
#include <tuple>
#include <utility>

#include <horovod_cpp/buckets.h>

#include "torch/changes.h"

namespace hvd::torch::detail {
namespace {

using Kind = std::tuple<at::ScalarType, at::DeviceType, int>;

Kind kind_of(const at::Tensor& tensor) {
  return {tensor.scalar_type(), tensor.device().type(), tensor.device().index()};
}

std::string joined(const std::vector<std::int64_t>& numbers) {
  std::string text;
  for (const std::int64_t number : numbers) {
    if (!text.empty()) text += ',';
    text += std::to_string(number);
  }
  return text;
}

// The dimensions from the slowest in memory to the fastest, without those of size 1.
std::vector<std::int64_t> order(const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides) {
  std::vector<std::int64_t> dimensions;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] == 0) return {};
    if (shape[i] != 1) dimensions.push_back(static_cast<std::int64_t>(i));
  }
  std::stable_sort(dimensions.begin(), dimensions.end(), [&](std::int64_t a, std::int64_t b) {
    return strides[static_cast<std::size_t>(a)] > strides[static_cast<std::size_t>(b)];
  });
  return dimensions;
}

// The hash of Fowler, Noll and Vo: short, and the same in Python.
std::uint32_t fnv1a(std::string_view text) {
  std::uint32_t value = 0x811C9DC5U;
  for (const char byte : text) value = (value ^ static_cast<unsigned char>(byte)) * 0x01000193U;
  return value;
}

}  // namespace

std::vector<NamedTensors> cut_into_buckets(const NamedTensors& members) {
  struct Open {
    std::size_t bucket;
    std::int64_t bytes;
  };
  std::vector<NamedTensors> buckets;
  std::map<Kind, Open> open;
  std::set<Kind> begun;  // kinds that have their first bucket
  for (const auto& member : std::views::reverse(members)) {
    const at::Tensor& tensor = member.second;
    const auto [found, made] = open.try_emplace(kind_of(tensor), Open{.bucket = buckets.size(), .bytes = 0});
    if (made) buckets.emplace_back();
    buckets[found->second.bucket].push_back(member);
    found->second.bytes += tensor.numel() * static_cast<std::int64_t>(tensor.element_size());
    if (found->second.bytes < (begun.contains(found->first) ? kBucketBytes : kFirstBucketBytes)) continue;
    begun.insert(found->first);
    open.erase(found);
  }
  return buckets;
}

std::vector<NamedTensors> split_by_kind(const NamedTensors& members) {
  std::vector<NamedTensors> parts;
  std::map<Kind, std::size_t> places;
  for (const auto& member : members) {
    const auto [found, made] = places.try_emplace(kind_of(member.second), parts.size());
    if (made) parts.emplace_back();
    parts[found->second].push_back(member);
  }
  return parts;
}

Bucket::Bucket(std::size_t number, NamedTensors members, bool takes_sparse)
    : members_(std::move(members)),
      name_("bucket." + std::to_string(number) + "." + members_.front().first),
      takes_sparse_(takes_sparse) {
  place_members();
  allocate();
}

void Bucket::place_members() {
  const std::int64_t step = kBucketAlignmentBytes / static_cast<std::int64_t>(members_.front().second.element_size());
  for (const auto& [name, parameter] : members_) {
    // Torch's own choice of strides: the parameter's where these have no gaps, so that the optimizer's kernels see both
    // in one order.
    const at::Tensor like = at::empty_like(parameter.detach(), parameter.options().device(at::kMeta));
    placements_.push_back({.shape = like.sizes().vec(), .strides = like.strides().vec(), .offset = elements_});
    elements_ += (parameter.numel() + step - 1) / step * step;
  }
  elements_ += tail();
}

// How many elements follow the last gradient. A bucket travels as one row of numbers, of which ranks compare the length
// only: a number made of all shapes and memory orders lets ranks that differ in these meet an error, all but one time
// in a thousand.
std::int64_t Bucket::tail() const {
  std::string text;
  for (const Placement& placement : placements_) {
    if (!text.empty()) text += ';';
    text += joined(placement.shape) + "/" + joined(order(placement.shape, placement.strides));
  }
  return fnv1a(text) % 1021;
}

void Bucket::allocate() {
  const at::NoGradGuard no_grad;
  // Zeros: what is between the gradients is reduced, too.
  flat_ = at::zeros({elements_}, members_.front().second.options().requires_grad(false));
  views_.clear();
  addresses_.clear();
  for (const Placement& placement : placements_) {
    views_.push_back(make_view(placement));
    addresses_.push_back(views_.back().const_data_ptr());
  }
}

// To autograd it is no view: these cannot be detached in place, which the zero_grad() of C++ does.
at::Tensor Bucket::make_view(const Placement& placement) const {
  const at::NoGradGuard no_grad;
  const at::Tensor view = at::empty({0}, flat_.options());
  return view.set_(flat_, placement.offset, placement.shape, placement.strides);
}

const at::Tensor& Bucket::view(std::size_t place) {
  at::Tensor& view = views_[place];
  if (view.const_data_ptr() != addresses_[place]) view = make_view(placements_[place]);
  return view;
}

const at::Tensor& Bucket::take_in(std::size_t place, Site site) {
  const at::NoGradGuard no_grad;
  const auto& [name, parameter] = members_[place];
  const at::Tensor& view = this->view(place);
  at::Tensor& grad = parameter.mutable_grad();
  if (grad.is_same(view)) return view;
  const auto refuse = [&](const std::string& reason) {
    hvd::detail::raise(StatusCode::kInvalidArgument, "backward", "gradient_as_bucket_view: parameter '" + name + reason,
                       site);
  };
  if (!grad.defined()) {
    view.zero_();
  } else if (grad.scalar_type() != view.scalar_type() || grad.device() != view.device()) {
    refuse("' has a gradient of " + grad.toString() + " on " + grad.device().str() + ", its bucket is of " +
           view.toString() + " on " + view.device().str() + "; move the model before the optimizer is made");
  } else if (grad.layout() == at::kStrided) {
    view.copy_(grad);
  } else if (takes_sparse_) {
    view.copy_(grad.to_dense());
  } else {
    refuse("' has a sparse gradient, which cannot be a view of a bucket; use sparse_as_dense");
  }
  grad = view;
  return view;
}

void Bucket::start(const Submission& submission, Compression compression) {
  const at::NoGradGuard no_grad;
  producers_.hand_over();
  sent_ = plain(compressed(flat_, compression), submission);
  operation_ = std::make_unique<hvd::detail::Operation>(submit(submission, {sent_}, {sent_}));
}

void Bucket::finish() {
  operation_->wait();
  claim(sent_);
  if (sent_.data_ptr() != flat_.data_ptr()) flat_.copy_(sent_);
  operation_ = nullptr;  // nothing is in flight any more
}

void Bucket::reset() {
  if (operation_ && (flat_.is_cuda() || !operation_->done())) allocate();
  operation_ = nullptr;
  sent_ = at::Tensor();
  ready_ = 0;
  producers_.clear();
}

}  // namespace hvd::torch::detail
