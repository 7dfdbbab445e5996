#include "torch/differentiable.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include <horovod_cpp/hvd.h>
#include <horovod_cpp/torch/collectives.h>

namespace hvd::torch::detail {
namespace {

using ::torch::autograd::AutogradContext;
using ::torch::autograd::Function;
using ::torch::autograd::tensor_list;

// What a backward pass needs of the options, in what a context can hold.
void keep(AutogradContext* context, const ReduceOptions& options) {
  context->saved_data["op"] = static_cast<std::int64_t>(options.op);
  context->saved_data["prescale"] = options.prescale;
  context->saved_data["postscale"] = options.postscale;
  context->saved_data["process_set"] = static_cast<std::int64_t>(options.process_set.id());
}
ProcessSet kept_set(AutogradContext* context) {
  return ProcessSet(static_cast<int>(context->saved_data["process_set"].toInt()));
}
// Backward passes use no names, as the same operation may be in several graphs.
ReduceOptions kept_options(AutogradContext* context) {
  return {.op = static_cast<ReduceOp>(context->saved_data["op"].toInt()),
          .prescale = context->saved_data["prescale"].toDouble(),
          .postscale = context->saved_data["postscale"].toDouble(),
          .process_set = kept_set(context)};
}

// The same reduction, with the same factors, of the incoming gradients.
struct Allreduce : Function<Allreduce> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& tensor, const ReduceOptions& options,
                            const Site& site) {
    keep(context, options);
    return allreduce_async(tensor, options, site).wait();
  }
  static tensor_list backward(AutogradContext* context, const tensor_list& gradients) {
    return {allreduce(gradients[0], kept_options(context)), {}, {}};
  }
};

// This rank's rows of the average of the incoming gradients.
struct Allgather : Function<Allgather> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& tensor, const CollectiveOptions& options,
                            const Site& site) {
    keep(context, {.process_set = options.process_set});
    context->saved_data["rows"] = tensor.dim() > 0 ? tensor.size(0) : 0;
    return allgather_async(tensor, options, site).wait();
  }
  static tensor_list backward(AutogradContext* context, const tensor_list& gradients) {
    const ProcessSet set = kept_set(context);
    const std::int64_t rows = context->saved_data["rows"].toInt();
    const at::Tensor averaged = allreduce(gradients[0], {.process_set = set});
    const hvd::Output<std::int64_t> all = hvd::allgather(rows, {.process_set = set});
    const std::int64_t first = std::accumulate(all.begin(), all.begin() + set.rank(), std::int64_t{0});
    return {averaged.narrow(0, first, rows), {}, {}};
  }
};

// The average of the incoming gradients on the root, zeros elsewhere.
struct Broadcast : Function<Broadcast> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& tensor, int root_rank,
                            const CollectiveOptions& options, const Site& site) {
    keep(context, {.process_set = options.process_set});
    context->saved_data["root_rank"] = static_cast<std::int64_t>(root_rank);
    return broadcast_async(tensor, root_rank, options, site).wait();
  }
  static tensor_list backward(AutogradContext* context, const tensor_list& gradients) {
    const at::Tensor averaged = allreduce(gradients[0], {.process_set = kept_set(context)});
    const bool is_root = context->saved_data["root_rank"].toInt() == hvd::rank();
    return {is_root ? averaged : at::zeros_like(averaged), {}, {}, {}};
  }
};

// The incoming gradients of all ranks, one behind the other; of a sum, times the number of ranks.
struct Reducescatter : Function<Reducescatter> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& tensor, const ReduceOptions& options,
                            const Site& site) {
    keep(context, options);
    return reducescatter_async(tensor, options, site).wait();
  }
  static tensor_list backward(AutogradContext* context, const tensor_list& gradients) {
    const ReduceOptions options = kept_options(context);
    const double ranks = options.op == ReduceOp::kSum ? options.process_set.size() : 1;
    const at::Tensor gathered = allgather(gradients[0], {.process_set = options.process_set});
    return {gathered.mul(ranks * options.prescale * options.postscale), {}, {}};
  }
};

// The incoming gradients go back where their rows came from.
struct Alltoall : Function<Alltoall> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& tensor, const std::vector<std::int64_t>& splits,
                            const CollectiveOptions& options, const Site& site) {
    keep(context, {.process_set = options.process_set});
    context->saved_data["rows"] = tensor.dim() > 0 ? tensor.size(0) : 0;
    Handle handle = alltoall_async(tensor, splits, options, site);
    at::Tensor output = handle.wait();
    context->saved_data["received"] = handle.received_splits();
    return output;
  }
  static tensor_list backward(AutogradContext* context, const tensor_list& gradients) {
    const std::vector<std::int64_t> received = context->saved_data["received"].toIntVector();
    at::Tensor returned = alltoall(gradients[0], received, {.process_set = kept_set(context)});
    if (const std::int64_t left = context->saved_data["rows"].toInt() - returned.size(0); left > 0) {
      std::vector<std::int64_t> shape = returned.sizes().vec();  // rows that went to nobody
      shape[0] = left;
      returned = at::cat({returned, returned.new_zeros(shape)});
    }
    return {returned, {}, {}, {}};
  }
};

