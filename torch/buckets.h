// Buckets: which parameters share one, the memory that their gradients are views of, and its reduction as a whole. As
// horovod_cpp/torch/buckets.py has them: ranks of both kinds meet in one job.
// No thread of its own; the mutex of the reduction that owns a bucket guards it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <horovod_cpp/torch.h>

#include "torch/streams.h"
#include "torch/tensors.h"

namespace hvd::torch::detail {

/// Cuts parameters, in the order of the optimizer, into buckets: those that backward reaches first come first. Each has
/// one type and device, and is full once it has kBucketBytes; the first of each kind kFirstBucketBytes.
std::vector<NamedTensors> cut_into_buckets(const NamedTensors& members);
/// Parts of one type and device each, in their order.
std::vector<NamedTensors> split_by_kind(const NamedTensors& members);

/// Gradients that lie one behind the other in one tensor, which is reduced as a whole, in place.
class Bucket {
 public:
  /// `number`: in the optimizer, for the name. `takes_sparse`: sparse gradients are made dense.
  Bucket(std::size_t number, NamedTensors members, bool takes_sparse);

  const std::string& name() const { return name_; }
  /// Lets the gradient of that member be its view, with the values that it has, or zeros. No copy where it is that
  /// already. Throws InvalidArgument for a gradient of another type, or a sparse one.
  const at::Tensor& take_in(std::size_t place, Site site);
  /// The gradient of that member. Who sets the data of a gradient takes it out of the bucket; then there is a new one.
  const at::Tensor& view(std::size_t place);
  at::Device device() const { return flat_.device(); }
  /// Counts one more gradient that the current stream has put in its place; whether it was the last.
  bool count_ready() {
    producers_.add(flat_);
    return ++ready_ == views_.size();
  }
  /// Does not block. `submission` has the bucket's name.
  void start(const Submission& submission, Compression compression);
  /// What start() began; null before it, or if it threw.
  const hvd::detail::Operation* operation() const { return operation_.get(); }
  /// Blocks unless the operation is done; then the views have the results. Throws if it failed.
  void finish();
  /// Forgets what is in flight. What still is keeps the memory; later gradients get another. On a GPU an operation that
  /// is done may still be at work, and nobody has made a stream wait for it.
  void reset();

 private:
  struct Placement {
    std::vector<std::int64_t> shape, strides;
    std::int64_t offset;  // in elements
  };

  void place_members();
  void allocate();
  at::Tensor make_view(const Placement& placement) const;
  std::int64_t tail() const;

  NamedTensors members_;
  std::string name_;
  bool takes_sparse_;
  std::vector<Placement> placements_;
  std::int64_t elements_ = 0;
  at::Tensor flat_;
  std::vector<at::Tensor> views_;
  std::vector<const void*> addresses_;  // of the views
  at::Tensor sent_;                     // what travels: the same memory, or a copy of it
  std::size_t ready_ = 0;
  Producers producers_;  // of those that are ready: each hook runs on the stream of its forward
  std::unique_ptr<hvd::detail::Operation> operation_;
};

}  // namespace hvd::torch::detail
