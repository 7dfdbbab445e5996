// What a reduction of gradients consists of; reduction.cc has the gradients that travel by themselves or in groups,
// bucket_reduction.cc those in buckets.
// Hooks run on the threads of backward passes, several at once if the program has them; all else on one thread. The
// mutex guards all of State; nobody waits under it.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function_hook.h>

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include <horovod_cpp/torch.h>

#include "torch/buckets.h"
#include "torch/freezing.h"
#include "torch/sparse.h"
#include "torch/streams.h"
#include "torch/tensors.h"

namespace hvd::torch::detail {

using ::torch::autograd::PostAccumulateGradHook;

using Parameter = at::TensorImpl*;  ///< what makes two tensors the same parameter

inline Parameter key(const at::Tensor& parameter) { return parameter.unsafeGetTensorImpl(); }

struct Group;

/// One parameter: how many backward passes its reduction still waits for, and the reduction in flight.
struct Gradient {
  std::string name;
  at::Tensor parameter;
  int passes_left = 0;
  Group* group = nullptr;
  Bucket* bucket = nullptr;
  std::size_t place = 0;                ///< in the bucket
  at::Tensor reduced;                   ///< the gradient that is in flight
  std::optional<std::int64_t> version;  ///< that it had then; none where changes mean nothing
  at::Tensor sent;                      ///< and what travels: the same memory, or a copy of it
  std::shared_ptr<hvd::detail::Operation> operation;
  std::optional<SparseReduction> sparse;  ///< in place of `sent` and `operation`
  std::int64_t sparse_dimensions = 0;     ///< of the last gradient that was reduced as a sparse one
  PostAccumulateGradHook* hook = nullptr;
  bool told = false;     ///< this rank has told the others that it is still, see freezing.h
  bool at_rest = false;  ///< all have
};

/// Gradients that are reduced together, once backward has made the last of them.
struct Group {
  std::string name;
  std::vector<Gradient*> members;
  std::size_t ready = 0;
  Producers producers;  ///< of those that are ready: each hook runs on the stream of its forward
};

/// With Adasum: what a step has changed in one parameter.
struct Change {
  Gradient* gradient;
  at::Tensor start;  ///< what the parameter was before
  Handle handle;     ///< of the reduction
};

struct GradientReduction::State {
  DistributedOptions options;
  Site site;
  bool active = false;
  mutable std::mutex mutex;
  std::vector<std::unique_ptr<Gradient>> gradients;
  NamedTensors frozen;            ///< what has never required a gradient
  std::set<const void*> at_rest;  ///< units that are not reduced, as all of their parameters are frozen everywhere
  bool has_told = false;
  bool warned = false;
  std::vector<std::unique_ptr<Group>> groups;
  std::vector<std::unique_ptr<Bucket>> buckets;  ///< of all gradients or none

  class Hook;

  ~State();
  std::string changed();
  [[noreturn]] void refuse(StatusCode code, const std::string& operation, const std::string& reason) const {
    hvd::detail::raise(code, operation, reason, site);
  }
  Submission submission(const std::string& name, bool group) const;
  void make_groups(const std::vector<std::vector<at::Tensor>>& wanted);
  void make_buckets_of_groups();
  void make_buckets_of_rest(bool one_each);
  void add_bucket(const std::vector<Gradient*>& candidates, const NamedTensors& members, bool takes_sparse);
  void on_accumulated(Gradient& gradient);
  void require_own(const Gradient& gradient) const;
  void start(Gradient& gradient);
  void start_group(Group& group);
  void start_in_bucket(Gradient& gradient);
  void start_bucket(Bucket& bucket) const;
  void start_alone(Gradient& gradient) const;
  std::vector<Gradient*> missing() const;
  void start_missing(const std::vector<Gradient*>& missing, const std::vector<Question>& asked);
  /// What is reduced as one operation with it.
  static const void* unit_of(const Gradient& gradient);
  Question question_about(Gradient& gradient) const;
  std::vector<Question> questions_about(const std::vector<Gradient*>& missing);
  void start_settled(const std::vector<Question>& questions);
  void start_again(const std::vector<Gradient*>& members);
  void leave_at_rest();
  at::Tensor reduced_step(const std::function<at::Tensor()>& local_step);
  void reduce_changes(std::vector<Change>& changes, std::vector<Question> questions);
  void start_change(Change& change) const;
  bool stays_sparse(const Gradient& gradient, const at::Tensor& grad) const;
  void finish(Gradient& gradient) const;
  void reset_one(Gradient& gradient) const;
  std::vector<Question> finish_all();
  void conclude();
  std::unordered_map<at::Device, std::vector<hvd_handle*>> in_flight() const;
};

}  // namespace hvd::torch::detail
