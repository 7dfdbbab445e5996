// The counters of the C ABI as a Python dictionary.
// Any thread.
#include "horovod_cpp/bindings/bind.h"

namespace py = pybind11;

namespace hvd::bindings {
namespace {

py::dict statistics() {
  refuse_after_fork();
  hvd_statistics value;
  HVD_INIT_STRUCT(&value);
  check(hvd_get_statistics(&value));
  py::dict counters;
  counters["operations_done"] = value.operations_done;
  counters["operations_failed"] = value.operations_failed;
  counters["bytes_reduced"] = value.bytes_reduced;
  counters["bytes_reordered"] = value.bytes_reordered;
  counters["nccl_registered_bytes"] = value.nccl_registered_bytes;
  counters["nccl_registrations_failed"] = value.nccl_registrations_failed;
  counters["collective_calls"] = value.collective_calls;
  counters["standing_calls"] = value.standing_calls;
  counters["standing_calls_withdrawn"] = value.standing_calls_withdrawn;
  counters["control_messages_sent"] = value.control_messages_sent;
  counters["control_bytes_sent"] = value.control_bytes_sent;
  counters["data_bytes_sent"] = value.data_bytes_sent;
  counters["data_bytes_pulled"] = value.data_bytes_pulled;
  counters["cache_hits"] = value.cache_hits;
  counters["background_cpu_nanoseconds"] = value.background_cpu_nanoseconds;
  counters["background_wakeups"] = value.background_wakeups;
  return counters;
}

}  // namespace

void bind_statistics(py::module_& module) {
  module.def("statistics", statistics, "What happened so far on this rank; see hvd_statistics in c_api.h.");
}

}  // namespace hvd::bindings
