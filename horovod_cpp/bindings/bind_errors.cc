// Failures of the C ABI as Python exceptions, and the notice that this process is a fork of a rank.
// check() and bind_errors() need the GIL; the fork notice is an atomic flag.
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <exception>

#include <pybind11/gil_safe_call_once.h>

#include "horovod_cpp/bindings/bind.h"

namespace py = pybind11;

namespace hvd::bindings {
namespace {

struct ErrorTypes {
  py::object error;
  py::object fork_error;
};

// Never destroyed: the translator may run as long as there is an interpreter.
PYBIND11_CONSTINIT py::gil_safe_call_once_and_store<ErrorTypes> error_types;

std::atomic<bool> initialized_at_fork{false};
std::atomic<bool> forked{false};

void before_fork() { initialized_at_fork = hvd_is_initialized() == 1; }
void after_fork_in_child() {
  if (initialized_at_fork) forked = true;
}

void raise(const py::object& type, const ApiError& error) {
  py::object instance = type(error.what());
  instance.attr("code") = error.code();
  PyErr_SetObject(type.ptr(), instance.ptr());
}

void translate(std::exception_ptr thrown) {  // NOLINT(performance-unnecessary-value-param): pybind11 names the type
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const ForkError& error) {
    raise(error_types.get_stored().fork_error, error);
  } catch (const ApiError& error) {
    raise(error_types.get_stored().error, error);
  }
}

py::object new_type(py::module_& module, const char* name, py::handle base, const char* doc) {
  const std::string full_name = std::string("horovod_cpp._core.") + name;
  auto type = py::reinterpret_steal<py::object>(
      PyErr_NewExceptionWithDoc(full_name.c_str(), doc, base.ptr(), /*dict=*/nullptr));
  if (!type) throw py::error_already_set();
  type.attr("code") = static_cast<int>(HVD_INTERNAL);
  module.add_object(name, type);
  return type;
}

}  // namespace

void check(int code) {
  if (code != HVD_OK) throw ApiError(code, hvd_last_error());
}

void set_python_error() noexcept {
  try {
    throw;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const ForkError& error) {
    raise(error_types.get_stored().fork_error, error);
  } catch (const ApiError& error) {
    raise(error_types.get_stored().error, error);
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

void add_function(py::module_& module, PyMethodDef& method) {
  const auto function = py::reinterpret_steal<py::object>(PyCFunction_New(&method, module.ptr()));
  if (!function) throw py::error_already_set();
  module.add_object(method.ml_name, function);
}

bool used_after_fork() { return forked.load(std::memory_order_relaxed); }

void refuse_after_fork() {
  if (!used_after_fork()) return;
  throw ForkError(HVD_PRECONDITION,
                  "horovod_cpp was used after fork in pid " + std::to_string(getpid()) +
                      ": a child process is no rank of the job. Call hvd.* in the parent only, or start the child "
                      "with the method 'spawn' or 'forkserver'.");
}

void bind_errors(py::module_& module) {
  error_types.call_once_and_store_result([&] {
    const py::object error = new_type(module, "Error", PyExc_RuntimeError, "A failed call; `code` is its hvd_code.");
    return ErrorTypes{error, new_type(module, "ForkError", error, "A call in a child process of a rank.")};
  });
  py::register_exception_translator(translate);
  module.attr("OK") = static_cast<int>(HVD_OK);
  module.attr("INVALID_ARGUMENT") = static_cast<int>(HVD_INVALID_ARGUMENT);
  module.attr("PRECONDITION") = static_cast<int>(HVD_PRECONDITION);
  module.attr("INTERNAL") = static_cast<int>(HVD_INTERNAL);
  module.attr("UNAVAILABLE") = static_cast<int>(HVD_UNAVAILABLE);
  if (pthread_atfork(before_fork, /*parent=*/nullptr, after_fork_in_child) != 0) {
    throw std::runtime_error("pthread_atfork failed: out of memory");
  }
}

}  // namespace hvd::bindings
