#include "torch/sparse.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_validate_sparse_coo_tensor_args.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sparse_coo_tensor.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <utility>

#include "torch/attributes.h"
#include "torch/streams.h"
#include "torch/tensors.h"

namespace hvd::torch {
namespace detail {
namespace {

constexpr std::array<std::string_view, 4> kAttributes{"data type", "shape", "number of sparse dimensions", "reduction"};

// As Python calls it, of those that travel.
std::string name_of(at::ScalarType type) {
  if (type == at::kBool) return "bool";
  if (type == at::kBFloat16) return "bfloat16";
  const bool is_real = at::isFloatingType(type);
  const char* kind = at::isComplexType(type) ? "complex" : is_real ? "float" : type == at::kByte ? "uint" : "int";
  return kind + std::to_string(8 * at::elementSize(type));
}

std::string shape_text(at::IntArrayRef shape) {
  std::string text = "[";
  for (const std::int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

at::Tensor attributes_of(const at::Tensor& tensor, ReduceOp op, const Site& site) {
  const std::array<std::string, kAttributes.size()> values{name_of(tensor.scalar_type()), shape_text(tensor.sizes()),
                                                           std::to_string(tensor.sparse_dim()),
                                                           op == ReduceOp::kAverage ? "Average" : "Sum"};
  const std::string line = encode_attributes(values, site);
  const std::vector<std::uint8_t> bytes(line.begin(), line.end());
  return at::tensor(bytes, at::kByte).to(tensor.device(), /*non_blocking=*/true);
}

// One byte: whether an index is none of the shape. Ranks may disagree about that, and so about the length.
at::Tensor is_outside(const at::Tensor& flat_indices, const SparseReduction& reduction) {
  at::Tensor found = at::zeros({1}, flat_indices.options().dtype(at::kByte));
  for (std::int64_t dimension = 0; dimension < reduction.sparse_dimensions; ++dimension) {
    const std::int64_t size = reduction.shape[static_cast<std::size_t>(dimension)];
    const at::Tensor column = flat_indices.slice(/*dim=*/0, dimension, std::nullopt, reduction.sparse_dimensions);
    found.bitwise_or_(column.lt(0).logical_or_(column.ge(size)).any());
  }
  return found;
}

// `bytes`: the attributes of all ranks, in host memory.
void require_alike(const at::Tensor& bytes, const SparseReduction& reduction) {
  const std::string_view lines(reinterpret_cast<const char*>(bytes.data_ptr()), bytes.nbytes());
  const std::string different = disagreements(kAttributes, lines, reduction.ranks);
  if (!different.empty()) {
    hvd::detail::raise(StatusCode::kInvalidArgument, reduction.text, different, reduction.site);
  }
}

// The indices and the values of a COO tensor.
std::pair<at::Tensor, at::Tensor> shaped(const at::Tensor& indices, const at::Tensor& values,
                                         const SparseReduction& reduction) {
  const std::int64_t dimensions = reduction.sparse_dimensions;
  const at::IntArrayRef dense = at::IntArrayRef(reduction.shape).slice(static_cast<std::size_t>(dimensions));
  const std::int64_t numbers_of_entry = std::max<std::int64_t>(c10::multiply_integers(dense), 1);
  const std::int64_t entries = dimensions > 0 ? indices.numel() / dimensions : values.numel() / numbers_of_entry;
  std::vector<std::int64_t> shape = dense.vec();
  shape.insert(shape.begin(), entries);
  return {indices.reshape({entries, dimensions}).t(), values.reshape(shape)};
}

at::Tensor divided(const at::Tensor& values, std::int64_t divisor) {
  // A sum of bools is "or", and so is their average.
  if (divisor == 1 || values.scalar_type() == at::kBool) return values;
  const bool is_exact = values.is_floating_point() || values.is_complex();
  return is_exact ? values.div(divisor) : values.div(divisor, "trunc");
}

}  // namespace

SparseReduction start_sparse(const at::Tensor& tensor, const ReduceOptions& options, Site site) {
  const Submission whole = submission(HVD_ALLGATHER, "sparse allreduce", options, /*waits=*/false, site);
  if (!tensor.defined() || tensor.layout() != at::kSparse) {
    refuse(whole, "takes COO tensors; this one is " + tensor.toString());
  }
  if (options.op != ReduceOp::kAverage && options.op != ReduceOp::kSum) refuse(whole, "op must be Average or Sum");
  if (options.prescale != 1.0 || options.postscale != 1.0) refuse(whole, "takes no factors");
  const at::Tensor entries = tensor.detach().coalesce();  // one entry for each place travels
  const at::Tensor values = plain(entries.values(), whole).reshape({-1}).view(at::kByte);
  const std::vector<at::Tensor> parts{attributes_of(entries, options.op, site), entries.indices().t().reshape({-1}),
                                      values};
  Submission gather = whole;
  gather.reduce_op = ReduceOp::kSum;
  gather.group = true;
  SparseReduction made;
  std::vector<at::Tensor> sources;
  for (const at::Tensor& part : parts) {
    sources.push_back(made.places.emplace_back(place(part, gather, Output::kMadeByLibrary)).source);
  }
  made.type = entries.scalar_type();
  made.shape = entries.sizes().vec();
  made.sparse_dimensions = entries.sparse_dim();
  made.ranks = options.process_set.ranks(site);
  made.divisor = options.op == ReduceOp::kAverage ? static_cast<std::int64_t>(made.ranks.size()) : 1;
  made.text = hvd::detail::operation_text(whole.kind, whole.name);
  made.site = site;
  made.operation = std::make_shared<hvd::detail::Operation>(submit(gather, sources, {}));
  return made;
}

at::Tensor finish_sparse(const SparseReduction& reduction) {
  reduction.operation->wait();
  hvd_handle* const handle = reduction.operation->get();
  let_stream_wait({&handle, 1}, reduction.places.front().source.device());
  const auto part = [&](int index) {
    return result(reduction.places[static_cast<std::size_t>(index)], reduction.operation, index);
  };
  const at::Tensor flat_indices = part(1);
  // The one time that the host waits for a GPU.
  const at::Tensor bytes = at::cat({part(0), is_outside(flat_indices, reduction)}).cpu();
  require_alike(bytes.slice(/*dim=*/0, 0, -1), reduction);
  const auto [indices, values] = shaped(flat_indices, part(2).view(reduction.type), reduction);
  try {
    // Torch's own check, which reads from the device, has the text.
    if (bytes[-1].item<std::uint8_t>() != 0) at::_validate_sparse_coo_tensor_args(indices, values, reduction.shape);
  } catch (const c10::Error& error) {  // on all ranks, as all have gathered the same
    const std::string reason = std::string("a rank has a bad index: ") + error.what_without_backtrace();
    hvd::detail::raise(StatusCode::kInvalidArgument, reduction.text, reason, reduction.site);
  }
  return at::sparse_coo_tensor(indices, divided(values, reduction.divisor), reduction.shape,
                               values.options().layout(at::kSparse));
}

at::Tensor sparse_zeros(const at::Tensor& like, std::int64_t sparse_dimensions) {
  std::vector<std::int64_t> shape = like.sizes().slice(static_cast<std::size_t>(sparse_dimensions)).vec();
  shape.insert(shape.begin(), 0);
  return at::sparse_coo_tensor(at::empty({sparse_dimensions, 0}, like.options().dtype(at::kLong)),
                               at::empty(shape, like.options()), like.sizes(), like.options().layout(at::kSparse));
}

}  // namespace detail

SparseHandle::SparseHandle(detail::SparseReduction reduction)
    : reduction_(std::make_shared<detail::SparseReduction>(std::move(reduction))) {}

bool SparseHandle::done(Site site) const {
  return detail::in_flight(reduction_ ? reduction_->operation : nullptr, site).done();
}

at::Tensor SparseHandle::wait(Site site) {
  detail::in_flight(reduction_ ? reduction_->operation : nullptr, site);
  return detail::finish_sparse(*std::exchange(reduction_, nullptr));
}

SparseHandle sparse_allreduce_async(const at::Tensor& tensor, const ReduceOptions& options, Site site) {
  return SparseHandle(detail::start_sparse(tensor, options, site));
}
at::Tensor sparse_allreduce(const at::Tensor& tensor, const ReduceOptions& options, Site site) {
  return detail::finish_sparse(detail::start_sparse(tensor, options, site));
}

}  // namespace hvd::torch
