// The timeline of the C ABI.
// The GIL is let go while a file is opened or ended.
#include <string>

#include "horovod_cpp/bindings/bind.h"

namespace py = pybind11;

namespace hvd::bindings {
namespace {

void start(const std::string& path, bool mark_cycles) {
  refuse_after_fork();
  const py::gil_scoped_release without_gil;
  check(hvd_timeline_start(path.c_str(), mark_cycles ? 1 : 0));
}

void stop() {
  refuse_after_fork();
  const py::gil_scoped_release without_gil;
  check(hvd_timeline_stop());
}

}  // namespace

void bind_timeline(py::module_& module) {
  module.def("timeline_start", start, py::arg("path"), py::arg("mark_cycles"),
             "Record into this file from now on; see hvd_timeline_start in c_api.h.");
  module.def("timeline_stop", stop, "End the file; nothing if none is recorded. Blocks until everything is in it.");
}

}  // namespace hvd::bindings
