#include "horovod_cpp/engine/c_api_operation.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "horovod_cpp/engine/op_rules/op_rule.h"

namespace hvd::c_api {
namespace {

bool is_complex(const hvd_tensor& tensor) { return (tensor.dtype & HVD_COMPLEX) != 0; }
// That of the parts of complex numbers.
DataType dtype_of(const hvd_tensor& tensor) { return static_cast<DataType>(tensor.dtype & ~HVD_COMPLEX); }

bool can_be_dtype(std::int32_t number) {
  if ((number & HVD_COMPLEX) == 0) return number >= 0 && number <= 0x7f;  // it has a byte in messages
  return number == HVD_COMPLEX32 || number == HVD_COMPLEX64 || number == HVD_COMPLEX128;
}

Status check_tensor(const hvd_tensor& tensor, const char* what) {
  if (tensor.dimensions < 0 || tensor.dimensions > 64 || (tensor.dimensions > 0 && tensor.shape == nullptr)) {
    return Status::invalid_argument(
        fmt::format("{} has {} dimensions without a usable shape", what, tensor.dimensions));
  }
  if (!can_be_dtype(tensor.dtype)) {
    return Status::invalid_argument(fmt::format("data type number {} is not known", tensor.dtype));
  }
  if (tensor.memory_kind != HVD_HOST && tensor.memory_kind != HVD_CUDA) {
    return Status::invalid_argument(fmt::format(
        "{} lies in memory of kind {}; there are host memory (0) and CUDA memory (1)", what, tensor.memory_kind));
  }
  return {};
}

std::string place_text(const hvd_tensor& tensor) {
  return tensor.memory_kind == HVD_CUDA ? fmt::format("CUDA device {}", tensor.device) : std::string("host memory");
}

// All in one memory.
Status check_places(std::span<const hvd_tensor> inputs, std::span<const hvd_tensor> outputs) {
  const hvd_tensor& first = inputs.front();
  for (const std::span<const hvd_tensor> some : {inputs, outputs}) {
    for (const hvd_tensor& other : some) {
      const bool same_device = first.memory_kind == HVD_HOST || other.device == first.device;
      if (other.memory_kind == first.memory_kind && same_device) continue;
      return Status::invalid_argument(
          fmt::format("the tensors of one operation lie in {} and in {}", place_text(first), place_text(other)));
    }
  }
  return {};
}

std::span<const std::int64_t> shape_of(const hvd_tensor& tensor) {
  return {tensor.shape, static_cast<std::size_t>(tensor.dimensions)};
}

// As the engine sees it: the two parts of complex numbers are a dimension, the last.
void assign_shape(Shape& shape, const hvd_tensor& tensor) {
  const std::span<const std::int64_t> sizes = shape_of(tensor);
  shape.assign(sizes.begin(), sizes.end());
  if (is_complex(tensor)) shape.push_back(2);
}

bool has_tensors(OpKind op) { return op != OpKind::kBarrier && op != OpKind::kJoin; }
bool has_reduction(OpKind op) { return op == OpKind::kAllreduce || op == OpKind::kReducescatter; }
bool fills_memory_of_caller(OpKind op) { return op == OpKind::kAllreduce || op == OpKind::kBroadcast; }

bool is_operation(std::int32_t op) {
  return (op >= HVD_ALLREDUCE && op <= HVD_BARRIER) || (op >= HVD_REDUCESCATTER && op <= HVD_JOIN);
}

std::span<const hvd_tensor> inputs_of(const hvd_operation& operation) {
  if (operation.group_count == 0) return {&operation.input, 1};
  return {operation.group_inputs, static_cast<std::size_t>(operation.group_count)};
}

// Empty where the engine makes the outputs.
std::span<const hvd_tensor> outputs_of(const hvd_operation& operation, OpKind op) {
  if (!fills_memory_of_caller(op)) return {};
  if (operation.group_count == 0) return {&operation.output, 1};
  return {operation.group_outputs, static_cast<std::size_t>(operation.group_count)};
}

Status check_group(const hvd_operation& operation, OpKind op) {
  if (operation.group_count == 0) return {};
  if (!find_op_rule(op)->groupable) {
    return Status::invalid_argument(fmt::format("{} takes no group of tensors", name_of(op)));
  }
  const bool without_outputs = fills_memory_of_caller(op) && operation.group_outputs == nullptr;
  if (operation.group_count < 0 || operation.group_inputs == nullptr || without_outputs) {
    return Status::invalid_argument(fmt::format("a group of {} tensors comes without them", operation.group_count));
  }
  return {};
}

Status read_attributes(const hvd_operation& operation, Request& request) {
  if (!is_operation(operation.op)) {
    return Status::invalid_argument(fmt::format("operation number {} is not known", operation.op));
  }
  if (operation.process_set < 0 || operation.process_set > 0xffff) {
    return Status::invalid_argument(
        fmt::format("Process set provided does not exist, or has not been registered. (id {})", operation.process_set));
  }
  const auto op = static_cast<OpKind>(operation.op);
  request.key.op = op;
  request.key.process_set = static_cast<ProcessSetId>(operation.process_set);
  if (operation.name != nullptr) request.key.name = operation.name;
  if (op == OpKind::kJoin) request.key.name = kJoinName;
  if (!has_tensors(op)) return {};
  HVD_RETURN_IF_ERROR(check_group(operation, op));
  const std::span<const hvd_tensor> inputs = inputs_of(operation);
  for (const hvd_tensor& input : inputs) HVD_RETURN_IF_ERROR(check_tensor(input, "the input"));
  HVD_RETURN_IF_ERROR(check_places(inputs, outputs_of(operation, op)));
  if (inputs.front().memory_kind == HVD_CUDA) request.memory = MemoryKind::kDevice;
  request.dtype = dtype_of(inputs.front());
  request.is_complex = is_complex(inputs.front());
  assign_shape(request.shape, inputs.front());
  for (const hvd_tensor& input : inputs.subspan(1)) {
    TensorType& type = request.more.emplace_back(dtype_of(input), Shape(), kCOrder, is_complex(input));
    assign_shape(type.shape, input);
  }
  if (has_reduction(op)) {
    request.reduce_op = static_cast<ReduceOp>(operation.reduce_op);
    request.prescale = operation.prescale;
    request.postscale = operation.postscale;
    const bool adds = request.reduce_op == ReduceOp::kSum || request.reduce_op == ReduceOp::kAverage;
    if (!adds && std::any_of(inputs.begin(), inputs.end(), is_complex)) {
      return Status::invalid_argument("complex numbers can be summed and averaged only");
    }
  }
  if (op == OpKind::kBroadcast) request.root_rank = operation.root_rank;
  if (op == OpKind::kAlltoall && operation.splits != nullptr) {
    request.splits.assign(operation.splits, operation.splits + std::max(operation.split_count, 0));
    request.has_splits = true;
  }
  return {};
}

// Memory that an operation on tensors needs; an empty tensor may have none.
Status check_memory(const Request& request, const hvd_operation& operation) {
  if (!has_tensors(request.key.op)) return {};
  const std::span<const hvd_tensor> inputs = inputs_of(operation);
  const std::span<const hvd_tensor> outputs = outputs_of(operation, request.key.op);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const std::span<const std::int64_t> shape = shape_of(inputs[i]);
    Result<std::int64_t> count = element_count(shape);
    if (!count) return count.status();
    if (*count > 0 && (inputs[i].data == nullptr || (!outputs.empty() && outputs[i].data == nullptr))) {
      return Status::invalid_argument(
          fmt::format("{}: a tensor of shape {} comes without memory", operation_text(request.key), shape_text(shape)));
    }
  }
  return {};
}

Result<MemoryOrder> order_of(const hvd_tensor& tensor) {
  if (tensor.strides == nullptr) return kCOrder;
  const std::span<const std::int64_t> strides(tensor.strides, static_cast<std::size_t>(tensor.dimensions));
  if (!is_complex(tensor)) return memory_order(shape_of(tensor), strides);
  Shape shape;
  assign_shape(shape, tensor);
  Shape of_parts(strides.begin(), strides.end());
  for (std::int64_t& stride : of_parts) stride *= 2;
  of_parts.push_back(1);
  return memory_order(shape, of_parts);
}

// Once shapes have been checked.
Status read_orders(const hvd_operation& operation, Request& request) {
  if (!has_tensors(request.key.op)) return {};
  const std::span<const hvd_tensor> inputs = inputs_of(operation);
  const std::span<const hvd_tensor> outputs = outputs_of(operation, request.key.op);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    Result<MemoryOrder> order = order_of(inputs[i]);
    if (!order) {
      return Status::invalid_argument(fmt::format("{}: {}", operation_text(request.key), order.status().text()));
    }
    (i == 0 ? request.order : request.more[i - 1].order) = *order;
    if (outputs.empty()) continue;
    hvd_tensor output = inputs[i];  // whose shape the output has
    output.strides = outputs[i].strides;
    Result<MemoryOrder> of_output = order_of(output);
    if (of_output.ok() && *of_output == *order) continue;
    return Status::invalid_argument(
        fmt::format("{}: the output of a tensor of shape {} has other strides than the input",
                    operation_text(request.key), shape_text(shape_of(inputs[i]))));
  }
  return {};
}

}  // namespace

