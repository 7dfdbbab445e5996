// Where the user called: the walk up Python's frames, which each operation does.
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "horovod_cpp/bindings/bind.h"

namespace py = pybind11;

namespace hvd::bindings {
namespace {

// Of the process; the GIL guards it. Never destroyed: threads may call as long as there is an interpreter.
std::vector<std::string>& skipped_folders() {
  static auto* const folders = new std::vector<std::string>;
  return *folders;
}

bool is_skipped(std::string_view file) {
  for (const std::string& folder : skipped_folders()) {
    if (file.starts_with(folder)) return true;
  }
  return false;
}

// In place of a pybind11 function, whose dispatch costs more than the walk.
PyObject* call_site(PyObject* /*module*/, PyObject* /*unused*/) {
  auto frame =
      py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyThreadState_GetFrame(PyThreadState_Get())));
  while (frame) {
    auto* const here = reinterpret_cast<PyFrameObject*>(frame.ptr());
    const auto code = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetCode(here)));
    PyObject* const file = reinterpret_cast<PyCodeObject*>(code.ptr())->co_filename;
    Py_ssize_t length = 0;
    const char* const text = PyUnicode_AsUTF8AndSize(file, &length);
    if (text == nullptr) {
      PyErr_Clear();  // a name that is no text is nobody's folder of those
    } else if (is_skipped({text, static_cast<std::size_t>(length)})) {
      frame = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetBack(here)));
      continue;
    }
    const auto line = py::reinterpret_steal<py::object>(PyLong_FromLong(PyFrame_GetLineNumber(here)));
    if (!line) return nullptr;
    return PyTuple_Pack(2, text == nullptr ? Py_None : file, line.ptr());
  }
  return Py_BuildValue("(Oi)", Py_None, 0);
}

PyMethodDef call_site_method = {
    "call_site", call_site, METH_NOARGS,
    "File and line of the first caller outside the skipped folders; (None, 0) if there is none."};

}  // namespace

void bind_call_site(py::module_& module) {
  add_function(module, call_site_method);
  module.def(
      "skip_folder", [](std::string folder) { skipped_folders().push_back(std::move(folder)); },
      "Pass over the frames of files below `folder`, which ends with a slash, in call_site().");
}

}  // namespace hvd::bindings
