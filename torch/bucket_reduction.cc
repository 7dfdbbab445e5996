// Gradients that are views of buckets: which bucket each belongs to, and when a bucket is on its way.
// Threads as in reduction_state.h.
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "torch/buckets.h"
#include "torch/reduction_state.h"

namespace hvd::torch::detail {
namespace {

NamedTensors named(const std::vector<Gradient*>& gradients) {
  NamedTensors all;
  for (const Gradient* gradient : gradients) all.emplace_back(gradient->name, gradient->parameter);
  return all;
}

}  // namespace

// Each group becomes a bucket, or one for each type in it.
void GradientReduction::State::make_buckets_of_groups() {
  for (const std::unique_ptr<Group>& group : groups) {
    for (Gradient* member : group->members) member->group = nullptr;
    for (const NamedTensors& part : split_by_kind(named(group->members))) {
      add_bucket(group->members, part, /*takes_sparse=*/true);
    }
  }
  groups.clear();
}

void GradientReduction::State::make_buckets_of_rest(bool one_each) {
  std::vector<Gradient*> rest;
  for (const std::unique_ptr<Gradient>& gradient : gradients) {
    if (gradient->bucket == nullptr) rest.push_back(gradient.get());
  }
  if (one_each) {
    for (Gradient* gradient : rest) add_bucket({gradient}, named({gradient}), options.sparse_as_dense);
    return;
  }
  for (const NamedTensors& part : cut_into_buckets(named(rest))) add_bucket(rest, part, options.sparse_as_dense);
}

void GradientReduction::State::add_bucket(const std::vector<Gradient*>& candidates, const NamedTensors& members,
                                          bool takes_sparse) {
  Bucket& bucket = *buckets.emplace_back(std::make_unique<Bucket>(buckets.size(), members, takes_sparse));
  std::map<Parameter, std::size_t> places;
  for (const auto& [name, parameter] : members) places.emplace(key(parameter), places.size());
  for (Gradient* gradient : candidates) {
    const auto found = places.find(key(gradient->parameter));
    if (found == places.end()) continue;
    gradient->bucket = &bucket;
    gradient->place = found->second;
  }
}

// The last gradient of a bucket starts its reduction. Where that is refused, synchronize() tries again.
void GradientReduction::State::start_in_bucket(Gradient& gradient) {
  gradient.reduced = gradient.bucket->take_in(gradient.place, site);
  gradient.version.reset();
  if (gradient.passes_left == 0) gradient.version = gradient.reduced._version();  // made by the backward that runs
  gradient.passes_left = 0;
  if (gradient.bucket->count_ready()) start_bucket(*gradient.bucket);
}

void GradientReduction::State::start_bucket(Bucket& bucket) const {
  bucket.start(submission(bucket.name(), /*group=*/false), options.compression);
}

}  // namespace hvd::torch::detail
