// What training asks for most, an allreduce in place of a tensor in host memory, from Python's call to the engine in
// one function, and what is in flight then in an object that costs little to make: within a backward pass, where code
// and data are in no cache, each layer of Python is felt. With the GIL held, which is let go while somebody waits.
#include <cstring>
#include <memory>
#include <optional>

#include "horovod_cpp/bindings/bind.h"
#include "horovod_cpp/bindings/dlpack.h"
#include "horovod_cpp/bindings/gil.h"
#include "horovod_cpp/bindings/handle.h"

namespace py = pybind11;

namespace hvd::bindings {
namespace {

// ---- what is in flight; Python's `_core.InPlace`

struct InPlace {
  PyObject base;
  hvd_handle* handle;
  PyObject* tensor;
};

InPlace* in_place(PyObject* self) { return reinterpret_cast<InPlace*>(self); }

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(in_place(self)->tensor);
  return 0;
}

int clear(PyObject* self) {
  Py_CLEAR(in_place(self)->tensor);
  return 0;
}

void deallocate(PyObject* self) {
  PyObject_GC_UnTrack(self);
  clear(self);
  if (!used_after_fork()) hvd_handle_destroy(in_place(self)->handle);  // what is in flight goes on
  PyTypeObject* const type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* done(PyObject* self, PyObject* /*unused*/) {
  try {
    refuse_after_fork();
    return PyBool_FromLong(hvd_handle_poll(in_place(self)->handle));
  } catch (...) {
    set_python_error();
    return nullptr;
  }
}

PyObject* wait(PyObject* self, PyObject* /*unused*/) {
  try {
    refuse_after_fork();
    wait_in_slices([self](std::int64_t slice) { return hvd_handle_wait(in_place(self)->handle, slice); });
    PyObject* const tensor = in_place(self)->tensor;
    Py_XINCREF(tensor);
    return tensor;
  } catch (...) {
    set_python_error();
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"done", done, METH_NOARGS, "Whether `wait` would return at once."},
    {"wait", wait, METH_NOARGS, "Block until done and return the tensor; raise Error if it failed."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(deallocate)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(clear)},
    {Py_tp_methods, methods},
    {Py_tp_doc, const_cast<char*>("An allreduce in place, in flight.")},
    {0, nullptr},
};

PyType_Spec spec = {"horovod_cpp._core.InPlace", sizeof(InPlace), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, slots};

PyTypeObject* in_place_type = nullptr;  // the module has a reference

// ---- handing over

// What the function is given. The call site is that of the caller.
struct Arguments {
  PyObject* tensor;
  PyObject* name;
  PyObject* op;
  PyObject* prescale;
  PyObject* postscale;
  PyObject* process_set;
  PyObject* caller_waits;
};
constexpr Py_ssize_t kArguments = 7;

struct Drop {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Drop>;

// Each is nothing where something is out of the ordinary; Python's error may be set then.

std::optional<std::int32_t> int_of(PyObject* number) {
  if (!PyLong_CheckExact(number)) return std::nullopt;
  int overflow = 0;
  const long value = PyLong_AsLongAndOverflow(number, &overflow);
  if (overflow != 0 || value != static_cast<std::int32_t>(value)) return std::nullopt;
  return static_cast<std::int32_t>(value);
}

std::optional<std::int32_t> reduction_of(PyObject* op) {
  if (op == Py_None) return static_cast<std::int32_t>(HVD_AVERAGE);
  const std::optional<std::int32_t> known = int_of(op);
  return known && *known >= HVD_AVERAGE && *known <= HVD_PRODUCT ? known : std::nullopt;
}

// nullptr without a name.
std::optional<const char*> name_of(PyObject* name) {
  if (name == Py_None) return nullptr;
  if (!PyUnicode_CheckExact(name)) return std::nullopt;
  Py_ssize_t length = 0;
  const char* const text = PyUnicode_AsUTF8AndSize(name, &length);
  if (text == nullptr || length == 0 || std::strlen(text) != static_cast<std::size_t>(length)) return std::nullopt;
  return text;
}

std::optional<double> factor_of(PyObject* factor) {
  if (!PyFloat_CheckExact(factor)) return std::nullopt;
  return PyFloat_AS_DOUBLE(factor);
}

std::optional<std::int32_t> id_of(PyObject* process_set) {
  static PyObject* const attribute = PyUnicode_InternFromString("process_set_id");
  const Owned id(PyObject_GetAttr(process_set, attribute));
  return id ? int_of(id.get()) : std::nullopt;
}

// Whether torch negates when it reads it, which DLPack does not tell.
bool is_as_it_lies(PyObject* tensor) {
  static PyObject* const method = PyUnicode_InternFromString("is_neg");
  const Owned answer(PyObject_CallMethodNoArgs(tensor, method));
  return answer.get() == Py_False;
}

PyObject* try_start(const Arguments& arguments) {
  const std::optional<PlainTensor> plain = plain_tensor_reader().read(arguments.tensor);
  if (!plain || used_after_fork() || !is_as_it_lies(arguments.tensor)) return nullptr;
  const std::optional<std::int32_t> reduction = reduction_of(arguments.op);
  const std::optional<const char*> name = name_of(arguments.name);
  const std::optional<double> prescale = factor_of(arguments.prescale);
  const std::optional<double> postscale = factor_of(arguments.postscale);
  const std::optional<std::int32_t> process_set = id_of(arguments.process_set);
  if (!reduction || !name || !prescale || !postscale || !process_set) return nullptr;
  const Owned site(caller_of_package());
  if (!site) return nullptr;
  PyObject* const file = PyTuple_GET_ITEM(site.get(), 0);
  const Owned started(in_place_type->tp_alloc(in_place_type, 0));
  if (!started) return nullptr;

  hvd_operation operation;
  HVD_INIT_STRUCT(&operation);
  operation.op = HVD_ALLREDUCE;
  operation.name = *name;
  operation.process_set = *process_set;
  operation.reduce_op = *reduction;
  operation.prescale = *prescale;
  operation.postscale = *postscale;
  operation.call_site_file = file == Py_None ? nullptr : PyUnicode_AsUTF8(file);
  operation.call_site_line = static_cast<std::int32_t>(PyLong_AsLong(PyTuple_GET_ITEM(site.get(), 1)));
  operation.caller_waits = arguments.caller_waits == Py_True ? 1 : 0;
  operation.input = {plain->data, plain->shape, plain->dimensions, plain->dtype, HVD_HOST, 0, nullptr};
  operation.output = operation.input;
  operation.keep_alive = arguments.tensor;
  operation.release = [](void* tensor) { drop_reference(static_cast<PyObject*>(tensor)); };
  Py_INCREF(arguments.tensor);  // for release
  if (hvd_enqueue(&operation, &in_place(started.get())->handle) != HVD_OK) {
    Py_DECREF(arguments.tensor);
    return nullptr;
  }
  Py_INCREF(arguments.tensor);
  in_place(started.get())->tensor = arguments.tensor;
  Py_INCREF(started.get());
  return started.get();
}

PyObject* start_in_place(PyObject* /*module*/, PyObject* const* given, Py_ssize_t count) {
  if (count != kArguments) {
    return PyErr_Format(PyExc_TypeError, "start_in_place() takes %zd arguments, not %zd", kArguments, count);
  }
  if (PyObject* const started = try_start({given[0], given[1], given[2], given[3], given[4], given[5], given[6]})) {
    return started;
  }
  PyErr_Clear();
  Py_RETURN_NONE;
}

PyMethodDef start_method = {
    "start_in_place", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(start_in_place)), METH_FASTCALL,
    "Hand a tensor over for an allreduce in place; None where anything is out of the ordinary. Does not block."};

}  // namespace

void bind_in_place(py::module_& module) {
  PyObject* const type = PyType_FromSpec(&spec);
  if (type == nullptr) throw py::error_already_set();
  in_place_type = reinterpret_cast<PyTypeObject*>(type);
  in_place_type->tp_new = nullptr;  // Python cannot make one that is nothing in flight
  module.add_object("InPlace", type);
  add_function(module, start_method);
}

}  // namespace hvd::bindings
