#include "torch/tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>

#include <memory>
#include <optional>
#include <utility>

#include "torch/streams.h"

namespace hvd::torch::detail {
namespace {

std::optional<std::int32_t> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::ScalarType::Byte:
      return HVD_UINT8;
    case at::ScalarType::Char:
      return HVD_INT8;
    case at::ScalarType::Short:
      return HVD_INT16;
    case at::ScalarType::Int:
      return HVD_INT32;
    case at::ScalarType::Long:
      return HVD_INT64;
    case at::ScalarType::Half:
      return HVD_FLOAT16;
    case at::ScalarType::BFloat16:
      return HVD_BFLOAT16;
    case at::ScalarType::Float:
      return HVD_FLOAT32;
    case at::ScalarType::Double:
      return HVD_FLOAT64;
    case at::ScalarType::Bool:
      return HVD_BOOL;
    case at::ScalarType::ComplexHalf:
      return HVD_COMPLEX32;
    case at::ScalarType::ComplexFloat:
      return HVD_COMPLEX64;
    case at::ScalarType::ComplexDouble:
      return HVD_COMPLEX128;
    default:
      return std::nullopt;
  }
}

std::string text_of(const Submission& submission) {
  return hvd::detail::operation_text(submission.kind, submission.name);
}

hvd_tensor described(const at::Tensor& tensor) {
  return {tensor.data_ptr(),
          tensor.sizes().data(),
          static_cast<std::int32_t>(tensor.dim()),
          *dtype_of(tensor.scalar_type()),
          tensor.is_cuda() ? HVD_CUDA : HVD_HOST,
          tensor.is_cuda() ? tensor.device().index() : 0,
          nullptr};
}

std::vector<hvd_tensor> described(const std::vector<at::Tensor>& tensors) {
  std::vector<hvd_tensor> all;
  all.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) all.push_back(described(tensor));
  return all;
}

using Kept = std::vector<at::Tensor>;

void release(void* kept) { delete static_cast<Kept*>(kept); }

// A tensor in memory of the library, which it holds on to.
at::Tensor adopted(const hvd_output& output, const std::shared_ptr<hvd::detail::Operation>& operation,
                   const at::Tensor& source) {
  const at::IntArrayRef shape(output.shape, static_cast<std::size_t>(output.dimensions));
  if (output.bytes == 0) return at::empty(shape, source.options());
  return at::from_blob(output.data, shape, [operation](void*) {}, source.options());
}

}  // namespace

Submission submission(hvd_op op, const char* kind, const ReduceOptions& options, bool waits, Site site) {
  return {.op = op,
          .kind = kind,
          .name = options.name,
          .process_set = options.process_set,
          .caller_waits = waits,
          .reduce_op = options.op,
          .prescale = options.prescale,
          .postscale = options.postscale,
          .site = site};
}

Submission submission(hvd_op op, const char* kind, const CollectiveOptions& options, bool waits, Site site) {
  return {.op = op,
          .kind = kind,
          .name = options.name,
          .process_set = options.process_set,
          .caller_waits = waits,
          .site = site};
}

void refuse(const Submission& submission, const std::string& reason) {
  hvd::detail::raise(StatusCode::kInvalidArgument, text_of(submission), reason, submission.site);
}

at::Tensor plain(const at::Tensor& tensor, const Submission& submission) {
  if (!tensor.defined()) refuse(submission, "the tensor is undefined");
  const bool travels = dtype_of(tensor.scalar_type()) && tensor.layout() == at::kStrided;
  if (!travels || !(tensor.is_cpu() || tensor.is_cuda())) {
    refuse(submission, "a tensor of type " + tensor.toString() +
                           " cannot travel; dense CPU and CUDA tensors can, of numbers of up to 64 bits and of complex "
                           "ones made of these");
  }
  const bool can_be_added = submission.reduce_op == ReduceOp::kSum || submission.reduce_op == ReduceOp::kAverage;
  if (tensor.is_complex() && !can_be_added) refuse(submission, "complex numbers can be summed and averaged only");
  const at::Tensor data = tensor.is_conj() ? tensor.detach().resolve_conj() : tensor.detach();
  return data.is_contiguous() && !data.is_neg() ? data : data.clone(at::MemoryFormat::Contiguous);
}

Place place(const at::Tensor& tensor, const Submission& submission, Output output) {
  Place made{.source = plain(tensor, submission), .target = {}, .in_place = {}};
  const bool copied = tensor.data_ptr() != made.source.data_ptr();
  if (output == Output::kInPlace) made.in_place = tensor;
  if (output != Output::kMadeByLibrary) {
    made.target = output == Output::kInPlace || copied ? made.source : at::empty_like(made.source);
  }
  return made;
}

at::Tensor result(const Place& place, const std::shared_ptr<hvd::detail::Operation>& operation, int index) {
  at::Tensor output =
      place.target.defined() ? place.target : adopted(operation->output(index), operation, place.source);
  if (place.target.defined()) claim(output);
  if (!place.in_place.defined()) return output;
  if (place.in_place.data_ptr() != output.data_ptr()) place.in_place.detach().copy_(output);
  return place.in_place;
}

std::shared_ptr<hvd::detail::Operation> taken(std::shared_ptr<hvd::detail::Operation>& operation, const Site& site) {
  in_flight(operation, site);
  return std::exchange(operation, nullptr);
}

const hvd::detail::Operation& in_flight(const std::shared_ptr<hvd::detail::Operation>& operation, const Site& site) {
  if (operation) return *operation;
  hvd::detail::raise(StatusCode::kPrecondition, "wait", "the handle is empty: its result has been taken", site);
}

hvd::detail::Operation submit(const Submission& submission, const std::vector<at::Tensor>& inputs,
                              const std::vector<at::Tensor>& outputs) {
  const std::vector<hvd_tensor> described_inputs = described(inputs);
  const std::vector<hvd_tensor> described_outputs = described(outputs);
  hvd_operation operation;
  HVD_INIT_STRUCT(&operation);
  operation.op = submission.op;
  operation.process_set = submission.process_set.id();
  operation.reduce_op = static_cast<std::int32_t>(submission.reduce_op);
  operation.root_rank = submission.root_rank;
  operation.call_site_file = submission.site.file_name();
  operation.call_site_line = static_cast<std::int32_t>(submission.site.line());
  operation.name = submission.name.empty() ? nullptr : submission.name.c_str();
  operation.prescale = submission.prescale;
  operation.postscale = submission.postscale;
  operation.caller_waits = submission.caller_waits ? 1 : 0;
  operation.stream = native_stream(inputs.front().device());
  if (!submission.group) {
    operation.input = described_inputs.front();
    if (!outputs.empty()) operation.output = described_outputs.front();
  } else {
    operation.group_count = static_cast<std::int32_t>(inputs.size());
    operation.group_inputs = described_inputs.data();
    operation.group_outputs = described_outputs.data();
  }
  if (!submission.splits.empty()) {
    operation.splits = submission.splits.data();
    operation.split_count = static_cast<std::int32_t>(submission.splits.size());
  }
  auto kept = std::make_unique<Kept>(inputs);
  kept->insert(kept->end(), outputs.begin(), outputs.end());
  operation.keep_alive = kept.get();
  operation.release = release;
  hvd_handle* handle = nullptr;
  hvd::detail::check(hvd_enqueue(&operation, &handle), text_of(submission), submission.site);
  static_cast<void>(kept.release());  // `release` has it now
  return {handle, text_of(submission), submission.site, submission.group ? static_cast<int>(inputs.size()) : 1};
}

}  // namespace hvd::torch::detail
