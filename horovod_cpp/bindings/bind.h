// What the bind_<area> functions share: how a failed call of the C ABI becomes a Python exception.
// Everything here runs with the GIL held, unless it says otherwise.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include <horovod_cpp/c_api.h>

namespace hvd::bindings {

/// A call of the C ABI that failed; Python sees `_core.Error` with the attribute `code`.
class ApiError : public std::runtime_error {
 public:
  ApiError(int code, const std::string& text) : std::runtime_error(text), code_(code) {}
  int code() const { return code_; }

 private:
  int code_;
};

/// A call in a child process of a rank; Python sees `_core.ForkError`, a subclass of `_core.Error`.
class ForkError : public ApiError {
 public:
  using ApiError::ApiError;
};

/// Throws ApiError with the text of this thread's last failure, unless `code` is HVD_OK.
void check(int code);

/// In a function of C that Python calls, inside a catch block: makes the exception that is handled Python's.
void set_python_error() noexcept;

/// Adds a function of C, which costs less to call than one of pybind11. `method` has to stay.
void add_function(pybind11::module_& module, PyMethodDef& method);

/// (file, line) of the first caller in Python outside this package and what skip_folder named, (None, 0) where there is
/// none; a new reference. nullptr, and Python's error, without memory.
PyObject* caller_of_package();

/// True in a process that was forked from an initialised one. The engine's threads are not there, its locks may be
/// held for ever: nothing of the C ABI may be called. Any thread, GIL or not.
bool used_after_fork();

/// Throws ForkError in such a process.
void refuse_after_fork();

/// Makes the exception types, and has forks noticed from now on.
void bind_errors(pybind11::module_& module);
void bind_builds(pybind11::module_& module);
void bind_call_site(pybind11::module_& module);
void bind_lifecycle(pybind11::module_& module);
void bind_process_sets(pybind11::module_& module);
void bind_operations(pybind11::module_& module);
void bind_in_place(pybind11::module_& module);
void bind_prepared(pybind11::module_& module);
void bind_statistics(pybind11::module_& module);
void bind_timeline(pybind11::module_& module);

/// A borrowed view of `ranks` for the C ABI.
inline hvd_rank_list rank_list(const std::vector<std::int32_t>& ranks) {
  return {ranks.data(), static_cast<std::int32_t>(ranks.size())};
}

}  // namespace hvd::bindings
