// Lifecycle and topology of the C ABI.
// The GIL is let go while init and shutdown block.
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "horovod_cpp/bindings/bind.h"
#include "horovod_cpp/bindings/gil.h"

namespace py = pybind11;

namespace hvd::bindings {
namespace {

using Ranks = std::vector<std::int32_t>;

void init(const std::vector<Ranks>& process_sets, const Ranks& comm,
          const std::vector<std::pair<std::string, std::string>>& settings) {
  refuse_after_fork();
  std::vector<hvd_rank_list> sets;
  for (const Ranks& ranks : process_sets) sets.push_back(rank_list(ranks));
  hvd_init_options options;
  HVD_INIT_STRUCT(&options);
  options.process_set_count = static_cast<std::int32_t>(sets.size());
  options.process_sets = sets.data();
  options.comm = rank_list(comm);
  std::vector<hvd_setting> given;
  for (const auto& [name, value] : settings) given.push_back({name.c_str(), value.c_str()});
  options.setting_count = static_cast<std::int32_t>(given.size());
  options.settings = given.data();
  const py::gil_scoped_release without_gil;
  check(hvd_init(&options));
}

void shutdown() {
  if (used_after_fork()) return;
  const py::gil_scoped_release without_gil;
  check(hvd_shutdown());
}

hvd_topology topology() {
  refuse_after_fork();
  hvd_topology value;
  HVD_INIT_STRUCT(&value);
  check(hvd_get_topology(&value));
  return value;
}

}  // namespace

void bind_lifecycle(py::module_& module) {
  module.def("init", init, py::arg("process_sets"), py::arg("comm"), py::arg("settings"),
             "Join the ranks of the job. Blocks. An empty `comm` means all ranks of the launch.");
  module.def("shutdown", shutdown, "End the job for all ranks. Blocks for about 5 s at most.");
  module.def("interpreter_ends", interpreter_ends,
             "Call first in an exit handler: threads that wait for operations stay asleep from now on.");
  module.def("is_initialized", [] { return !used_after_fork() && hvd_is_initialized() == 1; });
  module.def("version", [] { return hvd_version(); });
  module.def("topology", topology, "Place of this rank in the job.");

  py::class_<hvd_topology>(module, "Topology")
      .def_readonly("rank", &hvd_topology::rank)
      .def_readonly("size", &hvd_topology::size)
      .def_readonly("local_rank", &hvd_topology::local_rank)
      .def_readonly("local_size", &hvd_topology::local_size)
      .def_readonly("cross_rank", &hvd_topology::cross_rank)
      .def_readonly("cross_size", &hvd_topology::cross_size)
      .def_property_readonly("is_homogeneous", [](const hvd_topology& t) { return t.is_homogeneous == 1; })
      .def_property_readonly("mpi_enabled", [](const hvd_topology& t) { return t.mpi_enabled == 1; })
      .def_property_readonly("mpi_threads_supported",
                             [](const hvd_topology& t) { return t.mpi_threads_supported == 1; });
}

}  // namespace hvd::bindings