Status read_request(const hvd_operation& operation, Request& request) {
  HVD_RETURN_IF_ERROR(read_attributes(operation, request));
  HVD_RETURN_IF_ERROR(check_memory(request, operation));
  return read_orders(operation, request);
}

void take_memory(const hvd_operation& operation, TensorEntry& entry, CallerOutputs& to_fill) {
  if (!has_tensors(entry.request.key.op)) return;
  const std::span<const hvd_tensor> inputs = inputs_of(operation);
  const std::span<const hvd_tensor> outputs = outputs_of(operation, entry.request.key.op);
  if (entry.request.memory != MemoryKind::kHost) {
    entry.device = inputs.front().device;
    entry.producer = operation.stream;
    entry.caller_waits = operation.caller_waits != 0;
  }
  std::size_t i = 0;
  for_each_tensor(entry.request, [&](DataType dtype, const Shape& shape) {
    if (is_complex(inputs[i])) {
      to_fill.is_complex.resize(inputs.size());
      to_fill.is_complex[i] = true;
    }
    TensorEntry::Memory memory{static_cast<const std::byte*>(inputs[i].data), nullptr};
    if (!outputs.empty()) {
      memory.output = static_cast<std::byte*>(outputs[i].data);
      to_fill.tensors.push_back({memory.output, bytes_of(dtype, shape), to_fill.dimensions.size(), shape.size()});
      to_fill.dimensions.insert(to_fill.dimensions.end(), shape.begin(), shape.end());
    }
    if (i++ == 0) {
      entry.input = memory.input;
      entry.output = memory.output;
    } else {
      entry.more.push_back(memory);
    }
  });
}

}  // namespace hvd::c_api
