// Operations of the C ABI: memory goes in as addresses, a Handle comes out.
// The GIL stays held in enqueue, which does not block: a switch of threads there would delay a backward pass.
#include <pybind11/stl.h>

#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include <horovod_cpp/buckets.h>

#include "horovod_cpp/bindings/bind.h"
#include "horovod_cpp/bindings/dlpack.h"
#include "horovod_cpp/bindings/gil.h"
#include "horovod_cpp/bindings/handle.h"

namespace py = pybind11;

namespace hvd::bindings {
namespace {

// Gets the reference that enqueue took. Runs inside a function of the C ABI, where the GIL may be let go.
void release_reference(void* object) { drop_reference(static_cast<PyObject*>(object)); }

const char* text_or_null(const std::optional<std::string>& text) { return text ? text->c_str() : nullptr; }

// What all operations have.
struct Common {
  const std::optional<std::string>& name;
  int process_set;
  const std::optional<std::string>& call_site_file;
  int call_site_line;
  bool caller_waits;
};

hvd_operation begin(int op, const Common& common) {
  refuse_after_fork();
  if (common.name && common.name->find('\0') != std::string::npos) {
    throw py::value_error("a name may not contain a zero byte");
  }
  hvd_operation operation;
  HVD_INIT_STRUCT(&operation);
  operation.op = op;
  operation.process_set = common.process_set;
  operation.call_site_line = common.call_site_line;
  operation.call_site_file = text_or_null(common.call_site_file);
  operation.name = text_or_null(common.name);
  operation.caller_waits = common.caller_waits ? 1 : 0;
  operation.prescale = operation.postscale = 1.0;
  return operation;
}

Handle hand_over(hvd_operation& operation, py::object keep_alive, std::vector<int> dtypes) {
  operation.keep_alive = keep_alive.ptr();
  operation.release = release_reference;
  hvd_handle* handle = nullptr;
  check(hvd_enqueue(&operation, &handle));
  static_cast<void>(keep_alive.release());  // release_reference has it now
  return {handle, std::move(dtypes)};
}

// Where tensors lie, as Python says it: a device below 0 is the host.
struct Place {
  int device;
  std::uintptr_t stream;
};

using Strides = std::optional<std::vector<std::int64_t>>;  // none: C order

hvd_tensor tensor(int dtype, const std::vector<std::int64_t>& shape, std::uintptr_t data, const Place& place,
                  const Strides& strides = std::nullopt) {
  if (strides && strides->size() != shape.size()) throw py::value_error("a tensor has one stride for each dimension");
  const bool on_device = place.device >= 0;
  return {reinterpret_cast<void*>(data),           shape.data(),
          static_cast<std::int32_t>(shape.size()), dtype,
          on_device ? HVD_CUDA : HVD_HOST,         on_device ? place.device : 0,
          strides ? strides->data() : nullptr};
}

Handle enqueue(int op, int dtype, const std::vector<std::int64_t>& shape, std::uintptr_t input, std::uintptr_t output,
               const std::optional<std::string>& name, int process_set, int reduce_op, int root_rank, double prescale,
               double postscale, const std::optional<std::string>& call_site_file, int call_site_line,
               bool caller_waits, int device, std::uintptr_t stream, py::object keep_alive, const Strides& strides) {
  hvd_operation operation = begin(op, {name, process_set, call_site_file, call_site_line, caller_waits});
  const Place place{device, stream};
  operation.stream = reinterpret_cast<void*>(stream);
  operation.reduce_op = reduce_op;
  operation.root_rank = root_rank;
  operation.prescale = prescale;
  operation.postscale = postscale;
  operation.input = tensor(dtype, shape, input, place, strides);
  operation.output = tensor(dtype, shape, output, place, strides);
  return hand_over(operation, std::move(keep_alive), {dtype});
}

int int_of(PyObject* number) {
  const long value = PyLong_AsLong(number);
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  if (value < std::numeric_limits<int>::min() || value > std::numeric_limits<int>::max()) {
    throw py::value_error("a number is out of range: " + std::to_string(value));
  }
  return static_cast<int>(value);
}

double double_of(PyObject* number) {
  const double value = PyFloat_AsDouble(number);
  if (value == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

// Borrowed from the Python object; null for None.
const char* text_of(PyObject* text) {
  if (text == Py_None) return nullptr;
  Py_ssize_t length = 0;
  const char* const bytes = PyUnicode_AsUTF8AndSize(text, &length);
  if (bytes == nullptr) throw py::error_already_set();
  if (std::strlen(bytes) != static_cast<std::size_t>(length)) {
    throw py::value_error("a name may not contain a zero byte");
  }
  return bytes;
}

// What most operations are, from tensor to handle without a copy of anything: a microsecond is what training notices
// in hundreds of small gradients. None where the tensors are not plain ones: enqueue() takes those.
py::object enqueue_plain(PyObject* const* arguments) {
  auto* const op = arguments[0];
  auto* const source = arguments[1];
  auto* const target = arguments[2];
  const std::optional<PlainTensor> input = plain_tensor_reader().read(source);
  if (!input) return py::none();
  const std::optional<PlainTensor> output = source == target ? input : plain_tensor_reader().read(target);
  if (!output) return py::none();
  refuse_after_fork();
  hvd_operation operation;
  HVD_INIT_STRUCT(&operation);
  operation.op = int_of(op);
  operation.name = text_of(arguments[3]);
  operation.process_set = int_of(arguments[4]);
  operation.reduce_op = int_of(arguments[5]);
  operation.root_rank = int_of(arguments[6]);
  operation.prescale = double_of(arguments[7]);
  operation.postscale = double_of(arguments[8]);
  operation.call_site_file = text_of(PyTuple_GetItem(arguments[9], 0));
  operation.call_site_line = int_of(PyTuple_GetItem(arguments[9], 1));
  operation.caller_waits = arguments[10] == Py_True ? 1 : 0;
  operation.input = {input->data, input->shape, input->dimensions, input->dtype, HVD_HOST, 0, nullptr};
  operation.output = {output->data, input->shape, input->dimensions, input->dtype, HVD_HOST, 0, nullptr};
  auto keep_alive = py::reinterpret_borrow<py::object>(source);
  if (source != target) keep_alive = py::make_tuple(keep_alive, py::reinterpret_borrow<py::object>(target));
  return py::cast(hand_over(operation, std::move(keep_alive), {input->dtype}));
}

PyObject* enqueue_plain_from_python(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) {
  constexpr Py_ssize_t kArguments = 11;
  if (count != kArguments) {
    return PyErr_Format(PyExc_TypeError, "enqueue_plain() takes %zd arguments, not %zd", kArguments, count);
  }
  try {
    return enqueue_plain(arguments).release().ptr();
  } catch (...) {
    set_python_error();
    return nullptr;
  }
}

PyMethodDef enqueue_plain_method = {
    "enqueue_plain", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(enqueue_plain_from_python)),
    METH_FASTCALL, "As enqueue, for tensors that lie in host memory as they are; None for others. Does not block."};

// Dtype, shape, input, output, strides.
using Member = std::tuple<int, std::vector<std::int64_t>, std::uintptr_t, std::uintptr_t, Strides>;

Handle enqueue_group(int op, const std::vector<Member>& members, const std::optional<std::string>& name,
                     int process_set, int reduce_op, double prescale, double postscale,
                     const std::optional<std::string>& call_site_file, int call_site_line, bool caller_waits,
                     int device, std::uintptr_t stream, py::object keep_alive) {
  hvd_operation operation = begin(op, {name, process_set, call_site_file, call_site_line, caller_waits});
  const Place place{device, stream};
  operation.stream = reinterpret_cast<void*>(stream);
  std::vector<hvd_tensor> inputs;
  std::vector<hvd_tensor> outputs;
  std::vector<int> dtypes;
  for (const auto& [dtype, shape, input, output, strides] : members) {
    inputs.push_back(tensor(dtype, shape, input, place, strides));
    outputs.push_back(tensor(dtype, shape, output, place, strides));
    dtypes.push_back(dtype);
  }
  operation.reduce_op = reduce_op;
  operation.prescale = prescale;
  operation.postscale = postscale;
  operation.group_count = static_cast<std::int32_t>(inputs.size());
  operation.group_inputs = inputs.data();
  operation.group_outputs = outputs.data();
  return hand_over(operation, std::move(keep_alive), std::move(dtypes));
}

Handle enqueue_alltoall(int dtype, const std::vector<std::int64_t>& shape, std::uintptr_t input,
                        const std::optional<std::vector<std::int64_t>>& splits, const std::optional<std::string>& name,
                        int process_set, const std::optional<std::string>& call_site_file, int call_site_line,
                        bool caller_waits, int device, std::uintptr_t stream, py::object keep_alive) {
  static constexpr std::int64_t kNone = 0;
  hvd_operation operation = begin(HVD_ALLTOALL, {name, process_set, call_site_file, call_site_line, caller_waits});
  operation.input = tensor(dtype, shape, input, {device, stream});
  operation.stream = reinterpret_cast<void*>(stream);
  if (splits) {
    operation.splits = splits->empty() ? &kNone : splits->data();
    operation.split_count = static_cast<std::int32_t>(splits->size());
  }
  return hand_over(operation, std::move(keep_alive), {dtype});
}

Handle enqueue_join(const std::optional<std::string>& call_site_file, int call_site_line, int device) {
  hvd_operation operation =
      begin(HVD_JOIN, {std::nullopt, /*process_set=*/0, call_site_file, call_site_line, /*caller_waits=*/true});
  operation.input.memory_kind = device >= 0 ? HVD_CUDA : HVD_HOST;
  operation.input.device = device;
  return hand_over(operation, py::none(), {});
}

void bind_numbers(py::module_& module) {
  module.attr("ALLREDUCE") = static_cast<int>(HVD_ALLREDUCE);
  module.attr("ALLGATHER") = static_cast<int>(HVD_ALLGATHER);
  module.attr("BROADCAST") = static_cast<int>(HVD_BROADCAST);
  module.attr("BARRIER") = static_cast<int>(HVD_BARRIER);
  module.attr("REDUCESCATTER") = static_cast<int>(HVD_REDUCESCATTER);
  module.attr("ALLTOALL") = static_cast<int>(HVD_ALLTOALL);
  module.attr("UINT8") = static_cast<int>(HVD_UINT8);
  module.attr("INT8") = static_cast<int>(HVD_INT8);
  module.attr("INT16") = static_cast<int>(HVD_INT16);
  module.attr("INT32") = static_cast<int>(HVD_INT32);
  module.attr("INT64") = static_cast<int>(HVD_INT64);
  module.attr("FLOAT16") = static_cast<int>(HVD_FLOAT16);
  module.attr("FLOAT32") = static_cast<int>(HVD_FLOAT32);
  module.attr("FLOAT64") = static_cast<int>(HVD_FLOAT64);
  module.attr("BOOL") = static_cast<int>(HVD_BOOL);
  module.attr("BFLOAT16") = static_cast<int>(HVD_BFLOAT16);
  module.attr("COMPLEX32") = static_cast<int>(HVD_COMPLEX32);
  module.attr("COMPLEX64") = static_cast<int>(HVD_COMPLEX64);
  module.attr("COMPLEX128") = static_cast<int>(HVD_COMPLEX128);
  module.attr("BUCKET_BYTES") = kBucketBytes;
  module.attr("FIRST_BUCKET_BYTES") = kFirstBucketBytes;
  module.attr("BUCKET_ALIGNMENT_BYTES") = kBucketAlignmentBytes;
  module.attr("AVERAGE") = static_cast<int>(HVD_AVERAGE);
  module.attr("SUM") = static_cast<int>(HVD_SUM);
  module.attr("ADASUM") = static_cast<int>(HVD_ADASUM);
  module.attr("MIN") = static_cast<int>(HVD_MIN);
  module.attr("MAX") = static_cast<int>(HVD_MAX);
  module.attr("PRODUCT") = static_cast<int>(HVD_PRODUCT);
}

}  // namespace

void bind_operations(py::module_& module) {
  bind_numbers(module);
  py::class_<Handle>(module, "Handle")
      .def("wait", &Handle::wait, "Block until done; raise on error. Ctrl-C ends the wait, not the operation.")
      .def("poll", &Handle::poll, "True when done, be it well or with an error.")
      .def("stream_wait", &Handle::stream_wait, "Let a CUDA stream wait for the results. Does not block.")
      .def("output_place", &Handle::output_place,
           "Address, shape, dtype, and device or -1 of an output that the library made, once it is done.")
      .def("to_dlpack", &Handle::to_dlpack, "An output that the library made, once it is done.")
      .def("received_splits", &Handle::received_splits, "Of an alltoall that is done: rows from each rank of the set.")
      .def("last_joined_rank", &Handle::last_joined_rank, "Of a join that is done.");
  module.def("wait_all", wait_all, "Block until all handles are done, be it well or with an error.");
  module.def("streams_wait", streams_wait, "Let a CUDA stream wait for the results of all handles. Does not block.");
  module.def("enqueue", enqueue, "Hand a tensor over; see hvd_operation in c_api.h. Does not block.");
  add_function(module, enqueue_plain_method);
  module.def(
      "read_tensors_of", [](const py::type& type) { plain_tensor_reader().add_type(type); },
      "Let enqueue_plain take tensors of exactly this type, if they can be read without a call into Python.");
  module.def("enqueue_group", enqueue_group, "Hand several tensors over as one operation. Does not block.");
  module.def("enqueue_alltoall", enqueue_alltoall, "Hand a tensor over that is to be split. Does not block.");
  module.def("enqueue_join", enqueue_join, "This rank has no more data. Does not block.");
}

}  // namespace hvd::bindings