// As of one tensor; options and call site, which come behind the tensors, have no gradient.
tensor_list of_group(tensor_list gradients) {
  gradients.resize(gradients.size() + 2);
  return gradients;
}

struct GroupedAllreduce : Function<GroupedAllreduce> {
  static tensor_list forward(AutogradContext* context, at::TensorList tensors, const ReduceOptions& options,
                             const Site& site) {
    keep(context, options);
    return grouped_allreduce_async(tensors, options, site).wait();
  }
  static tensor_list backward(AutogradContext* context, const tensor_list& gradients) {
    return of_group(grouped_allreduce(gradients, kept_options(context)));
  }
};

struct GroupedAllgather : Function<GroupedAllgather> {
  static tensor_list forward(AutogradContext* context, at::TensorList tensors, const CollectiveOptions& options,
                             const Site& site) {
    keep(context, {.process_set = options.process_set});
    std::vector<std::int64_t> rows;
    for (const at::Tensor& tensor : tensors) rows.push_back(tensor.dim() > 0 ? tensor.size(0) : 0);
    context->saved_data["rows"] = rows;
    return grouped_allgather_async(tensors, options, site).wait();
  }
  static tensor_list backward(AutogradContext* context, const tensor_list& gradients) {
    const ProcessSet set = kept_set(context);
    const std::vector<std::int64_t> rows = context->saved_data["rows"].toIntVector();
    tensor_list averaged = grouped_allreduce(gradients, {.process_set = set});
    const at::Tensor own = at::empty({1, static_cast<std::int64_t>(rows.size())}, at::kLong);
    std::copy(rows.begin(), rows.end(), own.data_ptr<std::int64_t>());
    const at::Tensor first = allgather(own, {.process_set = set}).narrow(0, 0, set.rank()).sum(0);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      averaged[i] = averaged[i].narrow(0, first.data_ptr<std::int64_t>()[i], rows[i]);
    }
    return of_group(std::move(averaged));
  }
};

struct GroupedReducescatter : Function<GroupedReducescatter> {
  static tensor_list forward(AutogradContext* context, at::TensorList tensors, const ReduceOptions& options,
                             const Site& site) {
    keep(context, options);
    return grouped_reducescatter_async(tensors, options, site).wait();
  }
  static tensor_list backward(AutogradContext* context, const tensor_list& gradients) {
    const ReduceOptions options = kept_options(context);
    const double ranks = options.op == ReduceOp::kSum ? options.process_set.size() : 1;
    tensor_list gathered = grouped_allgather(gradients, {.process_set = options.process_set});
    for (at::Tensor& gradient : gathered) gradient = gradient.mul(ranks * options.prescale * options.postscale);
    return of_group(std::move(gathered));
  }
};

}  // namespace

bool needs_gradient(const at::Tensor& tensor) {
  return tensor.defined() && tensor.requires_grad() && at::GradMode::is_enabled();
}

at::Tensor differentiable_allreduce(const at::Tensor& tensor, const ReduceOptions& options, Site site) {
  return Allreduce::apply(tensor, options, site);
}
at::Tensor differentiable_allgather(const at::Tensor& tensor, const CollectiveOptions& options, Site site) {
  return Allgather::apply(tensor, options, site);
}
at::Tensor differentiable_broadcast(const at::Tensor& tensor, int root_rank, const CollectiveOptions& options,
                                    Site site) {
  return Broadcast::apply(tensor, root_rank, options, site);
}
at::Tensor differentiable_reducescatter(const at::Tensor& tensor, const ReduceOptions& options, Site site) {
  return Reducescatter::apply(tensor, options, site);
}
at::Tensor differentiable_alltoall(const at::Tensor& tensor, std::span<const std::int64_t> splits,
                                   const CollectiveOptions& options, Site site) {
  return Alltoall::apply(tensor, std::vector<std::int64_t>(splits.begin(), splits.end()), options, site);
}

std::vector<at::Tensor> differentiable_grouped_allreduce(at::TensorList tensors, const ReduceOptions& options,
                                                         Site site) {
  return GroupedAllreduce::apply(tensors, options, site);
}
std::vector<at::Tensor> differentiable_grouped_allgather(at::TensorList tensors, const CollectiveOptions& options,
                                                         Site site) {
  return GroupedAllgather::apply(tensors, options, site);
}
std::vector<at::Tensor> differentiable_grouped_reducescatter(at::TensorList tensors, const ReduceOptions& options,
                                                             Site site) {
  return GroupedReducescatter::apply(tensors, options, site);
}

}  // namespace hvd::torch::detail
