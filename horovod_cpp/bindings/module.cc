// The Python module horovod_cpp._core: the C ABI as Python functions, pointers in and handles out; it knows no
// framework. Imported with the GIL held; every function that waits lets it go.
#include <pybind11/pybind11.h>

#include "horovod_cpp/bindings/bind.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, module) {
  module.doc() = "The C ABI of libhorovod_cpp.so (horovod_cpp/c_api.h) for Python.";
  if (hvd_abi_version() != HVD_ABI_VERSION) {
    throw py::import_error("libhorovod_cpp.so has the ABI version " + std::to_string(hvd_abi_version()) +
                           ", horovod_cpp._core was built for " + std::to_string(HVD_ABI_VERSION) +
                           "; install both from one build");
  }
  hvd::bindings::bind_errors(module);
  hvd::bindings::bind_builds(module);
  hvd::bindings::bind_call_site(module);
  hvd::bindings::bind_lifecycle(module);
  hvd::bindings::bind_process_sets(module);
  hvd::bindings::bind_operations(module);
  hvd::bindings::bind_in_place(module);
  hvd::bindings::bind_prepared(module);
  hvd::bindings::bind_statistics(module);
  hvd::bindings::bind_timeline(module);
}
