// Allreduces that are asked for again and again, of one tensor of host memory each, in place: what is the same each
// time is made once, and the handles stay here, so that little is left to do within a backward pass. With the GIL held,
// which is let go while somebody waits.
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "horovod_cpp/bindings/bind.h"
#include "horovod_cpp/bindings/dlpack.h"
#include "horovod_cpp/bindings/gil.h"
#include "horovod_cpp/bindings/handle.h"

namespace py = pybind11;

namespace hvd::bindings {
namespace {

struct DestroyHandle {
  void operator()(hvd_handle* handle) const {
    if (!used_after_fork()) hvd_handle_destroy(handle);
  }
};

struct Prepared {
  std::string name;
  std::optional<std::string> call_site_file;
  hvd_operation operation{};
  std::unique_ptr<hvd_handle, DestroyHandle> in_flight;  // it goes on without us
};

constexpr const char* kPrepared = "horovod_cpp.Prepared";

// Gets the reference that start took. Runs inside a function of the C ABI, where the GIL may be let go.
void release_reference(void* object) { drop_reference(static_cast<PyObject*>(object)); }

Prepared& prepared_of(PyObject* capsule) {
  auto* const prepared = static_cast<Prepared*>(PyCapsule_GetPointer(capsule, kPrepared));
  if (prepared == nullptr) throw py::error_already_set();
  return *prepared;
}

py::capsule prepare_allreduce(const std::string& name, int process_set, int reduce_op, double prescale,
                              double postscale, const std::tuple<std::optional<std::string>, int>& call_site) {
  if (name.find('\0') != std::string::npos) throw py::value_error("a name may not contain a zero byte");
  auto made = std::make_unique<Prepared>();
  made->name = name;
  made->call_site_file = std::get<0>(call_site);
  hvd_operation& operation = made->operation;
  HVD_INIT_STRUCT(&operation);
  operation.op = HVD_ALLREDUCE;
  operation.name = made->name.c_str();
  operation.process_set = process_set;
  operation.reduce_op = reduce_op;
  operation.prescale = prescale;
  operation.postscale = postscale;
  operation.call_site_file = made->call_site_file ? made->call_site_file->c_str() : nullptr;
  operation.call_site_line = std::get<1>(call_site);
  operation.release = release_reference;
  auto capsule = py::reinterpret_steal<py::capsule>(PyCapsule_New(made.get(), kPrepared, [](PyObject* object) {
    delete static_cast<Prepared*>(PyCapsule_GetPointer(object, kPrepared));
  }));
  if (!capsule) throw py::error_already_set();
  static_cast<void>(made.release());
  return capsule;
}

bool start_prepared(PyObject* capsule, PyObject* tensor) {
  Prepared& prepared = prepared_of(capsule);
  const std::optional<PlainTensor> plain = plain_tensor_reader().read(tensor);
  if (!plain) return false;
  refuse_after_fork();
  hvd_operation& operation = prepared.operation;
  operation.input = {plain->data, plain->shape, plain->dimensions, plain->dtype, HVD_HOST, 0, nullptr};
  operation.output = operation.input;
  operation.keep_alive = tensor;
  auto keep_alive = py::reinterpret_borrow<py::object>(tensor);
  hvd_handle* handle = nullptr;
  check(hvd_enqueue(&operation, &handle));
  static_cast<void>(keep_alive.release());  // release_reference has it now
  prepared.in_flight.reset(handle);
  return true;
}

PyObject* start_prepared_from_python(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "start_prepared() takes 2 arguments, not %zd", count);
  try {
    return PyBool_FromLong(start_prepared(arguments[0], arguments[1]) ? 1 : 0);
  } catch (...) {
    set_python_error();
    return nullptr;
  }
}

PyMethodDef start_prepared_method = {
    "start_prepared", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(start_prepared_from_python)),
    METH_FASTCALL, "Hand a tensor over; false for one that does not lie in host memory as it is. Does not block."};

using Failure = std::tuple<std::size_t, std::string>;  // which one, and why

std::vector<Failure> wait_prepared(const std::vector<py::capsule>& capsules) {
  refuse_after_fork();
  std::vector<Prepared*> all;
  std::vector<hvd_handle*> handles;
  for (const py::capsule& capsule : capsules) {
    Prepared& prepared = prepared_of(capsule.ptr());
    if (!prepared.in_flight) throw py::value_error("'" + prepared.name + "' is not in flight");
    all.push_back(&prepared);
    handles.push_back(prepared.in_flight.get());
  }
  wait_in_slices([&](std::int64_t slice) {
    return hvd_handles_wait(handles.data(), static_cast<std::int32_t>(handles.size()), slice);
  });
  std::vector<Failure> failures;
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (hvd_handle_wait(handles[i], /*limit_nanoseconds=*/0) != HVD_OK) failures.emplace_back(i, hvd_last_error());
    all[i]->in_flight = nullptr;
  }
  return failures;
}

}  // namespace

void bind_prepared(py::module_& module) {
  module.def("prepare_allreduce", prepare_allreduce,
             "What start_prepared takes, for an allreduce in place. Once it is gone, what is in flight goes on.");
  add_function(module, start_prepared_method);
  module.def("wait_prepared", wait_prepared, "Block until all are done; which ones failed, and why.");
}

}  // namespace hvd::bindings
