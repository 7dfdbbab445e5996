// Where the user called: the walk up Python's frames, which each operation does.
#include <cstddef>
#include <functional>
#include <new>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "horovod_cpp/bindings/bind.h"

#include <frameobject.h>

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

int instruction_of(PyFrameObject* frame) {
#if PY_VERSION_HEX >= 0x030B0000
  return PyFrame_GetLasti(frame);
#else
  return frame->f_lasti;
#endif
}

// What has been said of each place in the code. Python finds the line of an instruction by counting from the start of
// its function, which takes microseconds in a long script, and a training loop asks from the same few places for ever.
class KnownPlaces {
 public:
  /// (file, line) of the instruction that `frame` is at; borrowed. nullptr, and Python's error, without memory.
  PyObject* find(PyFrameObject* frame, PyObject* code, PyObject* file) {
    const Place place{code, instruction_of(frame)};
    if (const auto known = sites_.find(place); known != sites_.end()) return known->second.site.ptr();
    const auto line = py::reinterpret_steal<py::object>(PyLong_FromLong(PyFrame_GetLineNumber(frame)));
    if (!line) return nullptr;
    auto site = py::reinterpret_steal<py::object>(PyTuple_Pack(2, file, line.ptr()));
    if (!site) return nullptr;
    if (sites_.size() >= kMost) {
      const auto old = std::exchange(sites_, {});  // the end of code may run Python, and that ask for a place
    }
    const auto added = sites_.emplace(place, Site{py::reinterpret_borrow<py::object>(code), std::move(site)});
    return added.first->second.site.ptr();
  }

 private:
  static constexpr std::size_t kMost = 4096;  // a program that makes code all the time does not fill the memory

  struct Place {
    PyObject* code;
    int instruction;
    bool operator==(const Place&) const = default;
  };
  struct Hash {
    std::size_t operator()(const Place& place) const {
      return std::hash<PyObject*>()(place.code) * 31 + static_cast<std::size_t>(place.instruction);
    }
  };
  struct Site {
    py::object code;  // kept, so that no other code gets its address
    py::object site;
  };

  std::unordered_map<Place, Site, Hash> sites_;
};

// As above.
KnownPlaces& known_places() {
  static auto* const places = new KnownPlaces;
  return *places;
}

// In place of a pybind11 function, whose dispatch costs more than the walk.
PyObject* call_site(PyObject* /*module*/, PyObject* /*unused*/) { return caller_of_package(); }

PyMethodDef call_site_method = {
    "call_site", call_site, METH_NOARGS,
    "File and line of the first caller outside the skipped folders; (None, 0) if there is none."};

}  // namespace

PyObject* caller_of_package() {
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
    try {
      PyObject* const site = known_places().find(here, code.ptr(), text == nullptr ? Py_None : file);
      Py_XINCREF(site);
      return site;
    } catch (const std::bad_alloc&) {
      return PyErr_NoMemory();
    }
  }
  return Py_BuildValue("(Oi)", Py_None, 0);
}

void bind_call_site(py::module_& module) {
  add_function(module, call_site_method);
  module.def(
      "skip_folder", [](std::string folder) { skipped_folders().push_back(std::move(folder)); },
      "Pass over the frames of files below `folder`, which ends with a slash, in call_site().");
}

}  // namespace hvd::bindings
